"""Waiting for the ledger: coalesced, cancellation-safe, and honest about why it did not happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from worker_fakes import FakeLedger, until

from inventory_sdk.errors import DurabilityNotReached
from inventory_sdk.ledger.protocol import PartitionRow
from inventory_sdk.model import Position
from inventory_sdk.sync.watermark import Watermark


class Counting(FakeLedger):
    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    async def partition(self, partition: int) -> PartitionRow | None:
        self.asked += 1
        return await super().partition(partition)


@pytest.fixture
def ledger() -> Counting:
    ledger = Counting()
    ledger.open_at(0, 1, applied=5)
    return ledger


class Signs:
    seen: float | None = 0.5

    async def __call__(self, partition: int) -> float | None:
        return self.seen


@pytest.fixture
def signs() -> Signs:
    return Signs()


@pytest.fixture
async def watermark(ledger: Any, signs: Signs) -> AsyncIterator[Watermark]:
    watermark = Watermark(ledger, signs, shortest=0.001, longest=0.002)
    yield watermark
    await watermark.close()


def move(ledger: FakeLedger, applied: int) -> None:
    ledger.open_at(0, 1, applied)


async def test_what_is_applied_is_reached(watermark: Watermark) -> None:
    await watermark.reached(Position(0, 1, 5))
    await watermark.reached(Position(0, 1, 1))


async def test_the_ledgers_own_positions_are_reached_at_once(watermark: Watermark, ledger: Counting) -> None:
    await watermark.reached(Position(0, 0, 99))
    assert ledger.asked == 0


async def test_a_waiter_returns_when_the_watermark_comes_by(watermark: Watermark, ledger: Counting) -> None:
    waiting = asyncio.create_task(watermark.reached(Position(0, 1, 7)))
    await until(lambda: ledger.asked > 1)
    assert not waiting.done()
    move(ledger, 7)
    await waiting


async def test_many_waiters_share_one_poller(ledger: Any, signs: Signs) -> None:
    watermark = Watermark(ledger, signs, shortest=0.001, longest=0.002)
    waiting = [asyncio.create_task(watermark.reached(Position(0, 1, 6))) for _ in range(500)]
    await until(lambda: ledger.asked >= 3)
    assert ledger.asked < 50
    move(ledger, 6)
    await asyncio.gather(*waiting)
    await watermark.close()


async def test_the_poller_ends_when_nobody_waits_any_more(watermark: Watermark, ledger: Counting) -> None:
    waiting = asyncio.create_task(watermark.reached(Position(0, 1, 9)))
    await until(lambda: ledger.asked > 0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    (poller,) = watermark._pollers().values()
    assert poller.task is not None
    await asyncio.wait_for(poller.task, 5)
    assert poller.waiters == set()


async def test_one_callers_cancellation_leaves_the_others_waiting(watermark: Watermark, ledger: Counting) -> None:
    first, second = (asyncio.create_task(watermark.reached(Position(0, 1, 6))) for _ in range(2))
    await until(lambda: ledger.asked > 0)
    first.cancel()
    await until(first.done)
    move(ledger, 6)
    await second


async def test_settled_waits_for_positions_of_several_partitions(watermark: Watermark, ledger: Counting) -> None:
    ledger.open_at(1, 1, applied=0)
    waiting = asyncio.create_task(watermark.settled([Position(0, 1, 5), Position(1, 1, 2), Position(1, 1, 1)]))
    await until(lambda: ledger.asked > 3)
    assert not waiting.done()
    ledger.open_at(1, 1, applied=2)
    await waiting
    await watermark.settled([])


async def test_a_time_out_says_what_was_wanted_and_how_far_it_is(watermark: Watermark) -> None:
    with pytest.raises(DurabilityNotReached) as raised:
        await watermark.reached(Position(0, 1, 8), timeout=0.02)
    error = raised.value
    assert (error.level, error.wanted, error.applied, error.worker_seen) == ("database", Position(0, 1, 8), Position(0, 1, 5), 0.5)


@pytest.mark.parametrize("seen", [None, 10.5])
async def test_without_a_worker_waiting_ends_at_once(watermark: Watermark, signs: Signs, seen: float | None) -> None:
    signs.seen = seen
    with pytest.raises(DurabilityNotReached, match="no worker"):
        await asyncio.wait_for(watermark.reached(Position(0, 1, 8), timeout=600), 5)


async def test_without_a_worker_what_is_applied_is_still_reached(watermark: Watermark, signs: Signs) -> None:
    signs.seen = None
    await watermark.reached(Position(0, 1, 5))


async def test_an_entry_of_an_ended_epoch_counts_if_the_ledger_has_its_row(watermark: Watermark, ledger: Counting) -> None:
    ledger.nonces_of[Position(0, 1, 7)] = "n7"
    ledger.open_at(0, 2, applied=0)
    await watermark.reached(Position(0, 1, 7))


async def test_an_entry_that_was_lost_with_its_epoch_is_named(watermark: Watermark, ledger: Counting) -> None:
    ledger.open_at(0, 2, applied=100)
    with pytest.raises(DurabilityNotReached, match="lost: epoch 1"):
        await asyncio.wait_for(watermark.reached(Position(0, 1, 7), timeout=600), 5)


async def test_while_the_next_epoch_is_being_rebuilt_the_old_ones_entries_may_still_come(watermark: Watermark, ledger: Counting) -> None:
    await ledger.raise_epoch(0, 1)
    waiting = asyncio.create_task(watermark.reached(Position(0, 1, 7)))
    await until(lambda: ledger.asked > 3)
    assert not waiting.done()
    ledger.nonces_of[Position(0, 1, 7)] = "n7"
    await waiting


async def test_a_ledger_that_can_not_be_asked_is_the_reason_of_the_time_out(watermark: Watermark, ledger: Counting) -> None:
    ledger.down = ConnectionError("no route")
    with pytest.raises(DurabilityNotReached, match="no route"):
        await watermark.reached(Position(0, 1, 8), timeout=0.02)


async def test_a_worker_in_the_same_loop_wakes_waiters_without_a_poll(ledger: Any, signs: Signs) -> None:
    watermark = Watermark(ledger, signs, shortest=60, longest=60)
    waiting = asyncio.create_task(watermark.reached(Position(0, 1, 7)))
    await until(lambda: ledger.asked > 0)
    watermark.note(Position(0, 1, 6))
    await asyncio.sleep(0)
    assert not waiting.done()
    watermark.note(Position(0, 1, 7))
    await asyncio.wait_for(waiting, 5)
    await watermark.close()


async def test_close_tells_who_still_waits(ledger: Any, signs: Signs) -> None:
    watermark = Watermark(ledger, signs)
    waiting = asyncio.create_task(watermark.reached(Position(0, 1, 9)))
    await until(lambda: ledger.asked > 0)
    await watermark.close()
    with pytest.raises(DurabilityNotReached, match="closed"):
        await waiting


def test_each_event_loop_has_its_own_poller(ledger: Any, signs: Signs) -> None:
    watermark = Watermark(ledger, signs)

    async def once() -> None:
        ledger.lock = asyncio.Lock()
        await watermark.reached(Position(0, 1, 5))
        await watermark.close()

    asyncio.run(once())
    asyncio.run(once())
