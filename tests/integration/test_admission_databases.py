"""What the public sees of stock that the database sells, on PostgreSQL and MariaDB: row locks, their clocks, their updates."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from inventory_sdk import errors
from tests.direct_kit import DirectShop, direct_shop
from tests.stock_kit import lines
from tests.unit.test_stock_holds import (
    test_a_hold_is_reserved_until_it_is_confirmed_or_released,
    test_an_id_used_for_a_close_can_not_be_used_for_another,
    test_reacquire_takes_only_what_expired,
)
from tests.unit.test_stock_takes import (
    test_exactly_what_is_there_can_be_taken,
    test_lines_of_several_merchants_move_together_or_not_at_all,
    test_one_short_line_stops_all_lines_and_every_short_line_is_named,
    test_retry_after_success_on_the_last_unit_answers_the_first_receipt,
)
from tests.unit.test_stock_undo import test_an_undo_gives_back_exactly_that_take_and_frees_its_id

DATABASES = [
    pytest.param("postgresql", marks=pytest.mark.postgresql),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]


@pytest.fixture(params=DATABASES)
async def shop(request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[DirectShop]:
    url = request.getfixturevalue(f"{request.param}_url")
    async with direct_shop(url, namespace, {"a": 10, "b": 5, "last": 1}) as shop:
        yield shop


async def test_many_at_once_never_sell_more_than_there_is(shop: DirectShop) -> None:
    async def buy(number: int) -> bool:
        try:
            await shop.stock.deduct(lines(a=1), operation_id=f"d{number}")
        except errors.InsufficientStock:
            return False
        return True

    assert sum(await asyncio.gather(*(buy(number) for number in range(25)))) == 10
    assert (await shop.stock.level("a")).available == 0


__all__ = [  # the imported tests run here, with this file's shop
    "test_a_hold_is_reserved_until_it_is_confirmed_or_released",
    "test_an_id_used_for_a_close_can_not_be_used_for_another",
    "test_an_undo_gives_back_exactly_that_take_and_frees_its_id",
    "test_exactly_what_is_there_can_be_taken",
    "test_lines_of_several_merchants_move_together_or_not_at_all",
    "test_one_short_line_stops_all_lines_and_every_short_line_is_named",
    "test_reacquire_takes_only_what_expired",
    "test_retry_after_success_on_the_last_unit_answers_the_first_receipt",
]
