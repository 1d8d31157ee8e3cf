"""Comparison: what is in flight is no drift, what is drift is found with its cause, and every scope looks at its own."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import delete, update

from inventory_sdk import DurabilityNotReached, InvalidOperation, Inventory, InventoryError, Line, NotStarted, StockFrozen
from inventory_sdk.ledger.protocol import Entering
from inventory_sdk.metrics import Compared, Happened
from inventory_sdk.model import fingerprint, key_of
from inventory_sdk.reconcile import causes, comparing, holds
from inventory_sdk.reconcile.causes import Causes, redis_deltas
from inventory_sdk.stock.journal import decode, encode
from tests.reconcile_kit import Shop, shop
from tests.stock_kit import Recorded

A = key_of("default", "a")


async def test_where_both_sides_agree_nothing_is_found() -> None:
    async with shop() as it:
        await it.inventory.stock.reserve([Line("a", 2)], operation_id="r", ttl=60)
        await it.inventory.stock.deduct([Line("b", 1)], operation_id="d")
        done = await it.inventory.reconciler.run()
        assert (done.clean, done.skus, done.holds, done.absent, done.direct) == (True, 2, 1, 0, 0)


async def every_kind_of_act(stock: Any, name: str) -> None:
    """Each way in which Redis and the ledger move."""
    await stock.deduct([Line("a", 1)], operation_id=f"{name}-d")
    await stock.reserve([Line("a", 2), Line("b", 1)], operation_id=f"{name}-r", ttl=60)
    await stock.confirm(f"{name}-r", lines=[Line("a", 1)], operation_id=f"{name}-c")
    await stock.release(f"{name}-r")
    await stock.reserve([Line("b", 1)], operation_id=f"{name}-h", ttl=None)
    await stock.adjust([Line("a", -1)], operation_id=f"{name}-w")
    await stock.adjust([Line("b", 2)], operation_id=f"{name}-s")
    await stock.restock([Line("a", 3)], operation_id=f"{name}-po")
    await stock.take_back([Line("a", 1)], of=f"{name}-d", operation_id=f"{name}-t")


async def test_whatever_moves_between_the_two_readings_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        read, rounds = comparing.read_counters, iter(range(3))

        async def then_sells(partition: Any, fields: Any) -> Any:
            counters = await read(partition, fields)
            await every_kind_of_act(it.inventory.stock, f"n{next(rounds)}")
            await it.inventory.settled()  # the ledger is ahead of what was read by all of it
            return counters

        monkeypatch.setattr(comparing, "read_counters", then_sells)
        assert await it.found() == []
        await it.by_hand("a", 1)
        assert await it.found() == [("stock", "a", "manual_redis", 1, 0)]


async def test_a_refused_sale_between_the_readings_and_its_void_are_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        read = comparing.read_counters
        rows = it.ledger.tables.stock

        async def then_refuses(partition: Any, fields: Any) -> Any:
            counters = await read(partition, fields)
            monkeypatch.setattr(comparing, "read_counters", read)
            async with it.ledger.engine.begin() as connection:  # for a moment the ledger has less than Redis sells
                await connection.execute(update(rows).where(rows.c.sku == "a").values(available=0, sold=10))
            await it.inventory.stock.deduct([Line("a", 4)], operation_id="refused")
            await it.inventory.settled()
            async with it.ledger.engine.begin() as connection:
                await connection.execute(update(rows).where(rows.c.sku == "a").values(available=10, sold=0))
            return counters

        monkeypatch.setattr(comparing, "read_counters", then_refuses)
        assert await it.found() == []
        assert await it.found() == []
        (void,) = await it.ledger.comparing.refused(0, 1)
        assert void.kind == "deduct"


async def test_a_credit_that_is_still_to_be_made_is_no_drift() -> None:
    async with shop() as it:
        flat = (A, 5)
        entering = Entering("restock", key_of("default", "po-2"), fingerprint("restock", "", ["+", *flat]), flat)
        await it.ledger.enter(0, 1, [entering])
        assert (await it.ledger.stock([A]))[0].available == 15
        assert (await it.inventory.stock.level("a")).available == 10
        assert await it.found() == []


async def test_without_a_worker_what_is_not_applied_ends_in_an_error_and_not_in_an_alarm(tmp_path: Any) -> None:
    from fakeredis import FakeAsyncRedis

    inventory = Inventory(FakeAsyncRedis(), database=f"sqlite+aiosqlite:///{tmp_path}/stock.db", metrics=[])
    async with inventory:
        await inventory.create_schema()
        async with inventory.worker() as worker:
            await worker.ready()
            await inventory.stock.restock([Line("a", 5)], operation_id="po")
            await inventory.settled()
        assert (await inventory.reconciler.run()).clean
        client: Any = inventory._running().client
        await client.delete(inventory._running().engine.partitions[0].key("worker"))
        await inventory.stock.deduct([Line("a", 1)], operation_id="d")
        with pytest.raises(DurabilityNotReached, match="no worker is running"):
            await inventory.reconciler.run()


async def test_before_the_start_it_says_so() -> None:
    with pytest.raises(NotStarted, match="reconciler"):
        await Inventory("memory://", metrics=[]).reconciler.run()


# Causes -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("available", "reserved"), [(1, 0), (-3, 0), (0, 2), (0, -1), (4, -4)])
async def test_a_change_by_hand_is_found_to_the_unit(available: int, reserved: int) -> None:
    async with shop() as it:
        await it.inventory.stock.reserve([Line("a", 2)], operation_id="r", ttl=60)
        await it.by_hand("a", available, reserved)
        assert await it.found() == [("stock", "a", "manual_redis", available, reserved)]


async def test_operations_that_redis_forgot_with_their_units_mean_that_it_went_back() -> None:
    async with shop() as it:
        for name in ("d1", "d2", "d3"):
            await it.inventory.stock.deduct([Line("a", 1)], operation_id=name)
        await it.inventory.settled()
        client: Any = it.engine.wire.client
        for name in ("d2", "d3"):
            await client.hdel(it.key("results:0"), key_of("default", name))
        await it.by_hand("a", 2)
        found = await it.one()
        assert (found.cause, found.available) == ("went_back", 2)
        assert [each["operation"] for each in found.evidence["forgotten"]] == [key_of("default", "d3"), key_of("default", "d2")]


async def test_an_expiry_in_what_redis_forgot_is_part_of_it() -> None:
    async with shop() as it:
        stock, client = it.inventory.stock, it.engine.wire.client
        await stock.reserve([Line("a", 3)], operation_id="r", ttl=60)
        await stock.deduct([Line("a", 1)], operation_id="d1")
        await client.zadd(it.key("expiry"), {key_of("default", "r"): 1})
        await it.engine.upkeep.expire(0, [key_of("default", "r")])
        await stock.deduct([Line("a", 1)], operation_id="d2")
        await it.inventory.settled()
        for name in ("d1", "d2"):
            await client.hdel(it.key("results:0"), key_of("default", name))
        await it.by_hand("a", 2 - 3, 3)
        assert await it.found() == [("stock", "a", "went_back", -1, 3)]


@pytest.mark.parametrize("why", ["older results are being restored", "it is older than what is remembered"])
async def test_what_redis_need_not_remember_does_not_mean_that_it_went_back(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.inventory.stock.deduct([Line("a", 1)], operation_id="d")
        await it.inventory.settled()
        await it.engine.wire.client.hdel(it.key("results:0"), key_of("default", "d"))
        await it.by_hand("a", 1)
        assert await it.found() == [("stock", "a", "went_back", 1, 0)]
        if why.startswith("older"):
            partition = it.engine.home("default")
            hello = await partition.hello()

            async def restoring() -> Any:
                return replace(hello, older="1-1")

            monkeypatch.setattr(partition, "hello", restoring)
        else:
            monkeypatch.setattr(causes, "MARGIN_MS", 86_400_000)
        assert await it.found() == [("stock", "a", "manual_redis", 1, 0)]


async def cut_out(it: Shop, receipt: Any, units: int) -> None:
    """The ledger loses an entry that it had applied."""
    tables = it.ledger.tables
    _, epoch, seq = receipt.positions[0]
    async with it.ledger.engine.begin() as connection:
        for table in (tables.entry, tables.operation, tables.change):
            await connection.execute(delete(table).where(table.c.epoch == epoch, table.c.seq == seq))
        stock = tables.stock
        before = {"available": stock.c.available + units, "sold": stock.c.sold - units, "version": stock.c.version - 1}
        await connection.execute(update(stock).where(stock.c.sku == "a").values(**before))


async def test_a_hole_below_the_watermark_explains_what_its_entries_moved() -> None:
    async with shop() as it:
        receipt = await it.inventory.stock.deduct([Line("a", 4)], operation_id="d")
        await it.inventory.stock.deduct([Line("b", 1)], operation_id="e")
        await it.inventory.settled()
        await cut_out(it, receipt, 4)
        found = await it.one(sku="a")
        assert (found.cause, found.available) == ("missing_journal", -4)
        assert found.evidence["missing"] == [str(receipt.positions[0].sequence)]


async def test_a_hole_whose_entries_nobody_has_any_more_is_still_named() -> None:
    async with shop() as it:
        receipt = await it.inventory.stock.deduct([Line("a", 4)], operation_id="d")
        await it.inventory.stock.deduct([Line("b", 1)], operation_id="e")
        await it.inventory.settled()
        await cut_out(it, receipt, 4)
        await it.engine.wire.client.xdel(it.key("journal"), f"1-{receipt.positions[0].sequence}")
        found = await it.one(sku="a")
        assert found.cause == "missing_journal"
        assert "not in the journal any more" in found.evidence["why"]


async def test_a_row_that_was_written_past_its_change_rows_is_the_ledgers_fault() -> None:
    async with shop() as it:
        rows = it.ledger.tables.stock
        async with it.ledger.engine.begin() as connection:
            await connection.execute(update(rows).where(rows.c.sku == "a").values(available=7, sold=3))
        assert sorted(await it.found(sku="a")) == [("books", "a", "ledger_books", 0, 0), ("stock", "a", "ledger_books", 3, 0)]


async def test_two_causes_at_once_are_both_in_the_evidence() -> None:
    async with shop() as it:
        await it.inventory.stock.deduct([Line("a", 4)], operation_id="d")
        await it.inventory.stock.deduct([Line("a", 1)], operation_id="d2")
        await it.inventory.settled()
        rows = it.ledger.tables.stock
        await it.engine.wire.client.hdel(it.key("results:0"), key_of("default", "d2"))
        await it.by_hand("a", 1)
        async with it.ledger.engine.begin() as connection:
            await connection.execute(update(rows).where(rows.c.sku == "a").values(available=3, sold=7))
        found = next(each for each in (await it.inventory.reconciler.run(sku="a")).open if each.what == "stock")
        assert found.evidence["together"] == ["ledger_books", "went_back"]


async def test_a_counter_of_a_sku_that_the_ledger_does_not_have_is_found() -> None:
    async with shop() as it:
        await it.by_hand("nobody", 7)
        assert await it.found() == [("stock", "nobody", "manual_redis", 7, 0)]
        assert await it.found(sku="nobody") == [("stock", "nobody", "manual_redis", 7, 0)]


async def test_a_counter_that_is_no_number_is_named() -> None:
    async with shop() as it:
        await it.engine.wire.client.hset(it.key("available"), A, "many")
        with pytest.raises(InventoryError, match=r"b'many' is not a whole number"):
            await it.inventory.reconciler.run()


async def test_a_redis_behind_the_watermark_is_a_partition_that_went_back() -> None:
    async with shop() as it:
        await it.inventory.stock.deduct([Line("a", 1)], operation_id="d")
        await it.inventory.settled()
        running = it.inventory._running()
        assert running.embedded_worker is not None
        await running.embedded_worker.stop()
        await it.engine.wire.client.hset(it.key("meta"), "seq", "1")
        done = await it.inventory.reconciler.run()
        assert [(each.what, each.cause, each.name) for each in done.open] == [("partition", "went_back", "0")]
        assert done.unopened == (0,)


async def is_closed(*_: Any) -> comparing.Look:
    return comparing.Look(closed="recovering")


async def test_what_was_found_is_not_gone_while_its_partition_is_recovering(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.by_hand("a", 1)
        await it.inventory.stock.reserve([Line("b", 1)], operation_id="lost", ttl=60)
        await it.engine.wire.client.zrem(it.key("expiry"), key_of("default", "lost"))
        await it.inventory.settled()
        running = it.inventory._running()
        assert running.embedded_worker is not None
        await running.embedded_worker.stop()
        sequence = await it.engine.wire.client.hget(it.key("meta"), "seq")
        assert len(await it.found()) == 2
        await it.engine.wire.client.hset(it.key("meta"), "seq", "1")
        assert [row[0] for row in await it.found()] == ["partition"]
        await it.engine.wire.client.hset(it.key("meta"), "seq", sequence)
        with monkeypatch.context() as patched:
            patched.setattr(comparing.Looking, "look", is_closed)
            done = await it.inventory.reconciler.run()
        assert (done.open, done.gone, done.unopened) == ((), 0, (0,))
        assert {each.what for each in await it.inventory.reconciler.discrepancies()} == {"stock", "hold", "partition"}


async def test_what_another_run_has_found_since_this_one_looked_is_not_ended_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop(rate=1.0) as it:
        look, looks = comparing.Looking.look, 0

        async def then_drifts(self: Any, partition: Any, places: Any) -> Any:
            nonlocal looks
            looks += 1
            seen = await look(self, partition, places)
            if looks == 1:
                await it.by_hand("a", 1)
                assert [row[1] for row in await it.found(sku="a")] == ["a"]
            return seen

        async def at_once(*_: Any) -> None: ...

        monkeypatch.setattr(comparing.Pace, "take", at_once)
        monkeypatch.setattr(comparing.Looking, "look", then_drifts)
        done = await it.inventory.reconciler.run()
        assert (done.skus, done.gone) == (2, 0)
        assert [each.sku for each in await it.inventory.reconciler.discrepancies()] == ["a"]


async def test_a_refused_sale_whose_void_is_still_to_be_made_is_no_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        rows, upkeep = it.ledger.tables.stock, it.engine.upkeep

        async def not_now(*_: Any) -> None:
            raise StockFrozen("not now", retry_after=0.1)

        with monkeypatch.context() as patched:
            patched.setattr(upkeep, "void", not_now)
            async with it.ledger.engine.begin() as connection:
                await connection.execute(update(rows).where(rows.c.sku == "a").values(available=0, sold=10))
            await it.inventory.stock.deduct([Line("a", 4)], operation_id="refused")
            await it.inventory.settled()
            async with it.ledger.engine.begin() as connection:
                await connection.execute(update(rows).where(rows.c.sku == "a").values(available=10, sold=0))
            assert (await it.inventory.stock.level("a")).available == 6
            (void,) = await it.ledger.comparing.refused(0, 1)
            assert void.state == "pending"
            assert await it.found() == []


# Holds --------------------------------------------------------------------------------------------------------------------------


async def test_a_hold_that_nothing_will_end_is_found() -> None:
    async with shop() as it:
        for name, ttl in (("lost", 60), ("fine", 60), ("endless", None)):
            await it.inventory.stock.reserve([Line("a", 1)], operation_id=name, ttl=ttl)
        await it.engine.wire.client.zrem(it.key("expiry"), key_of("default", "lost"))
        assert await it.found() == [("hold", "lost", "expiry_lost", 0, 0)]


async def test_a_hold_whose_end_was_put_off_past_its_own_record_is_found() -> None:
    async with shop() as it:
        await it.inventory.stock.reserve([Line("a", 1)], operation_id="late", ttl=60)
        await it.engine.wire.client.zincrby(it.key("expiry"), 3_600_000, key_of("default", "late"))
        assert [row[:3] for row in await it.found()] == [("hold", "late", "expiry_lost")]


@pytest.mark.parametrize(("due", "unending"), [(None, True), (5, False), (10**15, False)])
def test_a_pinned_hold_must_have_a_time_and_which_is_its_deciders_affair(due: int | None, unending: bool) -> None:
    record = holds.RS.join(("p", "1-2", "", "1700000000000", "o"))
    assert (holds.unending(record, due) is not None) == unending


async def test_a_hold_that_is_gone_from_redis_is_found_and_one_that_was_closed_is_not() -> None:
    async with shop() as it:
        for name in ("gone", "back", "closed"):
            await it.inventory.stock.reserve([Line("a", 1)], operation_id=name, ttl=60)
        await it.inventory.settled()
        client = it.engine.wire.client
        await client.hdel(it.key("reservations"), key_of("default", "gone"), key_of("default", "back"))
        await client.hdel(it.key("results:0"), key_of("default", "back"))
        await it.inventory.stock.release("closed")
        holds = [row[:3] for row in await it.found() if row[0] == "hold"]
        assert sorted(holds) == [("hold", "back", "went_back"), ("hold", "gone", "manual_redis")]


@pytest.mark.parametrize("second", ["there", "frozen", "another epoch"])
async def test_a_hold_is_only_gone_if_a_second_reading_of_the_same_epoch_says_so_too(second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.inventory.stock.reserve([Line("a", 1)], operation_id="r", ttl=60)
        await it.inventory.settled()
        read, readings = holds.read_holds, 0

        async def twice(partition: Any, keys: Any) -> Any:
            nonlocal readings
            readings += 1
            found = await read(partition, keys)
            if readings == 1 or second != "there":
                found = replace(found, records=[None])
            if readings == 2 and second != "there":
                found = replace(found, **({"state": "frozen"} if second == "frozen" else {"epoch": 2}))
            return found

        monkeypatch.setattr(holds, "read_holds", twice)
        assert await it.found() == []
        assert readings == 2


async def test_a_hold_that_was_taken_anew_under_its_id_is_another_one() -> None:
    async with shop() as it:
        await it.inventory.stock.reserve([Line("a", 1)], operation_id="r", ttl=60)
        await it.inventory.settled()
        (row,) = await it.ledger.comparing.holds([key_of("default", "r")])
        await it.engine.wire.client.hdel(it.key("reservations"), row.key)
        look = holds.HoldLook(it.inventory._running().ground, it.ledger.comparing)
        partition = it.engine.home("default")
        before = replace(row, position=row.position._replace(sequence=row.position.sequence - 1))
        assert await look.look(partition, [before]) == []
        assert [each.name for each in await look.look(partition, [row]) or []] == [row.key]


# The service's side -------------------------------------------------------------------------------------------------------------


async def test_a_write_past_the_sdk_in_the_services_table_is_found() -> None:
    async with shop(own=True, writes=True) as it:
        await it.inventory.stock.deduct([Line("a", 1)], operation_id="d")
        assert await it.found() == []
        it.own["a"] += 2
        assert await it.found() == [("service", "a", "service_table", 2, 0)]


async def test_a_service_that_writes_later_is_given_the_time() -> None:
    async with shop(own=True) as it:
        await it.inventory.stock.deduct([Line("a", 1)], operation_id="d")
        await it.inventory.settled()
        look = it.inventory.reconciler

        def follow(done: int, total: int) -> None:
            it.own["a"] = 9  # its own transaction comes while the comparison is at it

        assert (await look.run(progress=follow)).clean
        it.own["a"] = 5
        assert await it.found() == [("service", "a", "service_table", -4, 0)]


async def test_holds_that_the_service_lists_count_too() -> None:
    async with shop(own=True) as it:
        await it.inventory.stock.reserve([Line("a", 2)], operation_id="r", ttl=60)
        it.own["a"], it.listed["a"] = 8, [("r", 2)]
        assert await it.found() == []
        it.listed["a"] = [("r", 1)]
        assert await it.found() == [("service", "a", "service_table", 0, -1)]


async def test_stock_that_the_database_sells_has_no_side_in_redis() -> None:
    async with shop(admission="database", own=True) as it:
        await it.inventory.stock.deduct([Line("a", 1)], operation_id="d")
        it.own["a"] = 9
        done = await it.inventory.reconciler.run()
        assert (done.clean, done.skus, done.direct, done.service) == (True, 0, 2, 2)
        it.own["b"] = 4
        assert await it.found() == [("service", "b", "service_table", -6, 0)]


async def test_stock_that_changes_hands_meanwhile_is_left_to_the_next_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        read = comparing.read_counters

        async def then_withdraws(partition: Any, fields: Any) -> Any:
            counters = await read(partition, fields)
            monkeypatch.setattr(comparing, "read_counters", read)
            await it.inventory.stock.withdraw("default")
            await it.inventory.stock.deduct([Line("a", 1)], operation_id="d")
            await it.inventory.stock.adopt("default")
            return counters

        monkeypatch.setattr(comparing, "read_counters", then_withdraws)
        done = await it.inventory.reconciler.run()
        assert (done.open, sorted(done.moving)) == ((), [A, key_of("default", "b")])
        assert (await it.inventory.reconciler.run()).clean


# Scopes -------------------------------------------------------------------------------------------------------------------------


async def test_each_scope_looks_at_its_own_and_ends_only_what_it_has_looked_at() -> None:
    async with shop(partitions=2) as it:
        stock = it.inventory.stock
        await stock.restock([Line("a", 5)], merchant="m1", operation_id="po")
        await stock.deduct([Line("a", 1)], operation_id="d", order="o-1")
        await it.by_hand("a", 1)
        await it.by_hand("b", 1)
        assert [row[1] for row in await it.found(sku="a")] == ["a"]
        assert [row[1] for row in await it.found(order="o-1")] == ["a"]
        assert await it.found(merchant="m1") == []
        assert len(await it.inventory.reconciler.discrepancies()) == 1
        assert sorted(str(row[1]) for row in await it.found()) == ["a", "b"]
        await it.by_hand("a", -1)
        await it.by_hand("b", -1)
        assert (await it.inventory.reconciler.run(sku="a")).gone == 1
        assert [each.sku for each in await it.inventory.reconciler.discrepancies()] == ["b"]
        assert (await it.inventory.reconciler.run()).gone == 1
        assert [each.state for each in await it.inventory.reconciler.discrepancies(state="gone")] == ["gone", "gone"]


async def test_what_was_touched_is_compared_and_what_was_not_is_left() -> None:
    async with shop() as it:
        await it.inventory.settled()
        first = await it.inventory.reconciler.run(touched=True)
        assert first.skus == 2  # nothing was remembered: everything
        await it.inventory.stock.deduct([Line("a", 1)], operation_id="d")
        await it.inventory.settled()
        assert (await it.inventory.reconciler.run(touched=True)).skus == 1
        assert (await it.inventory.reconciler.run(touched=True)).skus == 0
        await it.inventory.stock.restock([Line("b", 1)], operation_id="po-2")
        assert (await it.inventory.reconciler.run(touched=True)).skus == 1


async def test_stock_that_changed_hands_is_left_to_the_next_run_of_what_was_touched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.inventory.settled()
        await it.inventory.reconciler.run(touched=True)
        await it.inventory.stock.deduct([Line("a", 1)], operation_id="d")
        await it.inventory.settled()
        read = comparing.read_counters

        async def then_comes_and_goes(partition: Any, fields: Any) -> Any:
            counters = await read(partition, fields)
            monkeypatch.setattr(comparing, "read_counters", read)
            await it.inventory.stock.withdraw("default")
            await it.inventory.stock.adopt("default")
            return counters

        monkeypatch.setattr(comparing, "read_counters", then_comes_and_goes)
        assert (await it.inventory.reconciler.run(touched=True)).moving == (A,)
        await it.by_hand("a", 1)
        assert [row[:2] for row in await it.found(touched=True)] == [("stock", "a")]


async def test_a_partition_that_could_not_be_looked_at_is_touched_until_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.inventory.settled()
        await it.inventory.reconciler.run(touched=True)
        await it.inventory.stock.deduct([Line("a", 1)], operation_id="d")
        await it.inventory.settled()
        with monkeypatch.context() as patched:
            patched.setattr(comparing.Looking, "look", is_closed)
            assert (await it.inventory.reconciler.run(touched=True)).unopened == (0,)
        assert (await it.inventory.reconciler.run(touched=True)).skus == 1


async def test_what_moves_redis_only_is_touched_as_well() -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        await it.inventory.settled()
        await it.inventory.reconciler.run(touched=True)
        await it.inventory.reconciler.correct(found.number, "counted", "kim")
        await it.inventory.settled()
        await it.by_hand("a", 1)
        assert [row[:2] for row in await it.found(touched=True)] == [("stock", "a")]


@pytest.mark.parametrize("why", ["closed", "moving"])
async def test_what_could_not_be_looked_at_twice_is_neither_clean_nor_gone(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        look, looks = comparing.Looking.look, 0

        async def once(self: Any, partition: Any, places: Any) -> Any:
            nonlocal looks
            looks += 1
            if looks == 1:
                return await look(self, partition, places)
            return comparing.Look(closed="recovering") if why == "closed" else comparing.Look(moving=[A])

        with monkeypatch.context() as patched:
            patched.setattr(comparing.Looking, "look", once)
            done = await it.inventory.reconciler.run()
        assert (done.clean, done.gone, done.moving) == (False, 0, (A,))
        assert [each.number for each in await it.inventory.reconciler.discrepancies()] == [found.number]


async def test_a_process_that_does_not_know_the_services_table_ends_nothing_that_was_found_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop(own=True, writes=True) as it:
        it.own["a"] += 2
        found = await it.one()
        with monkeypatch.context() as patched:
            patched.setattr(it.inventory.reconciler, "_reads", lambda: None)
            assert (await it.inventory.reconciler.run()).gone == 0
        assert [each.number for each in await it.inventory.reconciler.discrepancies()] == [found.number]


async def test_a_service_that_is_just_writing_has_not_made_up_its_difference() -> None:
    async with shop(own=True) as it:
        it.own["a"] = 5
        found = await it.one()

        async def sell() -> None:
            await it.inventory.stock.deduct([Line("a", 1)], operation_id="d")
            await it.inventory.settled()

        selling: list[Any] = []
        done = await it.inventory.reconciler.run(progress=lambda *_: selling.append(asyncio.ensure_future(sell())))
        await asyncio.gather(*selling)
        assert [each.number for each in await it.inventory.reconciler.discrepancies()] == [found.number]
        assert done.gone == 0


async def test_what_is_corrected_between_the_look_and_the_record_is_not_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found = await it.one()
        of = Causes.of

        async def then_corrects(self: Any, partition: Any, *drift: Any) -> Any:
            monkeypatch.setattr(Causes, "of", of)
            await it.inventory.reconciler.correct(found.number, "counted", "kim")
            return await of(self, partition, *drift)

        monkeypatch.setattr(Causes, "of", then_corrects)
        done = await it.inventory.reconciler.run()
        assert (done.open, done.moving) == ((), (A,))
        assert await it.inventory.reconciler.discrepancies() == []
        assert (await it.inventory.reconciler.run()).clean


async def test_what_is_being_corrected_while_one_looks_is_not_found_again_when_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop() as it:
        await it.by_hand("a", 3)
        found, register = await it.one(), it.ledger.register
        act = {"kind": "correct", "actor": "kim", "operation_id": "x", "details": {}}
        await register.turn(found.number, ["open"], "correcting", {}, act)
        of = Causes.of

        async def then_ends(self: Any, partition: Any, *drift: Any) -> Any:
            await it.by_hand("a", -3)
            await register.turn(found.number, ["correcting"], "corrected", {})
            return await of(self, partition, *drift)

        with monkeypatch.context() as patched:
            patched.setattr(Causes, "of", then_ends)
            assert (await it.inventory.reconciler.run()).open == ()
        assert (await it.inventory.reconciler.run()).clean


async def test_no_more_than_a_second_of_the_rate_is_read_at_once_and_second_looks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    async def take(self: Any, skus: int) -> None:
        taken.append(skus)

    monkeypatch.setattr(comparing.Pace, "take", take)
    async with shop(rate=2.5) as it:
        await it.inventory.stock.restock([Line(f"s{number}", 1) for number in range(5)], operation_id="more")
        await it.by_hand("a", 1)
        assert len(await it.found()) == 1
        assert taken == [2, 1, 2, 2, 1]
        taken.clear()
        done = await it.inventory.reconciler.run(touched=True)
        assert (done.skus, max(taken)) == (7, 2)


async def test_a_discrepancy_keeps_its_number_while_it_lasts_and_is_told_once() -> None:
    metrics = Recorded()
    async with shop(metrics=[metrics]) as it:
        heard: list[Any] = []
        it.inventory.on("drift")(heard.append)
        await it.by_hand("a", 1)
        numbers = [(await it.one()).number for _ in range(3)]
        await it.by_hand("a", 1)
        again = await it.one()
        assert ([*numbers, again.number], again.available) == ([numbers[0]] * 4, 2)
        assert [facts["number"] for facts in heard] == [numbers[0]]
        assert [each.labels for each in metrics.events if isinstance(each, Happened) and each.name == "drift"] == [
            {"reason": "manual_redis"}
        ]
        assert [each.open["manual_redis"] for each in metrics.events if isinstance(each, Compared)] == [1, 1, 1, 1]


async def test_pages_of_discrepancies_join_without_gap_or_repeat() -> None:
    async with shop() as it:
        skus = [f"s{number:02}" for number in range(25)]
        await it.inventory.stock.restock([Line(sku, 1) for sku in skus], operation_id="many")
        for sku in skus:
            await it.by_hand(sku, 1)
        await it.inventory.reconciler.run()
        seen: list[str | None] = []
        after = None
        while page := await it.inventory.reconciler.discrepancies(limit=10, after=after):
            seen += [each.sku for each in page]
            after = page[-1].number
        assert sorted(map(str, seen)) == skus


@pytest.mark.parametrize(
    ("method", "arguments", "field"),
    [
        ("run", {"merchant": ""}, "merchant"),
        ("run", {"sku": "a\x1fb"}, "sku"),
        ("run", {"touched": True, "sku": "a"}, "touched"),
        ("discrepancies", {"limit": 0}, "limit"),
        ("discrepancies", {"limit": True}, "limit"),
        ("discrepancies", {"state": "lost"}, "state"),
        ("discrepancies", {"cause": "magic"}, "cause"),
        ("propose", {"number": 77}, "number"),
        ("propose", {"number": "1"}, "number"),
        ("correct", {"number": 1, "reason": " ", "who": "me"}, "reason"),
        ("correct", {"number": 1, "reason": "why", "who": ""}, "who"),
        ("undo", {"number": 0, "reason": "why", "who": "me"}, "number"),
        ("audit", {"limit": 10**6}, "limit"),
    ],
)
async def test_bad_input_names_the_field(method: str, arguments: dict[str, Any], field: str) -> None:
    async with shop() as it:
        with pytest.raises(InvalidOperation) as refused:
            await getattr(it.inventory.reconciler, method)(**arguments)
        assert refused.value.field == field


def test_an_undo_in_a_missing_range_counts_as_the_inverse_of_what_it_undid() -> None:
    operation = ["undo", key_of("default", "u"), "f", [A, 2], [5], "", key_of("default", "r"), 0, '{"of": "reserve", "position": "1-1"}']
    (decoded,) = decode(0, 1, 1, encode("n", 1, [operation])).operations
    assert redis_deltas(decoded) == [(A, 2, -2)]
