"""Reservations: every state, every end, in every order (design §3, States)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from itertools import permutations

import pytest

from inventory_sdk import errors
from inventory_sdk.ledger.protocol import OperationRow, ReservationRow
from inventory_sdk.model import Line, Position, fingerprint, key_of
from inventory_sdk.stock.upkeep import PIN_OVERDUE_MS
from tests.stock_kit import MERCHANT, SERVERS, Shop, lines, shop_on


@pytest.fixture(params=SERVERS)
async def shop(request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Shop]:
    async with shop_on(request.param, namespace, {"a": 10, "b": 5}) as shop:
        yield shop


def flat(held: tuple[Line, ...]) -> dict[str, int]:
    return {line.sku: line.quantity for line in held}


async def seen(shop: Shop, name: str) -> tuple[str, dict[str, int], dict[str, int], dict[str, int]]:
    found = await shop.stock.reservation(name)
    assert found is not None
    return found.state, flat(found.held), flat(found.confirmed), flat(found.released)


async def test_a_hold_is_reserved_until_it_is_confirmed_or_released(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=3), operation_id="r1", order="77")
    await shop.stock.reserve(lines(a=2, b=2), operation_id="r2")
    assert await shop.counters("a") == (5, 5)
    sold = await shop.stock.confirm("r1")
    assert (sold.kind, [(line.sku, line.quantity, line.remaining) for line in sold.lines]) == ("confirm", [("a", 3, 5)])
    assert await shop.counters("a") == (5, 2)
    back = await shop.stock.release("r2")
    assert [(line.sku, line.quantity, line.remaining) for line in back.lines] == [("a", 2, 7), ("b", 2, 5)]
    assert (await shop.counters("a"), await shop.counters("b")) == ((7, 0), (5, 0))
    assert await seen(shop, "r1") == ("confirmed", {}, {"a": 3}, {})
    assert await seen(shop, "r2") == ("released", {}, {}, {"a": 2, "b": 2})


PARTS = [("confirm", {"a": 1}), ("release", {"a": 1, "b": 1}), ("confirm", {"b": 1}), ("release", {"a": 2})]


@pytest.mark.parametrize("parts", list(permutations(PARTS)), ids=lambda parts: "-".join(f"{how[0]}{sum(q.values())}" for how, q in parts))
async def test_parts_close_a_hold_in_any_order_and_each_counts_once(shop: Shop, parts: list[tuple[str, dict[str, int]]]) -> None:
    await shop.stock.reserve(lines(a=4, b=2), operation_id="r1")
    for n, (how, wanted) in enumerate(parts):
        close = getattr(shop.stock, how)
        first = await close("r1", lines=lines(**wanted), operation_id=f"p{n}")
        assert await close("r1", lines=lines(**wanted), operation_id=f"p{n}") == replace(first, replayed=True)
        state = await seen(shop, "r1")
        assert state[0] == ("held" if n < 3 else {"confirm": "confirmed", "release": "released"}[how])
    assert state[1:] == ({}, {"a": 1, "b": 1}, {"a": 3, "b": 1})
    assert (await shop.counters("a"), await shop.counters("b")) == ((9, 0), (4, 0))


@pytest.mark.parametrize("how", ["confirm", "release"])
async def test_the_rest_after_a_part_is_all_that_is_still_open(shop: Shop, how: str) -> None:
    await shop.stock.reserve(lines(a=4, b=2), operation_id="r1")
    await shop.stock.confirm("r1", lines=lines(a=1, b=2), operation_id="s1")
    rest = await getattr(shop.stock, how)("r1")
    assert [(line.sku, line.quantity) for line in rest.lines] == [("a", 3)]
    assert await getattr(shop.stock, how)("r1") == replace(rest, replayed=True)
    assert await shop.counters("a") == ((6, 0) if how == "confirm" else (9, 0))


async def test_a_full_close_under_an_id_of_ones_own_is_remembered_under_it(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1")
    first = await shop.stock.confirm("r1", operation_id="c1")
    assert await shop.stock.confirm("r1", operation_id="c1") == replace(first, replayed=True)
    with pytest.raises(errors.ReservationClosed) as caught:
        await shop.stock.confirm("r1", operation_id="c2")
    assert caught.value.state == "confirmed"


async def test_an_id_used_for_a_close_can_not_be_used_for_another(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.reserve(lines(a=4), operation_id="r2")
    await shop.stock.confirm("r1", lines=lines(a=1), operation_id="c1")
    before = await shop.snapshot()
    for act in (
        shop.stock.confirm("r1", lines=lines(a=2), operation_id="c1"),
        shop.stock.confirm("r2", lines=lines(a=1), operation_id="c1"),
        shop.stock.confirm("r1", operation_id="c1"),
        shop.stock.release("r1", lines=lines(a=1), operation_id="c1"),
        shop.stock.deduct(lines(a=1), operation_id="c1"),
        shop.stock.reserve(lines(a=1), operation_id="c1"),
        shop.stock.confirm("r1", lines=lines(a=1), operation_id="r1"),
    ):
        with pytest.raises(errors.OperationConflict):
            await act
    assert await shop.snapshot() == before


# States ----------------------------------------------------------------------------------------------------------------------


async def test_a_repeat_of_a_held_reservation_answers_its_receipt(shop: Shop) -> None:
    first = await shop.stock.reserve(lines(a=4, b=1), operation_id="r1", order="77")
    assert await shop.stock.reserve(lines(a=4, b=1), operation_id="r1") == replace(first, replayed=True)
    await shop.stock.confirm("r1", lines=lines(a=1), operation_id="c1")
    assert await shop.stock.reserve(lines(a=4, b=1), operation_id="r1") == replace(first, replayed=True)


async def test_a_repeat_of_a_confirmed_reservation_answers_its_receipt(shop: Shop) -> None:
    first = await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.confirm("r1")
    assert await shop.stock.reserve(lines(a=4), operation_id="r1") == replace(first, replayed=True)


@pytest.mark.parametrize("end", ["released", "expired"])
async def test_a_repeat_of_a_released_or_expired_reservation_is_closed_and_takes_nothing(shop: Shop, end: str) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1")
    await (shop.stock.release("r1") if end == "released" else shop.expire("r1"))
    before = await shop.snapshot()
    with pytest.raises(errors.ReservationClosed) as caught:
        await shop.stock.reserve(lines(a=4), operation_id="r1")
    assert caught.value.state == end
    with pytest.raises(errors.OperationConflict):
        await shop.stock.reserve(lines(a=3), operation_id="r1")
    assert await shop.snapshot() == before


@pytest.mark.parametrize("end", ["confirm", "release", "expire"])
async def test_a_closed_reservation_can_be_changed_in_no_way(shop: Shop, end: str) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1")
    await (shop.expire("r1") if end == "expire" else getattr(shop.stock, end)("r1", operation_id="end"))
    before = await shop.snapshot()
    state = {"confirm": "confirmed", "release": "released", "expire": "expired"}[end]
    kind = errors.ReservationExpired if end == "expire" else errors.ReservationClosed
    for act in (
        shop.stock.confirm("r1"),
        shop.stock.release("r1"),
        shop.stock.confirm("r1", lines=lines(a=1), operation_id="x"),
        shop.stock.release("r1", lines=lines(a=1), operation_id="y"),
        shop.stock.extend("r1", ttl=60),
    ):
        with pytest.raises(errors.ReservationClosed) as caught:
            await act
        assert (type(caught.value), caught.value.state, caught.value.reservation) == (kind, state, "r1")
    assert await shop.snapshot() == before


async def test_nothing_can_be_done_to_an_unknown_reservation(shop: Shop) -> None:
    before = await shop.snapshot()
    for act in (
        shop.stock.confirm("nope"),
        shop.stock.confirm("nope", reacquire=True),
        shop.stock.confirm("nope", lines=lines(a=1), operation_id="x"),
        shop.stock.release("nope", lines=lines(a=1), operation_id="y"),
        shop.stock.extend("nope", ttl=60),
    ):
        with pytest.raises(errors.ReservationNotFound) as caught:
            await act
        assert (caught.value.reservation, caught.value.merchant) == ("nope", MERCHANT)
    assert await shop.stock.reservation("nope") is None
    assert await shop.snapshot() == before


async def test_a_full_release_of_an_unknown_reservation_lets_a_late_reserve_take_nothing(shop: Shop) -> None:
    with pytest.raises(errors.ReservationNotFound):
        await shop.stock.release("late")
    tombstone = (await shop.journal())[-1].operations[0]
    assert (tombstone.kind, tombstone.reference, tombstone.lines) == ("tombstone", key_of(MERCHANT, "late"), [])
    assert await seen(shop, "late") == ("released", {}, {}, {})
    with pytest.raises(errors.ReservationClosed) as caught:
        await shop.stock.reserve(lines(a=1), operation_id="late")
    assert caught.value.state == "released"
    assert await shop.counters("a") == (10, 0)


async def test_a_partial_release_of_an_unknown_reservation_leaves_no_tombstone(shop: Shop) -> None:
    with pytest.raises(errors.ReservationNotFound):
        await shop.stock.release("late", lines=lines(a=1))
    await shop.stock.reserve(lines(a=1), operation_id="late")
    assert await shop.counters("a") == (9, 1)


async def test_a_release_that_was_taken_up_again_answers_its_lines_to_who_repeats_it(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=3, b=1), operation_id="r1")
    await shop.stock.release("r1", operation_id="x1")
    late = (await shop.journal())[-1].operations[0]
    await shop.open(epoch=2)
    await shop.stock.reserve(lines(a=3, b=1), operation_id="r1")
    assert await shop.engine.upkeep.resubmit(0, 2, late, 0) == ""
    again = await shop.stock.release("r1", operation_id="x1")
    assert again.replayed
    assert [(line.sku, line.quantity, line.remaining) for line in again.lines] == [("a", 3, 10), ("b", 1, 5)]


async def test_a_release_that_meets_its_reserve_in_one_batch_releases_it(shop: Shop) -> None:
    reserved, released = await asyncio.gather(shop.stock.reserve(lines(a=1), operation_id="r1"), shop.stock.release("r1"))
    assert (reserved.kind, released.kind) == ("reserve", "release")
    assert reserved.positions == released.positions
    assert await shop.counters("a") == (10, 0)


async def test_reserve_and_confirm_of_it_in_one_batch_sell(shop: Shop) -> None:
    reserved, confirmed = await asyncio.gather(shop.stock.reserve(lines(a=1), operation_id="r1"), shop.stock.confirm("r1"))
    assert len(shop.metrics.batches()) == 1
    assert reserved.positions == confirmed.positions
    assert await shop.counters("a") == (9, 0)
    assert await shop.client.zcard(shop.key("expiry")) == 0
    assert await shop.client.hlen(shop.key("reservations")) == 0
    assert [operation.kind for operation in (await shop.journal())[-1].operations] == ["reserve", "confirm"]


# Time ------------------------------------------------------------------------------------------------------------------------


async def test_a_ttl_runs_by_the_clock_of_redis(shop: Shop) -> None:
    before = (await shop.engine.upkeep.journal_state(0)).now_ms
    await shop.stock.reserve(lines(a=1), operation_id="r1", ttl=60)
    after = (await shop.engine.upkeep.journal_state(0)).now_ms
    found = await shop.stock.reservation("r1")
    assert found is not None
    assert found.expires_at is not None
    assert before + 60_000 <= found.expires_at * 1000 <= after + 60_000
    assert await shop.client.zscore(shop.key("expiry"), key_of(MERCHANT, "r1")) == found.expires_at * 1000
    assert (await shop.journal())[-1].operations[0].expires_at == found.expires_at * 1000


async def test_a_hold_without_ttl_has_no_end(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=1), operation_id="r1", ttl=None)
    found = await shop.stock.reservation("r1")
    assert found is not None
    assert found.expires_at is None
    assert await shop.client.zcard(shop.key("expiry")) == 0


@pytest.mark.parametrize("ttl", [1e-9, 0.0001, 0.001])
async def test_the_shortest_ttl_is_an_end_all_the_same(shop: Shop, ttl: float) -> None:
    await shop.stock.reserve(lines(a=1), operation_id="r1", ttl=ttl)
    await shop.stock.reserve(lines(a=1), operation_id="r2", ttl=None)
    await shop.stock.extend("r2", ttl=ttl)
    assert await shop.client.zcard(shop.key("expiry")) == 2


async def test_an_overdue_hold_is_held_until_the_expire_script_has_removed_it(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.reserve(lines(a=2), operation_id="r2")
    await shop.make_due("r1")
    await shop.make_due("r2")
    assert (await seen(shop, "r1"))[0] == "held"
    assert (await shop.stock.confirm("r1")).lines[0].quantity == 4
    await shop.stock.extend("r2", ttl=60)
    assert (await shop.engine.upkeep.expire(0, [key_of(MERCHANT, "r1"), key_of(MERCHANT, "r2")])).keys == []
    assert await shop.counters("a") == (4, 2)


async def test_expiry_gives_back_what_is_open_and_is_journaled(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4, b=2), operation_id="r1", order="77")
    await shop.stock.confirm("r1", lines=lines(a=1), operation_id="c1")
    await shop.stock.reserve(lines(a=1), operation_id="later")
    key = await shop.make_due("r1")
    assert await shop.engine.upkeep.due_expiries(0, 10) == [key]
    assert (await shop.engine.upkeep.expire(0, [key])).keys == [key]
    assert await shop.engine.upkeep.due_expiries(0, 10) == []
    entry = (await shop.journal())[-1].operations[0]
    assert (entry.kind, entry.reference, entry.lines, entry.remaining, entry.order) == (
        "expire",
        key,
        [key_of(MERCHANT, "a"), 3, key_of(MERCHANT, "b"), 2],
        [8, 5],
        "77",
    )
    assert await seen(shop, "r1") == ("expired", {}, {"a": 1}, {"a": 3, "b": 2})
    assert (await shop.counters("a"), await shop.counters("b")) == ((8, 1), (5, 0))


async def test_expiring_twice_and_expiring_what_is_not_due_does_nothing(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.reserve(lines(a=1), operation_id="r2", ttl=None)
    await shop.stock.reserve(lines(a=1), operation_id="r3", ttl=600)
    await shop.expire("r1")
    before = await shop.snapshot()
    names = [key_of(MERCHANT, name) for name in ("r1", "r2", "r3", "unknown")]
    found = await shop.engine.upkeep.expire(0, names)
    assert (found.keys, found.pinned) == ([], [])
    assert await shop.snapshot() == before


async def test_two_workers_expiring_the_same_hold_expire_it_once(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1")
    key = await shop.make_due("r1")
    both = await asyncio.gather(shop.engine.upkeep.expire(0, [key]), shop.engine.upkeep.expire(0, [key]))
    assert sorted(len(one.keys) for one in both) == [0, 1]
    assert await shop.counters("a") == (10, 0)


async def test_extend_moves_the_end_and_none_takes_it_away(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1", ttl=10)
    await shop.stock.extend("r1", ttl=100)
    found = await shop.stock.reservation("r1")
    assert found is not None
    assert found.expires_at is not None
    assert await shop.client.zscore(shop.key("expiry"), key_of(MERCHANT, "r1")) == found.expires_at * 1000
    assert found.expires_at * 1000 > (await shop.engine.upkeep.journal_state(0)).now_ms + 90_000
    await shop.make_due("r1")
    await shop.stock.extend("r1", ttl=None)
    assert await shop.engine.upkeep.due_expiries(0, 10) == []
    found = await shop.stock.reservation("r1")
    assert found is not None
    assert found.expires_at is None
    assert (await shop.journal())[-1].operations[0].kind == "extend"


async def test_an_expiry_behind_an_extend_in_one_batch_finds_it_extended(shop: Shop) -> None:
    for name, ttl in (("r1", 60_000), ("r2", 0)):
        await shop.stock.reserve(lines(a=2), operation_id=name)
        key = await shop.make_due(name)
        answers = await shop.run(
            ["extend", key_of(MERCHANT, "x"), "", [], "", key, ttl, "", "", ""],
            ["expire", f"{key}\x1fexpire", "", [], "", key, 0, "", "", ""],
        )
        assert [answer[0] for answer in answers] == [0, 12], name
        assert (await seen(shop, name))[0] == "held"


async def test_confirm_after_expiry_says_so_and_reacquire_takes_again(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4, b=2), operation_id="r1", order="77")
    await shop.expire("r1")
    with pytest.raises(errors.ReservationExpired):
        await shop.stock.confirm("r1")
    again = await shop.stock.confirm("r1", reacquire=True)
    assert (again.kind, again.replayed) == ("confirm", False)
    assert [(line.sku, line.quantity, line.remaining) for line in again.lines] == [("a", 4, 6), ("b", 2, 3)]
    assert await seen(shop, "r1") == ("confirmed", {}, {"a": 4, "b": 2}, {})
    assert (await shop.counters("a"), await shop.counters("b")) == ((6, 0), (3, 0))
    assert await shop.stock.confirm("r1", reacquire=True) == replace(again, replayed=True)
    assert await shop.stock.confirm("r1") == replace(again, replayed=True)
    assert [entry.operations[0].kind for entry in await shop.journal()] == ["reserve", "expire", "reacquire"]


async def test_reacquire_takes_only_what_expired(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4, b=2), operation_id="r1")
    await shop.stock.confirm("r1", lines=lines(a=1), operation_id="c1")
    await shop.stock.release("r1", lines=lines(a=1, b=2), operation_id="b1")
    await shop.expire("r1")
    again = await shop.stock.confirm("r1", reacquire=True)
    assert [(line.sku, line.quantity) for line in again.lines] == [("a", 2)]
    assert await seen(shop, "r1") == ("confirmed", {}, {"a": 3}, {"a": 1, "b": 2})
    assert (await shop.counters("a"), await shop.counters("b")) == ((7, 0), (5, 0))


async def test_reacquire_takes_nothing_when_one_line_is_gone(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4, b=2), operation_id="r1")
    await shop.expire("r1")
    await shop.stock.deduct(lines(b=4))
    before = await shop.snapshot()
    with pytest.raises(errors.InsufficientStock) as caught:
        await shop.stock.confirm("r1", reacquire=True)
    assert (caught.value.sku, caught.value.requested, caught.value.available) == ("b", 2, 1)
    assert await shop.snapshot() == before


async def test_reacquire_of_a_live_hold_is_a_plain_confirm(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.confirm("r1", reacquire=True)
    assert (await shop.journal())[-1].operations[0].kind == "confirm"
    assert await shop.counters("a") == (6, 0)


async def test_reacquire_of_a_released_hold_is_closed(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.release("r1")
    with pytest.raises(errors.ReservationClosed) as caught:
        await shop.stock.confirm("r1", reacquire=True)
    assert caught.value.state == "released"


# Pins ------------------------------------------------------------------------------------------------------------------------


async def test_an_overdue_pinned_hold_is_not_expired_but_named(shop: Shop) -> None:
    receipt = await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.reserve(lines(a=1), operation_id="r2")
    assert await shop.stock.pin(receipt)
    keys = [await shop.make_due("r1"), await shop.make_due("r2")]
    found = await shop.engine.upkeep.expire(0, keys)
    assert (found.keys, found.pinned) == ([keys[1]], [keys[0]])
    assert await shop.counters("a") == (6, 4)
    assert (await seen(shop, "r1"))[0] == "held"


async def test_a_pin_is_overdue_after_its_own_time(shop: Shop) -> None:
    receipt = await shop.stock.reserve(lines(a=4), operation_id="r1", ttl=1)
    before = (await shop.engine.upkeep.journal_state(0)).now_ms
    await shop.stock.pin(receipt)
    assert await shop.client.zscore(shop.key("expiry"), key_of(MERCHANT, "r1")) >= before + PIN_OVERDUE_MS
    found = await shop.stock.reservation("r1")
    assert found is not None
    assert found.expires_at is None


async def test_a_pinned_hold_ends_only_when_its_decider_speaks(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.stock.engine.PIN_WAITS", (0.001,))
    receipt = await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.pin(receipt)
    before = await shop.snapshot()
    for act in (
        shop.stock.confirm("r1"),
        shop.stock.release("r1"),
        shop.stock.release("r1", lines=lines(a=1)),
        shop.stock.extend("r1", ttl=60),
    ):
        with pytest.raises(errors.Overloaded):
            await act
    assert await shop.snapshot() == before
    sold = await shop.stock.settle_pinned(receipt, "confirm")
    assert (sold.kind, sold.lines[0].quantity) == ("confirm", 4)
    assert await shop.counters("a") == (6, 0)


async def test_an_undo_does_not_take_a_pinned_hold_from_its_decider(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.stock.engine.PIN_WAITS", (0.001,))
    receipt = await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.pin(receipt)
    with suppress(errors.Overloaded):
        assert not await shop.stock.undo(receipt)
    assert await shop.counters("a") == (6, 4)


async def test_a_caller_waits_for_a_pin_that_is_lifted_meanwhile(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.stock.engine.PIN_WAITS", (0.001,) * 5000)
    receipt = await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.pin(receipt)
    refused = asyncio.Event()
    shop.metrics.on_batch = lambda sent: refused.set() if sent.refused else None
    waiting = asyncio.create_task(shop.stock.confirm("r1"))
    await refused.wait()
    assert await shop.stock.resume(receipt, 60)
    assert (await waiting).kind == "confirm"


@pytest.mark.parametrize("ttl", [60.0, None])
async def test_resume_lets_the_ttl_run_from_now(shop: Shop, ttl: float | None) -> None:
    receipt = await shop.stock.reserve(lines(a=4), operation_id="r1", ttl=5)
    await shop.stock.pin(receipt)
    assert await shop.stock.resume(receipt, ttl)
    found = await shop.stock.reservation("r1")
    assert found is not None
    now = (await shop.engine.upkeep.journal_state(0)).now_ms
    assert found.expires_at is None if ttl is None else found.expires_at and found.expires_at * 1000 > now + 50_000
    assert await shop.client.zcard(shop.key("expiry")) == (0 if ttl is None else 1)
    await shop.stock.release("r1")


async def test_a_closed_hold_can_be_neither_pinned_nor_resumed(shop: Shop) -> None:
    receipt = await shop.stock.reserve(lines(a=4), operation_id="r1")
    await shop.stock.release("r1")
    assert not await shop.stock.pin(receipt)
    assert not await shop.stock.resume(receipt, 60)
    assert not await shop.stock.pin(replace(receipt, operation_id="unknown"))


# What only the ledger still knows ----------------------------------------------------------------------------------------------


async def test_closed_holds_that_redis_forgot_are_asked_of_the_ledger(shop: Shop) -> None:
    key = key_of(MERCHANT, "old")
    row = ReservationRow(key, "expired", "f", Position(0, 1, 1), "77", 0, False, (key_of(MERCHANT, "a"), 3, 0, 1, 2))
    shop.ledger.holds[key] = row
    assert await seen(shop, "old") == ("expired", {}, {"a": 1}, {"a": 2})
    before = await shop.snapshot()
    for state, kind in (
        ("expired", errors.ReservationExpired),
        ("released", errors.ReservationClosed),
        ("confirmed", errors.ReservationClosed),
    ):
        shop.ledger.holds[key] = replace(row, state=state)
        for act in (shop.stock.confirm("old"), shop.stock.release("old"), shop.stock.extend("old", ttl=1)):
            with pytest.raises(errors.ReservationClosed) as caught:
                await act
            assert (type(caught.value), caught.value.state) == (kind, state)
    assert await shop.snapshot() == before


async def test_a_close_that_redis_forgot_answers_the_ledgers_receipt(shop: Shop) -> None:
    hold, mine = key_of(MERCHANT, "old"), key_of(MERCHANT, "c1")
    flat = (key_of(MERCHANT, "a"), 2)
    shop.ledger.operations[mine] = OperationRow(
        Position(0, 1, 4), 0, mine, "confirm", fingerprint("confirm", hold, flat), "77", hold, flat, (8,), "applied", False, 1
    )
    again = await shop.stock.confirm("old", lines=lines(a=2), operation_id="c1")
    assert (again.replayed, again.order, again.positions, again.lines[0].remaining) == (True, "77", (Position(0, 1, 4),), 8)
    with pytest.raises(errors.OperationConflict):
        await shop.stock.confirm("old", lines=lines(a=1), operation_id="c1")
