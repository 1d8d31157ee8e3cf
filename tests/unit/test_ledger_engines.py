"""How a ledger gets its connections, and what it says when it can't."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from inventory_sdk.errors import InventoryError
from inventory_sdk.ledger import engines
from inventory_sdk.ledger.protocol import Entering
from inventory_sdk.ledger.schema import tables
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.model import key_of


@pytest.mark.parametrize(
    ("url", "driver", "extra"),
    [
        ("postgresql+asyncpg://localhost/shop", "asyncpg", "inventory_sdk[postgresql]"),
        ("mysql+asyncmy://localhost/shop", "asyncmy", "inventory_sdk[mysql]"),
        ("sqlite+aiosqlite:///stock.db", "aiosqlite", "inventory_sdk[sqlite]"),
    ],
)
def test_a_missing_driver_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch, url: str, driver: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(ImportError) as error:
        SqlLedger(url)
    assert extra in str(error.value)


def test_an_engine_with_one_shared_connection_is_refused() -> None:
    with pytest.raises(InventoryError, match="shares one connection"):
        SqlLedger(create_async_engine("sqlite+aiosqlite://"))


def test_a_prefix_that_is_not_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="prefix"):
        tables("drop table; --")


def test_the_tables_join_a_metadata_of_the_users() -> None:
    mine = tables(prefix="shop_").metadata
    tables(prefix="stock_", metadata=mine)
    assert {"shop_operation", "stock_operation"} <= set(mine.tables)


async def entered(ledger: SqlLedger) -> int:
    (done,) = await ledger.enter(0, 1, [Entering("restock", key_of("m", "po"), "f", (key_of("m", "a"), 5))])
    return done.remaining[0]


async def opened(ledger: SqlLedger) -> SqlLedger:
    await ledger.create_schema()
    await ledger.raise_epoch(0, 0)
    async with ledger.rebuilding(0, 1) as reading:
        await reading.open()
    return ledger


def test_an_in_memory_ledger_outlives_its_event_loops_and_leaves_no_file() -> None:
    ledger = SqlLedger("sqlite+aiosqlite://")
    folder: list[Path] = []

    async def first() -> None:
        await opened(ledger)
        await entered(ledger)
        folder.append(Path(str(ledger.engine.url.database)).parent)
        await ledger.close()

    async def second() -> None:
        (row,) = await ledger.all_stock()
        assert row.available == 5
        await ledger.close()

    asyncio.run(first())
    asyncio.run(second())
    assert folder[0].exists()
    ledger._engines._finalizer()
    assert not folder[0].exists()


@pytest.fixture
async def hooked(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    """A user's engine with the well-known hooks that make SQLite's driver begin where SQLAlchemy does."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'own.db'}")

    @event.listens_for(engine.sync_engine, "connect")
    def manual(connection: Any, _record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    yield engine
    await engine.dispose()


async def test_an_engine_that_begins_by_itself_works_and_stays_open(hooked: AsyncEngine) -> None:
    ledger = await opened(SqlLedger(hooked))
    assert await entered(ledger) == 5
    assert await ledger.verify() == []
    await ledger.close()
    async with hooked.connect() as connection:
        assert (await connection.execute(text("SELECT 1"))).scalar() == 1


async def test_a_write_inside_another_writes_block_ends_in_an_error(hooked: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "BUSY_SECONDS", 0.01)
    ledger = await opened(SqlLedger(hooked))
    with pytest.raises(InventoryError, match="another write transaction"):
        async with ledger.balances(0, 1, []):
            await entered(ledger)
    assert await entered(ledger) == 5
