"""Redis forgets, or goes back in time, on real servers: a Redis of the test's own, RabbitMQ, PostgreSQL, and whole Inventories.
What was acknowledged is in the ledger to the unit, what is lost is named, and there is one winner."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from inventory_sdk import Inventory, Line, Movement, Receipt
from inventory_sdk.errors import InventoryError, OutcomeUnknown, ReservationClosed, ReservationNotFound, StockFrozen
from inventory_sdk.ledger.protocol import Balance, Entering, Void
from inventory_sdk.ledger.schema import tables
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.model import JournalEntry, JournalOperation, Position, fingerprint, key_of
from inventory_sdk.sync.queues import from_url
from tests.servers_kit import RedisServer, postgres_server, redis_server

pytestmark = [pytest.mark.redis, pytest.mark.postgresql]

QUICK: dict[str, Any] = {"publish_timeout": 0.5, "first_delay": 0.01, "longest_delay": 0.2, "take_over": 3.0, "housekeeping": 0.1}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


class Site:
    """One stock on the test's Redis: as many processes on it as the test makes."""

    def __init__(self, redis: str, queue: str | None, database: str, namespace: str) -> None:
        self.redis, self.queue, self.database, self.namespace = redis, queue, database, namespace
        self.told: list[tuple[str, Mapping[str, Any]]] = []

    def inventory(self, **options: Any) -> Inventory:
        made = Inventory(
            self.redis, queue=self.queue, database=self.database, merchant="m", namespace=self.namespace,
            table_prefix=f"{self.namespace}_", metrics=[NoMetrics()], **options,
        )  # fmt: skip
        for name in ("frozen", "recovered", "lost", "rejected", "fork", "late_entry"):
            made.on(name)(self._hear(name))
        return made

    def _hear(self, name: str) -> Callable[[Mapping[str, Any]], None]:
        def hear(facts: Mapping[str, Any]) -> None:
            self.told.append((name, facts))

        return hear

    def heard(self, name: str) -> list[Mapping[str, Any]]:
        return [facts for each, facts in self.told if each == name]

    @asynccontextmanager
    async def opened(self, stock: int = 100, **options: Any) -> AsyncIterator[Inventory]:
        """A caller's process, the schema made, ``stock`` units of sku a."""
        async with self.inventory(**options) as inventory:
            await inventory.create_schema()
            if stock:
                await inventory.stock.restock([Line("a", stock)], operation_id="po-1", merchant="m")
            yield inventory

    async def sweep(self) -> None:
        queue = from_url(self.queue, self.namespace) if self.queue else None
        if queue is not None:
            await queue.start()
            await queue.delete(0)
            await queue.delete(1)
            await queue.close()
        engine = create_async_engine(self.database)
        with suppress(OSError):
            async with engine.begin() as connection:
                await connection.run_sync(tables(f"{self.namespace}_").metadata.drop_all)
        await engine.dispose()


@pytest.fixture(params=[pytest.param("rabbitmq", marks=pytest.mark.amqp), "streams"])
async def site(
    request: pytest.FixtureRequest, server: RedisServer, amqp_url: str, postgresql_url: str, namespace: str
) -> AsyncIterator[Site]:
    site = Site(server.url, amqp_url if request.param == "rabbitmq" else None, postgresql_url, namespace)
    with server.client() as client:
        client.flushall()
    yield site
    await site.sweep()


async def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def sold(inventory: Inventory, sku: str = "a") -> tuple[int, int]:
    """(sold, available) in the ledger, its books proved."""
    assert await inventory.ledger.verify() == []
    (row,) = await inventory.ledger.stock([key_of("m", sku)])
    return row.sold, row.available


async def patient(act: Callable[[], Any]) -> Any:
    """The act, repeated with its id until it has an outcome; a repeat is always safe."""
    async with asyncio.timeout(60):
        while True:
            try:
                return await act()
            except (StockFrozen, OutcomeUnknown, InventoryError):
                await asyncio.sleep(0.05)


# Redis forgets ---------------------------------------------------------------------------------------------------------------


