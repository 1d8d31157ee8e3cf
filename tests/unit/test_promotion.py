"""``admission="auto"``: SKUs go to Redis while they are hot and come back, two processes on one stock, embedded."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from inventory_sdk import Detection, Inventory, Line, errors
from inventory_sdk.cli.admission import handed_over
from inventory_sdk.hotspot.board import mark_of
from inventory_sdk.hotspot.detector import IDLE_LOOKS, STOCK
from inventory_sdk.hotspot.promotion import Promotion
from inventory_sdk.ledger.protocol import AdmissionRow, LedgerUnavailable
from inventory_sdk.metrics import Event, PromotionsWaiting
from inventory_sdk.model import key_of, partition_of
from inventory_sdk.stock import handover

M = "m1"
NOW = time.time_ns() // 1_000_000
A, B, C = (key_of(M, sku) for sku in "abc")


class Two:
    """Two processes of one deployment: fakeredis and a database between them. The worker runs inside the first."""

    def __init__(self, database: str, prefix: str = "inventory_", **more: Any) -> None:
        server = fakeredis.FakeServer()
        self.redis = fakeredis.FakeAsyncRedis(server=server)
        options: dict[str, Any] = {
            "database": database,
            "table_prefix": prefix,
            "metrics": [],
            "merchant": M,
            "redis": self.redis,
            "admission": "auto",
            # The tests say themselves what is hot.
            "detection": Detection(stay=600.0, promote="1000000/second"),
            **more,
        }
        self.one = Inventory(**options)
        self.two = Inventory(**options)

    @property
    def mover(self) -> Promotion:
        promotion = self.one.hotspots.here().promotion
        assert promotion is not None
        return promotion

    async def places(self) -> dict[str, str]:
        return {row.field[-1]: row.admission for row in await self.one.ledger.admission(M)}

    async def counted(self, **expected: dict[str, int]) -> None:
        """Redis and ledger agree, all rows are sound, and this is what the SKUs came to."""
        await self.one.settled()
        assert await self.one.ledger.verify() == []
        for sku, counts in expected.items():
            (row,) = await self.one.ledger.stock([key_of(M, sku)])
            assert {name: getattr(row, name) for name in counts} == counts
            for inventory in (self.one, self.two):
                level = await inventory.stock.level(sku)
                assert (level.available, level.reserved) == (row.available, row.reserved)


@asynccontextmanager
async def opened(two: Two) -> AsyncIterator[Two]:
    async with two.one:
        await two.one.create_schema()
        async with two.two, two.one.worker(housekeeping=0.05, idle=0.01):
            await two.one.stock.restock([Line("a", 10), Line("b", 10), Line("c", 10)], operation_id="po")
            yield two
    await two.redis.aclose()


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Two]:
    async with opened(Two(f"sqlite+aiosqlite:///{tmp_path}/stock.db")) as two:
        yield two


async def test_a_sku_goes_to_redis_and_back_alone(shop: Two) -> None:
    await shop.one.stock.deduct([Line("a", 1)], operation_id="d1")
    assert await shop.mover.promote([A]) == 1
    assert await shop.places() == {"a": "redis", "b": "database", "c": "database"}
    receipt = await shop.two.stock.deduct([Line("a", 1)], operation_id="d2", durability="redis")
    assert receipt.positions[0].epoch == 1
    other = await shop.two.stock.deduct([Line("b", 1)], operation_id="d3", durability="redis")
    assert other.positions[0].epoch == 0
    assert await shop.mover.demote([A]) == 1
    again = await shop.two.stock.deduct([Line("a", 1)], operation_id="d4", durability="redis")
    assert again.positions[0].epoch == 0
    assert (await shop.two.stock.deduct([Line("a", 1)], operation_id="d2")).replayed
    await shop.counted(a={"available": 7, "sold": 3}, b={"available": 9, "sold": 1})


async def test_a_first_receipt_stays_what_it_was_wherever_the_sku_is_sold(shop: Two) -> None:
    first = [
        await shop.one.stock.deduct([Line("a", 1)], operation_id="d1"),
        await shop.one.stock.reserve([Line("a", 2)], operation_id="h1"),
    ]
    for turn in range(3):
        await shop.mover.promote([A])
        first.append(await shop.one.stock.deduct([Line("a", 1)], operation_id=f"there-{turn}"))
        await shop.mover.demote([A])
        first.append(await shop.two.stock.deduct([Line("a", 1)], operation_id=f"back-{turn}"))
    for where in ("database", "redis"):
        for receipt in first:
            call = shop.two.stock.reserve if receipt.kind == "reserve" else shop.two.stock.deduct
            lines = [Line(line.sku, line.quantity) for line in receipt.lines]
            again = await call(lines, operation_id=receipt.operation_id)
            assert (again.lines, again.positions, again.replayed) == (receipt.lines, receipt.positions, True), where
        with pytest.raises(errors.OperationConflict):
            await shop.two.stock.deduct([Line("a", 2)], operation_id="d1")
        await shop.mover.promote([A])
    await shop.counted(a={"available": 1, "reserved": 2, "sold": 7})


async def test_an_id_that_was_undone_at_the_database_is_free_when_the_sku_is_in_redis_again(shop: Two) -> None:
    await shop.mover.promote([A])
    taken = await shop.two.stock.deduct([Line("a", 4)], operation_id="d1", durability="redis")
    await shop.mover.demote([A])
    assert await shop.two.stock.undo(taken)
    await shop.mover.promote([A])
    anew = await shop.two.stock.deduct([Line("a", 4)], operation_id="d1", durability="redis")
    assert not anew.replayed
    await shop.counted(a={"available": 6, "sold": 4})


async def test_a_cart_with_a_hot_and_a_cold_sku_brings_the_cold_one_along(shop: Two) -> None:
    await shop.mover.promote([A])
    for number, (inventory, order) in enumerate(((shop.one, "ab"), (shop.two, "ca"))):
        receipt = await inventory.stock.reserve([Line(sku, 1) for sku in order], operation_id=f"cart-{number}")
        assert receipt.positions[0].epoch == 1
    assert set((await shop.places()).values()) == {"redis"}
    await shop.two.stock.confirm("cart-0")
    await shop.one.stock.release("cart-1")
    await shop.counted(a={"available": 9, "sold": 1}, b={"available": 9, "sold": 1}, c={"available": 10})


async def test_a_cart_brings_along_what_has_left_redis_where_its_other_sku_is_known_to_be_there(shop: Two) -> None:
    """Redis names only what left it; asked of that alone, the ledger said that it sells it, and the cart went to Redis once more."""
    await shop.mover.promote([A, B])
    assert await shop.mover.demote([B]) == 1
    await shop.two.stock.deduct([Line("a", 1)], operation_id="d1")
    receipt = await shop.two.stock.deduct([Line("a", 1), Line("b", 1)], operation_id="cart")
    assert receipt.positions[0].epoch == 1
    assert await shop.places() == {"a": "redis", "b": "redis", "c": "database"}
    await shop.counted(a={"available": 8, "sold": 2}, b={"available": 9, "sold": 1})


async def test_carts_that_want_the_same_cold_sku_at_once_share_its_way(shop: Two) -> None:
    await shop.mover.promote([A])
    stocks = [shop.one.stock, shop.two.stock]
    await asyncio.gather(
        *(stocks[number % 2].deduct([Line("a", 1), Line("bc"[number % 2], 1)], operation_id=f"cart-{number}") for number in range(10))
    )
    await shop.counted(a={"available": 0, "sold": 10}, b={"available": 5}, c={"available": 5})


async def test_sets_that_overlap_arrive_side_by_side_and_holds_on_what_sells_already_are_left_alone(
    shop: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one who brings a SKU at a time, the second one writes the hold back as it was before it was confirmed."""
    await shop.one.stock.reserve([Line("b", 2)], operation_id="hold")
    real = handover._holds
    others: list[asyncio.Task[int]] = []

    async def slow(*arguments: Any) -> None:
        if not others:
            # While the first has read the hold and not yet written it, the second brings the same SKU, and it is confirmed.
            other = shop.two.hotspots.here().promotion
            assert other is not None
            others.append(asyncio.create_task(other.promote([B, C])))
            await asyncio.sleep(0.2)
            if others[0].done():
                await shop.two.stock.confirm("hold")
        await real(*arguments)

    monkeypatch.setattr(handover, "_holds", slow)
    await shop.mover.promote([A, B])
    await others[0]
    with contextlib.suppress(errors.ReservationClosed):
        await shop.one.stock.confirm("hold")
    assert set((await shop.places()).values()) == {"redis"}
    await shop.counted(b={"available": 8, "reserved": 0, "sold": 2})


