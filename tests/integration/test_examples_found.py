"""What the shop of the examples ran into, each in its smallest form."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from inventory_sdk import Inventory, Line, Movement, OpeningBalance, UnknownStock
from inventory_sdk.errors import OutcomeUnknown


def shop_with(*balances: OpeningBalance) -> Inventory:
    inventory = Inventory("memory://", metrics=[])

    @inventory.reads_stock
    async def read(merchant: str, skus: Sequence[str], session: AsyncSession) -> Iterable[OpeningBalance]:
        return [balance for balance in balances if balance.sku in skus]

    return inventory


async def test_a_first_delivery_adds_to_the_opening_balance() -> None:
    async with shop_with(OpeningBalance("a", 2)) as inventory:
        receipt = await inventory.stock.restock([Line("a", 10)], operation_id="d1")
        assert receipt.lines[0].remaining == 12
        await inventory.settled()
        assert await inventory.ledger.verify() == []


async def test_an_opening_balance_leaves_out_what_the_service_holds() -> None:
    async with shop_with(OpeningBalance("a", 3, [("old", 2)])) as inventory:
        level = await inventory.stock.level("a")
        assert (level.available, level.reserved) == (3, 2)


async def test_a_delivery_of_what_somebody_has_just_asked_for_in_vain_is_for_sale_at_once() -> None:
    async with Inventory("memory://", metrics=[]) as inventory:
        with pytest.raises(UnknownStock):
            await inventory.stock.deduct([Line("a", 1)], operation_id="s1")
        await inventory.stock.restock([Line("a", 1)], operation_id="d1")
        await inventory.stock.deduct([Line("a", 1)], operation_id="s1")


async def test_restocks_and_returns_are_written_to_the_services_tables_too() -> None:
    inventory = Inventory("memory://", metrics=[])
    written: list[tuple[str, int]] = []

    @inventory.writes_stock
    async def write(moves: Sequence[Movement], session: AsyncSession) -> None:
        written.extend((move.kind, move.available) for move in moves)

    async with inventory:
        await inventory.stock.restock([Line("a", 5)], operation_id="d1")
        await inventory.stock.deduct([Line("a", 3)], operation_id="s1")
        await inventory.settled()
        await inventory.stock.take_back([Line("a", 1)], of="s1", operation_id="r1")
    assert written == [("restock", 5), ("deduct", -3), ("take_back", 1)]


@pytest.mark.redis
@pytest.mark.parametrize("pause", [0.0, 0.05])
async def test_an_inventory_that_is_closed_at_once_leaves_no_connection(redis_url: str, namespace: str, pause: float) -> None:
    def open_now() -> set[int]:
        return {
            id(each) for each in gc.get_objects() if isinstance(each, AbstractConnection) and getattr(each, "_writer", None) is not None
        }

    client = Redis.from_url(redis_url)
    inventory = Inventory(redis_url, database="sqlite+aiosqlite://", namespace=namespace, metrics=[])
    before = open_now()
    async with inventory.replaced(redis=client):
        # The worker is somewhere between its first connection and its first round.
        await asyncio.sleep(pause)
    assert not open_now() - before
    async for key in client.scan_iter(match=f"{{{namespace}:*"):
        await client.delete(key)
    await client.aclose()


async def test_a_hold_of_the_service_can_be_confirmed_after_the_switch() -> None:
    async with shop_with(OpeningBalance("a", 3, [("old", 2)])) as inventory:
        assert (await inventory.stock.level("a")).reserved == 2
        await inventory.stock.confirm("old")
        assert (await inventory.stock.level("a")).reserved == 0
        await inventory.settled()
        (row,) = await inventory.ledger.stock(["default\x1fa"])
        assert (row.available, row.reserved, row.sold) == (3, 0, 2)
        assert await inventory.ledger.verify() == []


@pytest.mark.xfail(raises=OutcomeUnknown, strict=True, reason="what enters has a transaction of its own, and SQLite one writer")
async def test_a_function_that_has_written_to_its_session_can_restock_on_sqlite(tmp_path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db", connect_args={"timeout": 0.2})
    inventory = Inventory("memory://", metrics=[])
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE delivery (id TEXT)"))

    @inventory.restocks(run="now", operation_id="delivery_id", sku=lambda: "a", quantity=1)
    async def receive(session: AsyncSession, delivery_id: str) -> None:
        await session.execute(text("INSERT INTO delivery VALUES (:id)"), {"id": delivery_id})

    try:
        async with inventory.replaced(redis="memory://", database=engine), AsyncSession(engine) as session, session.begin():
            await receive(session, "d1")
    finally:
        await engine.dispose()
