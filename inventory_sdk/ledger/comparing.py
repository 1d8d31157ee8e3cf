"""The ledger's side of a comparison: pages of SKUs, and one consistent reading of rows, watermark and what is still on its way."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk.ledger import rebuild, rows
from inventory_sdk.ledger.accounts import Account, Moved, Past, Place, Refused
from inventory_sdk.ledger.decide import APPLIED, HELD
from inventory_sdk.ledger.engines import Engines
from inventory_sdk.ledger.protocol import PartitionRow, ReservationRow
from inventory_sdk.ledger.schema import COUNTERS
from inventory_sdk.ledger.store import PENDING, Store
from inventory_sdk.model import Kind, OpeningBalance, key_of, split_key

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

ReadsStock = Callable[[str, Sequence[str], AsyncSession], Awaitable[Iterable[OpeningBalance]]]

BESIDE: Final = (Kind.CREDIT.value, Kind.VOID.value, Kind.CORRECT.value)
"""Kinds that move Redis and not the ledger."""


class Comparing:
    """Questions of the reconciler; all but ``snapshot`` are one short transaction each."""

    def __init__(self, engines: Engines, store: Store) -> None:
        self._engines = engines
        self._store = store

    async def page(self, partition: int, after: str | None, size: int, merchant: str | None = None) -> list[Place]:
        """The next SKUs of a partition, in order of their fields."""
        table = self._store.tables.stock
        query = select(table.c.merchant, table.c.sku, table.c.admission, table.c.fence).where(table.c.partition == partition)
        if merchant is not None:
            query = query.where(table.c.merchant == merchant)
        if after is not None:
            query = query.where(
                tuple_(table.c.merchant, table.c.sku) > tuple_(*rebuild.bound(split_key(after), table.c.merchant, table.c.sku))
            )
        async with self._engines.read() as connection:
            found = await connection.execute(query.order_by(table.c.merchant, table.c.sku).limit(size))
            return [Place(key_of(shop, sku), place, fence) for shop, sku, place, fence in found]

    async def places(self, fields: Sequence[str]) -> list[Place]:
        """Those of these SKUs that have a row."""
        async with self._engines.read() as connection:
            columns = ("merchant", "sku", "admission", "fence")
            found = await self._store.bulk.select(
                connection, self._store.tables.stock, columns, ("merchant", "sku"), set(rows.pairs(fields))
            )
            return sorted((Place(key_of(shop, sku), place, fence) for shop, sku, place, fence in found), key=lambda each: each.field)

    async def count(self, merchant: str | None = None) -> int:
        """SKUs, of one merchant if given."""
        table = self._store.tables.stock
        query = select(func.count()).select_from(table)
        async with self._engines.read() as connection:
            return int((await connection.execute(query if merchant is None else query.where(table.c.merchant == merchant))).scalar_one())

    async def held(self, partition: int, after: str | None, size: int, merchant: str | None = None) -> list[ReservationRow]:
        """The next live reservations of a partition, in order of their keys; of calls of one merchant if given."""
        table = self._store.tables.reservation
        query = select(table.c.key).where(table.c.partition == partition, table.c.state == HELD)
        if after is not None:
            query = query.where(table.c.key > after)
        if merchant is not None:
            query = query.where(table.c.key > key_of(merchant, ""), table.c.key < f"{merchant}\x20")
        async with self._engines.read() as connection:
            keys = list((await connection.execute(query.order_by(table.c.key).limit(size))).scalars())
            return await self._holds(connection, keys)

    async def holds(self, keys: Sequence[str]) -> list[ReservationRow]:
        """These reservations as they are now."""
        async with self._engines.read() as connection:
            return await self._holds(connection, keys)

    async def _holds(self, connection: AsyncConnection, keys: Sequence[str]) -> list[ReservationRow]:
        found = await rows.holds(connection, self._store, keys)
        return [rows.reservation_row(found[key]) for key in keys if key in found]

    async def fields_of(self, merchant: str, order: str) -> tuple[list[str], list[str]]:
        """SKUs and reservations that an order's operations have touched."""
        operation, change = self._store.tables.operation, self._store.tables.change
        same = and_(*(operation.c[name] == change.c[name] for name in ("partition", "epoch", "seq", "index")))
        whose = (operation.c.merchant == merchant, operation.c.order_id == order)
        touched = select(change.c.merchant, change.c.sku).select_from(operation.join(change, same)).where(*whose).distinct()
        names = select(operation.c.operation_id).where(*whose, operation.c.kind == Kind.RESERVE.value)
        async with self._engines.read() as connection:
            fields = sorted(key_of(shop, sku) for shop, sku in await connection.execute(touched))
            return fields, sorted(key_of(merchant, name) for name in (await connection.execute(names)).scalars())

    async def marks(self, partition: int) -> dict[int, int]:
        """How far each epoch of a partition is applied now; epoch 0 is what entered through the ledger."""
        table = self._store.tables.partition
        async with self._engines.read() as connection:
            found = await connection.execute(select(table.c.epoch, table.c.applied).where(table.c.partition == partition))
            return {int(epoch): int(applied) for epoch, applied in found}

    async def touched(self, partition: int, since: dict[int, int], upto: dict[int, int]) -> list[str]:
        """SKUs that anything between these two marks has touched, in order."""
        change, void, operation = self._store.tables.change, self._store.tables.void, self._store.tables.operation
        fields: set[str] = set()
        async with self._engines.read() as connection:
            for epoch, last in upto.items():
                first = since.get(epoch, 0)
                if first >= last:
                    continue
                between = [change.c.partition == partition, change.c.epoch == epoch, change.c.seq > first, change.c.seq <= last]
                fields |= {
                    key_of(*row) for row in await connection.execute(select(change.c.merchant, change.c.sku).where(*between).distinct())
                }
                between = [void.c.partition == partition, void.c.epoch == epoch, void.c.seq > first, void.c.seq <= last]
                for deltas in (await connection.execute(select(void.c.deltas).where(*between))).scalars():
                    fields.update(json.loads(deltas)[::3])
                # What moves Redis only may come long after the change that it belongs to.
                between = [operation.c.partition == partition, operation.c.epoch == epoch, operation.c.seq > first, operation.c.seq <= last]
                beside = select(operation.c.kind, operation.c.receipt).where(*between, operation.c.kind.in_(BESIDE))
                for kind, receipt in await connection.execute(beside):
                    fields.update(json.loads(receipt)[0][:: 2 if kind == Kind.CREDIT.value else 3])
        return sorted(fields)

    async def made(self, merchant: str, names: Sequence[str], since_ms: int) -> set[str]:
        """Which of these operations the ledger has, that were journaled since then."""
        operation = self._store.tables.operation
        where = (operation.c.merchant == merchant, operation.c.at_ms >= since_ms, operation.c.operation_id.in_(list(names)))
        async with self._engines.read() as connection:
            found = await connection.execute(select(operation.c.operation_id).where(*where, operation.c.status == APPLIED))
            return set(found.scalars())

    async def past(self, field: str, limit: int) -> list[Past]:
        """The newest changes of one SKU with their operations."""
        operation, change = self._store.tables.operation, self._store.tables.change
        merchant, sku = split_key(field)
        place = ("partition", "epoch", "seq", "index")
        joined = change.join(operation, and_(*(operation.c[name] == change.c[name] for name in place)))
        columns = (change.c.version, change.c.epoch, change.c.seq, operation.c.kind, operation.c.merchant, operation.c.operation_id)
        query = select(*columns, operation.c.status, operation.c.at_ms, change.c.available_delta, change.c.reserved_delta).select_from(
            joined
        )
        query = query.where(change.c.merchant == merchant, change.c.sku == sku).order_by(change.c.version.desc()).limit(limit)
        async with self._engines.read() as connection:
            return [
                Past(version, epoch, seq, kind, key_of(shop, name), status, at_ms, available, reserved)
                for version, epoch, seq, kind, shop, name, status, at_ms, available, reserved in await connection.execute(query)
            ]

    async def refused(self, partition: int, epoch: int) -> list[Refused]:
        """Every refused entry of an epoch that had moved Redis. There are few: each one is an alert."""
        void, operation = self._store.tables.void, self._store.tables.operation
        columns = (void.c.seq, void.c.index, void.c.key, void.c.kind, void.c.deltas, void.c.state)
        async with self._engines.read() as connection:
            found = list(await connection.execute(select(*columns).where(void.c.partition == partition, void.c.epoch == epoch)))
            if not found:
                return []
            least = min(row[0] for row in found)
            where = (operation.c.partition == partition, operation.c.epoch == epoch, operation.c.seq > least)
            made = select(operation.c.operation_id).where(*where, operation.c.kind == Kind.VOID.value, operation.c.status == APPLIED)
            names = set((await connection.execute(made)).scalars())
        return [
            Refused(epoch, seq, index, key, kind, tuple(json.loads(deltas)), state, f"\x1fvoid\x1f{epoch}-{seq}-{index}" in names)
            for seq, index, key, kind, deltas, state in found
        ]

    async def gaps(self, partition: int, epoch: int, limit: int) -> list[tuple[int, int]]:
        """Ranges of sequences up to the watermark that left no entry here, oldest first."""
        entry, table = self._store.tables.entry, self._store.tables.partition
        # Of one moment: counted a little later than the watermark was read, new entries would make up for missing ones.
        async with self._engines.snapshot() as connection:
            query = select(table.c.applied).where(table.c.partition == partition, table.c.epoch == epoch)
            applied = int((await connection.execute(query)).scalar() or 0)
            here = (entry.c.partition == partition, entry.c.epoch == epoch, entry.c.seq <= applied)
            counted = select(func.count(), func.max(entry.c.seq)).where(*here)
            there, newest = (await connection.execute(counted)).one()
            if there >= applied:
                return []
            # Along the primary key: a join with itself costs a fresh table's planner, which knows no rows yet, minutes.
            previous = func.coalesce(func.lag(entry.c.seq).over(order_by=entry.c.seq), 0).label("previous")
            rows = select(entry.c.seq, previous).where(*here).subquery()
            holes = select(rows.c.previous + 1, rows.c.seq - 1).where(rows.c.seq - rows.c.previous > 1).order_by(rows.c.seq).limit(limit)
            found = [(int(first), int(last)) for first, last in await connection.execute(holes)]
            if (newest or 0) < applied:
                found.append((int(newest or 0) + 1, applied))
            return found

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Snapshot]:
        """All that is asked in the block is of one moment."""
        async with self._engines.snapshot() as connection:
            yield Snapshot(connection, self._store)


