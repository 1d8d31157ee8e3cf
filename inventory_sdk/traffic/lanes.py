"""``inventory.lanes``: what was declared, what goes on in this event loop, and a door for code without a decorator."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final
from weakref import WeakKeyDictionary

from inventory_sdk.context import DEFAULT_LANE
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.metrics.events import Metrics
from inventory_sdk.model import Lane, check_text
from inventory_sdk.traffic.deadline import Deadline
from inventory_sdk.traffic.gate import Gate, Pass, link, seconds_for

RESERVED: Final = {
    DEFAULT_LANE: "calls without a lane are there",
    "redistribution": "coalesced runs are there",
    "upkeep": "the worker is there",
}


@dataclass(frozen=True, slots=True)
class LaneUsage:
    """A lane in this event loop, now. ``running``: its slots in use, ``lent`` of them by other lanes; ``service_seconds``: what its
    calls take on the average, 0 before the first one has ended."""

    running: int
    waiting: int
    lent: int
    service_seconds: float


@dataclass(frozen=True, slots=True)
class LaneLoad:
    """What a governor looks at: the most slots in use at once since the last look, calls that have ended since the beginning, what they
    take on the average, and the slots that the lane was declared with."""

    peak: int
    ended: int
    service_seconds: float
    declared: int


class Lanes(Mapping[str, Lane]):
    """The declared lanes by name. Every event loop has slots and lines of its own."""

    def __init__(self, lanes: Mapping[str, Lane], metrics: Metrics) -> None:
        self._lanes = dict(lanes)
        self._metrics = metrics
        _check(self._lanes)
        self._gates: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Gate]] = WeakKeyDictionary()
        self._last: tuple[weakref.ref[asyncio.AbstractEventLoop] | None, dict[str, Gate]] = (None, {})

    def __getitem__(self, name: str) -> Lane:
        return self._lanes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return len(self._lanes)

    def usage(self) -> dict[str, LaneUsage]:
        """Every lane as it is now, in this event loop."""
        return {name: LaneUsage(gate.used, gate.waiting, gate.lent, gate.service) for name, gate in self._here().items()}

    def enter(self, name: str, *, lines: int = 0) -> Entry:
        """``async with inventory.lanes.enter("batch", lines=6000):`` is what ``@inventory.lane("batch")`` does, for a block.

        Raises ``LaneFull``, ``LaneNotServed``, ``DeadlineExceeded``; ``InvalidOperation`` for a lane that was not declared.
        """
        return Entry(self, self.declared(name), lines)

    def deadline(self, seconds: float) -> Deadline:
        """``async with inventory.lanes.deadline(0.2):`` gives a block so much time, and what it calls no more than is left of it.
        ``DeadlineExceeded`` when it is up."""
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            raise InvalidOperation("seconds", seconds, "must be more than 0")
        return Deadline(seconds)

    def declared(self, name: str) -> str:
        """The name, if there is such a lane; ``InvalidOperation`` names those that there are."""
        if name not in self._lanes:
            raise InvalidOperation("lane", name, f"is not declared; there are {', '.join(self._lanes) or 'none'} (Inventory(lanes=…))")
        return name

    def gate(self, name: str) -> Gate:
        """The lane in this event loop."""
        loop, gates = self._last
        if loop is None or loop() is not asyncio.get_running_loop():
            gates = self._here()
        return gates[name]

    def load(self, name: str) -> LaneLoad:
        """How much a lane has to do, in this event loop. For one who looks regularly."""
        gate = self.gate(name)
        peak, gate.peak = max(gate.peak, gate.used), gate.used
        return LaneLoad(peak, gate.ended, gate.service, gate.lane.max_concurrency)

    def narrow(self, name: str, slots: int) -> None:
        """Give a lane fewer slots in this event loop than it was declared with, at least 1; or give them back. Nobody who is in, or in
        line, is turned away by it; newcomers are refused by what they would have to wait, as ever."""
        self.gate(name).narrow(slots)

    def connections(self) -> dict[str, int]:
        """How many script calls of a lane may be under way at once, where that is bounded."""
        return {name: lane.connections for name, lane in self._lanes.items() if lane.connections is not None}

    def flush(self) -> None:
        """Report to the metrics what this event loop has not reported yet."""
        for gate in self._gates.get(asyncio.get_running_loop(), {}).values():
            gate.flush()

    def _here(self) -> dict[str, Gate]:
        loop = asyncio.get_running_loop()
        gates = self._gates.get(loop)
        if gates is None:
            # A timer that was pending when its loop was closed keeps that loop, so its gates are dropped by hand.
            for closed in [each for each in self._gates if each.is_closed()]:
                del self._gates[closed]
            gates = {name: Gate(name, lane, self._metrics) for name, lane in self._lanes.items()}
            link(gates)
            self._gates[loop] = gates
        self._last = (weakref.ref(loop), gates)  # one assignment: loops of other threads read it
        return gates


class Entry:
    """A block in a lane. ``async with`` answers its pass."""

    __slots__ = ("_call", "_lanes", "_lines", "_name")

    def __init__(self, lanes: Lanes, name: str, lines: int) -> None:
        self._lanes = lanes
        self._name = name
        self._lines = lines

    async def __aenter__(self) -> Pass:
        gate = self._lanes.gate(self._name)
        call = self._call = gate.knock(seconds_for(gate.lane, self._lines))
        if call.turn is not None:
            await gate.wait(call)
        return call

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        call = self._call
        try:
            if isinstance(error, asyncio.CancelledError) and call.ended(error):
                raise call.exceeded() from error
        finally:
            call.leave()


def _check(lanes: Mapping[str, Lane]) -> None:
    for name, lane in lanes.items():
        check_text("lanes", name)
        if not isinstance(lane, Lane):
            raise InvalidOperation(f"lanes[{name!r}]", lane, "must be a Lane")
        if name in RESERVED:
            raise InvalidOperation("lanes", name, f"is taken: {RESERVED[name]}")
        for lender in lane.borrows_from:
            if lender not in lanes:
                raise InvalidOperation("borrows_from", lender, f"is no lane, but lane {name!r} would borrow from it")
    for name in lanes:
        _check_one_way(lanes, name, (name,))


def _check_one_way(lanes: Mapping[str, Lane], name: str, way: tuple[str, ...]) -> None:
    for lender in lanes[name].borrows_from:
        if lender == way[0]:
            raise InvalidOperation("borrows_from", lender, f"goes in a circle: {' ← '.join((*way, lender))}; borrowing is one-way")
        if lender not in way:
            _check_one_way(lanes, lender, (*way, lender))
