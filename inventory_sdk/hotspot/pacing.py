"""The pace of one hot key in one event loop: virtual time, one line, one timer.

Virtual time (GCRA): ``due`` is when the next call would be due if all came evenly; a call may come up to ``tolerance`` early, which is
the burst. Besides, each call uses up a permit of the lease, through which all processes share one rate. Calls that must wait stand in
one line, first come first served; nobody else's key is looked at. A call whose wait would pass what it may wait is refused at the
door, and the line is never longer than that: its length times the pace is the wait of the next one.

A permit is used when a call goes in and at no other time: who leaves the line, cancelled or out of patience, leaves no hole, and
a permit that came in the very turn in which its caller went away goes to the next in line.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from typing import Any, Final, Protocol

from inventory_sdk.errors import HotspotLimited

RESOLUTION: Final = 0.0005
"""Seconds: a timer that fires this much early is not set again for the rest."""
BURST: Final = 0.02
"""Seconds of the limit that may come at once."""
ROUND_TRIP: Final = 0.25
"""Seconds that a call which may not wait still has for the answer whether it may go: not for its turn."""


class Lease(Protocol):
    """Where permits come from."""

    @property
    def interval(self) -> float:
        """Seconds between two calls, at the fastest, as things are."""
        ...

    @property
    def pace(self) -> float:
        """Seconds between two calls that this process really gets; at least ``interval``."""
        ...

    def take(self, now: float) -> bool:
        """One permit. False: there is none now, and ``on_change`` is called when that may be different."""
        ...

    def blocked(self, now: float) -> float:
        """Seconds until more can be had; 0 where that is not known to take any."""
        ...

    def put_back(self) -> None:
        """A permit that was taken and not used."""
        ...


class Timers(Protocol):
    """What a pacer needs of its event loop."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object]) -> asyncio.TimerHandle: ...

    def create_future(self) -> asyncio.Future[Any]: ...


class Waiter:
    """One call in line. ``turn`` is True when it may go, False when its patience has ended; ``at_once``: it may not wait for others."""

    __slots__ = ("at_once", "came", "turn", "until")

    def __init__(self, turn: asyncio.Future[bool], came: float, until: float, at_once: bool) -> None:
        self.turn = turn
        self.came = came
        self.until = until
        self.at_once = at_once


class Pacer:
    """See above. ``shown`` is the key as errors name it. ``on_empty`` is called when the line has become empty."""

    def __init__(self, shown: str, lease: Lease, timers: Timers, on_empty: Callable[[], None] | None = None) -> None:
        self.shown = shown
        self.lease = lease
        self.due = 0.0
        self.went = 0
        self.on_empty = on_empty
        self._timers = timers
        self._line: OrderedDict[Waiter, None] = OrderedDict()
        self._ends: list[tuple[float, int, Waiter]] = []
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._promised = 0.0

    @property
    def waiting(self) -> int:
        """Calls in line."""
        return len(self._line)

    def enter(self, patience: float, at_once: bool = False) -> Waiter | None:
        """A call comes: it may go (None), or must ``wait``, or is refused with ``HotspotLimited``.

        ``patience``: seconds that it may wait. ``at_once``: it may not wait for its turn, only for the answer where permits were used up.
        """
        now = self._timers.time()
        early = self._early(now)
        if not self._line and early <= RESOLUTION and self.lease.take(now):
            self._go(now)
            return None
        wait = self.predicted(now)
        if at_once:
            ahead = len(self._line) * self.lease.interval
            if early > RESOLUTION or self.lease.blocked(now) > 0 or ahead > BURST:
                raise self.refusal(now, wait, 0.0, f"the wait would be about {wait:.3f} s, and it may not wait")
        elif wait > patience:
            raise self.refusal(now, wait, patience, f"the wait would be about {wait:.3f} s, and it may wait {patience:.3f}")
        waiter = Waiter(self._timers.create_future(), now, now + (ROUND_TRIP if at_once else patience), at_once)
        self._line[waiter] = None
        heapq.heappush(self._ends, (waiter.until, next(self._numbers), waiter))
        self._arm(now)
        return waiter

    async def wait(self, waiter: Waiter) -> None:
        """Until it may go. ``HotspotLimited`` when it has waited for as long as it may."""
        try:
            went = await waiter.turn
        except BaseException:
            if waiter.turn.done() and not waiter.turn.cancelled():
                if waiter.turn.result():
                    self.give_back()
            else:
                self.leave(waiter)
            raise
        if not went:
            now = self._timers.time()
            waited = waiter.until - waiter.came
            raise self.refusal(now, self.predicted(now), waited, f"its turn did not come within {waited:.3f} s")

    def give_back(self) -> None:
        """A call that could go did not: the next one goes in its place."""
        self.due -= self.lease.interval
        self.went -= 1
        self.lease.put_back()
        self.advance()

    def predicted(self, now: float) -> float:
        """Seconds that a call waits which comes now."""
        return max(0.0, self._early(now), self.lease.blocked(now)) + len(self._line) * self.lease.pace

    def refusal(self, now: float, wait: float, patience: float, why: str) -> HotspotLimited:
        """The error, with the time at which a call would find room.

        Calls go one after the other, so those who are refused together are told to come back one after the other, at the latest when
        the whole line has had its turn."""
        pace = self.lease.pace
        self._promised = min(max(self._promised, now) + pace, now + max(wait, pace))
        retry_after = max(wait - patience, self._promised - now, pace)
        return HotspotLimited(f"{self.shown} is hot and its pace is used up: {why}", round(retry_after, 3))

    def advance(self) -> None:
        """Let go who may, send away who has waited for long enough, and set the timer for the rest."""
        now = self._timers.time()
        line = self._line
        had = bool(line)
        while line:
            waiter = next(iter(line))
            if waiter.turn.done():  # cancelled in this turn of the loop; it takes no permit
                del line[waiter]
                continue
            if self._early(now) > RESOLUTION or not self.lease.take(now):
                break
            del line[waiter]
            self._go(now)
            waiter.turn.set_result(True)
        if line and self.lease.blocked(now) > 0:
            for waiter in [each for each in line if each.at_once]:
                self._send_away(waiter)
        ends = self._ends
        while ends and (ends[0][2] not in line or ends[0][0] <= now + RESOLUTION):
            self._send_away(heapq.heappop(ends)[2])
        self._arm(now)
        if had and not line and self.on_empty is not None:
            self.on_empty()

    def close(self) -> None:
        """Nobody waits any more."""
        for waiter in list(self._line):
            self._send_away(waiter)
        self._arm(self._timers.time())

    def _early(self, now: float) -> float:
        """Seconds until the next call is due, the burst taken off."""
        return self.due - BURST - now

    def _go(self, now: float) -> None:
        self.due = max(self.due, now) + self.lease.interval
        self.went += 1

    def _send_away(self, waiter: Waiter) -> None:
        if self._line.pop(waiter, waiter) is None and not waiter.turn.done():
            waiter.turn.set_result(False)

    def leave(self, waiter: Waiter) -> None:
        """The call will not go after all, before its turn has come."""
        if self._line.pop(waiter, waiter) is None:
            if not self._line:
                self._ends.clear()
            self._arm(self._timers.time())
            if not self._line and self.on_empty is not None:
                self.on_empty()

    def _arm(self, now: float) -> None:
        """One timer: for the next call that is due, or for the first whose patience ends."""
        if not self._line:
            self._ends.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            return
        early = self._early(now)
        at = self._ends[0][0]
        if early > RESOLUTION:
            at = min(at, now + early)
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._timers.call_at(at, self._fired)

    def _fired(self) -> None:
        self._timer = None
        self.advance()
