"""One lane in one event loop: slots, the line in front of them, and the door.

Slots are handed from call to call, so a free slot and a waiting call never exist at the same time, and whoever comes later
never overtakes. That also holds for borrowed slots: a lane's free slot goes to its own line first, then to the lines of the lanes
that may borrow from it.

The door. Each slot's calls take ``service`` seconds on the average (measured, newer calls count more), so the call with k others
before it waits about (k + 1) · service / slots. While slots don't come back any more (nothing ended for two services) that average
is history, and each turn of all slots is taken to last as long as the silence does. A call whose wait would be longer than the
lane's ``max_wait``, or than the time it has, is refused at once: it learns now what it would have learned later, and when to come back.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from contextvars import Token
from typing import Final

from inventory_sdk import context
from inventory_sdk.errors import DeadlineExceeded, LaneFull, LaneNotServed
from inventory_sdk.metrics.events import LaneUsed, Metrics
from inventory_sdk.model import Lane
from inventory_sdk.traffic.deadline import RESOLUTION, Timed, Watch, reset

WEIGHT: Final = 0.1
"""Of the newest call in the average service time."""
REPORT_EVERY: Final = 0.5
"""Seconds between a lane's reports to the metrics, while it is used."""
MOST_WAITS: Final = 256
"""Waits in one report; more make the next report come at once."""


class Pass(Timed):
    """One call in a lane. ``slot``: the gate whose slot it uses; None while it waits, and for a call within a call of its lane."""

    __slots__ = ("_lane_token", "came", "gate", "slot", "started", "turn", "within")

    def __init__(self, gate: Gate, now: float, timeout: float, parent: context.Scope | None, within: bool) -> None:
        super().__init__(now, timeout, parent)
        self.gate = gate
        self.within = within
        self.came = now
        self.started = now
        self.slot: Gate | None = None
        self.turn: asyncio.Future[Gate | None] | None = None
        self._lane_token: Token[str] | None = None

    def enter(self) -> None:
        """Its turn has come: what it calls from now on is in its lane."""
        self._lane_token = context.lane.set(self.gate.name)
        self._token = context.scope.set(self)

    def leave(self) -> None:
        """The call has ended, one way or another; its slot goes to the next."""
        slot = self.slot
        if slot is not None:
            self.slot = None
            now = time.monotonic()
            self.gate.learn(now - self.started)
            slot.free(self.gate, now)
        if self._lane_token is not None:
            reset(context.lane, self._lane_token)
        Timed.leave(self)

    def exceeded(self, doing: str = "not done") -> DeadlineExceeded:
        """The error for a call that its deadline has ended; it is counted."""
        self.gate.overdue += 1
        return DeadlineExceeded(f"lane {self.gate.name!r}: {doing} within {self.timeout:.3f} s")


