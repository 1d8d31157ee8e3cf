"""The two results windows, and the trimming of the journal."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from inventory_sdk import errors
from inventory_sdk.ledger.protocol import OperationRow, ReservationRow
from inventory_sdk.model import Position, fingerprint, key_of
from tests.stock_kit import MERCHANT, SERVERS, Shop, lines, shop_on


@pytest.fixture(params=SERVERS)
async def shop(request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Shop]:
    """Windows of no length: every ``rotate`` turns them."""
    async with shop_on(request.param, namespace, {"a": 10, "b": 5}, results_window=0.0) as shop:
        yield shop


async def turn(shop: Shop, times: int = 1) -> None:
    for _ in range(times):
        before = await shop.client.hget(shop.key("meta"), "window")
        await shop.engine.upkeep.rotate(0)
        assert await shop.client.hget(shop.key("meta"), "window") != before


async def test_a_result_is_remembered_through_one_turn_and_forgotten_after_two(shop: Shop) -> None:
    first = await shop.stock.deduct(lines(a=1), operation_id="o1")
    await turn(shop)
    assert await shop.stock.deduct(lines(a=1), operation_id="o1") == replace(first, replayed=True)
    with pytest.raises(errors.OperationConflict):
        await shop.stock.deduct(lines(a=2), operation_id="o1")
    await turn(shop)
    assert not (await shop.stock.deduct(lines(a=1), operation_id="o1")).replayed
    assert (await shop.counters("a"))[0] == 8


async def test_after_two_turns_nothing_of_the_results_is_left_in_redis(shop: Shop) -> None:
    for n in range(5):
        await shop.stock.deduct(lines(a=1), operation_id=f"o{n}")
    await shop.stock.reserve(lines(a=1), operation_id="r1")
    await shop.stock.release("r1")
    await turn(shop, 2)
    assert await shop.client.exists(shop.key("results:0"), shop.key("results:1")) == 0


@pytest.mark.parametrize("turns", [0, 1])
async def test_an_undo_forgets_a_result_in_either_window(shop: Shop, turns: int) -> None:
    receipt = await shop.stock.deduct(lines(a=1), operation_id="o1")
    await turn(shop, turns)
    assert await shop.stock.undo(receipt)
    again = await shop.stock.deduct(lines(a=2), operation_id="o1")
    assert not again.replayed
    assert await shop.stock.undo(again)
    await turn(shop)
    assert not (await shop.stock.deduct(lines(a=3), operation_id="o1")).replayed
    assert await shop.counters("a") == (7, 0)


async def test_an_undo_and_a_new_take_of_the_id_in_one_batch_leave_the_new_one(shop: Shop) -> None:
    receipt = await shop.stock.deduct(lines(a=1), operation_id="o1")
    await turn(shop)
    undone, again = await asyncio.gather(shop.stock.undo(receipt), shop.stock.deduct(lines(a=2), operation_id="o1"))
    assert (undone, again.replayed) == (True, False)
    assert await shop.stock.deduct(lines(a=2), operation_id="o1") == replace(again, replayed=True)
    await turn(shop)
    assert await shop.stock.deduct(lines(a=2), operation_id="o1") == replace(again, replayed=True)


async def test_a_held_reservation_repeated_after_the_window_answers_from_the_reservations(shop: Shop) -> None:
    first = await shop.stock.reserve(lines(a=4), operation_id="r1", order="77")
    await turn(shop, 2)
    before = await shop.snapshot()
    again = await shop.stock.reserve(lines(a=4), operation_id="r1")
    assert (again.replayed, again.positions, again.order) == (True, first.positions, "77")
    with pytest.raises(errors.OperationConflict):
        await shop.stock.reserve(lines(a=3), operation_id="r1")
    assert await shop.snapshot() == before


async def test_what_remained_then_is_asked_of_the_ledger_after_the_window(shop: Shop) -> None:
    first = await shop.stock.reserve(lines(a=4), operation_id="r1", order="77")
    shop.ledger.apply(await shop.journal())
    await turn(shop, 2)
    assert await shop.stock.reserve(lines(a=4), operation_id="r1") == replace(first, replayed=True)


async def test_a_hold_older_than_the_window_can_still_be_kept(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1")
    await turn(shop, 2)
    receipt = await shop.stock.reserve(lines(a=4), operation_id="r1")
    assert await shop.stock.keep(receipt), "it stands, so the answer must not be that it was undone"
    assert not await shop.stock.undo(receipt)
    assert await shop.counters("a") == (6, 4)


async def test_a_kept_hold_stays_kept_when_its_result_is_forgotten(shop: Shop) -> None:
    receipt = await shop.stock.reserve(lines(a=4), operation_id="r1")
    assert await shop.stock.keep(receipt)
    await turn(shop, 2)
    assert not await shop.stock.undo(receipt)
    assert await shop.counters("a") == (6, 4)


async def test_a_hold_can_be_closed_however_old_it_is(shop: Shop) -> None:
    for name in ("r1", "r2", "r3"):
        await shop.stock.reserve(lines(a=2, b=1), operation_id=name)
    await turn(shop, 2)
    await shop.stock.confirm("r1")
    await shop.stock.release("r2", lines=lines(a=1), operation_id="p")
    await shop.expire("r3")
    assert await shop.counters("a") == (7, 1)


async def test_a_closed_reservation_answers_from_redis_for_a_window_and_then_from_the_ledger(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=2), operation_id="r1")
    await shop.stock.release("r1")
    await turn(shop)
    with pytest.raises(errors.ReservationClosed):
        await shop.stock.reserve(lines(a=2), operation_id="r1")
    with pytest.raises(errors.ReservationClosed):
        await shop.stock.confirm("r1")
    await turn(shop)
    key = key_of(MERCHANT, "r1")
    shop.ledger.holds[key] = ReservationRow(key, "released", "f", Position(0, 1, 1), "", 0, False, (key_of(MERCHANT, "a"), 2, 0, 0, 2))
    with pytest.raises(errors.ReservationClosed) as caught:
        await shop.stock.confirm("r1")
    assert caught.value.state == "released"
    found = await shop.stock.reservation("r1")
    assert found is not None
    assert found.state == "released"


async def test_a_tombstone_lasts_as_long_as_a_result(shop: Shop) -> None:
    with pytest.raises(errors.ReservationNotFound):
        await shop.stock.release("late")
    await turn(shop)
    with pytest.raises(errors.ReservationClosed):
        await shop.stock.reserve(lines(a=1), operation_id="late")


async def test_status_asks_redis_then_the_ledger(shop: Shop) -> None:
    first = await shop.stock.deduct(lines(a=1), operation_id="o1", order="77")
    await turn(shop)
    assert await shop.stock.status("o1") == replace(first, replayed=True)
    shop.ledger.apply(await shop.journal())
    await turn(shop)
    assert await shop.stock.status("o1") == replace(first, replayed=True)
    shop.ledger.operations.clear()
    assert await shop.stock.status("o1") is None


async def test_status_asks_the_ledger_when_the_journal_is_trimmed(shop: Shop) -> None:
    first = await shop.stock.deduct(lines(a=1), operation_id="o1")
    await shop.client.xtrim(shop.key("journal"), maxlen=0, approximate=False)
    assert await shop.stock.status("o1") is None
    key, flat = key_of(MERCHANT, "o1"), (key_of(MERCHANT, "a"), 1)
    shop.ledger.operations[key] = OperationRow(
        first.positions[0], 0, key, "deduct", fingerprint("deduct", "", flat), "", "", flat, (9,), "applied", False, 1
    )
    assert await shop.stock.status("o1") == replace(first, replayed=True)


async def test_windows_turn_by_age_or_by_count(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {"a": 10}, results_window=3600, results_most=3) as shop:
        for n in range(2):
            await shop.stock.deduct(lines(a=1), operation_id=f"o{n}")
            await shop.engine.upkeep.rotate(0)
        assert await shop.client.hget(shop.key("meta"), "window") == b"0"
        await shop.stock.deduct(lines(a=1), operation_id="o2")
        await shop.engine.upkeep.rotate(0)
        assert await shop.client.hget(shop.key("meta"), "window") == b"1"
        await shop.client.hset(shop.key("meta"), "rotated", 0)
        await shop.engine.upkeep.rotate(0)
        assert await shop.client.hget(shop.key("meta"), "window") == b"0"


# Trimming --------------------------------------------------------------------------------------------------------------------


async def aged(shop: Shop, seconds: list[int]) -> None:
    """Journal entries of these ages."""
    now = (await shop.engine.upkeep.journal_state(0)).now_ms
    for n in range(len(seconds)):
        await shop.stock.deduct(lines(a=1), operation_id=f"o{n}")
    bodies = await shop.engine.upkeep.read_journal(0, 1, 0, None, 100)
    entries = await shop.journal()
    await shop.client.delete(shop.key("journal"))
    for (sequence, body), entry, age in zip(bodies, entries, seconds, strict=True):
        old = body.replace(f'"t":{entry.at_ms}', f'"t":{now - age * 1000}')
        await shop.client.xadd(shop.key("journal"), {"b": old}, id=f"1-{sequence}")


async def kept(shop: Shop) -> list[int]:
    return [entry.sequence for entry in await shop.journal()]


@pytest.mark.parametrize(
    ("applied", "left"),
    [(0, [1, 2, 3, 4, 5, 6]), (2, [3, 4, 5, 6]), (4, [5, 6]), (5, [5, 6]), (6, [5, 6]), (100, [5, 6])],
)
async def test_only_applied_entries_older_than_ten_minutes_are_trimmed(shop: Shop, applied: int, left: list[int]) -> None:
    await aged(shop, [3000, 2000, 1000, 601, 500, 0])
    await shop.engine.upkeep.trim(0, 1, applied)
    assert await kept(shop) == left
    await shop.engine.upkeep.trim(0, 1, applied)
    assert await kept(shop) == left


async def test_how_long_applied_entries_stay_is_one_setting(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(4):
        await shop.stock.deduct(lines(a=1), operation_id=f"o{n}")
    await shop.engine.upkeep.trim(0, 1, 4)
    assert await kept(shop) == [1, 2, 3, 4]
    monkeypatch.setattr("inventory_sdk.stock.upkeep.KEEP_APPLIED_MS", 0)
    await shop.engine.upkeep.trim(0, 1, 3)
    assert await kept(shop) == [4]
    await shop.stock.deduct(lines(a=1), operation_id="next")
    assert await kept(shop) == [4, 5]
    state = await shop.engine.upkeep.journal_state(0)
    assert (state.sequence, state.oldest_kept_sequence) == (5, 4)


async def test_trimming_all_entries_leaves_the_sequence_where_it_was(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.stock.upkeep.KEEP_APPLIED_MS", 0)
    await shop.stock.deduct(lines(a=1))
    await shop.engine.upkeep.trim(0, 1, 1)
    state = await shop.engine.upkeep.journal_state(0)
    assert (state.sequence, state.oldest_kept_sequence) == (1, None)
    await shop.stock.deduct(lines(a=1))
    assert await kept(shop) == [2]


async def test_another_epoch_trims_and_turns_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.stock.upkeep.KEEP_APPLIED_MS", 0)
    await shop.stock.deduct(lines(a=1), operation_id="o1")
    before = await shop.snapshot()
    await shop.engine.upkeep.trim(0, 2, 100)
    assert await shop.snapshot() == before


async def test_entries_of_an_epoch_that_is_over_stay_until_newer_ones_are_trimmed(shop: Shop) -> None:
    await shop.stock.deduct(lines(a=1))
    shop.ledger.apply(await shop.journal())
    await shop.open(epoch=2)
    await shop.stock.deduct(lines(a=1))
    await shop.engine.upkeep.trim(0, 2, 1)
    assert len(await shop.journal(epoch=1)) == 1
