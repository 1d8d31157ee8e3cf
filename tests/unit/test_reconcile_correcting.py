"""Corrections: shown first, made once as a delta, from a look just now, on record, and undone exactly."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import delete, update

from inventory_sdk import InvalidOperation, Line, OutcomeUnknown, StockFrozen
from inventory_sdk.ledger.register import AnotherState
from inventory_sdk.model import key_of
from inventory_sdk.reconcile import comparing
from inventory_sdk.reconcile.causes import Causes
from inventory_sdk.reconcile.model import Cause
from inventory_sdk.stock.wire import NotExecuted
from tests.reconcile_kit import Shop, shop
from tests.unit.test_reconcile import cut_out

A = key_of("default", "a")
WHY = {"reason": "counted by hand", "who": "kim"}


async def test_a_proposal_says_what_would_be_done_and_does_nothing() -> None:
    async with shop() as it:
        await it.by_hand("a", 3, -1)
        found = await it.one()
        shown = await it.inventory.reconciler.propose(found.number)
        assert (shown.side, shown.available, shown.reserved, shown.units) == ("redis", -3, 1, 3)
        assert "-3 available, +1 reserved" in shown.steps[0]
        assert await it.found() == [("stock", "a", "manual_redis", 3, -1)]
        assert await it.inventory.reconciler.audit() == []


@pytest.mark.parametrize(("available", "reserved"), [(3, 0), (-2, 0), (0, 2), (5, -1)])
async def test_a_correction_of_redis_is_journaled_and_both_sides_agree_while_sales_go_on(available: int, reserved: int) -> None:
    async with shop() as it:
        stock = it.inventory.stock
        await stock.reserve([Line("a", 2)], operation_id="r", ttl=60)
        await it.by_hand("a", available, reserved)
        found = await it.one()
        await stock.deduct([Line("a", 1)], operation_id="between")
        made = await it.inventory.reconciler.correct(found.number, **WHY)
        assert made.state == "corrected"
        assert await it.sides() == ((7, 2), (7, 2))
        assert (await it.inventory.reconciler.run()).clean
        (entry,) = [each for each in await it.ledger.operations_at(await journal(it)) if each.kind == "correct"]
        assert list(entry.lines) == [A, -available, -reserved]
        assert await it.ledger.verify() == []


async def journal(it: Shop) -> list[Any]:
    from inventory_sdk.model import Position

    hello = await it.engine.partitions[0].hello()
    return [Position(0, hello.epoch, sequence) for sequence in range(1, hello.sequence + 1)]


async def test_a_correction_may_go_below_zero_and_nothing_is_sold_until_it_is_made_up() -> None:
    async with shop() as it:
        await it.by_hand("a", 5)
        await it.inventory.stock.deduct([Line("a", 10)], operation_id="d")
        found = await it.one()
        await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((0, 0), (0, 0))


async def test_what_the_ledger_missed_is_written_off_there_and_redis_stays_as_it_is() -> None:
    async with shop() as it:
        receipt = await it.inventory.stock.deduct([Line("a", 4)], operation_id="d")
        await it.inventory.stock.deduct([Line("b", 1)], operation_id="e")
        await it.inventory.settled()
        await cut_out(it, receipt, 4)
        found = await it.one(sku="a")
        assert (await it.inventory.reconciler.propose(found.number)).side == "ledger"
        await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((6, 0), (6, 0))
        (row,) = await it.ledger.stock([A])
        assert (row.sold, row.written_off, row.supplied) == (0, 4, 10)
        assert await it.found(sku="a") == []
        await it.inventory.reconciler.undo(found.number, **WHY)
        assert await it.sides() == ((6, 0), (10, 0))
        assert [row[:3] for row in await it.found(sku="a")] == [("stock", "a", "missing_journal")]


async def test_a_missing_range_with_reservations_in_it_says_why_it_is_not_written_off() -> None:
    async with shop() as it:
        receipt = await it.inventory.stock.reserve([Line("a", 4)], operation_id="r", ttl=60)
        await it.inventory.stock.deduct([Line("b", 1)], operation_id="e")
        await it.inventory.settled()
        await cut_out(it, receipt, 0)
        tables = it.ledger.tables
        async with it.ledger.engine.begin() as connection:
            await connection.execute(delete(tables.reservation_line))
            await connection.execute(delete(tables.reservation))
            await connection.execute(update(tables.stock).where(tables.stock.c.sku == "a").values(available=10, reserved=0))
        found = await it.one(sku="a")
        assert (found.cause, found.available, found.reserved) == ("missing_journal", -4, 4)
        with pytest.raises(InvalidOperation, match="reservations are among what is missing"):
            await it.inventory.reconciler.correct(found.number, **WHY)


async def test_the_services_table_is_brought_in_line_through_writes_stock() -> None:
    async with shop(own=True, writes=True) as it:
        it.own["a"] += 3
        found = await it.one()
        shown = await it.inventory.reconciler.propose(found.number)
        assert (shown.side, shown.available) == ("service", -3)
        await it.inventory.reconciler.correct(found.number, **WHY)
        assert it.own["a"] == 10
        assert await it.sides() == ((10, 0), (10, 0))
        assert (await it.inventory.reconciler.run()).clean
        await it.inventory.reconciler.undo(found.number, **WHY)
        assert it.own["a"] == 13


async def test_without_writes_stock_the_services_count_is_taken_over() -> None:
    async with shop(own=True) as it:
        it.own["a"], it.own["b"] = 8, 13
        for found in (await it.inventory.reconciler.run()).open:
            await it.inventory.reconciler.correct(found.number, **WHY)
        assert (await it.sides("a"), await it.sides("b")) == (((8, 0), (8, 0)), ((13, 0), (13, 0)))
        assert (await it.inventory.reconciler.run()).clean
        assert await it.ledger.verify() == []


async def test_a_hold_that_lost_its_end_gets_it_back() -> None:
    async with shop() as it:
        await it.inventory.stock.reserve([Line("a", 1)], operation_id="r", ttl=60)
        client, hold = it.engine.wire.client, key_of("default", "r")
        before = await client.zscore(it.key("expiry"), hold)
        await client.zrem(it.key("expiry"), hold)
        found = await it.one()
        await it.inventory.reconciler.correct(found.number, **WHY)
        after = await client.zscore(it.key("expiry"), hold)
        assert abs(after - before) < 5000
        assert (await it.inventory.reconciler.run()).clean
        with pytest.raises(InvalidOperation, match="gave a hold an end"):
            await it.inventory.reconciler.undo(found.number, **WHY)


async def test_a_pinned_hold_is_its_deciders_and_not_given_an_end() -> None:
    async with shop() as it:
        await it.inventory.stock.reserve([Line("a", 1)], operation_id="r", ttl=60)
        client, hold = it.engine.wire.client, key_of("default", "r")
        record = (await client.hget(it.key("reservations"), hold)).decode()
        await client.hset(it.key("reservations"), hold, f"p{record[1:]}")
        await client.zrem(it.key("expiry"), hold)
        found = await it.one()
        with pytest.raises(InvalidOperation, match="it is pinned"):
            await it.inventory.reconciler.correct(found.number, **WHY)


@pytest.mark.parametrize("meanwhile", ["released", "pinned"])
async def test_a_hold_that_has_ended_or_was_pinned_before_its_time_was_set_needs_none(
    meanwhile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop() as it:
        await it.inventory.stock.reserve([Line("a", 1)], operation_id="r", ttl=60)
        await it.engine.wire.client.zrem(it.key("expiry"), key_of("default", "r"))
        found, register = await it.one(), it.ledger.register
        turn = register.turn

        async def then_is_released(*arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(register, "turn", turn)
            turned = await turn(*arguments, **options)
            if meanwhile == "released":
                await it.inventory.stock.release("r")
            else:
                client, hold = it.engine.wire.client, key_of("default", "r")
                record = (await client.hget(it.key("reservations"), hold)).decode()
                await client.hset(it.key("reservations"), hold, f"p{record[1:]}")
            return turned

        monkeypatch.setattr(register, "turn", then_is_released)
        assert (await it.inventory.reconciler.correct(found.number, **WHY)).state == "corrected"
        left = (10, 0) if meanwhile == "released" else (9, 1)
        assert await it.sides() == (left, left)


async def test_an_overdue_one_expires_and_its_units_come_back() -> None:
    async with shop() as it:
        client, hold = it.engine.wire.client, key_of("default", "r")
        await it.inventory.stock.reserve([Line("a", 4)], operation_id="r", ttl=0.5)
        await client.zrem(it.key("expiry"), hold)
        await it.inventory.settled()
        found = await it.one()
        while (await it.engine.partitions[0].hello()).now_ms < found.evidence["expires_at"]:
            await asyncio.sleep(0.05)  # until it is overdue by Redis' clock
        await it.inventory.reconciler.correct(found.number, **WHY)
        async with asyncio.timeout(10):
            while (await it.inventory.stock.level("a")).available != 10:
                await it.inventory.settled()
                await asyncio.sleep(0.02)
        assert await it.sides() == ((10, 0), (10, 0))


async def test_two_causes_of_two_sides_are_corrected_one_after_the_other_each_where_it_was_wrong() -> None:
    async with shop() as it:
        receipt = await it.inventory.stock.deduct([Line("a", 4)], operation_id="d")
        await it.inventory.settled()
        await cut_out(it, receipt, 4)
        await it.inventory.stock.deduct([Line("a", 1)], operation_id="d2")
        await it.inventory.settled()
        await it.engine.wire.client.hdel(it.key("results:0"), key_of("default", "d2"))
        await it.by_hand("a", 1)
        found = await it.one(sku="a")
        assert (found.available, found.evidence["together"]) == (-3, ["missing_journal", "went_back"])
        await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((5, 0), (9, 0))
        rest = await it.one(sku="a")
        assert (rest.cause, rest.available) == ("missing_journal", -4)
        await it.inventory.reconciler.correct(rest.number, **WHY)
        assert await it.sides() == ((5, 0), (5, 0))  # ten, and five were sold


async def test_what_was_put_into_redis_beside_a_hole_that_nobody_can_read_is_not_made_real_stock() -> None:
    async with shop() as it:
        tables = it.ledger.tables
        receipt = await it.inventory.stock.deduct([Line("b", 1)], operation_id="d")
        await it.inventory.stock.deduct([Line("b", 1)], operation_id="e")
        await it.inventory.settled()
        _, epoch, seq = receipt.positions[0]
        async with it.ledger.engine.begin() as connection:
            await connection.execute(delete(tables.entry).where(tables.entry.c.epoch == epoch, tables.entry.c.seq == seq))
        await it.engine.wire.client.xdel(it.key("journal"), f"1-{seq}")
        await it.by_hand("a", 3)
        found = await it.one(sku="a")
        assert (found.cause, found.evidence["unread"]) == ("missing_journal", 1)
        await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((10, 0), (10, 0))
        assert (await it.ledger.stock([A]))[0].supplied == 10


async def test_a_cause_that_was_found_stays_found_when_the_journal_has_been_trimmed_since() -> None:
    async with shop() as it:
        receipt = await it.inventory.stock.deduct([Line("a", 4)], operation_id="d")
        await it.inventory.stock.deduct([Line("b", 1)], operation_id="e")
        await it.inventory.settled()
        await cut_out(it, receipt, 4)
        await it.by_hand("b", -2, 1)
        causes = {each.sku: each.cause for each in (await it.inventory.reconciler.run()).open if each.what == "stock"}
        assert causes == {"a": "missing_journal", "b": "manual_redis"}
        await it.engine.wire.client.xdel(it.key("journal"), f"1-{receipt.positions[0].sequence}")
        done = [each for each in (await it.inventory.reconciler.run()).open if each.what == "stock"]
        assert {each.sku: each.cause for each in done} == causes
        for each in done:
            await it.inventory.reconciler.correct(each.number, **WHY)
        assert (await it.sides("a"), await it.sides("b")) == (((6, 0), (6, 0)), ((9, 0), (9, 0)))


async def test_a_hole_that_was_written_off_explains_nothing_any_more() -> None:
    async with shop() as it:
        receipt = await it.inventory.stock.deduct([Line("a", 4)], operation_id="d")
        await it.inventory.stock.deduct([Line("b", 1)], operation_id="e")
        await it.inventory.settled()
        await cut_out(it, receipt, 4)
        await it.inventory.reconciler.correct((await it.one(sku="a")).number, **WHY)
        await it.by_hand("a", -4)
        found = await it.one(sku="a")
        assert found.cause == "manual_redis"
        await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((6, 0), (6, 0))


# From a look just now -------------------------------------------------------------------------------------------------------------


async def test_what_can_not_be_looked_at_now_is_not_corrected_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()

        async def away(*_: Any) -> Any:
            raise NotExecuted("LOADING")

        with monkeypatch.context() as patched:
            patched.setattr(comparing, "read_counters", away)
            patched.setattr(comparing, "ATTEMPTS", 1)
            with pytest.raises(InvalidOperation, match="could not be looked at now"):
                await it.inventory.reconciler.correct(found.number, **WHY)
            assert (await it.inventory.reconciler.propose(found.number)).steps == ()
        assert (await it.inventory.reconciler.discrepancy(found.number)).state == "open"
        await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((10, 0), (10, 0))


async def test_a_redis_that_was_filled_anew_after_the_look_is_not_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        register, asked = it.ledger.register, 0
        get = register.get

        async def then_is_filled_anew(number: int) -> Any:
            nonlocal asked
            asked += 1
            if asked == 2:  # behind the look, before the plan
                await it.engine.wire.client.delete(*it.engine.partitions[0].keys)
                async with asyncio.timeout(20):
                    while (await it.engine.partitions[0].hello()).epoch != 2:
                        await asyncio.sleep(0.05)
            return await get(number)

        monkeypatch.setattr(register, "get", then_is_filled_anew)
        with pytest.raises(StockFrozen):
            await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((10, 0), (10, 0))
        assert (await it.inventory.reconciler.run()).clean
        assert (await it.inventory.reconciler.discrepancy(found.number)).state == "gone"
        assert await register.spent("default", 0) == 0


# Once -----------------------------------------------------------------------------------------------------------------------------


async def test_asked_for_many_times_at_once_it_is_made_once() -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        outcomes = await asyncio.gather(*(it.inventory.reconciler.correct(found.number, **WHY) for _ in range(8)), return_exceptions=True)
        assert not [each for each in outcomes if isinstance(each, Exception) and not isinstance(each, AnotherState | InvalidOperation)]
        assert await it.sides() == ((10, 0), (10, 0))
        assert (await it.inventory.reconciler.correct(found.number, **WHY)).state == "corrected"
        assert [each.kind for each in await it.inventory.reconciler.audit()] == ["correct"]


async def test_one_whose_process_died_after_the_delta_is_gone_on_with_and_moves_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        upkeep = it.engine.upkeep
        correct = upkeep.correct

        async def then_dies(*arguments: Any, **options: Any) -> None:
            await correct(*arguments, **options)
            monkeypatch.setattr(upkeep, "correct", correct)
            raise OutcomeUnknown("reconcile-1", "the reply was lost")

        monkeypatch.setattr(upkeep, "correct", then_dies)
        with pytest.raises(OutcomeUnknown):
            await it.inventory.reconciler.correct(found.number, **WHY)
        (begun,) = await it.inventory.reconciler.discrepancies()
        assert begun.state == "correcting"
        assert (await it.inventory.reconciler.propose(found.number)).available == -3
        assert (await it.inventory.reconciler.correct(found.number, reason="again", who="lee")).state == "corrected"
        assert await it.sides() == ((10, 0), (10, 0))


async def test_a_caller_that_goes_away_at_any_step_leaves_what_a_repeat_completes() -> None:
    async with shop() as it:
        for steps in range(0, 60, 3):
            await it.by_hand("a", 2)
            found = await it.one(sku="a")
            task = asyncio.ensure_future(it.inventory.reconciler.correct(found.number, **WHY))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            await it.inventory.reconciler.correct(found.number, **WHY)
            assert await it.sides() == ((10, 0), (10, 0))


def loses_the_reply(monkeypatch: pytest.MonkeyPatch, it: Shop) -> None:
    """The next correction is journaled, and its caller never hears of it."""
    upkeep = it.engine.upkeep
    correct = upkeep.correct

    async def then_dies(*arguments: Any, **options: Any) -> None:
        await correct(*arguments, **options)
        monkeypatch.setattr(upkeep, "correct", correct)
        raise OutcomeUnknown("x", "the reply was lost")

    monkeypatch.setattr(upkeep, "correct", then_dies)


def names_a_missing_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the ledger had missed what has raised Redis."""

    async def of(self: Any, partition: Any, drift: Any, before: Any) -> Any:
        return Cause.MISSING_JOURNAL, {"epoch": drift.epoch}

    monkeypatch.setattr(Causes, "of", of)


