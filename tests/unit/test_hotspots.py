"""``@inventory.hotspot`` and ``inventory.hotspots``, embedded: what is cold pays nothing, what is hot is found, paced and told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from inventory_sdk import Detection, HotspotLimited, Inventory, Lane, Line
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.hotspot.board import Entry as Hot
from inventory_sdk.hotspot.board import Look, mark_of
from inventory_sdk.hotspot.detector import CALLS, Detector
from inventory_sdk.hotspot.rates import Rate, make_rule, parse_rate
from inventory_sdk.metrics import Event, Happened, HotspotsUsed
from inventory_sdk.model import key_of

A, B = key_of("m1", "a"), key_of("m1", "b")


class Kept:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        self.events.append(event)


@pytest.fixture
def metrics() -> Kept:
    return Kept()


@pytest.fixture
async def inventory(metrics: Kept) -> AsyncIterator[Inventory]:
    made = Inventory(
        "memory://",
        merchant="m1",
        metrics=[metrics],
        detection=Detection(stay=0.5),
        lanes={"core": Lane(max_concurrency=8, timeout=30.0)},
    )
    async with made:
        await made.stock.restock([Line("a", 10_000), Line("b", 10_000)], operation_id="po")
        yield made


def heat(inventory: Inventory, *keys: str, threshold: float = 100.0) -> None:
    """As if every process had seen it."""
    watch = inventory.hotspots.here().watch(threshold)
    for key in keys:
        watch.hot[key] = 1.0


def buyer(inventory: Inventory, **options: Any) -> Any:
    @inventory.hotspot(**{"threshold": "100/second", "limit": "50/second", "max_wait": 0.2, **options})
    @inventory.deducts(run="now", sku="sku", quantity=1, operation_id="order")
    async def buy(order: str, sku: str) -> str:
        return order

    return buy


async def test_a_hot_key_is_paced_and_its_neighbour_never_waits(inventory: Inventory) -> None:
    """A peer's fault: while key A has to wait, key B waits with it."""
    buy = buyer(inventory, max_wait=5.0)
    heat(inventory, A)
    crowd = [asyncio.create_task(buy(f"a-{number}", "a")) for number in range(20)]
    await asyncio.sleep(0)
    await asyncio.gather(*(buy(f"b-{number}", "b") for number in range(20)))
    assert sum(task.done() for task in crowd) < 20
    assert [key.waiting for key in inventory.hotspots.top() if key.key == A] != [0]
    assert await asyncio.gather(*crowd) == [f"a-{number}" for number in range(20)]


async def test_what_is_refused_has_taken_nothing_and_says_when_to_come_back(inventory: Inventory, metrics: Kept) -> None:
    buy = buyer(inventory)
    heat(inventory, A)
    results = await asyncio.gather(*(buy(f"o{number}", "a") for number in range(60)), return_exceptions=True)
    refused = [each for each in results if isinstance(each, HotspotLimited)]
    assert refused
    assert all(0 < each.retry_after < 2 for each in refused)
    assert "sku 'a' of merchant 'm1'" in str(refused[0])
    await inventory.settled()
    assert (await inventory.stock.level("a")).available == 10_000 - (60 - len(refused))


async def test_on_reject_answers_in_place_of_the_call(inventory: Inventory) -> None:
    async def sorry(limited: HotspotLimited) -> str:
        return f"come back in {limited.retry_after > 0}"

    buy = buyer(inventory, overflow="reject", on_reject=sorry)
    heat(inventory, A)
    results = await asyncio.gather(*(buy(f"o{number}", "a") for number in range(60)))
    assert results.count("come back in True") > 30
    assert any(result.startswith("o") for result in results)


async def test_a_cart_takes_its_hot_keys_in_one_order_so_that_two_carts_never_wait_for_each_other(inventory: Inventory) -> None:
    @inventory.hotspot(threshold="100/second", limit="100/second", max_wait=10.0, keys="skus")
    async def look(skus: list[str]) -> list[str]:
        return skus

    heat(inventory, "x", "y", "z")
    orders = (["x", "y", "z"], ["z", "y", "x"], ["y", "x", "z", "x"])
    async with asyncio.timeout(20):
        await asyncio.gather(*(look(orders[number % 3]) for number in range(30)))
    paces = inventory.hotspots.here().paces
    assert paces is not None
    assert paces.waiting == 0


async def test_a_cart_that_is_refused_at_its_second_key_gives_back_the_first(inventory: Inventory) -> None:
    @inventory.hotspot(threshold="100/second", limit="1/second", max_wait=0.05, keys="keys")
    async def look(keys: list[str]) -> None: ...

    heat(inventory, "first", "second")
    await look(["second"])
    paces = inventory.hotspots.here().paces
    assert paces is not None
    with pytest.raises(HotspotLimited, match="second"):
        await look(["first", "second"])
    await look(["first"])  # its permit is there again


