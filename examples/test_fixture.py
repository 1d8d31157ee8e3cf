"""Tests of plain_asyncio.py with the pytest plugin: pytest examples/test_fixture.py"""

import pytest
from plain_asyncio import book, pay

from inventory_sdk import Inventory, ReservationExpired
from inventory_sdk.testing import advance, assert_consistent

pytestmark = [
    pytest.mark.asyncio,
    pytest.mark.inventory("plain_asyncio:inventory", stock={"default": {"concert": 3}}),
]


async def test_what_is_not_paid_in_time_is_for_sale_again(embedded_inventory: Inventory) -> None:
    await book("o1", "concert", 2)
    await advance(embedded_inventory, 901)
    assert (await embedded_inventory.stock.level("concert")).available == 3
    with pytest.raises(ReservationExpired):
        await pay("o1")


async def test_not_a_ticket_is_lost(embedded_inventory: Inventory) -> None:
    await book("o1", "concert", 2)
    await pay("o1")
    await book("o2", "concert", 1)
    await assert_consistent(embedded_inventory)
