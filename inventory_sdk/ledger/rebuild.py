"""Epochs: raising one, and reading a partition under its lock to fill Redis anew.

A partition has one row per epoch. The newest is ``rebuilding`` or ``open``; older ones are ``draining`` (their last entries may
still be applied) and ``closed`` once a rebuild has begun to read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, insert, literal, select, tuple_, update

from inventory_sdk.ledger import rows
from inventory_sdk.ledger.decide import APPLIED, HELD, Hold
from inventory_sdk.ledger.protocol import Balance, EpochClosed, OperationRow, PartitionRow, ReservationRow
from inventory_sdk.ledger.store import ARRIVING, CLOSED, DATABASE, DRAINING, LEDGER, OPEN, PENDING, REBUILDING, REDIS, Store
from inventory_sdk.model import key_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


async def newest(connection: AsyncConnection, store: Store, partition: int) -> PartitionRow | None:
    """The newest epoch's row."""
    table = store.tables.partition
    query = (
        select(table.c.partition, table.c.epoch, table.c.state, table.c.applied)
        .where(table.c.partition == partition, table.c.epoch > 0)
        .order_by(table.c.epoch.desc())
        .limit(1)
    )
    row = (await connection.execute(query)).first()
    return None if row is None else PartitionRow(*row)


async def living(connection: AsyncConnection, store: Store, partition: int) -> list[PartitionRow]:
    """See ``Ledger.epochs``."""
    table = store.tables.partition
    query = (
        select(table.c.partition, table.c.epoch, table.c.state, table.c.applied)
        .where(table.c.partition == partition, table.c.epoch > 0, table.c.state != CLOSED)
        .order_by(table.c.epoch)
    )
    return [PartitionRow(*row) for row in await connection.execute(query)]


async def take_stale(connection: AsyncConnection, store: Store, partition: int, before_ms: int, limit: int) -> list[ReservationRow]:
    """See ``Ledger.take_stale``; the caller commits."""
    epochs, table = store.tables.partition, store.tables.reservation
    # ``apply`` updates reservations in an order of its own: behind the same lock there is no deadlock.
    rows_of = select(epochs.c.epoch).where(epochs.c.partition == partition).order_by(epochs.c.epoch)
    await connection.execute(rows_of.with_for_update())
    query = (
        select(table.c.key)
        .where(table.c.partition == partition, table.c.state == HELD)
        .where(table.c.reported.is_(False), table.c.opened_ms < before_ms)
        .order_by(table.c.opened_ms, table.c.key)
        .limit(limit)
    )
    keys = list((await connection.execute(query)).scalars())
    await store.bulk.update(connection, table, ("key",), ("reported",), [(key, True) for key in keys])
    found = await rows.holds(connection, store, keys)
    return [rows.reservation_row(found[key]) for key in keys]


async def raise_epoch(connection: AsyncConnection, store: Store, partition: int, above: int) -> PartitionRow | None:
    """See ``Ledger.raise_epoch``; the caller commits. ``above`` may be ahead of the ledger (one that was restored from a backup):
    the new epoch is ``above + 1`` in any case."""
    table = store.tables.partition
    zero = {"partition": partition, "epoch": 0, "state": LEDGER, "applied": 0}
    await store.insert_if_absent(connection, table, zero)
    # Whoever holds this row decides on epochs; the others see the result.
    await connection.execute(select(table.c.applied).where(table.c.partition == partition, table.c.epoch == 0).with_for_update())
    current = await newest(connection, store, partition)
    if current is not None:
        if current.epoch > above:
            return None
        await connection.execute(update(table).where(table.c.partition == partition, table.c.epoch == current.epoch).values(state=DRAINING))
    await connection.execute(insert(table).values(partition=partition, epoch=above + 1, state=REBUILDING, applied=0))
    return PartitionRow(partition, above + 1, REBUILDING, 0)