async def test_waiters_of_hot_keys_leave_half_of_the_lane_to_the_others(inventory: Inventory) -> None:
    @inventory.lane("core")
    @inventory.hotspot(threshold="100/second", limit="10/second", max_wait=20.0, keys="key")
    async def call(key: str) -> str:
        return key

    heat(inventory, "hot")
    crowd = [asyncio.create_task(call("hot")) for _ in range(8)]
    await asyncio.sleep(0.05)
    assert await call("cold") == "cold"
    assert sum(isinstance(task.exception(), HotspotLimited) for task in crowd if task.done()) >= 3
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)


async def test_a_caller_who_goes_away_while_waiting_takes_no_stock_and_no_turn(inventory: Inventory) -> None:
    buy = buyer(inventory, limit="20/second", max_wait=5.0)
    heat(inventory, A)
    crowd = [asyncio.create_task(buy(f"o{number}", "a")) for number in range(10)]
    await asyncio.sleep(0)
    gone = crowd[-7::2]  # of those at the end of the line
    for task in gone:
        task.cancel()
    results = await asyncio.gather(*crowd, return_exceptions=True)
    went = sum(isinstance(each, str) for each in results)
    assert went == 10 - len(gone)
    await inventory.settled()
    assert (await inventory.stock.level("a")).available == 10_000 - went


async def test_what_becomes_hot_is_told_shown_counted_and_cools_again(inventory: Inventory, metrics: Kept) -> None:
    told: list[tuple[str, Mapping[str, Any]]] = []
    cooled = asyncio.Event()
    inventory.on("hot")(lambda facts: told.append(("hot", facts)))

    @inventory.on("cool")
    def cool(facts: Mapping[str, Any]) -> None:
        told.append(("cool", facts))
        cooled.set()

    buy = buyer(inventory, threshold="20/second", limit="1000/second", max_wait=1.0)
    async with asyncio.timeout(30):
        number = 0
        while not any(key.hot_since for key in inventory.hotspots.top()):
            await buy(f"o{number}", "a")
            number += 1
    (key,) = [each for each in inventory.hotspots.top() if each.hot_since]
    assert (key.key, key.merchant, key.sku, key.promoted) == (A, "m1", "a", False)
    await buy("once-more", "a")
    await asyncio.wait_for(cooled.wait(), 30)
    assert [what for what, _ in told] == ["hot", "cool"]
    assert (told[0][1]["merchant"], told[0][1]["sku"], told[0][1]["threshold"]) == ("m1", "a", 20.0)
    assert not any(each.hot_since for each in inventory.hotspots.top())
    await inventory.close()
    await inventory.start()
    assert {event.name for event in metrics.events if isinstance(event, Happened)} >= {"hotspot_heated", "hotspot_cooled"}
    assert sum(event.admitted for event in metrics.events if isinstance(event, HotspotsUsed)) >= 1


async def test_keys_come_from_the_stock_lines_with_each_lines_merchant(inventory: Inventory) -> None:
    @inventory.hotspot(threshold="100/second", limit="100/second")
    @inventory.reserves(run="now", lines="lines", operation_id="order", ttl=60, merchant="shop")
    async def hold(order: str, lines: list[Line], shop: str) -> None: ...

    await inventory.stock.restock([Line("a", 5)], merchant="m2", operation_id="po2")
    await hold("o1", [Line("a", 1), Line("a", 1, "m1")], "m2")
    assert inventory.hotspots.here().detector.rings[CALLS].counts == {key_of("m2", "a"): 1, A: 1}


async def test_what_names_no_key_is_refused_in_the_callers_words(inventory: Inventory) -> None:
    class Bad(Exception): ...

    @inventory.hotspot(threshold="100/second", limit="100/second")
    @inventory.deducts(run="now", lines="lines", sku="sku", quantity="many", operation_id="order", raises={InvalidOperation: Bad})
    async def buy(order: str, lines: list[dict[str, Any]]) -> None: ...

    with pytest.raises(Bad):
        await buy("o1", [{"sku": None, "many": 1}])

    @inventory.hotspot(threshold="100/second", limit="100/second", keys="key")
    async def call(key: Any) -> None: ...

    for key in (None, 1.5, "", "a\x1fb", "x" * 1000):
        with pytest.raises(InvalidOperation, match="keys"):
            await call(key)
    await call(7)


