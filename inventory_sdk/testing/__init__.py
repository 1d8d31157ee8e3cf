"""For tests of your own: the fixture ``embedded_inventory`` (a pytest plugin), faults to order, time that passes, and proofs."""

from inventory_sdk.testing.clock import advance
from inventory_sdk.testing.consistency import assert_consistent

__all__ = ["advance", "assert_consistent"]
