"""A shop with its management pages on a port, for browsers: real servers, two processes' worth of Inventory (the one that sells and
works, and the one whose pages are looked at), and one of each thing that needs a person."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import uvicorn
from redis.asyncio import Redis
from sqlalchemy import update
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from inventory_sdk import Inventory, Lane, Line
from inventory_sdk.alerts import Drift, StockOut
from inventory_sdk.ledger.schema import tables
from inventory_sdk.model import key_of
from inventory_sdk.reconcile.model import Discrepancy, Reconcile
from inventory_sdk.web import admin_app
from inventory_sdk.web.admin import Account, PasswordAuth, Role, hash_password, passwords

SECRET = "a secret of the tests, long enough"
PASSWORD = "correct horse battery"
with pytest.MonkeyPatch.context() as _cheap:
    _cheap.setattr(passwords, "_COST", (14, 8, 1))  # the least that is taken: a real one costs six times as much
    HASHED = hash_password(PASSWORD)
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{1237*1237}}\u202e"
"""A name that tries a script, markup, attributes, a template, and turns the direction of writing."""
LINK = "fast-allocation"


def hostile(what: str) -> str:
    """The same, saying where it is from."""
    return f"{what}{HOSTILE}"


@dataclass(frozen=True)
class Servers:
    """Where a shop is, and the namespace that nobody else uses."""

    redis: str
    database: str
    namespace: str

    def inventory(self, **more: Any) -> Inventory:
        lanes = {"core": Lane(max_concurrency=64), "batch": Lane(max_concurrency=4)}
        settings = Reconcile(every=None, whole_every=None, settle=0.01, confirm_above=20)
        told: dict[str, Any] = {"merchant": "m1", "metrics": [], "lanes": lanes, "reconcile": settings, **more}
        found = Inventory(self.redis, database=self.database, namespace=self.namespace, table_prefix=f"{self.namespace}_", **told)
        found.alerts.watch(StockOut(minutes=60), Drift(window=3600))
        return found

    def behind(self, port: int) -> Servers:
        """The same, with a database that is reached through a proxy on this port."""
        return replace(self, database=make_url(self.database).set(port=port).render_as_string(hide_password=False))

    async def sweep(self) -> None:
        """Remove what the shop left."""
        client = Redis.from_url(self.redis)
        keys = [key async for key in client.scan_iter(match=f"*{self.namespace}*", count=1000)]
        if keys:
            await client.delete(*keys)
        await client.aclose()
        await self.sweep_database()

    async def sweep_database(self) -> None:
        """Its tables only."""
        engine = create_async_engine(self.database)
        async with engine.begin() as connection:
            await connection.run_sync(tables(f"{self.namespace}_").metadata.drop_all)
        await engine.dispose()


class Shop:
    """What the service does with its stock, as each of its processes has it."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.away: set[str] = {"order-77", "order-78", hostile("order-")}
        """Orders whose later-function fails."""
        self.shipped: list[str] = []
        self.calculated: list[str] = []

        async def allocate_fast(merchant: str) -> str:
            return "candidate"

        @inventory.gray(LINK, candidate=allocate_fast, merchant="merchant")
        async def allocate(merchant: str) -> str:
            return "stable"

        @inventory.deducts(run="later", name="ship", operation_id="order_id", order="order_id", sku=lambda: "phone-15", quantity=1)
        async def ship(order_id: str) -> None:
            if order_id in self.away:
                raise ConnectionError(f"the address service is away: {order_id}")
            self.shipped.append(order_id)

        @inventory.hotspot(threshold="20/second", limit="10000/second", max_wait=5.0)
        @inventory.deducts(run="now", operation_id="order_id", sku="sku", quantity=1)
        async def buy(order_id: str, sku: str) -> None:
            pass

        @inventory.coalesce(key="shop", debounce=0.01, name="shop totals")
        async def calculate(shop: str) -> None:
            self.calculated.append(shop)

        @inventory.trigger("price changed", runs=calculate, key="shop")
        async def reprice(shop: str) -> None:
            pass

        inventory.gray_links.split_workers(LINK)
        self.allocate: Callable[[str], Awaitable[str]] = allocate
        self.ship: Callable[[str], Awaitable[Any]] = ship
        self.buy: Callable[[str, str], Awaitable[None]] = buy
        self.reprice: Callable[[str], Awaitable[None]] = reprice


