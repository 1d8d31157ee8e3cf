"""A small shop with its management pages on a port, for browsers: everything in memory, one of each thing that needs a person."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from inventory_sdk import Inventory, Lane, Line
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.metrics.nothing import NoMetrics
from inventory_sdk.model import key_of
from inventory_sdk.web import admin_app
from inventory_sdk.web.admin import Account, PasswordAuth, Role, hash_password

SECRET = "a secret of the tests, long enough"
PASSWORD = "correct horse battery"
HASHED = hash_password(PASSWORD)
HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}\u202e"
"""A SKU that tries markup, attributes, a template, and turns the direction of writing."""


@dataclass(frozen=True)
class Hot:
    key: str
    merchant: str
    sku: str
    rate: float
    hot_since: float | None


class Hotspots:
    """A double: what ``inventory.hotspots`` answers."""

    def __init__(self, *found: Hot) -> None:
        self.found = found

    def top(self, limit: int = 20) -> list[Hot]:
        return list(self.found[:limit])


class GrayLinks:
    """A double of ``inventory.gray_links`` that remembers what it was told."""

    def __init__(self) -> None:
        self.killed: dict[str, bool] = {"fast-allocation": False}
        self.told: list[dict[str, str]] = []

    def links(self) -> list[str]:
        return list(self.killed)

    async def show(self, link: str) -> dict[str, Any]:
        state = "killed" if self.killed[link] else "rolling out"
        return {"state": state, "share": "25 %", "merchants": ["m1", HOSTILE]}

    async def kill(self, link: str, *, who: str, why: str) -> None:
        if self.killed[link]:
            raise InvalidOperation("link", link, "is killed already")
        self.killed[link] = True
        self.told.append({"what": "killed", "who": who, "why": why})

    async def restore(self, link: str, *, who: str, why: str) -> None:
        self.killed[link] = False
        self.told.append({"what": "restored", "who": who, "why": why})

    async def history(self, link: str, limit: int = 50) -> list[dict[str, str]]:
        return self.told[::-1][:limit]


@dataclass(frozen=True)
class Discrepancy:
    number: int
    merchant: str
    sku: str
    cause: str
    expected: int
    found: int
    evidence: dict[str, Any]
    state: str = "open"


class Reconciler:
    """A double of ``inventory.reconciler`` with one discrepancy, of more units than may be corrected without a second look."""

    def __init__(self) -> None:
        evidence = {"last_change": "1-204", "redis_changed_by": "no journal entry"}
        self.rows = {7: Discrepancy(7, "m1", "phone-15", "manual change in Redis", 40, 90, evidence)}
        self.corrected: list[tuple[int, str, str]] = []

    async def discrepancies(self, *, state: str = "open", limit: int = 50, after: int | None = None, **filters: str) -> list[Discrepancy]:
        rows = [row for row in self.rows.values() if row.state == state and all(getattr(row, name) == filters[name] for name in filters)]
        return rows[:limit]

    async def propose(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        return {"discrepancy": row, "correction": {"kind": "correct", "redis_delta": row.expected - row.found, "ledger_delta": 0}}

    async def correct(self, number: int, *, reason: str, who: str, confirmed: bool = False) -> None:
        row = self.rows[number]
        if not confirmed:
            raise InvalidOperation("confirmed", confirmed, f"a correction of {row.expected - row.found} units needs a second look")
        self.rows[number] = Discrepancy(*[getattr(row, name) for name in row.__dataclass_fields__ if name != "state"], state="corrected")
        self.corrected.append((number, reason, who))

    async def undo(self, number: int, *, reason: str, who: str) -> None:
        raise InvalidOperation("number", number, "is not corrected")


@dataclass
class Desk:
    """What a test gets: the shop, where its pages are, and what its later-function was called with."""

    inventory: Inventory
    gray: GrayLinks
    reconciler: Reconciler
    auth: PasswordAuth
    url: str = ""
    address_service_is_away: bool = True
    shipped: list[str] = field(default_factory=list)
    shipping: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def desk(mount: str = "") -> AsyncIterator[Desk]:
    """The pages are served as they are, or mounted below a path of another app."""
    lanes = {"core": Lane(max_concurrency=64), "batch": Lane(max_concurrency=4)}
    inventory = Inventory("memory://", merchant="m1", metrics=[NoMetrics()], lanes=lanes)
    accounts = [Account("olga", Role.OPERATOR, HASHED), Account("victor", Role.VIEWER, HASHED)]
    shop = Desk(inventory, GrayLinks(), Reconciler(), PasswordAuth(accounts, secret=SECRET))
    inventory.gray_links, inventory.reconciler = shop.gray, shop.reconciler  # type: ignore[attr-defined]
    inventory.hotspots = Hotspots(Hot(key_of("m1", "phone-15"), "m1", "phone-15", 1840.0, 1.0), Hot("x", "m1", HOSTILE, 310.0, None))  # type: ignore[attr-defined]

    @inventory.deducts(run="later", name="ship", operation_id="order_id", order="order_id", sku=lambda: "phone-15", quantity=1)
    async def ship(order_id: str) -> None:
        if shop.address_service_is_away:
            raise ConnectionError("the address service is away")
        shop.shipped.append(order_id)
        shop.shipping.set()

    async with inventory:
        await stocked(inventory)
        await ship("order-77")
        await dead(inventory)
        app: Any = admin_app(inventory, auth=shop.auth)
        if mount:
            from starlette.applications import Starlette
            from starlette.routing import Mount

            app = Starlette(routes=[Mount(mount, app)])
        async with served(app) as url:
            shop.url = url + mount
            yield shop


async def stocked(inventory: Inventory) -> None:
    """Two merchants, an order with a reservation that was confirmed in two parts, and a SKU that is frozen."""
    stock = inventory.stock
    await stock.restock([Line("phone-15", 500), Line("case", 80), Line(HOSTILE, 9)], operation_id="po-7")
    await stock.restock([Line("phone-15", 20)], merchant="m2", operation_id="po-7")
    for buyer in range(30):
        await stock.deduct([Line("phone-15", 1 + buyer % 3)], operation_id=f"flash-{buyer}", order=f"order-{buyer}")
    await stock.reserve([Line("phone-15", 2), Line(HOSTILE, 1)], operation_id="order-42", order="order-42")
    await stock.confirm("order-42", lines=[Line("phone-15", 1)], operation_id="shipment-1")
    await stock.deduct([Line("case", 3)], operation_id="order-43", order="order-43")
    await inventory.settled()
    await drifted(inventory, "case", 10)


async def drifted(inventory: Inventory, sku: str, units: int) -> None:
    """Somebody has given Redis units by hand, it has sold them, the ledger has refused that, and the hand has taken them away again."""
    partition = inventory._ready().engine.home("m1")
    client: Any = partition.wire.client
    await client.hincrby(partition.key("available"), key_of("m1", sku), units)
    level = await inventory.stock.level(sku)
    await inventory.stock.deduct([Line(sku, level.available)], operation_id="oversold", order="order-44")
    async with asyncio.timeout(30):
        while not await inventory.stock.frozen():
            await asyncio.sleep(0.02)
    await client.hincrby(partition.key("available"), key_of("m1", sku), -units)
    await inventory.settled()


async def dead(inventory: Inventory) -> None:
    """The later-function has been tried, and is tried no more: the worker would need an hour for that."""
    ledger = inventory.ledger
    async with asyncio.timeout(30):
        while True:
            page = await ledger.pages.named("order-77", "m1")
            life = await ledger.pages.life(page[0].position, page[0].index) if page else None
            if life is not None and life.tasks and life.tasks[0].task.attempts:
                break
            await asyncio.sleep(0.02)
    await ledger.fail_task(life.tasks[0].task, life.tasks[0].error, None)


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
