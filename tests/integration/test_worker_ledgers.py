"""The worker on the real ledger: SQLite and PostgreSQL, the queue in memory and RabbitMQ; only Redis is a stand-in."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from worker_fakes import Facts, FakeRedis

from inventory_sdk.ledger.protocol import Entering, Rebuilding, Task
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.model import Movement, Position, Receipt, fingerprint, key_of
from inventory_sdk.stock.journal import encode
from inventory_sdk.sync.queues.amqp import AmqpQueue
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.queues.protocol import Queue
from inventory_sdk.sync.watermark import Watermark
from inventory_sdk.sync.worker import Worker

SKUS = ("a", "b", "c")


class Redis(FakeRedis):
    """Takes what a rebuild reads."""

    async def rebuild(self, partition: int, epoch: int, rebuilding: Rebuilding, down_ms: int = 0) -> None:  # type: ignore[override]
        self.balances = {row.field: row.available async for chunk in rebuilding.balances(100) for row in chunk}
        await super().rebuild(partition, epoch, rebuilding)  # type: ignore[arg-type]


class House:
    """A ledger with 100,000 of each SKU, opened by the first worker."""

    def __init__(self, ledger: SqlLedger, queue: Queue) -> None:
        self.ledger = ledger
        self.queue = queue
        self.redis = Redis(epoch=0)
        self.facts = Facts()
        self.sold = dict.fromkeys(SKUS, 0)
        self.names = 0
        redis: Any = self.redis
        self.watermark = Watermark(ledger, redis.worker_seen)

    def worker(self, **options: Any) -> Worker:
        redis: Any = self.redis
        defaults: dict[str, Any] = {
            "idle": 0.01,
            "first_delay": 0.01,
            "longest_delay": 0.1,
            "housekeeping": 0.05,
            "take_over": 0.5,
            "publish_timeout": 0.1,
        }
        return Worker(
            redis, self.ledger, self.queue, partitions=[0], metrics=self.facts, on_event=self.facts.on_event, **defaults | options
        )

    async def open(self) -> None:
        async with self.worker() as worker:
            await worker.ready()
        lines = [part for sku in SKUS for part in (key_of("m", sku), 100_000)]
        mark = fingerprint("restock", "", lines)
        await self.ledger.enter(0, 1, [Entering("restock", key_of("m", "po-1"), mark, tuple(lines))])

    def write(self, sequence: int, operations: int = 5, **extra: Any) -> str:
        """Journal an entry of deducts, counted in ``sold``."""
        ops: list[list[Any]] = []
        for _ in range(operations):
            self.names += 1
            sku, quantity = SKUS[self.names % 3], self.names % 4 + 1
            self.sold[sku] += quantity
            pairs = [key_of("m", sku), quantity]
            text = json.dumps(extra) if extra else ""
            key = key_of("m", f"order-{self.names}")
            ops.append(["deduct", key, fingerprint("deduct", "", pairs), pairs, [1], f"order-{self.names}", "", 0, text])
        return self.redis.write(sequence, encode(f"n{self.redis.epoch}-{sequence}", 1_700_000_000_000 + sequence, ops))

    async def publish(self, *sequences: int) -> None:
        for sequence in sequences:
            await self.queue.publish(0, self.redis.epoch, sequence, self.redis.journal[self.redis.epoch, sequence], 5.0)

    async def check(self, sold: dict[str, int] | None = None) -> None:
        rows = await self.ledger.stock([key_of("m", sku) for sku in SKUS])
        assert {row.sku: row.sold for row in rows} == (self.sold if sold is None else sold)
        assert await self.ledger.verify() == []


@pytest.fixture(params=[pytest.param("sqlite"), pytest.param("postgresql", marks=pytest.mark.postgresql)])
async def ledger(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> AsyncIterator[SqlLedger]:
    if request.param == "sqlite":
        url = f"sqlite+aiosqlite:///{tmp_path / 'stock.db'}"
    else:
        url = request.getfixturevalue("postgresql_url")
    ledger = SqlLedger(url, prefix=f"{namespace}_")
    await ledger.start()
    await ledger.create_schema()
    try:
        yield ledger
    finally:
        async with ledger.engine.begin() as connection:
            await connection.run_sync(ledger.tables.metadata.drop_all)
        await ledger.close()


@pytest.fixture
async def house(ledger: SqlLedger) -> AsyncIterator[House]:
    house = House(ledger, MemoryQueue())
    await house.open()
    yield house
    await house.watermark.close()


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def test_shuffled_repeated_and_missing_messages_end_up_exact_with_two_workers(house: House) -> None:
    order = list(range(1, 121))
    for sequence in order:
        house.write(sequence)
    messages = [sequence for sequence in order if sequence % 7] + order[::5]
    random.Random(3).shuffle(messages)
    async with house.worker(), house.worker():
        await house.publish(*messages)
        await house.watermark.reached(Position(0, 1, 120), 30)
    await house.check()


async def test_workers_that_are_killed_again_and_again_double_and_lose_nothing(house: House) -> None:
    order = list(range(1, 81))
    for sequence in order:
        house.write(sequence)
    random.Random(5).shuffle(order)
    await house.publish(*order)
    applied = asyncio.Event()
    for round_ in range(12):
        row = await house.ledger.partition(0)
        if row is not None and row.applied == 80:
            break
        applied.clear()
        worker = house.worker(max_operations=20, on_applied=lambda _: applied.set())
        await worker.start()
        if round_ % 3:
            await applied.wait()
        for _ in range(round_ * 5):
            await asyncio.sleep(0)
        await worker.stop(timeout=0)
    async with house.worker():
        await house.watermark.reached(Position(0, 1, 80), 30)
    await house.check()


async def test_an_emptied_redis_loses_only_what_is_named_and_is_filled_from_the_ledger(house: House) -> None:
    for sequence in range(1, 11):
        house.write(sequence)
    async with house.worker():
        await house.watermark.reached(Position(0, 1, 10), 30)
    known = dict(house.sold)
    for sequence in range(11, 15):
        house.write(sequence)
    await house.publish(11, 14)
    house.redis.empty()
    async with house.worker():
        await until(lambda: any(name == "recovered" for name, _ in house.facts.told))
    assert [facts["sequences"] for name, facts in house.facts.told if name == "lost"] == [(12, 13)]
    row = await house.ledger.partition(0)
    assert row is not None
    assert (row.epoch, row.state) == (2, "open")
    rows = await house.ledger.stock([key_of("m", sku) for sku in SKUS])
    assert house.redis.balances == {key_of("m", row.sku): row.available for row in rows}
    assert sum(row.sold for row in rows) > sum(known.values())
    assert await house.ledger.verify() == []


async def test_a_failing_write_of_the_service_is_named_to_the_movement_and_leaves_nothing_behind(house: House) -> None:
    seen: list[str] = []
    broken = True

    async def write(moves: Sequence[Movement], session: AsyncSession) -> None:
        if broken and any(move.operation_id == "order-33" for move in moves):
            raise ValueError("unknown product")
        seen.extend(move.operation_id for move in moves)

    for sequence in range(1, 11):
        house.write(sequence)
    async with house.worker(writes_stock=[write]):
        await until(lambda: any(name == "writes_stock_failed" for name, _ in house.facts.told))
        (facts,) = [facts for name, facts in house.facts.told if name == "writes_stock_failed"]
        assert (facts["operation_id"], facts["position"].sequence) == ("order-33", 7)
        row = await house.ledger.partition(0)
        assert row is not None
        assert row.applied == 6
        broken = False
        await house.watermark.reached(Position(0, 1, 10), 30)
    assert {f"order-{number}" for number in range(1, 51)} <= set(seen)
    await house.check()


class Registry:
    def __init__(self) -> None:
        self.done: list[tuple[str, str, int]] = []
        self.faults = 3

    async def run(self, task: Task, session: AsyncSession, receipt: Receipt) -> None:
        if self.faults:
            self.faults -= 1
            raise ValueError("not yet")
        self.done.append((task.name, receipt.operation_id, receipt.lines[0].quantity))


async def test_functions_that_run_later_are_run_once_each_also_when_they_fail_at_first(house: House) -> None:
    registry = Registry()
    house.write(1, operations=6, task={"name": "write_order", "version": 1, "arguments": "{}"})
    async with house.worker(tasks=registry, first_task_retry=0.01, last_task_retry=0.02):
        await until(lambda: len(registry.done) == 6)
    assert sorted(registry.done) == sorted(("write_order", f"order-{number}", number % 4 + 1) for number in range(1, 7))
    assert await house.ledger.due_tasks(10) == []
    assert await house.ledger.dead_tasks() == []


async def test_functions_of_messages_that_come_twice_to_two_workers_run_once_each(house: House) -> None:
    registry = Registry()
    registry.faults = 0
    for sequence in range(1, 5):
        house.write(sequence, operations=20, task={"name": "write_order", "version": 1, "arguments": "{}"})
    async with house.worker(tasks=registry), house.worker(tasks=registry):
        await asyncio.gather(*(house.publish(sequence) for sequence in (3, 1, 1, 4, 2, 3, 2, 4)))
        await until(lambda: len(registry.done) >= 80)
    assert sorted(registry.done) == sorted(("write_order", f"order-{number}", number % 4 + 1) for number in range(1, 81))
    assert await house.ledger.due_tasks(100) == []
    await house.check()


async def test_an_operation_that_the_ledger_knows_already_is_voided_in_redis(house: House) -> None:
    text = house.write(1, operations=1)
    async with house.worker() as worker:
        await house.watermark.reached(Position(0, 1, 1), 30)
        again = json.loads(text) | {"n": "another"}
        house.redis.write(2, json.dumps(again))
        await until(lambda: house.redis.voided)
        assert worker.failure is None
    (void,) = house.redis.voided
    assert (void.position.sequence, void.freeze) == (2, False)
    assert [(name, facts["operation_id"]) for name, facts in house.facts.told if name == "duplicate"] == [("duplicate", "order-1")]
    await house.check()


@pytest.fixture
async def rabbit_house(ledger: SqlLedger, amqp_url: str, namespace: str) -> AsyncIterator[House]:
    queue = AmqpQueue(amqp_url, namespace)
    await queue.start()
    house = House(ledger, queue)
    try:
        await house.open()
        yield house
    finally:
        await house.watermark.close()
        await queue.delete(0)
        await queue.close()


@pytest.mark.amqp
async def test_through_rabbitmq_with_gaps_and_repeats_it_is_exact(rabbit_house: House) -> None:
    house = rabbit_house
    order = list(range(1, 101))
    for sequence in order:
        house.write(sequence)
    messages = [sequence for sequence in order if sequence % 5] + order[::7]
    random.Random(9).shuffle(messages)
    async with house.worker(), house.worker():
        await asyncio.gather(*(house.publish(sequence) for sequence in messages))
        await house.watermark.reached(Position(0, 1, 100), 30)
    await house.check()


@pytest.mark.amqp
async def test_through_rabbitmq_an_emptied_redis_loses_nothing_that_was_confirmed(rabbit_house: House) -> None:
    house = rabbit_house
    for sequence in range(1, 31):
        house.write(sequence)
    await asyncio.gather(*(house.publish(sequence) for sequence in range(1, 31)))
    house.redis.empty()
    async with house.worker():
        await until(lambda: any(name == "recovered" for name, _ in house.facts.told))
        house.write(1)
        await house.publish(1)
        await house.watermark.reached(Position(0, 2, 1), 30)
        # What was applied in the closed epoch counts as reached, too.
        await house.watermark.reached(Position(0, 1, 30), 30)
    assert [name for name, _ in house.facts.told if name == "lost"] == []
    await house.check()
