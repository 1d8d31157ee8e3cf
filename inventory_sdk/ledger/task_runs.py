"""Later-functions in one transaction: each is marked, then called in a savepoint, and one that fails is undone alone.

The connection, the commit and the wait for the disk are shared. What is left per function is round trips, so two of them are spared:
savepoints are not released (the commit does that), and asyncpg takes the mark and the savepoint in one.

The mark comes before the function's first statement, one by one: should a function end the transaction by force, its own writes and its
mark are committed together, and the tasks behind it are still pending. What was marked is counted before the commit: a database that gave
the transaction up under a function which went on all the same (MariaDB does after a deadlock) has dropped the marks, and then nothing
may be kept.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, event, func, literal_column, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from inventory_sdk.ledger.faults import reason_of
from inventory_sdk.ledger.protocol import Task, TaskRun, TasksSpoilt, TaskStuck
from inventory_sdk.ledger.store import PENDING, Store
from inventory_sdk.ledger.tasks import DONE

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

NUMBER: Final = "task_number"
OPTION: Final = "inventory_savepoints"
"""Execution option of a connection whose transaction is shared by functions."""


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


class _Savepoints:
    """The savepoints of a shared transaction, with fewer round trips. ``unmarked``: the task whose function runs and has sent nothing
    yet. ``ending``: the function has returned, and its session commits."""

    def __init__(self, connection: AsyncConnection, table: Any) -> None:
        self.unmarked: int | None = None
        self.ending = False
        self._mark: str | None = None
        if connection.dialect.driver == "asyncpg":
            mark = _mark(table, literal_column("$number"))
            self._mark = str(mark.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True}))

    @property
    def joins_mark(self) -> bool:
        """Whether a savepoint brings the mark along."""
        return self._mark is not None

    def instead(self, statement: str, connection: Any) -> bool:
        """Whether the statement need not be sent any more."""
        if self.ending and statement.startswith("RELEASE SAVEPOINT "):
            return True
        if self._mark is None or self.unmarked is None or not statement.startswith("SAVEPOINT "):
            return False
        both = f"{self._mark.replace('$number', str(self.unmarked))}; {statement}"
        connection.connection.dbapi_connection.run_async(lambda driver: driver.execute(both))
        self.unmarked = None
        return True


def _execute(_cursor: Any, statement: str, _parameters: Any, context: Any) -> bool:
    savepoints = context.execution_options.get(OPTION)
    return savepoints is not None and savepoints.instead(statement, context.root_connection)


def _mark(table: Any, number: Any) -> Any:
    return update(table).where(table.c.number == number, table.c.state == PENDING).values(state=DONE, attempts=table.c.attempts + 1)


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
    mark = _mark(table, bindparam(NUMBER))
    unmark = update(table).where(table.c.number == bindparam(NUMBER), table.c.state == DONE)
    unmark = unmark.values(state=PENDING, attempts=table.c.attempts - 1)
    alone = len(tasks) == 1
    event.listen(connection.dialect, "do_execute", _execute)
    savepoints = _Savepoints(connection, table)
    await connection.execution_options(**{OPTION: savepoints})
    root = _sync(connection).get_transaction()
    statements = _Statements(connection)
    runs: list[TaskRun] = []
    for task in (task for task in tasks if task.number in ours):
        if runs and not more():
            break
        number = {NUMBER: task.number}
        began, spent = time.perf_counter(), statements.seconds
        savepoints.unmarked = task.number
        if not savepoints.joins_mark and (await connection.execute(mark, number)).rowcount != 1:
            raise TasksSpoilt(f"task {task.number} is no longer ours: the database ended the transaction under the one before it")
        error = await _called(connection, task, call, savepoints, alone=alone)
        if root is None or _sync(connection).get_transaction() is not root or not root.is_active:
            raise TasksSpoilt(f"task {task.name!r} ended the worker's transaction: use its session, not its connection's root") from error
        if savepoints.joins_mark and savepoints.unmarked is not None:
            # It has sent nothing.
            if error is None and (await connection.execute(mark, number)).rowcount != 1:
                raise TasksSpoilt(f"task {task.number} is no longer ours")
        elif error is not None and (await connection.execute(unmark, number)).rowcount != 1:
            raise TasksSpoilt(f"task {task.name!r} ended the worker's transaction") from error
        runs.append(TaskRun(task, error, time.perf_counter() - began - (statements.seconds - spent)))
    done = [each.task for each in runs if each.error is None]
    if done:
        marked = select(func.count()).select_from(table).where(_among(table, done), table.c.state == DONE)
        if (await connection.execute(marked)).scalar_one() != len(done):
            raise TasksSpoilt("the database rolled the transaction back under a later-function that went on: nothing is kept")
    return runs


def _sync(connection: AsyncConnection) -> Any:
    return connection.sync_connection


def _among(table: Any, tasks: Sequence[Task]) -> Any:
    """By number. Filled up to a multiple of 32 with the last: each length would be another statement for the driver to prepare."""
    numbers = [task.number for task in tasks]
    return table.c.number.in_(numbers + numbers[-1:] * (-len(numbers) % 32 if len(numbers) > 1 else 0))


async def _called(
    connection: AsyncConnection,
    task: Task,
    call: Callable[[Task, AsyncSession], Awaitable[None]],
    savepoints: _Savepoints,
    *,
    alone: bool,
) -> Exception | None:
    """The function's error, once its writes are undone; raised where they can't be without those of the others."""
    session = AsyncSession(
        bind=connection, sync_session_class=TaskSession, join_transaction_mode="create_savepoint", expire_on_commit=False
    )
    try:
        await call(task, session)
        savepoints.ending = not alone
        await session.commit()
    except TaskStuck:
        await connection.invalidate()
        raise
    except Exception as error:
        # Still in its savepoint: the release was refused, and SQLAlchemy does not roll back to what it could not release.
        undone = await _closed(session) and _sync(connection).get_nested_transaction() is None
        if alone or not undone or (not isinstance(error, OSError) and reason_of(error) is not None):
            raise
        if isinstance(session.sync_session, TaskSession) and session.sync_session.kept:
            raise TasksSpoilt(f"task {task.name!r} committed and failed afterwards: {type(error).__name__}: {error}") from error
        return error
    finally:
        savepoints.ending = False
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
