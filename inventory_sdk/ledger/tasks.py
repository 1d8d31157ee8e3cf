"""Task rows: ``run="later"`` functions, one after another within a group (merchant and order, else the operation).

A pending task blocks the younger ones of its group, also while it waits for its next try. A dead one does not: it has left the
queue, somebody was told, and the rest of the order must not wait for a person.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, or_, select, update

from inventory_sdk.ledger.protocol import Task, TaskFilter
from inventory_sdk.ledger.store import PENDING, Store, clean

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

DONE: Final = "done"
DEAD: Final = "dead"

_COLUMNS: Final = ("number", "name", "version", "arguments", "group_id", "operation_id", "merchant", "attempts", "receipt")


def row_columns(table: Any) -> list[Any]:
    """What a ``Task`` is made from, then its state, when it is due, and its last error."""
    return [*_columns(table), table.c.state, table.c.due_ms, table.c.error]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _columns(table: Any) -> list[Any]:
    return [table.c[name] for name in _COLUMNS]


async def due(connection: AsyncConnection, store: Store, limit: int, serves: TaskFilter | None = None) -> list[Task]:
    """See ``Ledger.due_tasks``.

    Page by page in the order of numbers, and the oldest of its group asked for per row: both cost what they find. One anti-join over
    all pending rows is the product of them wherever the statistics are older than the backlog, and they mostly are: 0.4 s for 1,000."""
    table = store.tables.task
    older = table.alias("older")
    found: list[Task] = []
    after, size = 0, limit
    while len(found) < limit:
        page = select(*_columns(table)).where(table.c.state == PENDING, table.c.due_ms <= _now_ms(), table.c.number > after)
        if serves is not None:
            wanted = or_(table.c.route.in_(serves.routes), table.c.merchant.in_(serves.also))
            page = page.where(wanted, table.c.merchant.not_in(serves.but_not))
        rows = page.order_by(table.c.number).limit(size).subquery("page")
        first = (
            select(func.min(older.c.number))
            .where(older.c.state == PENDING, older.c.merchant == rows.c.merchant, older.c.group_id == rows.c.group_id)
            .scalar_subquery()
        )
        read = (await connection.execute(select(rows, first.label("first")).order_by(rows.c.number))).all()
        found += [Task(*row[:-1]) for row in read if row.first == row.number]
        if len(read) < size:
            break
        after, size = read[-1].number, size * 2
    return found[:limit]


async def fail(connection: AsyncConnection, store: Store, task: Task, error: str, retry_in: float | None) -> None:
    """See ``Ledger.fail_task``; the caller commits."""
    table = store.tables.task
    due_ms = _now_ms() + int((retry_in or 0) * 1000)
    state = DEAD if retry_in is None else PENDING
    await connection.execute(
        update(table)
        .where(table.c.number == task.number, table.c.state == PENDING)
        .values(attempts=table.c.attempts + 1, due_ms=due_ms, error=clean(error), state=state)
    )


async def dead(connection: AsyncConnection, store: Store, limit: int) -> list[tuple[Task, str]]:
    """Dead letters with their last error, oldest first."""
    table = store.tables.task
    query = select(*_columns(table), table.c.error).where(table.c.state == DEAD).order_by(table.c.number).limit(limit)
    return [(Task(*row[:-1]), row[-1] or "") for row in await connection.execute(query)]


async def retry(connection: AsyncConnection, store: Store, number: int) -> bool:
    """See ``Pages.retry_task``; the caller commits. The last error stays with it until the next one."""
    table = store.tables.task
    done = await connection.execute(
        update(table).where(table.c.number == number, table.c.state == DEAD).values(state=PENDING, attempts=0, due_ms=_now_ms())
    )
    return bool(done.rowcount)
