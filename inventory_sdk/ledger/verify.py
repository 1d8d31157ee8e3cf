"""Promise 6 over all rows, in set-based SQL: what is supplied adds up, and every unit's way is on record.

Each check is one query that returns the rows that break it; the database does the work, and only what is broken travels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Select, and_, case, func, or_, select

from inventory_sdk.ledger.decide import APPLIED, HELD, UNDONE
from inventory_sdk.ledger.schema import COUNTERS
from inventory_sdk.ledger.store import Store
from inventory_sdk.model import LEDGER_DELTAS, Kind

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

SHOWN: Final = 20
"""Broken rows named per check."""


async def verify(connection: AsyncConnection, store: Store) -> list[str]:
    """What is broken, in words, at most ``SHOWN`` rows per check; empty when all is well."""
    broken: list[str] = []
    for words, query in _checks(store):
        found = await connection.execute(query.limit(SHOWN))
        broken += [words.format(*(repr(value) if isinstance(value, str) else value for value in row)) for row in found]
    return broken


def _checks(store: Store) -> Iterator[tuple[str, Select[*tuple[Any, ...]]]]:
    yield _adds_up(store)
    yield _balanced(store)
    yield _linked(store)
    yield _begun(store)
    yield _ended(store)
    yield _line_deltas(store)
    yield _lines_counted(store)
    yield _reservation_lines(store)
    yield _reservation_states(store)
    yield _reserved(store)
    yield _watermarks(store)


def _adds_up(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    stock = store.tables.stock.c
    total = stock.available + stock.reserved + stock.sold + stock.written_off
    negative = or_(*(stock[name] < 0 for name in COUNTERS))
    query = select(stock.merchant, stock.sku, stock.supplied, total).where(or_(stock.supplied != total, negative))
    return "merchant {0}, sku {1}: supplied {2}, but available + reserved + sold + written off = {3}, or one is negative", query


def _balanced(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    change = store.tables.change.c
    wrong = or_(*(change[f"{name}_before"] + change[f"{name}_delta"] != change[f"{name}_after"] for name in COUNTERS))
    query = select(change.merchant, change.sku, change.version).where(wrong)
    return "merchant {0}, sku {1}: change {2} is not before + delta = after", query


def _linked(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    change = store.tables.change
    earlier = change.alias("earlier")
    same = and_(earlier.c.merchant == change.c.merchant, earlier.c.sku == change.c.sku)
    joined = change.outerjoin(earlier, and_(same, earlier.c.version == change.c.version - 1))
    wrong = or_(earlier.c.version.is_(None), *(earlier.c[f"{name}_after"] != change.c[f"{name}_before"] for name in COUNTERS))
    query = select(change.c.merchant, change.c.sku, change.c.version).select_from(joined).where(change.c.version > 1, wrong)
    return "merchant {0}, sku {1}: change {2} does not begin where the one before it ended", query


def _begun(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    change = store.tables.change.c
    wrong = or_(change.version < 1, *(change[f"{name}_before"] != 0 for name in COUNTERS))
    query = select(change.merchant, change.sku, change.version).where(change.version <= 1, wrong)
    return "merchant {0}, sku {1}: change {2} does not begin at zero", query


def _ended(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    stock, change = store.tables.stock, store.tables.change
    joined = stock.outerjoin(
        change, and_(change.c.merchant == stock.c.merchant, change.c.sku == stock.c.sku, change.c.version == stock.c.version)
    )
    newer = change.alias("newer")
    beyond = (
        select(newer.c.version)
        .where(newer.c.merchant == stock.c.merchant, newer.c.sku == stock.c.sku, newer.c.version > stock.c.version)
        .exists()
    )
    wrong = or_(
        and_(stock.c.version > 0, change.c.version.is_(None)),
        *(func.coalesce(change.c[f"{name}_after"], 0) != stock.c[name] for name in COUNTERS),
        beyond,
    )
    query = select(stock.c.merchant, stock.c.sku, stock.c.version).select_from(joined).where(wrong)
    return "merchant {0}, sku {1}: the stock row (version {2}) is not what its last change left", query


def _line_deltas(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    """A line moved by exactly its quantity, in the way of its kind. Undo and open have other ways."""
    change, operation = store.tables.change, store.tables.operation
    kinds = [kind for kind in LEDGER_DELTAS if kind not in (Kind.OPEN, Kind.ADJUST)]
    wrong = []
    for name in COUNTERS:
        factor = case({kind: getattr(LEDGER_DELTAS[kind], name) for kind in kinds}, value=operation.c.kind, else_=0)
        wrong.append(change.c[f"{name}_delta"] != factor * change.c.quantity)
    query = (
        select(change.c.partition, change.c.epoch, change.c.seq, change.c.index, change.c.merchant, change.c.sku)
        .select_from(change.join(operation, _same_operation(change, operation)))
        .where(operation.c.kind.in_(kinds), or_(*wrong))
    )
    return "operation {0}/{1}-{2}-{3}: the line of merchant {4}, sku {5} did not move by its quantity", query


def _lines_counted(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    change, operation = store.tables.change, store.tables.operation
    counted = (
        select(change.c.partition, change.c.epoch, change.c.seq, change.c.index, func.count().label("lines"))
        .group_by(change.c.partition, change.c.epoch, change.c.seq, change.c.index)
        .subquery()
    )
    moving = and_(operation.c.status.in_([APPLIED, UNDONE]), operation.c.kind.in_([*(kind for kind in LEDGER_DELTAS), Kind.UNDO.value]))
    expected = case((moving, operation.c.lines), else_=0)
    found = func.coalesce(counted.c.lines, 0)
    query = (
        select(operation.c.partition, operation.c.epoch, operation.c.seq, operation.c.index, expected, found)
        .select_from(operation.outerjoin(counted, _same_operation(counted, operation)))
        .where(expected != found)
    )
    return "operation {0}/{1}-{2}-{3}: {4} lines moved, but there are {5} change rows", query


def _same_operation(left: Any, right: Any) -> Any:
    return and_(*(left.c[name] == right.c[name] for name in ("partition", "epoch", "seq", "index")))


def _reservation_lines(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    line, header = store.tables.reservation_line, store.tables.reservation
    query = (
        select(line.c.key, line.c.sku)
        .select_from(line.outerjoin(header, header.c.key == line.c.key))
        .where(or_(header.c.key.is_(None), line.c.original != line.c.open + line.c.confirmed + line.c.released))
    )
    return "reservation {0}: the line of sku {1} has no reservation, or is not open + confirmed + released", query


def _reservation_states(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    line, header = store.tables.reservation_line, store.tables.reservation
    is_open = select(line.c.key).where(line.c.key == header.c.key, line.c.open > 0).exists()
    # What is open of a call over several partitions may be open elsewhere.
    alone = header.c.elsewhere.is_(None)
    wrong = or_(and_(header.c.state == HELD, ~is_open, alone), and_(header.c.state != HELD, is_open))
    return "reservation {0} is {1}, but its open lines say otherwise", select(header.c.key, header.c.state).where(wrong)


def _reserved(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    stock, line = store.tables.stock, store.tables.reservation_line
    held = (
        select(line.c.merchant, line.c.sku, func.sum(line.c.open).label("units"))
        .where(line.c.open > 0)
        .group_by(line.c.merchant, line.c.sku)
        .subquery()
    )
    joined = stock.outerjoin(held, and_(held.c.merchant == stock.c.merchant, held.c.sku == stock.c.sku))
    units = func.coalesce(held.c.units, 0)
    query = select(stock.c.merchant, stock.c.sku, stock.c.reserved, units).select_from(joined).where(stock.c.reserved != units)
    return "merchant {0}, sku {1}: {2} reserved, but its reservations hold {3}", query


def _watermarks(store: Store) -> tuple[str, Select[*tuple[Any, ...]]]:
    partition, entry = store.tables.partition, store.tables.entry
    counted = (
        select(entry.c.partition, entry.c.epoch, func.max(entry.c.seq).label("last"), func.count().label("entries"))
        .group_by(entry.c.partition, entry.c.epoch)
        .subquery()
    )
    joined = partition.outerjoin(counted, and_(counted.c.partition == partition.c.partition, counted.c.epoch == partition.c.epoch))
    last, entries = func.coalesce(counted.c.last, 0), func.coalesce(counted.c.entries, 0)
    query = (
        select(partition.c.partition, partition.c.epoch, partition.c.applied, last, entries)
        .select_from(joined)
        .where(or_(partition.c.applied != last, partition.c.applied != entries))
    )
    return "partition {0}, epoch {1}: the watermark is {2}, the last entry {3}, and there are {4} entries", query