@dataclass
class Desk:
    """What a test gets. ``shop`` sells and has the worker; ``pages`` is the Inventory whose pages are served, in a process of its own
    as far as anything but memory goes. ``found``: by SKU or reservation what a comparison found."""

    servers: Servers
    shop: Shop
    pages: Inventory
    auth: PasswordAuth
    app: Any
    url: str = ""
    found: dict[str, Discrepancy] = field(default_factory=dict)

    @property
    def stock(self) -> Any:
        """Of the shop."""
        return self.shop.inventory.stock

    async def by_hand(self, sku: str, units: int, merchant: str = "m1") -> None:
        """Change Redis' counter past every script."""
        partition = self.shop.inventory._ready().engine.home(merchant)
        client: Any = partition.wire.client
        await client.hincrby(partition.key("available"), key_of(merchant, sku), units)

    async def sides(self, sku: str, merchant: str = "m1") -> tuple[tuple[int, int], tuple[int, int]]:
        """(available, reserved) in Redis and, once it has caught up, in the ledger."""
        await self.shop.inventory.settled()
        level = await self.stock.level(sku, merchant=merchant)
        (row,) = await self.shop.inventory.ledger.stock([key_of(merchant, sku)])
        return (level.available, level.reserved), (row.available, row.reserved)

    async def differs(self, sku: str) -> Discrepancy:
        """What a comparison finds of this SKU now."""
        (found,) = (await self.shop.inventory.reconciler.run(merchant="m1", sku=sku)).open
        return found

    async def frozen(self) -> list[str]:
        return [each.sku for each in await self.stock.frozen()]


async def until(holds: Callable[[], Awaitable[object]], seconds: float = 30.0) -> None:
    """Returns as soon as it holds."""
    async with asyncio.timeout(seconds):
        while not await holds():
            await asyncio.sleep(0.02)


def accounts() -> PasswordAuth:
    """olga may act, victor may look."""
    return PasswordAuth([Account("olga", Role.OPERATOR, HASHED), Account("victor", Role.VIEWER, HASHED)], secret=SECRET)


@asynccontextmanager
async def desk(servers: Servers, *, enemies: bool = True) -> AsyncIterator[Desk]:
    """``enemies``: with names that try to be more than text, wherever somebody may choose one."""
    async with AsyncExitStack() as stack:
        patched = stack.enter_context(pytest.MonkeyPatch.context())
        patched.setattr("inventory_sdk.alerts.alerts.PERIOD", 0.2)  # its rounds come every five seconds otherwise
        stack.push_async_callback(servers.sweep)
        shop, shown = Shop(servers.inventory()), Shop(servers.inventory())
        await stack.enter_async_context(shop.inventory)
        await shop.inventory.create_schema()
        await stack.enter_async_context(shop.inventory.worker(task_attempts=2, first_task_retry=0.01, last_task_retry=0.01))
        await stack.enter_async_context(shown.inventory)
        auth = accounts()
        made = Desk(servers, shop, shown.inventory, auth, admin_app(shown.inventory, auth=auth))
        await stocked(made)
        if enemies:
            await beset(made)
        await drifted(made)
        made.url = await stack.enter_async_context(served(made.app))
        yield made


