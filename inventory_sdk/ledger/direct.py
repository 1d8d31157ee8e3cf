"""Acts on stock that the ledger sells itself (admission ``database``): what the batch script is to Redis, under row locks.

The epoch-0 row is the queue, as for all that enters through SQL: who holds it gives out positions (partition, 0, n), and no flip
of admission runs meanwhile. An act is judged as the script judges it, and then walked and written as a journaled one would be.

The fence is in the update: ``WHERE admission = 'database' AND available >= :q``. A seller that still believes in the database
after the stock went to Redis changes no row, so nothing of its transaction stands, and it is told to look again.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import ColumnElement, Table, and_, select, update

from inventory_sdk.errors import InventoryError
from inventory_sdk.ledger import rows
from inventory_sdk.ledger.apply import call_writes, returned, write_rows
from inventory_sdk.ledger.decide import APPLIED, CLAIMING, CONFIRMED, EXPIRED, HELD, Hold, Known, Stock, Take, Verdicts
from inventory_sdk.ledger.protocol import DirectAct, DirectAnswer, EpochClosed, OperationRow, WritesStock
from inventory_sdk.ledger.schema import COUNTERS
from inventory_sdk.ledger.store import ARRIVING, DATABASE, Store
from inventory_sdk.model import LEDGER_DELTAS, JournalEntry, JournalOperation, Kind, Position, split_key

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

TAKES: Final = frozenset({Kind.RESERVE, Kind.DEDUCT, Kind.ADJUST})
CHANGES: Final = frozenset({Kind.EXTEND, Kind.RESUME, Kind.PIN})
REMEMBERED: Final = frozenset({Kind.UNDO, Kind.KEEP})


class NotOurs(Exception):
    """The stock is not the ledger's to sell; the transaction must not stand."""

    def __init__(self, answer: DirectAnswer) -> None:
        super().__init__(answer.code)
        self.answer = answer


@dataclass
class _Case:
    """What the ledger knows of one act, read behind the epoch-0 lock."""

    act: DirectAct
    now: int
    known: Known
    admission: dict[str, str]
    first: OperationRow | None
    """The operation that holds this act's id."""
    take: OperationRow | None
    """What an undo or a keep is about."""
    at_home: bool
    """Whether new stock of the act's merchant is the ledger's."""
    expired: tuple[Any, ...] = ()
    """What the last expiry of the hold gave back."""
    fields: list[str] = field(default_factory=list)


async def act(
    connection: AsyncConnection, store: Store, partition: int, operation: DirectAct, writes: Sequence[WritesStock]
) -> DirectAnswer:
    """See ``Ledger.act``; the caller commits, and rolls back on ``NotOurs``."""
    applied = await lock_ledger(connection, store, partition)
    case = await _learn(connection, store, partition, operation)
    judged = _judge(case)
    if isinstance(judged, DirectAnswer):
        return _guarded(case, judged)
    if not LEDGER_DELTAS.get(judged.kind) and judged.kind != Kind.UNDO:
        # It moves no stock row, so no update can miss: who runs the hold is checked here.
        place = _place(case)
        if place is not None:
            raise NotOurs(place)
    seq = applied + 1
    entry = JournalEntry(partition, 0, seq, secrets.token_hex(8), case.now, (judged,))
    verdicts = Verdicts(partition, case.known, bool(writes))
    verdicts.walk(entry)
    if verdicts.refusals:
        raise InventoryError(f"direct {judged.kind} {judged.key!r} was judged fit and then refused: {verdicts.refusals[0].reason}")

    async def move(connection: AsyncConnection, store: Store, stock: dict[str, Stock]) -> None:
        for row in sorted(stock.values(), key=lambda row: (row.merchant, row.sku)):
            if row.version != row.before[5] and not await _moved(connection, store.tables.stock, row):
                raise NotOurs(_place(case) or DirectAnswer("elsewhere"))

    await write_rows(connection, store, [entry], verdicts, move)
    table = store.tables.partition
    await connection.execute(update(table).where(table.c.partition == partition, table.c.epoch == 0).values(applied=seq))
    if verdicts.movements:
        await call_writes(connection, writes, verdicts.movements)
    position = Position(partition, 0, seq)
    return DirectAnswer("done", position, tuple(judged.lines), tuple(judged.remaining), judged.order)


