"""Epochs: raising one, and reading a partition under its lock to fill Redis anew.

A partition has one row per epoch. The newest is ``rebuilding`` or ``open``; older ones are ``draining`` (their last entries may
still be applied) and ``closed`` once a rebuild has begun to read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, insert, literal, or_, select, tuple_, update

from inventory_sdk.ledger import rows
from inventory_sdk.ledger.decide import APPLIED, HELD, Hold
from inventory_sdk.ledger.protocol import Balance, EpochClosed, OperationRow, PartitionRow, ReservationRow
from inventory_sdk.ledger.repartition import current, remembered
from inventory_sdk.ledger.store import ARRIVING, CLOSED, DATABASE, DRAINING, LEDGER, OPEN, PENDING, REBUILDING, REDIS, Store
from inventory_sdk.model import Kind, key_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


KIND: Final = rows.OPERATION_COLUMNS.index("kind")
MOST_ALIKE: Final = 4096
"""Entries that may have the same time, epoch and sequence: one per partition."""
FORGOTTEN: Final = 16
"""Epochs that a ledger which went back takes up again, the newest of them: a backup is not older than that many recoveries."""


async def newest(connection: AsyncConnection, store: Store, partition: int, lock: bool = False) -> PartitionRow | None:
    """The newest epoch's row."""
    table = store.tables.partition
    query = (
        select(table.c.partition, table.c.epoch, table.c.state, table.c.applied)
        .where(table.c.partition == partition, table.c.epoch > 0)
        .order_by(table.c.epoch.desc())
        .limit(1)
    )
    row = (await connection.execute(query.with_for_update() if lock else query)).first()
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


async def raise_epoch(
    connection: AsyncConnection, store: Store, partition: int, above: int, unless_open: bool = False
) -> PartitionRow | None:
    """See ``Ledger.raise_epoch``; the caller commits. ``above`` may be ahead of the ledger (one that was restored from a backup):
    the new epoch is ``above + 1`` in any case."""
    table = store.tables.partition
    zero = {"partition": partition, "epoch": 0, "state": LEDGER, "applied": 0}
    await store.insert_if_absent(connection, table, zero)
    # Whoever holds this row decides on epochs; the others see the result.
    await connection.execute(select(table.c.applied).where(table.c.partition == partition, table.c.epoch == 0).with_for_update())
    # Locked: a rebuild of it is waited for, and what it left is what counts.
    current = await newest(connection, store, partition, lock=True)
    if current is not None:
        if current.epoch > above or (unless_open and current.state == OPEN):
            return None
        # One that was never opened has accepted nothing.
        ended = CLOSED if current.state == REBUILDING else DRAINING
        await connection.execute(update(table).where(table.c.partition == partition, table.c.epoch == current.epoch).values(state=ended))
        # Epochs that Redis has used and a restored ledger has forgotten: what the journal keeps of them is still to be applied.
        for forgotten in range(max(current.epoch, above - FORGOTTEN) + 1, above + 1):
            await connection.execute(insert(table).values(partition=partition, epoch=forgotten, state=DRAINING, applied=0))
    await connection.execute(insert(table).values(partition=partition, epoch=above + 1, state=REBUILDING, applied=0))
    return PartitionRow(partition, above + 1, REBUILDING, 0)


HUNG_MS: Final = 60_000
"""A rebuilder that says nothing to PostgreSQL for so long has hung (a chunk for Redis takes milliseconds)."""


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
        if self._store.dialect == "postgresql":
            # Who takes over waits for this lock: a rebuilder that hangs must not keep it.
            limit = func.set_config("idle_in_transaction_session_timeout", str(HUNG_MS), True)
            await self._connection.execute(select(limit))
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
            page = query if after is None else query.where(key > tuple_(*bound(after, table.c.merchant, table.c.sku)))
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

    async def extend(self, milliseconds: int) -> None:
        """Give every running hold this much more time, for good: the next recovery begins from it."""
        table = self._store.tables.reservation
        running = [table.c.partition == self._partition, table.c.state == HELD, table.c.expires_at > 0, table.c.pinned.is_(False)]
        await self._connection.execute(update(table).where(*running).values(expires_at=table.c.expires_at + milliseconds))

    async def results(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        """Applied operations with a claim, and tombstones, newest first. What SQL-first operations remember is their process' clock."""
        before: tuple[int, int, int] | None = None
        while True:
            found, before = await results_page(self._connection, self._store, self._partition, since_ms, before, size)
            for at in range(0, len(found), size):
                yield found[at : at + size]
            if before is None:
                return

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


async def results_page(
    connection: AsyncConnection, store: Store, partition: int, since_ms: int, before: tuple[int, int, int] | None, size: int
) -> tuple[list[OperationRow], tuple[int, int, int] | None]:
    """Applied operations with a claim, and tombstones, newest first, of the entries before (at_ms, epoch, seq): of as many entries
    as have ``size`` operations, at least one. And where the next page begins, None at the end."""
    entry, operation = store.tables.entry, store.tables.operation
    order = (entry.c.at_ms, entry.c.epoch, entry.c.seq)
    moved = await current(connection, store)
    epoch = moved.epoch if moved is not None else 0
    # What was done under another layout is remembered where it is at home now.
    mine = or_(entry.c.partition == partition, entry.c.epoch <= epoch) if epoch else entry.c.partition == partition
    query = select(*order, entry.c.operations, entry.c.partition).where(mine, entry.c.at_ms >= since_ms)
    if before is not None:
        # The time once more by itself: that is what the index can begin from.
        query = query.where(entry.c.at_ms <= before[0], tuple_(*order) < tuple_(*bound(before, *order)))
    limit = size + (MOST_ALIKE if epoch else 0)
    entries = [tuple(row) for row in await connection.execute(query.order_by(*(column.desc() for column in order)).limit(limit))]
    chosen: list[tuple[int, ...]] = []
    carried = 0
    for row in entries:
        carried += row[3]
        if chosen and carried > size and row[:3] != chosen[-1][:3]:
            break
        chosen.append(row)
    if len(chosen) == limit and chosen[0][:3] != chosen[-1][:3]:
        # Entries of several partitions may have the same time and number: these come together, on the next page.
        chosen = [row for row in chosen if row[:3] != chosen[-1][:3]]
    keys = {(row[4], row[1], row[2]) for row in chosen}
    columns = (*rows.OPERATION_COLUMNS, "claim")
    read = await store.bulk.select(connection, operation, columns, ("partition", "epoch", "seq"), keys)
    found = [rows.operation_row(row) for row in read if row[-1] is not None or row[KIND] == Kind.TOMBSTONE.value]
    found = [row for row in found if row.status == APPLIED]
    found.sort(key=lambda row: (row.at_ms, row.position, row.index), reverse=True)
    if moved is not None and epoch:
        here = [row if row.position.epoch > epoch else remembered(row, partition, moved) for row in found]
        found = [row for row in here if row is not None]
    ended = len(entries) < limit and len(chosen) == len(entries)
    return found, None if ended or not chosen else (chosen[-1][0], chosen[-1][1], chosen[-1][2])


def bound(values: Sequence[Any], *columns: Any) -> list[Any]:
    """Parameters with the columns' types, so that keys are sent as the database stores them."""
    return [literal(value, column.type) for value, column in zip(values, columns, strict=True)]
