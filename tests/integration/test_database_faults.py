"""Databases under faults, real ones: what the worker holds is tried again in place, once in effect, acknowledged after the commit,
counted with its reason. What enters is safe to repeat."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from worker_fakes import Facts, FakeRedis, RecordingQueue, body, until

from inventory_sdk.ledger.protocol import Entering, LedgerUnavailable
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.metrics.events import Retried
from inventory_sdk.model import fingerprint, key_of
from inventory_sdk.stock.journal import encode
from inventory_sdk.sync.worker import Worker
from tests.faults.proxy import Proxy
from tests.servers_kit import postgres_server

LONG = 30.0
UNITS = 1000


class House:
    """A worker on a real ledger; Redis and queue are plain Python."""

    def __init__(self, ledger: SqlLedger) -> None:
        self.ledger = ledger
        self.redis = FakeRedis()
        self.queue = RecordingQueue()
        self.facts = Facts()

    def worker(self) -> Worker:
        redis: Any = self.redis
        return Worker(
            redis, self.ledger, self.queue, partitions=[0], metrics=self.facts, on_event=self.facts.on_event,
            idle=0.01, first_delay=0.01, longest_delay=0.1,
        )  # fmt: skip

    async def publish(self, *sequences: int, **more: Any) -> None:
        for sequence in sequences:
            self.redis.write(sequence, body(sequence, **more))
            await self.queue.publish(0, 1, sequence, self.redis.journal[1, sequence], 1.0)

    def reasons(self) -> set[str]:
        """Why the ledger was tried again."""
        return {event.reason for event in self.facts.events if isinstance(event, Retried) and event.what == "ledger"}

    async def applied_once(self, upto: int) -> None:
        """All acknowledged, all in the ledger, nothing twice."""
        await until(lambda: sorted(self.queue.acked) == list(range(1, upto + 1)), LONG)
        (row,) = await self.ledger.stock([key_of("m", "sku")])
        assert (row.available, row.sold) == (UNITS - upto, upto)
        assert await self.ledger.verify() == []
        assert self.queue.announced == list(range(1, upto + 1))


@asynccontextmanager
async def house_on(database: str | AsyncEngine, namespace: str) -> AsyncIterator[House]:
    ledger = SqlLedger(database, prefix=f"{namespace}_")
    await ledger.create_schema()
    try:
        raised = await ledger.raise_epoch(0, 0)
        assert raised is not None
        async with ledger.rebuilding(0, 1) as reading:
            await reading.open()
        for sku in ("sku", "a", "b"):
            await ledger.enter(0, 1, [restock(f"opening-{sku}", sku, UNITS)])
        house = House(ledger)
        await house.queue.bind(0, 1)
        yield house
    finally:
        async with ledger.engine.begin() as connection:
            await connection.run_sync(ledger.tables.metadata.drop_all)
        await ledger.close()


def restock(name: str, sku: str, units: int) -> Entering:
    lines = (key_of("m", sku), units)
    return Entering("restock", key_of("m", name), fingerprint("restock", "", list(lines)), lines)


@asynccontextmanager
async def beside(url: str) -> AsyncIterator[AsyncConnection]:
    """Somebody else's connection to the same database."""
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


