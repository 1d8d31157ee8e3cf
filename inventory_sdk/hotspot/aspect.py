"""``@inventory.hotspot(...)``: only calls of hot keys pay.

A cold call costs its keys, one addition each to a table of counts, and a look whether anything is hot: no clock, no lock, no await of
its own. So ``run`` is a plain function that hands on the awaitable of what stands further in.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from inventory_sdk import context
from inventory_sdk.errors import HotspotLimited, InvalidOperation
from inventory_sdk.hotspot.rates import Rule
from inventory_sdk.model import SEPARATOR, Lane, Line, check_text
from inventory_sdk.selectors import Pick, Selector, as_text, compile_selector
from inventory_sdk.weave import Call, Order, Proceed, Site

if TYPE_CHECKING:
    from inventory_sdk.hotspot.hotspots import Here

ROOM_WITHOUT_LANE: Final = 10_000
"""Calls without a lane that may wait at once."""

OnReject = Callable[[HotspotLimited], Any]
"""Gets the refusal; what it answers (or its awaitable) is the call's result, what it raises is raised instead."""


class Hall(Protocol):
    """What the aspect asks the controller for. ``last``: the half that ``here`` answered last, and of which event loop."""

    @property
    def last(self) -> tuple[weakref.ref[asyncio.AbstractEventLoop] | None, Here | None]: ...

    def here(self) -> Here: ...

    def lane(self, name: str) -> Lane | None: ...

    def default_merchant(self) -> str | None: ...


class HotspotAspect:
    """One rule on one function. ``keys``: a selector of one key or several; None: the SKUs of the function's stock decorator."""

    order = Order.HOTSPOT

    def __init__(self, hall: Hall, rule: Rule, keys: Selector | None, on_reject: OnReject | None) -> None:
        self._hall = hall
        self._rule = rule
        self._keys = keys
        self._on_reject = on_reject

    def compile(self, site: Site, proceed: Proceed) -> Proceed:
        hall, rule, on_reject = self._hall, self._rule, self._on_reject
        threshold, get_running_loop = rule.threshold, asyncio.get_running_loop
        keys_of, checked = self._reader(site)

        async def paced(call: Call, here: Here, keys: Sequence[str]) -> Any:
            lane = context.lane.get()
            known = hall.lane(lane)
            room = ROOM_WITHOUT_LANE if known is None else max(1, known.max_concurrency // 2)
            assert here.paces is not None  # nothing is hot before the start
            try:
                await here.paces.enter(rule, keys, lane, room)
            except HotspotLimited as limited:
                if on_reject is None:
                    raise
                answer = on_reject(limited)
                return await answer if isinstance(answer, Awaitable) else answer
            return await proceed(call)

        async def refused(error: InvalidOperation) -> Any:
            raise error

        def run(call: Call) -> Awaitable[Any]:
            loop, here = hall.last
            if here is None or loop is None or loop() is not get_running_loop():
                here = hall.here()
            try:
                keys = keys_of(call)
            except InvalidOperation as error:
                # The stock aspect will say so, in the words that its raises= has for it.
                return proceed(call) if checked else refused(error)
            watch = here.watches.get(threshold) or here.watch(threshold)
            hot = watch.hot
            if type(keys) is str:
                counts = watch.ring.counts
                if keys in counts:
                    counts[keys] += 1
                    if hot and keys in hot:
                        return paced(call, here, (keys,))
                    return proceed(call)
                keys = (keys,)
            if not checked:
                try:
                    for key in keys:
                        check_text("keys", key)
                except InvalidOperation as error:
                    return refused(error)
            watch.ring.count(keys)
            warm = [key for key in keys if key in hot] if hot else None
            return paced(call, here, warm) if warm else proceed(call)

        return run

    def _reader(self, site: Site) -> tuple[Callable[[Call], str | Sequence[str]], bool]:
        """From a call to its key or keys, and whether somebody further in checks what they come from."""
        if self._keys is not None:
            return _named(compile_selector(site, "keys", self._keys)), False
        # The stock aspect stands further in, so it is compiled by now.
        stock: Any = site.find(Order.STOCK)
        lines: Pick | None = getattr(stock, "lines", None)
        if lines is None:
            raise TypeError(f"{site.label}: hotspot needs keys=, because no stock decorator of this function names lines")
        return _of_lines(lines, stock.merchant, self._hall), True


def _named(pick: Pick) -> Callable[[Call], str | Sequence[str]]:
    def keys(call: Call) -> str | Sequence[str]:
        value = pick(call.values())
        if type(value) is str:
            return value
        if isinstance(value, Iterable) and not isinstance(value, str | bytes):
            return [each if type(each) is str else as_text("keys", each) for each in value]
        return as_text("keys", value)

    return keys


def _of_lines(lines: Pick, merchant: Pick | None, hall: Hall) -> Callable[[Call], str | Sequence[str]]:
    def keys(call: Call) -> str | Sequence[str]:
        values = call.values()
        home = None if merchant is None else merchant(values)
        if home is None:
            home = context.merchant.get() or hall.default_merchant()
        found: list[Line] = lines(values)
        if len(found) == 1:
            (line,) = found
            return f"{home if line.merchant is None else line.merchant}{SEPARATOR}{line.sku}"
        return [f"{home if line.merchant is None else line.merchant}{SEPARATOR}{line.sku}" for line in found]

    return keys
