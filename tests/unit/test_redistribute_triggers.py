"""Triggers: they ask for a run when their function has done its work, and each is charged with its part."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from inventory_sdk import InsufficientStock, InvalidOperation, Line, NotStarted
from inventory_sdk.metrics import Triggered
from inventory_sdk.redistribute import asking
from inventory_sdk.redistribute.runs import shared_out
from tests.redistribution_kit import Runs, inventory_of
from tests.stock_kit import Recorded, until


async def test_a_trigger_asks_for_a_run_and_its_caller_does_not_wait_for_it() -> None:
    inventory, runs = inventory_of(), Runs()

    @inventory.coalesce(key="{shop}", debounce=0)
    async def recalculate(shop: str) -> int:
        return await runs.run(shop)

    @inventory.trigger("order_paid", runs=recalculate, key="order.shop")
    async def order_paid(order: dict[str, str]) -> str:
        return "paid"

    async with inventory:
        assert await order_paid({"shop": "s1"}) == "paid"
        await asyncio.wait_for(runs.began.wait(), 10)
        runs.end.set()
        await until(lambda: runs.now == 0)
    assert runs.story == ["s1"]


async def test_arguments_are_found_by_name_and_the_last_trigger_counts() -> None:
    inventory, runs = inventory_of(), Runs()
    runs.end.set()

    @inventory.coalesce(key="{shop}/{area}", debounce=0.05)
    async def recalculate(shop: str, area: int, why: str = "because") -> int:
        return await runs.run((shop, area, why))

    @inventory.trigger("moved", runs=recalculate)
    async def moved(area: int, shop: str, why: str) -> None: ...

    async with inventory:
        await asyncio.gather(*(moved(1, "s", f"{number}") for number in range(5)), moved(2, "s", "other"))
        await until(lambda: len(runs.story) == 2)
    # What has a default keeps it: a trigger passes what a run must have.
    assert sorted(runs.story) == [("s", 1, "because"), ("s", 2, "because")]


async def test_a_function_that_raised_asks_for_nothing_and_one_that_was_cancelled_does() -> None:
    inventory, runs = inventory_of(), Runs()
    runs.end.set()

    @inventory.coalesce(key="shop", debounce=0)
    async def recalculate(shop: str) -> int:
        return await runs.run(shop)

    hanging = asyncio.Event()

    @inventory.trigger("sold", runs=recalculate)
    @inventory.deducts(run="now", operation_id="name", sku="shop", quantity=1)
    async def sell(name: str, shop: str) -> None:
        if name == "hangs":
            hanging.set()
            await asyncio.Event().wait()
        if name == "fails":
            raise ValueError(name)

    async with inventory:
        await inventory.stock.restock([Line("a", 2), Line("b", 1)], operation_id="po")
        with pytest.raises(ValueError, match="fails"):
            await sell("fails", "a")
        await sell("one", "b")
        with pytest.raises(InsufficientStock):
            await sell("two", "b")
        task = asyncio.create_task(sell("hangs", "a"))
        await asyncio.wait_for(hanging.wait(), 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: len(runs.story) == 2)
    assert sorted(runs.story) == ["a", "b"]


async def test_each_trigger_is_counted_and_charged_by_its_part() -> None:
    recorded = Recorded()
    inventory, runs = inventory_of(metrics=[recorded]), Runs()

    @inventory.coalesce(key="shop", debounce=0.2, name="shops")
    async def recalculate(shop: str) -> int:
        for _ in range(200_000):
            pass
        return await runs.run(shop)

    @inventory.trigger("paid", runs=recalculate)
    async def paid(shop: str) -> None: ...

    @inventory.trigger("returned", runs=recalculate)
    async def returned(shop: str) -> None: ...

    @inventory.trigger("never", runs=recalculate)
    async def never(shop: str) -> None: ...

    runs.end.set()
    async with inventory:
        await returned("a")
        await asyncio.gather(*(paid("a") for _ in range(3)))
        await until(lambda: runs.story)
        while sum(each.runs for each in await inventory.redistribution.counted()) < 1:
            await asyncio.sleep(0.01)
        counts = {each.name: each for each in inventory.redistribution.triggers()}
        assert {name: (each.calls, each.runs) for name, each in counts.items()} == {"paid": (3, 0), "returned": (1, 1), "never": (0, 0)}
        assert counts["paid"].cpu_seconds == pytest.approx(3 * counts["returned"].cpu_seconds, abs=1e-5)
        assert counts["paid"].cpu_seconds > 0
        assert counts["paid"].function == "shops"
        assert counts["paid"].place.endswith("paid")
        assert inventory.redistribution.triggers()[0].name == "paid"  # the dearest first
    assert sum(event.calls.get("paid", 0) for event in recorded.events if isinstance(event, Triggered)) == 3


def test_cpu_time_is_shared_out_to_the_last_microsecond() -> None:
    assert shared_out(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert shared_out(0, {"a": 2}) == {"a": 0}
    assert shared_out(7, {}) == {}


async def test_while_redis_is_away_the_function_returns_and_the_trigger_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "TRIGGER_PATIENCE", 0.01)
    inventory, runs = inventory_of(), Runs()
    runs.end.set()

    @inventory.coalesce(key="shop", debounce=0)
    async def recalculate(shop: str) -> int:
        return await runs.run(shop)

    @inventory.trigger("paid", runs=recalculate)
    async def paid(shop: str) -> str:
        return "done"

    async with inventory:
        board = next(iter(inventory.redistribution._now().desks.values())).board
        real = board.request

        async def away(*_: Any) -> Any:
            raise RedisConnectionError("away")

        monkeypatch.setattr(board, "request", away)
        assert await paid("a") == "done"
        assert not runs.story
        monkeypatch.setattr(board, "request", real)
        await until(lambda: runs.story == ["a"])


async def test_wrong_arguments_are_refused_before_the_function_runs() -> None:
    inventory = inventory_of()
    called: list[str] = []

    @inventory.coalesce(key="shop")
    async def recalculate(shop: str) -> None: ...

    @inventory.trigger("paid", runs=recalculate, key="shop")
    async def paid(shop: Any) -> None:
        called.append(shop)

    with pytest.raises(NotStarted):
        await paid("a")
    async with inventory:
        for shop in (None, "", 1.5):
            with pytest.raises(InvalidOperation, match="key="):
                await paid(shop)
    assert not called


def test_a_trigger_that_does_not_fit_is_refused_at_decoration() -> None:
    inventory = inventory_of()

    @inventory.coalesce(key="shop")
    async def one(shop: str) -> None: ...

    @inventory.coalesce(key="{shop}/{area}")
    async def two(shop: str, area: str) -> None: ...

    async def plain(shop: str) -> None: ...

    async def other(shop: str) -> None: ...

    with pytest.raises(TypeError, match=r"must be a function with @inventory\.coalesce"):
        inventory.trigger("t", runs=plain)
    with pytest.raises(TypeError, match="has no such parameter: add it"):
        inventory.trigger("t", runs=two)(plain)
    with pytest.raises(TypeError, match="not one parameter"):
        inventory.trigger("t", runs=two, key="shop")(plain)
    with pytest.raises(TypeError, match="no parameter 'shop_id'"):
        inventory.trigger("t", runs=one, key="{shop_id}")(plain)
    inventory.trigger("t", runs=one)(plain)
    with pytest.raises(TypeError, match="each place has a name of its own"):
        inventory.trigger("t", runs=one)(other)
    with pytest.raises(InvalidOperation, match="trigger="):
        inventory.trigger("", runs=one)


def test_before_the_start_the_triggers_are_listed_with_zeros() -> None:
    inventory = inventory_of()

    @inventory.coalesce(key="shop")
    async def recalculate(shop: str) -> None: ...

    @inventory.trigger("paid", runs=recalculate)
    async def paid(shop: str) -> None: ...

    assert [(each.name, each.calls, each.cpu_seconds) for each in inventory.redistribution.triggers()] == [("paid", 0, 0.0)]
