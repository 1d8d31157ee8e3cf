"""Later-functions that share a transaction, on three databases: whatever one of them does, or whoever dies, each has its effect once,
together with its mark, and none pays for another."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from tasks_kit import Desk
from worker_fakes import Facts

from inventory_sdk.ledger.protocol import LedgerUnavailable, Task, TasksSpoilt
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.model import Receipt
from inventory_sdk.sync import tasks as tasks_room
from inventory_sdk.sync.parts import Parts
from inventory_sdk.sync.tasks import TaskRunner

POSTGRESQL = pytest.param("postgresql", marks=pytest.mark.postgresql)
MARIADB = pytest.param("mariadb", marks=pytest.mark.mariadb)
LOCKING = pytest.mark.parametrize("kind", [POSTGRESQL, MARIADB])
"""SQLite has one writer: nobody waits for a row there, nor in a circle."""


@pytest.fixture(params=[POSTGRESQL, MARIADB, pytest.param("sqlite")])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if kind == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'stock.db'}"
    return str(request.getfixturevalue(f"{kind}_url"))


@pytest.fixture
async def desk(database: str, namespace: str) -> AsyncIterator[Desk]:
    desk = Desk(database, namespace)
    await desk.start()
    try:
        yield desk
    finally:
        await desk.close()


Function = Callable[[Task, AsyncSession], Awaitable[None]]


def names(count: int) -> list[str]:
    return [f"o{number:03}" for number in range(count)]


# One transaction


async def test_they_are_one_transaction_and_each_is_marked_with_its_effect(desk: Desk) -> None:
    tasks = await desk.put(*names(5))
    seen: list[int] = []

    async def write(task: Task, session: AsyncSession) -> None:
        await desk.write(task, session)
        seen.append((await desk.effects()).total())

    runs = await desk.ledger.run_tasks(tasks, write)
    assert [(run.task, run.error) for run in runs] == [(task, None) for task in tasks]
    assert seen == [0] * 5
    assert await desk.effects() == dict.fromkeys(names(5), 1)
    assert set((await desk.states()).values()) == {("done", 1)}
    assert await desk.ledger.run_tasks(tasks, write) == []


async def test_one_that_fails_is_undone_alone_and_costs_the_others_nothing(desk: Desk) -> None:
    tasks = await desk.put(*names(4))

    async def write(task: Task, session: AsyncSession) -> None:
        await desk.write(task, session)
        async with session.begin_nested():
            await desk.write(task, session)
        if task.operation_id == "o001":
            raise LookupError("later")

    runs = await desk.ledger.run_tasks(tasks, write)
    assert [type(run.error) for run in runs] == [type(None), LookupError, type(None), type(None)]
    assert await desk.effects() == {"o000": 2, "o002": 2, "o003": 2}
    assert (await desk.states())["o001"] == ("pending", 0)


async def test_a_commit_or_a_rollback_of_its_own_stays_inside(desk: Desk) -> None:
    tasks = await desk.put(*names(3))

    async def write(task: Task, session: AsyncSession) -> None:
        if task.operation_id == "o000":
            await desk.write(task, session)
            await session.commit()
        elif task.operation_id == "o001":
            await desk.write(task, session)
            await session.rollback()
            async with session.begin():
                await desk.write(task, session)
        elif await desk.effects():
            raise AssertionError("committed")
        else:
            await desk.write(task, session)

    assert [run.error for run in await desk.ledger.run_tasks(tasks, write)] == [None] * 3
    assert await desk.effects() == dict.fromkeys(names(3), 1)
    assert set((await desk.states()).values()) == {("done", 1)}


async def test_one_that_commits_or_rolls_back_and_then_fails_is_undone_all_the_same(desk: Desk) -> None:
    tasks = await desk.put(*names(6))

    async def write(task: Task, session: AsyncSession) -> None:
        await desk.write(task, session)
        if task.operation_id == "o001":
            await session.commit()
            await desk.write(task, session)
            await session.rollback()
            raise LookupError("later")
        if task.operation_id == "o002":
            await session.rollback()
            await desk.write(task, session)
            await session.commit()
            raise LookupError("later")
        if task.operation_id == "o003":
            await desk.write(task, session.bind)  # type: ignore[arg-type]  # past its session
            raise LookupError("later")
        if task.operation_id == "o004":
            await session.commit()
            await desk.write(task, session)
            await session.rollback()

    runs = await desk.ledger.run_tasks(tasks, write)
    assert [run.task.operation_id for run in runs if run.error is not None] == ["o001", "o002", "o003"]
    assert await desk.effects() == dict.fromkeys(["o000", "o004", "o005"], 1)
    states = await desk.states()
    assert [states[name] for name in names(6)] == [("done", 1), *[("pending", 0)] * 3, ("done", 1), ("done", 1)]


async def test_one_that_ends_the_transaction_by_force_takes_none_with_it_that_has_not_run(desk: Desk) -> None:
    tasks = await desk.put(*names(4))

    async def write(task: Task, session: AsyncSession) -> None:
        await desk.write(task, session)
        if task.operation_id == "o001":
            await (await session.connection()).commit()

    with pytest.raises(TasksSpoilt, match="ended the worker's transaction"):
        await desk.ledger.run_tasks(tasks, write)
    states = await desk.states()
    assert {name for name, (state, _) in states.items() if state == "done"} == {"o000", "o001"} == set(await desk.effects())
    runs = await desk.ledger.run_tasks(tasks, desk.write)
    assert [run.task.operation_id for run in runs] == ["o002", "o003"]
    assert await desk.effects() == dict.fromkeys(names(4), 1)


async def test_one_that_hides_a_broken_transaction_is_found_out(desk: Desk, kind: str) -> None:
    """PostgreSQL refuses everything after an error; the others go on as if nothing had been."""
    tasks = await desk.put(*names(3))

    async def write(task: Task, session: AsyncSession) -> None:
        await desk.write(task, session)
        if task.operation_id == "o001":
            with pytest.raises(Exception, match="nowhere"):
                await session.execute(text("SELECT 1 FROM nowhere"))

    if kind != "postgresql":
        assert [run.error for run in await desk.ledger.run_tasks(tasks, write)] == [None] * 3
        assert await desk.effects() == dict.fromkeys(names(3), 1)
        return
    with pytest.raises(Exception, match="current transaction is aborted"):
        await desk.ledger.run_tasks(tasks, write)
    assert await desk.effects() == {}
    assert set((await desk.states()).values()) == {("pending", 0)}
    with pytest.raises(Exception, match="current transaction is aborted"):
        await desk.ledger.run_tasks(tasks[1:2], write)
    assert len(await desk.ledger.run_tasks([tasks[0], tasks[2]], write)) == 2
    assert await desk.effects() == dict.fromkeys(["o000", "o002"], 1)


@LOCKING
async def test_a_transaction_that_was_given_up_under_a_function_that_goes_on_is_not_kept(desk: Desk, kind: str) -> None:
    """As MariaDB does after a deadlock: marks and locks are gone, and what follows is another transaction."""
    tasks = await desk.put(*names(3))

    async def write(task: Task, session: AsyncSession) -> None:
        await desk.write(task, session)
        if task.operation_id == "o001":
            await session.execute(text("ROLLBACK"))
            with pytest.raises(Exception, match=r"(?i)savepoint"):
                await session.rollback()
            await desk.write(task, session)

    with pytest.raises(Exception, match=r"(?i)rolled the transaction back|transaction"):
        await desk.ledger.run_tasks(tasks, write)
    assert await desk.effects() == {}
    assert set((await desk.states()).values()) == {("pending", 0)}


@LOCKING
async def test_of_two_that_wait_in_a_circle_one_gives_way_whole_and_both_are_done_once(desk: Desk, kind: str) -> None:
    await desk.put("o000", "o001")
    first, second = await desk.ledger.due_tasks(2)
    more = await desk.put("o002", "o003")
    third, fourth = more[2:]
    both = asyncio.Barrier(2)

    async def ahead(task: Task, session: AsyncSession) -> None:
        sku = "hot" if task is first else "cold"
        if task in (first, third):
            await session.execute(update(desk.stock).where(desk.stock.c.sku == sku).values(left=desk.stock.c.left))
            return
        await both.wait()
        await desk.write(task, session)
        await session.execute(update(desk.stock).values(left=desk.stock.c.left))

    outcomes = await asyncio.gather(
        desk.ledger.run_tasks([first, second], ahead), desk.ledger.run_tasks([third, fourth], ahead), return_exceptions=True
    )
    (fault,) = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert isinstance(fault, LedgerUnavailable)
    assert fault.reason == "deadlock"
    states = Counter(state for state, _ in (await desk.states()).values())
    assert states == {"done": 2, "pending": 2}
    assert (await desk.effects()).total() == 1


@LOCKING
async def test_workers_share_what_is_due_and_take_no_more_than_they_may(desk: Desk, kind: str) -> None:
    tasks = await desk.put(*names(10))
    other = SqlLedger(desk.database, prefix=desk.ledger.tables.prefix)
    theirs: list[str] = []

    async def note(task: Task, session: AsyncSession) -> None:
        theirs.append(task.operation_id)

    async def write(task: Task, session: AsyncSession) -> None:
        if task.operation_id == "o000":
            await other.run_tasks(tasks, note, most=3)

    try:
        runs = await desk.ledger.run_tasks(tasks, write, most=4)
    finally:
        await other.close()
    assert [run.task.operation_id for run in runs] == names(10)[:4]
    assert theirs == names(10)[4:7]


KILLED = """
import asyncio, os, signal, sys
sys.path.insert(0, sys.argv[1])
from tasks_kit import Desk

