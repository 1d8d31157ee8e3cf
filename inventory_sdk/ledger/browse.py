"""``pages.Pages`` for the SQL ledger: short readings that each walk an index from where the last page ended.

The indexes are in ``schema.py``: operations by (merchant, at_ms) and (order_id, at_ms), changes by their key, stock by (sku, merchant).
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import and_, func, insert, literal, select, tuple_, update

from inventory_sdk.ledger import rows, tasks
from inventory_sdk.ledger.engines import Engines
from inventory_sdk.ledger.pages import (
    AuditRow,
    ChangeRow,
    Counters,
    CreditLine,
    EntryRow,
    Life,
    Moment,
    Page,
    TaskRow,
    VoidRow,
)
from inventory_sdk.ledger.protocol import OperationRow, StockRow, Task
from inventory_sdk.ledger.schema import COUNTERS, ID_BYTES, KEY_BYTES
from inventory_sdk.ledger.store import PENDING, Store, clean, dumps
from inventory_sdk.model import Position, key_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

MOST_MERCHANTS: Final = 1000
"""In which an operation is looked for by its id alone."""
RELATIVES: Final = 100
BEGUN: Final = "begun"
MAX_OUTCOME: Final = 2000

_ORDER: Final = ("at_ms", "partition", "epoch", "seq", "index")
_PLACE: Final = ("partition", "epoch", "seq", "index")
_CHANGE: Final = ("merchant", "sku", "version", "partition", "epoch", "seq", "index", "line", "quantity")


class SqlPages:
    """Reads from the ledger's own engine. Implements ``pages.Pages``, which documents the methods."""

    def __init__(self, engines: Engines, store: Store) -> None:
        self._engines = engines
        self._store = store

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        async with self._engines.read() as connection:
            if self._store.dialect == "postgresql":
                # A plan that was made while the tables were small would scan them for ever after.
                await connection.execute(select(func.set_config("plan_cache_mode", "force_custom_plan", True)))
            yield connection

    # Stock -------------------------------------------------------------------------------------------------------------------

    async def merchants(self, limit: int = 100, after: str = "") -> list[str]:
        """One step of the index per merchant, however many SKUs each has."""
        async with self._reading() as connection:
            return await self._merchants(connection, limit, after)

    async def _merchants(self, connection: AsyncConnection, limit: int, after: str) -> list[str]:
        stock = self._store.tables.stock
        least = func.min(stock.c.merchant)
        names = select(least.label("merchant"), literal(1).label("place")).where(stock.c.merchant > after).cte("names", recursive=True)
        following = select(least).where(stock.c.merchant > names.c.merchant).scalar_subquery()
        further = names.c.merchant.is_not(None), names.c.place < limit
        names = names.union_all(select(following, names.c.place + 1).where(*further))
        query = select(names.c.merchant).where(names.c.merchant.is_not(None)).order_by(names.c.place)
        return [_text(name) for name in (await connection.execute(query)).scalars()]

    async def products(
        self, *, merchant: str | None = None, prefix: str = "", limit: int = 50, after: tuple[str, str] | None = None
    ) -> Page[StockRow, tuple[str, str]]:
        """With a merchant in order of its SKUs; without one, SKU by SKU over all merchants."""
        table = self._store.tables.stock
        order = (table.c.merchant, table.c.sku) if merchant is not None else (table.c.sku, table.c.merchant)
        query = select(*[table.c[name] for name in ("merchant", "sku", *COUNTERS, "version")]).order_by(*order)
        if merchant is not None:
            query = query.where(table.c.merchant == merchant)
        if prefix:
            query = query.where(table.c.sku >= prefix)
            if (above := _above(prefix)) is not None:
                query = query.where(table.c.sku < above)
        if after is not None and merchant is not None:
            query = query.where(table.c.sku > after[1])
        elif after is not None:
            query = query.where(table.c.sku >= after[1], tuple_(*order) > tuple_(*_bound((after[1], after[0]), order)))
        async with self._reading() as connection:
            found = [StockRow(*row) for row in await connection.execute(query.limit(limit + 1))]
        return _page(found, limit, lambda row: (row.merchant, row.sku))

    # Operations ----------------------------------------------------------------------------------------------------------------

    async def operations(
        self, *, merchant: str | None = None, order: str | None = None, limit: int = 50, before: Moment | None = None
    ) -> Page[OperationRow, Moment]:
        """Newest first."""
        if merchant is None and order is None:
            raise ValueError("operations of a merchant, or of an order, or of both")
        async with self._reading() as connection:
            found = [rows.operation_row(row) for row in await connection.execute(self._listed(merchant, order, limit + 1, before))]
        return _page(found, limit, moment)

    def _listed(self, merchant: str | None, order: str | None, limit: int, before: Moment | None) -> Any:
        table = self._store.tables.operation
        columns = [table.c[name] for name in _ORDER]
        query = select(*rows.operation_columns(self._store)).order_by(*[column.desc() for column in columns]).limit(limit)
        if merchant is not None:
            query = query.where(table.c.merchant == merchant)
        if order is not None:
            query = query.where(table.c.order_id == order)
        # MariaDB would rather skip half of an order from its newest end than begin where the page does.
        walked = f"FORCE INDEX FOR ORDER BY ({self._store.tables.prefix}operation_{'order' if order is not None else 'time'})"
        query = query.with_hint(table, walked, "mysql").with_hint(table, walked, "mariadb")
        if before is not None:
            # The time once more by itself: that is what the index can begin from.
            query = query.where(table.c.at_ms <= before.at_ms, tuple_(*columns) < tuple_(*_bound(before, columns)))
        return query

    async def named(self, name: str, merchant: str | None = None) -> list[OperationRow]:
        """By claim, and by the claim of the reserve for a reservation's name: both are the same text. Refused operations have no claim:
        they are found by what took them back."""
        if len(name.encode()) > ID_BYTES:
            return []
        async with self._reading() as connection:
            homes = [merchant] if merchant is not None else await self._merchants(connection, MOST_MERCHANTS, "")
            keys = [key_of(home, name) for home in homes]
            wanted = [(key,) for key in keys if _fits(key)]
            bulk, tables = self._store.bulk, self._store.tables
            found = list(await bulk.select(connection, tables.operation, rows.OPERATION_COLUMNS, ("claim",), wanted))
            voids = await bulk.select(connection, tables.void, _PLACE, ("key",), wanted)
            places = sorted({tuple(row) for row in voids}, reverse=True)[:RELATIVES]
            if places:
                found += await bulk.select(connection, tables.operation, rows.OPERATION_COLUMNS, _PLACE, places)
        by_place = {(row.position, row.index): row for row in map(rows.operation_row, found)}
        return sorted(by_place.values(), key=lambda row: (row.key, row.status == "rejected", row.position, row.index))

    async def life(self, position: Position, index: int) -> Life | None:
        """A handful of readings by key in one transaction: they all see the same moment as far as the database's level allows."""
        table = self._store.tables.operation
        query = select(*rows.operation_columns(self._store), table.c.reason, table.c.claim).where(
            table.c.partition == position.partition,
            table.c.epoch == position.epoch,
            table.c.seq == position.sequence,
            table.c.index == index,
        )
        async with self._reading() as connection:
            row = (await connection.execute(query)).first()
            if row is None:
                return None
            operation = rows.operation_row(row)
            # A reserve's key names its reservation, what ends one refers to it. (A take_back refers to a sale.)
            hold = operation.reference or operation.key
            holds = await rows.holds(connection, self._store, [hold])
            return Life(
                operation=operation,
                reason=row[-2] or "",
                claims=row[-1] is not None,
                entry=await self._entry(connection, position),
                passed=await self._passed(connection, position),
                changes=await self._changes_of(connection, position, index),
                reservation=rows.reservation_row(holds[hold]) if hold in holds else None,
                credits=await self._credits(connection, position) if position.epoch == 0 else (),
                void=await self._void(connection, position, index),
                tasks=await self._tasks(connection, operation),
                relatives=await self._relatives(connection, operation, hold),
            )

    async def _entry(self, connection: AsyncConnection, position: Position) -> EntryRow | None:
        table = self._store.tables.entry
        query = select(table.c.nonce, table.c.at_ms, table.c.operations).where(*_at(table, position))
        row = (await connection.execute(query)).first()
        return None if row is None else EntryRow(*row)

    async def _passed(self, connection: AsyncConnection, position: Position) -> int:
        table = self._store.tables.partition
        query = select(table.c.applied).where(table.c.partition == position.partition, table.c.epoch == position.epoch)
        return int((await connection.execute(query)).scalar() or 0)

    async def _changes_of(self, connection: AsyncConnection, position: Position, index: int) -> list[ChangeRow]:
        table = self._store.tables.change
        query = select(*_change_columns(table)).where(*_at(table, position), table.c.index == index).order_by(table.c.line)
        return [_change(row) for row in await connection.execute(query)]

    async def _credits(self, connection: AsyncConnection, position: Position) -> list[CreditLine]:
        table = self._store.tables.credit
        query = (
            select(table.c.merchant, table.c.sku, table.c.quantity, table.c.epoch, table.c.state)
            .where(table.c.partition == position.partition, table.c.seq == position.sequence)
            .order_by(table.c.line)
        )
        return [CreditLine(*row) for row in await connection.execute(query)]

    async def _void(self, connection: AsyncConnection, position: Position, index: int) -> VoidRow | None:
        table = self._store.tables.void
        query = select(table.c.kind, table.c.deltas, table.c.freeze, table.c.state).where(*_at(table, position), table.c.index == index)
        row = (await connection.execute(query)).first()
        return None if row is None else VoidRow(row[0], json.loads(row[1]), bool(row[2]), row[3])

    async def _tasks(self, connection: AsyncConnection, operation: OperationRow) -> list[TaskRow]:
        table = self._store.tables.task
        query = (
            select(*tasks.row_columns(table))
            .where(*_at(table, operation.position), table.c.index == operation.index)
            .order_by(table.c.number)
        )
        return [_task(row) for row in await connection.execute(query)]

    async def _relatives(self, connection: AsyncConnection, operation: OperationRow, hold: str) -> list[OperationRow]:
        table = self._store.tables.operation
        columns = rows.operation_columns(self._store)
        found: dict[tuple[Position, int], OperationRow] = {}
        for condition in (table.c.claim == hold, table.c.reference == hold, table.c.reference == operation.key):
            for row in await connection.execute(select(*columns).where(condition).limit(RELATIVES)):
                other = rows.operation_row(row)
                found[other.position, other.index] = other
        found.pop((operation.position, operation.index), None)
        return sorted(found.values(), key=moment)[:RELATIVES]

    async def changes(self, merchant: str, sku: str, *, limit: int = 50, before: int | None = None) -> Page[ChangeRow, int]:
        """Newest first."""
        table, operation = self._store.tables.change, self._store.tables.operation
        same = [table.c[name] == operation.c[name] for name in ("partition", "epoch", "seq", "index")]
        query = (
            select(*_change_columns(table), operation.c.kind, operation.c.operation_id, operation.c.at_ms)
            .select_from(table.outerjoin(operation, and_(*same)))
            .where(table.c.merchant == merchant, table.c.sku == sku)
        )
        if before is not None:
            query = query.where(table.c.version < before)
        query = query.order_by(table.c.version.desc()).limit(limit + 1)
        async with self._reading() as connection:
            found = [_change(row) for row in await connection.execute(query)]
        return _page(found, limit, lambda change: change.version)

    # Later-functions -------------------------------------------------------------------------------------------------------------

    async def dead_tasks(self, *, limit: int = 50, before: int | None = None) -> Page[TaskRow, int]:
        """Newest first."""
        table = self._store.tables.task
        query = select(*tasks.row_columns(table)).where(table.c.state == tasks.DEAD)
        if before is not None:
            query = query.where(table.c.number < before)
        async with self._reading() as connection:
            found = [_task(row) for row in await connection.execute(query.order_by(table.c.number.desc()).limit(limit + 1))]
        return _page(found, limit, lambda row: row.task.number)

    async def waiting_tasks(self, most: int = 1000) -> tuple[int, int]:
        """(pending, dead)."""
        table = self._store.tables.task
        async with self._reading() as connection:
            counts = []
            for state in (PENDING, tasks.DEAD):
                some = select(table.c.number).where(table.c.state == state).limit(most).subquery()
                counts.append(int((await connection.execute(select(func.count()).select_from(some))).scalar_one()))
        return counts[0], counts[1]

    async def retry_task(self, number: int) -> bool:
        """True when it is due again."""
        async with self._engines.write() as connection:
            return await tasks.retry(connection, self._store, number)

    # What people did -----------------------------------------------------------------------------------------------------------------

    async def audit(self, *, limit: int = 50, before: int | None = None) -> Page[AuditRow, int]:
        """Newest first."""
        table = self._store.tables.audit
        names = ("number", "actor", "kind", "merchant", "sku", "operation_id", "details", "created_ms")
        query = select(*[table.c[name] for name in names])
        if before is not None:
            query = query.where(table.c.number < before)
        async with self._reading() as connection:
            found = [_audit(row) for row in await connection.execute(query.order_by(table.c.number.desc()).limit(limit + 1))]
        return _page(found, limit, lambda row: row.number)

    async def begin_act(
        self, actor: str, kind: str, *, merchant: str = "", sku: str = "", operation_id: str = "", details: Mapping[str, object]
    ) -> int:
        """The row's number."""
        table = self._store.tables.audit
        async with self._engines.write() as connection:
            values = {
                "merchant": merchant,
                "sku": sku or None,
                "kind": kind,
                "actor": actor,
                "operation_id": operation_id or None,
                "details": dumps({**details, "outcome": BEGUN}),
                "created_ms": await self._store.now_ms(connection),
            }
            done = await connection.execute(insert(table).values(**values))
            number: Any = done.inserted_primary_key
            return int(number[0])

    async def end_act(self, number: int, outcome: str) -> None:
        """Only a row that was begun changes: what is written down stays."""
        table = self._store.tables.audit
        async with self._engines.write() as connection:
            query = select(table.c.details).where(table.c.number == number).with_for_update()
            details = json.loads((await connection.execute(query)).scalar_one())
            if details.get("outcome") == BEGUN:
                changed = dumps({**details, "outcome": clean(outcome)[:MAX_OUTCOME]})
                await connection.execute(update(table).where(table.c.number == number).values(details=changed))