class Snapshot:
    """The ledger at one moment."""

    def __init__(self, connection: AsyncConnection, store: Store) -> None:
        self._connection = connection
        self._store = store

    async def partition(self, partition: int) -> PartitionRow | None:
        """The newest epoch and its watermark."""
        return await rebuild.newest(self._connection, self._store, partition)

    async def accounts(self, partition: int, epoch: int, fields: Sequence[str]) -> dict[str, Account]:
        """What Redis must have of these SKUs at the watermark."""
        store, connection = self._store, self._connection
        columns = ("merchant", "sku", "admission", "fence", "version", *COUNTERS)
        found = await store.bulk.select(connection, store.tables.stock, columns, ("merchant", "sku"), set(rows.pairs(fields)))
        chain = ("merchant", "sku", "version", *(f"{name}_after" for name in COUNTERS))
        newest = {(row[0], row[1], row[4]) for row in found}
        lasts = await store.bulk.select(connection, store.tables.change, chain, ("merchant", "sku", "version"), newest)
        left = {key_of(row[0], row[1]): (row[3], row[4], row[5], row[6], row[7]) for row in lasts}
        coming, owed = await self._coming(partition, epoch), await self._owed(partition, epoch)
        accounts: dict[str, Account] = {}
        for merchant, sku, place, fence, version, *counters in found:
            field = key_of(merchant, sku)
            available, reserved = owed.get(field, (0, 0))
            accounts[field] = Account(
                field, place, fence, version, counters[0] - coming.get(field, 0) - available, counters[1] - reserved,
                (counters[0], counters[1], counters[2], counters[3], counters[4]), left.get(field),
            )  # fmt: skip
        return accounts

    async def _coming(self, partition: int, epoch: int) -> dict[str, int]:
        credit = self._store.tables.credit
        query = (
            select(credit.c.merchant, credit.c.sku, func.sum(credit.c.quantity))
            .where(credit.c.partition == partition, credit.c.epoch == epoch, credit.c.state == PENDING)
            .group_by(credit.c.merchant, credit.c.sku)
        )
        return {key_of(merchant, sku): int(units) for merchant, sku, units in await self._connection.execute(query)}

    async def _owed(self, partition: int, epoch: int) -> dict[str, tuple[int, int]]:
        """What pending voids will add to Redis."""
        owed: dict[str, tuple[int, int]] = {}
        for void in await rows.pending_voids(self._connection, self._store, partition, epoch):
            _add(owed, void.deltas)
        return owed

    async def moved(self, partition: int, epoch: int, after: int, upto: int) -> dict[str, list[Moved]]:
        """What the entries after one sequence, up to another, did to each field in Redis."""
        moved: dict[str, list[Moved]] = defaultdict(list)
        if after >= upto:
            return moved
        change, operation, void = self._store.tables.change, self._store.tables.operation, self._store.tables.void

        def between(table: Any) -> list[Any]:
            return [table.c.partition == partition, table.c.epoch == epoch, table.c.seq > after, table.c.seq <= upto]

        deltas = select(change.c.merchant, change.c.sku, change.c.seq, change.c.available_delta, change.c.reserved_delta)
        for merchant, sku, seq, available, reserved in await self._connection.execute(deltas.where(*between(change))):
            moved[key_of(merchant, sku)].append(Moved(seq, available, reserved))
        # An entry that was refused had moved Redis all the same, and its void is the exact inverse.
        for seq, text in await self._connection.execute(select(void.c.seq, void.c.deltas).where(*between(void))):
            for field, available, reserved in _threes(json.loads(text)):
                moved[field].append(Moved(seq, -available, -reserved))
        beside = select(operation.c.seq, operation.c.kind, operation.c.receipt).where(*between(operation))
        for seq, kind, receipt in await self._connection.execute(beside.where(operation.c.kind.in_(BESIDE), operation.c.status == APPLIED)):
            lines = json.loads(receipt)[0]
            if kind == Kind.CREDIT.value:
                for at in range(0, len(lines), 2):
                    moved[lines[at]].append(Moved(seq, lines[at + 1], 0))
            else:
                for field, available, reserved in _threes(lines):
                    moved[field].append(Moved(seq, available, reserved))
        return moved

    async def service(self, reads: ReadsStock, merchant: str, skus: Sequence[str]) -> dict[str, OpeningBalance]:
        """What the service's own tables say at this moment."""
        async with AsyncSession(self._connection, join_transaction_mode="create_savepoint") as session:
            asked = set(skus)
            return {balance.sku: balance for balance in await reads(merchant, skus, session) if balance.sku in asked}


def _threes(flat: Sequence[Any]) -> list[tuple[str, int, int]]:
    return [(flat[at], flat[at + 1], flat[at + 2]) for at in range(0, len(flat), 3)]


def _add(sums: dict[str, tuple[int, int]], flat: Sequence[Any]) -> None:
    for field, available, reserved in _threes(flat):
        before = sums.get(field, (0, 0))
        sums[field] = (before[0] + available, before[1] + reserved)