async def main():
    desk = Desk(sys.argv[2], sys.argv[3])
    async def write(task, session):
        if task.operation_id == "o003":
            os.kill(os.getpid(), signal.SIGKILL)
        await desk.write(task, session)
    await desk.ledger.run_tasks(await desk.ledger.due_tasks(100), write)

asyncio.run(main())
"""


async def test_a_process_killed_between_two_of_them_leaves_nothing_and_all_are_done_once(desk: Desk, database: str, namespace: str) -> None:
    await desk.put(*names(6))
    kits = str(Path(__file__).parents[1])
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", KILLED, kits, database, namespace)
    assert await process.wait() == -signal.SIGKILL
    assert await desk.effects() == {}
    done: list[str] = []
    async with asyncio.timeout(20):
        while len(done) < 6:  # until the server has noticed that the connection is gone
            done += [run.task.operation_id for run in await desk.ledger.run_tasks(await desk.ledger.due_tasks(100), desk.write)]
    assert await desk.effects() == dict.fromkeys(names(6), 1)


# The worker's side


class House:
    """Runs the tasks of a desk; ``behave`` is what all functions do."""

    def __init__(self, desk: Desk, behave: Function, ledger: SqlLedger | None = None, **options: Any) -> None:
        self.facts = Facts()
        self.behave = behave
        self.calls: list[str] = []
        nothing: Any = None
        self.parts = Parts(nothing, ledger or desk.ledger, nothing, self.facts, self.tell, asyncio.Event(), first_delay=0.01)
        self.due = asyncio.Event()
        options = {"first_retry": 0.01, "last_retry": 0.02, "poll": 0.02} | options
        self.runner = TaskRunner(self.parts, self, self.due, **options)

    def tell(self, name: str, facts: Any) -> None:
        self.facts.told.append((name, facts))

    async def run(self, task: Task, session: AsyncSession, receipt: Receipt) -> None:
        assert receipt.operation_id == task.operation_id
        self.calls.append(task.operation_id)
        await self.behave(task, session)

    def stop(self) -> None:
        self.parts.stopping.set()
        self.due.set()

    async def __aenter__(self) -> House:
        self.running = asyncio.create_task(self.runner.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stop()
        async with asyncio.timeout(20):
            await self.running

    def knows(self) -> House:
        """As if a quick call of the function were behind it."""
        self.runner._manners._owed["write"] = 0
        return self


async def until(condition: Callable[[], Awaitable[object]], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.01)


async def all_done(desk: Desk) -> bool:
    return all(state == "done" for state, _ in (await desk.states()).values())


async def test_one_that_hangs_is_cut_off_and_the_others_are_done_meanwhile(desk: Desk, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_room, "PATIENCE", 0.2)
    await desk.put(*names(6))
    go_on, calls = asyncio.Event(), Counter[str]()

    async def write(task: Task, session: AsyncSession) -> None:
        calls[task.operation_id] += 1
        if task.operation_id == "o002":
            await session.execute(select(desk.stock))
            await go_on.wait()
        await desk.write(task, session)

    async with House(desk, write).knows() as house:
        if kind == "sqlite":  # one writer: alone, it is in the way of all others, as any open transaction is
            await until(lambda: asyncio.sleep(0, calls["o002"] == 2))
            go_on.set()
        else:
            await until(lambda: count_done(desk, 5))
            assert (await desk.states())["o002"][0] == "pending"
            go_on.set()
        await until(lambda: all_done(desk))
    assert await desk.effects() == dict.fromkeys(names(6), 1)
    assert calls["o002"] == 2
    assert (await desk.states())["o002"] == ("done", 1), "being cut off is not its failure"
    assert "tasks_together" in house.facts.retried()


async def count_done(desk: Desk, count: int) -> bool:
    return sum(state == "done" for state, _ in (await desk.states()).values()) == count


@LOCKING
async def test_one_that_hangs_in_a_statement_costs_the_transaction_and_all_are_done_once(
    desk: Desk, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_room, "PATIENCE", 0.2)
    await desk.put(*names(5))
    engine = create_async_engine(desk.database)
    touch = update(desk.stock).where(desk.stock.c.sku == "cold").values(left=0)

    async def write(task: Task, session: AsyncSession) -> None:
        await desk.write(task, session)
        if task.operation_id == "o002":
            await session.rollback()  # it holds nothing that the others want
            await session.execute(touch)
            await desk.write(task, session)

    try:
        async with engine.connect() as blocker, House(desk, write).knows() as house:
            await blocker.execute(touch)
            if kind == "postgresql":
                await until(lambda: count_done(desk, 4))
            else:  # its server waits for the lock to the end, whoever has gone away
                await until(lambda: asyncio.sleep(0, len(house.facts.retried()) >= 2))
            await blocker.rollback()
            await until(lambda: all_done(desk))
    finally:
        await engine.dispose()
    assert await desk.effects() == dict.fromkeys(names(5), 1)


async def test_one_that_goes_on_when_it_is_cut_off_loses_its_connection_and_is_done_once(
    desk: Desk, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_room, "PATIENCE", 0.2)
    await desk.put(*names(4))
    go_on, stubborn, ended = asyncio.Event(), True, asyncio.Event()

    async def write(task: Task, session: AsyncSession) -> None:
        nonlocal stubborn
        await desk.write(task, session)
        if task.operation_id == "o001" and stubborn:
            stubborn = False
            while not go_on.is_set():
                try:
                    await go_on.wait()
                except asyncio.CancelledError:
                    continue
            try:
                await desk.write(task, session)
                await session.commit()
            finally:
                ended.set()

    async with House(desk, write).knows() as house:
        await until(lambda: count_done(desk, 3))
        assert house.calls.count("o001") == 1, "not while the first call goes on"
        go_on.set()
        await ended.wait()
        await until(lambda: all_done(desk))
    assert await desk.effects() == dict.fromkeys(names(4), 1)


async def test_one_that_raises_cancelled_error_fails_like_any_other(desk: Desk) -> None:
    await desk.put(*names(5))

    async def write(task: Task, session: AsyncSession) -> None:
        await desk.write(task, session)
        if task.operation_id == "o002":
            raise asyncio.CancelledError

    async with House(desk, write, attempts=3).knows() as house:
        await until(lambda: count_done(desk, 4))
        await until(lambda: asyncio.sleep(0, house.facts.told))
    assert await desk.effects() == dict.fromkeys((name for name in names(5) if name != "o002"), 1)
    assert house.calls.count("o002") == 3
    assert (await desk.states())["o002"] == ("dead", 3)
    ((told, facts),) = house.facts.told
    assert (told, facts["operation_id"]) == ("dead_letter", "o002")
    assert "raised CancelledError, though nobody cancelled it" in facts["error"]


async def test_a_stop_ends_the_transaction_behind_what_runs_and_keeps_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_room, "SPAN", 60.0)
    await desk.put(*names(6))

    async def write(task: Task, session: AsyncSession) -> None:
        await desk.write(task, session)
        if task.operation_id == "o002":
            house.stop()

    house = House(desk, write).knows()
    async with house:
        await house.running
    assert await desk.effects() == dict.fromkeys(names(6)[:3], 1)
    states = await desk.states()
    assert [states[name] for name in names(6)] == [("done", 1)] * 3 + [("pending", 0)] * 3


async def test_a_cancelled_worker_keeps_nothing_of_an_unfinished_transaction(desk: Desk) -> None:
    await desk.put(*names(4))
    hangs = asyncio.Event()

    async def write(task: Task, session: AsyncSession) -> None:
        await desk.write(task, session)
        if task.operation_id == "o002":
            hangs.set()
            await asyncio.Event().wait()

    house = House(desk, write).knows()
    running = asyncio.create_task(house.runner.run())
    await hangs.wait()
    running.cancel()
    await asyncio.wait([running])
    assert await desk.effects() == {}
    assert set((await desk.states()).values()) == {("pending", 0)}


async def test_two_workers_and_functions_that_do_what_they_like_have_each_effect_once_and_in_order(desk: Desk) -> None:
    seed = int(os.environ.get("INVENTORY_TEST_SEED") or random.randrange(10**6))
    print(f"seed {seed} (INVENTORY_TEST_SEED replays it)")  # noqa: T201
    dice = random.Random(seed)
    orders = [f"x{number}" for number in range(6)]
    for round_ in range(4):
        for order in orders:
            await desk.put(f"{order}-{round_}", order=order, sku=dice.choice(["hot", "cold"]))
    await desk.put(*names(30))
    tempers = ["raise", "cancel", "commit", "rollback", "commit and raise", "hidden error", "begin", "root commit"]
    whims = {name: dice.choice(tempers) for name in await desk.states() if dice.random() < 0.4}

    async def write(task: Task, session: AsyncSession) -> None:
        whim = whims.pop(task.operation_id, "")
        if whim == "begin":
            async with session.begin():
                await desk.write(task, session)
            return
        await desk.write(task, session)
        if whim == "raise":
            raise ValueError(whim)
        if whim == "cancel":
            raise asyncio.CancelledError
        if whim.startswith("commit"):
            await session.commit()
            if whim != "commit":
                raise ValueError(whim)
        if whim == "rollback":
            await session.rollback()
            await desk.write(task, session)
        if whim == "hidden error":
            with suppress(Exception):
                await session.execute(text("SELECT 1 FROM nowhere"))
        if whim == "root commit":
            await (await session.connection()).commit()

    other = SqlLedger(desk.database, prefix=desk.ledger.tables.prefix)
    try:
        async with House(desk, write) as first, House(desk, write, other) as second:
            await until(lambda: all_done(desk))
    finally:
        await other.close()
    assert set((await desk.effects()).values()) == {1}
    assert (await desk.effects()).total() == 54
    done = await desk.in_order()
    for order in orders:
        assert [name for name in done if name.startswith(f"{order}-")] == [f"{order}-{round_}" for round_ in range(4)]
    assert first.facts.told == second.facts.told == []