def moment(row: OperationRow) -> Moment:
    """Where this row stands in a list."""
    return Moment(row.at_ms, *row.position, row.index)


def _page(found: list[Any], limit: int, cursor: Any) -> Page[Any, Any]:
    """``found`` has one row more than asked where there is another page."""
    return Page(found[:limit], cursor(found[limit - 1]) if len(found) > limit else None)


def _above(prefix: str) -> str | None:
    """The least text that no longer begins with ``prefix``, in order of UTF-8 bytes; None where there is none."""
    for at in range(len(prefix) - 1, -1, -1):
        code = ord(prefix[at]) + 1
        if code == 0xD800:
            code = 0xE000  # surrogates are no characters
        if code <= 0x10FFFF:
            return prefix[:at] + chr(code)
    return None


def _fits(key: str) -> bool:
    return len(key.encode()) <= KEY_BYTES


def _bound(values: Iterable[Any], columns: Sequence[Any]) -> list[Any]:
    """Parameters with the columns' types, so that keys are sent as the database stores them."""
    return [literal(value, column.type) for value, column in zip(values, columns, strict=True)]


def _text(value: Any) -> str:
    """MariaDB forgets a key's type in a recursive query."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _at(table: Any, position: Position) -> tuple[Any, ...]:
    return table.c.partition == position.partition, table.c.epoch == position.epoch, table.c.seq == position.sequence


def _change_columns(table: Any) -> list[Any]:
    counters = [f"{name}_{what}" for what in ("delta", "before", "after") for name in COUNTERS]
    return [table.c[name] for name in (*_CHANGE, *counters)]


def _change(row: Any) -> ChangeRow:
    merchant, sku, version, partition, epoch, seq, index, line, quantity = row[:9]
    numbers, of = row[9:24], row[24:]
    return ChangeRow(
        merchant,
        sku,
        version,
        Position(partition, epoch, seq),
        index,
        line,
        quantity,
        Counters(*numbers[:5]),
        Counters(*numbers[5:10]),
        Counters(*numbers[10:]),
        *(of if of and of[0] is not None else ()),
    )


def _task(row: Any) -> TaskRow:
    *task, state, due_ms, error = row
    return TaskRow(Task(*task), state, due_ms, error or "")


def _audit(row: Any) -> AuditRow:
    number, actor, kind, merchant, sku, operation_id, raw, at_ms = row
    details = _details(raw)
    outcome = str(details.pop("outcome", "done"))
    return AuditRow(number, actor, kind, merchant, sku or "", operation_id or "", outcome, details, at_ms)


def _details(raw: str) -> dict[str, object]:
    """Other parts write here too, in their own way."""
    try:
        found = json.loads(raw)
    except ValueError:
        return {"text": raw}
    return found if isinstance(found, dict) else {"text": found}