async def test_what_the_ledger_missed_of_what_came_back_is_supplied_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        names_a_missing_range(monkeypatch)
        await it.by_hand("a", 3)
        found = await it.one()
        await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((13, 0), (13, 0))
        await it.inventory.reconciler.undo(found.number, **WHY)
        assert await it.sides() == ((13, 0), (10, 0))


async def test_a_half_that_went_with_its_redis_is_no_half_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        names_a_missing_range(monkeypatch)
        await it.by_hand("a", 3)
        found, stock = await it.one(), it.inventory.stock

        async def dies(*_: Any, **__: Any) -> None:
            raise OutcomeUnknown("x", "lost")

        with monkeypatch.context() as patched:
            patched.setattr(type(stock), "adjust", dies)
            with pytest.raises(OutcomeUnknown):
                await it.inventory.reconciler.correct(found.number, **WHY)
        await it.inventory.settled()
        await it.engine.wire.client.delete(*it.engine.partitions[0].keys)
        async with asyncio.timeout(20):
            while (await it.engine.partitions[0].hello()).state != "open":
                await asyncio.sleep(0.05)
        with pytest.raises(StockFrozen, match="epoch 1"):
            await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((10, 0), (10, 0))
        assert (await it.inventory.reconciler.run()).gone == 1
        assert await it.ledger.register.spent("default", 0) == 0


