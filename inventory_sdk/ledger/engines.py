"""Engines and transactions: one engine per event loop, and what each database needs to begin a transaction rightly.

Everything runs at READ COMMITTED: consistency comes from row locks, and a snapshot that is older than the lock would hide what
the lock waited for.

SQLite has one writer. ``BEGIN IMMEDIATE`` takes that role before the first read (a transaction that upgrades later is refused,
not queued), and writers of one loop queue on an asyncio lock first, because SQLite's own waiting is polling.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import StaticPool, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from inventory_sdk.errors import InventoryError
from inventory_sdk.ledger.dialects import KNOWN, Bulk, bulk_for
from inventory_sdk.ledger.faults import faults_named

BUSY_SECONDS: Final = 30.0
"""How long a writer waits for SQLite's only write transaction."""

_EXTRAS: Final = {"postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql", "sqlite": "sqlite"}


def _roll_back_before_closing(connection: Any, _record: Any) -> None:
    """A cancelled caller's connection is closed with its transaction open and its cursors alive. SQLite then keeps the database
    locked until the last cursor is collected, so the transaction is ended in the driver's thread before the close gets there."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return  # collected after its event loop: nobody runs the driver's calls any more
    rollback = connection.driver_connection.rollback()
    try:
        # The first step queues the call; the pool's event can't wait for its end, and the close queues behind it.
        queued = rollback.send(None)
    except (StopIteration, ValueError):
        return  # closed already
    finally:
        rollback.close()
    queued.add_done_callback(lambda done: done.cancelled() or done.exception())


@dataclass(frozen=True, slots=True)
class Bound:
    """What belongs to one event loop."""

    engine: AsyncEngine
    writing: asyncio.Lock


class Engines:
    """Connections of a ledger. Given a URL it makes an engine in each event loop that uses it, and disposes it there; an
    ``AsyncEngine`` of the user is used as it is and left open.

    An in-memory SQLite URL becomes a temporary file: each connection, and each loop, would have an empty database of its own
    otherwise. ``InventoryError`` for an in-memory engine (one connection shared by all: their transactions would mix).
    """

    def __init__(self, database: str | AsyncEngine) -> None:
        self._bound: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Bound] = weakref.WeakKeyDictionary()
        self._given: AsyncEngine | None = None
        self._url: URL | None = None
        self._volatile = False
        if isinstance(database, str):
            self._url = self._placed(make_url(database))
            probe = self._make()
            self.dialect = probe.dialect
        else:
            if isinstance(database.pool, StaticPool):
                raise InventoryError(
                    "this AsyncEngine shares one connection (in-memory SQLite): the worker's transactions and yours would mix; "
                    "give a file, such as sqlite+aiosqlite:///stock.db"
                )
            self._given = database
            self.dialect = database.dialect
            if database.dialect.name == "sqlite":
                event.listen(database.sync_engine, "close", _roll_back_before_closing)
        self.sqlite = self.dialect.name == "sqlite"
        self.bulk: Bulk = bulk_for(self.dialect)

    def _placed(self, url: URL) -> URL:
        if url.get_backend_name() != "sqlite" or not (
            url.database in (None, "", ":memory:") or "mode=memory" in str(url.database) + str(url.query.get("mode"))
        ):
            return url
        folder = tempfile.mkdtemp(prefix="inventory-ledger-")
        self._finalizer = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._volatile = True
        return url.set(database=str(Path(folder) / "ledger.db"), query={})

    def _make(self) -> AsyncEngine:
        url = self._url
        assert url is not None
        backend = url.get_backend_name()
        options: dict[str, Any] = {}
        if backend == "sqlite":
            options = {"connect_args": {"timeout": BUSY_SECONDS}}
        elif backend in _EXTRAS:
            # MySQL's server hangs up on idle connections and its ping is one small packet; asyncpg's would be three round trips a
            # transaction, and PostgreSQL keeps idle connections.
            options = {"isolation_level": "READ COMMITTED", "pool_pre_ping": backend != "postgresql"}
        if backend in ("mysql", "mariadb") and "charset" not in url.query:
            url = url.update_query_dict({"charset": "utf8mb4"})
        try:
            engine = create_async_engine(url, **options)
        except (ImportError, NoSuchModuleError) as error:
            extra = _EXTRAS.get(backend)
            if extra is None:
                raise InventoryError(f"database {backend!r}: {KNOWN}") from error
            raise ImportError(f"{url.drivername}: {error}; install it with: pip install 'inventory_sdk[{extra}]'") from error
        if backend == "sqlite":
            event.listen(engine.sync_engine, "connect", self._prepare_sqlite)
            event.listen(engine.sync_engine, "close", _roll_back_before_closing)
        return engine

    def _prepare_sqlite(self, connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode")
        if cursor.fetchone()[0] != "wal":
            # Only then: the switch needs the database for itself.
            cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute(f"PRAGMA synchronous={'OFF' if self._volatile else 'FULL'}")
        cursor.close()

    def bound(self) -> Bound:
        """This loop's engine."""
        loop = asyncio.get_running_loop()
        bound = self._bound.get(loop)
        if bound is None:
            if self._given is None:
                engine = self._make()
            elif self.sqlite:
                engine = self._given
            else:
                engine = self._given.execution_options(isolation_level="READ COMMITTED")
            bound = self._bound[loop] = Bound(engine, asyncio.Lock())
        return bound

    async def dispose(self) -> None:
        """Close this loop's connections, unless the engine is the user's."""
        bound = self._bound.pop(asyncio.get_running_loop(), None)
        if bound is not None and self._given is None:
            await bound.engine.dispose()

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """A transaction: committed when the block ends, rolled back when it raises or is cancelled. ``LedgerUnavailable``."""
        with faults_named() as opening:
            async with self._writing() as connection:
                opening.done = True
                yield connection

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncConnection]:
        bound = self.bound()
        if not self.sqlite:
            async with bound.engine.begin() as connection:
                yield connection
            return
        try:
            # A bound, so that a write inside another write's block (which can never begin) ends in an error and not in silence.
            async with asyncio.timeout(BUSY_SECONDS):
                await bound.writing.acquire()
        except TimeoutError as error:
            raise InventoryError(f"SQLite: another write transaction has not ended for {BUSY_SECONDS:g} s") from error
        try:
            async with bound.engine.begin() as connection:
                await self._begin_immediate(connection)
                yield connection
        finally:
            bound.writing.release()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is rolled back. ``LedgerUnavailable``."""
        with faults_named() as opening:
            async with self.bound().engine.connect() as connection:
                opening.done = True
                await connection.begin()
                if self.sqlite and not await self._in_transaction(connection):
                    # The driver begins by itself only before a write; without this every statement would see another moment.
                    await connection.exec_driver_sql("BEGIN")
                yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that sees one moment, whatever it asks and however long, and is rolled back. ``LedgerUnavailable``."""
        with faults_named() as opening:
            async with self.bound().engine.connect() as connection:
                if not self.sqlite:
                    await connection.execution_options(isolation_level="REPEATABLE READ")
                opening.done = True
                await connection.begin()
                if self.sqlite and not await self._in_transaction(connection):
                    await connection.exec_driver_sql("BEGIN")
                yield connection

    async def _begin_immediate(self, connection: AsyncConnection) -> None:
        if await self._in_transaction(connection):
            # A hook of the user's engine has begun already, but nothing has happened in it yet.
            await connection.exec_driver_sql("ROLLBACK")
        await connection.exec_driver_sql("BEGIN IMMEDIATE")

    async def _in_transaction(self, connection: AsyncConnection) -> bool:
        raw = await connection.get_raw_connection()
        driver = raw.driver_connection
        assert driver is not None
        return bool(driver.in_transaction)
