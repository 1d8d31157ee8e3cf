"""Controllers beside the stock: begun with the connections, ended before them, their jobs run by the worker, their deaths seen."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from inventory_sdk import Inventory, InventoryError, Line
from inventory_sdk.beside import Ground, Job


class Controller:
    def __init__(self, dies: bool = False) -> None:
        self.story: list[str] = []
        self.ground: Ground | None = None
        self.ran = asyncio.Event()
        self.dies = dies

    async def start(self, ground: Ground) -> None:
        self.ground = ground
        self.story.append("started")

    async def close(self) -> None:
        assert self.ground is not None
        await self.ground.client.ping()
        self.story.append("closed")

    def jobs(self, ground: Ground) -> Sequence[Job]:
        assert ground is self.ground
        return [Job("counting", self.count)]

    async def count(self, stopping: asyncio.Event) -> None:
        self.story.append("job began")
        self.ran.set()
        if self.dies:
            raise RuntimeError("no more")
        await stopping.wait()
        self.story.append("job ended")


async def test_a_part_beside_the_stock_lives_as_long_as_the_connections_and_its_job_as_long_as_the_worker() -> None:
    inventory = Inventory("memory://")
    controller = Controller()
    inventory._beside.append(controller)
    async with inventory:
        await asyncio.wait_for(controller.ran.wait(), 10)
        await inventory.stock.restock([Line("a", 1)], operation_id="one")
        assert controller.ground is not None
        assert await controller.ground.client.ping()
    assert controller.story == ["started", "job began", "job ended", "closed"]


async def test_a_job_that_dies_is_raised_from_the_inventory() -> None:
    inventory = Inventory("memory://")
    controller = Controller(dies=True)
    inventory._beside.append(controller)
    with pytest.raises(InventoryError, match="no more"):
        async with inventory:
            await asyncio.wait_for(controller.ran.wait(), 10)
            await asyncio.sleep(0)
            with pytest.raises(InventoryError, match="no more"):
                await inventory.stock.restock([Line("a", 1)], operation_id="one")
    assert controller.story[-1] == "closed"
