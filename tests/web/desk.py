"""A small shop with its management pages on a port, for browsers: everything in memory, one of each thing that needs a person."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
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
NOW = 1_790_000_000_000
HOSTILE = "<img src=x onerror=alert(1)>\"'&{{7*7}}\u202e"
"""A SKU that tries markup, attributes, a template, and turns the direction of writing."""


@dataclass(frozen=True)
class Hot:
    key: str
    merchant: str | None
    sku: str | None
    rate: float
    hot_since: float | None


class Hotspots:
    """A double: what ``inventory.hotspots`` answers."""

    def __init__(self, *found: Hot) -> None:
        self.found = found

    def top(self, limit: int = 20) -> list[Hot]:
        return list(self.found[:limit])


@dataclass(frozen=True)
class Rules:
    link: str
    version: int = 6
    percentage: float = 25.0
    killed: bool = False
    paused: bool = False
    allow: tuple[str, ...] = ("m1", HOSTILE)
    deny: tuple[str, ...] = ()
    taken_back: tuple[str, ...] = ()
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    guard: Any = None


@dataclass(frozen=True)
class Change:
    version: int
    at_ms: int
    who: str
    why: str
    changes: Mapping[str, Sequence[Any]]


class GrayLinks:
    """A double of ``inventory.gray_links`` with one link."""

    def __init__(self) -> None:
        self.rules = Rules("fast-allocation")
        self.told = [Change(6, NOW, "gisela", "nobody complained", {"percentage": [10.0, 25.0]})]

    def links(self) -> list[str]:
        return [self.rules.link]

    def known(self, link: str) -> Rules:
        return self.rules

    def route(self, merchant: str) -> str:
        return ""

    async def show(self, link: str) -> Rules:
        return self.rules

    async def kill(self, link: str, *, who: str, why: str) -> None:
        self._set(True, who, why)

    async def restore(self, link: str, *, who: str, why: str) -> None:
        self._set(False, who, why)

    def _set(self, killed: bool, who: str, why: str) -> None:
        if self.rules.killed == killed:
            raise InvalidOperation("link", self.rules.link, "is so already")
        version = self.rules.version + 1
        self.rules = replace(self.rules, killed=killed, version=version)
        self.told.append(Change(version, NOW, who, why, {"killed": [not killed, killed]}))

    async def history(self, link: str, *, limit: int = 50) -> list[Change]:
        return self.told[::-1][:limit]


@dataclass(frozen=True)
class Discrepancy:
    number: int
    merchant: str
    sku: str | None
    cause: str
    available: int
    reserved: int
    evidence: Mapping[str, Any]
    what: str = "stock"
    reservation: str | None = None
    state: str = "open"
    found_ms: int = 0
    resolved_ms: int | None = None
    correction: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Correction:
    number: int
    units: int
    steps: tuple[str, ...]
    needs_confirmation: bool
    why_not: str = ""


class Reconciler:
    """A double of ``inventory.reconciler`` with one discrepancy, of more units than may be corrected without a second look."""

    def __init__(self) -> None:
        evidence = {"redis": {"available": 487, "as of": "1-38"}, "ledger": {"available": 437}, "journaled since": 0}
        self.row = Discrepancy(7, "m1", "phone-15", "manual_redis", 50, 0, evidence, found_ms=NOW)
        self.corrected: list[tuple[int, str, str]] = []

    async def discrepancies(
        self, *, state: str = "open", cause: str | None = None, limit: int = 50, after: int | None = None, **_: str
    ) -> list[Discrepancy]:
        return [self.row] if self.row.state == state and cause in (None, self.row.cause) else []

    async def discrepancy(self, number: int) -> Discrepancy:
        if number != self.row.number:
            raise InvalidOperation("number", number, "there is no such discrepancy")
        return self.row

    async def propose(self, number: int) -> Correction:
        return Correction(number, 50, ("Redis: available −50 of phone-15, journaled; the ledger does not move",), True)

    async def correct(self, number: int, reason: str, who: str, confirmed: bool = False) -> None:
        if not confirmed:
            raise InvalidOperation("confirmed", confirmed, "50 units are more than may be corrected without a second look")
        made = {"way": "redis", "available": -50, "who": who, "reason": reason}
        self.row = replace(self.row, state="corrected", resolved_ms=NOW, correction=made)
        self.corrected.append((number, reason, who))

    async def undo(self, number: int, reason: str, who: str) -> None:
        self.row = replace(self.row, state="undone")


@dataclass
class Desk:
    """What a test gets: the shop, where its pages are, and what its later-function was called with."""

    inventory: Inventory
    gray: GrayLinks
    reconciler: Reconciler
    auth: PasswordAuth
    app: Any = None
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
        shop.app = app
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
