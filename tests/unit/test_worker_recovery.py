"""A Redis that is new, empty, foreign or back in time: one winner, what survived is applied, what is lost is named."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from worker_fakes import Shop, body, open_shop, until

from inventory_sdk.errors import InventoryError, StockFrozen
from inventory_sdk.metrics import Happened
from inventory_sdk.sync.queues.protocol import Unroutable
from inventory_sdk.sync.recovery import open_first


@pytest.fixture
async def shop() -> Shop:
    return await open_shop()


def frozen_for(shop: Shop) -> list[str]:
    return [event.labels["why"] for event in shop.facts.events if isinstance(event, Happened) and event.name == "frozen"]


def lost(shop: Shop) -> list[int]:
    return [sequence for name, facts in shop.facts.told if name == "lost" for sequence in facts["sequences"]]


async def open_again(shop: Shop, epoch: int = 2) -> None:
    await until(lambda: shop.redis.state == "open" and shop.redis.epoch == epoch and "recovered" in shop.facts.names())


async def test_the_first_start_opens_epoch_one_and_work_begins() -> None:
    shop = Shop()
    shop.redis.empty()
    async with shop.worker() as worker:
        await worker.ready()
        assert (shop.redis.epoch, shop.redis.state) == (1, "open")
        shop.redis.write(1)
        await shop.publish(1)
        await until(lambda: shop.queue.acked == [1])
    assert shop.redis.calls[:2] == ["freeze 1", "rebuild 1"]


async def test_many_processes_starting_at_once_open_the_partition_once() -> None:
    shop = Shop()
    shop.redis.empty()
    redis: Any = shop.redis
    ledger: Any = shop.ledger
    rows = await asyncio.gather(*(open_first(redis, ledger, shop.queue, 0, poll=0.001) for _ in range(8)))
    assert {(row.epoch, row.state) for row in rows} == {(1, "open")}
    assert shop.redis.calls == ["freeze 1", "rebuild 1"]


async def test_who_waits_too_long_for_the_opener_is_told_so() -> None:
    shop = Shop()
    await shop.ledger.raise_epoch(0, 0)
    redis: Any = shop.redis
    ledger: Any = shop.ledger
    with pytest.raises(StockFrozen):
        await open_first(redis, ledger, shop.queue, 0, timeout=0.01, poll=0.001)


async def test_an_emptied_redis_is_rebuilt_at_a_higher_epoch_and_the_old_one_is_fenced(shop: Shop) -> None:
    for sequence in range(1, 4):
        shop.redis.write(sequence)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 3)
        shop.redis.empty()
        await open_again(shop)
        with pytest.raises(Unroutable):
            await shop.queue.publish(0, 1, 4, body(4), 1.0)
        shop.redis.write(1)
        await shop.publish(1)
        await until(lambda: (2, 1) in shop.ledger.applied)
    assert frozen_for(shop) == ["meta_missing"]
    assert lost(shop) == []


async def test_what_only_the_queue_still_has_is_applied_before_the_rebuild_and_the_gap_is_named(shop: Shop) -> None:
    worker = shop.worker(idle=60)
    await worker.start()
    await worker.ready()
    await worker.stop()
    texts = {sequence: shop.redis.write(sequence) for sequence in range(1, 8)}
    for sequence in (1, 2, 5, 7):
        await shop.queue.publish(0, 1, sequence, texts[sequence], 1.0)
    shop.redis.empty()
    async with shop.worker():
        await open_again(shop)
        await until(lambda: lost(shop) == [3, 4, 6])
    assert shop.ledger.applied == [(1, 1), (1, 2), (1, 5), (1, 7)]
    assert shop.ledger.lost == [3, 4, 6]
    assert sorted(shop.queue.acked) == [1, 2, 5, 7]
    assert shop.facts.names().count("lost") == 2


async def test_another_redis_process_with_the_journal_intact_loses_nothing(shop: Shop) -> None:
    for sequence in range(1, 701):
        shop.redis.write(sequence)
    shop.redis.run_id_known = False
    async with shop.worker():
        await open_again(shop)
    assert frozen_for(shop) == ["other_server"]
    assert shop.ledger.applied == [(1, sequence) for sequence in range(1, 701)]
    assert lost(shop) == []


async def test_a_redis_that_went_back_behind_the_watermark_is_recovered(shop: Shop) -> None:
    for sequence in range(1, 16):
        shop.redis.write(sequence)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 15)
        for sequence in range(11, 16):
            del shop.redis.journal[1, sequence]
        shop.redis.sequence = 10
        await open_again(shop)
    assert frozen_for(shop) == ["went_back"]


async def test_a_message_beyond_a_redis_that_went_back_is_not_lost(shop: Shop) -> None:
    async with shop.worker() as worker:
        await worker.ready()
        await shop.queue.publish(0, 1, 1, body(1), 1.0)
        await shop.queue.publish(0, 1, 3, body(3), 1.0)
        await open_again(shop)
    assert shop.ledger.applied == [(1, 1), (1, 3)]
    assert lost(shop) == [2]


async def test_a_ledger_that_went_back_behind_the_kept_journal_is_named_and_recovered(shop: Shop) -> None:
    for sequence in range(5, 9):
        shop.redis.write(sequence)
    shop.ledger.open_at(0, 1, applied=2)
    async with shop.worker():
        await open_again(shop)
        await until(lambda: lost(shop) == [3, 4])
    assert frozen_for(shop) == ["ledger_went_back"]
    assert shop.ledger.applied == [(1, 5), (1, 6), (1, 7), (1, 8)]


@pytest.mark.parametrize("moves", [True, False], ids=["while sales go on", "while nothing moves"])
@pytest.mark.parametrize("who", ["the same worker", "a new worker"])
async def test_a_ledger_that_went_back_is_frozen_named_and_caught_up_from_the_journal(
    shop: Shop, who: str, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inventory_sdk.sync.follower.LOOK", 0.01)
    for sequence in range(1, 6):
        shop.redis.write(sequence)
    worker = shop.worker()
    await worker.start()
    await until(lambda: shop.ledger.watermark() == 5 and shop.redis.told_applied == 5)
    if who == "a new worker":
        await worker.stop()
        worker = shop.worker()
    shop.ledger.open_at(0, 1, applied=3)
    if moves:
        shop.redis.write(6)
    if who == "a new worker":
        await worker.start()
    await open_again(shop)
    await worker.stop()
    assert shop.ledger.applied[5:] == [(1, 4), (1, 5)] + [(1, 6)] * moves
    assert frozen_for(shop) == ["ledger_went_back"]
    assert lost(shop) == []


async def test_a_ledger_of_an_earlier_epoch_is_caught_up_with_what_the_journal_keeps_of_the_later_ones(shop: Shop) -> None:
    shop.redis.write(1)
    shop.redis.epoch, shop.redis.sequence = 3, 0
    shop.redis.write(1), shop.redis.write(2)
    async with shop.worker():
        await open_again(shop, 4)
    assert frozen_for(shop) == ["foreign_epoch"]
    assert shop.ledger.applied == [(1, 1), (3, 1), (3, 2)]


async def test_a_redis_of_a_higher_epoch_gets_one_that_is_higher_still(shop: Shop) -> None:
    shop.redis.epoch = 5
    async with shop.worker():
        await open_again(shop, 6)
    assert frozen_for(shop) == ["foreign_epoch"]


async def test_a_fork_freezes_is_named_and_the_ledgers_side_stands(shop: Shop) -> None:
    shop.redis.write(1)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 1)
        await shop.publish(1, text=body(1, nonce="another"))
        await open_again(shop)
        await until(lambda: shop.queue.acked == [1])
    assert frozen_for(shop) == ["fork"]
    assert "fork" in shop.facts.names()
    assert set(shop.ledger.operations.values()) == {1}


async def test_an_entry_that_the_open_journal_does_not_have_is_a_loss_only_after_redis_said_so(shop: Shop) -> None:
    async with shop.worker() as worker:
        await worker.ready()
        shop.redis.write(1), shop.redis.write(3)
        await until(lambda: shop.ledger.applied == [(1, 1), (1, 3)])
        await open_again(shop)
        await until(lambda: lost(shop) == [2])
    assert frozen_for(shop) == ["entry_missing"]


async def test_an_abandoned_recovery_is_taken_over_with_a_higher_epoch(shop: Shop) -> None:
    shop.redis.write(1), shop.redis.write(2)
    await shop.publish(1)
    await shop.ledger.raise_epoch(0, 1)
    shop.redis.epoch, shop.redis.sequence, shop.redis.state = 2, 0, "frozen"
    async with shop.worker():
        await open_again(shop, 3)
    assert shop.ledger.applied == [(1, 1), (1, 2)]
    assert {epoch: row.state for epoch, row in shop.ledger.rows[0].items()} == {1: "closed", 2: "closed", 3: "open"}


async def test_a_redis_that_was_left_frozen_after_the_ledger_opened_is_rebuilt_again(shop: Shop) -> None:
    shop.redis.state = "frozen"
    async with shop.worker():
        await open_again(shop)
    assert frozen_for(shop) == ["left_frozen"]


async def test_a_recovery_that_another_process_does_is_followed_not_repeated(shop: Shop) -> None:
    shop.redis.write(1)
    async with shop.worker(take_over=60):
        await until(lambda: shop.ledger.watermark() == 1)
        await shop.ledger.raise_epoch(0, 1)
        await shop.redis.freeze(0, 2)
        await asyncio.sleep(0)
        await shop.queue.bind(0, 2)
        rows = shop.ledger.rows[0]
        rows[1], rows[2] = replace(rows[1], state="closed"), replace(rows[2], state="open")
        shop.redis.state = "open"
        shop.redis.write(1)
        await until(lambda: (2, 1) in shop.ledger.applied)
    assert frozen_for(shop) == []


async def test_a_recovery_survives_servers_that_come_and_go_in_the_middle(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {"rebuild": 2, "freeze": 2}

    def failing(name: str) -> None:
        real = getattr(shop.redis, name)

        async def flaky(*arguments: Any) -> None:
            if faults[name]:
                faults[name] -= 1
                raise ConnectionError(name)
            await real(*arguments)

        monkeypatch.setattr(shop.redis, name, flaky)

    failing("rebuild")
    failing("freeze")
    shop.redis.write(1)
    shop.redis.run_id_known = False
    async with shop.worker():
        await until(lambda: shop.redis.state == "open" and "recovered" in shop.facts.names())
    assert shop.ledger.applied == [(1, 1)]
    assert shop.redis.epoch == max(shop.ledger.rows[0]) == 4, "every rebuild attempt has an epoch of its own"


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.sync.follower.LATE", 0.01)


@pytest.mark.usefixtures("hasty")
async def test_an_entry_that_comes_after_its_epoch_was_closed_is_dropped_if_known_else_sent_again_under_its_id(shop: Shop) -> None:
    shop.redis.write(1)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 1)
        shop.redis.empty()
        await open_again(shop)
        shop.redis.refused["m\x1fo4-0"] = "insufficient"
        await shop.queue.deliver(0, 1, 4, body(4, operations=2), 1.0)
        await shop.queue.deliver(0, 1, 1, body(1), 1.0)
        await shop.queue.deliver(0, 1, 1, body(9), 1.0)
        await shop.queue.deliver(0, 1, 4, body(4, operations=2), 1.0)
        await until(lambda: len(shop.queue.acked) == 4)
    assert shop.redis.resubmitted == ["m\x1fo9-0", "m\x1fo4-0", "m\x1fo4-1"], "in the order of their entries, each once"
    assert shop.ledger.applied == [(1, 1)]
    assert shop.ledger.rejected == [("m\x1fo4-0", "insufficient")]
    told = [facts for name, facts in shop.facts.told if name == "rejected"]
    assert [(facts["operation_id"], facts["position"].sequence) for facts in told] == [("o4-0", 4)]


@pytest.mark.usefixtures("hasty")
async def test_a_late_entry_is_not_acknowledged_before_it_is_settled(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    async with shop.worker():
        await until(lambda: shop.redis.signs)
        shop.redis.empty()
        await open_again(shop)
        faults = [ConnectionError("away"), StockFrozen("frozen", 0.1)]
        real = shop.redis.resubmit

        async def flaky(*arguments: Any) -> str:
            if faults:
                raise faults.pop()
            return await real(*arguments)

        monkeypatch.setattr(shop.redis, "resubmit", flaky)
        await shop.queue.deliver(0, 1, 4, body(4), 1.0)
        await until(lambda: faults == [])
        assert shop.queue.acked == []
        await until(lambda: shop.queue.acked == [4])
    assert shop.redis.resubmitted == ["m\x1fo4-0"]


@pytest.mark.usefixtures("hasty")
async def test_a_redis_that_went_back_and_sold_on_has_its_other_entries_sent_again(shop: Shop) -> None:
    for sequence in range(1, 8):
        shop.redis.write(sequence)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 7)
    for sequence in (5, 6):
        shop.redis.journal[1, sequence] = body(sequence + 100, nonce=f"other-{sequence}")
    del shop.redis.journal[1, 7]
    shop.redis.sequence = 6
    async with shop.worker():
        await until(lambda: shop.redis.resubmitted == ["m\x1fo105-0", "m\x1fo106-0"])
    assert frozen_for(shop) in (["went_back"], ["ledger_went_back"])
    assert shop.facts.names().count("fork") >= 2
    assert set(shop.ledger.operations.values()) == {1}


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("first", ["journal's", "queue's"])
async def test_of_a_fork_that_nobody_had_applied_both_sides_count(shop: Shop, first: str) -> None:
    worker = shop.worker(idle=60)
    await worker.start()
    await worker.ready()
    await worker.stop()
    shop.redis.write(2, body(2, nonce="journal's"))
    await shop.queue.publish(0, 1, 2, body(20, nonce="queue's"), 1.0)
    if first == "queue's":
        shop.redis.down = ConnectionError("away")
    async with shop.worker():
        if first == "queue's":
            await until(lambda: shop.facts.retried().count("redis") > 2)
            shop.redis.down = None
        await until(lambda: shop.redis.resubmitted and shop.queue.acked[-1:] == [2])
    assert shop.ledger.applied == [(1, 2)]
    assert lost(shop) == [1]
    both = ["m\x1fo2-0", "m\x1fo20-0"]
    assert [*shop.ledger.operations, *shop.redis.resubmitted] == (both if first == "journal's" else both[::-1])


async def test_a_partition_that_a_caller_closed_for_what_it_saw_is_recovered_and_the_loss_named(shop: Shop) -> None:
    for sequence in range(1, 4):
        shop.redis.write(sequence)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 3)
        shop.redis.state, shop.redis.why, shop.redis.seen = "suspect", "went_back", 6
        await open_again(shop)
        await until(lambda: lost(shop) == [4, 5, 6])
    assert frozen_for(shop) == ["went_back"]


async def test_entries_that_redis_had_shown_and_nobody_can_bring_are_named(shop: Shop) -> None:
    shop.redis.write(1)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 1)
        shop.ledger.down = ConnectionError("away")
        shop.redis.write(2), shop.redis.write(3)
        reads = len(shop.redis.reads)
        await until(lambda: len(shop.redis.reads) > reads or shop.facts.retried().count("ledger") > 3)
        await asyncio.sleep(0.05)
        shop.redis.empty()
        shop.ledger.down = None
        await open_again(shop)
    assert sorted({*lost(shop), *(sequence for _, sequence in shop.ledger.applied)}) == [1, 2, 3]


async def test_the_end_of_an_epoch_waits_for_those_who_still_wait_for_a_confirm(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    marked = asyncio.Event()
    real = shop.queue.mark

    async def mark(*arguments: Any) -> None:
        marked.set()
        await real(*arguments)

    monkeypatch.setattr(shop.queue, "mark", mark)
    async with shop.worker(publish_timeout=0.3):
        await until(lambda: shop.redis.signs)
        shop.redis.empty()
        await until(lambda: shop.redis.state == "frozen")
        # Published before the fence, and only now let in by the broker.
        await shop.queue.deliver(0, 1, 1, body(1), 1.0)
        assert not marked.is_set()
        await open_again(shop)
    assert shop.ledger.applied == [(1, 1)]


async def test_a_slow_recovery_that_gives_signs_is_left_alone_and_a_silent_one_is_followed(shop: Shop) -> None:
    await shop.ledger.raise_epoch(0, 1)
    shop.redis.epoch, shop.redis.state = 2, "frozen"
    async with shop.worker(take_over=0.1):
        for _ in range(30):
            await shop.redis.heartbeat(0, "another")
            await asyncio.sleep(0.01)
        assert max(shop.ledger.rows[0]) == 2, "it was left alone"
        await open_again(shop, 3)


async def test_who_takes_over_from_one_that_was_only_slow_finds_its_work_done(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    await shop.ledger.raise_epoch(0, 1)
    shop.redis.epoch, shop.redis.state = 2, "frozen"
    real = shop.ledger.raise_epoch

    async def late(*arguments: Any, **named: Any) -> Any:
        # It opened while we waited for its lock.
        rows = shop.ledger.rows[0]
        rows[1], rows[2] = replace(rows[1], state="closed"), replace(rows[2], state="open")
        shop.redis.state = "open"
        await shop.queue.bind(0, 2)
        return await real(*arguments, **named)

    monkeypatch.setattr(shop.ledger, "raise_epoch", late)
    async with shop.worker() as worker:
        await worker.ready()
    assert max(shop.ledger.rows[0]) == 2
    assert frozen_for(shop) == []


async def test_a_new_ledger_over_an_old_namespace_is_told_the_way_out_and_touches_nothing() -> None:
    shop = Shop()
    shop.redis.epoch, shop.redis.state = 4, "open"
    redis: Any = shop.redis
    ledger: Any = shop.ledger
    with pytest.raises(InventoryError, match=r"another database.*new namespace"):
        await open_first(redis, ledger, shop.queue, 0)
    async with shop.worker():
        await until(lambda: shop.facts.retried().count("open") > 3)
    assert (shop.redis.epoch, shop.redis.state, shop.redis.calls) == (4, "open", [])
    assert shop.ledger.rows.get(0) is None


async def test_an_unreadable_entry_of_a_closed_epoch_is_held_not_counted_as_lost(shop: Shop) -> None:
    shop.redis.write(1, "rubbish"), shop.redis.write(2)
    shop.redis.run_id_known = False
    async with shop.worker():
        await until(lambda: shop.facts.retried().count("unreadable") > 3)
        assert shop.ledger.applied == []
        shop.redis.journal[1, 1] = body(1)
        await open_again(shop)
    assert shop.ledger.applied == [(1, 1), (1, 2)]
    assert lost(shop) == []
