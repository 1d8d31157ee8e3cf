"""The stock: taken in Redis, kept in this database, and in our own tables as before."""

import os
from collections.abc import Iterable, Sequence

from sqlalchemy import bindparam, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk import Inventory, Movement, OpeningBalance

from .database import engine
from .models import Order, Stock, StockChange

inventory = Inventory(
    os.environ.get("SHOP_REDIS_URL", "redis://127.0.0.1:6379/0"),
    database=engine,
    namespace=os.environ.get("SHOP_NAMESPACE", "shop"),
)


@inventory.reads_stock
async def read_stock(merchant: str, skus: Sequence[str], session: AsyncSession) -> Iterable[OpeningBalance]:
    """What we have of products that the inventory does not know yet."""
    rows = await session.scalars(select(Stock).where(Stock.product_id.in_(skus)))
    return [OpeningBalance(row.product_id, row.available) for row in rows]


@inventory.writes_stock
async def write_stock(moves: Sequence[Movement], session: AsyncSession) -> None:
    """Keep our tables: called once per batch, in the transaction that applies it, for every movement."""
    connection = await session.connection()  # the ORM's own bulk update sets values, it can't add
    await connection.execute(
        update(Stock)
        .where(Stock.product_id == bindparam("sku"))
        .values(
            available=Stock.available + bindparam("by_available"),
            reserved=Stock.reserved + bindparam("by_reserved"),
            sold=Stock.sold + bindparam("by_sold"),
        ),
        [{"sku": move.sku, "by_available": move.available, "by_reserved": move.reserved, "by_sold": move.sold} for move in moves],
    )
    await session.execute(
        insert(StockChange),
        [
            {
                "product_id": move.sku,
                "what": move.kind,
                "reference": move.reservation or move.operation_id,
                "quantity": move.quantity,
            }
            for move in moves
        ],
    )
    expired = [move.reservation for move in moves if move.kind == "expire"]
    if expired:
        await session.execute(update(Order).where(Order.id.in_(expired), Order.status == "placed").values(status="expired"))
