"""Durability ``database``: the ledger has this very operation, and not only its position."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from inventory_sdk import DurabilityNotReached, Inventory, Line
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