async def test_ten_takes_acknowledged_six_applied_redis_emptied_ten_in_the_ledger(site: Site, server: RedisServer) -> None:
    async with site.opened() as inventory:
        stock = inventory.stock
        async with inventory.worker(**QUICK) as worker:
            await worker.ready()
            for number in range(6):
                await stock.deduct([Line("a", 1)], operation_id=f"o{number}")
            await inventory.settled()
        for number in range(6, 10):  # nobody applies these
            await stock.deduct([Line("a", 1)], operation_id=f"o{number}")
        with server.client() as client:
            client.flushall()
        with pytest.raises(StockFrozen):
            await stock.deduct([Line("a", 1)])
        async with inventory.worker(**QUICK):
            await until(lambda: site.heard("recovered"))
            if site.queue is not None:
                assert await sold(inventory) == (10, 90)
                assert site.heard("lost") == []
            else:
                # Streams promise no more than Redis itself; the ids may be repeated, and nothing is doubled.
                assert await sold(inventory) == (6, 94)
            receipts = [await stock.deduct([Line("a", 1)], operation_id=f"o{number}") for number in range(10)]
            assert [receipt.replayed for receipt in receipts[:6]] == [True] * 6
            assert all(receipt.replayed for receipt in receipts) == (site.queue is not None)
            await inventory.settled()
            assert await sold(inventory) == (10, 90)
            level = await stock.level("a")
            assert (level.available, level.reserved, level.epoch) == (90, 0, 2)


async def test_a_confirm_stands_for_its_lost_reserve_and_what_gives_back_moves_nothing(site: Site, server: RedisServer) -> None:
    """The reserves reach Redis alone (level redis, and their messages are lost); what ended them reaches the queue."""
    if site.queue is None:
        pytest.skip("streams lose both or neither")
    async with site.opened() as inventory:
        stock = inventory.stock
        running: Any = inventory._running()
        await until(lambda: not running._publisher._traffic.get().tasks)
        real, running.queue.publish = running.queue.publish, _never
        for name in ("sold", "back", "gone"):
            await stock.reserve([Line("a", 2)], operation_id=name, ttl=600, durability="redis")
        undone = await stock.deduct([Line("a", 5)], operation_id="undone", durability="redis")
        for task in list(running._publisher._traffic.get().tasks):
            task.cancel()
        running.queue.publish = real
        await stock.confirm("sold")
        await stock.release("back")
        assert await stock.undo(undone)
        await stock.deduct([Line("a", 1)], operation_id="last")
        with server.client() as client:
            client.flushall()
        async with inventory.worker(**QUICK):
            await until(lambda: site.heard("recovered"))
            assert [facts["sequences"] for facts in site.heard("lost")] == [(2, 3, 4, 5)]
            assert site.heard("rejected") == []
            assert await sold(inventory) == (3, 97)
            with pytest.raises(ReservationClosed):  # it was released: an answer that the ledger would take back is no answer
                await stock.reserve([Line("a", 2)], operation_id="back", ttl=600, durability="redis")
            await stock.deduct([Line("a", 97)], operation_id="all")
            await inventory.settled()
            assert await sold(inventory) == (100, 0)


async def _never(*_: Any) -> None:
    await asyncio.Event().wait()


async def test_an_emptied_redis_under_load_with_three_workers_has_one_winner(site: Site, server: RedisServer) -> None:
    dice = random.Random(7)
    acknowledged: list[Receipt] = []
    async with site.opened(stock=5000) as inventory, AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(site.inventory()) for _ in range(3)]
        for each in workers:
            await stack.enter_async_context(each.worker(**QUICK))
        stop = asyncio.Event()

        async def sell(buyer: int) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                line, name = [Line("a", dice.randint(1, 2))], f"b{buyer}-{number}"
                acknowledged.append(await patient(lambda line=line, name=name: inventory.stock.deduct(line, operation_id=name)))
                await asyncio.sleep(dice.random() / 100)

        buyers = [asyncio.create_task(sell(number)) for number in range(8)]
        for epoch in (2, 3):
            before = len(acknowledged)
            await until(lambda before=before: len(acknowledged) > before + 40)
            with server.client() as client:
                client.flushall()
            await until(lambda epoch=epoch: len(site.heard("recovered")) == epoch - 1)
        before = len(acknowledged)
        await until(lambda: len(acknowledged) > before + 40)
        stop.set()
        await asyncio.gather(*buyers)
        await patient(inventory.settled)
        assert [facts["epoch"] for facts in site.heard("recovered")] == [2, 3], "one winner each time"
        units, available = await sold(inventory)
        asked = sum(receipt.lines[0].quantity for receipt in acknowledged)
        level = await inventory.stock.level("a")
        assert (level.available, units + available) == (available, 5000)
        if site.queue is not None:
            assert units == asked, f"{len(acknowledged)} acknowledged"
            assert not site.heard("rejected")
        else:
            assert units <= asked


