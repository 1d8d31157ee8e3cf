"""The shop over HTTP."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import ceil
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk import OutcomeUnknown, Overloaded, UnknownStock

from .database import engine, get_session
from .errors import ShopError
from .inventory import inventory
from .models import Product
from .stock import Item, StockService


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with inventory:
        yield
    await engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.exception_handler(ShopError)
async def refused(request: Request, error: ShopError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, error.status)


@app.exception_handler(Overloaded)
@app.exception_handler(OutcomeUnknown)
async def come_back(request: Request, error: Overloaded | OutcomeUnknown) -> JSONResponse:
    """Safe to send again: the order's id is the operation's id."""
    seconds = ceil(getattr(error, "retry_after", 1))
    return JSONResponse({"detail": str(error)}, 503, {"Retry-After": str(seconds)})


Session = Annotated[AsyncSession, Depends(get_session, scope="function")]


def get_service(session: Session) -> StockService:
    return StockService(session)


Service = Annotated[StockService, Depends(get_service)]


class Items(BaseModel):
    id: str
    items: list[Item]


class OrderView(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    status: str


@app.post("/orders", status_code=201, response_model=OrderView)
async def place_order(order: Items, service: Service) -> object:
    return await service.place_order(order.id, order.items)


@app.get("/orders/{order_id}", response_model=OrderView)
async def get_order(order_id: str, service: Service) -> object:
    return await service.find(order_id)


@app.post("/orders/{order_id}/pay", response_model=OrderView)
async def pay(order_id: str, service: Service) -> object:
    return await service.pay(order_id)


@app.post("/orders/{order_id}/cancel", response_model=OrderView)
async def cancel(order_id: str, service: Service) -> object:
    return await service.cancel(order_id)


@app.post("/orders/{order_id}/returns", response_model=OrderView)
async def return_items(order_id: str, slip: Items, service: Service) -> object:
    return await service.return_items(slip.id, order_id, slip.items)


@app.post("/deliveries", status_code=204)
async def receive_goods(delivery: Items, service: Service) -> None:
    await service.receive_goods(delivery.id, delivery.items)


@app.post("/sales", status_code=204)
async def sell_at_till(sale: Items, service: Service) -> None:
    await service.sell_at_till(sale.id, sale.items)


@app.get("/products/{product_id}")
async def get_product(product_id: str, session: Session) -> dict[str, object]:
    product = await session.get(Product, product_id)
    if product is None:
        raise HTTPException(404)
    try:
        stock = await inventory.stock.level(product_id)
    except UnknownStock:
        raise HTTPException(404) from None
    return {"id": product.id, "name": product.name, "cents": product.cents, "available": stock.available}