async def stocked(desk: Desk) -> None:
    """Two merchants, a sale, an order that was confirmed in a part, a link at 25 %, functions that failed to the end."""
    stock, links = desk.stock, desk.shop.inventory.gray_links
    goods = {"phone-15": 500, "case": 80, "lid": 40, "charger": 90, "cable": 60, "box": 30}
    await stock.restock([Line(sku, units) for sku, units in goods.items()], operation_id="po-7")
    await stock.restock([Line("phone-15", 20)], merchant="m2", operation_id="po-7")
    for buyer in range(30):
        await stock.deduct([Line("phone-15", 1 + buyer % 3)], operation_id=f"flash-{buyer}", order=f"order-{buyer}")
    await stock.reserve([Line("phone-15", 2), Line("cable", 1)], operation_id="order-42", order="order-42")
    await stock.confirm("order-42", lines=[Line("phone-15", 1)], operation_id="shipment-1")
    await stock.reserve([Line("cable", 2)], operation_id="order-50", order="order-50", ttl=3600)
    await links.set(LINK, percentage=10, allow=["m1"], who="gisela", why="first merchants")
    await links.set(LINK, percentage=25, who="gisela", why="nobody complained")
    await desk.shop.reprice("m1")
    for order in ("order-77", "order-78"):
        await desk.shop.ship(order)
    await until(lambda: failed(desk, 2))


async def failed(desk: Desk, number: int) -> bool:
    """So many later-functions have really been tried to the end."""
    return (await desk.shop.inventory.ledger.pages.waiting_tasks())[1] >= number


async def beset(desk: Desk) -> None:
    """Every name and every reason that somebody may choose, chosen by an enemy."""
    stock, links = desk.stock, desk.shop.inventory.gray_links
    sku, merchant, order = hostile("sku-"), hostile("shop-"), hostile("order-")
    await stock.restock([Line(sku, 90)], operation_id=hostile("po-"))
    await stock.restock([Line(sku, 5)], merchant=merchant, operation_id=hostile("po-"))
    await stock.reserve([Line(sku, 2)], operation_id=hostile("hold-"), order=order)
    await stock.adjust([Line(sku, -1)], operation_id=hostile("count-"), reason=hostile("why-"))
    await links.set(LINK, allow=["m1", merchant], deny=[hostile("no-")], where={hostile("kind-"): [hostile("is-")]},
                    who=hostile("who-"), why=hostile("why-"))  # fmt: skip
    await links.set(LINK, where={}, who="gisela", why="all kinds")
    await desk.shop.ship(order)
    await until(lambda: failed(desk, 3))
    await asyncio.gather(*[stock.deduct([Line(sku, 20)], operation_id=f"{hostile('sale-')}{number}") for number in range(2)])
    await desk.by_hand(sku, 21)
    await desk.shop.inventory.settled()


async def drifted(desk: Desk) -> None:
    """Redis was changed by hand, sold what it did not have, lost an expiry; and somebody wrote into the ledger's tables."""
    inventory = desk.shop.inventory
    await desk.by_hand("charger", 50)
    await desk.by_hand("cable", 7)
    for sku, stays in (("case", 0), ("lid", 4)):
        # Units that were never there are sold, the ledger refuses that; then the hand takes them away again, or not all of them.
        await desk.by_hand(sku, 10)
        await desk.stock.deduct([Line(sku, (await desk.stock.level(sku)).available)], operation_id=f"oversold-{sku}", order="order-44")
        await until(lambda sku=sku: frozen(desk, sku))
        await desk.by_hand(sku, stays - 10)
    partition = inventory._ready().engine.home("m1")
    client: Any = partition.wire.client
    await client.zrem(partition.key("expiry"), key_of("m1", "order-50"))
    ledger: Any = inventory.ledger
    async with ledger.engine.begin() as connection:
        table = ledger.tables.stock
        found = {"available": table.c.available + 3, "supplied": table.c.supplied + 3}
        await connection.execute(update(table).where(table.c.merchant == "m1", table.c.sku == "box").values(**found))
    await inventory.settled()
    done = await inventory.reconciler.run()
    desk.found = {each.sku or each.reservation or each.what: each for each in done.open}


async def frozen(desk: Desk, sku: str) -> bool:
    return sku in await desk.frozen()


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """The app on a free port of loopback, in this event loop. Its lifespan is somebody else's."""
    config = uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(server._serve([listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