def fence(table: Table, row: Stock) -> ColumnElement[bool]:
    """What must still be true of a stock row when a direct seller changes it."""
    return and_(table.c.admission == DATABASE, table.c.available >= row.before[0] - row.available)


async def _moved(connection: AsyncConnection, table: Table, row: Stock) -> bool:
    added = {
        name: table.c[name] + (after - before)
        for name, after, before in zip((*COUNTERS, "version"), row.after(), row.before, strict=True)
        if after != before
    }
    this = (table.c.merchant == row.merchant, table.c.sku == row.sku)
    changed = await connection.execute(update(table).where(*this, fence(table, row)).values(added))
    return bool(changed.rowcount == 1)


async def lock_ledger(connection: AsyncConnection, store: Store, partition: int) -> int:
    """Become the one who gives out positions of epoch 0; the last one given."""
    table = store.tables.partition
    query = select(table.c.applied).where(table.c.partition == partition, table.c.epoch == 0).with_for_update()
    applied = (await connection.execute(query)).scalar()
    if applied is None:
        raise EpochClosed(f"partition {partition} was never opened: start a process with its Redis once")
    return int(applied)


# Reading -------------------------------------------------------------------------------------------------------------------------


async def _learn(connection: AsyncConnection, store: Store, partition: int, operation: DirectAct) -> _Case:
    kind, key, reference = operation.kind, operation.key, operation.reference
    asked = {key} if kind in CLAIMING else set()
    if kind in REMEMBERED:
        asked.add(reference)
    claimed = await operations(connection, store, asked)
    known = Known(claims={name: _claim(row) for name, row in claimed.items()})
    hold_key = key if kind == Kind.RESERVE else reference
    known.holds = await rows.holds(connection, store, {hold_key} if hold_key else ())
    hold = known.holds.get(hold_key)
    if hold is not None:
        hold.stored = True
    if kind == Kind.UNDO:
        known.returned = await returned(connection, store, {reference})
    expired: tuple[Any, ...] = ()
    if kind == Kind.CONFIRM and hold is not None and hold.state == EXPIRED and "r" in operation.flag:
        expired = await _expired(connection, store, reference)
    take = claimed.get(reference) if kind in REMEMBERED else None
    fields = set(operation.lines[::2])
    if hold is not None:
        fields.update(hold.lines)
    if take is not None:
        fields.update(take.lines[::2])
    known.stock, admission = await _stock(connection, store, fields)
    at_home = await at_database(connection, store, split_key(key)[0])
    now = await store.now_ms(connection)
    first = claimed.get(key) if kind in CLAIMING else None
    return _Case(operation, now, known, admission, first, take, at_home, expired, sorted(fields))


def _claim(row: OperationRow) -> Take:
    return Take(row.kind, row.position.epoch, row.position.sequence, row.index, list(row.lines), row.order, None)


async def operations(connection: AsyncConnection, store: Store, keys: set[str]) -> dict[str, OperationRow]:
    """The operations that hold these claims, whole."""
    if not keys:
        return {}
    query = select(*rows.operation_columns(store)).where(store.tables.operation.c.claim.in_(sorted(keys)))
    return {row.key: row for row in map(rows.operation_row, await connection.execute(query))}


async def _expired(connection: AsyncConnection, store: Store, hold: str) -> tuple[Any, ...]:
    table = store.tables.operation
    query = select(*rows.operation_columns(store)).where(
        table.c.reference == hold, table.c.kind == Kind.EXPIRE.value, table.c.status == APPLIED
    )
    row = (await connection.execute(query)).first()
    return rows.operation_row(row).lines if row is not None else ()


