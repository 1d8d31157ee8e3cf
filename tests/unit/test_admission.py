"""Stock changes hands between Redis and the database: two processes on one stock, embedded, step by step."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import fakeredis
import pytest

from inventory_sdk import Inventory, Line, errors
from inventory_sdk.ledger import direct
from inventory_sdk.model import Position, key_of
from inventory_sdk.stock import handover
from inventory_sdk.stock.batch import AWAY, NOT_LOADED, Answered
from inventory_sdk.stock.resubmit import late_verdict

M = "m1"
A = key_of(M, "a")


class Two:
    """Two processes of one deployment: fakeredis and a SQLite file between them. The worker runs inside the first."""

    def __init__(self, path: Path) -> None:
        server = fakeredis.FakeServer()
        self.redis = fakeredis.FakeAsyncRedis(server=server)
        self._options: dict[str, Any] = {
            "database": f"sqlite+aiosqlite:///{path}/stock.db",
            "metrics": [],
            "merchant": M,
            "redis": self.redis,
        }
        self.one = Inventory(admission="database", **self._options)
        self.two = Inventory(admission="redis", **self._options)

    async def counted(self, **expected: int) -> None:
        """Redis and ledger agree, all rows are sound, and this is what the SKU came to."""
        await self.one.settled()
        assert await self.one.ledger.verify() == []
        (row,) = await self.one.ledger.stock([A])
        assert {name: getattr(row, name) for name in expected} == expected
        for inventory in (self.one, self.two):
            level = await inventory.stock.level("a")
            assert (level.available, level.reserved) == (row.available, row.reserved)

    async def mark(self) -> bytes | None:
        """What stands on the field in Redis' ``frozen``."""
        client: Any = self.redis
        return await client.hget("{inventory:0}:frozen", A)  # type: ignore[no-any-return]


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Two]:
    two = Two(tmp_path)
    async with two.one:
        await two.one.create_schema()
        async with two.two, two.one.worker(housekeeping=0.05, idle=0.01):
            await two.one.stock.restock([Line("a", 10)], operation_id="po")
            yield two
    await two.redis.aclose()


async def admission(shop: Two) -> list[str]:
    return [row.admission for row in await shop.one.ledger.admission(M)]


def test_who_sells_must_be_one_that_there_is() -> None:
    with pytest.raises(errors.InvalidOperation, match="redis, database, auto"):
        Inventory("memory://", admission="sometimes", metrics=[])


async def test_a_seller_who_still_believes_in_the_database_sells_in_redis(shop: Two) -> None:
    """The fence: without WHERE admission = 'database' in the update, these two sell the same ten units twice."""
    await shop.one.stock.deduct([Line("a", 1)], operation_id="d1")
    assert await shop.two.stock.adopt(M) == 1
    receipts = [await shop.one.stock.deduct([Line("a", 1)], operation_id=f"one-{n}", durability="redis") for n in range(4)]
    receipts += [await shop.two.stock.deduct([Line("a", 1)], operation_id=f"two-{n}", durability="redis") for n in range(5)]
    assert [receipt.positions[0].epoch for receipt in receipts] == [1] * 9
    for seller in (shop.one, shop.two):
        with pytest.raises(errors.InsufficientStock):
            await seller.stock.deduct([Line("a", 1)], operation_id="too-many")
    await shop.counted(available=0, sold=10)


async def test_a_seller_who_still_believes_in_redis_sells_at_the_database(shop: Two) -> None:
    await shop.one.stock.adopt(M)
    await shop.two.stock.deduct([Line("a", 1)], operation_id="d1", durability="redis")
    assert await shop.one.stock.withdraw(M) == 1
    receipt = await shop.two.stock.deduct([Line("a", 9)], operation_id="d2", durability="redis")
    assert (receipt.durability, receipt.positions[0].epoch) == ("database", 0)
    await shop.counted(available=0, sold=10)


async def test_what_was_done_on_one_side_is_repeated_on_the_other(shop: Two) -> None:
    stock, other = shop.one.stock, shop.two.stock
    first = [
        await stock.deduct([Line("a", 1)], operation_id="d1"),
        await stock.adjust([Line("a", -1)], operation_id="w1", reason="damaged"),
        await stock.reserve([Line("a", 2)], operation_id="h1"),
    ]
    await stock.adopt(M)
    again = [
        await other.deduct([Line("a", 1)], operation_id="d1"),
        await other.adjust([Line("a", -1)], operation_id="w1"),
        await other.reserve([Line("a", 2)], operation_id="h1"),
    ]
    assert [(r.lines, r.positions, r.replayed) for r in again] == [(r.lines, r.positions, True) for r in first]
    with pytest.raises(errors.OperationConflict):
        await other.deduct([Line("a", 2)], operation_id="d1")
    assert (await stock.restock([Line("a", 10)], operation_id="po")).replayed
    late = await other.deduct([Line("a", 3)], operation_id="d2", durability="redis")
    await other.withdraw(M)
    again_late = await stock.deduct([Line("a", 3)], operation_id="d2")
    assert (again_late.lines, again_late.positions, again_late.replayed) == (late.lines, late.positions, True)
    await shop.counted(available=3, reserved=2, sold=4, written_off=1)


