"""How far the ledger is behind: entries, operations and seconds, also while the follower gets nowhere."""

from __future__ import annotations

from dataclasses import replace

from inventory_sdk.metrics import Behind, PartitionOpen
from inventory_sdk.stock.journal import encode
from inventory_sdk.sync.depth import COUNTED
from tests.worker_fakes import Shop, body, open_shop, until

NOW = 1_700_000_000_000
"""What the fake Redis' clock says."""


def of(shop: Shop) -> list[Behind]:
    return [event for event in shop.facts.events if isinstance(event, Behind)]


def old(sequence: int, milliseconds: int) -> str:
    return encode(f"n{sequence}", NOW - milliseconds, [["deduct", f"m\x1fo{sequence}", "f", ["m\x1fsku", 1], [9], "", "", 0, ""]])


async def test_a_ledger_that_takes_nothing_falls_behind_by_what_stands_in_the_journal() -> None:
    shop = await open_shop()
    shop.redis.write(1, old(1, 2500))
    shop.redis.write(2, body(2, operations=4))
    depth = shop.worker()._depth
    assert await depth.look(0) == Behind(0, 2, 5, 2.5, 2)


async def test_a_ledger_that_has_all_is_not_behind_and_the_journal_keeps_what_is_applied() -> None:
    shop = await open_shop()
    for sequence in (1, 2, 3):
        shop.redis.write(sequence)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 3)
    assert await shop.worker()._depth.look(0) == Behind(0, 0, 0, 0.0, 3)


async def test_of_a_long_line_the_operations_are_counted_by_their_average() -> None:
    shop = await open_shop()
    for sequence in range(1, 2 * COUNTED + 1):
        shop.redis.write(sequence, body(sequence, operations=3))
    found = await shop.worker()._depth.look(0)
    assert found is not None
    assert (found.entries, found.operations) == (2 * COUNTED, 6 * COUNTED)


async def test_a_worker_reports_it_and_goes_on_when_redis_was_away() -> None:
    shop = await open_shop()
    shop.redis.down = ConnectionError("away")
    async with shop.worker():
        await until(lambda: "depth" in shop.facts.retried())
        assert not of(shop)
        shop.redis.down = None
        await until(lambda: of(shop))


async def test_an_entry_that_nobody_can_read_is_counted_all_the_same() -> None:
    shop = await open_shop()
    shop.redis.write(1, "{")
    found = await shop.worker()._depth.look(0)
    assert found == Behind(0, 1, 0, 0.0, 1)


async def test_while_a_partition_is_being_recovered_nothing_is_said() -> None:
    shop = await open_shop()
    shop.redis.write(1)
    shop.redis.epoch = 2
    assert await shop.worker()._depth.look(0) is None


def last_said(shop: Shop) -> bool | None:
    said = [event.open for event in shop.facts.events if isinstance(event, PartitionOpen)]
    return said[-1] if said else None


async def test_it_is_said_whether_a_partition_sells_also_while_nobody_recovers_it() -> None:
    shop = await open_shop()
    depth = shop.worker()._depth
    await depth.look(0)
    assert last_said(shop) is True
    for state in ("frozen", "rebuilding", "suspect"):
        shop.redis.state = state
        await depth.look(0)
        assert last_said(shop) is False
        shop.redis.state = "open"
        await depth.look(0)
        assert last_said(shop) is True
    shop.redis.empty()
    await depth.look(0)
    assert last_said(shop) is False


async def test_of_a_partition_that_was_never_started_nothing_is_said() -> None:
    shop = Shop()
    await shop.worker()._depth.look(0)
    assert last_said(shop) is None


async def test_a_ledger_that_is_rebuilding_does_not_sell_whatever_redis_says() -> None:
    shop = await open_shop()
    row = shop.ledger.rows[0][1]
    shop.ledger.rows[0][1] = replace(row, state="rebuilding")
    await shop.worker()._depth.look(0)
    assert last_said(shop) is False
