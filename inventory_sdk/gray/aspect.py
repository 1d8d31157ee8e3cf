"""``@inventory.gray("link", candidate=…)``: the call goes to the stable function or to the candidate, by its merchant.

A plain candidate runs inside the stable function's other aspects: the stock is taken, the hotspot paced, the receipt injected by what
stands on the stable function, whichever of the two runs. A candidate with aspects of its own is called as a whole; then its stock
aspect must be the stable one's, or there would be two sellers of one stock.

A candidate given by name is looked up when the class is there, so what is wrong with it is a ``TypeError`` at ``start()``, at the latest
at the first call.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import fields
from typing import Any, Final, Protocol

from inventory_sdk import context
from inventory_sdk.gray.decision import CANDIDATE, Decision
from inventory_sdk.gray.rules import check_link
from inventory_sdk.selectors import Pick, Selector, compile_text
from inventory_sdk.weave import Call, Order, Proceed, Site, owner_of, site_of

OWN: Final = frozenset({"name", "version", "upgrade"})
"""What two stock decorators of one act can't share."""


class Links(Protocol):
    """What the aspect asks the controller for."""

    def decide(self, link: str, merchant: str | None = None) -> Decision: ...
    def count(self, link: str, variant: str, merchant: str, seconds: float, failed: bool) -> None: ...
    def home(self, merchant: str | None) -> str: ...


