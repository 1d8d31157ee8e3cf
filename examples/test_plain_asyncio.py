"""Tests of plain_asyncio.py: pytest examples/test_plain_asyncio.py (pytest-asyncio, asyncio_mode = "auto")."""

from collections.abc import AsyncIterator

import pytest
from plain_asyncio import book, inventory, pay

from inventory_sdk import ReservationNotFound
from inventory_sdk.testing import faults


@pytest.fixture(autouse=True)
async def stocked() -> AsyncIterator[None]:
    async with inventory.replaced(stock={"default": {"concert": 3}}):
        yield


async def test_a_booking_holds_its_tickets() -> None:
    assert await book("o1", "concert", 2) == "o1: 2 × concert, 1 left"
    level = await inventory.stock.level("concert")
    assert (level.available, level.reserved) == (1, 2)


async def test_what_is_sold_out_is_refused_in_the_words_of_the_shop() -> None:
    with pytest.raises(LookupError, match="4 asked, 3 available"):
        await book("o1", "concert", 4)


async def test_only_what_was_booked_is_paid() -> None:
    with pytest.raises(ReservationNotFound):
        await pay("o1")


async def test_a_lost_reply_books_once() -> None:
    with faults.reply_lost(inventory) as fault:
        await book("o1", "concert", 2)
    assert fault.met == 1
    assert (await inventory.stock.level("concert")).available == 1


async def test_the_ledger_has_every_unit() -> None:
    await book("o1", "concert", 2)
    await pay("o1")
    await inventory.settled()
    (row,) = await inventory.ledger.all_stock()
    assert (row.available, row.reserved, row.sold, row.supplied) == (1, 0, 2, 3)
    assert await inventory.ledger.verify() == []