# Redis goes back -------------------------------------------------------------------------------------------------------------


def dump(server: RedisServer, namespace: str) -> dict[bytes, bytes]:
    with server.client() as client:
        return {key: client.dump(key) for key in client.scan_iter(match=f"*{namespace}*", count=1000)}


def restore(server: RedisServer, snapshot: dict[bytes, bytes]) -> None:
    """The same server process, its data as it was."""
    with server.client() as client, client.pipeline() as pipeline:
        pipeline.flushall()
        for key, value in snapshot.items():
            pipeline.restore(key, 0, value)
        pipeline.execute()


async def test_a_process_that_sees_redis_go_back_closes_it_and_every_unit_is_accounted(site: Site, server: RedisServer) -> None:
    async with site.opened() as inventory, site.inventory() as other:
        stock = inventory.stock
        for number in range(5):
            await stock.deduct([Line("a", 1)], operation_id=f"o{number}")
        snapshot = dump(server, site.namespace)
        for number in range(5, 10):
            await stock.deduct([Line("a", 1)], operation_id=f"o{number}")
        restore(server, snapshot)
        # One that has not seen the first side sells on; one that has takes part in nothing.
        await other.stock.deduct([Line("a", 2)], operation_id="other")
        with pytest.raises(OutcomeUnknown, match="went back"):
            await stock.deduct([Line("a", 1)], operation_id="again")
        with pytest.raises(StockFrozen):
            await other.stock.deduct([Line("a", 2)], operation_id="no more")
        async with inventory.worker(**QUICK):
            await until(lambda: site.heard("recovered"))
            assert site.heard("frozen")[0]["why"] in ("went_back", "fork")
            for number in range(10):
                await patient(lambda number=number: stock.deduct([Line("a", 1)], operation_id=f"o{number}"))
            await patient(lambda: stock.deduct([Line("a", 1)], operation_id="again"))
            await patient(lambda: stock.deduct([Line("a", 2)], operation_id="other"))
            await inventory.settled()
            assert await sold(inventory) == (13, 87)
            assert (await stock.level("a")).available == 87


async def test_a_fork_is_seen_by_a_process_that_wrote_on_the_other_side(site: Site, server: RedisServer) -> None:
    """The new side has grown past what the process knows: only the entry itself tells."""
    async with site.opened() as inventory, site.inventory() as other:
        snapshot = dump(server, site.namespace)
        await inventory.stock.deduct([Line("a", 1)], operation_id="mine")
        restore(server, snapshot)
        for number in range(5):
            await other.stock.deduct([Line("a", 1)], operation_id=f"o{number}")
        for connection, _ in (wire := inventory._engine().wire)._idle:
            await connection.disconnect()
        wire._idle.clear()  # a failover makes new connections
        with suppress(StockFrozen):
            await inventory.stock.deduct([Line("a", 1)], operation_id="first")
        with pytest.raises(StockFrozen):
            await inventory.stock.deduct([Line("a", 1)], operation_id="second")
        async with inventory.worker(**QUICK):
            await until(lambda: site.heard("recovered"))
            assert site.heard("frozen")[0]["why"] == "fork"
            for name in ("mine", "first", "second", *(f"o{number}" for number in range(5))):
                await patient(lambda name=name: inventory.stock.deduct([Line("a", 1)], operation_id=name))
            await inventory.settled()
            assert await sold(inventory) == (8, 92)