class GrayAspect:
    """One link on one function. ``merchant``: a selector; None: the stock decorator's, else the request's, else the Inventory's."""

    order = Order.GRAY

    def __init__(self, links: Links, link: str, candidate: Any, merchant: Selector | None) -> None:
        self.link = check_link(link)
        if not isinstance(candidate, str) and not callable(candidate):
            raise TypeError(f"gray({link!r}): candidate={candidate!r} must be an async function, or the name of a method")
        self.candidate = candidate
        self.site: Site | None = None
        self._links = links
        self._merchant = merchant
        self._whole = False
        self._checked = False

    def compile(self, site: Site, proceed: Proceed) -> Proceed:
        self.site = site
        self._checked = False
        links, link = self._links, self.link
        stock = site.find(Order.STOCK)
        act = getattr(stock, "act", None)
        later = act is not None and act.run == "later"
        if later and self._merchant is not None:
            raise TypeError(f"{site.label}: merchant= of a run='later' function stands in its stock decorator, for both of them")
        pick = self._picked(site, act)
        clock, sides = time.perf_counter, context.sides

        async def run(call: Call) -> Any:
            if not self._checked:
                self.check()
            token = sides.set({}) if sides.get() is None else None
            try:
                merchant = links.home(None if pick is None else pick(call.values()))
                decision = links.decide(link, merchant)
                if later:
                    return await proceed(call)  # it runs in the worker, which counts it
                target: Awaitable[Any]
                if decision.variant is not CANDIDATE:
                    target = proceed(call)
                elif self._whole:
                    target = self.bound(call.instance)(*call.args, **call.kwargs)
                else:
                    call.function = self.bound(call.instance)
                    target = proceed(call)
                began = clock()
                try:
                    result = await target
                except asyncio.CancelledError:
                    raise
                except BaseException:
                    links.count(link, decision.variant, merchant, clock() - began, True)
                    raise
                links.count(link, decision.variant, merchant, clock() - began, False)
                return result
            finally:
                if token is not None:
                    sides.reset(token)

        return run

    def _picked(self, site: Site, act: Any) -> Pick | None:
        selector = self._merchant if self._merchant is not None else getattr(act, "merchant", None)
        return None if selector is None else compile_text(site, "merchant", selector, required=False)

    @property
    def has_receiver(self) -> bool:
        """Whether the function is called on an instance or a class."""
        return self.site is not None and self.site.receiver is not None

    def bound(self, instance: Any) -> Callable[..., Awaitable[Any]]:
        """The candidate for a call on ``instance`` (a class for classmethods, None for functions)."""
        assert self.site is not None
        found: Any = self.candidate
        if isinstance(self.candidate, str):
            found = getattr(owner_of(self.site) if instance is None else instance, self.candidate)
        elif instance is not None:
            found = functools.partial(found, instance)
        bound: Callable[..., Awaitable[Any]] = found
        return bound

    def check(self) -> None:
        """``TypeError`` for a candidate that can't stand in for the function."""
        site = self.site
        assert site is not None
        self._check(site)
        self._checked = True

    def _check(self, site: Site) -> None:
        candidate = self._static(site)
        said = f"{site.label}: the candidate {getattr(candidate, '__qualname__', self.candidate)!r} of gray link {self.link!r}"
        other = site_of(candidate)
        plain = other.function if other is not None else getattr(candidate, "__func__", candidate)
        if not inspect.iscoroutinefunction(plain):
            raise TypeError(f"{said} is not 'async def'")
        if _shape(site.signature, site.receiver) != _shape(inspect.signature(plain), site.receiver):
            raise TypeError(f"{said} takes {inspect.signature(plain)}, but its callers pass {site.signature}: they must be the same")
        if other is None:
            return
        gray = other.find(Order.GRAY)
        if isinstance(gray, GrayAspect) and gray.link == self.link:
            raise TypeError(f"{said} goes through the same link")
        self._compare(said, site.find(Order.STOCK), other.find(Order.STOCK))
        self._whole = True

    def _static(self, site: Site) -> Any:
        if not isinstance(self.candidate, str):
            return self.candidate
        owner = owner_of(site)
        if owner is None:
            raise TypeError(f"{site.label}: candidate={self.candidate!r} names a method, but this is a function: pass the function itself")
        try:
            found = inspect.getattr_static(owner, self.candidate)
        except AttributeError as error:
            raise TypeError(f"{site.label}: candidate={self.candidate!r}: {owner.__qualname__} has no such method") from error
        kind = {"cls": classmethod, None: staticmethod}.get(site.receiver)
        wrapped = getattr(found, "__wrapped__", found)
        if kind is not None and not isinstance(found, kind) and not isinstance(wrapped, kind):
            raise TypeError(f"{site.label}: candidate={self.candidate!r} must be a {kind.__name__} as well")
        if kind is None and (isinstance(found, classmethod | staticmethod) or isinstance(wrapped, classmethod | staticmethod)):
            raise TypeError(f"{site.label}: candidate={self.candidate!r} must be an ordinary method as well")
        return found

    def _compare(self, said: str, stable: Any, candidate: Any) -> None:
        """Gray links never route between functions that do different things to stock."""
        if stable is None and candidate is None:
            return
        if candidate is None:
            raise TypeError(f"{said} has aspects of its own but moves no stock, the stable one does: leave it plain")
        if stable is None:
            raise TypeError(f"{said} moves stock ({candidate.act.kind}), the stable one doesn't: that would be two sellers of one stock")
        if "later" in (stable.act.run, candidate.act.run):
            raise TypeError(f"{said} must be plain: a run='later' candidate runs inside the stable function's stock decorator")
        for field in fields(stable.act):
            if field.name not in OWN and getattr(stable.act, field.name) != getattr(candidate.act, field.name):
                mine, other = getattr(stable.act, field.name), getattr(candidate.act, field.name)
                why = f"differs in what it does to stock: {field.name}={other!r} instead of {mine!r}"
                raise TypeError(f"{said} {why}; leave it plain, and it runs inside the stable function's decorators")


def _shape(signature: inspect.Signature, receiver: str | None) -> list[tuple[str, Any, Any]]:
    """What a caller may pass: names, kinds and defaults; a receiver may be called as it likes."""
    shape = [(each.name, each.kind, each.default) for each in signature.parameters.values()]
    if receiver is not None and shape:
        shape[0] = ("", *shape[0][1:])
    return shape
