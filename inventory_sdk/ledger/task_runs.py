"""Later-functions in one transaction: each is marked, then called in a savepoint, and one that fails is undone alone.

The connection, the commit and the wait for the disk are shared. What is left per function is round trips, so they are few: the mark and
our savepoint (one for asyncpg, two for others), then what the function sends. Its session would make a savepoint of its own, so that a
commit or a rollback of the function's stays inside; where nothing was sent before, ours stands for it. None is released: the commit
does that.

The mark comes before the call, one by one: should a function end the transaction by force, its own writes and its mark are committed
together, and the tasks behind it are still pending. What was marked is counted before the commit: a database that gave the transaction up
under a function which went on all the same (MariaDB does after a deadlock) has dropped the marks, and then nothing may be kept.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, event, func, literal_column, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk.ledger.faults import reason_of
from inventory_sdk.ledger.protocol import Task, TaskRun, TasksSpoilt, TaskStuck
from inventory_sdk.ledger.store import PENDING, Store
from inventory_sdk.ledger.tasks import DONE

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import AsyncConnection

NUMBER: Final = "task_number"
OPTION: Final = "inventory_savepoints"
"""Execution option of a connection whose transaction is shared by functions."""


SAVEPOINT: Final = "inventory_task"


def always() -> bool:
    """Go on with the next task."""
    return True


class _Statements:
    """``seconds`` that a connection's statements have taken so far, without those that failed."""

    def __init__(self, connection: AsyncConnection, savepoint: _Savepoint | None) -> None:
        self.seconds = 0.0
        self._since = 0.0
        self._savepoint = savepoint
        event.listen(connection.sync_connection, "before_cursor_execute", self._begins)
        event.listen(connection.sync_connection, "after_cursor_execute", self._ends)

    def _begins(self, _connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        self._since = time.perf_counter()
        if self._savepoint is not None and not statement.startswith("SAVEPOINT "):
            self._savepoint.untouched = False

    def _ends(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._since


class _Savepoint:
    """The savepoint of the function that runs. ``untouched``: nothing was sent since. ``ending``: the function has returned, and its
    session commits."""

    def __init__(self, connection: AsyncConnection, table: Any) -> None:
        self.untouched = self.ending = False
        self._stands_for = ""
        """Its session's savepoint, which was not sent."""
        self._statement = _mark(table, bindparam(NUMBER))
        self._both = ""
        if connection.dialect.driver == "asyncpg":
            mark = _mark(table, literal_column("$number"))
            self._both = f"{mark.compile(dialect=connection.dialect, compile_kwargs={'literal_binds': True})}; SAVEPOINT {SAVEPOINT}"

    async def begin(self, connection: AsyncConnection, number: int) -> None:
        """Mark the task, then set the savepoint: a rollback to it keeps the mark. ``TasksSpoilt`` if the task is no longer ours."""
        if self._both:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            await driver.execute(self._both.replace("$number", str(number)))
        else:
            if (await connection.execute(self._statement, {NUMBER: number})).rowcount != 1:
                raise TasksSpoilt(f"task {number} is no longer ours: the database ended the transaction under the one before it")
            await connection.exec_driver_sql(f"SAVEPOINT {SAVEPOINT}")
        self._stands_for = ""
        self.untouched = True

    def instead(self, cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        """Whether the statement is dealt with."""
        verb, _, name = statement.rpartition(" ")
        if verb == "SAVEPOINT" and self.untouched:
            self.untouched = False
            self._stands_for = name
            return True
        if verb == "RELEASE SAVEPOINT":
            return self.ending or name == self._stands_for
        if verb == "ROLLBACK TO SAVEPOINT" and name == self._stands_for:
            context.dialect.do_execute(cursor, f"{verb} {SAVEPOINT}", parameters, context)
            return True
        return False


def _execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    savepoint: _Savepoint | None = context.execution_options.get(OPTION)
    return savepoint is not None and savepoint.instead(cursor, statement, parameters, context)


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
    unmark = update(table).where(table.c.number == bindparam(NUMBER), table.c.state == DONE)
    unmark = unmark.values(state=PENDING, attempts=table.c.attempts - 1)
    savepoint = None
    if len(tasks) > 1:
        savepoint = _Savepoint(connection, table)
        event.listen(connection.dialect, "do_execute", _execute)
        await connection.execution_options(**{OPTION: savepoint})
    root = _sync(connection).get_transaction()
    statements = _Statements(connection, savepoint)
    runs: list[TaskRun] = []
    for task in (task for task in tasks if task.number in ours):
        if runs and not more():
            break
        if savepoint is None:
            await connection.execute(_mark(table, task.number))
        else:
            await savepoint.begin(connection, task.number)
        began, spent = time.perf_counter(), statements.seconds
        error = await _called(connection, task, call, savepoint)
        if root is None or _sync(connection).get_transaction() is not root or not root.is_active:
            raise TasksSpoilt(f"task {task.name!r} ended the worker's transaction: use its session, not its connection's root") from error
        runs.append(TaskRun(task, error, time.perf_counter() - began - (statements.seconds - spent)))
        if error is not None:
            await _undo(connection, error)
            if (await connection.execute(unmark, {NUMBER: task.number})).rowcount != 1:
                raise TasksSpoilt(f"task {task.name!r} ended the worker's transaction") from error
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
    savepoint: _Savepoint | None,
) -> Exception | None:
    """The function's error, if that is its own affair; raised where it is alone, and a fault of the transaction."""
    session = AsyncSession(bind=connection, join_transaction_mode="create_savepoint", expire_on_commit=False)
    try:
        await call(task, session)
        if savepoint is not None:
            savepoint.ending = True
        await session.commit()
    except TaskStuck:
        await connection.invalidate()
        raise
    except Exception as error:
        # It may have nothing to roll back to any more, and would say so instead of why.
        with suppress(Exception):
            await session.close()
        if savepoint is None or (not isinstance(error, OSError) and reason_of(error) is not None):
            raise
        return error
    finally:
        if savepoint is not None:
            savepoint.ending = False
    await session.close()
    return None


async def _undo(connection: AsyncConnection, error: Exception) -> None:
    """Back to the savepoint, whatever the function has committed or broken since."""
    try:
        await connection.run_sync(_leave)
        await connection.exec_driver_sql(f"ROLLBACK TO SAVEPOINT {SAVEPOINT}")
    except Exception as failed:
        raise TasksSpoilt(f"what failed can't be undone alone: {type(error).__name__}: {error}") from failed


def _leave(connection: Connection) -> None:
    while (nested := connection.get_nested_transaction()) is not None:
        nested.close()