async def test_live_holds_go_along_and_are_run_by_whoever_sells(shop: Two) -> None:
    stock = shop.one.stock
    for name, ttl in (("confirmed", 600.0), ("released", 600.0), ("expired", 0.4)):
        await stock.reserve([Line("a", 2)], operation_id=name, ttl=ttl)
    await stock.adopt(M)
    await shop.two.stock.confirm("confirmed", lines=[Line("a", 1)], operation_id="part")
    await stock.withdraw(M)
    await shop.two.stock.confirm("confirmed")
    await stock.release("released")
    async with asyncio.timeout(20):
        while (found := await stock.reservation("expired")) is None or found.state == "held":
            await asyncio.sleep(0.05)
    assert found.state == "expired"
    with pytest.raises(errors.ReservationExpired):
        await shop.two.stock.confirm("expired")
    assert (await shop.two.stock.confirm("expired", reacquire=True)).lines[0].quantity == 2
    await shop.counted(available=6, reserved=0, sold=4)


async def test_an_id_that_was_undone_at_the_database_is_free_in_redis_again(shop: Two) -> None:
    await shop.one.stock.adopt(M)
    taken = await shop.two.stock.deduct([Line("a", 4)], operation_id="d1", durability="redis")
    await shop.one.stock.withdraw(M)
    assert await shop.two.stock.undo(taken)
    await shop.one.stock.adopt(M)
    anew = await shop.two.stock.deduct([Line("a", 4)], operation_id="d1", durability="redis")
    assert not anew.replayed
    await shop.counted(available=6, sold=4)


async def test_a_take_that_was_kept_at_the_database_can_not_be_undone_in_redis(shop: Two) -> None:
    taken = await shop.one.stock.deduct([Line("a", 4)], operation_id="d1")
    assert await shop.one.stock.keep(taken)
    await shop.one.stock.adopt(M)
    assert not await shop.two.stock.undo(taken)
    await shop.counted(available=6, sold=4)


async def test_a_tombstone_goes_along(shop: Two) -> None:
    with pytest.raises(errors.ReservationNotFound):
        await shop.one.stock.release("late")
    await shop.one.stock.adopt(M)
    with pytest.raises(errors.ReservationClosed):
        await shop.two.stock.reserve([Line("a", 1)], operation_id="late")
    with pytest.raises(errors.ReservationNotFound):
        await shop.two.stock.release("later")
    await shop.one.settled()
    await shop.one.stock.withdraw(M)
    with pytest.raises(errors.ReservationClosed):
        await shop.two.stock.reserve([Line("a", 1)], operation_id="later")


