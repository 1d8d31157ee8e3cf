"""Baggage at the door: believed from trusted peers, taken away from anybody else's."""

from __future__ import annotations

from typing import Any

import pytest
from gray_kit import until, watch_of

from inventory_sdk import Inventory, InventoryMiddleware, context
from inventory_sdk.context import Side
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.metrics import NoMetrics

OURS = b"inventory-gray.fast=candidate:1:m1"


async def request(inventory: Inventory, headers: list[tuple[bytes, bytes]], client: str = "10.1.2.3", **options: Any) -> tuple[Any, Any]:
    """The decisions and the headers that the app sees."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend((context.sides.get(), scope["headers"]))

    async def nothing(*_: Any) -> Any:
        return {}

    middleware = InventoryMiddleware(app, inventory=inventory, **options)
    await middleware({"type": "http", "path": "/", "headers": headers, "client": (client, 1)}, nothing, nothing)
    assert context.sides.get() is None
    return seen[0], seen[1]


@pytest.fixture
def inventory() -> Inventory:
    return Inventory("memory://", metrics=[NoMetrics()])


BELIEVING: dict[str, Any] = {"baggage": True, "trusted": ["10.0.0.0/8"]}


async def test_a_trusted_peers_decisions_are_taken_over(inventory: Inventory) -> None:
    headers = [(b"Baggage", b"a=b, " + OURS), (b"baggage", b"inventory-gray.slow=stable:2:m%202")]
    sides, kept = await request(inventory, headers, **BELIEVING)
    assert sides == {("fast", "m1"): Side("candidate", 1), ("slow", "m 2"): Side("stable", 2)}
    assert kept == headers


@pytest.mark.parametrize(
    ("client", "options"), [("192.168.0.1", BELIEVING), ("unix", BELIEVING), ("10.1.2.3", {}), ("10.1.2.3", {"trusted": ["10.0.0.0/8"]})]
)
async def test_anybody_elses_are_removed_and_other_members_stay(inventory: Inventory, client: str, options: dict[str, Any]) -> None:
    headers = [(b"x", b"1"), (b"baggage", b"a=b, " + OURS), (b"baggage", OURS)]
    sides, kept = await request(inventory, headers, client, **options)
    assert sides == {}
    assert kept == [(b"x", b"1"), (b"baggage", b"a=b")]
    sides, kept = await request(inventory, [(b"baggage", OURS)], client, **options)
    assert (sides, kept) == ({}, [])


async def test_every_request_has_decisions_of_its_own(inventory: Inventory) -> None:
    assert await request(inventory, [(b"x", b"1")]) == ({}, [(b"x", b"1")])


def test_baggage_is_believed_of_named_networks_only(inventory: Inventory) -> None:
    with pytest.raises(InvalidOperation, match="trusted"):
        InventoryMiddleware(None, inventory=inventory, baggage=True)  # type: ignore[arg-type]


async def test_a_version_that_we_do_not_know_yet_makes_us_look(inventory: Inventory) -> None:
    async with inventory:
        watch = watch_of(inventory.gray_links)
        await until(lambda: not watch._look.is_set())
        context.sides.set({("fast", "m1"): Side("candidate", 5)})
        assert inventory.gray_links.decide("fast", "m1").reason == "carried"
        assert watch._look.is_set()
