"""How much a person may correct: a second word above a size, and units of a merchant in a day, whoever else is at it."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy import update

from inventory_sdk import InvalidOperation
from inventory_sdk.errors import OutcomeUnknown
from inventory_sdk.ledger.accounts import NewRow
from inventory_sdk.reconcile.model import DAY
from tests.reconcile_kit import shop

WHY = {"reason": "counted by hand", "who": "kim"}


async def test_a_large_one_needs_a_second_word() -> None:
    async with shop(confirm_above=4) as it:
        await it.by_hand("a", 5)
        found = await it.one()
        assert (await it.inventory.reconciler.propose(found.number)).needs_confirmation
        with pytest.raises(InvalidOperation, match="moves 5 units, more than 4") as refused:
            await it.inventory.reconciler.correct(found.number, **WHY)
        assert refused.value.field == "confirmed"
        assert await it.found() == [("stock", "a", "manual_redis", 5, 0)]
        await it.inventory.reconciler.correct(found.number, **WHY, confirmed=True)
        assert (await it.inventory.reconciler.run()).clean


@pytest.mark.parametrize("confirmed", ["yes", -5, 5.0, None])
async def test_a_confirmation_that_is_no_number_of_units_is_refused(confirmed: object) -> None:
    async with shop() as it:
        await it.by_hand("a", 5)
        found = await it.one()
        with pytest.raises(InvalidOperation) as refused:
            await it.inventory.reconciler.correct(found.number, **WHY, confirmed=confirmed)  # type: ignore[arg-type]
        assert refused.value.field == "confirmed"


async def test_what_has_grown_since_it_was_confirmed_is_not_moved_unseen() -> None:
    async with shop(confirm_above=4) as it:
        await it.by_hand("a", 5)
        found = await it.one()
        shown = await it.inventory.reconciler.propose(found.number)
        await it.by_hand("a", 900)
        with pytest.raises(InvalidOperation, match="moves 905 units by now"):
            await it.inventory.reconciler.correct(found.number, **WHY, confirmed=shown.units)
        assert await it.found() == [("stock", "a", "manual_redis", 905, 0)]
        await it.inventory.reconciler.correct(found.number, **WHY, confirmed=905)
        assert (await it.inventory.reconciler.run()).clean


async def test_a_merchants_corrections_of_a_day_are_limited_and_what_was_refused_does_not_count() -> None:
    async with shop(daily_limit=100, limits={"default": 5}) as it:
        await it.by_hand("a", 4)
        await it.by_hand("b", 3)
        first, second = sorted((await it.inventory.reconciler.run()).open, key=lambda each: str(each.sku))
        await it.inventory.reconciler.correct(first.number, **WHY)
        for _ in range(2):
            with pytest.raises(InvalidOperation, match="would move 7 units in 24 hours, 5 are allowed"):
                await it.inventory.reconciler.correct(second.number, **WHY)
        assert [row[1] for row in await it.found()] == ["b"]


async def test_only_ones_own_corrections_of_the_last_day_count() -> None:
    async with shop(limits={"default": 5}) as it:
        await it.by_hand("a", 4)
        await it.by_hand("b", 4)
        first, second = (await it.inventory.reconciler.run()).open
        await it.inventory.reconciler.correct(first.number, **WHY)
        register, audit = it.ledger.register, it.ledger.tables.audit
        ((other, _),) = await register.keep([NewRow("m2", "x", "manual_redis", "stock\x1fm2\x1fx")])
        act = {"kind": "correct", "actor": "kim", "operation_id": "o", "details": {}, "units": 5}
        await register.turn(other.number, ["open"], "correcting", {}, act, limit=(5, 0))  # what another merchant's have moved is its own
        with pytest.raises(InvalidOperation, match="would move 8 units"):
            await it.inventory.reconciler.correct(second.number, **WHY)
        yesterday = int((time.time() - DAY - 60) * 1000)
        async with it.ledger.engine.begin() as connection:
            await connection.execute(update(audit).values(created_ms=yesterday))
        assert (await it.inventory.reconciler.correct(second.number, **WHY)).state == "corrected"


@pytest.mark.parametrize("told", [False, True])
async def test_of_two_at_once_one_is_within_the_limit_and_the_other_is_not(told: bool) -> None:
    async with shop(own=told, writes=told, limits={"default": 5}) as it:
        for sku in ("a", "b"):
            if told:
                it.own[sku] += 4
            else:
                await it.by_hand(sku, 4)
        done = await it.inventory.reconciler.run()
        assert len(done.open) == 2
        outcomes = await asyncio.gather(
            *(it.inventory.reconciler.correct(each.number, **WHY) for each in done.open), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in outcomes) == ["Discrepancy", "InvalidOperation"]
        assert len(await it.found()) == 1
        assert await it.ledger.register.spent("default", 0) == 4


async def test_what_was_begun_counts_although_its_process_died(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop(limits={"default": 5}) as it:
        await it.by_hand("a", 4)
        await it.by_hand("b", 4)
        first, second = sorted((await it.inventory.reconciler.run()).open, key=lambda each: str(each.sku))

        async def dies(*_: object, **__: object) -> None:
            raise OutcomeUnknown("x", "lost")

        with monkeypatch.context() as patched:
            patched.setattr(it.engine.upkeep, "correct", dies)
            with pytest.raises(OutcomeUnknown):
                await it.inventory.reconciler.correct(first.number, **WHY)
        with pytest.raises(InvalidOperation, match="would move 8 units"):
            await it.inventory.reconciler.correct(second.number, **WHY)
        assert (await it.inventory.reconciler.correct(first.number, **WHY)).state == "corrected"


async def test_one_that_was_refused_after_all_never_counts_for_less_than_nothing() -> None:
    async with shop(limits={"default": 5}) as it:
        await it.by_hand("a", 4)
        found, register, audit = await it.one(), it.ledger.register, it.ledger.tables.audit
        act = {"actor": "kim", "operation_id": "reconcile-1-x", "details": {}}
        await register.turn(found.number, ["open"], "correcting", {}, {**act, "kind": "correct", "units": 4})
        assert await register.spent("default", 0) == 4
        await register.turn(found.number, ["correcting"], "open", {}, {**act, "kind": "refused"})
        assert await register.spent("default", 0) == 0
        yesterday = int((time.time() - DAY - 60) * 1000)
        async with it.ledger.engine.begin() as connection:
            await connection.execute(update(audit).where(audit.c.kind == "correct").values(created_ms=yesterday))
        # What it had counted for has run out of the day before its refusal has.
        assert await register.spent("default", yesterday + 30_000) == 0
