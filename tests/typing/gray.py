"""``@inventory.gray`` keeps the types of what it decorates."""

from __future__ import annotations

from typing import assert_type

from inventory_sdk import Inventory, Receipt, injected
from inventory_sdk.gray.decision import Decision
from inventory_sdk.gray.rules import Rules


async def quick(order: str, receipt: Receipt = injected()) -> int:
    return 1


async def declare(inventory: Inventory) -> None:
    @inventory.gray("fast", candidate=quick)
    @inventory.deducts(run="now", operation_id="order", sku="order", quantity=1)
    async def place(order: str, receipt: Receipt = injected()) -> int:
        return 1

    @inventory.gray("fast", candidate=quick)
    @inventory.deducts(run="later", name="book", operation_id="order", sku="order", quantity=1)
    async def book(order: str) -> None: ...

    class Service:
        @inventory.gray("fast", candidate="quick_hold", merchant="m")
        async def hold(self, m: str) -> str:
            return m

        async def quick_hold(self, m: str) -> str:
            return m

        @classmethod
        @inventory.gray("fast", candidate="quick_make", merchant=lambda name: name)
        async def make(cls, name: str) -> bytes:
            return b""

    assert_type(await place("o"), int)
    assert_type(await book("o"), Receipt)
    assert_type(await Service().hold("m"), str)
    assert_type(await Service.make("m"), bytes)
    await place(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await Service().hold()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    links = inventory.gray_links
    assert_type(await links.set("fast", percentage=12.5, who="eva", why="first"), Rules)
    assert_type(links.decide("fast"), Decision)
    await links.kill("fast")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

    @links.attributes
    def attributes(merchant: str) -> dict[str, str]:
        return {}

    assert_type(attributes("m"), dict[str, str])

    @inventory.gray("fast", candidate=quick)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def sync() -> int:
        return 1