async def test_a_fork_is_seen_by_the_ledger_and_both_sides_are_sold_once(site: Site, server: RedisServer) -> None:
    async with site.opened() as inventory, site.inventory() as other:
        async with inventory.worker(**QUICK) as worker:
            await worker.ready()
            await inventory.stock.deduct([Line("a", 1)], operation_id="both")
            await inventory.settled()
        snapshot = dump(server, site.namespace)
        async with inventory.worker(**QUICK) as worker:
            await worker.ready()
            await inventory.stock.deduct([Line("a", 1)], operation_id="one side")
            await inventory.settled()
        restore(server, snapshot)
        await other.stock.deduct([Line("a", 3)], operation_id="other side", durability="redis")
        async with inventory.worker(**QUICK):
            await until(lambda: site.heard("recovered"))
            assert site.heard("fork")
            await until(lambda: site.heard("late_entry"))
            await other.settled()
            assert await sold(inventory) == (5, 95)
            assert (await other.stock.deduct([Line("a", 3)], operation_id="other side")).replayed


# The fence -------------------------------------------------------------------------------------------------------------------


@pytest.mark.amqp
async def test_a_refused_publish_of_an_ended_epoch_says_so_and_the_repeat_tells(site: Site, server: RedisServer) -> None:
    if site.queue is None:
        pytest.skip("nothing is published")
    async with site.opened() as inventory:
        running: Any = inventory._running()
        real = running.queue.publish
        fenced = asyncio.Event()

        async def late(*arguments: Any) -> None:
            await fenced.wait()
            await real(*arguments)

        running.queue.publish = late
        act = asyncio.create_task(inventory.stock.deduct([Line("a", 1)], operation_id="late"))
        await asyncio.sleep(0.2)
        with server.client() as client:
            client.flushall()
        async with inventory.worker(**QUICK):
            await until(lambda: site.heard("recovered"))
            fenced.set()
            with pytest.raises(OutcomeUnknown, match=r"was ended.*repeat it with the same operation_id"):
                await act
            running.queue.publish = real
            assert not (await inventory.stock.deduct([Line("a", 1)], operation_id="late")).replayed
            await inventory.settled()
            assert await sold(inventory) == (1, 99)


async def test_a_late_entry_is_sold_under_its_id_or_rejected_by_name(site: Site, server: RedisServer) -> None:
    """What the broker lets in behind the marker: acknowledged to nobody, or to one who was told so just before."""
    if site.queue is None:
        pytest.skip("streams have no late entries")
    async with site.opened(stock=10) as inventory:
        running: Any = inventory._running()
        bodies: list[tuple[Any, ...]] = []
        real = running.queue.publish

        async def kept(*arguments: Any) -> None:
            bodies.append(arguments)

        running.queue.publish = kept
        await inventory.stock.reserve([Line("a", 2)], operation_id="hold", ttl=300)
        await inventory.stock.confirm("hold")
        await inventory.stock.deduct([Line("a", 3)], operation_id="fits")
        await inventory.stock.deduct([Line("a", 4)], operation_id="too much")
        undone = await inventory.stock.deduct([Line("a", 1)], operation_id="undone")
        await inventory.stock.undo(undone)
        running.queue.publish = real
        with server.client() as client:
            client.flushall()
        async with inventory.worker(**QUICK):
            await until(lambda: site.heard("recovered"))
            await inventory.stock.deduct([Line("a", 2)], operation_id="meanwhile")
            for arguments in random.Random(3).sample(bodies, len(bodies)):
                await running.queue.deliver(*arguments)
                await running.queue.deliver(*arguments)
            await until(lambda: site.heard("rejected"))
            await inventory.settled()
            assert [facts["operation_id"] for facts in site.heard("rejected")] == ["too much"]
            assert await sold(inventory) == (7, 3)
            assert (await inventory.stock.deduct([Line("a", 3)], operation_id="fits")).replayed
            assert (await inventory.stock.confirm("hold")).lines[0].quantity == 2
            assert await sold(inventory) == (7, 3)


async def test_other_partitions_sell_on_while_one_waits_for_rabbitmq(site: Site, server: RedisServer) -> None:
    if site.queue is None:
        pytest.skip("streams wait for nobody")
    async with site.inventory(partitions=2) as inventory:
        await inventory.create_schema()
        home = {inventory._engine().home(name).number: name for name in ("m", "n", "o", "p", "q")}
        for merchant in home.values():
            await inventory.stock.restock([Line("a", 100)], operation_id="po", merchant=merchant)
        running: Any = inventory._running()
        real, away = running.queue.unbind, asyncio.Event()

        async def unbind(partition: int, epoch: int) -> None:
            if partition == 0 and not away.is_set():
                raise ConnectionError("RabbitMQ is away")
            await real(partition, epoch)

        running.queue.unbind = unbind
        async with inventory.worker(**QUICK) as worker:
            await worker.ready()
            with server.client() as client:
                client.delete(f"{{{site.namespace}:0}}:meta")
            await until(lambda: site.heard("frozen"))
            for _ in range(20):
                await inventory.stock.deduct([Line("a", 1)], merchant=home[1])
            with pytest.raises(StockFrozen):
                await inventory.stock.deduct([Line("a", 1)], merchant=home[0])
            assert not site.heard("recovered")
            away.set()
            await until(lambda: site.heard("recovered"))
            await inventory.stock.deduct([Line("a", 1)], merchant=home[0])


