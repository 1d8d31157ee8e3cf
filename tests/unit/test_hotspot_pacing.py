"""The line of a hot key, on a clock that is turned by hand: order, pace, patience, and not one permit lost whoever goes away when."""

from __future__ import annotations

import asyncio
import os
import random
from collections import deque

import pytest

from inventory_sdk.errors import HotspotLimited
from inventory_sdk.hotspot.pacing import BURST, ROUND_TRIP, Pacer, Waiter
from tests.hotspot_kit import Clock, Permits, settle

STEPS = int(os.environ.get("INVENTORY_TEST_HOTSPOT_STEPS", "20000"))
EDGE = 1e-6


class Caller:
    """One call through a pacer, as a task."""

    def __init__(self, pacer: Pacer, name: int, patience: float, went: list[int]) -> None:
        self.name = name
        self._went = went
        self.refused: HotspotLimited | None = None
        self.task = asyncio.create_task(self._call(pacer, patience))

    async def _call(self, pacer: Pacer, patience: float) -> None:
        try:
            waiter = pacer.enter(patience)
            if waiter is not None:
                await pacer.wait(waiter)
        except HotspotLimited as error:
            self.refused = error
            return
        self._went.append(self.name)


async def test_calls_go_in_the_order_in_which_they_came_and_at_the_pace() -> None:
    clock, went = Clock(), list[int]()
    pacer = Pacer("a", Permits(100), clock)
    callers = [Caller(pacer, number, 1.0, went) for number in range(50)]
    await settle()
    at_once = len(went)
    assert at_once <= BURST * 100 + 2
    for _ in range(48):
        before = len(went)
        clock.turn(0.01 + EDGE)
        await settle()
        assert len(went) - before <= 1 or before == at_once
    assert went == list(range(50))
    assert not any(caller.refused for caller in callers)


async def test_a_call_that_would_wait_too_long_is_refused_at_once_and_comes_back_in_time() -> None:
    clock, went = Clock(), list[int]()
    pacer = Pacer("a", Permits(100), clock)
    callers = [Caller(pacer, number, 0.2, went) for number in range(40)]
    await settle()
    refused = [caller.refused for caller in callers if caller.refused]
    assert 10 <= len(refused) <= 20
    assert pacer.waiting <= 21
    times = [error.retry_after for error in refused]
    assert times == sorted(times)
    # Whoever comes back then finds room.
    clock.turn(times[0] + EDGE)
    late = Caller(pacer, 99, 0.2, went)
    await settle()
    assert late.refused is None
    clock.turn(1.0)
    await settle()
    assert went[-1] == 99


async def test_a_line_has_one_timer_however_long_it_is_and_none_when_it_is_empty() -> None:
    clock, went = Clock(), list[int]()
    pacer = Pacer("a", Permits(100), clock)
    callers = [Caller(pacer, number, 0.3, went) for number in range(25)]
    await settle()
    assert clock.timers == 1
    clock.turn(0.05)
    await settle()
    assert clock.timers == 1
    for caller in callers:
        caller.task.cancel()
    await settle()
    assert (pacer.waiting, clock.timers) == (0, 0)


async def test_a_cancelled_waiter_leaves_no_hole() -> None:
    """A peer's fault: the slot of a waiter that was cancelled stays taken for ever."""
    clock, went = Clock(), list[int]()
    lease = Permits(100)
    pacer = Pacer("a", lease, clock)
    callers = [Caller(pacer, number, 1.0, went) for number in range(30)]
    await settle()
    gone = [caller for caller in callers if caller.name % 2 and caller.name not in went]
    for caller in gone:
        caller.task.cancel()
    await settle()
    waiting = pacer.waiting
    clock.turn(waiting * 0.01 + 0.01)
    await settle()
    assert went == [number for number in range(30) if number not in {caller.name for caller in gone}]
    assert lease.taken == len(went) == pacer.went


async def test_a_permit_that_came_as_its_caller_went_goes_to_the_next() -> None:
    clock, went = Clock(), list[int]()
    lease = Permits(100)
    pacer = Pacer("a", lease, clock)
    callers = [Caller(pacer, number, 1.0, went) for number in range(10)]
    await settle()
    first = callers[len(went)]
    clock.turn(0.0101)  # its turn has come, and in the same turn of the loop
    first.task.cancel()
    await settle()
    assert first.task.cancelled()
    assert went[-1] == first.name + 1
    clock.turn(1.0)
    await settle()
    assert lease.taken == len(went) == pacer.went == 9