def test_rules_that_do_not_fit_are_refused_at_decoration() -> None:
    inventory = Inventory("memory://", metrics=[])
    for options, field in (
        ({"threshold": "fast", "limit": "1/second"}, "threshold"),
        ({"threshold": "1/second", "limit": "0/second"}, "limit"),
        ({"threshold": "1/second", "limit": "1/fortnight"}, "limit"),
        ({"threshold": "1/second", "limit": "1/second", "max_wait": -1}, "max_wait"),
        ({"threshold": "1/second", "limit": "1/second", "max_wait": True}, "max_wait"),
        ({"threshold": "1/second", "limit": "1/second", "overflow": "drop"}, "overflow"),
    ):
        with pytest.raises(InvalidOperation, match=field):
            inventory.hotspot(**options)  # type: ignore[arg-type]

    async def plain(sku: str) -> None: ...

    decorate = inventory.hotspot(threshold="1/second", limit="1/second")
    with pytest.raises(TypeError, match="needs keys="):
        decorate(plain)
    with pytest.raises(TypeError, match="needs keys="):
        decorate(inventory.confirms(run="now", reservation="sku")(plain))
    with pytest.raises(TypeError, match="order"):
        inventory.hotspot(threshold="1/second", limit="1/second", keys="order")(plain)
    for detection in ({"window": 0.1}, {"stay": 0}, {"cool": 1}):
        with pytest.raises(InvalidOperation, match=next(iter(detection))):
            Detection(**detection)  # type: ignore[arg-type]
    with pytest.raises(InvalidOperation, match="promote"):
        Inventory("memory://", metrics=[], detection=Detection(promote="often"))


def test_rates_are_read_as_people_write_them() -> None:
    assert parse_rate("limit", "200/second") == Rate(200, 1)
    assert parse_rate("limit", "30 per minute").per_second == 0.5
    assert str(parse_rate("limit", "5/hours")) == "5/hour"
    assert make_rule("1/second", "2/second", 0.3, "reject").max_wait == 0.0


async def test_an_unstarted_inventory_counts_and_lets_go() -> None:
    inventory = Inventory("memory://", metrics=[])

    @inventory.hotspot(threshold="1/second", limit="1/second", keys="key")
    async def call(key: str) -> str:
        return key

    assert [await call("a") for _ in range(50)] == ["a"] * 50


async def test_an_inventory_that_is_replaced_for_a_while_has_hotspots_of_its_own_meanwhile(inventory: Inventory) -> None:
    buy = buyer(inventory)
    heat(inventory, A)
    before = inventory.hotspots.here()
    async with inventory.replaced(stock={"m1": {"a": 3}}):
        assert inventory.hotspots.here() is not before
        assert await buy("o1", "a") == "o1"
        assert not any(key.hot_since for key in inventory.hotspots.top())
    assert inventory.hotspots.here() is before
    assert before.ground is not None


# Judging ----------------------------------------------------------------------------------------------------------------------------


def looked(now: int, rate: float, hot: Mapping[str, Hot]) -> Look:
    return Look(now, {(CALLS, "a"): rate} if rate else {}, hot, 1, {})


async def test_heat_has_hysteresis_and_a_shortest_stay() -> None:
    detector = Detector(Detection(stay=10.0, cool=0.5))
    detector.watch(CALLS, 100.0)
    mark = mark_of(CALLS, 100.0, "a")
    assert not detector.judge(looked(0, 99.0, {})).heat
    assert list(detector.judge(looked(0, 100.0, {})).heat) == [mark]
    hot = {mark: Hot(since=0, seen=0)}
    assert not detector.judge(looked(5_000, 0.0, hot)).cool  # not for so long yet
    warm = detector.judge(looked(12_000, 60.0, hot))  # below the threshold, above the cool level
    assert (list(warm.touch), warm.cool, warm.heat) == ([mark], [], {})
    assert detector.judge(looked(12_000, 49.0, {mark: Hot(0, 3_000)})).cool == []  # cold, but not for long
    assert detector.judge(looked(12_000, 49.0, {mark: Hot(0, 1_000)})).cool == [mark]
    assert detector.judge(looked(12_000, 0.0, {mark: Hot(11_000, 1_000)})).cool == []  # hot again since


async def test_a_threshold_that_nobody_has_any_more_is_left_to_those_who_may_have_it_and_forgotten_later() -> None:
    detector = Detector(Detection(stay=10.0))
    other = mark_of(CALLS, 7.0, "a")
    assert detector.judge(looked(30_000, 0.0, {other: Hot(0, 0)})).cool == []
    assert detector.judge(looked(70_000, 0.0, {other: Hot(0, 0)})).cool == [other]
