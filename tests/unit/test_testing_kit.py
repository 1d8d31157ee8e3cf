"""What users' tests stand on: time that passes, the proof of consistency, data to order, and everything replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from inventory_sdk import InsufficientStock, InvalidOperation, Inventory, Line, Movement, Receipt, ReservationExpired, injected
from inventory_sdk.testing import advance, assert_consistent, factories


@pytest.fixture
async def inventory() -> AsyncIterator[Inventory]:
    async with Inventory("memory://", metrics=[]).replaced(stock={"default": {"a": 5}}) as inventory:
        yield inventory


async def test_a_hold_whose_time_has_passed_is_expired_everywhere_and_its_handler_was_told(inventory: Inventory) -> None:
    told: list[Mapping[str, Any]] = []
    inventory.on("expired")(told.append)
    await inventory.stock.reserve([Line("a", 2)], operation_id="short", ttl=60)
    await inventory.stock.reserve([Line("a", 1)], operation_id="long", ttl=900)
    await advance(inventory, 59)
    assert (await inventory.stock.level("a")).reserved == 3
    await advance(inventory, 2)
    level = await inventory.stock.level("a")
    assert (level.available, level.reserved) == (4, 1)
    assert [facts["reservation"] for facts in told] == ["short"]
    with pytest.raises(ReservationExpired):
        await inventory.stock.confirm("short")
    (row,) = await inventory.ledger.all_stock()
    assert (row.available, row.reserved) == (4, 1)
    await assert_consistent(inventory)


async def test_selling_goes_on_however_far_time_jumps(inventory: Inventory) -> None:
    await inventory.stock.deduct([Line("a", 1)], operation_id="before")
    await advance(inventory, 30 * 86_400)
    await inventory.stock.deduct([Line("a", 1)], operation_id="after")
    with pytest.raises(InsufficientStock):
        await inventory.stock.deduct([Line("a", 4)], operation_id="too many")
    await assert_consistent(inventory)


async def test_time_passes_for_one_inventory_only(inventory: Inventory) -> None:
    async with Inventory("memory://", metrics=[]).replaced(stock={"default": {"a": 5}}) as other:
        await other.stock.reserve([Line("a", 1)], operation_id="o", ttl=60)
        await advance(inventory, 3600)
        await other._ready().embedded_worker.tidy()  # type: ignore[union-attr]
        assert (await other.stock.level("a")).reserved == 1


@pytest.mark.parametrize("seconds", [-1, True, float("inf"), float("nan"), "60"])
async def test_time_goes_forward_by_a_number_of_seconds(inventory: Inventory, seconds: Any) -> None:
    with pytest.raises(InvalidOperation, match="seconds="):
        await advance(inventory, seconds)


@pytest.mark.redis
async def test_a_real_redis_has_its_own_time(redis_url: str, namespace: str) -> None:
    inventory = Inventory(redis_url, database="sqlite+aiosqlite://", namespace=namespace, metrics=[])
    async with inventory:
        await inventory.create_schema()
        with pytest.raises(InvalidOperation, match=r"stock\.extend"):
            await advance(inventory, 1)
        client: Any = inventory._ready().client
        async for key in client.scan_iter(match=f"{{{namespace}:*"):
            await client.delete(key)


async def test_consistency_waits_for_the_ledger_and_names_what_differs(inventory: Inventory) -> None:
    await asyncio.gather(*[inventory.stock.deduct([Line("a", 1)], operation_id=f"o{n}") for n in range(5)])
    await assert_consistent(inventory)
    ledger: Any = inventory.ledger
    async with ledger.engine.begin() as connection:
        await connection.execute(update(ledger.tables.stock).values(available=1, supplied=6))
    with pytest.raises(AssertionError, match=r"default/a: available: Redis 0, ledger 1") as wrong:
        await assert_consistent(inventory)
    assert len(str(wrong.value).splitlines()) > 2  # and the ledger's own books say so too


async def test_everything_can_be_replaced_at_once(tmp_path: Path) -> None:
    inventory = Inventory("redis://127.0.0.1:1/0", database="postgresql+asyncpg://nowhere/shop", metrics=[])

    @inventory.deducts(run="now", operation_id="order", sku="sku", quantity=1)
    async def sell(order: str, sku: str, receipt: Receipt = injected()) -> int:
        return receipt.lines[0].remaining

    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    redis = FakeAsyncRedis()
    async with inventory.replaced(redis=redis, database=engine, stock={"default": {"a": 3}, "m2": {"b": 1}}):
        assert await sell("o1", "a") == 2
        assert (await inventory.stock.level("b", merchant="m2")).available == 1
        await assert_consistent(inventory)
    assert await redis.keys()
    await redis.aclose()
    await engine.dispose()


def test_data_to_order_is_what_the_sdk_hands_out() -> None:
    receipt = factories.receipt({"b": 2, "a": 1}, order="42", remaining=7)
    assert isinstance(receipt, Receipt)
    assert [(line.sku, line.quantity, line.remaining) for line in receipt.lines] == [("a", 1, 7), ("b", 2, 7)]
    assert receipt.operation_id != factories.receipt({"a": 1}).operation_id
    assert factories.level(3, 1).reserved == 1
    assert factories.unique("order").startswith("order-")


async def test_a_movement_to_order_is_the_one_that_the_ledger_makes() -> None:
    inventory = Inventory("memory://", metrics=[])
    written: list[Movement] = []

    @inventory.writes_stock
    async def write(moves: Sequence[Movement], session: AsyncSession) -> None:
        written.extend(moves)

    async with inventory.replaced(stock={"default": {"a": 5}}):
        await inventory.stock.reserve([Line("a", 2)], operation_id="r", ttl=60, order="o")
        await inventory.stock.confirm("r", operation_id="c")
        await inventory.settled()
    for real in written:
        made = factories.movement(
            real.sku, real.quantity, kind=real.kind, operation_id=real.operation_id, order=real.order, reservation=real.reservation
        )
        assert (made.available, made.reserved, made.sold) == (real.available, real.reserved, real.sold)
    assert [move.kind for move in written] == ["restock", "reserve", "confirm"]