async def test_who_comes_when_a_turn_is_due_and_the_timer_is_late_does_not_overtake() -> None:
    clock, went = Clock(), list[int]()
    pacer = Pacer("a", Permits(100), clock)
    for number in range(10):
        Caller(pacer, number, 1.0, went)
    await settle()
    clock.now += 0.05  # the loop was busy: nobody has looked at the timer
    late = pacer.enter(1.0)
    assert late is not None
    pacer.leave(late)
    clock.turn(1.0)
    await settle()
    assert went == list(range(10))


async def test_no_wait_is_unbounded() -> None:
    """A peer's fault: there is no longest wait. Here the permits end, and everybody hears of it in time."""
    clock, went = Clock(), list[int]()
    pacer = Pacer("a", Permits(100, permits=3), clock)
    callers = [Caller(pacer, number, 0.1, went) for number in range(10)]
    await settle()
    clock.turn(0.1 + EDGE)
    await settle()
    assert went == [0, 1, 2]
    assert all(caller.refused for caller in callers[3:])
    assert pacer.waiting == 0


async def test_who_may_not_wait_waits_for_an_answer_only() -> None:
    clock = Clock()
    lease = Permits(100, permits=1)
    pacer = Pacer("a", lease, clock)
    assert pacer.enter(0.0, at_once=True) is None
    waiter = pacer.enter(0.0, at_once=True)  # permits are used up, but more may be on their way
    assert waiter is not None
    waiting = asyncio.create_task(pacer.wait(waiter))
    lease.stopped = clock.now + 0.1
    pacer.advance()
    with pytest.raises(HotspotLimited):
        await waiting
    with pytest.raises(HotspotLimited):
        pacer.enter(0.0, at_once=True)
    lease.stopped = 0.0
    waiter = pacer.enter(0.0, at_once=True)
    assert waiter is not None
    waiting = asyncio.create_task(pacer.wait(waiter))
    clock.turn(ROUND_TRIP + EDGE)
    with pytest.raises(HotspotLimited):
        await waiting


class Model:
    """What a pacer must do, kept beside it step by step: who came, who left, who went."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.clock = Clock()
        self.lease = Permits(200, permits=5)
        self.pacer = Pacer("a", self.lease, self.clock)
        self.line: deque[tuple[int, Waiter, asyncio.Task[None]]] = deque()
        self.given = 5.0
        self.used = 0
        self.came = 0

    async def step(self) -> None:
        what = self.random.random()
        if what < 0.45:
            await self.come()
        elif what < 0.60 and self.line:
            self.random.choice(self.line)[2].cancel()
        elif what < 0.70:
            more = self.random.randrange(4)
            self.lease.permits += more
            self.given += more
            self.pacer.advance()
        elif what < 0.75 and self.line:
            # In the very turn in which permits and time come, somebody goes away.
            self.lease.permits += 1
            self.given += 1
            self.clock.turn(0.006)
            self.pacer.advance()
            self.line[0][2].cancel()
        else:
            self.clock.turn(self.random.choice((0.0, 0.001, 0.004, 0.02)))
        if self.random.random() < 0.5:
            await settle_lightly()
        self.reap()

    async def come(self) -> None:
        name = self.came
        self.came += 1
        try:
            waiter = self.pacer.enter(self.random.choice((0.0, 0.02, 0.1, 0.3)))
        except HotspotLimited:
            return
        if waiter is None:
            assert not self.waiting(), "a call overtook the line"
            self.used += 1
        else:
            self.line.append((name, waiter, asyncio.create_task(self.pacer.wait(waiter))))
            await asyncio.sleep(0)  # a call enters and waits in one go: it can't be cancelled in between

    def waiting(self) -> list[int]:
        return [name for name, waiter, task in self.line if not waiter.turn.done() and not task.cancelling()]

    def reap(self) -> None:
        waits = self.waiting()
        for name, waiter, _ in self.line:
            if waiter.turn.done() and not waiter.turn.cancelled() and waiter.turn.result():
                assert not waits or name < waits[0], "somebody overtook"
        left = []
        for name, waiter, task in self.line:
            if not task.done():
                left.append((name, waiter, task))
            elif not task.cancelled() and task.exception() is None:
                self.used += 1
        self.line = deque(left)

    def check(self) -> None:
        assert self.used == self.pacer.went == self.lease.taken
        assert self.given - self.lease.permits == self.used, "a permit was lost, or made"
        assert self.pacer.waiting == 0
        assert self.clock.timers == 0


async def settle_lightly() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_no_permit_is_lost_in_any_number_of_random_steps() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}, {STEPS} steps")  # noqa: T201  # the seed belongs into the captured output
    model = Model(seed)
    for _ in range(STEPS):
        await model.step()
        assert model.lease.permits >= 0
    for _, _, task in model.line:
        task.cancel()
    await settle()
    model.reap()
    model.check()
