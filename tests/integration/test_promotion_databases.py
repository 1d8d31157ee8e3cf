"""SKUs go to Redis and back one by one on PostgreSQL and MariaDB: their locks, their clocks, their order of rows."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from inventory_sdk.ledger.schema import tables
from tests.unit.test_promotion import (
    Two,
    opened,
    test_a_cart_with_a_hot_and_a_cold_sku_brings_the_cold_one_along,
    test_a_first_receipt_stays_what_it_was_wherever_the_sku_is_sold,
    test_an_id_that_was_undone_at_the_database_is_free_when_the_sku_is_in_redis_again,
    test_sets_that_overlap_arrive_side_by_side_and_holds_on_what_sells_already_are_left_alone,
    test_what_live_reservations_join_moves_together_and_waits_for_what_is_hot,
)

DATABASES = [
    pytest.param("postgresql", marks=pytest.mark.postgresql),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]


@pytest.fixture(params=DATABASES)
async def shop(request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Two]:
    url = request.getfixturevalue(f"{request.param}_url")
    try:
        async with opened(Two(url, f"{namespace}_")) as two:
            yield two
    finally:
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(tables(f"{namespace}_").metadata.drop_all)
        await engine.dispose()


__all__ = [  # the imported tests run here, with this file's shop
    "test_a_cart_with_a_hot_and_a_cold_sku_brings_the_cold_one_along",
    "test_a_first_receipt_stays_what_it_was_wherever_the_sku_is_sold",
    "test_an_id_that_was_undone_at_the_database_is_free_when_the_sku_is_in_redis_again",
    "test_sets_that_overlap_arrive_side_by_side_and_holds_on_what_sells_already_are_left_alone",
    "test_what_live_reservations_join_moves_together_and_waits_for_what_is_hot",
]
