"""A many-line function of the service's own, verified: python examples/verified.py"""

import asyncio
import logging
import tempfile
from collections.abc import Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from inventory_sdk import Inventory, QuantityMismatch, WatchedTables, record_change

inventory = Inventory("memory://")


class Base(DeclarativeBase):
    pass


class Stock(Base):
    __tablename__ = "stock"

    product_id: Mapped[str] = mapped_column(primary_key=True)
    available: Mapped[int]
    reserved: Mapped[int] = mapped_column(default=0)


class StockChange(Base):
    __tablename__ = "stock_changes"

    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[str]
    quantity: Mapped[int]


watched = WatchedTables(Stock, "product_id", log=StockChange, log_quantity="quantity")


class Warehouse:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    @inventory.verifies(lines="items", session="self.session", by={"available": -1, "reserved": +1}, changes=watched)
    async def pick(self, items: Mapping[str, int]) -> None:
        for product_id, quantity in items.items():
            try:
                await self.take(product_id, quantity)
            except LookupError:
                continue  # a mistake: the order goes out without it

    async def take(self, product_id: str, quantity: int) -> None:
        stock = await self.session.get(Stock, product_id)
        if stock is None:
            raise LookupError(product_id)
        stock.available -= quantity
        stock.reserved += quantity
        self.session.add(StockChange(product_id=product_id, quantity=-quantity))


shelf = {"mug": 5, "tee": 2}


@inventory.verifies(lines="items", log=None)
async def pack(items: Mapping[str, int]) -> None:
    for product_id, quantity in items.items():
        shelf[product_id] -= quantity
        record_change(product_id, moved=-quantity)


@inventory.on("mismatch")
def tell(facts: Mapping[str, Any]) -> None:
    print("told of:", facts["function"].partition(":")[2])


async def main(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session, session.begin():
        session.add_all([Stock(product_id="mug", available=5), Stock(product_id="tee", available=2)])
    for items in ({"mug": 2, "tee": 1}, {"mug": 1, "cap": 1}):
        try:
            async with AsyncSession(engine) as session, session.begin():
                await Warehouse(session).pick(items)
            print("picked:", items)
        except QuantityMismatch as error:
            print("refused:", error)
    async with AsyncSession(engine) as session:
        print("mugs:", (await session.get_one(Stock, "mug")).available)
    await pack({"mug": 2})
    print("shelf:", shelf)


async def in_a_file() -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = create_async_engine(f"sqlite+aiosqlite:///{folder}/shop.db")
        await main(engine)
        await engine.dispose()


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # each mismatch is logged too
    asyncio.run(in_a_file())
