"""What enters through the ledger, while its database can't: tried again, counted, and never a driver's error."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import OutOfMemoryError

from inventory_sdk import errors
from inventory_sdk.ledger.protocol import Entered, Entering, EpochClosed, LedgerUnavailable
from inventory_sdk.metrics.events import Retried
from inventory_sdk.model import key_of
from inventory_sdk.stock import entering
from inventory_sdk.stock.batch import OVER
from tests.stock_kit import MERCHANT, Shop, lines, shop_on


def failing(shop: Shop, monkeypatch: pytest.MonkeyPatch, *reasons: str, committed: bool = False) -> None:
    """The next transactions fail for these reasons; ``committed``: though they stand."""
    real, left = shop.ledger.enter, list(reasons)

    async def enter(partition: int, epoch: int, operations: list[Entering], writes: Any = ()) -> list[Entered]:
        if not left:
            return await real(partition, epoch, operations, writes)
        if committed:
            await real(partition, epoch, operations, writes)
        raise LedgerUnavailable(left.pop(0), ConnectionResetError("gone"))

    monkeypatch.setattr(shop.ledger, "enter", enter)


@pytest.mark.parametrize("committed", [False, True])
async def test_a_restock_goes_through_once_whatever_the_database_did_meanwhile(
    namespace: str, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    async with shop_on("fakeredis", namespace, {"a": 1}) as shop:
        failing(shop, monkeypatch, "deadlock", "disconnected", committed=committed)
        receipt = await shop.stock.restock(lines(a=5), operation_id="po-1")
        assert receipt.replayed is committed
        assert await shop.counters("a") == (6, 0)
        retried = [event.reason for event in shop.metrics.events if isinstance(event, Retried) and event.what == "enter"]
        assert retried == ["deadlock", "disconnected"]


async def test_a_database_that_stays_away_leaves_the_outcome_unknown_and_the_id_safe_to_repeat(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop_on("fakeredis", namespace, {"a": 1}) as shop:
        failing(shop, monkeypatch, "disconnected", committed=True)
        monkeypatch.setattr(entering, "GIVE_UP", 0.0)
        with pytest.raises(errors.OutcomeUnknown) as caught:
            await shop.stock.restock(lines(a=5), operation_id="po-1")
        assert caught.value.operation_id == "po-1"
        assert isinstance(caught.value.__cause__, LedgerUnavailable)
        assert (await shop.stock.restock(lines(a=5), operation_id="po-1")).replayed
        assert await shop.counters("a") == (6, 0)


async def test_a_take_whose_stock_can_not_be_loaded_now_is_refused_at_the_door(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {"a": 1}) as shop:
        shop.ledger.stocked(cold=5)
        shop.ledger.failure = LedgerUnavailable("disconnected", ConnectionResetError("gone"))
        with pytest.raises(errors.Overloaded) as caught:
            await shop.stock.deduct(lines(cold=1), operation_id="o1")
        assert caught.value.retry_after > 0
        shop.ledger.failure = None
        assert not (await shop.stock.deduct(lines(cold=1), operation_id="o1")).replayed


async def test_a_restock_that_may_stand_is_never_reported_as_not_done(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop_on("fakeredis", namespace, {"a": 1}) as shop:
        real, lost = shop.ledger.enter, list[str]()

        async def enter(partition: int, epoch: int, operations: list[Entering], writes: Any = ()) -> list[Entered]:
            if lost:
                raise EpochClosed("raised meanwhile")
            lost.append("reply")
            await real(partition, epoch, operations, writes)
            raise LedgerUnavailable("disconnected", ConnectionResetError("gone"))

        monkeypatch.setattr(shop.ledger, "enter", enter)
        with pytest.raises(errors.OutcomeUnknown) as caught:
            await shop.stock.restock(lines(a=5), operation_id="po-1")
        assert caught.value.operation_id == "po-1"
        monkeypatch.setattr(shop.ledger, "enter", real)
        assert (await shop.stock.restock(lines(a=5), operation_id="po-1")).replayed
        assert await shop.counters("a") == (6, 0)


async def test_a_return_of_an_unapplied_sale_is_frozen_where_redis_was_emptied_meanwhile(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop_on("fakeredis", namespace, {"a": 5}) as shop:

        async def enter(partition: int, epoch: int, operations: list[Entering], writes: Any = ()) -> list[Entered]:
            await shop.client.delete(*shop.engine.partitions[0].keys)
            raise errors.InvalidOperation("of", "sale", "is not a sale that the ledger knows")

        monkeypatch.setattr(shop.ledger, "enter", enter)
        with pytest.raises(errors.StockFrozen):
            await shop.stock.take_back(lines(a=1), of="sale", operation_id="back")


async def test_a_load_into_a_redis_without_memory_is_told_as_such(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop_on("fakeredis", namespace, {"a": 1}) as shop:
        shop.ledger.stocked(cold=5)
        run = shop.engine.wire.run

        async def full(name: str, *arguments: Any) -> Any:
            if name == "load":
                raise OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
            return await run(name, *arguments)

        monkeypatch.setattr(shop.engine.wire, "run", full)
        with pytest.raises(errors.JournalFull):
            await shop.stock.deduct(lines(cold=1), operation_id="o1")


async def test_a_credit_is_not_made_in_an_epoch_whose_rebuild_has_included_it(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop_on("fakeredis", namespace, {"a": 1}) as shop:
        real = shop.ledger.enter

        async def enter(partition: int, epoch: int, operations: list[Entering], writes: Any = ()) -> list[Entered]:
            done = await real(partition, epoch, operations, writes)
            await shop.open(2)
            return done

        monkeypatch.setattr(shop.ledger, "enter", enter)
        receipt = await shop.stock.restock(lines(a=5), operation_id="po-1")
        assert [line.remaining for line in receipt.lines] == [6]
        assert await shop.counters("a") == (6, 0)


async def test_a_void_of_an_earlier_epoch_moves_nothing(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {"a": 3}) as shop:
        await shop.open(2)
        key = key_of(MERCHANT, "\x1fvoid\x1f1-4-0")
        void = ["void", key, "void", [key_of(MERCHANT, "a"), 1, 0], "", "", 0, '{"position":"1-4-0"}', "1-4", ""]
        answer, _ = await shop.engine.send(shop.engine.partitions[0], void)
        assert answer == [OVER]
        assert await shop.counters("a") == (3, 0)


async def test_a_suspicion_that_a_full_redis_can_not_be_told_ends_calls_in_an_error_of_ours(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop_on("fakeredis", namespace, {"a": 3}) as shop:
        await shop.stock.level("a")
        run = shop.engine.wire.run

        async def full(name: str, *arguments: Any) -> Any:
            if name == "suspect":
                raise OutOfMemoryError("command not allowed when used memory > 'maxmemory'.")
            return await run(name, *arguments)

        monkeypatch.setattr(shop.engine.wire, "run", full)
        shop.engine.partitions[0].doubt("went_back")
        with pytest.raises(errors.Overloaded):
            await shop.stock.restock(lines(a=1), operation_id="po-1")