async def test_a_withdrawal_that_is_late_with_its_last_step_leaves_the_holds_of_what_came_back(
    shop: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shop.mover.promote([A, B])
    await shop.two.stock.reserve([Line("b", 2)], operation_id="hold", durability="redis")
    real = handover._chunks

    async def late(partition: Any, epoch: str, what: str, *rest: Any) -> int:
        if what == "holds":
            monkeypatch.setattr(handover, "_chunks", real)
            assert await shop.two.stock.adopt(M, skus=["b"]) == 1
        return await real(partition, epoch, what, *rest)

    monkeypatch.setattr(handover, "_chunks", late)
    assert await shop.one.stock.withdraw(M, skus=["a", "b"]) == 2
    assert await shop.places() == {"a": "database", "b": "redis", "c": "database"}
    await shop.two.stock.confirm("hold")
    await shop.counted(b={"available": 8, "reserved": 0, "sold": 2})


async def test_what_live_reservations_join_moves_together_and_waits_for_what_is_hot(shop: Two) -> None:
    await shop.one.stock.reserve([Line("a", 1), Line("b", 1)], operation_id="ab")
    await shop.one.stock.reserve([Line("b", 1), Line("c", 1)], operation_id="bc")
    assert await shop.mover.promote([A]) == 3
    await heat(shop, C)
    assert await shop.mover.demote([A]) == 0  # c is hot, and reservations join it with a
    await shop.two.stock.confirm("bc")
    await shop.one.settled()
    assert await shop.mover.demote([A]) == 2
    assert await shop.places() == {"a": "database", "b": "database", "c": "redis"}
    await shop.two.stock.confirm("ab")
    await shop.counted(a={"available": 9, "sold": 1}, b={"available": 8, "sold": 2}, c={"available": 9, "sold": 1})


async def test_what_a_person_has_adopted_stays_until_a_person_withdraws_it(shop: Two) -> None:
    assert await shop.one.stock.adopt(M, skus=["a"]) == 1
    assert await shop.places() == {"a": "redis", "b": "database", "c": "database"}
    assert await shop.mover.demote([A]) == 0
    await shop.two.stock.deduct([Line("a", 2)], operation_id="d1", durability="redis")
    assert await shop.two.stock.withdraw(M, skus=["a"]) == 1
    await shop.counted(a={"available": 8, "sold": 2})
    for skus in ([], "a", [""]):
        with pytest.raises(errors.InvalidOperation):
            await shop.one.stock.adopt(M, skus=skus)


async def test_the_command_moves_single_skus_and_says_where_they_are(shop: Two, capsys: pytest.CaptureFixture[str]) -> None:
    assert await handed_over(shop.two, "adopt", M, ["a", "b"])
    assert await handed_over(shop.two, "withdraw", M, ["b"])
    assert await handed_over(shop.two, "show", M)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "OK      2 SKUs went over"
    assert said[1].endswith("merchant m1: 2 SKUs redis; new ones database")
    assert said[-1].endswith("merchant m1: 2 SKUs database, 1 SKUs redis; new ones database")


async def test_holds_of_a_sku_that_came_back_expire_at_the_database(shop: Two) -> None:
    await shop.mover.promote([A])
    await shop.two.stock.reserve([Line("a", 3)], operation_id="h1", ttl=0.3, durability="redis")
    await shop.mover.demote([A])
    async with asyncio.timeout(20):
        while (found := await shop.one.stock.reservation("h1")) is None or found.state == "held":
            await asyncio.sleep(0.05)
    assert found.state == "expired"
    await shop.counted(a={"available": 10, "reserved": 0})


async def test_a_release_that_comes_before_its_reserve_keeps_it_from_taking_on_either_side(shop: Two) -> None:
    await shop.mover.promote([A])
    with pytest.raises(errors.ReservationNotFound):
        await shop.two.stock.release("late")
    for sku in "ab":
        with pytest.raises(errors.ReservationClosed):
            await shop.one.stock.reserve([Line(sku, 1)], operation_id="late")
    await shop.counted(a={"available": 10}, b={"available": 10})


async def test_levels_of_skus_on_both_sides_come_in_one_answer(shop: Two) -> None:
    await shop.mover.promote([A])
    found = await shop.two.stock.levels(["a", "b", "c"])
    assert {sku: level.available for sku, level in found.items()} == {"a": 10, "b": 10, "c": 10}
    assert (found["a"].epoch, found["b"].epoch) == (1, 0)


async def test_a_delivery_for_skus_on_both_sides_arrives_on_both(shop: Two) -> None:
    await shop.mover.promote([A])
    await shop.two.stock.restock([Line("a", 5), Line("b", 5)], operation_id="po-2")
    await shop.counted(a={"available": 15}, b={"available": 15})


async def test_who_comes_while_it_changes_hands_waits_a_moment_and_sells(shop: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    sold: list[asyncio.Task[Any]] = []
    real = handover._load

    async def load(*args: Any) -> None:
        for number, inventory in enumerate((shop.one, shop.two)):
            sold.append(asyncio.create_task(inventory.stock.deduct([Line("a", 1)], operation_id=f"d{number}")))
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in sold)
        await real(*args)

    monkeypatch.setattr(handover, "_load", load)
    await shop.mover.promote([A])
    assert [receipt.positions[0].epoch for receipt in await asyncio.gather(*sold)] == [1, 1]
    await shop.counted(a={"available": 8, "sold": 2})


async def test_the_worker_moves_what_is_hot_and_what_is_cool_again(shop: Two) -> None:
    await heat(shop, A)
    await shop.mover.move()
    assert (await shop.places())["a"] == "redis"
    await cold(shop, A)
    await shop.mover.move()
    assert (await shop.places())["a"] == "redis"  # it stays for a while, hot or not
    board = shop.one.hotspots.here().detector.board
    await board.client.hset(board.key("promoted"), A, 1)
    shop.one.hotspots.here().detector.promoted = {A: 1}
    await shop.mover.move()
    assert (await shop.places())["a"] == "database"
    assert await board.client.hlen(board.key("promoted")) == 0


@pytest.mark.parametrize("step", ["adopt", "withdraw"])
async def test_a_mover_that_died_half_way_is_followed_by_the_next(shop: Two, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    class Died(Exception): ...

    if step == "withdraw":
        await shop.mover.promote([A])
        await shop.two.stock.deduct([Line("a", 1)], operation_id="d0")
    real = handover.run_step

    async def dies(partition: Any, epoch: str, what: str, *rest: Any) -> Any:
        answer = await real(partition, epoch, what, *rest)
        if what == "mark":
            raise Died
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(handover, "run_step", dies)
        with pytest.raises(Died):
            await (shop.mover.promote([A]) if step == "adopt" else shop.mover.demote([A]))
    other = shop.two.hotspots.here().promotion
    assert other is not None
    assert await (other.promote([A]) if step == "adopt" else other.demote([A])) == 1
    await shop.two.stock.deduct([Line("a", 1)], operation_id="d1")
    left = 9 if step == "adopt" else 8
    await shop.counted(a={"available": left, "sold": 10 - left})


async def test_one_worker_moves_at_a_time(shop: Two) -> None:
    assert await shop.mover._may_move()
    assert await shop.mover._may_move()
    other = shop.two.hotspots.here().promotion
    assert other is not None
    assert not await other._may_move()


async def test_a_merchant_whose_stock_is_in_redis_may_have_single_skus_at_the_database(shop: Two) -> None:
    await shop.one.stock.adopt(M)
    await shop.one.stock.withdraw(M, skus=["b"])
    rows = await shop.one.ledger.admission(M, [A, B])
    assert [(row.field, row.admission) for row in rows] == [(A, "redis"), (B, "database")]
    assert all(isinstance(row, AdmissionRow) for row in rows)
    await shop.two.stock.reserve([Line("b", 2)], operation_id="h1", ttl=0.3)
    async with asyncio.timeout(20):
        while (found := await shop.one.stock.reservation("h1")) is None or found.state == "held":
            await asyncio.sleep(0.05)
    await shop.counted(b={"available": 10, "reserved": 0})


async def heat(shop: Two, *keys: str) -> None:
    detector = shop.one.hotspots.here().detector
    for key in keys:
        await detector.board.client.hset(detector.board.key("hot"), mark_of(STOCK, 1_000_000.0, key), f"{NOW} {NOW}")
    for _ in range(IDLE_LOOKS):
        await detector.look()
    assert detector.watch(STOCK, 1_000_000.0).hot.keys() >= set(keys)


async def cold(shop: Two, *keys: str) -> None:
    detector = shop.one.hotspots.here().detector
    for key in keys:
        await detector.board.client.hdel(detector.board.key("hot"), mark_of(STOCK, 1_000_000.0, key))
    await detector.look()
    assert not detector.watch(STOCK, 1_000_000.0).hot.keys() & set(keys)


async def test_what_can_not_be_moved_is_told_until_it_is(shop: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    def record(event: Event) -> None:
        if isinstance(event, PromotionsWaiting):
            told.append((event.to_redis, event.to_database))

    monkeypatch.setattr(shop.mover._ground.metrics, "record", record)
    shop.one.hotspots.here().detector.watch(STOCK, 1_000_000.0)
    await heat(shop, A, B)

    async def away(*_: object) -> None:
        raise LedgerUnavailable("disconnected", OSError())

    with monkeypatch.context() as patch:
        patch.setattr(shop.one.ledger, "joined", away)
        await shop.mover.move()
        await shop.mover.move()
        assert told[-1] == (2, 0)
    await shop.mover.move()
    assert told[-1] == (0, 0)
    assert await shop.places() == {"a": "redis", "b": "redis", "c": "database"}
    # A reservation joins one that is cool with one that is hot: it stays, and that is told.
    await shop.one.stock.reserve([Line("a", 1), Line("b", 1)], operation_id="ab")
    await shop.one.settled()
    board = shop.mover._detector.board
    await board.client.hset(board.key("promoted"), A, 0)  # since long ago
    await cold(shop, A)
    await shop.mover.move()
    assert told[-1] == (0, 1)
    await shop.one.stock.release("ab")
    await shop.one.settled()
    async with asyncio.timeout(10):
        while told[-1] != (0, 0):
            shop.mover._not_before.clear()
            await asyncio.sleep(0.01)
            await shop.mover.move()
    assert (await shop.places())["a"] == "database"


async def test_who_is_not_the_mover_tells_of_nothing(shop: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    other = shop.two.hotspots.here().promotion
    assert other is not None
    told: list[Event] = []
    monkeypatch.setattr(other._ground.metrics, "record", told.append)
    assert await shop.mover._may_move()
    other._detector.watch(STOCK, 1_000_000.0).hot[A] = 1.0
    await other.move()
    assert [event for event in told if isinstance(event, PromotionsWaiting)] == [PromotionsWaiting(0, 0)]


async def test_over_several_partitions_skus_move_each_in_its_own_and_a_cart_over_them_brings_the_cold_ones(tmp_path: Path) -> None:
    shops = merchants_apart(3)
    async with opened(Two(f"sqlite+aiosqlite:///{tmp_path}/stock.db", partitions=3)) as two:
        stock = two.two.stock
        for shop in shops:
            await two.one.stock.restock([Line("a", 10), Line("b", 10)], merchant=shop, operation_id="po")
            await stock.deduct([Line("a", 1)], merchant=shop, operation_id="d1")
        assert await two.mover.promote([key_of(shop, "a") for shop in shops[:2]]) == 2
        where = await two.one.ledger.places([key_of(shop, sku) for shop in shops for sku in "ab"])
        assert {name for name, place in where.items() if place == "redis"} == {key_of(shop, "a") for shop in shops[:2]}
        for shop in shops:
            sold = await stock.deduct([Line("a", 1)], merchant=shop, operation_id="d2", durability="redis")
            assert bool(sold.positions[0].epoch) == (shop in shops[:2])
            assert (await stock.deduct([Line("a", 1)], merchant=shop, operation_id="d1")).replayed
        cart = await stock.reserve([Line("a", 2, shop) for shop in shops] + [Line("b", 1, shops[2])], merchant=shops[0], operation_id="c1")
        assert len({position.partition for position in cart.positions}) == 3
        assert (await two.one.ledger.places([key_of(shops[2], "a"), key_of(shops[2], "b"), key_of(shops[0], "b")])) == {
            key_of(shops[2], "a"): "redis", key_of(shops[2], "b"): "redis", key_of(shops[0], "b"): "database",
        }  # fmt: skip
        await stock.confirm("c1", merchant=shops[0])
        await two.two._ready().engine.drain()
        await two.one.settled()
        assert await two.mover.demote([key_of(shop, "a") for shop in shops]) == 3
        for shop in shops:
            assert (await stock.deduct([Line("a", 1)], merchant=shop, operation_id="d3")).positions[0].epoch == 0
            (row,) = await two.one.ledger.stock([key_of(shop, "a")])
            assert (row.available, row.reserved, row.sold) == (5, 0, 5)
        assert await two.one.ledger.verify() == []


def merchants_apart(partitions: int) -> list[str]:
    """One merchant per partition."""
    return [next(f"s{n}" for n in range(99) if partition_of(f"s{n}", partitions) == place) for place in range(partitions)]
