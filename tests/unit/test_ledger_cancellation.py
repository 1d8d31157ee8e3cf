"""SQLite under callers that go away: whatever moment a transaction is cancelled at, the database is free for the next one."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from inventory_sdk.ledger.engines import Engines


@pytest.mark.parametrize("given", [False, True], ids=["url", "engine"])
async def test_a_cancelled_transaction_leaves_no_lock_behind(tmp_path: Path, given: bool) -> None:
    path = tmp_path / "stock.db"
    url = f"sqlite+aiosqlite:///{path}"
    engine = create_async_engine(url) if given else None
    engines = Engines(engine or url)
    async with engines.write() as connection:
        await connection.execute(text("create table t (a int)"))

    async def write() -> None:
        async with engines.write() as connection:
            for _ in range(30):
                await connection.execute(text("insert into t values (:a)"), [{"a": number} for number in range(50)])
                (await connection.execute(text("select count(*) from t"))).all()

    async def read() -> None:
        async with engines.read() as connection:
            (await connection.execute(text("select count(*) from t"))).all()

    def take_the_lock() -> None:
        # Waits for a rollback that is on its way; a lock that stays is an OperationalError.
        with closing(sqlite3.connect(path, timeout=5)) as other:
            other.execute("begin immediate")
            other.rollback()

    try:
        for steps in range(60):
            tasks = [asyncio.create_task(each()) for each in (write, read, read)]
            for _ in range(steps):
                await asyncio.sleep(0.0002)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.to_thread(take_the_lock)
    finally:
        await engines.dispose()
        if engine is not None:
            await engine.dispose()
