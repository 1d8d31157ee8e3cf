"""Comparisons by themselves: when they are due, by one of many workers, given up when the worker stops or the lease is lost."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from inventory_sdk import InvalidOperation, Inventory, InventoryError
from inventory_sdk.metrics import ComparisonsOverdue, DiscrepanciesOpen, Retried
from inventory_sdk.reconcile import schedule
from inventory_sdk.reconcile.model import Reconcile
from inventory_sdk.reconcile.schedule import MEMORY, Schedule
from tests.reconcile_kit import Shop, shop
from tests.stock_kit import Recorded, until


class Runner:
    """One worker's schedule; ``runs``: whether each was of everything."""

    def __init__(self, it: Shop, settings: Reconcile, hold: asyncio.Event | None = None, fails: int = 0) -> None:
        self.runs: list[bool] = []
        self.stopping = asyncio.Event()
        self.hold, self.fails, self.given_up = hold, fails, 0
        self.work = Schedule(it.inventory._running().ground, settings, self.compare, self.catch_up).run(self.stopping)
        self.task: asyncio.Task[None] | None = None

    async def compare(self, whole: bool) -> None:
        self.runs.append(whole)
        if self.fails:
            self.fails -= 1
            raise InventoryError("not now")
        if self.hold is not None:
            try:
                await self.hold.wait()
            except asyncio.CancelledError:
                self.given_up += 1
                raise

    async def catch_up(self) -> bool:
        return True

    def begin(self) -> None:
        self.task = asyncio.create_task(self.work)

    async def end(self) -> None:
        assert self.task is not None
        self.stopping.set()
        await asyncio.wait_for(self.task, 10)


async def made_due(it: Shop, **ago: float) -> None:
    times = {"touched": time.time(), "whole": time.time()}
    await it.ledger.register.remember(MEMORY, {name: times[name] - ago.get(name, 0.0) for name in times})


@pytest.mark.parametrize(
    ("ago", "runs"), [({"touched": 3601.0}, [False]), ({"whole": 86_401.0}, [True]), ({"touched": 3601.0, "whole": 86_401.0}, [True])]
)
async def test_what_is_due_is_done_once_and_everything_stands_for_what_was_touched(ago: dict[str, float], runs: list[bool]) -> None:
    async with shop() as it:
        await made_due(it, **ago)
        runner = Runner(it, Reconcile())
        runner.begin()
        await until(lambda: runner.runs)
        async with asyncio.timeout(10):
            while min((await it.ledger.register.remembered(MEMORY)).values()) < time.time() - 60:
                await asyncio.sleep(0.01)
        await runner.end()
        assert runner.runs == runs


async def test_the_first_worker_starts_the_clocks_and_compares_nothing_yet() -> None:
    async with shop() as it:
        runner = Runner(it, Reconcile())
        runner.begin()
        async with asyncio.timeout(10):
            while not await it.ledger.register.remembered(MEMORY):
                await asyncio.sleep(0.01)
        await runner.end()
        assert runner.runs == []


async def test_of_many_workers_one_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LONGEST", 0.03)
    async with shop() as it:
        await made_due(it, touched=4000.0)
        hold = asyncio.Event()
        runners = [Runner(it, Reconcile(), hold) for _ in range(4)]
        for runner in runners:
            runner.begin()
        await until(lambda: any(runner.runs for runner in runners))
        await asyncio.sleep(0.1)  # the others have looked several times by now
        hold.set()
        await asyncio.sleep(0.1)
        for runner in runners:
            await runner.end()
        assert sum(len(runner.runs) for runner in runners) == 1


async def test_what_who_had_the_lease_before_has_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await made_due(it, touched=4000.0)
        lease, given = Schedule._lease, asyncio.Event()

        async def was_somebody_elses(self: Schedule, what: str) -> bool:
            if what == "take":
                await made_due(it)  # they have compared between our look at what is due and now
            if what == "give":
                given.set()
            return await lease(self, what)

        monkeypatch.setattr(Schedule, "_lease", was_somebody_elses)
        runner = Runner(it, Reconcile())
        runner.begin()
        await asyncio.wait_for(given.wait(), 10)
        await runner.end()
        assert runner.runs == []


async def test_a_worker_that_stops_gives_the_comparison_and_the_lease_back() -> None:
    async with shop() as it:
        await made_due(it, touched=4000.0)
        first = Runner(it, Reconcile(), asyncio.Event())
        first.begin()
        await until(lambda: first.runs)
        await first.end()
        assert first.given_up == 1
        second = Runner(it, Reconcile())
        second.begin()
        await until(lambda: second.runs)
        await second.end()


async def test_who_loses_the_lease_gives_the_comparison_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "LEASE", 0.06)
    async with shop() as it:
        await made_due(it, touched=4000.0)
        runner = Runner(it, Reconcile(), asyncio.Event())
        runner.begin()
        await until(lambda: runner.runs)
        await it.engine.wire.client.set("inventory:reconcile:lease", "somebody else")
        await until(lambda: runner.given_up)
        assert await it.engine.wire.client.get("inventory:reconcile:lease") == b"somebody else"
        await runner.end()