@pytest.mark.parametrize(
    "database", [pytest.param("postgresql", marks=pytest.mark.postgresql), pytest.param("mariadb", marks=pytest.mark.mariadb)]
)
async def test_a_deadlock_that_the_worker_loses_is_tried_again_in_place(
    database: str, namespace: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(f"{database}_url")
    async with house_on(url, namespace) as house, beside(url) as other:
        stock, setting = f"{namespace}_stock", f"{namespace}_setting"
        lock = "SELECT version FROM {} WHERE merchant = 'm' AND sku = '{}' FOR UPDATE"
        if database == "postgresql":
            await other.execute(text("SET LOCAL deadlock_timeout = '60s'"))  # it is the worker that notices, and gives up
        else:
            for number in range(50):  # MariaDB gives up whoever has written less
                await other.execute(text(f"INSERT INTO {setting} (name, value) VALUES ('x{number}', 'x')"))
        await other.execute(text(lock.format(stock, "b")))
        both = ["deduct", "m\x1fboth", "f", ["m\x1fa", 1, "m\x1fb", 1], [9, 9], "", "", 0, ""]
        house.redis.write(1, encode("n1", 1_700_000_000_000, [both]))
        await house.queue.publish(0, 1, 1, house.redis.journal[1, 1], 1.0)
        async with house.worker():
            while "deadlock" not in house.reasons():
                # The worker takes a, then waits for b. Whoever is first: one of us meets the other there, until it was the worker.
                await asyncio.sleep(0.2)
                await asyncio.wait_for(other.execute(text(lock.format(stock, "a"))), LONG)
            assert house.queue.acked == []
            await other.rollback()
            await until(lambda: house.queue.acked == [1], LONG)
        rows = await house.ledger.stock([key_of("m", "a"), key_of("m", "b")])
        assert [(row.available, row.sold) for row in rows] == [(UNITS - 1, 1)] * 2
        assert await house.ledger.verify() == []


@pytest.mark.parametrize(
    ("database", "reason"),
    [
        pytest.param("postgresql", "lock_timeout", marks=pytest.mark.postgresql),
        pytest.param("mariadb", "lock_timeout", marks=pytest.mark.mariadb),
        ("sqlite", "locked"),
    ],
)
async def test_a_lock_that_somebody_keeps_for_too_long_is_waited_out(
    database: str, reason: str, namespace: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/stock.db" if database == "sqlite" else request.getfixturevalue(f"{database}_url")
    impatient: dict[str, Any] = {
        "postgresql": {"server_settings": {"lock_timeout": "100ms"}},
        "mariadb": {"init_command": "SET innodb_lock_wait_timeout = 1"},
        "sqlite": {"timeout": 0.1},
    }[database]
    engine = create_async_engine(url, connect_args=impatient)
    async with house_on(engine, namespace) as house, beside(url) as other:
        if database == "sqlite":
            await other.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            await other.execute(text(f"SELECT applied FROM {namespace}_partition WHERE epoch = 1 FOR UPDATE"))
        async with house.worker():
            await house.publish(1, 2)
            await until(lambda: reason in house.reasons(), LONG)
            with pytest.raises(LedgerUnavailable) as caught:
                await house.ledger.enter(0, 1, [restock("po-1", "sku", 1)])
            assert caught.value.reason == reason
            assert house.queue.acked == []
            await other.rollback()
            await house.applied_once(2)
    await engine.dispose()


@pytest.mark.postgresql
@pytest.mark.parametrize(
    ("state", "reason"),
    [("40001", "serialization"), ("53100", "disk_full"), ("57014", "canceled"), ("25006", "read_only"), ("57P01", "disconnected")],
)
async def test_what_the_server_refuses_for_now_is_tried_again_and_named(
    state: str, reason: str, namespace: str, postgresql_url: str
) -> None:
    async with house_on(postgresql_url, namespace) as house:
        async with house.ledger.engine.begin() as connection:
            # A sequence is not rolled back: the first two transactions fail, the third does not.
            await connection.execute(text(f"CREATE SEQUENCE {namespace}_tries"))
            await connection.execute(
                text(
                    f"CREATE FUNCTION {namespace}_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                    f"IF nextval('{namespace}_tries') < 3 THEN RAISE EXCEPTION 'not now' USING ERRCODE = '{state}'; END IF; "
                    f"RETURN NULL; END $$"
                )
            )
            await connection.execute(
                text(f"CREATE TRIGGER refuse BEFORE INSERT ON {namespace}_entry FOR EACH STATEMENT EXECUTE FUNCTION {namespace}_refuse()")
            )
        try:
            async with house.worker():
                await house.publish(1, 2)
                await house.applied_once(2)
            assert house.reasons() == {reason}
        finally:
            async with house.ledger.engine.begin() as connection:
                await connection.execute(text(f"DROP FUNCTION {namespace}_refuse CASCADE"))
                await connection.execute(text(f"DROP SEQUENCE {namespace}_tries"))


@pytest.mark.postgresql
async def test_a_commit_whose_reply_was_lost_is_found_and_counts_once(namespace: str, postgresql_url: str) -> None:
    parts = urlsplit(postgresql_url)
    async with Proxy(parts.hostname or "127.0.0.1", parts.port or 5432) as proxy:
        login = f"{parts.username}:{parts.password}@" if parts.password else f"{parts.username}@" if parts.username else ""
        url = urlunsplit(parts._replace(netloc=f"{login}127.0.0.1:{proxy.port}"))
        async with house_on(url, namespace) as house:
            lost = 0

            def lose(_: Any) -> None:
                nonlocal lost
                if lost < 2:
                    lost += 1
                    proxy.mute()
                    asyncio.get_running_loop().call_later(0.3, proxy.cut)

            event.listen(house.ledger.engine.sync_engine, "commit", lose)
            with pytest.raises(LedgerUnavailable) as caught:
                await house.ledger.enter(0, 1, [restock("po-1", "sku", 5)])
            assert caught.value.reason == "disconnected"
            async with house.worker():
                await house.publish(1, 2, 3)
                await until(lambda: sorted(house.queue.acked) == [1, 2, 3], LONG)
                await until(lambda: house.queue.announced == [1, 2, 3], LONG)
            assert lost == 2
            (entered,) = await house.ledger.enter(0, 1, [restock("po-1", "sku", 5)])
            assert entered.replayed
            (row,) = await house.ledger.stock([key_of("m", "sku")])
            assert (row.supplied, row.available, row.sold) == (UNITS + 5, UNITS + 2, 3)
            assert await house.ledger.verify() == []
            assert "disconnected" in house.reasons()


async def test_a_postgresql_that_restarts_gets_everything_once(namespace: str) -> None:
    with postgres_server("fsync=off") as server:
        async with house_on(server.url, namespace) as house, house.worker():
            await house.publish(*range(1, 30))
            await until(lambda: house.queue.acked, LONG)
            restarting = asyncio.create_task(asyncio.to_thread(server.restart))
            for sequence in range(30, 60):
                await house.publish(sequence)
                await asyncio.sleep(0.01)
            await restarting
            await house.publish(60)
            await house.applied_once(60)
            assert house.reasons() == {"disconnected"}


async def test_a_database_that_is_not_there_is_one_error_with_its_reason(namespace: str) -> None:
    ledger = SqlLedger("postgresql+asyncpg://postgres@127.0.0.1:1/none", prefix=f"{namespace}_")
    with pytest.raises(LedgerUnavailable) as caught:
        await ledger.partition(0)
    assert caught.value.reason == "disconnected"
    assert caught.value.retry_after > 0
    await ledger.close()
