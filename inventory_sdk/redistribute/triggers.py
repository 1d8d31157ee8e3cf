"""``@inventory.trigger("order_paid", runs=recalculate)``: a place that causes a recalculation, named and counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from typing import Any, Final, Protocol

from inventory_sdk.model import check_text
from inventory_sdk.redistribute.coalesced import CoalesceAspect, Coalesced, given_by_name
from inventory_sdk.selectors import Selector, compile_text
from inventory_sdk.weave import Call, Order, Proceed, Site, site_of

REMEMBERED: Final = 1024
"""Requests of one trigger whose key and arguments are known in their written form."""
SHORT: Final = 128
"""Characters of an argument up to which it is remembered."""


@dataclass(frozen=True, slots=True)
class TriggerCount:
    """What one trigger did, in all processes since the beginning.

    ``calls`` of its function that asked for a run; ``runs`` it caused, being the first to ask; ``cpu_seconds``: its part of what
    the runs took, by its part of the calls that they answered. ``place``: the function it stands at; ``function``: what it runs.
    """

    name: str
    function: str
    place: str
    calls: int
    runs: int
    cpu_seconds: float


class Inbox(Protocol):
    """Where the requests of one start go; ``closed`` once it takes no more."""

    closed: bool

    def fire(self, key: str, arguments: str, trigger: str) -> asyncio.Future[None] | None:
        """Ask for a run; done once it is written down, or has been tried for a while, the caller's own; None: a request that is
        written down covers it."""
        ...


class Firing(Protocol):
    """Where a trigger brings its requests."""

    def asking(self, function: Coalesced) -> Inbox:
        """Of this event loop; ``NotStarted`` where nothing could be asked for."""
        ...


class TriggerAspect:
    """Asks for a run of ``runs`` once the function has returned. Where the function raised nothing is asked for; where it was
    cancelled it may have had its effect, and a run is."""

    order = Order.TRIGGER

    def __init__(self, room: Firing, name: str, runs: Any, key: Selector | None) -> None:
        self._room = room
        self.name = check_text("trigger", name)
        site = site_of(runs)
        aspect = None if site is None else site.find(Order.COALESCE)
        if not isinstance(aspect, CoalesceAspect) or aspect.function is None:
            raise TypeError(f"trigger({name!r}): runs={runs!r} must be a function with @inventory.coalesce")
        self.runs = aspect.function
        self._key = key

    def compile(self, site: Site, proceed: Proceed) -> Proceed:
        room, name, runs = self._room, self.name, self.runs
        picks = self._picks(site)

        def write(*given: Any) -> tuple[str, str]:
            arguments = dict(zip(picks, given, strict=True))
            return check_text("key", runs.key(_values(runs, arguments))), runs.arguments(arguments)

        # A few shops cause most of it. What a key's own function says may change.
        remembered = lru_cache(REMEMBERED)(write) if isinstance(runs.options.key, str) else write

        async def run(call: Call) -> Any:
            asking = room.asking(runs)
            values = call.values()
            given = [pick(values) for pick in picks.values()]
            short = all(type(each) is str and len(each) <= SHORT for each in given)
            key, text = remembered(*given) if short else write(*given)
            try:
                result = await proceed(call)
            except asyncio.CancelledError:
                _open(asking).fire(key, text, name)
                raise
            asked = _open(asking).fire(key, text, name)
            if asked is not None:
                await asked
            return result

        def _open(asking: Inbox) -> Inbox:
            return room.asking(runs) if asking.closed else asking

        return run

    def _picks(self, site: Site) -> dict[str, Callable[[Sequence[Any]], Any]]:
        """From the trigger's arguments to those of the run, by name: what ``key`` says, and what both functions have."""
        runs = self.runs
        picks: dict[str, Callable[[Sequence[Any]], Any]] = {}
        if self._key is not None:
            picks[self._keyed()] = compile_text(site, "key", self._key, required=True)
        for name in given_by_name(runs):
            if name in picks:
                continue
            if name not in site.names or name in site.injected:
                hint = "" if self._key is not None else ", or say with key= where it is"
                raise TypeError(f"trigger({self.name!r}): {runs.name} needs {name!r}; {site.label} has no such parameter: add it{hint}")
            picks[name] = _at(site.names.index(name))
        return picks

    def _keyed(self) -> str:
        """The one parameter of the run that its key is made of."""
        key = self.runs.options.key
        if isinstance(key, str):
            if "{" not in key and key in self.runs.site.names:
                return key
            parts = list(Formatter().parse(key))
            if len(parts) == 1 and parts[0][0] == "" and parts[0][1] in self.runs.site.names:
                return str(parts[0][1])
        raise TypeError(
            f"trigger({self.name!r}, key={self._key!r}): the key of {self.runs.name} is {key!r} and not one parameter; "
            "leave key= out, and the parameters are found by their names"
        )


def _values(function: Coalesced, given: dict[str, Any]) -> tuple[Any, ...]:
    return Call(function.site, function.site.function, None, (), given).values()


def _at(index: int) -> Callable[[Sequence[Any]], Any]:
    return lambda values: values[index]
