"""``SqlLedger``: the ledger on SQLAlchemy Core, for PostgreSQL, MariaDB/MySQL and SQLite.

Each method is one transaction; what happens in it lives in the neighbours (``apply``, ``enter``, ``rebuild``, ``tasks``, …).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal

try:
    from sqlalchemy import func, select
    from sqlalchemy.exc import IntegrityError
except ImportError as error:
    raise ImportError("the SQL ledger needs SQLAlchemy: pip install 'inventory_sdk[postgresql]' (or [mysql], [sqlite])") from error

from inventory_sdk.errors import OutcomeUnknown
from inventory_sdk.ledger import admission, ddl, direct, late, rebuild, repartition, rows, task_runs
from inventory_sdk.ledger import tasks as later
from inventory_sdk.ledger import verify as checks
from inventory_sdk.ledger.apply import apply
from inventory_sdk.ledger.arriving import FieldReading
from inventory_sdk.ledger.browse import SqlPages
from inventory_sdk.ledger.comparing import Comparing
from inventory_sdk.ledger.engines import Engines
from inventory_sdk.ledger.enter import enter
from inventory_sdk.ledger.protocol import (
    AdmissionRow,
    Applied,
    Arrivals,
    Arriving,
    Balance,
    Credit,
    DirectAct,
    DirectAnswer,
    Entered,
    Entering,
    EpochClosed,
    Leaving,
    LedgerUnavailable,
    OperationRow,
    PartitionRow,
    Rebuilding,
    ReservationRow,
    StockRow,
    Task,
    TaskFilter,
    TaskRun,
    Void,
    WritesStock,
)
from inventory_sdk.ledger.register import Register
from inventory_sdk.ledger.schema import own_tables
from inventory_sdk.ledger.store import OPEN, PENDING, REDIS, Store
from inventory_sdk.model import JournalEntry, Layout, Position, key_of, split_key

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession


DEADLOCKS: Final = 5
"""Tries of a direct act that the database rolled back."""
ROLLED_BACK: Final = frozenset({"deadlock", "serialization", "lock_timeout", "locked"})


class SqlLedger:
    """The ledger in a SQL database. Implements ``protocol.Ledger``, which documents the methods.

    ``database`` is a URL (``postgresql+asyncpg://``, ``mysql+asyncmy://``, ``sqlite+aiosqlite:///``) or an ``AsyncEngine``, which
    stays the caller's to dispose. One object serves several event loops, one after another or at once: each gets its own engine.
    ``admission``: who sells the stock of merchants that the ledger sees for the first time, ``redis`` or ``database``.
    A driver that is not installed is an ``ImportError`` that names the extra; a database that isn't known, an ``InventoryError``.
    """

    def __init__(self, database: str | AsyncEngine, prefix: str = "inventory_", admission: str = REDIS) -> None:
        self._engines = Engines(database)
        self.tables = own_tables(prefix)
        self._store = Store(self.tables, self._engines.bulk, self._engines.dialect.name, admission)
        self.pages = SqlPages(self._engines, self._store)
        """What the management pages read."""
        self.comparing = Comparing(self._engines, self._store)
        """What a comparison reads."""
        self.register = Register(self._engines, self._store)
        """Discrepancies, their corrections, and who made them."""

    @property
    def engine(self) -> AsyncEngine:
        """This event loop's engine: for ``session=`` checks, ``reads_stock`` sessions and tools."""
        return self._engines.bound().engine

    async def start(self) -> None:
        """Connect once, so that a wrong URL shows here."""
        async with self._engines.read() as connection:
            await connection.execute(select(1))

    async def close(self) -> None:
        """Close this event loop's connections; a given ``AsyncEngine`` stays open."""
        await self._engines.dispose()

    async def create_schema(self) -> None:
        """Create the tables that are not there."""
        async with self._engines.write() as connection:
            await ddl.create(connection, self._store)

    async def check_schema(self) -> list[str]:
        """What is missing or wrong, in words; empty when all is well."""
        async with self._engines.read() as connection:
            return await ddl.check(connection, self._store)

    async def settle_setting(self, name: str, value: str) -> str:
        """The stored value; stores ``value`` if there was none."""
        table = self.tables.setting
        async with self._engines.write() as connection:
            await self._store.insert_if_absent(connection, table, {"name": name, "value": value})
            stored = await connection.execute(select(table.c.value).where(table.c.name == name))
            return str(stored.scalar_one())

    async def layout(self) -> repartition.Moved | None:
        """How stock is told apart, and since when; None before the first start."""
        async with self._engines.read() as connection:
            return await repartition.current(connection, self._store)

    async def unready(self) -> list[str]:
        """Why the layout can't be changed now, in words that say what to do."""
        async with self._engines.read() as connection:
            return await repartition.unready(connection, self._store)

    async def settle(self, values: Mapping[str, str]) -> None:
        """Write settings, whatever they were."""
        async with self._engines.write() as connection:
            await repartition.settle(connection, self._store, dict(values))

    async def repartition(self, old: repartition.Moved, new: Layout, epoch: int) -> repartition.Counts:
        """Stock rows and live reservations to the partitions of the new layout, and its settings, in one transaction. ``epoch``: the
        last one of the old layout. ``NotReady``."""
        async with self._engines.write() as connection:
            return await repartition.move(connection, self._store, old, new, epoch)

    async def partition(self, partition: int) -> PartitionRow | None:
        """The newest epoch's row, None before the first start."""
        async with self._engines.read() as connection:
            return await rebuild.newest(connection, self._store, partition)

    async def raise_epoch(self, partition: int, above: int, unless_open: bool = False) -> PartitionRow | None:
        """Open epoch ``above + 1`` in state ``rebuilding``; None when another process won."""
        async with self._engines.write() as connection:
            return await rebuild.raise_epoch(connection, self._store, partition, above, unless_open)

    @asynccontextmanager
    async def rebuilding(self, partition: int, epoch: int) -> AsyncIterator[Rebuilding]:
        """A reading of the partition under its lock; rolled back unless opened. ``EpochClosed`` if it is not being rebuilt."""
        async with self._engines.write() as connection:
            reading = rebuild.Reading(connection, self._store, partition, epoch)
            await reading.lock()
            yield reading
            if not reading.opened:
                await connection.rollback()

    async def epochs(self, partition: int) -> list[PartitionRow]:
        """The newest epoch and the older ones that still accept ``apply``, oldest first."""
        async with self._engines.read() as connection:
            return await rebuild.living(connection, self._store, partition)

    async def apply(
        self,
        partition: int,
        epoch: int,
        entries: Sequence[JournalEntry],
        writes: Sequence[WritesStock] = (),
        lost: Sequence[int] = (),
    ) -> Applied:
        """Entries right behind the watermark, in one transaction. ``EpochClosed``, ``WatermarkMoved``, ``ForkFound``,
        ``WritesStockFailed``, ``QuantityMismatch``; after an error nothing is applied."""
        try:
            async with self._engines.write() as connection:
                return await apply(connection, self._store, partition, epoch, entries, writes, lost)
        except IntegrityError:
            # An id, or a reservation's name, is known already. Anything else that a constraint refuses is refused again.
            async with self._engines.write() as connection:
                return await apply(connection, self._store, partition, epoch, entries, writes, lost, careful=True)

    async def enter(self, partition: int, epoch: int, operations: Sequence[Entering], writes: Sequence[WritesStock] = ()) -> list[Entered]:
        """SQL-first operations, all or none. ``EpochClosed``, ``OperationConflict``, ``InvalidOperation``."""
        async with self._engines.write() as connection:
            return await enter(connection, self._store, partition, epoch, operations, writes)

    async def enter_parts(
        self, parts: Sequence[tuple[int, int, Sequence[Entering]]], writes: Sequence[WritesStock] = ()
    ) -> list[list[Entered]]:
        """SQL-first operations of several partitions, all or none; locked in ascending order. Raises as ``enter`` does."""
        done: dict[int, list[Entered]] = {}
        async with self._engines.write() as connection:
            for partition, epoch, operations in sorted(parts, key=lambda part: part[0]):
                done[partition] = await enter(connection, self._store, partition, epoch, operations, writes)
        return [done[part[0]] for part in parts]

    @asynccontextmanager
    async def balances(self, partition: int, epoch: int, fields: Sequence[str]) -> AsyncIterator[Mapping[str, Balance]]:
        """The rows that exist, held until the block ends; ``EpochClosed`` unless the epoch is open."""
        table, credit = self.tables.partition, self.tables.credit
        async with self._engines.write() as connection:
            share = select(table.c.state).where(table.c.partition == partition, table.c.epoch == epoch).with_for_update(read=True)
            state = (await connection.execute(share)).scalar()
            if state != OPEN:
                raise EpochClosed(f"partition {partition}: epoch {epoch} is {state or 'unknown'}, nothing is loaded in it")
            stock = await rows.stock(connection, self._store, set(fields), "share")
            here = await rows.partitions(connection, self._store, list(stock))
            # Elsewhere another partition sells it: here it is unknown, whoever asks (a process, or an entry, of another layout).
            stock = {field: row for field, row in stock.items() if here[field] == partition}
            places = await admission.places(connection, self._store, list(stock), None)
            # After the lock: a credit's operation holds its stock rows, so what is pending for these can't change any more.
            pending = (
                select(credit.c.merchant, credit.c.sku, func.sum(credit.c.quantity))
                .where(credit.c.partition == partition, credit.c.epoch == epoch, credit.c.state == PENDING)
                .group_by(credit.c.merchant, credit.c.sku)
            )
            coming = {key_of(merchant, sku): int(units) for merchant, sku, units in await connection.execute(pending)}
            yield {field: Balance(field, row.available - coming.get(field, 0), row.reserved, places[field]) for field, row in stock.items()}

    async def live_holds(self, partition: int, fields: Sequence[str]) -> list[ReservationRow]:
        """Live reservations that have any of these fields open, sorted."""
        async with self._engines.read() as connection:
            keys = await admission.holds_of(connection, self._store, partition, list(fields))
            found = await rows.holds(connection, self._store, keys)
            return [rows.reservation_row(found[key]) for key in sorted(found)]

    async def act(self, partition: int, act: DirectAct, writes: Sequence[WritesStock] = ()) -> DirectAnswer:
        """One act on stock that the ledger sells. ``EpochClosed`` before the partition's first opening, ``WritesStockFailed``,
        ``OutcomeUnknown`` when the connection was lost."""
        for attempt in range(1, DEADLOCKS + 1):
            try:
                async with self._engines.write() as connection:
                    return await direct.act(connection, self._store, partition, act, writes)
            except direct.NotOurs as moved:
                return moved.answer
            except LedgerUnavailable as error:
                # Rolled back by the database, whole: two transactions stood in each other's way.
                if attempt == DEADLOCKS or error.reason not in ROLLED_BACK:
                    raise OutcomeUnknown(split_key(act.key)[1], str(error)) from error
        raise AssertionError("unreachable")

    async def due_holds(self, partition: int, limit: int, pinned_before_ms: int) -> list[ReservationRow]:
        """Holds that the ledger runs and whose time has come."""
        async with self._engines.read() as connection:
            return await admission.due_holds(connection, self._store, partition, limit, pinned_before_ms)

    async def places(self, fields: Sequence[str], merchant: str | None = None) -> dict[str, str]:
        """Who sells these fields, and under ``""`` what is new at ``merchant``."""
        async with self._engines.read() as connection:
            return await admission.places(connection, self._store, fields, merchant)

    async def admission(self, merchant: str, fields: Sequence[str] | None = None) -> list[AdmissionRow]:
        """Every SKU of a merchant, sorted; only these where ``fields`` are given."""
        async with self._engines.read() as connection:
            if fields is not None:
                return await admission.of_fields(connection, self._store, fields)
            return await admission.of_merchant(connection, self._store, merchant)

    async def joined(self, partition: int, fields: Sequence[str]) -> list[str]:
        """What can only change hands together."""
        async with self._engines.read() as connection:
            return await admission.joined(connection, self._store, partition, fields)

    async def arrive(self, partition: int, epoch: int, fields: Sequence[str] | None, merchant: str) -> Arriving:
        """Take stock from the direct sellers. ``EpochClosed``; ``InvalidOperation``."""
        async with self._engines.write() as connection:
            return await admission.arrive(connection, self._store, partition, epoch, fields, merchant)

    @asynccontextmanager
    async def arriving(self, partition: int, epoch: int, fields: Sequence[str], whole: bool = True) -> AsyncIterator[Arrivals]:
        """A reading of arriving rows, held until the block ends. ``EpochClosed``."""
        async with self._engines.write() as connection:
            kind = admission.Reading if whole else FieldReading
            reading = kind(connection, self._store, partition, fields)
            await reading.lock(epoch)
            yield reading

    async def arrived(self, partition: int, fences: Mapping[str, int]) -> int:
        """Redis sells these; how many rows were changed."""
        async with self._engines.write() as connection:
            return await admission.arrived(connection, self._store, partition, fences)

    async def leave(
        self, partition: int, epoch: int, marked: Mapping[str, int], applied: int, merchant: str, whole: bool = True
    ) -> Leaving:
        """Give stock to the direct sellers, as far as that may be now. ``EpochClosed``."""
        async with self._engines.write() as connection:
            return await admission.leave(connection, self._store, partition, epoch, marked, applied, merchant, whole)

    async def stock(self, fields: Sequence[str]) -> list[StockRow]:
        """The rows of these fields that exist, sorted."""
        async with self._engines.read() as connection:
            return await rows.stock_rows(connection, self._store, fields)

    async def all_stock(self, merchant: str | None = None) -> list[StockRow]:
        """Every stock row, sorted."""
        async with self._engines.read() as connection:
            return await rows.all_stock(connection, self._store, merchant)

    async def operation(self, key: str) -> OperationRow | None:
        """The operation that holds this claim."""
        async with self._engines.read() as connection:
            return await rows.operation(connection, self._store, key)

    async def operations_at(self, positions: Sequence[Position]) -> list[OperationRow]:
        """All operations of these entries, in journal order."""
        async with self._engines.read() as connection:
            return await rows.operations_at(connection, self._store, positions)

    async def nonces(self, positions: Sequence[Position]) -> dict[Position, str]:
        """Nonces of the entries that are here; empty for a lost one."""
        async with self._engines.read() as connection:
            return await late.nonces(connection, self._store, positions)

    async def results(
        self, partition: int, since_ms: int, before: tuple[int, int, int] | None, size: int
    ) -> tuple[list[OperationRow], tuple[int, int, int] | None]:
        """A page of applied operations with a claim, newest first, and where the next one begins."""
        async with self._engines.read() as connection:
            return await rebuild.results_page(connection, self._store, partition, since_ms, before, size)

    async def reject(self, entry: JournalEntry, refused: Sequence[tuple[int, str]]) -> None:
        """Rows for operations of a late entry that the current epoch refused."""
        async with self._engines.write() as connection:
            await late.reject(connection, self._store, entry, refused)

    async def reservation(self, key: str) -> ReservationRow | None:
        """The reservation, whatever its state."""
        async with self._engines.read() as connection:
            hold = (await rows.holds(connection, self._store, [key])).get(key)
            return None if hold is None else rows.reservation_row(hold)

    async def take_stale(self, partition: int, before_ms: int, limit: int) -> list[ReservationRow]:
        """Live reservations opened before ``before_ms`` that were not reported yet, oldest first; marks them as reported."""
        async with self._engines.write() as connection:
            return await rebuild.take_stale(connection, self._store, partition, before_ms, limit)

    async def pending_credits(self, partition: int, epoch: int) -> list[Credit]:
        """Credits of this epoch that were not made yet, in order."""
        async with self._engines.read() as connection:
            return await rows.pending_credits(connection, self._store, partition, epoch)

    async def pending_voids(self, partition: int, epoch: int) -> list[Void]:
        """Voids of this epoch that were not made yet, in order."""
        async with self._engines.read() as connection:
            return await rows.pending_voids(connection, self._store, partition, epoch)

    async def decide(self, key: str, verdict: Literal["committed", "aborted"], connection: AsyncConnection | None = None) -> str:
        """The verdict that stands, this one if none did. With ``connection`` (a session's) it is part of that transaction."""
        if connection is not None:
            return await self._decide(connection, key, verdict)
        async with self._engines.write() as own:
            return await self._decide(own, key, verdict)

    async def _decide(self, connection: AsyncConnection, key: str, verdict: str) -> str:
        table = self.tables.decision
        values = {"key": key, "verdict": verdict, "at_ms": time.time_ns() // 1_000_000}
        await self._store.insert_if_absent(connection, table, values)
        # A locking read: the session's snapshot may be older than a verdict that another transaction has committed.
        query = select(table.c.verdict).where(table.c.key == key).with_for_update(read=True)
        return str((await connection.execute(query)).scalar_one())

    async def due_tasks(self, limit: int, serves: TaskFilter | None = None) -> list[Task]:
        """Pending tasks whose time has come, the oldest of each group. A task that waits for its next try blocks its group;
        a dead letter does not. ``serves``: those that this worker may run."""
        async with self._engines.read() as connection:
            return await later.due(connection, self._store, limit, serves)

    async def run_tasks(
        self,
        tasks: Sequence[Task],
        call: Callable[[Task, AsyncSession], Awaitable[None]],
        more: Callable[[], bool] = task_runs.always,
        most: int = 1000,
    ) -> list[TaskRun]:
        """Mark and ``call`` them in one transaction, each in a savepoint; at most ``most``; those that are no longer pending, or that
        another worker has, are passed over. See ``Ledger.run_tasks``."""
        async with self._engines.write() as connection:
            return await task_runs.run(connection, self._store, tasks, call, more, most)

    async def fail_task(self, task: Task, error: str, retry_in: float | None) -> None:
        """Note the failure and try again in ``retry_in`` seconds; None: dead letter."""
        async with self._engines.write() as connection:
            await later.fail(connection, self._store, task, error, retry_in)

    async def dead_tasks(self, limit: int = 100) -> list[tuple[Task, str]]:
        """Dead letters with their last error, oldest first."""
        async with self._engines.read() as connection:
            return await later.dead(connection, self._store, limit)

    async def verify(self) -> list[str]:
        """Promise 6 over all rows, and the watermarks; what is broken, in words."""
        async with self._engines.read() as connection:
            return await checks.verify(connection, self._store)
