"""Epochs: a partition that is not the one we know moves nothing; freeze and rebuild have one winner."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from inventory_sdk import errors
from inventory_sdk.ledger.protocol import Balance, EpochClosed, ReservationRow, Void
from inventory_sdk.model import Line, Position, key_of
from inventory_sdk.stock import batch
from inventory_sdk.stock.wire import ReplyLost
from tests.stock_kit import MERCHANT, SERVERS, FakeRebuilding, Shop, lines, on_client, shop_on


@pytest.fixture(params=SERVERS)
async def shop(request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Shop]:
    async with shop_on(request.param, namespace, {"a": 10, "b": 5}) as shop:
        await shop.stock.reserve(lines(a=1), operation_id="held")
        yield shop


STRANGE: dict[str, dict[str, str] | None] = {
    "missing": None,
    "frozen": {"state": "frozen"},
    "rebuilding": {"state": "rebuilding"},
    "frozen under another epoch": {"state": "frozen", "epoch": "2"},
    "on another server process": {"run_id": "f" * 40},
}


async def disturb(shop: Shop, change: dict[str, str] | None) -> None:
    meta = shop.key("meta")
    if change is None:
        await shop.client.delete(meta)
    else:
        await shop.client.hset(meta, mapping=change)


@pytest.mark.parametrize("knowing", [True, False], ids=["known before", "new process"])
@pytest.mark.parametrize("what", STRANGE)
async def test_a_partition_that_is_not_open_as_known_freezes_callers_and_moves_nothing(shop: Shop, what: str, knowing: bool) -> None:
    receipt = await shop.stock.deduct(lines(a=1), operation_id="before")
    await disturb(shop, STRANGE[what])
    before = await shop.snapshot()
    async with on_client(shop.client, shop.settings.namespace, ledger=shop.ledger) as fresh:
        stock = shop.stock if knowing else fresh.stock
        for act in (
            stock.deduct(lines(a=1)),
            stock.deduct(lines(a=1), operation_id="before"),
            stock.reserve(lines(a=1)),
            stock.adjust([Line("a", -1)]),
            stock.confirm("held"),
            stock.release("held"),
            stock.extend("held", ttl=1),
            stock.undo(receipt),
            stock.keep(receipt),
        ):
            with pytest.raises(errors.StockFrozen) as caught:
                await act
            assert caught.value.retry_after > 0
    assert await shop.snapshot() == before


@pytest.mark.parametrize("what", [what for what in STRANGE if "process" not in what])
async def test_stock_does_not_enter_while_the_partition_is_away(shop: Shop, what: str) -> None:
    await disturb(shop, STRANGE[what])
    before, entries = await shop.snapshot(), shop.ledger.entries
    with pytest.raises(errors.StockFrozen):
        await shop.stock.restock(lines(a=1), operation_id="po")
    assert (await shop.snapshot(), shop.ledger.entries) == (before, entries)


async def test_a_restock_whose_credit_meets_another_server_process_says_that_it_is_pending(shop: Shop) -> None:
    await disturb(shop, STRANGE["on another server process"])
    before = await shop.snapshot()
    with pytest.raises(errors.OutcomeUnknown, match="credit is pending") as caught:
        await shop.stock.restock(lines(a=1), operation_id="po")
    assert caught.value.operation_id == "po"
    assert await shop.snapshot() == before


async def test_who_finds_it_missing_or_on_another_process_tells_the_recovery(shop: Shop) -> None:
    for epoch, what, told in ((2, "on another server process", "run_id"), (3, "missing", "missing")):
        await shop.stock.level("a")
        await disturb(shop, STRANGE[what])
        with pytest.raises(errors.StockFrozen):
            await shop.stock.deduct(lines(a=1))
        assert told in [reason for _, reason in shop.refusals], shop.refusals
        await shop.client.delete(shop.key("meta"))
        await shop.open(epoch=epoch)
        await shop.stock.deduct(lines(a=1))
        shop.refusals.clear()


async def test_an_epoch_raised_meanwhile_is_followed_without_an_error(shop: Shop) -> None:
    await shop.stock.deduct(lines(a=1))
    async with on_client(shop.client, shop.settings.namespace, ledger=shop.ledger) as worker:
        await worker.open(epoch=2)
    receipt = await shop.stock.deduct(lines(a=1))
    assert receipt.positions == (Position(0, 2, 1),)


async def test_a_script_behind_its_time_moves_nothing_and_is_sent_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    await shop.stock.deduct(lines(a=1))
    partition = shop.engine.partitions[0]
    late = iter([1])
    real = partition.not_after
    monkeypatch.setattr(partition, "not_after", lambda: next(late, None) or real())
    receipt = await shop.stock.deduct(lines(a=1), operation_id="o1")
    assert not receipt.replayed
    assert await shop.counters("a") == (7, 1)
    assert len(await shop.journal()) == 3
    assert [event.reason for event in shop.metrics.events if hasattr(event, "what")] == ["late"]


async def test_voids_and_credits_of_another_epoch_are_refused(shop: Shop) -> None:
    await shop.stock.deduct(lines(a=2), operation_id="o1")
    void = Void(Position(0, 1, 2), 0, key_of(MERCHANT, "o1"), "deduct", "", (key_of(MERCHANT, "a"), 2, 0), True)
    before = await shop.snapshot()
    for epoch in (0, 2):
        with pytest.raises(errors.StockFrozen):
            await shop.engine.upkeep.void(0, epoch, void)
    assert await shop.snapshot() == before
    await shop.engine.upkeep.void(0, 1, void)
    await shop.engine.upkeep.void(0, 1, void)
    assert await shop.counters("a") == (9, 1)


async def test_a_void_freezes_the_sku_and_frees_the_id_of_a_refused_take(shop: Shop) -> None:
    receipt = await shop.stock.deduct(lines(a=2), operation_id="o1")
    mark = receipt.positions[0]
    a = key_of(MERCHANT, "a")
    await shop.engine.upkeep.void(0, 1, Void(mark, 0, key_of(MERCHANT, "o1"), "deduct", "", (a, 2, 0), True))
    before = await shop.snapshot()
    for act in (shop.stock.deduct(lines(a=1)), shop.stock.reserve(lines(a=1, b=1)), shop.stock.adjust([Line("a", -1)])):
        with pytest.raises(errors.StockFrozen, match="'a'"):
            await act
    assert await shop.snapshot() == before
    await shop.stock.deduct(lines(b=1))
    await shop.stock.confirm("held")
    assert await shop.stock.status("o1") is None
    (frozen,) = await shop.stock.frozen()
    assert (frozen.merchant, frozen.sku, frozen.by.epoch) == (MERCHANT, "a", 1)
    assert frozen.by.sequence > mark.sequence
    shop.ledger.rows[a] = [9, 0]
    await shop.stock.reopen("a")
    assert await shop.stock.frozen() == []
    assert not (await shop.stock.deduct(lines(a=2), operation_id="o1")).replayed


async def test_a_frozen_sku_stays_frozen_while_redis_and_ledger_differ(shop: Shop) -> None:
    a = key_of(MERCHANT, "a")
    await shop.engine.upkeep.void(0, 1, Void(Position(0, 1, 9), 0, "", "deduct", "", (a, 0, 0), True))
    shop.ledger.rows[a] = [7, 1]
    with pytest.raises(errors.QuantityMismatch):
        await shop.stock.reopen("a")
    with pytest.raises(errors.StockFrozen):
        await shop.stock.deduct(lines(a=1))


async def test_a_take_behind_a_void_in_one_batch_finds_its_sku_frozen(shop: Shop) -> None:
    a = key_of(MERCHANT, "a")
    answers = await shop.run(
        ["void", key_of(MERCHANT, "\x1fvoid\x1f1-1-0"), "void", [a, 1, 0], "", "", 0, "", "1-1", "f"],
        ["deduct", key_of(MERCHANT, "o1"), "f", [a, 1], "", "", 0, "", "", ""],
    )
    assert [answer[0] for answer in answers] == [0, 5]


# Freeze and rebuild ----------------------------------------------------------------------------------------------------------


async def test_an_epoch_only_rises(shop: Shop) -> None:
    upkeep = shop.engine.upkeep
    await shop.open(epoch=5)
    before = await shop.snapshot()
    for epoch in (1, 4, 5):
        with pytest.raises(EpochClosed):
            await upkeep.freeze(0, epoch)
    assert await shop.snapshot() == before
    await upkeep.freeze(0, 6)
    await upkeep.freeze(0, 6)
    state = await upkeep.journal_state(0)
    assert (state.epoch, state.sequence, state.state) == (6, 0, "frozen")


async def test_only_the_frozen_epoch_can_be_rebuilt(shop: Shop) -> None:
    before = await shop.snapshot()
    for epoch in (1, 2):
        with pytest.raises(EpochClosed):
            await shop.engine.upkeep.rebuild(0, epoch, FakeRebuilding(shop.ledger))
    assert await shop.snapshot() == before


class Paused(FakeRebuilding):
    """Stops between its chunks until it may go on."""

    def __init__(self, shop: Shop) -> None:
        super().__init__(shop.ledger)
        self.there, self.go = asyncio.Event(), asyncio.Event()

    async def balances(self, size: int) -> AsyncIterator[Sequence[Balance]]:
        async for rows in super().balances(1):
            yield rows
            self.there.set()
            await self.go.wait()


async def test_a_second_rebuilder_of_the_same_epoch_is_closed_out_and_spoils_nothing(shop: Shop) -> None:
    upkeep = shop.engine.upkeep
    shop.ledger.apply(await shop.journal())
    await upkeep.freeze(0, 2)
    first = Paused(shop)
    rebuilding = asyncio.create_task(upkeep.rebuild(0, 2, first))
    await first.there.wait()
    second = FakeRebuilding(shop.ledger)
    with pytest.raises(EpochClosed):
        await upkeep.rebuild(0, 2, second)
    assert not second.opened
    with pytest.raises(errors.StockFrozen):
        await shop.stock.deduct(lines(a=1))
    first.go.set()
    await rebuilding
    assert first.opened
    assert await shop.counters("a") == (9, 1)
    assert await shop.counters("b") == (5, 0)


async def test_every_chunk_follows_the_one_before_under_its_own_epoch(shop: Shop) -> None:
    partition = shop.engine.partitions[0]
    rows = json.dumps([key_of(MERCHANT, "a"), 1, 0])

    async def chunk(epoch: int, number: int, what: str) -> bool:
        arguments = [str(epoch), str(number), what, rows if what == "balances" else "[]"]
        return bool(await partition.wire.run("rebuild", partition.keys[:9], arguments))

    await shop.engine.upkeep.freeze(0, 2)
    assert not await chunk(2, 1, "balances"), "a rebuild begins with begin"
    assert not await chunk(1, 1, "begin")
    assert await chunk(2, 1, "begin")
    assert await chunk(2, 2, "balances")
    before = await shop.snapshot()
    for epoch, number, what in (
        (2, 1, "begin"),
        (2, 2, "balances"),
        (2, 4, "balances"),
        (1, 3, "balances"),
        (3, 3, "balances"),
        (2, 2, "open"),
    ):
        assert not await chunk(epoch, number, what)
    assert await shop.snapshot() == before
    assert await chunk(2, 3, "open")
    assert not await chunk(2, 4, "balances"), "it is open"
    assert await shop.counters("a") == (1, 0)


async def test_a_rebuilder_whose_epoch_is_over_opens_nothing(shop: Shop) -> None:
    upkeep = shop.engine.upkeep
    shop.ledger.apply(await shop.journal())
    await upkeep.freeze(0, 2)
    first = Paused(shop)
    rebuilding = asyncio.create_task(upkeep.rebuild(0, 2, first))
    await first.there.wait()
    await upkeep.freeze(0, 3)
    first.go.set()
    with pytest.raises(EpochClosed):
        await rebuilding
    assert not first.opened
    assert (await upkeep.journal_state(0)).state == "frozen"
    await upkeep.rebuild(0, 3, FakeRebuilding(shop.ledger))
    assert await shop.counters("a") == (9, 1)


async def test_a_ledger_that_can_not_open_leaves_redis_closed(shop: Shop) -> None:
    class Failing(FakeRebuilding):
        async def open(self) -> None:
            raise ConnectionError("the database went away")

    await shop.engine.upkeep.freeze(0, 2)
    with pytest.raises(ConnectionError):
        await shop.engine.upkeep.rebuild(0, 2, Failing(shop.ledger))
    with pytest.raises(errors.StockFrozen):
        await shop.stock.deduct(lines(a=1))


async def rebuilt(shop: Shop, epoch: int = 2, **options: Any) -> None:
    """The ledger has applied everything, Redis is emptied and filled from it."""
    shop.ledger.apply(await shop.journal())
    await shop.engine.upkeep.freeze(0, epoch)
    await shop.engine.upkeep.rebuild(0, epoch, FakeRebuilding(shop.ledger), **options)


async def test_after_a_rebuild_everything_is_as_before(shop: Shop) -> None:
    stock = shop.stock
    first = await stock.reserve(lines(a=4, b=2), operation_id="r1", order="77", ttl=600)
    await stock.confirm("r1", lines=lines(a=1), operation_id="c1")
    await stock.release("r1", lines=lines(a=1), operation_id="b1")
    await stock.reserve(lines(b=1), operation_id="forever", ttl=None)
    sold = await stock.deduct(lines(a=2), operation_id="d1")
    lost = await stock.adjust([Line("a", -1)], operation_id="w1")
    undone = await stock.deduct(lines(a=1), operation_id="d2")
    await stock.undo(undone)
    po = await stock.restock(lines(a=3), operation_id="po")
    skus, names = ("a", "b"), ("r1", "forever", "held")
    levels = [await shop.counters(sku) for sku in skus]
    holds = [await stock.reservation(name) for name in names]
    expiry = await shop.client.zrange(shop.key("expiry"), 0, -1, withscores=True)

    await rebuilt(shop)

    assert [await shop.counters(sku) for sku in skus] == levels
    found = [await stock.reservation(name) for name in names]
    assert [replace(hold, expires_at=None) for hold in found if hold] == [replace(hold, expires_at=None) for hold in holds if hold]
    later = await shop.client.zrange(shop.key("expiry"), 0, -1, withscores=True)
    assert [key for key, _ in later] == [key for key, _ in expiry]
    (given,) = {due - was for (_, due), (_, was) in zip(later, expiry, strict=True)}
    assert given >= 0, "all holds get the time of the freeze"
    before = await shop.snapshot()
    assert await stock.reserve(lines(a=4, b=2), operation_id="r1") == replace(first, replayed=True)
    assert await stock.deduct(lines(a=2), operation_id="d1") == replace(sold, replayed=True)
    assert await stock.adjust([Line("a", -1)], operation_id="w1") == replace(lost, replayed=True)
    assert (await stock.confirm("r1", lines=lines(a=1), operation_id="c1")).replayed
    with pytest.raises(errors.OperationConflict):
        await stock.deduct(lines(a=3), operation_id="d1")
    assert await shop.snapshot() == before
    assert not (await stock.deduct(lines(a=1), operation_id="d2")).replayed
    assert (await stock.restock(lines(a=3), operation_id="po")).positions == po.positions
    await stock.confirm("r1")
    assert await shop.counters("b") == (2, 1)


async def test_a_reserve_that_had_been_closed_stays_closed_after_a_rebuild(shop: Shop) -> None:
    stock = shop.stock
    await stock.reserve(lines(a=1), operation_id="back")
    await stock.release("back")
    await stock.reserve(lines(a=1), operation_id="late")
    await shop.expire("late")
    await rebuilt(shop)
    for name, state in (("back", "released"), ("late", "expired")):
        with pytest.raises(errors.ReservationClosed) as caught:
            await stock.reserve(lines(a=1), operation_id=name)
        assert caught.value.state == state
        with pytest.raises(errors.ReservationClosed):
            await stock.confirm(name)
    assert await shop.counters("a") == (9, 1)


async def test_a_confirmed_reservation_still_answers_its_receipt_after_a_rebuild(shop: Shop) -> None:
    first = await shop.stock.reserve(lines(a=1), operation_id="r1")
    sold = await shop.stock.confirm("r1")
    await rebuilt(shop)
    assert await shop.stock.reserve(lines(a=1), operation_id="r1") == replace(first, replayed=True)
    assert await shop.stock.confirm("r1") == replace(sold, replayed=True)
    with pytest.raises(errors.ReservationClosed):
        await shop.stock.release("r1")


async def test_a_kept_take_is_kept_after_a_rebuild(shop: Shop) -> None:
    receipt = await shop.stock.deduct(lines(a=1), operation_id="d1")
    await shop.stock.keep(receipt)
    shop.ledger.apply([entry for entry in await shop.journal() if entry.operations[0].kind != "keep"])
    key = key_of(MERCHANT, "d1")
    shop.ledger.operations[key] = replace(shop.ledger.operations[key], kept=True)
    await shop.engine.upkeep.freeze(0, 2)
    await shop.engine.upkeep.rebuild(0, 2, FakeRebuilding(shop.ledger))
    assert not await shop.stock.undo(receipt)


async def test_a_take_of_the_old_epoch_can_be_undone_after_a_rebuild(shop: Shop) -> None:
    receipt = await shop.stock.reserve(lines(a=2), operation_id="r1")
    await rebuilt(shop)
    assert await shop.stock.undo(receipt)
    assert await shop.counters("a") == (9, 1)


async def test_a_rebuild_gives_holds_the_time_that_the_freeze_took(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=2), operation_id="r1", ttl=600)
    await shop.stock.reserve(lines(a=2), operation_id="r2", ttl=None)
    before = await shop.stock.reservation("r1")
    assert before is not None
    assert before.expires_at is not None
    shop.ledger.apply(await shop.journal())
    await shop.engine.upkeep.freeze(0, 2)
    frozen_at = int(await shop.client.hget(shop.key("meta"), "frozen_at"))
    await shop.client.hset(shop.key("meta"), "frozen_at", frozen_at - 60_000)
    await shop.engine.upkeep.freeze(0, 3)  # a recovery that follows an unfinished one
    await shop.engine.upkeep.rebuild(0, 3, FakeRebuilding(shop.ledger))
    after = await shop.stock.reservation("r1")
    assert after is not None
    assert after.expires_at is not None
    assert 60 <= after.expires_at - before.expires_at < 120
    assert await shop.client.zscore(shop.key("expiry"), key_of(MERCHANT, "r1")) == round(after.expires_at * 1000)
    assert await shop.client.zscore(shop.key("expiry"), key_of(MERCHANT, "r2")) is None
    assert shop.ledger.holds[key_of(MERCHANT, "r1")].expires_at == round(after.expires_at * 1000), "the next recovery begins from it"


async def test_a_rebuild_gives_holds_the_time_that_redis_was_away_before_anybody_could_freeze_it(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=2), operation_id="r1", ttl=600)
    before = await shop.stock.reservation("r1")
    await rebuilt(shop, down_ms=500_000)
    after = await shop.stock.reservation("r1")
    assert before is not None
    assert after is not None
    assert before.expires_at is not None
    assert after.expires_at == pytest.approx(before.expires_at + 500)


async def test_results_older_than_ten_minutes_come_behind_the_opening_each_once(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.stock.upkeep.CHUNK", 3)
    stock, upkeep = shop.stock, shop.engine.upkeep
    for number in range(7):
        await stock.deduct(lines(a=1), operation_id=f"old-{number}")
    await stock.deduct(lines(a=1), operation_id="young")
    shop.ledger.apply(await shop.journal())
    for key, row in shop.ledger.operations.items():
        if "old" in key:
            shop.ledger.operations[key] = replace(row, at_ms=row.at_ms - 700_000)
    await upkeep.freeze(0, 2)
    await upkeep.rebuild(0, 2, FakeRebuilding(shop.ledger))
    before = await shop.snapshot()
    assert (await stock.deduct(lines(a=1), operation_id="young")).replayed
    assert await shop.snapshot() == before
    assert len(before[shop.key("results:0")]) == 2
    ledger: Any = shop.ledger
    began = before[shop.key("meta")][b"older"].decode()
    assert await upkeep.restore_older(0, 2, ledger)
    assert len((await shop.snapshot())[shop.key("results:1")]) == 3
    receipt = await stock.deduct(lines(a=1), operation_id="old-6")
    assert receipt.replayed, "the newest come first"
    assert await stock.undo(receipt)
    # Another worker that had read the same chunk, and was slower.
    again = json.dumps([began, "", key_of(MERCHANT, "old-6"), "its answer"])
    partition = shop.engine.partitions[0]
    assert not await partition.wire.run("rebuild", partition.keys[:9], ["2", "0", "older", again])
    while await upkeep.restore_older(0, 2, ledger):
        pass
    assert not await upkeep.restore_older(0, 2, ledger)
    assert len((await shop.snapshot())[shop.key("results:1")]) == 6, "a chunk that was written is not written again"
    assert (await stock.deduct(lines(a=1), operation_id="old-0")).replayed
    assert not (await stock.deduct(lines(a=1), operation_id="old-6")).replayed
    await upkeep.freeze(0, 3)
    assert not await upkeep.restore_older(0, 2, ledger)


async def test_a_pinned_hold_is_pinned_after_a_rebuild(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.stock.engine.PIN_WAITS", ())
    receipt = await shop.stock.reserve(lines(a=2), operation_id="r1", ttl=None)
    shop.ledger.apply(await shop.journal())
    key = key_of(MERCHANT, "r1")
    row: ReservationRow = shop.ledger.holds[key]
    shop.ledger.holds[key] = replace(row, pinned=True)
    await shop.engine.upkeep.freeze(0, 2)
    await shop.engine.upkeep.rebuild(0, 2, FakeRebuilding(shop.ledger))
    with pytest.raises(errors.Overloaded):
        await shop.stock.confirm("r1")
    assert await shop.client.zscore(shop.key("expiry"), key) is not None
    await shop.stock.settle_pinned(receipt, "release")


async def test_a_frozen_sku_is_open_after_a_rebuild(shop: Shop) -> None:
    await shop.client.hset(shop.key("frozen"), key_of(MERCHANT, "a"), "1-1")
    await rebuilt(shop)
    await shop.stock.deduct(lines(a=1))


async def test_other_partitions_go_on_while_one_is_frozen(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {"a": 10}, partitions=4) as shop:
        other = next(name for name in ("m2", "m3", "m4", "m5") if shop.engine.home(name) is not shop.engine.home(MERCHANT))
        shop.ledger.stocked(other, a=10)
        await shop.engine.upkeep.freeze(shop.engine.home(MERCHANT).number, 2)
        with pytest.raises(errors.StockFrozen):
            await shop.stock.deduct(lines(a=1))
        assert (await shop.stock.deduct(lines(a=1), merchant=other)).lines[0].remaining == 9


async def test_a_rebuild_of_many_rows_comes_in_chunks(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.stock.upkeep.CHUNK", 7)
    shop.ledger.stocked(**{f"s{n}": n for n in range(50)})
    await asyncio.gather(*(shop.stock.reserve([Line(f"s{n}", 1)], operation_id=f"r{n}") for n in range(1, 40)))
    await asyncio.gather(*(shop.stock.deduct([Line(f"s{n}", 1)], operation_id=f"d{n}") for n in range(10, 40)))
    await rebuilt(shop)
    found = await shop.stock.levels([f"s{n}" for n in range(50)])
    assert {sku: (level.available, level.reserved) for sku, level in found.items()} == {
        f"s{n}": (n - (1 <= n < 40) - (10 <= n < 40), int(1 <= n < 40)) for n in range(50)
    }
    assert int(await shop.client.hget(shop.key("meta"), "chunk")) > 20


async def test_a_process_that_has_seen_more_than_redis_says_is_frozen_and_tells_it(shop: Shop) -> None:
    partition = shop.engine.partitions[0]
    await partition.hello()
    partition.sequence += 5
    partition.forget()
    with pytest.raises(errors.StockFrozen):
        await partition.known()
    assert await shop.client.hget(shop.key("meta"), "state") == b"suspect"


async def test_a_redis_that_is_emptied_while_its_journal_is_searched_says_nothing_of_a_lost_reply(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read, lost = shop.engine.wire.run, batch.read_entries, list[str]()

    async def losing(name: str, *arguments: Any) -> Any:
        answer = await run(name, *arguments)
        if name == "batch" and not lost:
            lost.append(name)
            raise ReplyLost("cut off")
        return answer

    async def emptied(*arguments: Any) -> Any:
        await shop.client.delete(*shop.engine.partitions[0].keys)
        return await read(*arguments)

    monkeypatch.setattr(shop.engine.wire, "run", losing)
    monkeypatch.setattr(shop.engine.wire, "timeout", 0.05)
    monkeypatch.setattr(batch, "read_entries", emptied)
    with pytest.raises(errors.OutcomeUnknown):
        await shop.stock.deduct(lines(a=1), operation_id="o1")
