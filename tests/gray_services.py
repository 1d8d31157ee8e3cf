"""Two services and what their workers run, for ``python -m uvicorn tests.gray_services:front`` and ``:back``. The places come from the
environment; ``back`` has a namespace of its own, so that it agrees with ``front`` only by what the requests carry."""

from __future__ import annotations

import os

import httpx
from fastapi import FastAPI, Header
from redis.asyncio import Redis

from inventory_sdk import Inventory, InventoryMiddleware
from inventory_sdk.metrics import NoMetrics

REDIS = os.environ["GRAY_REDIS"]
NAMESPACE = os.environ["GRAY_NAMESPACE"]
LINK = "pricing"
TRUSTED = {"merchant_header": "X-Merchant", "trusted": [os.environ.get("GRAY_TRUSTED", "127.0.0.0/8")], "baggage": True, "lifespan": True}


def made(role: str) -> Inventory:
    return Inventory(
        REDIS,
        queue=os.environ["GRAY_QUEUE"],
        database=os.environ["GRAY_DATABASE"],
        namespace=f"{NAMESPACE}{role}",
        table_prefix=f"{NAMESPACE}_",
        merchant=None,
        metrics=[NoMetrics()],
    )


inventory = made("")
back_inventory = Inventory(REDIS, database="sqlite+aiosqlite://", namespace=f"{NAMESPACE}back", merchant=None, metrics=[NoMetrics()])


async def ran(side: str, order: str) -> None:
    async with Redis.from_url(REDIS) as client:
        await client.rpush(f"{NAMESPACE}:ran", f"{order} {side}")


async def quick_price() -> str:
    return "candidate"


@inventory.gray(LINK, candidate=quick_price)
async def price() -> str:
    return "stable"


async def quick_back_price() -> str:
    return "candidate"


@back_inventory.gray(LINK, candidate=quick_back_price)
async def back_price() -> str:
    return "stable"


async def quick_book(order: str) -> None:
    await ran("candidate", order)


@inventory.gray(LINK, candidate=quick_book)
@inventory.deducts(run="later", name="book", operation_id="order", sku=lambda: "a", quantity=1)
async def book(order: str) -> None:
    await ran("stable", order)


front = FastAPI()
front.add_middleware(InventoryMiddleware, inventory=inventory, **TRUSTED)


@front.post("/orders/{order}")
async def take(order: str, back: str, x_merchant: str = Header()) -> dict[str, str]:
    mine = await price()
    await book(order)
    async with httpx.AsyncClient(transport=inventory.gray_links.carrying()) as client:
        answer = await client.get(f"{back}/price", headers={"X-Merchant": x_merchant})
    return {"front": mine, "back": answer.json()}


back = FastAPI()
back.add_middleware(InventoryMiddleware, inventory=back_inventory, **TRUSTED)


@back.get("/price")
async def answer_price() -> str:
    return await back_price()
