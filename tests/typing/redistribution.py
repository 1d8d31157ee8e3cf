"""Coalesced functions and triggers keep their types."""

from __future__ import annotations

from typing import assert_type

from inventory_sdk import Inventory, Recalculation, RedistributionPolicy, injected
from inventory_sdk.redistribute.governor import GovernorState
from inventory_sdk.redistribute.triggers import TriggerCount


async def declare() -> None:
    inventory = Inventory("memory://", redistribution=RedistributionPolicy(cpu_budget=0.25, slows=("batch", "core")))

    @inventory.coalesce(key="{shop_id}", debounce=0.2, max_wait=2, executor="process", timeout=60, cpu_budget=0.25, key_cpu_budget=0.05)
    async def recalculate(shop_id: str, run: Recalculation = injected()) -> dict[str, int]:
        return {shop_id: run.fence}

    @inventory.trigger("order_paid", runs=recalculate, key="{shop_id}")
    async def order_paid(shop_id: str, amount: int) -> float:
        return 1.0

    class Service:
        @inventory.trigger("moved", runs=recalculate, key=lambda shop: shop)
        async def move(self, shop: str) -> bytes:
            return b""

        @inventory.lane("batch")
        @inventory.coalesce(key="name")
        @staticmethod
        async def rebuild(name: str) -> int:
            return 1

    assert_type(await recalculate("s"), dict[str, int])
    assert_type(await order_paid("s", 1), float)
    assert_type(await Service().move("s"), bytes)
    assert_type(await Service.rebuild("n"), int)
    assert_type(inventory.redistribution.triggers(), list[TriggerCount])
    assert_type(await inventory.redistribution.counted(), list[TriggerCount])
    assert_type(inventory.redistribution.governor.state(), GovernorState)

    await recalculate(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await order_paid("s")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    inventory.coalesce()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    inventory.coalesce(key="n", executor="thread")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    inventory.trigger("t", runs=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    @inventory.coalesce(key="name")  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]
    def sync(name: str) -> None: ...
