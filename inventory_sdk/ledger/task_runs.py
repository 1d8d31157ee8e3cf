"""Later-functions in one transaction: each is marked, then called in a savepoint, and one that fails is undone alone.

A function costs its mark, a savepoint and its release; the connection, the commit and the disk are shared. The mark comes first and
one by one: should a function end the transaction by force, its own writes and its mark are committed together, and the tasks behind
it are still pending. What was marked is counted before the commit: a database that gave the transaction up under a function which
went on all the same (MariaDB does after a deadlock) has dropped the marks, and then nothing may be kept.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, event, func, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from inventory_sdk.ledger.faults import reason_of
from inventory_sdk.ledger.protocol import Task, TaskRun, TasksSpoilt, TaskStuck
from inventory_sdk.ledger.store import PENDING, Store
from inventory_sdk.ledger.tasks import DONE

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

NUMBER: Final = "task_number"


def always() -> bool:
    """Go on with the next task."""
    return True


class TaskSession(Session):
    """A function's session. ``kept``: it has committed, so the savepoint that it began in is gone."""

    kept = False


@event.listens_for(TaskSession, "after_commit")
def _committed(session: TaskSession) -> None:
    # Fires for the function's own savepoints as well: those are still inside.
    session.kept = session.kept or not session.in_nested_transaction()


class _Statements:
    """``seconds`` that a connection's statements have taken so far, without those that failed."""

    def __init__(self, connection: AsyncConnection) -> None:
        self.seconds = 0.0
        self._since = 0.0
        event.listen(connection.sync_connection, "before_cursor_execute", self._begins)
        event.listen(connection.sync_connection, "after_cursor_execute", self._ends)

    def _begins(self, *_: Any) -> None:
        self._since = time.perf_counter()

    def _ends(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._since


async def run(
    connection: AsyncConnection,
    store: Store,
    tasks: Sequence[Task],
    call: Callable[[Task, AsyncSession], Awaitable[None]],
    more: Callable[[], bool],
    most: int,
) -> list[TaskRun]:
    """See ``Ledger.run_tasks``; the caller commits."""
    table = store.tables.task
    query = select(table.c.number).where(_among(table, tasks), table.c.state == PENDING).order_by(table.c.number).limit(most)
    ours = set((await connection.execute(query.with_for_update(skip_locked=True))).scalars())
    one = update(table).where(table.c.number == bindparam(NUMBER))
    mark = one.where(table.c.state == PENDING).values(state=DONE, attempts=table.c.attempts + 1)
    unmark = one.where(table.c.state == DONE).values(state=PENDING, attempts=table.c.attempts - 1)
    root = connection.sync_connection.get_transaction()  # type: ignore[union-attr]
    statements = _Statements(connection)
    runs: list[TaskRun] = []
    for task in tasks:
        if task.number not in ours:
            continue
        if runs and not more():
            break
        if (await connection.execute(mark, {NUMBER: task.number})).rowcount != 1:
            raise TasksSpoilt(f"task {task.number} is no longer ours: the database ended the transaction under the one before it")
        began, spent = time.perf_counter(), statements.seconds
        error = await _called(connection, task, call, alone=len(tasks) == 1)
        if root is None or connection.sync_connection.get_transaction() is not root or not root.is_active:  # type: ignore[union-attr]
            raise TasksSpoilt(f"task {task.name!r} ended the worker's transaction: use its session, not its connection's root") from error
        if error is not None and (await connection.execute(unmark, {NUMBER: task.number})).rowcount != 1:
            raise TasksSpoilt(f"task {task.name!r} ended the worker's transaction") from error
        runs.append(TaskRun(task, error, time.perf_counter() - began - (statements.seconds - spent)))
    done = [each.task for each in runs if each.error is None]
    if done:
        marked = select(func.count()).select_from(table).where(_among(table, done), table.c.state == DONE)
        if (await connection.execute(marked)).scalar_one() != len(done):
            raise TasksSpoilt("the database rolled the transaction back under a later-function that went on: nothing is kept")
    return runs


def _among(table: Any, tasks: Sequence[Task]) -> Any:
    """By number. Filled up to a multiple of 32 with the last: each length would be another statement for the driver to prepare."""
    numbers = [task.number for task in tasks]
    return table.c.number.in_(numbers + numbers[-1:] * (-len(numbers) % 32 if len(numbers) > 1 else 0))


async def _called(
    connection: AsyncConnection, task: Task, call: Callable[[Task, AsyncSession], Awaitable[None]], *, alone: bool
) -> Exception | None:
    """The function's error, once its writes are undone; raised where they can't be without those of the others."""
    session = AsyncSession(
        bind=connection, sync_session_class=TaskSession, join_transaction_mode="create_savepoint", expire_on_commit=False
    )
    try:
        await call(task, session)
        await session.commit()
    except TaskStuck:
        await connection.invalidate()
        raise
    except Exception as error:
        # Still in its savepoint: the release was refused, and SQLAlchemy does not roll back to what it could not release.
        undone = await _closed(session) and connection.sync_connection.get_nested_transaction() is None  # type: ignore[union-attr]
        if alone or not undone or (isinstance(error, DBAPIError) and reason_of(error) is not None):
            raise
        if isinstance(session.sync_session, TaskSession) and session.sync_session.kept:
            raise TasksSpoilt(f"task {task.name!r} committed and failed afterwards: {type(error).__name__}: {error}") from error
        return error
    await session.close()
    return None


async def _closed(session: AsyncSession) -> bool:
    """Whether its savepoint could be rolled back to. A database that has given the transaction up has none any more, and says so
    in an error that would hide why."""
    try:
        await session.close()
    except Exception:  # noqa: BLE001 - whatever it is, the whole transaction is rolled back now
        return False
    return True
