"""Admission that follows a link: candidates are sold by Redis, the others by the database, as drains and never without rules."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gray_kit import Record, watch_of

from inventory_sdk import Inventory, Line
from inventory_sdk.gray.admission import AdmissionJob
from inventory_sdk.metrics import NoMetrics

WHO: dict[str, Any] = {"who": "eva", "why": "try"}


async def merchants() -> list[str]:
    return ["m1", "m2"]


async def places(inventory: Inventory) -> dict[str, set[str]]:
    return {merchant: {row.admission for row in await inventory.ledger.admission(merchant)} for merchant in await merchants()}


async def test_merchants_go_where_the_link_says_and_come_back() -> None:
    inventory = Inventory("memory://", metrics=[NoMetrics()], admission="database")
    never = asyncio.Event()
    async with inventory:
        watch = watch_of(inventory.gray_links)
        metrics = Record()
        job = AdmissionJob("redis-path", merchants, watch.known, inventory.stock, inventory.ledger, metrics, watch.changed)
        for merchant in await merchants():
            await inventory.stock.restock([Line("a", 5)], merchant=merchant, operation_id="r")
        assert await job.round(never) == 0  # nobody has said anything
        assert await places(inventory) == {"m1": {"database"}, "m2": {"database"}}
        await inventory.gray_links.set("redis-path", allow=["m1"], **WHO)
        assert await job.round(never) == 1
        assert await places(inventory) == {"m1": {"redis"}, "m2": {"database"}}
        assert await job.round(never) == 0
        await inventory.stock.deduct([Line("a", 1)], merchant="m1", operation_id="o1")
        await inventory.gray_links.kill("redis-path", **WHO)
        assert await job.round(never) == 1
        assert await places(inventory) == {"m1": {"database"}, "m2": {"database"}}
        assert (await inventory.stock.level("a", merchant="m1")).available == 4
        assert await inventory.ledger.verify() == []


async def test_workers_follow_by_themselves() -> None:
    inventory = Inventory("memory://", metrics=[NoMetrics()], admission="database")
    inventory.gray_links.follow_admission("redis-path", merchants=merchants)
    with pytest.raises(TypeError, match="already"):
        inventory.gray_links.follow_admission("redis-path", merchants=merchants)
    async with inventory:
        await inventory.stock.restock([Line("a", 5)], merchant="m1", operation_id="r")
        await inventory.gray_links.set("redis-path", percentage=100, **WHO)
        async with asyncio.timeout(20):
            while (await places(inventory))["m1"] != {"redis"}:
                await asyncio.sleep(0.01)


async def test_a_merchant_that_cannot_go_yet_does_not_hold_up_the_others() -> None:
    metrics = Record()
    moved: list[str] = []

    class Hands:
        async def adopt(self, merchant: str) -> int:
            from inventory_sdk.errors import StockFrozen

            if merchant == "m1":
                raise StockFrozen("being recovered")
            moved.append(merchant)
            return 1

        async def withdraw(self, merchant: str) -> int:
            raise AssertionError

    class Ledger:
        async def places(self, fields: Any, merchant: str) -> dict[str, str]:
            return {"": "database"}

        async def admission(self, merchant: str) -> list[Any]:
            return []

    inventory = Inventory("memory://", metrics=[NoMetrics()])
    async with inventory:
        await inventory.gray_links.set("redis-path", percentage=100, **WHO)
        watch = watch_of(inventory.gray_links)
        job = AdmissionJob("redis-path", merchants, watch.known, Hands(), Ledger(), metrics, watch.changed)  # type: ignore[arg-type]
        assert await job.round(asyncio.Event()) == 1
        assert moved == ["m2"]
        assert metrics.named("gray_admission")

        async def broken() -> list[str]:
            raise OSError("no database")

        job = AdmissionJob("redis-path", broken, watch.known, Hands(), Ledger(), metrics, watch.changed)  # type: ignore[arg-type]
        assert await job.round(asyncio.Event()) == 0
