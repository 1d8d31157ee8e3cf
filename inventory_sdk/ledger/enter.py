"""SQL-first operations: opening balances, restocks, returns, positive adjusts.

The epoch-0 row is their queue: who holds it gives out positions (partition, 0, n) and is alone in reading what was returned.
The open epoch's row is held FOR SHARE, so the credits that are written here belong to an epoch that is still open when they
commit, and ``apply``, which takes it FOR UPDATE, never sees claims appear under it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import or_, select, update

from inventory_sdk.errors import InvalidOperation, OperationConflict
from inventory_sdk.ledger import rows
from inventory_sdk.ledger.admission import remember_merchant
from inventory_sdk.ledger.apply import ENTRY, call_writes, move_stock, verify_changes, write_holds
from inventory_sdk.ledger.decide import APPLIED, CHANGE, HELD, OPERATION, TASK, Hold, Stock, parse_json, parts_of, task_row
from inventory_sdk.ledger.direct import at_database
from inventory_sdk.ledger.protocol import Credit, Entered, Entering, EpochClosed, OperationRow, StockArriving, WritesStock
from inventory_sdk.ledger.store import ARRIVING, DATABASE, OPEN, PENDING, REDIS, Store, clean, dumps
from inventory_sdk.model import (
    LEDGER_DELTAS,
    MAX_BALANCE,
    Deltas,
    Kind,
    Movement,
    Position,
    fingerprint,
    key_of,
    split_key,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

CREDIT: Final = ("partition", "seq", "line", "epoch", "key", "merchant", "sku", "quantity", "state")
_NEW_STOCK: Final = ("merchant", "sku", "partition", "admission")

_ENTERING: Final[dict[str, Deltas]] = {
    Kind.OPEN: LEDGER_DELTAS[Kind.OPEN],
    Kind.RESTOCK: LEDGER_DELTAS[Kind.RESTOCK],
    Kind.TAKE_BACK: LEDGER_DELTAS[Kind.TAKE_BACK],
    # A count that finds more supplies it, as a restock does.
    Kind.ADJUST: LEDGER_DELTAS[Kind.RESTOCK],
}


async def enter(
    connection: AsyncConnection,
    store: Store,
    partition: int,
    epoch: int,
    operations: Sequence[Entering],
    writes: Sequence[WritesStock],
) -> list[Entered]:
    """See ``Ledger.enter``; the caller commits."""
    for operation in operations:
        _check(operation)
    applied = await _lock(connection, store, partition, epoch)
    known = await _known(connection, store, operations)
    sold = await _sold(connection, store, [each.reference for each in operations if each.kind == Kind.TAKE_BACK])
    pending = {}
    if known:
        seqs = [row.position.sequence for row in known.values()]
        pending = {c.position.sequence: c for c in await rows.pending_credits(connection, store, partition, epoch, seqs)}
    stock, direct = await _stock(connection, store, partition, [each for each in operations if each.key not in known])
    if not epoch and len(direct) < len(stock):
        raise EpochClosed(f"partition {partition}: what Redis sells enters in an open epoch")
    names = {key_of(split_key(op.key)[0], name) for op in operations for _, name, _ in op.reservations}
    holds = await rows.holds(connection, store, names)
    work = _Entering(partition, epoch, applied, stock, direct, holds, sold, movements=bool(writes))
    done: list[Entered] = []
    fresh: dict[str, tuple[Entering, Entered]] = {}
    for operation in operations:
        before = known.get(operation.key)
        if before is not None:
            if before.fingerprint != operation.fingerprint:
                raise OperationConflict(split_key(operation.key)[1])
            ours = (before.position.partition, before.position.epoch) == (partition, 0)
            credit = pending.get(before.position.sequence) if ours else None
            done.append(Entered(before.position, before.remaining, credit, True))
        elif operation.key in fresh:
            first, entered = fresh[operation.key]
            if first.fingerprint != operation.fingerprint:
                raise OperationConflict(split_key(operation.key)[1])
            done.append(Entered(entered.position, entered.remaining, entered.credit, True))
        else:
            entered = work.take(operation)
            fresh[operation.key] = (operation, entered)
            done.append(entered)
    await _write(connection, store, work, applied)
    if work.movements:
        await call_writes(connection, writes, work.movements)
    return done


def _check(operation: Entering) -> None:
    if operation.kind not in _ENTERING:
        raise InvalidOperation("kind", operation.kind, "does not enter through SQL")
    least = 0 if operation.kind == Kind.OPEN else 1
    for quantity in operation.lines[1::2]:
        if type(quantity) is not int or quantity < least:
            raise InvalidOperation("quantity", quantity, f"must be a whole number of at least {least} to enter the ledger")
    for _, name, quantity in operation.reservations:
        if type(quantity) is not int or quantity < 1:
            raise InvalidOperation("reservations", (name, quantity), "must hold at least one unit")


async def _lock(connection: AsyncConnection, store: Store, partition: int, epoch: int) -> int:
    table = store.tables.partition
    zero = select(table.c.applied).where(table.c.partition == partition, table.c.epoch == 0).with_for_update()
    applied = (await connection.execute(zero)).scalar()
    if applied is not None and not epoch:
        # Only what the ledger sells itself: it owes Redis nothing, so it needs no epoch of Redis.
        return int(applied)
    share = select(table.c.state).where(table.c.partition == partition, table.c.epoch == epoch).with_for_update(read=True)
    state = (await connection.execute(share)).scalar()
    if applied is None or state != OPEN:
        raise EpochClosed(f"partition {partition}: epoch {epoch} is {state or 'unknown'}, nothing enters in it")
    return int(applied)


async def _known(connection: AsyncConnection, store: Store, operations: Sequence[Entering]) -> dict[str, OperationRow]:
    taken = await rows.claims(connection, store, {each.key for each in operations})
    if not taken:
        return {}
    table = store.tables.operation
    found = await connection.execute(select(*rows.operation_columns(store)).where(table.c.claim.in_(list(taken))))
    return {row.key: row for row in map(rows.operation_row, found)}


async def _sold(connection: AsyncConnection, store: Store, references: Sequence[str]) -> dict[str, dict[str, int]]:
    """Per sale: field → units that may still be returned, of its parts too, whichever partitions these are in."""
    if not references:
        return {}
    wanted = {rows.call_of(key) for key in references}
    sold: dict[str, dict[str, int]] = {}
    for key, take in (await rows.claims(connection, store, wanted)).items():
        if take.kind == Kind.DEDUCT:
            sold.setdefault(key, {}).update(zip(take.lines[::2], take.lines[1::2], strict=True))
    held = store.tables.reservation
    keys = (await connection.execute(select(held.c.key).where(or_(*(rows.of_call(held.c.key, key) for key in sorted(wanted)))))).scalars()
    for key, hold in (await rows.holds(connection, store, list(keys))).items():
        sold.setdefault(rows.call_of(key), {}).update({field: counts[2] for field, counts in hold.lines.items()})
    table = store.tables.operation
    returns = (
        select(*rows.operation_columns(store))
        .where(or_(*(rows.of_call(table.c.reference, key) for key in sorted(wanted))))
        .where(table.c.kind == Kind.TAKE_BACK.value, table.c.status == APPLIED)
    )
    for row in map(rows.operation_row, await connection.execute(returns)):
        left = sold.get(rows.call_of(row.reference), {})
        for field, quantity in zip(row.lines[::2], row.lines[1::2], strict=True):
            left[field] = left.get(field, 0) - quantity
    return sold


async def _stock(
    connection: AsyncConnection, store: Store, partition: int, operations: Sequence[Entering]
) -> tuple[dict[str, Stock], set[str]]:
    """The rows that these operations touch, locked; missing ones are made, with zeros. And those that the ledger sells itself;
    ``StockArriving`` for any that is on its way to Redis."""
    fields = {field for operation in operations for field in operation.lines[::2]}
    stock = await rows.stock(connection, store, fields, "update")
    places = await rows.admissions(connection, store, stock)
    if arriving := sorted(field for field, place in places.items() if place == ARRIVING):
        raise StockArriving(f"sku {split_key(arriving[0])[1]!r} of merchant {split_key(arriving[0])[0]!r} is on its way to Redis")
    born = {field for each in operations if each.kind != Kind.TAKE_BACK for field in each.lines[::2]} - stock.keys()
    homes: dict[str, str] = {}
    for merchant in sorted({split_key(field)[0] for field in born}):
        homes[merchant] = DATABASE if await at_database(connection, store, merchant) else REDIS
        await remember_merchant(connection, store, partition, merchant, homes[merchant])
    new = [(*split_key(field), partition, homes[split_key(field)[0]]) for field in sorted(born)]
    await store.bulk.insert(connection, store.tables.stock, _NEW_STOCK, new)
    for merchant, sku, _, place in new:
        stock[key_of(merchant, sku)] = Stock(merchant, sku, (0, 0, 0, 0, 0), 0)
        places[key_of(merchant, sku)] = place
    return stock, {field for field, place in places.items() if place == DATABASE}


class _Entering:
    """Works out new operations in order and collects the rows to write."""

    def __init__(
        self,
        partition: int,
        epoch: int,
        applied: int,
        stock: dict[str, Stock],
        direct: set[str],
        holds: dict[str, Hold],
        sold: dict[str, dict[str, int]],
        movements: bool,
    ) -> None:
        self.partition = partition
        self.epoch = epoch
        self.seq = applied
        self.stock = stock
        self.direct = direct
        self.holds = holds
        self.sold = sold
        self.at_ms = time.time_ns() // 1_000_000
        self.entries: list[tuple[Any, ...]] = []
        self.operations: list[list[Any]] = []
        self.changes: list[tuple[Any, ...]] = []
        self.credits: list[tuple[Any, ...]] = []
        self.tasks: list[tuple[Any, ...]] = []
        self.movements: list[Movement] = []
        self._moving = movements

    def take(self, operation: Entering) -> Entered:
        self.seq += 1
        position = Position(self.partition, 0, self.seq)
        merchant, operation_id = split_key(operation.key)
        extra = parse_json(operation.extra, operation.key)
        reason = operation.reason or extra.get("reason") or ""
        if operation.kind == Kind.TAKE_BACK:
            self._return(operation)
        moved = self._open(operation) if operation.kind == Kind.OPEN else list(operation.lines)
        per_unit = _ENTERING[operation.kind]
        if operation.kind != Kind.OPEN:
            for at in range(0, len(moved), 2):
                deltas = Deltas(*(delta * moved[at + 1] for delta in per_unit))
                self._change(operation, at // 2, moved[at], moved[at + 1], deltas, reason)
        remaining = tuple(self.stock[field].available for field in operation.lines[::2])
        kept = [value for field, value in zip(operation.lines[::2], remaining, strict=True) if field in moved[::2]]
        row = [
            self.partition, 0, self.seq, 0, merchant, operation_id, operation.key, operation.kind, operation.order or None,
            operation.reference or None, operation.fingerprint, len(moved) // 2,
            dumps([moved, kept, parts_of(extra)] if "parts" in extra else [moved, kept]), APPLIED, False, self.at_ms,
            clean(str(reason)) if reason else None,
        ]  # fmt: skip
        self.operations.append(row)
        self.entries.append((self.partition, 0, self.seq, "", self.at_ms, 1))
        if extra.get("task"):
            place = (position.partition, position.epoch, position.sequence, 0)
            self.tasks.append(task_row(extra["task"], merchant, operation_id, operation.kind, operation.order, row, place))
        credit = None
        owed = [part for at in range(0, len(moved), 2) if moved[at] not in self.direct for part in moved[at : at + 2]]
        if operation.kind != Kind.OPEN and owed:
            credit = Credit(position, self.epoch, operation.key, tuple(owed))
            for at in range(0, len(owed), 2):
                where = (self.partition, self.seq, at // 2, self.epoch, operation.key)
                self.credits.append((*where, *split_key(owed[at]), owed[at + 1], PENDING))
        return Entered(position, remaining, credit, False)

    def _return(self, operation: Entering) -> None:
        left = self.sold.get(rows.call_of(operation.reference))
        name = split_key(rows.call_of(operation.reference))[1]
        if left is None:
            raise InvalidOperation("of", name, "is not a sale that the ledger knows")
        for at in range(0, len(operation.lines), 2):
            field, quantity = operation.lines[at], operation.lines[at + 1]
            if left.get(field, 0) < quantity:
                merchant, sku = split_key(field)
                why = f"of {name!r} only {left.get(field, 0)} can still come back (merchant {merchant!r}, sku {sku!r})"
                raise InvalidOperation("lines", quantity, why)
            left[field] -= quantity

    def _open(self, operation: Entering) -> list[Any]:
        """Open the SKUs that had no row; their flat lines."""
        held: dict[str, list[tuple[str, int]]] = {}
        for field, name, quantity in operation.reservations:
            held.setdefault(field, []).append((name, quantity))
        opened: list[Any] = []
        for at in range(0, len(operation.lines), 2):
            field, available = operation.lines[at], operation.lines[at + 1]
            if self.stock[field].version:
                continue
            reserved = sum(quantity for _, quantity in held.get(field, ()))
            deltas = Deltas(available=available, reserved=reserved, supplied=available + reserved)
            self._change(operation, len(opened) // 2, field, available, deltas, operation.reason)
            opened += [field, available]
            for name, quantity in held.get(field, ()):
                self._reserve(operation, field, name, quantity)
        return opened

    def _reserve(self, operation: Entering, field: str, name: str, quantity: int) -> None:
        key = key_of(split_key(operation.key)[0], name)
        hold = self.holds.get(key)
        if hold is None:
            hold = self.holds[key] = Hold(key, HELD, "", self.partition, 0, self.seq, operation.order, 0, False, {}, self.at_ms)
        elif hold.state != HELD or hold.epoch != 0 or field in hold.lines:
            raise OperationConflict(name, "names a reservation that the ledger has already")
        hold.lines[field] = [quantity, quantity, 0, 0]
        hold.born.add(field)
        flat: list[Any] = []
        for each in sorted(hold.lines):
            flat += [each, hold.lines[each][0]]
        hold.fingerprint = fingerprint(Kind.RESERVE, "", flat)
        hold.touched = True

    def _change(self, operation: Entering, line: int, field: str, quantity: int, deltas: Deltas, reason: str) -> None:
        row = self.stock[field]
        before = row.after()[:5]
        row.add(deltas)
        after = row.after()[:5]
        if row.available + row.reserved > MAX_BALANCE:
            raise InvalidOperation("quantity", quantity, f"would raise sku {row.sku!r} above {MAX_BALANCE}")
        place = (self.partition, 0, self.seq, 0, line)
        self.changes.append((row.merchant, row.sku, row.version, *place, quantity, *deltas, *before, *after))
        if self._moving and operation.kind != Kind.OPEN:
            moved = (deltas.available, deltas.reserved, deltas.sold)
            whose = (split_key(operation.key)[1], operation.order or None, None)
            where = (Position(self.partition, 0, self.seq), 0, reason or None)
            self.movements.append(Movement(row.merchant, row.sku, operation.kind, quantity, *moved, *whose, *where))


async def _write(connection: AsyncConnection, store: Store, work: _Entering, applied: int) -> None:
    if work.seq == applied:
        return
    bulk, tables = store.bulk, store.tables
    table = tables.partition
    await connection.execute(update(table).where(table.c.partition == work.partition, table.c.epoch == 0).values(applied=work.seq))
    await bulk.insert(connection, tables.entry, ENTRY, work.entries)
    await bulk.insert(connection, tables.operation, OPERATION, work.operations)
    verify_changes(work.changes, work.stock)
    await bulk.insert(connection, tables.change, CHANGE, work.changes)
    await move_stock(connection, store, work.stock)
    await write_holds(connection, store, work.holds.values(), ())
    await bulk.insert(connection, tables.credit, CREDIT, work.credits)
    await bulk.insert(connection, tables.task, TASK, work.tasks)
