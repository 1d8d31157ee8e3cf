"""``@inventory.lane("core")``: the outermost aspect of a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence, Sized
from typing import Any, Protocol

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.selectors import Pick, Selector, compile_selector
from inventory_sdk.traffic.gate import seconds_for
from inventory_sdk.traffic.lanes import Lanes
from inventory_sdk.weave import Call, Order, Proceed, Site


class Room(Protocol):
    """What the aspect asks its Inventory for."""

    @property
    def lanes(self) -> Lanes: ...


class LaneAspect:
    """One lane on one function. ``lines``: a selector of what makes the timeout longer, a collection or a number; None: the lines
    of the function's stock aspect."""

    order = Order.LANE

    def __init__(self, room: Room, name: str, lines: Selector | None) -> None:
        self._room = room
        self._name = name
        self._lines = lines

    def compile(self, site: Site, proceed: Proceed) -> Proceed:
        lanes, name = self._room.lanes, self._name
        lane = lanes[lanes.declared(name)]
        timeout_of = self._timeouts(site)
        fixed = lane.timeout

        async def run(call: Call) -> Any:
            gate = lanes.gate(name)
            passing = gate.knock(fixed if timeout_of is None else timeout_of(call))
            if passing.turn is not None:
                await gate.wait(passing)
            try:
                return await proceed(call)
            except asyncio.CancelledError as error:
                if passing.ended(error):
                    raise passing.exceeded() from error
                raise
            finally:
                passing.leave()

        return run

    def _timeouts(self, site: Site) -> Callable[[Call], float] | None:
        """From a call to its timeout; None where it is always the same."""
        lane = self._room.lanes[self._name]
        if self._lines is not None:
            count = _counted(compile_selector(site, "lines", self._lines))
        else:
            # The stock aspect stands further in, so it is compiled by now.
            pick: Pick | None = getattr(site.find(Order.STOCK), "lines", None)
            if pick is None:
                return None
            count = _length_of(pick)
        if lane.timeout_per_line == 0:
            return None
        return lambda call: seconds_for(lane, count(call.values()))


def _length_of(pick: Pick) -> Callable[[Sequence[Any]], int]:
    def length(values: Sequence[Any]) -> int:
        try:
            return len(pick(values))
        except InvalidOperation:
            return 0  # the stock aspect will say so, in the words that its raises= has for it

    return length


def _counted(pick: Pick) -> Callable[[Sequence[Any]], int]:
    def count(values: Sequence[Any]) -> int:
        lines = pick(values)
        if isinstance(lines, Sized):
            return len(lines)
        if type(lines) is not int or lines < 0:
            raise InvalidOperation("lines", lines, "of a lane must be a collection or a number of lines")
        return lines

    return count
