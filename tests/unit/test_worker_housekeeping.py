"""Once a second: holds expire, overdue pins are decided, windows turn, the journal is trimmed; credits left behind are made."""

from __future__ import annotations

import pytest
from worker_fakes import Shop, open_shop, until

from inventory_sdk.ledger.protocol import Credit, ReservationRow
from inventory_sdk.model import Position


@pytest.fixture
async def shop() -> Shop:
    return await open_shop()


async def test_due_holds_expire_and_are_told_one_by_one(shop: Shop) -> None:
    shop.redis.due = [f"m\x1fr{number}" for number in range(1200)]
    async with shop.worker():
        await until(lambda: len(shop.facts.told) == 1200)
    assert shop.redis.due == []
    assert [facts["reservation"] for name, facts in shop.facts.told if name == "expired"] == [f"r{n}" for n in range(1200)]


async def test_an_overdue_pin_is_aborted_where_its_decider_said_nothing_and_kept_where_it_committed(shop: Shop) -> None:
    shop.redis.pinned = ["m\x1fsilent", "m\x1fcommitted"]
    shop.ledger.verdicts["m\x1fcommitted"] = "committed"
    async with shop.worker():
        await until(lambda: len(shop.redis.settled) == 2)
    assert shop.redis.settled == [("m\x1fsilent", "aborted"), ("m\x1fcommitted", "committed")]
    assert shop.ledger.verdicts["m\x1fsilent"] == "aborted", "written in the ledger before Redis acts on it"


async def test_windows_turn_and_the_journal_is_trimmed_up_to_the_watermark(shop: Shop) -> None:
    shop.redis.write(1), shop.redis.write(2)
    async with shop.worker():
        await until(lambda: 2 in shop.redis.trimmed and "rotate" in shop.redis.calls)
    assert max(shop.redis.trimmed) == 2


async def test_a_partition_that_is_being_recovered_is_left_alone(shop: Shop) -> None:
    shop.redis.due = ["m\x1fr"]
    shop.redis.state = "frozen"
    worker = shop.worker(take_over=60)
    for _ in range(3):
        await worker._rooms[0][3].tidy()
    assert shop.redis.due == ["m\x1fr"]
    assert shop.redis.trimmed == []


async def test_a_stale_hold_is_told_once(shop: Shop) -> None:
    shop.ledger.stale = [ReservationRow("m\x1fr1", "held", "f", Position(0, 1, 1), "order-1", 0, False, ("m\x1fa", 1, 1, 0, 0))]
    async with shop.worker():
        await until(lambda: shop.facts.told)
        rounds = len(shop.redis.trimmed)
        await until(lambda: len(shop.redis.trimmed) > rounds + 3)
    assert [(name, facts["reservation"], facts["order"]) for name, facts in shop.facts.told] == [("stale", "r1", "order-1")]
    assert shop.facts.names() == ["stale"]


async def test_a_credit_that_its_caller_left_behind_is_made_after_a_while_and_once(shop: Shop) -> None:
    shop.ledger.credits = [Credit(Position(0, 0, 7), 1, "m\x1fpo-7", ("m\x1fa", 5))]
    worker = shop.worker(credit_grace=60)
    corrections = worker._rooms[0][2]
    assert await corrections.send() == 0, "its caller may be about to make it"
    corrections._grace = 0
    assert await corrections.send() == 1
    assert await corrections.send() == 0
    assert shop.redis.credited == shop.ledger.credits


async def test_a_credit_of_another_epoch_is_left_to_the_rebuild(shop: Shop) -> None:
    shop.ledger.credits = [Credit(Position(0, 0, 7), 1, "m\x1fpo-7", ("m\x1fa", 5))]
    shop.redis.epoch = 2
    worker = shop.worker(credit_grace=0)
    assert await worker._rooms[0][2].send() == 0
    assert shop.redis.credited == []