async def _stock(connection: AsyncConnection, store: Store, fields: set[str]) -> tuple[dict[str, Stock], dict[str, str]]:
    columns = ("merchant", "sku", *COUNTERS, "version", "admission")
    found = await store.bulk.select(connection, store.tables.stock, columns, ("merchant", "sku"), rows.pairs(fields), "update")
    stock = {f"{row[0]}\x1f{row[1]}": Stock(row[0], row[1], row[2:7], row[7]) for row in found}
    return stock, {f"{row[0]}\x1f{row[1]}": row[8] for row in found}


async def at_database(connection: AsyncConnection, store: Store, merchant: str) -> bool:
    """Whether new stock of this merchant is sold by the ledger."""
    table = store.tables.admission
    stored = (await connection.execute(select(table.c.admission).where(table.c.merchant == merchant))).scalar()
    return bool((stored or store.admission) == DATABASE)


# Judging -------------------------------------------------------------------------------------------------------------------------


def _place(case: _Case) -> DirectAnswer | None:
    """Why the act is not the ledger's to do; None: it is."""
    ours = [name for name in case.fields if case.admission.get(name) == DATABASE]
    others = [name for name in case.fields if name in case.admission and case.admission[name] != DATABASE]
    if not case.fields and not case.at_home:
        return DirectAnswer("elsewhere")
    if not others:
        return None
    if any(case.admission[name] == ARRIVING for name in others):
        return DirectAnswer("arriving", details=tuple(others))
    return DirectAnswer("mixed", details=tuple(others)) if ours else DirectAnswer("elsewhere")


def _guarded(case: _Case, answer: DirectAnswer) -> DirectAnswer:
    """An answer that moved nothing is right only of stock that is the ledger's."""
    return _place(case) or answer


def _judge(case: _Case) -> DirectAnswer | JournalOperation:
    kind = case.act.kind
    if kind in TAKES:
        return _reserve(case) if kind == Kind.RESERVE else _seen(case) or _take(case)
    if kind in (Kind.CONFIRM, Kind.RELEASE):
        return _close(case)
    if kind == Kind.EXPIRE:
        return _expire(case)
    if kind in CHANGES:
        return _change(case)
    if kind == Kind.UNDO:
        return _undo(case)
    if kind == Kind.KEEP:
        return _keep(case)
    raise InventoryError(f"{kind!r} is not an act on stock that the ledger sells")


def _seen(case: _Case) -> DirectAnswer | None:
    if case.first is None:
        return None
    if case.first.fingerprint != case.act.fingerprint:
        return DirectAnswer("conflict")
    return DirectAnswer("replay", row=case.first)


def _take(case: _Case, expires_at: int = 0) -> DirectAnswer | JournalOperation:
    lines = case.act.lines
    return _uncovered(case, lines) or _operation(case, lines, available=-1, expires_at=expires_at)


def _uncovered(case: _Case, lines: Sequence[Any]) -> DirectAnswer | None:
    unknown = [name for name in lines[::2] if name not in case.known.stock]
    if unknown:
        return DirectAnswer("unknown", details=tuple(unknown))
    short: list[Any] = []
    for name, asked in zip(lines[::2], lines[1::2], strict=True):
        there = case.known.stock[name].available
        if there < asked:
            short += [name, asked, there]
    return DirectAnswer("short", details=tuple(short)) if short else None


def _operation(
    case: _Case,
    lines: Sequence[Any],
    *,
    kind: str = "",
    available: int = 0,
    expires_at: int = 0,
    order: str = "",
    fingerprint: str | None = None,
) -> JournalOperation:
    """The act as a journal entry would have it; ``available``: what a unit does to it."""
    act, stock = case.act, case.known.stock
    remaining = [stock[name].available + available * quantity for name, quantity in zip(lines[::2], lines[1::2], strict=True)]
    mark = act.fingerprint if fingerprint is None else fingerprint
    return JournalOperation(
        kind or act.kind, act.key, mark, list(lines), remaining, act.order or order, act.reference, expires_at, act.extra
    )