# The ledger ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raised", ["after it began", "before it began"])
@pytest.mark.parametrize("at", ["its end", "its reading"])
async def test_a_worker_transaction_that_is_open_across_an_epoch_change_is_in_the_rebuild(
    postgresql_url: str, namespace: str, raised: str, at: str
) -> None:
    ledger = SqlLedger(postgresql_url, prefix=f"{namespace}_")
    await ledger.create_schema()
    inside, go = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []
    try:
        assert await ledger.raise_epoch(0, 0)
        async with ledger.rebuilding(0, 1) as reading:
            await reading.open()
        pairs = [key_of("m", "a"), 10]
        await ledger.enter(0, 1, [Entering("restock", key_of("m", "po"), fingerprint("restock", "", pairs), tuple(pairs))])

        async def slow(moves: Sequence[Movement], session: AsyncSession) -> None:
            inside.set()
            await go.wait()

        line = [key_of("m", "a"), 4]
        operation = JournalOperation("deduct", key_of("m", "o"), fingerprint("deduct", "", line), line, [6], "", "", 0, "")
        entry = JournalEntry(0, 1, 1, "n", 1_700_000_000_000, (operation,))
        if raised == "before it began":
            assert await ledger.raise_epoch(0, 1)
        async with ledger.engine.connect() as other:
            if at == "its end":
                applying = asyncio.create_task(ledger.apply(0, 1, [entry], [slow]))
                tasks.append(applying)
                await inside.wait()
            else:
                # Somebody has the stock row: the worker knows its epoch open, and has written nothing yet.
                stock = ledger.tables.stock
                await other.execute(select(stock.c.sku).with_for_update())
                waits_for_us = text("SELECT 1 FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY(pg_blocking_pids(pid))")
                applying = asyncio.create_task(ledger.apply(0, 1, [entry]))
                tasks.append(applying)
                async with asyncio.timeout(30):
                    while not (await other.execute(waits_for_us)).all():
                        await asyncio.sleep(0.01)

            async def rebuild() -> list[Balance]:
                if raised == "after it began":
                    assert await ledger.raise_epoch(0, 1)
                async with ledger.rebuilding(0, 2) as reading:
                    found = [row async for rows in reading.balances(10) for row in rows]
                    await reading.open()
                return found

            rebuilding = asyncio.create_task(rebuild())
            tasks.append(rebuilding)
            done, _ = await asyncio.wait([rebuilding], timeout=0.3)
            assert not done, "Redis is not filled over an open transaction"
            go.set()
            await other.rollback()
        await applying
        found = await rebuilding
        assert [(row.available, row.reserved) for row in found] == [(6, 0)]
        assert await ledger.verify() == []
    finally:
        go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with ledger.engine.begin() as connection:
            await connection.run_sync(ledger.tables.metadata.drop_all)
        await ledger.close()


