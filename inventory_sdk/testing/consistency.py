"""One assertion at the end of a test: Redis and the ledger agree on every unit, and the ledger's books add up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inventory_sdk.model import key_of
from inventory_sdk.testing.proof import Expected, prove

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory


async def assert_consistent(inventory: Inventory, *, timeout: float = 60.0) -> None:
    """Wait until the ledger has applied all that was accepted, at most ``timeout`` seconds, then compare it with Redis for every SKU
    that it knows, and check its own books. ``AssertionError`` says what differs, line by line."""
    __tracebackhide__ = True
    rows = await inventory.ledger.all_stock()
    proof = await prove(inventory, {key_of(row.merchant, row.sku): Expected() for row in rows}, timeout)
    if proof.differences:
        raise AssertionError("the inventory is not consistent:\n" + "\n".join(f"  {difference}" for difference in proof.differences))
