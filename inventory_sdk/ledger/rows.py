"""Rows as data: what is read from the tables, for the rooms that decide and for those who ask."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, literal, or_, select

from inventory_sdk.ledger.decide import Hold, Stock, Take
from inventory_sdk.ledger.protocol import Credit, OperationRow, ReservationRow, StockRow, Void
from inventory_sdk.ledger.schema import COUNTERS
from inventory_sdk.ledger.store import Store
from inventory_sdk.model import PART, SEPARATOR, Position, key_of, split_key

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from inventory_sdk.ledger.dialects import Lock

OPERATION_COLUMNS: Final = (
    "partition", "epoch", "seq", "index", "merchant", "operation_id", "kind", "fingerprint", "order_id", "reference",
    "receipt", "status", "kept", "at_ms",
)  # fmt: skip
_HEADER: Final = ("key", "partition", "epoch", "seq", "state", "fingerprint", "order_id", "expires_at", "pinned", "elsewhere")
_LINE: Final = ("key", "merchant", "sku", "original", "open", "confirmed", "released")


def call_of(key: str) -> str:
    """The key of the call, where this is a part's."""
    return key.partition(PART)[0]


def of_call(column: Any, call: str) -> Any:
    """Whether this is the key of the call or of a part of it: a range of bytes that nothing else is in."""
    first, last = (literal(call + end, column.type) for end in (PART, f"{PART[:-1]}\x20"))
    return or_(column == literal(call, column.type), and_(column >= first, column < last))


def pairs(fields: Iterable[str]) -> list[tuple[str, str]]:
    """(merchant, sku) of stock fields."""
    return [split_key(field) for field in fields]


async def claims(connection: AsyncConnection, store: Store, keys: Iterable[str]) -> dict[str, Take]:
    """The operations that hold these claims."""
    columns = ("claim", "kind", "epoch", "seq", "index", "receipt", "order_id")
    found = await store.bulk.select(connection, store.tables.operation, columns, ("claim",), [(key,) for key in keys])
    return {
        claim: Take(kind, epoch, seq, index, json.loads(receipt)[0], order or "", None)
        for claim, kind, epoch, seq, index, receipt, order in found
    }


async def stock(connection: AsyncConnection, store: Store, fields: Iterable[str], lock: Lock) -> dict[str, Stock]:
    """Stock rows by field, locked in order of (merchant, sku)."""
    columns = ("merchant", "sku", *COUNTERS, "version")
    found = await store.bulk.select(connection, store.tables.stock, columns, ("merchant", "sku"), pairs(fields), lock)
    return {row[0] + SEPARATOR + row[1]: Stock(row[0], row[1], row[2:7], row[7]) for row in found}


async def admissions(connection: AsyncConnection, store: Store, fields: Iterable[str]) -> dict[str, str]:
    """Who sells these fields, of those that have a row."""
    columns = ("merchant", "sku", "admission")
    found = await store.bulk.select(connection, store.tables.stock, columns, ("merchant", "sku"), pairs(fields))
    return {merchant + SEPARATOR + sku: place for merchant, sku, place in found}


async def partitions(connection: AsyncConnection, store: Store, fields: Iterable[str]) -> dict[str, int]:
    """In which partition these are, of those that have a row."""
    columns = ("merchant", "sku", "partition")
    found = await store.bulk.select(connection, store.tables.stock, columns, ("merchant", "sku"), pairs(fields))
    return {merchant + SEPARATOR + sku: place for merchant, sku, place in found}


async def holds(connection: AsyncConnection, store: Store, keys: Iterable[str]) -> dict[str, Hold]:
    """Reservations by key, with their lines."""
    asked = [(key,) for key in keys]
    headers = await store.bulk.select(connection, store.tables.reservation, _HEADER, ("key",), asked)
    if not headers:
        return {}
    found = {
        key: Hold(
            key,
            state,
            mark,
            partition,
            epoch,
            seq,
            order or "",
            expires_at,
            bool(pinned),
            {},
            stored=True,
            foreign=json.loads(elsewhere) if elsewhere else {},
        )
        for key, partition, epoch, seq, state, mark, order, expires_at, pinned, elsewhere in headers
    }
    lines = await store.bulk.select(connection, store.tables.reservation_line, _LINE, ("key",), [(key,) for key in found])
    for key, merchant, sku, *counts in lines:
        found[key].lines[merchant + SEPARATOR + sku] = counts
    return found