async def test_while_redis_does_not_sell_a_correction_waits_and_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found, upkeep = await it.one(), it.engine.upkeep
        correct = upkeep.correct

        async def then_is_frozen(*arguments: Any, **options: Any) -> None:
            await correct(*arguments, **options)  # its reply was lost, and the repeat met a partition that is suspect
            raise StockFrozen("suspect", retry_after=0.1)

        with monkeypatch.context() as patched:
            patched.setattr(upkeep, "correct", then_is_frozen)
            with pytest.raises(StockFrozen):
                await it.inventory.reconciler.correct(found.number, **WHY)
        assert (await it.inventory.reconciler.discrepancy(found.number)).state == "correcting"
        assert (await it.inventory.reconciler.correct(found.number, **WHY)).state == "corrected"
        assert await it.sides() == ((10, 0), (10, 0))


@pytest.mark.parametrize("way", ["redis", "write_off", "supply"])
async def test_one_that_is_gone_on_with_after_redis_has_forgotten_its_id_moves_nothing_more(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with shop() as it:
        if way == "supply":
            names_a_missing_range(monkeypatch)
        if way != "write_off":
            await it.by_hand("a", 3)
        else:
            receipt = await it.inventory.stock.deduct([Line("a", 4)], operation_id="d")
            await it.inventory.settled()
            await cut_out(it, receipt, 4)
        loses_the_reply(monkeypatch, it)
        found = await it.one(sku="a")
        with pytest.raises(OutcomeUnknown):
            await it.inventory.reconciler.correct(found.number, **WHY)
        await it.inventory.settled()
        await it.engine.wire.client.delete(it.key("results:0"), it.key("results:1"))
        assert (await it.inventory.reconciler.correct(found.number, **WHY)).state == "corrected"
        redis, ledger = await it.sides()
        assert redis == ledger == {"redis": (10, 0), "write_off": (6, 0), "supply": (13, 0)}[way]


async def test_one_that_is_gone_on_with_before_the_ledger_has_heard_of_it_waits_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found, asked, ledger = await it.one(), asyncio.Event(), it.ledger
        apply, watermark = ledger.apply, it.inventory._running().ground.watermark
        reached = watermark.reached

        async def applies(*arguments: Any, **options: Any) -> Any:
            await asked.wait()
            return await apply(*arguments, **options)

        async def is_asked(*arguments: Any) -> None:
            asked.set()
            await reached(*arguments)

        await it.inventory.settled()
        loses_the_reply(monkeypatch, it)
        monkeypatch.setattr(ledger, "apply", applies)
        with pytest.raises(OutcomeUnknown):
            await it.inventory.reconciler.correct(found.number, **WHY)
        await it.engine.wire.client.delete(it.key("results:0"), it.key("results:1"))
        monkeypatch.setattr(watermark, "reached", is_asked)
        assert (await it.inventory.reconciler.correct(found.number, **WHY)).state == "corrected"
        asked.set()
        assert await it.sides() == ((10, 0), (10, 0))


async def test_all_who_go_on_with_one_at_once_get_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        loses_the_reply(monkeypatch, it)
        with pytest.raises(OutcomeUnknown):
            await it.inventory.reconciler.correct(found.number, **WHY)
        made = await asyncio.gather(*(it.inventory.reconciler.correct(found.number, **WHY) for _ in range(6)))
        assert {each.state for each in made} == {"corrected"}
        assert await it.sides() == ((10, 0), (10, 0))


async def test_an_operation_of_the_service_under_a_guessed_id_is_not_taken_for_the_correction() -> None:
    async with shop(own=True) as it:
        await it.inventory.stock.adjust([Line("a", -2)], operation_id="reconcile-1", reason="damaged")
        it.own["a"] = 6
        found = await it.one()
        assert (found.number, found.available) == (1, -2)
        await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((6, 0), (6, 0))


async def test_what_has_gone_by_itself_is_not_corrected() -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        await it.by_hand("a", -3)
        with pytest.raises(InvalidOperation, match="is gone"):
            await it.inventory.reconciler.correct(found.number, **WHY)
        assert await it.sides() == ((10, 0), (10, 0))


async def test_what_has_grown_meanwhile_is_corrected_as_it_is_now() -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        await it.by_hand("a", 2)
        made = await it.inventory.reconciler.correct(found.number, **WHY)
        assert made.correction is not None
        assert made.correction["available"] == -5
        assert await it.sides() == ((10, 0), (10, 0))


# Audit, undo ---------------------------------------------------------------------------------------------------------------------------


async def test_the_audit_says_who_did_what_and_why() -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        await it.inventory.reconciler.correct(found.number, **WHY)
        await it.inventory.reconciler.undo(found.number, reason="wrong shelf", who="lee")
        undone, made = await it.inventory.reconciler.audit()
        assert (made.kind, made.who, made.sku, made.details["reason"], made.details["units"]) == (
            "correct",
            "kim",
            "a",
            "counted by hand",
            3,
        )
        assert (undone.kind, undone.who, undone.details["reason"]) == ("undo", "lee", "wrong shelf")
        assert [each.number for each in await it.inventory.reconciler.audit(limit=1, after=undone.number)] == [made.number]


async def test_an_undo_is_the_exact_inverse_once() -> None:
    async with shop() as it:
        await it.by_hand("a", 3, 2)
        found = await it.one()
        await it.inventory.reconciler.correct(found.number, **WHY)
        for _ in range(2):
            assert (await it.inventory.reconciler.undo(found.number, **WHY)).state == "undone"
        again = await it.one()
        assert (again.available, again.reserved) == (3, 2)
        assert again.number > found.number
        with pytest.raises(InvalidOperation, match="only what was corrected"):
            await it.inventory.reconciler.undo(again.number, **WHY)


async def test_what_was_corrected_before_a_rebuild_has_nothing_to_undo() -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        await it.inventory.reconciler.correct(found.number, **WHY)
        await it.inventory.settled()
        client: Any = it.engine.wire.client
        await client.delete(*it.engine.partitions[0].keys)
        async with asyncio.timeout(20):
            while (await it.engine.partitions[0].hello()).epoch != 2:
                await asyncio.sleep(0.05)
        with pytest.raises(InvalidOperation, match="filled from the ledger anew"):
            await it.inventory.reconciler.undo(found.number, **WHY)


@pytest.mark.parametrize("reason", ["'; DROP TABLE inventory_audit; --", "<b>x</b>", "nul\x00 and \ud800", "Ω" * 200])
async def test_hostile_words_are_kept_as_words(reason: str) -> None:
    async with shop() as it:
        await it.by_hand("a", 1)
        found = await it.one()
        await it.inventory.reconciler.correct(found.number, reason=reason, who="kim")
        await it.inventory.settled()
        ((entry),) = await it.inventory.reconciler.audit()
        assert entry.details["reason"] == reason
        assert (await it.inventory.reconciler.run()).clean
