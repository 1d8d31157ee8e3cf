"""Read by mypy --strict and basedpyright, never run. What must fail has an ignore; an ignore that nothing needs is an error."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk import Change, Inventory, WatchedTables, record_change
from inventory_sdk.errors import HotspotLimited, InsufficientStock
from inventory_sdk.model import Movement, OpeningBalance, Receipt
from inventory_sdk.stock.decorators import StockDecorators
from inventory_sdk.weave import injected


class Item: ...


class OutOfStock(Exception): ...


def reference(receipt: Receipt) -> int:
    return len(receipt.lines)


def declare(inventory: StockDecorators) -> None:
    @inventory.reserves(run="now", operation_id="order_id", lines="items", sku="id", quantity="qty", ttl=900)
    async def place(order_id: str, items: list[Item], receipt: Receipt = injected()) -> int:
        return 1

    @inventory.deducts(run="later", name="book", operation_id="order_id", sku=lambda order_id: order_id, quantity=1)
    async def book(order_id: str, session: AsyncSession = injected()) -> None: ...

    @inventory.deducts(run="later", name="count", result=reference, sku="order_id", quantity=1)
    async def count(order_id: str) -> None: ...

    class Service:
        @inventory.reserves(run="now", session="session", lines="items", ttl=lambda items: 5, raises={InsufficientStock: OutOfStock})
        async def hold(self, session: AsyncSession, items: list[Item], *, receipt: Receipt = injected()) -> str:
            return receipt.operation_id

        @classmethod
        @inventory.releases(run="now", reservation="name")
        async def free(cls, name: str) -> bytes:
            return b""

        @staticmethod
        @inventory.restocks(run="now", sku="sku", quantity=1)
        async def receive(sku: str) -> float:
            return 1.0

        @inventory.confirms(run="later", name="ship", reservation="name")
        async def ship(self, name: str) -> None: ...

        @classmethod
        @inventory.takes_back(run="later", name="refund", of="order", lines="items", result=lambda receipt: receipt.lines)
        async def refund(cls, order: str, items: list[Item]) -> None: ...

        @inventory.adjusts(run="now", lines="items", reason="why")
        async def adjust(self, items: list[Item], why: str) -> None: ...

    async def calls(service: Service, session: AsyncSession, receipt: Receipt, items: list[Item]) -> None:
        assert_type(await place("o", items), int)
        assert_type(await place(order_id="o", items=items, receipt=receipt), int)
        assert_type(await book("o"), Receipt)
        assert_type(await count("o"), int)
        assert_type(await service.hold(session, items), str)
        assert_type(await Service.free("o"), bytes)
        assert_type(await service.receive("a"), float)
        assert_type(await service.ship("o"), Receipt)
        assert_type(await Service.ship(service, "o"), Receipt)
        assert_type(await Service.refund("o", items), tuple[Any, ...])  # type: ignore[assert-type]  # pyright: ignore[reportAssertTypeFailure]
        assert_type(await service.adjust(items, "why"), None)

        await place(1, items)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        await place("o")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        await book(order=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        await service.hold(session)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        await service.ship()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    inventory.weave("shop.services:StockService.hold", inventory.deducts(run="now", sku="sku", quantity=1))

    @inventory.writes_stock
    async def write(moves: Sequence[Movement], session: AsyncSession) -> None: ...

    @inventory.reads_stock
    async def read(merchant: str, skus: Sequence[str], session: AsyncSession) -> Iterable[OpeningBalance]:
        return []

    @inventory.on("expired")
    def handle(event: object) -> None: ...

    @inventory.provides(Service)
    async def make(session: AsyncSession) -> Service:
        return Service()

    kept: Callable[..., Coroutine[Any, Any, Service]] = make
    _ = (calls, write, read, handle, kept)


def refused(inventory: StockDecorators) -> None:
    inventory.reserves(lines="items")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    inventory.reserves(run="soon", lines="items")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    inventory.reserves(run="now", lnes="items")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    inventory.reserves(run="now", lines="items", of="order")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    inventory.reserves(run="later", lines="items")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    inventory.deducts(run="now", lines="items", durability="safe")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    inventory.confirms(run="now")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    inventory.takes_back(run="now", lines="items")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    inventory.restocks(run="now", lines="items", session="s")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]

    @inventory.deducts(run="now", sku="sku", quantity=1)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def sync(sku: str) -> None: ...

    @inventory.deducts(run="later", name="n", sku="sku", quantity=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async def returns_something(sku: str) -> int:
        return 1

    @inventory.writes_stock  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def write(moves: Sequence[Movement], session: AsyncSession) -> None: ...

    _ = (sync, returns_something, write)


async def in_lanes(inventory: Inventory) -> None:
    @inventory.lane("core")
    @inventory.reserves(run="now", operation_id="order", lines="items", sku="id", quantity=1)
    async def place(order: str, items: list[Item], receipt: Receipt = injected()) -> int:
        return 1

    class Service:
        @inventory.lane("batch", lines="items")
        async def load(self, items: list[Item]) -> bytes:
            return b""

        @inventory.lane("core")
        @classmethod
        async def make(cls, name: str) -> float:
            return 1.0

    assert_type(await place("o", []), int)
    assert_type(await Service().load([]), bytes)
    await place(1, [])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @inventory.lane("core")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def sync() -> int:
        return 1


async def verified(inventory: Inventory, tables: WatchedTables) -> None:
    @inventory.reserves(run="now", operation_id="order", lines="items", sku="id", quantity=1)
    @inventory.verifies(lines="items", sku="id", quantity=1, mode="observe")
    async def place(order: str, items: list[Item], receipt: Receipt = injected()) -> int:
        record_change("a", moved=-1, logged=-1)
        return 1

    class Service:
        @inventory.verifies(lines="items", by={"available": -1}, changes=tables, session="session")
        async def take(self, session: AsyncSession, items: list[Item]) -> bytes:
            return b""

        @inventory.verifies(lines="items", changes=lambda result: result, log=None)
        @classmethod
        async def count(cls, items: list[Item]) -> list[Change]:
            return []

    assert_type(await place("o", []), int)
    assert_type(await Service.count([]), list[Change])
    assert_type(await Service().take(session=AsyncSession(), items=[]), bytes)
    await Service().take([])  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    inventory.verifies(lines="items", mode="watch")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    inventory.verifies(lines="items", changes="guessed")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    record_change("a", -1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    @inventory.verifies(lines="items")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def sync(items: list[Item]) -> None: ...

    _ = sync


async def when_hot(inventory: Inventory) -> None:
    @inventory.lane("core")
    @inventory.hotspot(threshold="200/second", limit="500/second", max_wait=0.3)
    @inventory.reserves(run="now", operation_id="order", lines="items", sku="id", quantity=1)
    async def place(order: str, items: list[Item], receipt: Receipt = injected()) -> int:
        return 1

    def later(limited: HotspotLimited) -> bytes:
        return str(limited.retry_after).encode()

    class Service:
        @inventory.hotspot(threshold="1/second", limit="1/minute", keys=lambda name: [name], overflow="reject", on_reject=later)
        async def look(self, name: str) -> bytes:
            return b""

        @inventory.hotspot(threshold="1/second", limit="1/hour", keys="name")
        @classmethod
        async def make(cls, name: str) -> float:
            return 1.0

    assert_type(await place("o", []), int)
    assert_type(await Service().look("a"), bytes)
    await place(1, [])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type([key.hot_since for key in inventory.hotspots.top(limit=5)], list[float | None])
    assert_type(await inventory.stock.adopt("m1", skus=["a"]), int)

    inventory.hotspot(threshold="1/second", limit="1/second", overflow="drop")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    inventory.hotspot(threshold="1/second")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    @inventory.hotspot(threshold="1/second", limit="1/second", keys="name")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def sync(name: str) -> int:
        return 1