async def test_while_it_changes_hands_nobody_sells_and_everybody_is_told(shop: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    real = handover._load

    async def load(*args: Any) -> None:
        for seller in (shop.one, shop.two):
            for call in (seller.stock.deduct, seller.stock.restock):
                with pytest.raises(errors.StockFrozen):
                    await call([Line("a", 1)], operation_id="no")
        seen.extend(await admission(shop))
        await real(*args)

    monkeypatch.setattr(handover, "_load", load)
    await shop.one.stock.adopt(M)
    assert seen == ["arriving"]
    await shop.counted(available=10)


@pytest.mark.parametrize("step", ["_load", "_holds", "_results", "mark", "admit", "arrived"])
async def test_an_adoption_that_died_at_a_step_is_finished_by_the_next(shop: Two, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    await shop.one.stock.reserve([Line("a", 2)], operation_id="h1")
    await shop.one.stock.deduct([Line("a", 1)], operation_id="d1")
    with monkeypatch.context() as patch:
        _die(patch, shop, step)
        with pytest.raises(Died):
            await shop.one.stock.adopt(M)
    if step == "arrived":  # it sells already: what is sold now must survive the repeat
        await shop.two.stock.deduct([Line("a", 1)], operation_id="d2", durability="redis")
    await shop.two.stock.adopt(M)
    assert await admission(shop) == ["redis"]
    assert (await shop.two.stock.deduct([Line("a", 1)], operation_id="d1")).replayed
    await shop.two.stock.confirm("h1")
    await shop.counted(available=6 if step == "arrived" else 7, sold=4 if step == "arrived" else 3)


@pytest.mark.parametrize("again", ["withdraw", "adopt"])
@pytest.mark.parametrize("step", ["mark", "after mark", "leave", "holds"])
async def test_a_withdrawal_that_died_at_a_step_is_finished_or_taken_back(
    shop: Two, monkeypatch: pytest.MonkeyPatch, step: str, again: str
) -> None:
    await shop.one.stock.adopt(M)
    await shop.two.stock.reserve([Line("a", 2)], operation_id="h1", durability="redis")
    with monkeypatch.context() as patch:
        _die(patch, shop, step)
        with pytest.raises(Died):
            await shop.one.stock.withdraw(M)
    if step in ("after mark", "leave"):
        with pytest.raises(errors.StockFrozen):
            await shop.two.stock.deduct([Line("a", 1)], operation_id="no")
    await getattr(shop.two.stock, again)(M)
    assert await admission(shop) == ["database" if again == "withdraw" else "redis"]
    await shop.two.stock.deduct([Line("a", 1)], operation_id="d1")
    await shop.one.stock.confirm("h1")
    await shop.counted(available=7, sold=3)


class Died(Exception):
    """The process ended here."""


def _die(patch: pytest.MonkeyPatch, shop: Two, step: str) -> None:
    async def dead(*_: Any, **__: Any) -> Any:
        raise Died

    if step.startswith("_"):
        patch.setattr(handover, step, dead)
    elif step in ("arrived", "leave"):
        patch.setattr(shop.one.ledger, step, dead)
    else:
        real = handover.run_step
        after = step.startswith("after ")

        async def run(partition: Any, epoch: str, what: str, *rest: Any) -> Any:
            if what != step.removeprefix("after "):
                return await real(partition, epoch, what, *rest)
            if after:
                await real(partition, epoch, what, *rest)
            raise Died

        patch.setattr(handover, "run_step", run)


async def test_steps_of_a_process_that_is_late_change_nothing(shop: Two) -> None:
    """The version of the mark: without the turns in admit.lua a late mark freezes what sells, a late load sells it twice."""
    engine = shop.one._engine()
    partition = engine.partitions[0]
    await shop.one.stock.adopt(M)
    await shop.one.stock.withdraw(M)
    (row,) = await shop.one.ledger.admission(M)
    await shop.one.stock.adopt(M)
    await shop.two.stock.deduct([Line("a", 4)], operation_id="d1", durability="redis")
    before = row.fence
    late = [("mark", [A, before - 1]), ("unmark", [A, before - 1]), ("admit", [A, before - 1, 10, 0]), ("admit", [A, before, 10, 0])]
    for what, part in late:
        assert await handover.run_step(partition, partition.epoch, what, list(part), []) == (-1, A.encode())
    assert await handover.run_step(partition, partition.epoch, "admit", [A, before + 1, 10, 0], []) == (1, b"1")  # as done already
    assert await shop.mark() is None
    await shop.one.stock.withdraw(M)
    assert await handover.run_step(partition, partition.epoch, "admit", [A, before + 1, 10, 0], []) == (-1, A.encode())
    await shop.counted(available=6, sold=4)


async def test_a_withdrawal_that_another_process_took_back_does_not_flip(shop: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    await shop.one.stock.adopt(M)
    real = shop.one.ledger.leave

    async def leave(*args: Any) -> Any:
        await shop.two.stock.adopt(M)
        return await real(*args)

    monkeypatch.setattr(shop.one.ledger, "leave", leave)
    with pytest.raises(handover.Overtaken):
        await shop.one.stock.withdraw(M)
    assert await admission(shop) == ["redis"]
    await shop.two.stock.deduct([Line("a", 3)], operation_id="d1")
    await shop.counted(available=7, sold=3)


async def test_the_ledger_does_not_flip_before_it_has_applied_what_redis_sold(shop: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    await shop.one.stock.adopt(M)
    gate, real = asyncio.Event(), shop.one.ledger.apply

    async def apply(*args: Any) -> Any:
        await gate.wait()
        return await real(*args)

    monkeypatch.setattr(shop.one.ledger, "apply", apply)
    monkeypatch.setattr(handover, "ROUNDS", 3)
    await shop.two.stock.deduct([Line("a", 8)], operation_id="d1", durability="redis")
    engine = shop.one._engine()

    async def at_once(_: Any) -> None:
        """Nobody has waited for the watermark: the ledger's own look at it must do."""

    try:
        with pytest.raises(errors.StockFrozen):
            await handover.withdraw(engine, engine.partitions[0], M, at_once)
    finally:
        gate.set()
    await shop.one.stock.withdraw(M)
    with pytest.raises(errors.InsufficientStock):
        await shop.one.stock.deduct([Line("a", 3)], operation_id="too-many")
    await shop.counted(available=2, sold=8)


async def test_what_is_born_while_the_merchant_leaves_leaves_too(shop: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    await shop.one.stock.adopt(M)
    real, born = shop.one.ledger.leave, []

    async def leave(*args: Any) -> Any:
        if not born:
            born.append(await shop.two.stock.restock([Line("b", 5)], operation_id="po-b"))
        return await real(*args)

    monkeypatch.setattr(shop.one.ledger, "leave", leave)
    await shop.one.stock.withdraw(M)
    assert await admission(shop) == ["database", "database"]
    assert (await shop.two.stock.deduct([Line("b", 5)], operation_id="d1")).durability == "database"
    await shop.one.stock.restock([Line("c", 1)], operation_id="po-c")
    assert await admission(shop) == ["database"] * 3


async def test_a_hold_over_two_merchants_keeps_both_where_they_are(shop: Two) -> None:
    stock = shop.one.stock
    await stock.restock([Line("a", 5)], merchant="m2", operation_id="po")
    await stock.reserve([Line("a", 1), Line("a", 1, "m2")], operation_id="cart")
    with pytest.raises(errors.InvalidOperation, match="cart"):
        await stock.adopt(M)
    assert await admission(shop) == ["database"]
    await stock.release("cart")
    await stock.adopt(M)
    await stock.adopt("m2")
    await stock.reserve([Line("a", 1), Line("a", 1, "m2")], operation_id="cart-2")
    with pytest.raises(errors.InvalidOperation, match="cart-2"):
        await stock.withdraw(M)
    await stock.confirm("cart-2")
    await stock.withdraw(M)
    with pytest.raises(errors.InvalidOperation, match="database"):
        await stock.deduct([Line("a", 1), Line("a", 1, "m2")], operation_id="mixed")
    await shop.counted(available=9, sold=1)


async def test_a_rebuilt_partition_leaves_the_databases_stock_alone(shop: Two) -> None:
    stock = shop.one.stock
    await stock.restock([Line("a", 5)], merchant="m2", operation_id="po")
    await stock.adopt("m2")
    await stock.reserve([Line("a", 2)], operation_id="h1", ttl=0.2)
    await shop.redis.flushall()
    async with asyncio.timeout(30):
        while True:
            try:
                await shop.two.stock.deduct([Line("a", 1)], merchant="m2", operation_id="d1")
                break
            except errors.Overloaded:
                await asyncio.sleep(0.05)
    client: Any = shop.redis
    assert set(await client.hgetall("{inventory:0}:available")) == {key_of("m2", "a").encode()}
    assert await client.hgetall("{inventory:0}:reservations") == {}
    await shop.two.stock.deduct([Line("a", 3)], operation_id="d1")
    async with asyncio.timeout(20):
        while (await stock.level("a")).reserved:
            await asyncio.sleep(0.05)
    await shop.counted(available=7, sold=3)


async def test_a_frozen_sku_that_left_is_not_opened_for_sale_in_redis(shop: Two) -> None:
    await shop.one.stock.adopt(M)
    client: Any = shop.redis
    await client.hset("{inventory:0}:frozen", A, "1-1")
    with pytest.raises(errors.StockFrozen):
        await shop.two.stock.deduct([Line("a", 1)], operation_id="no")
    await shop.one.stock.withdraw(M)
    with pytest.raises(errors.StockFrozen):
        await shop.two.stock.reopen("a")
    assert (await shop.mark() or b"").startswith(b"w")
    await shop.two.stock.deduct([Line("a", 10)], operation_id="d1")
    await shop.counted(available=0, sold=10)


def test_the_fence_names_who_sells_and_how_much_there_is() -> None:
    from inventory_sdk.ledger.decide import Stock
    from inventory_sdk.ledger.schema import tables

    row = Stock(M, "a", (5, 0, 0, 5, 0), 1)
    row.available -= 2
    text = str(direct.fence(tables().stock, row).compile(compile_kwargs={"literal_binds": True}))
    assert text == "inventory_stock.admission = 'database' AND inventory_stock.available >= 2"


@pytest.mark.parametrize("code", [AWAY, NOT_LOADED])
def test_a_late_operation_on_stock_that_left_is_rejected_and_never_taken_for_done(code: int) -> None:
    assert late_verdict(([code, A], Answered(Position(0, 1, 1), None))) == "withdrawn"
