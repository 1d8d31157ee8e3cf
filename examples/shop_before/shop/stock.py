"""Everything that moves stock."""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Protocol

from pydantic import BaseModel, PositiveInt
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from .errors import OrderClosed, OrderNotFound, OutOfStock, ReturnRefused
from .models import Order, OrderItem, Paper, Stock, StockChange, now

HOLD_SECONDS = 900


class Item(BaseModel):
    product_id: str
    quantity: PositiveInt


class Countable(Protocol):
    product_id: str
    quantity: int


class StockService:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def place_order(self, order_id: str, items: Sequence[Item]) -> Order:
        """Hold the items for a quarter of an hour. ``OutOfStock`` if one of them is short."""
        if known := await self.session.get(Order, order_id):
            return known
        stock = await self._lock(items)
        for item in items:
            row = stock.get(item.product_id)
            if row is None or row.available < item.quantity:
                raise OutOfStock(f"{item.product_id}: {item.quantity} asked, {row.available if row else 0} available")
            row.available -= item.quantity
            row.reserved += item.quantity
            self._note(item, "reserve", order_id)
        order = Order(id=order_id, status="placed", items=[OrderItem(**item.model_dump()) for item in items])
        self.session.add(order)
        return order

    async def pay(self, order_id: str) -> Order:
        """Sell what the order holds."""
        order = await self.find(order_id)
        if order.status not in ("placed", "paid"):
            raise OrderClosed(f"order {order_id} is {order.status}")
        if order.status == "placed":
            stock = await self._lock(order.items)
            for item in order.items:
                stock[item.product_id].reserved -= item.quantity
                stock[item.product_id].sold += item.quantity
                self._note(item, "confirm", order_id)
        order.status = "paid"
        return order

    async def cancel(self, order_id: str, status: str = "cancelled") -> Order:
        """Give back what the order holds."""
        order = await self.find(order_id)
        if order.status not in ("placed", status):
            raise OrderClosed(f"order {order_id} is {order.status}")
        if order.status == "placed":
            stock = await self._lock(order.items)
            for item in order.items:
                stock[item.product_id].reserved -= item.quantity
                stock[item.product_id].available += item.quantity
                self._note(item, "release", order_id)
        order.status = status
        return order

    async def expire_orders(self) -> None:
        """Give back what was placed and not paid in time. Cron calls it every minute."""
        late = now() - timedelta(seconds=HOLD_SECONDS)
        orders = await self.session.scalars(select(Order.id).where(Order.status == "placed", Order.placed_at < late))
        for order_id in orders.all():
            await self.cancel(order_id, "expired")

    async def return_items(self, return_id: str, order_id: str, items: Sequence[Item]) -> Order:
        """Put what a customer sent back on the shelf. ``ReturnRefused`` if that is more than was sold."""
        order = await self.find(order_id)
        if await self.session.get(Paper, return_id):
            return order
        left = {item.product_id: item for item in order.items if order.status == "paid"}
        stock = await self._lock(items)
        for item in items:
            sold = left.get(item.product_id)
            if sold is None or sold.returned + item.quantity > sold.quantity:
                raise ReturnRefused(f"order {order_id}: not that many {item.product_id} can come back")
            sold.returned += item.quantity
            stock[item.product_id].sold -= item.quantity
            stock[item.product_id].available += item.quantity
            self._note(item, "take_back", return_id)
        self.session.add(Paper(id=return_id, kind="return"))
        return order

    async def receive_goods(self, delivery_id: str, items: Sequence[Item]) -> None:
        """Put a delivery on the shelf."""
        if await self.session.get(Paper, delivery_id):
            return
        stock = await self._lock(items)
        for item in items:
            stock[item.product_id].available += item.quantity
            self._note(item, "restock", delivery_id)
        self.session.add(Paper(id=delivery_id, kind="delivery"))

    async def sell_at_till(self, sale_id: str, items: Sequence[Item]) -> None:
        """Book what was sold in the store. ``OutOfStock`` if the shelf disagrees."""
        if await self.session.get(Paper, sale_id):
            return
        stock = await self._lock(items)
        for item in items:
            row = stock.get(item.product_id)
            if row is None or row.available < item.quantity:
                raise OutOfStock(f"{item.product_id}: {item.quantity} asked, {row.available if row else 0} available")
            row.available -= item.quantity
            row.sold += item.quantity
            self._note(item, "deduct", sale_id)
        self.session.add(Paper(id=sale_id, kind="sale"))

    async def find(self, order_id: str) -> Order:
        order = await self.session.get(Order, order_id)
        if order is None:
            raise OrderNotFound(f"there is no order {order_id}")
        return order

    async def _lock(self, items: Iterable[Countable]) -> dict[str, Stock]:
        """The rows of these products, locked in a fixed order so that two orders can't wait for each other."""
        ids = sorted({item.product_id for item in items})
        query = select(Stock).where(Stock.product_id.in_(ids)).order_by(Stock.product_id).with_for_update()
        return {row.product_id: row for row in await self.session.scalars(query)}

    def _note(self, item: Countable, what: str, reference: str) -> None:
        self.session.add(StockChange(product_id=item.product_id, what=what, reference=reference, quantity=item.quantity))
