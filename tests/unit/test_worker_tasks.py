"""``run="later"``: in order per group, several groups at once, retried, then a dead letter; a failing one stops nothing else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from worker_fakes import Shop, open_shop, until

from inventory_sdk.ledger.protocol import LedgerUnavailable, Task
from inventory_sdk.model import Position, Receipt, ReceiptLine
from inventory_sdk.sync import tasks as tasks_room
from inventory_sdk.sync.companions import MOST


def task(number: int, group: str = "g", attempts: int = 0) -> Task:
    receipt = {
        "kind": "reserve",
        "merchant": "m",
        "operation_id": f"o{number}",
        "order": group,
        "lines": ["m\x1fa", 2],
        "remaining": [5],
        "position": [0, 1, number],
    }
    return Task(number, "write_order", 1, "{}", group, f"o{number}", "m", attempts, json.dumps(receipt))


class Registry:
    def __init__(self) -> None:
        self.started: list[int] = []
        self.receipts: list[Receipt] = []
        self.behave: Callable[[Task], Awaitable[None]] | None = None

    async def run(self, task: Task, session: Any, receipt: Receipt) -> None:
        self.started.append(task.number)
        self.receipts.append(receipt)
        if self.behave is not None:
            await self.behave(task)


@pytest.fixture
async def shop() -> Shop:
    return await open_shop()


@pytest.fixture
def registry() -> Registry:
    return Registry()


def add(shop: Shop, *tasks: Task) -> None:
    shop.ledger.tasks.update({each.number: each for each in tasks})


async def test_a_task_gets_the_receipt_of_its_operation(shop: Shop, registry: Registry) -> None:
    add(shop, task(1))
    async with shop.worker(tasks=registry):
        await until(lambda: shop.ledger.done == [1])
    assert registry.receipts == [Receipt("o1", "reserve", "m", "g", (ReceiptLine("m", "a", 2, 5),), (Position(0, 1, 1),), "database")]


async def test_tasks_of_a_group_run_one_after_another_in_order(shop: Shop, registry: Registry) -> None:
    running = most = 0

    async def alone(task: Task) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        due.set()  # the runner looks again while this one runs
        for _ in range(10):
            await asyncio.sleep(0)
        running -= 1

    registry.behave = alone
    add(shop, *(task(number) for number in range(1, 11)))
    worker = shop.worker(tasks=registry)
    due = worker._wakes[0]
    async with worker:
        await until(lambda: len(shop.ledger.done) == 10)
    assert most == 1
    assert shop.ledger.done == registry.started == list(range(1, 11))


async def test_groups_run_at_the_same_time_but_not_more_than_allowed(shop: Shop, registry: Registry) -> None:
    running: set[str] = set()
    most = 0
    go_on = asyncio.Event()

    async def hold(task: Task) -> None:
        nonlocal most
        running.add(task.group)
        most = max(most, len(running))
        await go_on.wait()
        running.discard(task.group)

    registry.behave = hold
    add(shop, *(task(number, f"g{number}") for number in range(1, 11)))
    async with shop.worker(tasks=registry, task_concurrency=4):
        await until(lambda: len(running) == 4)
        go_on.set()
        await until(lambda: len(shop.ledger.done) == 10)
    assert most == 4


async def test_a_failing_task_is_tried_again_then_a_dead_letter_and_its_group_goes_on(shop: Shop, registry: Registry) -> None:
    async def fail(task: Task) -> None:
        if task.number == 1:
            raise ValueError("no such order")

    registry.behave = fail
    add(shop, task(1), task(2), task(3, "other"))
    async with shop.worker(tasks=registry, task_attempts=3):
        await until(lambda: set(shop.ledger.done) == {2, 3})
        await until(lambda: shop.facts.told)
    assert registry.started.count(1) == 3
    assert registry.started.index(2) > registry.started.index(1)
    assert shop.ledger.dead == {1: "ValueError: no such order"}
    ((name, facts),) = shop.facts.told
    assert (name, facts["operation_id"], facts["error"]) == ("dead_letter", "o1", "ValueError: no such order")
    assert shop.facts.names() == ["dead_letter"]


async def test_pauses_between_attempts_grow_up_to_the_longest(shop: Shop, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float | None] = []
    note = shop.ledger.fail_task

    async def fail_task(task: Task, error: str, retry_in: float | None) -> None:
        pauses.append(retry_in)
        await note(task, error, retry_in)

    async def fail(task: Task) -> None:
        raise ValueError

    monkeypatch.setattr(shop.ledger, "fail_task", fail_task)
    registry.behave = fail
    add(shop, task(1))
    async with shop.worker(tasks=registry, task_attempts=6, first_task_retry=1.0, last_task_retry=8.0):
        await until(lambda: shop.ledger.dead)
    assert pauses[-1] is None
    for attempt, pause in enumerate(pauses[:-1]):
        longest = min(8.0, 2.0**attempt)
        assert pause is not None
        assert longest / 2 <= pause <= longest


async def test_a_database_that_is_away_costs_no_attempt(shop: Shop, registry: Registry) -> None:
    add(shop, task(1))
    shop.ledger.down = ConnectionError("gone")
    shop.ledger.task_faults = [ConnectionError("gone again")]
    async with shop.worker(tasks=registry, task_attempts=1):
        await until(lambda: shop.facts.retried().count("tasks") > 3)
        shop.ledger.down = None
        await until(lambda: shop.ledger.done == [1])
    assert shop.ledger.dead == {}
    assert registry.started == [1]


async def test_stop_lets_a_running_task_finish(shop: Shop, registry: Registry) -> None:
    running, go_on = asyncio.Event(), asyncio.Event()

    async def hold(task: Task) -> None:
        running.set()
        await go_on.wait()

    registry.behave = hold
    add(shop, task(1), task(2))
    worker = shop.worker(tasks=registry)
    await worker.start()
    await running.wait()
    stopping = asyncio.create_task(worker.stop())
    await asyncio.sleep(0)
    go_on.set()
    await stopping
    assert shop.ledger.done == [1]
    assert list(shop.ledger.tasks) == [2]


async def test_a_task_that_does_not_end_is_rolled_back_at_the_stop_and_stays_pending(shop: Shop, registry: Registry) -> None:
    running = asyncio.Event()

    async def hang(task: Task) -> None:
        running.set()
        await asyncio.Event().wait()

    registry.behave = hang
    add(shop, task(1))
    worker = shop.worker(tasks=registry)
    await worker.start()
    await running.wait()
    await worker.stop(timeout=0.01)
    assert shop.ledger.done == []
    assert list(shop.ledger.tasks) == [1]
    assert shop.ledger.dead == {}


# Together


async def quick(shop: Shop, registry: Registry, **options: Any) -> Any:
    """A worker that has seen one quick call of the function."""
    add(shop, task(1))
    worker = shop.worker(tasks=registry, first_task_retry=0.001, last_task_retry=0.002, **options)
    await worker.start()
    await until(lambda: shop.ledger.done == [1])
    return worker


async def test_quick_functions_share_transactions_of_a_bounded_size(shop: Shop, registry: Registry) -> None:
    worker = await quick(shop, registry)
    add(shop, *(task(number, f"g{number}") for number in range(2, 102)))
    worker._wakes[0].set()
    await until(lambda: len(shop.ledger.done) == 101)
    await worker.stop()
    assert registry.started == shop.ledger.done == list(range(1, 102))
    assert [len(each) for each in shop.ledger.together] == [1, MOST, MOST, MOST, 100 - 3 * MOST]


async def test_a_transaction_ends_after_its_time(shop: Shop, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_room, "SPAN", 0.0)
    worker = await quick(shop, registry)
    add(shop, *(task(number, f"g{number}") for number in range(2, 6)))
    worker._wakes[0].set()
    await until(lambda: len(shop.ledger.done) == 5)
    await worker.stop()
    assert shop.ledger.together == [[number] for number in range(1, 6)]


async def test_a_fault_of_a_shared_transaction_costs_no_attempt_and_each_runs_alone(shop: Shop, registry: Registry) -> None:
    worker = await quick(shop, registry, task_attempts=1)
    seen: list[int] = []

    async def deadlock(task: Task) -> None:
        seen.append(task.number)
        if seen == [2, 3, 4]:
            raise LedgerUnavailable("deadlock", ValueError("deadlock detected"))

    registry.behave = deadlock
    add(shop, *(task(number, f"g{number}") for number in range(2, 7)))
    worker._wakes[0].set()
    await until(lambda: len(shop.ledger.done) == 6)
    await worker.stop()
    assert sorted(seen) == [2, 2, 3, 3, 4, 4, 5, 6]
    assert sorted(shop.ledger.together) == [[1], [2], [3], [4], [5, 6]]
    assert shop.ledger.dead == {}
    assert shop.facts.retried().count("tasks_together") == 1


async def test_a_commit_whose_reply_was_lost_runs_nothing_twice(shop: Shop, registry: Registry) -> None:
    worker = await quick(shop, registry, task_attempts=1)
    shop.ledger.lost_task_replies = 1
    add(shop, *(task(number, f"g{number}") for number in range(2, 7)))
    worker._wakes[0].set()
    await until(lambda: len(shop.ledger.done) == 6 and not shop.ledger.tasks)
    await worker.stop()
    assert registry.started == list(range(1, 7))
    assert shop.ledger.dead == {}


async def test_what_is_no_exception_does_not_hold_up_the_others(shop: Shop, registry: Registry) -> None:
    worker = await quick(shop, registry)

    class Odd(BaseException): ...

    async def odd(task: Task) -> None:
        if task.number == 3:
            raise Odd

    registry.behave = odd
    add(shop, *(task(number, f"g{number}") for number in range(2, 7)))
    worker._wakes[0].set()
    await until(lambda: len(shop.ledger.done) == 5)
    await worker.stop()
    assert list(shop.ledger.tasks) == [3]
