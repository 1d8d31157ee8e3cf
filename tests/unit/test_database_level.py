"""Durability ``database``: the ledger has this very operation, and not only its position."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from inventory_sdk import DurabilityNotReached, Inventory, Line, OperationConflict
from inventory_sdk.ledger.protocol import OperationRow
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.model import Position


async def test_a_position_that_the_ledger_gave_to_another_entry_is_no_acknowledgement(monkeypatch: pytest.MonkeyPatch) -> None:
    inventory = Inventory("memory://", metrics=[NoMetrics()])
    async with inventory:
        await inventory.stock.restock([Line("a", 3)], operation_id="po-1")

        async def others(positions: Sequence[Position]) -> list[OperationRow]:
            return []

        monkeypatch.setattr(inventory.ledger, "operations_at", others)
        with pytest.raises(DurabilityNotReached, match="another entry"):
            await inventory.stock.deduct([Line("a", 1)], operation_id="o1", durability="database")
        monkeypatch.undo()
        assert (await inventory.stock.deduct([Line("a", 1)], operation_id="o1", durability="database")).replayed


async def test_an_id_that_redis_has_forgotten_is_not_good_for_other_content() -> None:
    inventory = Inventory("memory://", metrics=[NoMetrics()])
    async with inventory:
        await inventory.stock.restock([Line("a", 5), Line("b", 5)], operation_id="po-1")
        await inventory.stock.deduct([Line("a", 1)], operation_id="o1", durability="database")
        running = inventory._ready()
        partition = running.engine.partitions[0]
        await running.client.delete(partition.key("results:0"), partition.key("results:1"))
        with pytest.raises(OperationConflict):
            await inventory.stock.deduct([Line("b", 2)], operation_id="o1", durability="database")
        await inventory.settled()
        assert [(row.sku, row.available) for row in await inventory.ledger.all_stock()] == [("a", 4), ("b", 5)]
