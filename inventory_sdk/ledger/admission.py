"""Who sells a SKU, Redis or the ledger, and how that changes hands.

Every flip holds the epoch-0 row, as direct sellers and all that enters do, and the open epoch's row, as nobody who applies or
rebuilds does meanwhile. So one flip runs at a time, between two acts and never inside one. ``fence`` rises with each: whoever began
something under an older one is told so.

    database ── arrive ──▶ arriving ── arrived ──▶ redis ── leave ──▶ database

While stock is ``arriving`` nobody sells it: direct sellers miss it, loads leave it alone, until Redis has its holds and results.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, exists, insert, literal, or_, select, tuple_, update

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.ledger import rows
from inventory_sdk.ledger.decide import APPLIED, CLAIMING, HELD, REJECTED, UNDONE
from inventory_sdk.ledger.direct import at_database, lock_ledger
from inventory_sdk.ledger.protocol import AdmissionRow, Arriving, Balance, EpochClosed, Leaving, OperationRow, ReservationRow
from inventory_sdk.ledger.store import ARRIVING, DATABASE, OPEN, REDIS, Store
from inventory_sdk.model import Kind, key_of, split_key

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

SHOWN: Final = 5
"""Holds named in an error."""
WITHDRAWN: Final = "withdraw"
"""How the audit names a handover to the database."""
MOST_JOINED: Final = 20_000
"""SKUs that live holds may join before they are too many to change hands at once."""


async def places(connection: AsyncConnection, store: Store, fields: Sequence[str], merchant: str | None) -> dict[str, str]:
    """See ``Ledger.places``."""
    answer = await rows.admissions(connection, store, set(fields))
    if merchant is not None:
        answer[""] = DATABASE if await at_database(connection, store, merchant) else REDIS
    return answer


async def of_merchant(connection: AsyncConnection, store: Store, merchant: str, lock: bool = False) -> list[AdmissionRow]:
    """See ``Ledger.admission``."""
    table = store.tables.stock
    query = select(table.c.sku, table.c.admission, table.c.fence).where(table.c.merchant == merchant).order_by(table.c.sku)
    found = await connection.execute(query.with_for_update() if lock else query)
    return [AdmissionRow(key_of(merchant, sku), admission, fence) for sku, admission, fence in found]


async def of_fields(connection: AsyncConnection, store: Store, fields: Sequence[str], lock: bool = False) -> list[AdmissionRow]:
    """The same for these fields."""
    columns = ("merchant", "sku", "admission", "fence")
    named = rows.pairs(sorted(set(fields)))
    found = await store.bulk.select(connection, store.tables.stock, columns, ("merchant", "sku"), named, "update" if lock else "")
    return [AdmissionRow(key_of(merchant, sku), admission, fence) for merchant, sku, admission, fence in found]


async def _lock(connection: AsyncConnection, store: Store, partition: int, epoch: int) -> int:
    """Both rows of the partition; the open epoch's watermark."""
    await lock_ledger(connection, store, partition)
    table = store.tables.partition
    query = select(table.c.state, table.c.applied).where(table.c.partition == partition, table.c.epoch == epoch)
    row = (await connection.execute(query.with_for_update(read=True))).first()
    if row is None or row[0] != OPEN:
        raise EpochClosed(f"partition {partition}: epoch {epoch} is {row[0] if row else 'unknown'}, no stock changes hands in it")
    return int(row[1])


async def _set(connection: AsyncConnection, store: Store, changed: Sequence[tuple[str, str, int]]) -> None:
    """(field, admission, fence) of rows that are locked."""
    values = [(*split_key(name), admission, fence) for name, admission, fence in changed]
    await store.bulk.update(connection, store.tables.stock, ("merchant", "sku"), ("admission", "fence"), values)


async def remember_merchant(connection: AsyncConnection, store: Store, partition: int, merchant: str, admission: str) -> None:
    """From now on this is where the merchant's new SKUs are sold."""
    table = store.tables.admission
    now = time.time_ns() // 1_000_000
    await store.insert_if_absent(
        connection, table, {"merchant": merchant, "partition": partition, "admission": admission, "changed_ms": now}
    )
    await connection.execute(
        update(table).where(table.c.merchant == merchant, table.c.admission != admission).values(admission=admission, changed_ms=now)
    )