def reservation_row(hold: Hold) -> ReservationRow:
    """The hold as the protocol gives it."""
    lines: list[Any] = []
    for field in sorted(hold.lines):
        lines += [field, *hold.lines[field]]
    foreign: list[Any] = []
    for field in sorted(hold.foreign):
        foreign += [field, *hold.foreign[field]]
    return ReservationRow(
        key=hold.key,
        state=hold.state,
        fingerprint=hold.fingerprint,
        position=Position(hold.partition, hold.epoch, hold.seq),
        order=hold.order,
        expires_at=hold.expires_at,
        pinned=hold.pinned,
        lines=tuple(lines),
        foreign=tuple(foreign),
    )


def operation_columns(store: Store) -> list[Any]:
    """What ``operation_row`` reads."""
    return [store.tables.operation.c[name] for name in OPERATION_COLUMNS]


def operation_row(row: Sequence[Any]) -> OperationRow:
    """A row of ``operation_columns`` as data."""
    partition, epoch, seq, index, merchant, operation_id, kind, mark, order, reference, receipt, status, kept, at_ms = row[:14]
    lines, remaining, *parts = json.loads(receipt)
    return OperationRow(
        position=Position(partition, epoch, seq),
        index=index,
        key=key_of(merchant, operation_id),
        kind=kind,
        fingerprint=mark,
        order=order or "",
        reference=reference or "",
        lines=tuple(lines),
        remaining=tuple(remaining),
        status=status,
        kept=bool(kept),
        at_ms=at_ms,
        parts=tuple(tuple(part) for part in parts[0]) if parts else (),
    )


async def operation(connection: AsyncConnection, store: Store, key: str) -> OperationRow | None:
    """The operation that holds this claim."""
    found = await connection.execute(select(*operation_columns(store)).where(store.tables.operation.c.claim == key))
    row = found.first()
    return None if row is None else operation_row(row)


async def operations_at(connection: AsyncConnection, store: Store, positions: Iterable[Position]) -> list[OperationRow]:
    """All operations of these entries, in journal order."""
    found = await store.bulk.select(
        connection, store.tables.operation, OPERATION_COLUMNS, ("partition", "epoch", "seq"), {tuple(position) for position in positions}
    )
    return sorted((operation_row(row) for row in found), key=lambda row: (row.position, row.index))


async def stock_rows(connection: AsyncConnection, store: Store, fields: Iterable[str]) -> list[StockRow]:
    """The rows that exist, sorted."""
    found = await stock(connection, store, set(fields), "")
    return [StockRow(row.merchant, row.sku, *row.after()) for row in found.values()]


async def all_stock(connection: AsyncConnection, store: Store, merchant: str | None) -> list[StockRow]:
    """Every row, of one merchant if given, sorted."""
    table = store.tables.stock
    columns = [table.c[name] for name in ("merchant", "sku", *COUNTERS, "version")]
    query = select(*columns).order_by(table.c.merchant, table.c.sku)
    if merchant is not None:
        query = query.where(table.c.merchant == merchant)
    return [StockRow(*row) for row in await connection.execute(query)]


async def pending_credits(
    connection: AsyncConnection, store: Store, partition: int, epoch: int, seqs: Iterable[int] | None = None
) -> list[Credit]:
    """Credits of this epoch that Redis has not journaled yet, in order; only those in ``seqs`` if given."""
    table = store.tables.credit
    query = (
        select(table.c.seq, table.c.key, table.c.merchant, table.c.sku, table.c.quantity)
        .where(table.c.partition == partition, table.c.epoch == epoch, table.c.state == "pending")
        .order_by(table.c.seq, table.c.line)
    )
    if seqs is not None:
        query = query.where(table.c.seq.in_(list(seqs)))
    made: dict[int, tuple[str, list[Any]]] = {}
    for seq, key, merchant, sku, quantity in await connection.execute(query):
        made.setdefault(seq, (key, []))[1].extend((key_of(merchant, sku), quantity))
    return [Credit(Position(partition, 0, seq), epoch, key, tuple(lines)) for seq, (key, lines) in made.items()]


async def pending_voids(connection: AsyncConnection, store: Store, partition: int, epoch: int) -> list[Void]:
    """Voids of this epoch that Redis has not journaled yet, in order."""
    table = store.tables.void
    query = (
        select(table.c.seq, table.c.index, table.c.key, table.c.kind, table.c.reference, table.c.deltas, table.c.freeze)
        .where(table.c.partition == partition, table.c.epoch == epoch, table.c.state == "pending")
        .order_by(table.c.seq, table.c.index)
    )
    return [
        Void(Position(partition, epoch, seq), index, key, kind, reference or "", tuple(json.loads(deltas)), bool(freeze))
        for seq, index, key, kind, reference, deltas, freeze in await connection.execute(query)
    ]
