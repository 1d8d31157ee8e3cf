"""Everything that moves stock."""

from collections.abc import Sequence

from pydantic import BaseModel, PositiveInt
from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk import InsufficientStock, Line, OperationConflict, ReservationClosed, UnknownStock

from .errors import OrderClosed, OrderNotFound, OutOfStock, ReturnRefused
from .inventory import inventory
from .models import Order, OrderItem, Paper

HOLD_SECONDS = 900
REFUSALS = {
    InsufficientStock: OutOfStock,
    UnknownStock: OutOfStock,
    ReservationClosed: OrderClosed,
    OperationConflict: OrderClosed,
}


class Item(BaseModel):
    product_id: str
    quantity: PositiveInt


def units(items: Sequence[Item]) -> list[Line]:
    return [Line(item.product_id, item.quantity) for item in items]


class StockService:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    @inventory.reserves(
        run="now",
        session="self.session",
        operation_id="order_id",
        lines=units,
        ttl=lambda: HOLD_SECONDS,
        raises=REFUSALS,
    )
    async def place_order(self, order_id: str, items: Sequence[Item]) -> Order:
        """Hold the items for a quarter of an hour. ``OutOfStock`` if one of them is short."""
        if known := await self.session.get(Order, order_id):
            return known
        order = Order(id=order_id, status="placed", items=[OrderItem(**item.model_dump()) for item in items])
        self.session.add(order)
        return order

    @inventory.confirms(run="now", reservation="order_id", raises=REFUSALS)
    async def pay(self, order_id: str) -> Order:
        """Sell what the order holds."""
        order = await self.find(order_id)
        if order.status not in ("placed", "paid"):
            raise OrderClosed(f"order {order_id} is {order.status}")
        order.status = "paid"
        return order

    @inventory.releases(run="now", reservation="order_id", raises=REFUSALS)
    async def cancel(self, order_id: str) -> Order:
        """Give back what the order holds."""
        order = await self.find(order_id)
        if order.status not in ("placed", "cancelled"):
            raise OrderClosed(f"order {order_id} is {order.status}")
        order.status = "cancelled"
        return order

    @inventory.takes_back(run="now", operation_id="return_id", of="order_id", lines=units)
    async def return_items(self, return_id: str, order_id: str, items: Sequence[Item]) -> Order:
        """Put what a customer sent back on the shelf. ``ReturnRefused`` if that is more than was sold."""
        order = await self.find(order_id)
        if await self.session.get(Paper, return_id):
            return order
        left = {item.product_id: item for item in order.items if order.status == "paid"}
        for item in items:
            sold = left.get(item.product_id)
            if sold is None or sold.returned + item.quantity > sold.quantity:
                raise ReturnRefused(f"order {order_id}: not that many {item.product_id} can come back")
            sold.returned += item.quantity
        self.session.add(Paper(id=return_id, kind="return"))
        return order

    @inventory.restocks(run="now", operation_id="delivery_id", lines=units)
    async def receive_goods(self, delivery_id: str, items: Sequence[Item]) -> None:
        """Put a delivery on the shelf."""
        if await self.session.get(Paper, delivery_id):
            return
        self.session.add(Paper(id=delivery_id, kind="delivery"))

    @inventory.deducts(run="later", name="till-sale", operation_id="sale_id", lines=units, raises=REFUSALS)
    async def sell_at_till(self, sale_id: str, items: Sequence[Item]) -> None:
        """Book what was sold in the store. ``OutOfStock`` if the shelf disagrees."""
        if await self.session.get(Paper, sale_id):
            return
        self.session.add(Paper(id=sale_id, kind="sale"))

    async def find(self, order_id: str) -> Order:
        order = await self.session.get(Order, order_id)
        if order is None:
            raise OrderNotFound(f"there is no order {order_id}")
        return order


inventory.provides(StockService)(StockService)
