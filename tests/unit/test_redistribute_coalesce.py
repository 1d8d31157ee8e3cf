"""Coalescing: one running and one waiting per key, the last request never lost, and every caller has a run that began after its call."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis
from redis.exceptions import ConnectionError as RedisConnectionError

from inventory_sdk import (
    InvalidOperation,
    Inventory,
    Lane,
    Line,
    NotStarted,
    Recalculation,
    RecalculationCutOff,
    RecalculationFailed,
    RedistributionPolicy,
    context,
    injected,
)
from inventory_sdk.metrics import Happened, Recalculated, RecalculationsDue, Retried
from inventory_sdk.redistribute import controller
from tests.redistribution_kit import Runs, inventory_of
from tests.stock_kit import Recorded, until


def held(inventory: Inventory, runs: Runs, **options: Any) -> Callable[[str, int], Awaitable[int]]:
    @inventory.coalesce(**{"key": "{shop}", "debounce": 0, **options})
    async def recalculate(shop: str, number: int) -> int:
        return await runs.run((shop, number))

    return recalculate


async def test_callers_of_one_key_share_a_run_with_the_last_ones_arguments() -> None:
    inventory, runs = inventory_of(), Runs()
    recalculate = held(inventory, runs, debounce=0.05)
    runs.end.set()
    async with inventory:
        assert await asyncio.gather(*(recalculate("a", number) for number in range(50))) == [1] * 50
    assert runs.story == [("a", 49)]


async def test_one_is_running_and_one_is_waiting_and_who_comes_during_a_run_gets_the_next() -> None:
    inventory, runs = inventory_of(), Runs()
    recalculate = held(inventory, runs)
    async with inventory:
        first = asyncio.create_task(recalculate("a", 0))
        await asyncio.wait_for(runs.began.wait(), 10)
        later = [asyncio.create_task(recalculate("a", number)) for number in range(1, 30)]
        desk = next(iter(inventory.redistribution._now().desks.values()))
        while not (await desk.board.counted()).get("(direct)", None) or (await desk.board.counted())["(direct)"].calls < 30:
            await asyncio.sleep(0)
        runs.end.set()
        assert await first == 1
        assert await asyncio.gather(*later) == [2] * 29
    assert runs.story == [("a", 0), ("a", 29)]
    assert runs.most == 1


async def test_keys_run_side_by_side_as_far_as_the_policy_allows() -> None:
    inventory, runs = inventory_of(redistribution=RedistributionPolicy(max_concurrency=3, cpu=1.0, lag=10)), Runs()
    recalculate = held(inventory, runs)
    async with inventory:
        tasks = [asyncio.create_task(recalculate(str(key), key)) for key in range(7)]
        await until(lambda: runs.now == 3)
        runs.end.set()
        await asyncio.gather(*tasks)
    assert runs.most == 3
    assert len(runs.story) == 7


async def test_max_wait_ends_a_debounce_that_is_pushed_again_and_again() -> None:
    inventory, runs = inventory_of(), Runs()
    recalculate = held(inventory, runs, debounce=0.4, max_wait=0.5)
    runs.end.set()
    async with inventory:
        tasks = []
        while not runs.story:  # each call pushes the run 0.4 s away
            tasks.append(asyncio.create_task(recalculate("a", len(tasks))))
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)


async def test_a_cancelled_caller_does_not_cancel_the_run() -> None:
    inventory, runs = inventory_of(), Runs()
    recalculate = held(inventory, runs)
    async with inventory:
        first = asyncio.create_task(recalculate("a", 0))
        await asyncio.wait_for(runs.began.wait(), 10)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert runs.now == 1
        second = asyncio.create_task(recalculate("a", 1))
        await asyncio.sleep(0)
        second.cancel()  # before its request is written down: it is, all the same
        runs.end.set()
        await until(lambda: len(runs.story) == 2)
    assert runs.story == [("a", 0), ("a", 1)]


async def test_an_error_reaches_every_waiter_as_an_error_of_its_own() -> None:
    told: list[Any] = []
    recorded = Recorded()
    inventory, runs = inventory_of(metrics=[recorded]), Runs()
    inventory.on("recalculation_failed")(told.append)
    recalculate = held(inventory, runs, debounce=0.02, name="shops")
    runs.fails = ValueError("no such shop")
    runs.end.set()
    async with inventory:
        errors = await asyncio.gather(*(recalculate("a", 0) for _ in range(5)), return_exceptions=True)
        await until(lambda: bool(told))
    assert len({id(error) for error in errors}) == 5
    for error in errors:
        assert isinstance(error, RecalculationFailed)
        assert (error.function, error.key, error.kind, error.why) == ("shops", "a", "ValueError", "no such shop")
        assert error.__cause__ is runs.fails
    assert told[0]["key"] == "a"
    assert [event.outcome for event in recorded.events if isinstance(event, Recalculated)] == ["failed"]
    assert [event.name for event in recorded.events if isinstance(event, Happened)] == ["recalculation_failed"]


async def test_a_handler_that_raises_does_not_stop_the_runner() -> None:
    inventory, runs = inventory_of(), Runs()

    @inventory.on("recalculation_failed")
    def handle(_: object) -> None:
        raise RuntimeError("handler")

    recalculate = held(inventory, runs)
    runs.fails = ValueError("x")
    runs.end.set()
    async with inventory:
        for _ in range(2):
            with pytest.raises(RecalculationFailed):
                await recalculate("a", 0)


async def test_a_run_in_the_loop_is_cut_off_after_its_timeout() -> None:
    told: list[Any] = []
    inventory, runs = inventory_of(), Runs()
    inventory.on("recalculation_cut_off")(told.append)
    recalculate = held(inventory, runs, timeout=0.02)
    async with inventory:
        with pytest.raises(RecalculationCutOff, match=r"not done within 0\.02 s"):
            await recalculate("a", 0)
        await until(lambda: bool(told))
        runs.end.set()
        assert await recalculate("a", 1) == 2  # and the key is free


async def test_what_swallows_its_cancellation_keeps_its_key_and_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.redistribute.runs.GRACE", 0.01)
    recorded = Recorded()
    inventory = inventory_of(metrics=[recorded])
    swallowed = 0

    @inventory.coalesce(key="shop", debounce=0, timeout=0.01)
    async def stubborn(shop: str) -> int:
        nonlocal swallowed
        while swallowed < 3:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed += 1
                while swallowed == 1 and not any(isinstance(each, Happened) for each in recorded.events):
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(0.001)
        return 7

    async with inventory:
        assert await stubborn("a") == 7  # too late, but it did return
    assert "recalculation_stuck" in {event.name for event in recorded.events if isinstance(event, Happened)}


async def test_a_run_inherits_neither_deadline_nor_lane_nor_merchant_of_who_asked() -> None:
    inventory = inventory_of(lanes={"core": Lane(timeout=60)})
    seen: list[Any] = []

    @inventory.coalesce(key="shop", debounce=0)
    async def look(shop: str) -> None:
        seen.append((context.lane.get(), context.remaining(), context.merchant.get()))

    context.merchant.set("somebody")  # before the start as well: the runner's tasks come from there
    async with inventory.lanes.enter("core"), inventory:
        await look("a")
    assert seen == [("redistribution", None, None)]


async def test_a_lane_of_the_function_is_the_runs_and_not_the_callers() -> None:
    inventory, runs = inventory_of(lanes={"heavy": Lane(max_concurrency=1, max_queue=0, timeout=60)}), Runs()
    recalculate = inventory.lane("heavy")(held(inventory, runs))
    async with inventory:
        tasks = [asyncio.create_task(recalculate("a", number)) for number in range(20)]
        await asyncio.wait_for(runs.began.wait(), 10)
        assert inventory.lanes.usage()["heavy"].running == 1
        runs.end.set()
        await asyncio.gather(*tasks)
    assert runs.most == 1


async def test_stock_moves_within_a_run_with_the_functions_own_decorators() -> None:
    inventory = inventory_of()

    @inventory.coalesce(key="shop", debounce=0)
    @inventory.deducts(run="now", operation_id="shop", sku="sku", quantity=1)
    async def move(shop: str, sku: str) -> None: ...

    async with inventory:
        await inventory.stock.restock([Line("a", 5)], operation_id="po")
        await move("shop-1", "a")
        assert (await inventory.stock.level("a")).available == 4


async def test_a_run_that_waits_for_itself_is_refused() -> None:
    inventory = inventory_of()

    @inventory.coalesce(key="shop", debounce=0)
    async def circle(shop: str) -> None:
        await circle(shop)

    async with inventory:
        with pytest.raises(RecalculationFailed, match="would wait for itself"):
            await circle("a")


async def test_fences_and_versions_only_go_up() -> None:
    inventory = inventory_of()
    seen: list[Recalculation] = []

    @inventory.coalesce(key="shop", debounce=0)
    async def look(shop: str, run: Recalculation = injected()) -> None:
        seen.append(run)

    async with inventory:
        for shop in ("a", "b", "a"):
            await look(shop)
    assert [run.key for run in seen] == ["a", "b", "a"]
    assert [run.fence for run in seen] == sorted({run.fence for run in seen})
    assert [run.version for run in seen] == sorted({run.version for run in seen})


async def test_a_process_that_only_asks_gets_result_and_error_of_one_that_runs() -> None:
    redis = FakeAsyncRedis()
    asks, works = inventory_of(redis, database="sqlite+aiosqlite://"), inventory_of(redis, database="sqlite+aiosqlite://")
    asks.redistribution.runs_here = False
    runs = Runs()
    runs.end.set()
    ask, _ = held(asks, Runs(), name="shops"), held(works, runs, name="shops")
    async with asks, works:
        assert await ask("a", 5) == 1
        runs.fails = ValueError("broken")
        with pytest.raises(RecalculationFailed, match=r"shops, key='b': ValueError: broken"):
            await ask("b", 6)
    assert runs.story == [("a", 5), ("b", 6)]


async def test_who_waits_asks_anew_when_redis_forgot() -> None:
    redis = FakeAsyncRedis()
    inventory, runs = inventory_of(redis, database="sqlite+aiosqlite://"), Runs()
    inventory.redistribution.runs_here = False
    recalculate = held(inventory, runs)
    async with inventory:
        task = asyncio.create_task(recalculate("a", 1))
        desk = next(iter(inventory.redistribution._now().desks.values()))
        await until(lambda: bool(desk.waiting.awaited))
        await redis.flushall()
        while not (await desk.board.peek(1))[0]:  # it was asked for once more
            await asyncio.sleep(0.01)
        (claim,) = await desk.board.claim(["a"], 10)
        await desk.board.finish(claim, '{"result": 3}', 0, 0, 0, {})
        assert await asyncio.wait_for(task, 10) == 3


async def test_closing_gives_back_what_runs_and_the_next_one_runs_it() -> None:
    redis = FakeAsyncRedis()
    first, second = inventory_of(redis, database="sqlite+aiosqlite://"), inventory_of(redis, database="sqlite+aiosqlite://")
    one, other = Runs(), Runs()
    ask = held(first, one, name="shops")
    held(second, other, name="shops")
    other.end.set()
    async with first:
        waiting = asyncio.create_task(ask("a", 1))
        await asyncio.wait_for(one.began.wait(), 10)
    with pytest.raises(NotStarted, match="somebody waited for a run"):
        await waiting
    assert one.now == 0
    async with second:
        await asyncio.wait_for(other.began.wait(), 10)  # and not after the lease of 10 s
    assert other.story == [("a", 1)]


async def test_closing_ends_a_task_that_lost_its_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.ending.AGAIN", 0.01)
    inventory = inventory_of()
    held(inventory, Runs())
    lost = asyncio.Event()

    async def counted() -> dict[str, Any]:
        with contextlib.suppress(asyncio.CancelledError):
            if not lost.is_set():
                lost.set()
                await asyncio.Event().wait()
        return {}

    async with inventory:
        now = inventory.redistribution._now()
        monkeypatch.setattr(next(iter(now.desks.values())).board, "counted", counted)
        task = asyncio.create_task(now._refresh())
        now._tasks.append(task)
        await asyncio.wait_for(lost.wait(), 10)
    assert task.cancelled()


async def test_a_request_is_tried_until_redis_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded()
    inventory, runs = inventory_of(metrics=[recorded]), Runs()
    recalculate = held(inventory, runs)
    runs.end.set()
    async with inventory:
        board = next(iter(inventory.redistribution._now().desks.values())).board
        real, faults = board.request, 0

        async def flaky(*arguments: Any) -> Any:
            nonlocal faults
            faults += 1
            if faults < 4:
                raise RedisConnectionError("away")
            return await real(*arguments)

        monkeypatch.setattr(board, "request", flaky)
        assert await asyncio.gather(recalculate("a", 1), recalculate("a", 2)) == [1, 1]
    assert Retried("redistribution", "ConnectionError") in recorded.events


async def test_a_caller_is_told_when_redis_does_not_take_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "PATIENCE", 0.01)
    monkeypatch.setattr("inventory_sdk.redistribute.asking.FLUSH", 0.01)
    inventory, runs = inventory_of(), Runs()
    recalculate = held(inventory, runs, name="shops")

    async def away(*_: Any) -> Any:
        raise RedisConnectionError("away")

    with pytest.raises(Exception, match=r"shops: Redis did not take the requests of 1 keys \(a\); they are lost"):
        async with inventory:
            monkeypatch.setattr(next(iter(inventory.redistribution._now().desks.values())).board, "request", away)
            with pytest.raises(RecalculationFailed, match="still being tried"):
                await recalculate("a", 1)


async def test_any_mix_of_calls_cancellations_and_keys_ends_with_a_run_after_the_last_call() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201  # replays a failure
    dice = random.Random(seed)
    inventory = inventory_of(redistribution=RedistributionPolicy(max_concurrency=4, cpu=1.0, lag=10))
    begun: dict[str, list[float]] = {}
    now: dict[str, int] = {}

    @inventory.coalesce(key="shop", debounce=0.005, max_wait=0.02)
    async def recalculate(shop: str, _salt: int) -> float:
        assert not now.get(shop)
        now[shop] = 1
        begun.setdefault(shop, []).append(time.monotonic())
        await asyncio.sleep(dice.random() * 0.01)
        now[shop] = 0
        return begun[shop][-1]

    async def caller() -> None:
        for _ in range(15):
            called = time.monotonic()
            task = asyncio.ensure_future(recalculate(dice.choice("abcde"), dice.randrange(9)))
            if dice.random() < 0.3:
                await asyncio.sleep(dice.random() * 0.01)
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await task >= called

    async with inventory:
        await asyncio.gather(*(caller() for _ in range(20)))
        asked = time.monotonic()
        await asyncio.gather(*(recalculate(shop, 0) for shop in "abcde"))
        assert all(times[-1] >= asked for times in begun.values())


def test_what_can_not_be_coalesced_is_refused_at_decoration() -> None:
    inventory = inventory_of()

    class Service:
        async def method(self, shop: str) -> None: ...

    async def unsaid(shop: str): ...  # type: ignore[no-untyped-def]

    async def untyped(shop) -> None: ...  # type: ignore[no-untyped-def]

    async def fine(shop: str) -> None: ...

    async def other(shop: str) -> None: ...

    def plain(shop: str) -> None: ...

    for function, why in (
        (Service.method, "has a 'self'"),
        (unsaid, "return annotation"),
        (untyped, "needs an annotation"),
        (plain, "not an async function"),
    ):
        with pytest.raises(TypeError, match=why):
            inventory.coalesce(key="shop")(function)
    with pytest.raises(TypeError, match="no parameter 'shp'"):
        inventory.coalesce(key="shp")(fine)
    with pytest.raises(TypeError, match="imports the function by its name"):
        inventory.coalesce(key="shop", executor="process")(fine)
    inventory.coalesce(key="shop", name="one")(fine)
    with pytest.raises(TypeError, match="is taken by"):
        inventory.coalesce(key="shop", name="one")(other)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"debounce": -1}, "debounce"),
        ({"debounce": 3, "max_wait": 2}, "max_wait"),
        ({"timeout": 0}, "timeout"),
        ({"executor": "thread"}, "executor"),
        ({"cpu_budget": 0}, "cpu_budget"),
        ({"key_cpu_budget": 1.5}, "key_cpu_budget"),
        ({"cpu_budget": True}, "cpu_budget"),
    ],
)
def test_an_option_that_can_not_be_is_named(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidOperation) as refused:
        inventory_of().coalesce(key="shop", **options)
    assert refused.value.field == field


@pytest.mark.parametrize(
    "options",
    [
        {"max_concurrency": 0},
        {"cpu_budget": 2},
        {"cpu": 0},
        {"cpu": None},
        {"lag": 0},
        {"floor": 0},
        {"lease": 0},
        {"nice": 20},
        {"slows": "core"},
        {"slows": ("core", "batch")},
        {"slows": ("batch", "batch")},
    ],
)
def test_a_policy_that_can_not_be_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOperation) as refused:
        RedistributionPolicy(**options)
    assert refused.value.field in options


def test_a_lane_to_be_slowed_must_be_declared() -> None:
    with pytest.raises(InvalidOperation, match="'sync': is not declared"):
        Inventory("memory://", redistribution=RedistributionPolicy(slows=("sync",)))


async def test_keys_and_arguments_are_checked_before_anything_is_asked_for() -> None:
    inventory, runs = inventory_of(), Runs()
    recalculate = held(inventory, runs)
    with pytest.raises(NotStarted):
        await recalculate("a", 1)
    async with inventory:
        for shop, number, field in (("", 1, "key"), ("x" * 129, 1, "key"), ("a", "many", "number")):
            with pytest.raises(InvalidOperation) as refused:
                await recalculate(shop, number)  # type: ignore[arg-type]
            assert refused.value.field == field
        assert not runs.story


@pytest.mark.parametrize("place", ["fakeredis", pytest.param("redis", marks=pytest.mark.redis)])
async def test_what_is_due_and_calculated_by_nobody_is_told_with_its_age(place: str, redis_url: str, namespace: str) -> None:
    recorded = Recorded()
    options: dict[str, Any] = {"metrics": [recorded], "database": "sqlite+aiosqlite://", "namespace": namespace}
    inventory, runs = inventory_of(FakeAsyncRedis() if place == "fakeredis" else redis_url, **options), Runs()
    inventory.redistribution.runs_here = False
    recalculate = held(inventory, runs, name="recount")

    @inventory.trigger("paid", runs=recalculate)
    async def paid(shop: str, number: int) -> None: ...

    def told() -> RecalculationsDue:
        return [event for event in recorded.events if isinstance(event, RecalculationsDue)][-1]

    async with inventory:
        now = inventory.redistribution._now()
        await now.tell_due()
        assert told() == RecalculationsDue("recount", 0, 0.0)
        await asyncio.gather(*(paid(shop, 1) for shop in "abc"))
        await asyncio.sleep(0.02)
        await now.tell_due()
        assert told().keys == 3
        assert told().overdue_seconds >= 0.02
        desk = now.desks["recount"]
        claims = await desk.board.claim(["a", "b"], 30.0)
        await now.tell_due()
        assert told().keys == 1  # what somebody calculates is not overdue before his lease ends
        for claim in (*claims, *await desk.board.claim(["c"], 30.0)):
            await desk.board.finish(claim, "", 0, 0, 0, {})
        await now.tell_due()
        assert told() == RecalculationsDue("recount", 0, 0.0)
