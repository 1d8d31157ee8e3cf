"""Everybody wants the same mug: python load.py --buyers 300 --units 50 --at-once 32

SHOP_DATABASE_URL and SHOP_REDIS_URL name the servers. With the SDK it also runs without any, on SQLite and an embedded Redis. The file
is the same before and after.
"""

import argparse
import asyncio
import os
import secrets
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from statistics import quantiles

import httpx


async def rush(buyers: int, units: int, at_once: int) -> bool:
    from shop.api import app
    from shop.database import engine, sessions
    from shop.models import Base, Product, Stock

    inventory = the_sdks()
    if inventory is None and engine.dialect.name == "sqlite":
        sys.exit("SQLite has no row locks, so this shop would sell a mug many times over: name a PostgreSQL in SHOP_DATABASE_URL")
    mug = f"mug-{secrets.token_hex(3)}"
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with sessions() as session, session.begin():
        session.add(Product(id=mug, name="Mug", cents=1200))
        await session.flush()
        session.add(Stock(product_id=mug, available=units))

    answers: Counter[int] = Counter()
    seconds: list[float] = []
    waiting = iter(range(buyers))

    async def buyer(client: httpx.AsyncClient) -> None:
        for number in waiting:
            started = time.perf_counter()
            order = {"id": f"{mug}-{number}", "items": [{"product_id": mug, "quantity": 1}]}
            placed = await client.post("/orders", json=order)
            if placed.status_code == 201 and number % 2:
                placed = await client.post(f"/orders/{mug}-{number}/pay")
            seconds.append(time.perf_counter() - started)
            answers[placed.status_code] += 1

    async with AsyncExitStack() as stack:
        if inventory is not None:  # its worker runs inside
            redis = os.environ.get("SHOP_REDIS_URL", "memory://")
            await stack.enter_async_context(inventory.replaced(redis=redis, database=engine))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://shop", timeout=60))
        began = time.perf_counter()
        await asyncio.gather(*[buyer(client) for _ in range(at_once)])
        took = time.perf_counter() - began
        if inventory is not None:
            await inventory.settled()
    async with sessions() as session:
        stock = await session.get_one(Stock, mug)
    await engine.dispose()

    got = answers.pop(201, 0) + answers.pop(200, 0)
    refused = answers.pop(409, 0)
    print(f"{buyers} buyers, {at_once} at once, for {units} mugs: {got} got one, {refused} were refused, {answers.total()} failed")
    p50, p99 = (quantiles(seconds, n=100)[at] * 1000 for at in (49, 98))
    print(f"{buyers / took:,.0f} per second, p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    print(f"on the shelf {stock.available}, reserved {stock.reserved}, sold {stock.sold}")
    exact = got == min(units, buyers) and stock.available == units - got and stock.reserved + stock.sold == got
    print("exact" if exact else "NOT EXACT")
    return exact


def the_sdks():
    """The shop's inventory, if it has one."""
    try:
        from shop.inventory import inventory
    except ModuleNotFoundError as error:
        if error.name != "shop.inventory":
            raise
        return None
    return inventory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("buyers", 300), ("units", 50), ("at-once", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("SHOP_DATABASE_URL", f"sqlite+aiosqlite:///{folder}/shop.db")
        sys.exit(0 if asyncio.run(rush(asked.buyers, asked.units, asked.at_once)) else 1)


if __name__ == "__main__":
    main()
