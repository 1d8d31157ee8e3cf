"""A function that gets a receipt, tested without any inventory: pytest examples/test_factories.py"""

from inventory_sdk import Receipt
from inventory_sdk.testing import factories


def slip(receipt: Receipt) -> str:
    return ", ".join(f"{line.quantity} × {line.sku}" for line in receipt.lines)


def test_a_slip_lists_what_was_taken() -> None:
    assert slip(factories.receipt({"tee": 1, "mug": 2})) == "2 × mug, 1 × tee"