async def _note(connection: AsyncConnection, store: Store, merchant: str, kind: str, details: str) -> None:
    values = {"merchant": merchant, "kind": kind, "details": details, "created_ms": time.time_ns() // 1_000_000, "actor": ""}
    await connection.execute(insert(store.tables.audit).values(**values))


async def arrive(
    connection: AsyncConnection, store: Store, partition: int, epoch: int, fields: Sequence[str] | None, merchant: str
) -> Arriving:
    """See ``Ledger.arrive``; the caller commits."""
    await _lock(connection, store, partition, epoch)
    if fields is None:
        await remember_merchant(connection, store, partition, merchant, REDIS)
        found = await of_merchant(connection, store, merchant, lock=True)
    else:
        found = await of_fields(connection, store, fields, lock=True)
    coming = [row.field for row in found if row.admission == DATABASE]
    staying = [AdmissionRow(row.field, REDIS, row.fence + 1) for row in found if row.admission == REDIS]
    if coming and (joined := await mixed_holds(connection, store, partition, coming, DATABASE)):
        raise InvalidOperation("merchant", merchant, f"{_holds(joined)} also hold stock that stays on the database; close them first")
    # What was arriving already may be half in Redis under its fence, and keeps it.
    changed = [AdmissionRow(row.field, ARRIVING, row.fence + 1) for row in found if row.admission == DATABASE]
    await _set(connection, store, [(row.field, row.admission, row.fence) for row in (*changed, *staying)])
    if coming:
        await _note(connection, store, merchant, "adopt", f"{len(coming)} SKUs go to Redis")
    return Arriving((*changed, *(row for row in found if row.admission == ARRIVING)), tuple(staying))


async def arrived(connection: AsyncConnection, store: Store, partition: int, fences: Mapping[str, int]) -> int:
    """See ``Ledger.arrived``; the caller commits."""
    await lock_ledger(connection, store, partition)
    found = await of_fields(connection, store, list(fences), lock=True)
    mine = [row for row in found if (row.admission, row.fence) == (ARRIVING, fences[row.field])]
    await _set(connection, store, [(row.field, REDIS, row.fence) for row in mine])
    return len(mine)


async def leave(
    connection: AsyncConnection,
    store: Store,
    partition: int,
    epoch: int,
    marked: Mapping[str, int],
    applied: int,
    merchant: str,
    whole: bool,
) -> Leaving:
    """See ``Ledger.leave``; the caller commits."""
    watermark = await _lock(connection, store, partition, epoch)
    found = (
        await of_merchant(connection, store, merchant, lock=True) if whole else await of_fields(connection, store, list(marked), lock=True)
    )
    going = [row for row in found if row.admission != DATABASE]
    if any(row.admission == ARRIVING or marked.get(row.field, row.fence) != row.fence for row in going):
        return Leaving("overtaken")
    if any(row.field in marked and row.admission == DATABASE and row.fence > marked[row.field] + 1 for row in found):
        return Leaving("overtaken")
    if new := tuple(row for row in going if row.field not in marked):
        return Leaving("unmarked", rows=new)
    fields = [row.field for row in going]
    if watermark < applied:
        return Leaving("behind")
    if fields and await _pending(connection, store, partition, epoch, fields):
        return Leaving("pending")
    if fields and (joined := await mixed_holds(connection, store, partition, fields, REDIS, ARRIVING)):
        return Leaving("mixed", holds=tuple(joined))
    await _set(connection, store, [(row.field, DATABASE, row.fence + 1) for row in going])
    if whole:
        await remember_merchant(connection, store, partition, merchant, DATABASE)
    if going:
        await _note(connection, store, merchant, WITHDRAWN, f"{len(going)} SKUs go to the database")
    return Leaving("done", holds=tuple(sorted(await holds_of(connection, store, partition, [row.field for row in found]))))


async def _pending(connection: AsyncConnection, store: Store, partition: int, epoch: int, fields: Sequence[str]) -> bool:
    """Whether Redis still owes, or is owed, anything of these."""
    mine = set(fields)
    for credit in await rows.pending_credits(connection, store, partition, epoch):
        if mine.intersection(credit.lines[::2]):
            return True
    return any(mine.intersection(void.deltas[::3]) for void in await rows.pending_voids(connection, store, partition, epoch))


async def holds_of(connection: AsyncConnection, store: Store, partition: int, fields: Sequence[str]) -> set[str]:
    """Keys of live holds that have any of these open."""
    header, line = store.tables.reservation, store.tables.reservation_line
    keys: set[str] = set()
    for at in range(0, len(fields), 500):
        part = fields[at : at + 500]
        mine = or_(*(and_(line.c.merchant == merchant, line.c.sku.in_(skus)) for merchant, skus in _by_merchant(part).items()))
        query = (
            select(line.c.key)
            .select_from(header.join(line, line.c.key == header.c.key))
            .where(header.c.partition == partition, header.c.state == HELD, line.c.open > 0, mine)
        )
        keys.update((await connection.execute(query)).scalars())
    return keys


def _by_merchant(fields: Sequence[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in fields:
        merchant, sku = split_key(name)
        grouped.setdefault(merchant, []).append(sku)
    return grouped


async def mixed_holds(connection: AsyncConnection, store: Store, partition: int, fields: Sequence[str], *others: str) -> list[str]:
    """Live holds of these fields that also have other stock open, which is (and stays) at one of these places."""
    keys = await holds_of(connection, store, partition, fields)
    mine = set(fields)
    beside: dict[str, set[str]] = {}
    for key, hold in (await rows.holds(connection, store, keys)).items():
        for name, counts in hold.lines.items():
            if counts[1] and name not in mine:
                beside.setdefault(name, set()).add(key)
    found = await places(connection, store, list(beside), None)
    return sorted({key for name, keys in beside.items() if found.get(name) in others for key in keys})


async def joined(connection: AsyncConnection, store: Store, partition: int, fields: Sequence[str]) -> list[str]:
    """See ``Ledger.joined``."""
    found: set[str] = set()
    new = set(fields)
    seen: set[str] = set()
    while new:
        found |= new
        if len(found) > MOST_JOINED:
            raise InvalidOperation(
                "skus", len(found), f"are joined by live reservations, more than {MOST_JOINED} can't change hands at once"
            )
        keys = await holds_of(connection, store, partition, sorted(new)) - seen
        seen |= keys
        holds = await rows.holds(connection, store, keys)
        new = {name for hold in holds.values() for name, counts in hold.lines.items() if counts[1]} - found
    return sorted(found)


def _holds(keys: Sequence[str]) -> str:
    names = ", ".join(repr(split_key(key)[1]) for key in keys[:SHOWN])
    return f"reservations {names}{' and more' if len(keys) > SHOWN else ''}"


class Reading:
    """See ``protocol.Arrivals``."""

    def __init__(self, connection: AsyncConnection, store: Store, partition: int, fields: Sequence[str]) -> None:
        self._connection = connection
        self._store = store
        self._partition = partition
        self._fields = fields

    async def lock(self, epoch: int) -> None:
        """The open epoch FOR SHARE, then the rows, for one who brings them at a time; those that are not arriving are left out."""
        table = self._store.tables.partition
        query = select(table.c.state).where(table.c.partition == self._partition, table.c.epoch == epoch).with_for_update(read=True)
        state = (await self._connection.execute(query)).scalar()
        if state != OPEN:
            raise EpochClosed(f"partition {self._partition}: epoch {epoch} is {state or 'unknown'}, nothing is loaded in it")
        found = await self._rows("admission", "fence", lock=True)
        self._fields = [key_of(merchant, sku) for merchant, sku, admission, _ in found if admission == ARRIVING]

    async def _rows(self, *columns: str, lock: bool = False) -> list[tuple[Any, ...]]:
        keys = ("merchant", "sku")
        return await self._store.bulk.select(
            self._connection, self._store.tables.stock, keys + columns, keys, rows.pairs(self._fields), "update" if lock else ""
        )

    async def balances(self) -> list[Balance]:
        """Nothing is owed to Redis of these: nothing enters while they arrive."""
        found = await self._rows("available", "reserved")
        return [Balance(key_of(merchant, sku), available, reserved, ARRIVING) for merchant, sku, available, reserved in found]

    async def reservations(self) -> list[ReservationRow]:
        keys = await holds_of(self._connection, self._store, self._partition, self._fields)
        found = await rows.holds(self._connection, self._store, keys)
        return [rows.reservation_row(found[key]) for key in sorted(found)]

    async def tombstones(self, since_ms: int) -> list[str]:
        """Keys that were closed before anything was held under them."""
        table = self._store.tables.operation
        query = select(table.c.reference).where(
            table.c.partition == self._partition,
            table.c.merchant.in_(list(_by_merchant(self._fields))),
            table.c.kind == Kind.TOMBSTONE.value,
            table.c.at_ms >= since_ms,
        )
        return sorted({key for key in (await self._connection.execute(query)).scalars() if key})

    def results(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        table = self._store.tables.operation
        return self._operations(size, since_ms, table.c.epoch == 0, table.c.claim.is_not(None), table.c.status == APPLIED)

    def forgotten(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        table = self._store.tables.operation
        return self._operations(
            size, since_ms, table.c.claim.is_(None), table.c.status.in_((UNDONE, REJECTED)), table.c.kind.in_(sorted(CLAIMING))
        )

    async def _operations(self, size: int, since_ms: int, *which: Any) -> AsyncIterator[Sequence[OperationRow]]:
        table = self._store.tables.operation
        order = (table.c.epoch, table.c.seq, table.c.index)
        query = (
            select(*rows.operation_columns(self._store))
            .where(table.c.partition == self._partition, table.c.at_ms >= since_ms)
            .where(table.c.merchant.in_(list(_by_merchant(self._fields))), *which)
            .order_by(*order)
            .limit(size)
        )
        after: tuple[int, int, int] | None = None
        while True:
            page = query
            if after is not None:
                page = query.where(tuple_(*order) > tuple_(*(literal(value) for value in after)))
            found = [rows.operation_row(row) for row in await self._connection.execute(page)]
            if found:
                yield found
            if len(found) < size:
                return
            after = (found[-1].position.epoch, found[-1].position.sequence, found[-1].index)


async def due_holds(connection: AsyncConnection, store: Store, partition: int, limit: int, pinned_before_ms: int) -> list[ReservationRow]:
    """See ``Ledger.due_holds``. Where no merchant sells from the ledger, that is all it costs to find out."""
    tables = store.tables
    stock, header, line, operation = tables.stock, tables.reservation, tables.reservation_line, tables.operation
    home, audit = tables.admission, tables.audit
    some = exists().where(home.c.partition == partition, home.c.admission == DATABASE)
    # SKUs of a merchant whose others Redis sells came here by a withdrawal.
    went = exists().where(audit.c.kind == WITHDRAWN)
    if not (await connection.execute(select(or_(some, went)))).scalar_one():
        return []
    now = await store.now_ms(connection)
    same = and_(stock.c.merchant == line.c.merchant, stock.c.sku == line.c.sku)
    ours = exists().where(line.c.key == header.c.key, line.c.open > 0, same, stock.c.admission == DATABASE)
    pin = and_(operation.c.reference == header.c.key, operation.c.kind == Kind.PIN.value, operation.c.at_ms > now - pinned_before_ms)
    due = or_(
        and_(header.c.pinned.is_(False), header.c.expires_at > 0, header.c.expires_at <= now),
        and_(header.c.pinned.is_(True), ~exists().where(pin)),
    )
    query = (
        select(header.c.key)
        .where(header.c.partition == partition, header.c.state == HELD, due, ours)
        .order_by(header.c.expires_at, header.c.key)
        .limit(limit)
    )
    keys = list((await connection.execute(query)).scalars())
    found = await rows.holds(connection, store, keys)
    return [rows.reservation_row(found[key]) for key in keys]