class Reading:
    """One partition as it stands, while its lock is held."""

    def __init__(self, connection: AsyncConnection, store: Store, partition: int, epoch: int) -> None:
        self._connection = connection
        self._store = store
        self._partition = partition
        self._epoch = epoch
        self.opened = False

    async def lock(self) -> None:
        """Take the epoch, close the older ones; ``EpochClosed`` when it is not the one that is being rebuilt."""
        tables = self._store.tables
        table = tables.partition
        query = select(table.c.state).where(table.c.partition == self._partition, table.c.epoch == self._epoch).with_for_update()
        state = (await self._connection.execute(query)).scalar()
        if state != REBUILDING:
            raise EpochClosed(f"partition {self._partition}: epoch {self._epoch} is {state or 'unknown'}, not rebuilding")
        older = [table.c.partition == self._partition, table.c.epoch > 0, table.c.epoch < self._epoch]
        await self._connection.execute(update(table).where(*older).values(state=CLOSED))
        # Redis is filled from rows that include these.
        for pending in (tables.credit, tables.void):
            theirs = [pending.c.partition == self._partition, pending.c.epoch < self._epoch, pending.c.state == PENDING]
            await self._connection.execute(update(pending).where(*theirs).values(state=CLOSED))
        # What was on its way to Redis arrives with this: balances, holds and results.
        stock = tables.stock
        await self._connection.execute(
            update(stock).where(stock.c.partition == self._partition, stock.c.admission == ARRIVING).values(admission=REDIS)
        )

    async def balances(self, size: int) -> AsyncIterator[Sequence[Balance]]:
        """Every stock row of the partition that Redis sells."""
        table = self._store.tables.stock
        key = tuple_(table.c.merchant, table.c.sku)
        columns = (table.c.merchant, table.c.sku, table.c.available, table.c.reserved)
        query = select(*columns).where(table.c.partition == self._partition, table.c.admission == REDIS)
        query = query.order_by(table.c.merchant, table.c.sku).limit(size)
        after: tuple[str, str] | None = None
        while True:
            # From key to key, not with a cursor: a rebuild may stop between chunks and leaves nothing open.
            page = query if after is None else query.where(key > tuple_(*_bound(after, table.c.merchant, table.c.sku)))
            found = [tuple(row) for row in await self._connection.execute(page)]
            if found:
                yield [Balance(key_of(row[0], row[1]), row[2], row[3]) for row in found]
            if len(found) < size:
                return
            after = (found[-1][0], found[-1][1])

    async def reservations(self, size: int) -> AsyncIterator[Sequence[ReservationRow]]:
        """Reservations with an open line, but for those that the ledger runs."""
        table = self._store.tables.reservation
        held = [table.c.partition == self._partition, table.c.state == HELD]
        query = select(table.c.key).where(*held).order_by(table.c.key).limit(size)
        after: str | None = None
        while True:
            page = query if after is None else query.where(table.c.key > after)
            keys = list((await self._connection.execute(page)).scalars())
            if keys:
                found = await rows.holds(self._connection, self._store, keys)
                places = await rows.admissions(self._connection, self._store, {name for hold in found.values() for name in hold.lines})
                yield [rows.reservation_row(found[key]) for key in keys if not _ledgers(found[key], places)]
            if len(keys) < size:
                return
            after = keys[-1]

    async def results(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        """Applied operations with a claim, newest first. What SQL-first operations remember is their process' clock."""
        entry, operation = self._store.tables.entry, self._store.tables.operation
        order = (entry.c.at_ms, entry.c.epoch, entry.c.seq, operation.c.index)
        query = (
            select(*rows.operation_columns(self._store))
            .join(entry, and_(*(entry.c[name] == operation.c[name] for name in ("partition", "epoch", "seq"))))
            .where(entry.c.partition == self._partition, entry.c.at_ms >= since_ms)
            .where(operation.c.claim.is_not(None), operation.c.status == APPLIED)
            .order_by(*(column.desc() for column in order))
            .limit(size)
        )
        after: tuple[int, int, int, int] | None = None
        while True:
            page = query if after is None else query.where(tuple_(*order) < tuple_(*_bound(after, *order)))
            found = [rows.operation_row(row) for row in await self._connection.execute(page)]
            if found:
                yield found
            if len(found) < size:
                return
            last = found[-1]
            after = (last.at_ms, last.position.epoch, last.position.sequence, last.index)

    async def open(self) -> None:
        """Set the epoch's state to open and commit."""
        table = self._store.tables.partition
        done = await self._connection.execute(
            update(table)
            .where(table.c.partition == self._partition, table.c.epoch == self._epoch, table.c.state == REBUILDING)
            .values(state=OPEN)
        )
        if done.rowcount != 1:
            raise EpochClosed(f"partition {self._partition}: epoch {self._epoch} is not rebuilding")
        await self._connection.commit()
        self.opened = True


def _ledgers(hold: Hold, places: dict[str, str]) -> bool:
    """Whether the ledger runs this hold: it has any open line of stock that the ledger sells."""
    return any(counts[1] and places.get(name) == DATABASE for name, counts in hold.lines.items())


def _bound(values: Sequence[Any], *columns: Any) -> list[Any]:
    """Parameters with the columns' types, so that keys are sent as the database stores them."""
    return [literal(value, column.type) for value, column in zip(values, columns, strict=True)]