async def test_what_fails_is_counted_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(schedule.Backoff):
        def __init__(self, *_: float) -> None:
            super().__init__(0.001, 0.01)

    monkeypatch.setattr(schedule, "Backoff", Impatient)
    metrics = Recorded()
    async with shop(metrics=[metrics]) as it:
        await made_due(it, touched=4000.0)
        runner = Runner(it, Reconcile(), fails=2)
        runner.begin()
        await until(lambda: len(runner.runs) == 3)
        await runner.end()
        assert [each.reason for each in metrics.events if isinstance(each, Retried) and each.what == "reconcile"] == ["InventoryError"] * 2


def overdue(metrics: Recorded) -> list[dict[str, float]]:
    return [dict(event.seconds) for event in metrics.events if isinstance(event, ComparisonsOverdue)]


async def test_how_long_a_comparison_is_overdue_is_told_until_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(schedule.Backoff):
        def __init__(self, *_: float) -> None:
            super().__init__(0.001, 0.01)

    monkeypatch.setattr(schedule, "Backoff", Impatient)
    metrics = Recorded()
    async with shop(metrics=[metrics]) as it:
        await made_due(it, touched=4000.0)
        runner = Runner(it, Reconcile(), fails=3)
        runner.begin()
        await until(lambda: len(runner.runs) == 4)
        await until(lambda: overdue(metrics)[-1] == {"everything": 0.0, "what": 0.0})
        await runner.end()
    assert all(each["everything"] == 0 for each in overdue(metrics))
    assert all(400 <= each["what"] < 500 for each in overdue(metrics)[:6])


async def test_what_was_due_when_the_ledger_went_away_goes_on_being_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient(schedule.Backoff):
        def __init__(self, *_: float) -> None:
            super().__init__(0.001, 0.01)

    monkeypatch.setattr(schedule, "Backoff", Impatient)
    metrics = Recorded()
    async with shop(metrics=[metrics]) as it:
        await made_due(it, touched=4000.0)
        runner = Runner(it, Reconcile(), fails=10**6)
        runner.begin()
        await until(lambda: runner.runs)

        async def away(name: str) -> None:
            raise OSError

        monkeypatch.setattr(it.ledger.register, "remembered", away)
        await until(lambda: any(isinstance(each, Retried) and each.reason == "OSError" for each in metrics.events))
        now = time.time()
        monkeypatch.setattr(schedule.time, "time", lambda: now + 1000)
        await until(lambda: overdue(metrics)[-1]["what"] >= 1400)
        await runner.end()


async def test_what_is_not_planned_is_never_overdue() -> None:
    metrics = Recorded()
    async with shop(metrics=[metrics]) as it:
        await made_due(it, touched=10_000.0, whole=10**6)
        runner = Runner(it, Reconcile(every=None))
        runner.begin()
        await until(lambda: runner.runs)
        await runner.end()
    assert all(set(each) == {"everything"} for each in overdue(metrics))


async def test_every_worker_tells_what_is_open_by_the_register_corrections_included() -> None:
    metrics = Recorded()

    async def told(it: Shop) -> dict[str, int]:
        runner = Runner(it, Reconcile())
        before = len(metrics.events)
        runner.begin()
        await until(lambda: any(isinstance(each, DiscrepanciesOpen) for each in metrics.events[before:]))
        await runner.end()
        return dict([each for each in metrics.events if isinstance(each, DiscrepanciesOpen)][-1].open)

    async with shop(metrics=[metrics]) as it:
        assert set((await told(it)).values()) == {0}
        await it.by_hand("a", 1)
        await it.by_hand("b", 2)
        found = (await it.inventory.reconciler.run()).open
        assert sum((await told(it)).values()) == 2
        await it.inventory.reconciler.correct(found[0].number, "counted", "ann")
        assert sum((await told(it)).values()) == 1


async def test_the_worker_has_the_job_unless_nothing_is_to_be_compared_by_itself() -> None:
    for settings, jobs in (
        (Reconcile(), ["reconcile"]),
        (Reconcile(every=None), ["reconcile"]),
        (Reconcile(every=None, whole_every=None), []),
    ):
        inventory = Inventory("memory://", metrics=[], reconcile=settings)
        async with inventory:
            ground: Any = inventory._running().ground
            assert [job.name for job in inventory.reconciler.jobs(ground)] == jobs


async def test_due_work_is_done_by_the_embedded_worker() -> None:
    async with shop(every=3600.0) as it:
        await it.by_hand("a", 1)
        await made_due(it, touched=4000.0)
        # The worker of the block has looked before it was due: another start looks anew.
        (job,) = it.inventory.reconciler.jobs(it.inventory._running().ground)
        stopping = asyncio.Event()
        task = asyncio.create_task(job.run(stopping))
        async with asyncio.timeout(10):
            while not await it.inventory.reconciler.discrepancies():
                await asyncio.sleep(0.01)
        stopping.set()
        await task


@pytest.mark.parametrize(
    ("field", "value"),
    [("every", 0), ("whole_every", -1.0), ("rate", 0), ("settle", True), ("confirm_above", -1), ("daily_limit", 1.5), ("every", "1h")],
)
def test_a_setting_that_makes_no_sense_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidOperation) as refused:
        Reconcile(**{field: value})
    assert refused.value.field == field


def test_a_limit_of_a_merchant_that_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidOperation):
        Reconcile(limits={"": 5})
    with pytest.raises(InvalidOperation):
        Reconcile(limits={"m1": -5})