def _reserve(case: _Case) -> DirectAnswer | JournalOperation:
    act, hold = case.act, case.known.holds.get(case.act.key)
    seen = _seen(case)
    if seen is not None and seen.code == "conflict":
        return seen
    if hold is not None:
        if hold.state != HELD:
            return seen if hold.state == CONFIRMED and seen is not None else DirectAnswer("closed", details=(hold.state,))
        if hold.fingerprint != act.fingerprint:
            return DirectAnswer("conflict")
        return seen or DirectAnswer("replay", hold=rows.reservation_row(hold))
    return seen or _take(case, case.now + act.ttl_ms if act.ttl_ms else 0)


def _open_lines(hold: Hold) -> list[Any]:
    return [part for name in sorted(hold.lines) if hold.lines[name][1] for part in (name, hold.lines[name][1])]


def _close(case: _Case) -> DirectAnswer | JournalOperation:
    act = case.act
    seen = _seen(case)
    if seen is not None:
        return seen
    hold = case.known.holds.get(act.reference)
    if hold is None:
        if "t" not in act.flag:
            return DirectAnswer("not_found")
        return _operation(case, (), kind=Kind.TOMBSTONE)
    if hold.state != HELD:
        if act.kind == Kind.CONFIRM and hold.state == EXPIRED and "r" in act.flag:
            lines = case.expired
            return _uncovered(case, lines) or _operation(case, lines, kind=Kind.REACQUIRE, available=-1, order=hold.order)
        return DirectAnswer("closed", details=(hold.state,))
    if hold.pinned and "d" not in act.flag:
        return DirectAnswer("pinned")
    over: list[Any] = []
    for name, asked in zip(act.lines[::2], act.lines[1::2], strict=True):
        left = hold.lines[name][1] if name in hold.lines else 0
        if asked > left:
            over += [name, asked, left]
    if over:
        return DirectAnswer("not_open", details=tuple(over))
    return _operation(case, act.lines or _open_lines(hold), available=0 if act.kind == Kind.CONFIRM else 1, order=hold.order)


def _expire(case: _Case) -> DirectAnswer | JournalOperation:
    hold = case.known.holds.get(case.act.reference)
    if hold is None or hold.state != HELD:
        return DirectAnswer("not_found")
    if hold.pinned:
        return DirectAnswer("pinned")
    if not hold.expires_at or case.now < hold.expires_at:
        return DirectAnswer("not_due", details=(hold.expires_at,))
    return _operation(case, _open_lines(hold), available=1, order=hold.order, fingerprint=hold.fingerprint)


def _change(case: _Case) -> DirectAnswer | JournalOperation:
    act = case.act
    hold = case.known.holds.get(act.reference)
    if hold is None:
        return DirectAnswer("not_found")
    if hold.state != HELD:
        return DirectAnswer("closed", details=(hold.state,))
    if hold.pinned and act.kind == Kind.EXTEND:
        return DirectAnswer("pinned")
    # A pin keeps what a resume gives the hold, the others the end of its time.
    due = act.ttl_ms if act.kind == Kind.PIN or not act.ttl_ms else case.now + act.ttl_ms
    return _operation(case, (), expires_at=due)


def _undo(case: _Case) -> DirectAnswer | JournalOperation:
    act, take = case.act, case.take
    kind = act.flag
    if take is None or take.kind != kind or take.fingerprint != act.fingerprint or _mark(take) != act.mark or take.kept:
        return DirectAnswer("too_late")
    if list(take.lines) != list(act.lines) or act.reference in case.known.returned:
        return DirectAnswer("too_late")
    if kind == Kind.RESERVE:
        hold = case.known.holds.get(act.reference)
        if hold is None or any(counts[0] != counts[1] for counts in hold.lines.values()):
            return DirectAnswer("too_late")
        if hold.pinned and not act.ttl_ms:
            return DirectAnswer("pinned")
    return _operation(case, act.lines, available=1)


def _keep(case: _Case) -> DirectAnswer | JournalOperation:
    take = case.take
    if take is None or _mark(take) != case.act.mark:
        return DirectAnswer("too_late")
    return DirectAnswer("replay", row=take) if take.kept else _operation(case, ())


def _mark(take: OperationRow) -> str:
    return f"{take.position.epoch}-{take.position.sequence}"