class Gate:
    """See above. ``used`` counts this lane's slots in use, ``lent`` those of them that calls of other lanes use, ``ended`` its calls
    that have given back theirs, ``peak`` the most slots that were in use at once since somebody looked."""

    def __init__(self, name: str, lane: Lane, metrics: Metrics) -> None:
        self.name = name
        self.lane = lane
        self.used = 0
        self.lent = 0
        self.service = 0.0
        self.lenders: list[Gate] = []
        self.borrowers: list[Gate] = []
        self.overdue = 0
        self.ended = 0
        self.peak = 0
        self._most = lane.max_concurrency
        self._timeout = lane.timeout
        self._progress = 0.0
        self._promised = 0.0
        self._line: OrderedDict[Pass, None] = OrderedDict()
        self._line_timer: asyncio.TimerHandle | None = None
        self._watch = Watch()
        self._metrics = metrics
        self._report_timer: asyncio.TimerHandle | None = None
        self._admitted = 0
        self._waits: list[float] = []
        self._refused: dict[str, int] = {}

    @property
    def waiting(self) -> int:
        """Calls in line."""
        return len(self._line)

    def knock(self, timeout: float) -> Pass:
        """A call comes: it is let in, or must ``wait`` (its ``turn`` is not None), or is refused.

        Raises ``LaneFull``, ``LaneNotServed``, ``DeadlineExceeded`` where the inherited deadline has passed.
        """
        now = time.monotonic()
        parent = context.scope.get()
        within = False
        if parent is not None:
            parent = context.living()
        if parent is not None:
            self._check_inherited(parent, now)
            within = self._is_within(parent)
        slot = None if within else self._free_slot(now)
        if slot is None and not within:
            self._check_line(now, timeout, parent)
        call = Pass(self, now, timeout, parent, within)
        if call.watched:
            if call.timeout == self._timeout:
                self._watch.add(call)
            else:
                call.arm()
        if self._report_timer is None:
            self._report_later()
        if slot is None and not within:
            call.turn = asyncio.get_running_loop().create_future()
            self._line[call] = None
            if self._line_timer is None:
                self._line_timer = asyncio.get_running_loop().call_later(self.lane.max_wait, self._give_up)
        else:
            call.slot = slot
            self._admitted += 1
            call.enter()
        return call

    async def wait(self, call: Pass) -> None:
        """Until the call's turn has come; then it is in. ``LaneFull`` after ``max_wait``, ``DeadlineExceeded``."""
        turn = call.turn
        assert turn is not None
        try:
            slot = await turn
        except BaseException as error:
            # A slot that came in the turn in which the caller went away is the next one's.
            if turn.done() and not turn.cancelled():
                given = turn.result()
                if given is not None:
                    given.free(self, time.monotonic())
            self._line.pop(call, None)
            self._waited(time.monotonic() - call.came)
            overdue = isinstance(error, asyncio.CancelledError) and call.ended(error)
            call.leave()
            if overdue:
                self._refuse("deadline")
                raise call.exceeded("no slot came") from error
            raise
        now = time.monotonic()
        self._waited(now - call.came)
        if slot is None:
            call.leave()
            predicted = self._predicted(len(self._line), now)
            self._refuse("waited")
            raise self._full(f"no slot came within {self.lane.max_wait:g} s", predicted)
        call.slot = slot
        call.started = now
        self._admitted += 1
        call.enter()

    def free(self, user: Gate, now: float) -> None:
        """A call of lane ``user`` doesn't need its slot of ours any more."""
        if user is not self:
            self.lent -= 1
        self._progress = now
        if self.used <= self._most and self._hand_over():
            return
        self.used -= 1
        if self._report_timer is None:
            self._report_later()

    def learn(self, seconds: float) -> None:
        """A call held its slot for so long."""
        self.ended += 1
        self.service = seconds if self.service == 0.0 else self.service + (seconds - self.service) * WEIGHT

    def narrow(self, slots: int) -> None:
        """From now on so many slots, at least 1 and at most those of the declaration. Calls that are in stay in; while there are
        more of them, what they give back is not given to others."""
        self._most = max(1, min(slots, self.lane.max_concurrency))
        if self.used >= self._most:
            self._progress = time.monotonic()
        while self.used < self._most and self._hand_over():
            self.used += 1

    def flush(self) -> None:
        """Tell the metrics what there is to tell."""
        if self._report_timer is not None:
            self._report_timer.cancel()
            self._report()

    def _hand_over(self) -> bool:
        """Give a slot of ours to whoever waits for one."""
        if self._next(self):
            return True
        for borrower in self.borrowers:
            if borrower._next(self):
                self.lent += 1
                return True
        return False

    def _next(self, slot: Gate) -> bool:
        """Give a slot to the head of the line."""
        line = self._line
        while line:
            call, _ = line.popitem(last=False)
            assert call.turn is not None
            if not call.turn.done():  # else it was cancelled in this turn of the loop, and will find out
                call.turn.set_result(slot)
                return True
        return False

    def _free_slot(self, now: float) -> Gate | None:
        if self.used < self._most:
            self.used += 1
            if self.used > self.peak:
                self.peak = self.used
            if self.used == self._most:
                self._progress = now
            return self
        for lender in self.lenders:
            if lender.used < lender._most:
                lender.used += 1
                lender.lent += 1
                if lender.used == lender._most:
                    lender._progress = now
                return lender
        return None

    def _check_inherited(self, parent: context.Scope, now: float) -> None:
        serves = parent.serves
        if serves is not None and self.name not in serves.lanes:
            self._refuse("not_served")
            raise LaneNotServed(self.name, sorted(serves.lanes), serves.elsewhere.get(self.name))
        if parent.at <= now:
            self._refuse("deadline")
            raise DeadlineExceeded(f"lane {self.name!r}: the time for this call was up {now - parent.at:.3f} s before it came")

    def _is_within(self, parent: context.Scope | None) -> bool:
        while parent is not None:
            if type(parent) is Pass and parent.gate is self and parent.live:
                return True
            parent = parent.parent
        return False

    def _check_line(self, now: float, timeout: float, parent: context.Scope | None) -> None:
        lane = self.lane
        ahead = len(self._line)
        predicted = self._predicted(ahead, now)
        if ahead >= lane.max_queue:
            self._refuse("queue_full")
            raise self._full(f"{ahead} calls wait already", predicted)
        if predicted > lane.max_wait or lane.max_wait == 0:
            self._refuse("predicted_wait")
            raise self._full(f"the wait would be about {predicted:.3f} s, more than {lane.max_wait:g}", predicted)
        left = timeout if parent is None else min(timeout, parent.at - now)
        if predicted > left:
            self._refuse("deadline")
            raise self._full(f"the wait would be about {predicted:.3f} s, and {left:.3f} are left", predicted)

    def _predicted(self, ahead: int, now: float) -> float:
        """Seconds that a call waits which comes behind so many."""
        slots = max(1, self._most - self.lent)
        flowing = (ahead + 1) * self.service / slots
        silence = now - self._progress
        if silence <= 2 * self.service:
            return flowing
        return max(flowing, (ahead // slots + 1) * silence)

    def _full(self, why: str, predicted: float) -> LaneFull:
        # Slots come free one after the other, so those who are refused together are told to come back one after the other, at
        # the latest when the whole line has had its turn.
        now = time.monotonic()
        pace = max(self.service / max(1, self._most - self.lent), 0.001)
        self._promised = min(max(self._promised, now) + pace, now + max(predicted, pace))
        retry_after = max(predicted - self.lane.max_wait, self._promised - now)
        return LaneFull(f"lane {self.name!r} is full, {self.used} calls run: {why}", round(retry_after, 3))

    def _give_up(self) -> None:
        """Those who have waited for ``max_wait`` wait no longer. All wait for the same time, so it is always the head's turn."""
        self._line_timer = None
        now = time.monotonic()
        while self._line:
            call = next(iter(self._line))
            left = call.came + self.lane.max_wait - now
            if left > RESOLUTION:
                self._line_timer = asyncio.get_running_loop().call_later(left, self._give_up)
                return
            del self._line[call]
            assert call.turn is not None
            if not call.turn.done():
                call.turn.set_result(None)

    def _refuse(self, reason: str) -> None:
        self._refused[reason] = self._refused.get(reason, 0) + 1
        if self._report_timer is None:
            self._report_later()

    def _waited(self, seconds: float) -> None:
        self._waits.append(seconds)
        if len(self._waits) >= MOST_WAITS:
            self.flush()

    def _report_later(self) -> None:
        self._report_timer = asyncio.get_running_loop().call_later(REPORT_EVERY, self._report)

    def _report(self) -> None:
        self._report_timer = None
        waits, refused, admitted, overdue = self._waits, self._refused, self._admitted, self.overdue
        self._waits, self._refused, self._admitted, self.overdue = [], {}, 0, 0
        self._metrics.record(LaneUsed(self.name, self.used, len(self._line), self.lent, admitted, overdue, waits, refused))


def link(gates: dict[str, Gate]) -> None:
    """Tell the gates who borrows from whom."""
    for gate in gates.values():
        for name in gate.lane.borrows_from:
            gate.lenders.append(gates[name])
            gates[name].borrowers.append(gate)


def seconds_for(lane: Lane, lines: int) -> float:
    """The time that a call with so many lines has."""
    return lane.timeout if lane.timeout == math.inf else lane.timeout + lane.timeout_per_line * lines
