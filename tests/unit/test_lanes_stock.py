"""Lanes and stock together: one wrapper, the lane's time and the hold's, the lane's batches and its share of the connections."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from inventory_sdk import DeadlineExceeded, Inventory, Lane, LaneFull, Line, Receipt, context, injected
from inventory_sdk.errors import InsufficientStock, InvalidOperation
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.model import partition_of
from inventory_sdk.traffic.aspect import LaneAspect
from inventory_sdk.traffic.lanes import Lanes
from inventory_sdk.weave import site_of, weave
from tests.stock_kit import Recorded
from tests.unit.aspect_fakes import FakeStock, Shop

LANES = {"core": Lane(timeout=2.0), "batch": Lane(timeout=0.5, timeout_per_line=0.25, max_concurrency=1, max_queue=0)}


class LaneShop(Shop):
    def __init__(self, stock: FakeStock) -> None:
        super().__init__(stock)
        self.lanes = Lanes(LANES, NoMetrics())

    def lane(self, name: str) -> Any:
        return lambda function: weave(function, LaneAspect(self, name, None))


@pytest.fixture
def shop() -> LaneShop:
    return LaneShop(FakeStock(a=10, b=10))


async def look(order: str, items: dict[str, int], receipt: Receipt = injected()) -> tuple[str, float]:
    scope = context.living()
    assert scope is not None
    return context.lane.get(), scope.timeout


RESERVES = {"run": "now", "operation_id": "order", "lines": "items"}


async def test_a_hold_without_ttl_lasts_a_minute_more_than_the_call_has(shop: LaneShop) -> None:
    held = shop.lane("core")(shop.reserves(**RESERVES)(look))
    assert await held("o1", {"a": 1}) == ("core", 2.0)
    assert shop.stock.asked[-1][1]["ttl"] == 62.0
    async with shop.lanes.deadline(0.5):
        await held("o2", {"a": 1})
    assert 60.0 < shop.stock.asked[-1][1]["ttl"] <= 60.5


async def test_the_timeout_grows_with_the_lines_of_the_stock_decorator_in_whatever_order_they_are_stacked(shop: LaneShop) -> None:
    over = shop.lane("batch")(shop.reserves(**RESERVES)(look))
    under = shop.reserves(**RESERVES)(shop.lane("batch")(look))
    assert await over("o1", {"a": 1, "b": 2}) == ("batch", 1.0)
    assert await under("o2", {"a": 1}) == ("batch", 0.75)
    site = site_of(under)
    assert site is not None
    assert [aspect.order.name for aspect in site.aspects] == ["LANE", "STOCK"]
    assert under.__wrapped__ is look


async def test_lines_that_make_no_sense_are_refused_in_the_words_of_the_stock_decorator(shop: LaneShop) -> None:
    raises: Any = {InvalidOperation: KeyError}
    held = shop.lane("batch")(shop.reserves(**RESERVES, raises=raises)(look))
    with pytest.raises(KeyError):
        await held("o1", {"a": 0})
    assert shop.lanes.usage()["batch"].running == 0


async def test_a_refusal_at_the_door_asks_nothing_of_the_stock(shop: LaneShop) -> None:
    held = shop.lane("batch")(shop.reserves(**RESERVES)(look))

    async def other() -> None:
        with pytest.raises(LaneFull):
            await held("o1", {"a": 1})

    waiting = asyncio.Event()

    async def busy() -> None:
        async with shop.lanes.enter("batch"):
            await waiting.wait()

    task = asyncio.create_task(busy())
    await asyncio.sleep(0)
    await other()
    waiting.set()
    await task
    assert shop.stock.log == []


async def test_a_function_that_is_ended_by_its_deadline_gives_its_stock_back(shop: LaneShop) -> None:
    @shop.lane("core")
    @shop.reserves(**RESERVES)
    async def slow(order: str, items: dict[str, int]) -> None:
        await asyncio.sleep(60)

    with pytest.raises(DeadlineExceeded):
        async with shop.lanes.deadline(0.05):
            await slow("o1", {"a": 4})
    await shop.drained()
    assert shop.stock.available["a"] == 10
    assert shop.stock.log == ["reserve", "undo"]


async def test_calls_ride_in_the_batches_of_their_lane_and_without_one_in_the_default_one() -> None:
    recorded = Recorded()
    inventory = Inventory("memory://", metrics=[recorded])
    deduct = inventory.lane("core")(inventory.stock.deduct)
    async with inventory:
        await inventory.stock.restock([Line("a", 10)])
        recorded.events.clear()
        await asyncio.gather(deduct([Line("a", 1)]), inventory.stock.deduct([Line("a", 1)]), deduct([Line("a", 1)]))
    lanes = Counter({batch.lane: 0 for batch in recorded.batches()})
    for batch in recorded.batches():
        lanes[batch.lane] += batch.accepted.get("deduct", 0)
    assert (lanes["core"], lanes["default"]) == (2, 1)


async def test_a_lane_has_no_more_script_calls_under_way_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    merchants = {partition_of(f"m{number}", 4): f"m{number}" for number in range(20)}.values()
    lanes = {"core": Lane(), "batch": Lane(connections=1)}
    inventory = Inventory("memory://", partitions=4, metrics=[NoMetrics()], lanes=lanes)
    most: Counter[str] = Counter()
    now: Counter[str] = Counter()
    async with inventory:
        for merchant in merchants:
            await inventory.stock.restock([Line("a", 10)], merchant=merchant)
        wire = inventory._engine().wire
        run = wire.run

        async def watched(name: str, keys: Any, arguments: Any, *behind: Any) -> Any:
            task = asyncio.current_task()
            assert task is not None
            lane = task.get_name().rpartition("/")[2]
            now[lane] += 1
            most[lane] = max(most[lane], now[lane])
            try:
                await asyncio.sleep(0.005)
                return await run(name, keys, arguments, *behind)
            finally:
                now[lane] -= 1

        monkeypatch.setattr(wire, "run", watched)
        for lane in lanes:
            for _ in range(2):
                deduct = inventory.lane(lane)(inventory.stock.deduct)
                await asyncio.gather(*[deduct([Line("a", 1)], merchant=merchant) for merchant in merchants])
    assert (most["core"], most["batch"]) == (4, 1)


async def test_a_call_that_leaves_while_its_lane_has_no_connection_to_spare_was_not_sent() -> None:
    inventory = Inventory("memory://", metrics=[NoMetrics()], lanes={"batch": Lane(connections=1)})
    deduct = inventory.lane("batch")(inventory.stock.deduct)
    async with inventory:
        await inventory.stock.restock([Line("a", 10)])
        share = inventory._engine()._shares["batch"]
        async with share:
            task = asyncio.create_task(deduct([Line("a", 4)], operation_id="gone"))
            for _ in range(10):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        await deduct([Line("a", 1)], operation_id="stays")
        assert await inventory.stock.status("gone") is None
        assert (await inventory.stock.level("a")).available == 9


async def test_a_requests_operation_id_names_one_act_of_each_kind_that_has_none(shop: LaneShop) -> None:
    inventory = Inventory("memory://", metrics=[NoMetrics()])
    stock = inventory.stock
    async with inventory:
        token = context.operation.set(context.OperationName("key-1", "Idempotency-Key"))
        try:
            first = await stock.restock([Line("a", 10)])
            with pytest.raises(InvalidOperation, match="names one act"):
                await stock.deduct([Line("a", 1)])
            own = await stock.reserve([Line("a", 1)], operation_id="own")
            closed = await stock.confirm("own")
        finally:
            context.operation.reset(token)
        assert (first.operation_id, own.operation_id, closed.operation_id) == ("key-1", "own", "own\x1fconfirm")
        assert (await stock.level("a")).available == 9

        @inventory.restocks(run="now", sku="sku", quantity=5)
        async def receive(sku: str) -> None:
            return None

        for _ in range(2):  # two requests with one key
            token = context.operation.set(context.OperationName("key-2", "Idempotency-Key"))
            await receive("a")
            context.operation.reset(token)
        assert (await stock.level("a")).available == 14
        with pytest.raises(InsufficientStock):
            await stock.deduct([Line("a", 100)])