async def test_postgresql_restored_to_five_seconds_ago_is_named_and_caught_up(
    server: RedisServer, amqp_url: str, namespace: str, request: pytest.FixtureRequest
) -> None:
    with server.client() as client:
        client.flushall()
    with postgres_server() as postgres:
        site = Site(server.url, amqp_url, postgres.url, namespace)
        try:
            async with site.opened() as inventory:
                async with inventory.worker(**QUICK) as worker:
                    await worker.ready()
                    for number in range(5):
                        await inventory.stock.deduct([Line("a", 1)], operation_id=f"o{number}")
                    held = await inventory.stock.reserve([Line("a", 3)], operation_id="hold", ttl=600)
                    await inventory.settled()
                engine = create_async_engine(postgres.url, isolation_level="AUTOCOMMIT")
                names = [table.name for table in tables(f"{namespace}_").all()]
                async with engine.connect() as connection:
                    for name in names:
                        await connection.execute(text(f'CREATE TABLE "old_{name}" AS TABLE "{name}"'))
                async with inventory.worker(**QUICK) as worker:
                    await worker.ready()
                    for number in range(5, 10):
                        await inventory.stock.deduct([Line("a", 1)], operation_id=f"o{number}")
                    await inventory.stock.confirm("hold")
                    await inventory.settled()
                    assert await sold(inventory) == (13, 87)
                    key = f"{{{namespace}:0}}:meta"
                    with server.client() as client:
                        row = await inventory.ledger.partition(0)
                        assert row is not None
                        await until(lambda: int(client.hget(key, "applied") or 0) == row.applied)
                    # All at once, as a restored server shows itself.
                    async with engine.connect() as connection:
                        await connection.execute(text("BEGIN"))
                        for name in names:
                            await connection.execute(text(f'DELETE FROM "{name}"'))
                        for name in names:
                            await connection.execute(text(f'INSERT INTO "{name}" SELECT * FROM "old_{name}"'))
                        await connection.execute(text("COMMIT"))
                    await until(lambda: site.heard("recovered"))
                    assert [facts["why"] for facts in site.heard("frozen")] == ["ledger_went_back"]
                    assert site.heard("lost") == []
                    assert await sold(inventory) == (13, 87)
                    assert (await inventory.stock.deduct([Line("a", 1)], operation_id="o9")).replayed
                    assert (await inventory.stock.reservation(held.operation_id)).state == "confirmed"  # type: ignore[union-attr]
                    assert (await inventory.stock.level("a")).available == 87
                await engine.dispose()
        finally:
            await site.sweep()


async def test_a_second_void_of_the_same_refusal_moves_nothing(site: Site, server: RedisServer) -> None:
    """The ledger refuses a take (drift), two workers send its void, one without knowing of the other."""
    async with site.opened(stock=10) as inventory:
        with server.client() as client:
            client.hincrby(f"{{{site.namespace}:0}}:available", key_of("m", "a"), 5)
        await inventory.stock.deduct([Line("a", 12)], operation_id="too much", durability="redis")
        async with inventory.worker(**QUICK), site.inventory() as second, second.worker(**QUICK):
            await until(lambda: site.heard("rejected"))
            await inventory.settled()
            void_row = (await inventory.ledger.operations_at([Position(0, 1, 2)]))[0]
            assert void_row.status == "rejected"
            engine, other = inventory._engine(), second._engine()
            async with asyncio.timeout(30):
                while await inventory.ledger.pending_voids(0, 1):
                    await asyncio.sleep(0.02)
            before = (await engine.upkeep.journal_state(0)).sequence
            again = Void(Position(0, 1, 2), 0, key_of("m", "too much"), "deduct", "", (key_of("m", "a"), 12, 0), True)
            await engine.upkeep.void(0, 1, again)
            await other.upkeep.void(0, 1, again)
            # The ledger would take a second one back: that nothing moved, only the journal tells.
            assert (await engine.upkeep.journal_state(0)).sequence == before
            await inventory.settled()
        assert (await inventory.stock.level("a")).available == 15, "10, and the 5 that were never supplied"
        assert await sold(inventory) == (0, 10)


async def test_an_unknown_id_released_then_reserved_late_takes_nothing_across_a_recovery(site: Site, server: RedisServer) -> None:
    async with site.opened(stock=10) as inventory:
        with pytest.raises(ReservationNotFound):
            await inventory.stock.release("never")
        with pytest.raises(ReservationClosed):
            await inventory.stock.reserve([Line("a", 2)], operation_id="never", ttl=60)
        async with inventory.worker(**QUICK) as worker:
            await worker.ready()
            await inventory.settled()
            with server.client() as client:
                client.flushall()
            await until(lambda: site.heard("recovered"))
            # An answer that the ledger would take back is no answer: the rebuild brings the tombstone back.
            with pytest.raises(ReservationClosed):
                await inventory.stock.reserve([Line("a", 2)], operation_id="never", ttl=60, durability="redis")
            await inventory.settled()
            assert (await inventory.stock.level("a")).available == 10
        assert await sold(inventory) == (0, 10)
