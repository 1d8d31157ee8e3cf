"""The worker on a ledger and a Redis in plain Python: in order, never past a gap, acknowledged after the commit, never doubled."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import pytest
from worker_fakes import Shop, body, open_shop, until

from inventory_sdk.metrics.events import Applied
from inventory_sdk.model import Movement
from inventory_sdk.sync import worker as sync_worker
from inventory_sdk.sync.announcing import Announcer
from inventory_sdk.sync.queues.protocol import Message


@pytest.fixture
async def shop() -> Shop:
    return await open_shop()


def in_order(shop: Shop, upto: int) -> bool:
    return shop.ledger.applied == [(1, sequence) for sequence in range(1, upto + 1)]


async def test_what_is_published_lands_in_the_ledger_in_order_and_is_acknowledged(shop: Shop) -> None:
    for sequence in range(1, 6):
        shop.redis.write(sequence)
    async with shop.worker(idle=60):
        await shop.publish(1, 2, 3, 4, 5)
        await until(lambda: len(shop.queue.acked) == 5)
    assert in_order(shop, 5)
    assert shop.queue.announced == [1, 2, 3, 4, 5]


async def test_messages_of_several_publishers_arrive_interleaved_and_are_applied_in_journal_order(shop: Shop) -> None:
    order = list(range(1, 301))
    for sequence in order:
        shop.redis.write(sequence)
    random.Random(7).shuffle(order)
    async with shop.worker():
        for start in range(0, 300, 20):
            await shop.publish(*order[start : start + 20])
            await asyncio.sleep(0)
        await until(lambda: len(shop.queue.acked) == 300)
    assert in_order(shop, 300)
    assert set(shop.ledger.operations.values()) == {1}


async def test_a_gap_is_filled_from_the_journal_by_one_reading(shop: Shop) -> None:
    for sequence in range(1, 11):
        shop.redis.write(sequence)
    async with shop.worker(idle=60):
        await until(lambda: shop.ledger.watermark() == 10)
        for sequence in range(11, 21):
            shop.redis.write(sequence)
        shop.redis.reads.clear()
        await shop.publish(13, 17, 20)
        await until(lambda: shop.ledger.watermark() == 20)
    assert in_order(shop, 20)
    assert len(shop.redis.reads) == 1


async def test_a_gap_is_never_passed_while_redis_can_not_be_asked(shop: Shop) -> None:
    shop.redis.write(1), shop.redis.write(2), shop.redis.write(3)
    worker = shop.worker()
    await worker.start()
    await until(lambda: shop.ledger.watermark() == 3)
    shop.redis.down = ConnectionError("gone")
    shop.redis.write(4), shop.redis.write(5), shop.redis.write(6)
    await shop.publish(4, 6)
    await until(lambda: shop.facts.retried().count("redis") > 5)
    assert shop.ledger.watermark() == 4, "what is consecutive goes on, what is behind the gap waits"
    assert 6 not in shop.queue.acked
    shop.redis.down = None
    await until(lambda: shop.ledger.watermark() == 6)
    await worker.stop()
    assert in_order(shop, 6)


async def test_an_entry_whose_publisher_died_gets_in_from_the_journal(shop: Shop) -> None:
    async with shop.worker() as worker:
        await worker.ready()
        shop.redis.write(1)
        await until(lambda: shop.ledger.watermark() == 1)
    assert shop.queue.acked == []


async def test_a_late_copy_of_an_applied_entry_is_acknowledged_and_not_applied_again(shop: Shop) -> None:
    shop.redis.write(1)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 1)
        await shop.publish(1, 1)
        await until(lambda: shop.queue.acked == [1, 1])
    assert set(shop.ledger.operations.values()) == {1}
    assert shop.ledger.applies == 1, "this worker remembers what it applied"


async def test_a_copy_of_what_an_earlier_worker_applied_is_compared_by_the_ledger_and_acknowledged(shop: Shop) -> None:
    shop.redis.write(1)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 1)
    async with shop.worker():
        await shop.publish(1)
        await until(lambda: shop.queue.acked == [1])
    assert [event.redelivered for event in shop.facts.events if hasattr(event, "redelivered")] == [0, 1]


async def test_nothing_is_acknowledged_before_the_commit(shop: Shop) -> None:
    def check(messages: Sequence[Message]) -> None:
        assert all((1, message.sequence) in shop.ledger.applied for message in messages)

    shop.queue.on_ack = check
    shop.redis.write(1)
    committing, go_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        committing.set()
        await go_on.wait()

    shop.ledger.before_commit = hold
    async with shop.worker():
        await shop.publish(1)
        await committing.wait()
        assert shop.queue.acked == []
        go_on.set()
        await until(lambda: shop.queue.acked == [1])


async def test_a_database_that_is_down_for_a_while_holds_the_messages_and_then_gets_them_once(shop: Shop) -> None:
    shop.redis.write(1), shop.redis.write(2)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 2)
        shop.ledger.down = ConnectionError("no database")
        for sequence in range(3, 51):
            shop.redis.write(sequence)
            await shop.publish(sequence)
        await until(lambda: shop.facts.retried().count("ledger") > 5)
        assert shop.queue.acked == []
        shop.ledger.down = None
        await until(lambda: len(shop.queue.acked) == 48)
    assert in_order(shop, 50)
    assert set(shop.ledger.operations.values()) == {1}


async def test_a_held_worker_gives_no_sign_of_life(shop: Shop) -> None:
    async with shop.worker(heartbeat=0.001) as worker:
        await worker.ready()
        await until(lambda: len(shop.redis.signs) > 3)
        shop.ledger.down = ConnectionError("no database")
        shop.redis.write(1)
        await shop.publish(1)
        await until(lambda: shop.facts.retried().count("ledger") > 5)
        before = len(shop.redis.signs)
        tries = shop.facts.retried().count("ledger")
        await until(lambda: shop.facts.retried().count("ledger") > tries + 10)
        assert len(shop.redis.signs) <= before + 1
        shop.ledger.down = None
        await until(lambda: len(shop.redis.signs) > before + 3)


async def test_a_worker_that_has_just_begun_can_be_seen(shop: Shop) -> None:
    """Before its follower has come to anything: who asks ``settled()`` now must not hear that no worker runs."""
    worker = shop.worker()
    await worker.start()
    assert len(shop.redis.signs) == 1
    await worker.stop()


async def test_a_worker_begins_also_where_redis_takes_no_sign(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def held(*_: Any) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(sync_worker, "FIRST_SIGN", 0.01)
    monkeypatch.setattr(shop.redis, "heartbeat", held)
    async with shop.worker():
        pass
    assert shop.redis.signs == []


async def test_two_workers_on_one_partition_double_nothing(shop: Shop) -> None:
    first, second = shop.worker(), shop.worker()
    async with first, second:
        for sequence in range(1, 201):
            shop.redis.write(sequence)
            if sequence % 3:
                await shop.publish(sequence)
            await asyncio.sleep(0)
        await until(lambda: shop.ledger.watermark() == 200)
    assert in_order(shop, 200)
    assert set(shop.ledger.operations.values()) == {1}


async def test_a_standby_does_not_read_what_the_active_worker_is_applying(shop: Shop) -> None:
    async with shop.worker(heartbeat=0) as standby:
        await standby.ready()
        shop.redis.reads.clear()
        for sequence in range(1, 51):
            # Journaled and applied by another worker between two looks of this one.
            shop.redis.write(sequence)
            shop.ledger.open_at(0, 1, applied=sequence)
            signs = len(shop.redis.signs)
            await until(lambda signs=signs: len(shop.redis.signs) > signs)  # type: ignore[misc]
    assert shop.redis.reads == []
    assert shop.ledger.applies == 0


async def test_a_second_worker_takes_over_what_the_first_did_not_acknowledge(shop: Shop) -> None:
    shop.redis.write(1)
    holding = asyncio.Event()

    async def for_ever() -> None:
        holding.set()
        await asyncio.Event().wait()

    shop.ledger.before_commit = for_ever
    first = shop.worker()
    await first.start()
    await shop.publish(1)
    await holding.wait()
    await first.stop(timeout=0.01)
    assert shop.ledger.applied == []
    shop.ledger.before_commit = None
    async with shop.worker(idle=60):
        await until(lambda: shop.queue.acked == [1])
    assert in_order(shop, 1)


async def test_a_broker_that_was_emptied_is_bound_again(shop: Shop) -> None:
    await shop.queue.delete(0)
    shop.redis.write(1)
    async with shop.worker() as worker:
        await worker.ready()
        await shop.publish(1)
        await until(lambda: shop.queue.acked == [1])


async def test_without_the_broker_the_journal_is_still_followed(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    bind, broken = shop.queue.bind, True

    async def away(partition: int, epoch: int) -> None:
        if broken:
            raise ConnectionError("no broker")
        await bind(partition, epoch)

    await shop.queue.delete(0)
    monkeypatch.setattr(shop.queue, "bind", away)
    shop.redis.write(1)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 1)
        broken = False
        shop.redis.write(2)
        await until(lambda: shop.queue._partition(0).bound == {1})
        await shop.publish(2)
        await until(lambda: shop.queue.acked == [2])


async def test_an_epoch_that_was_fenced_while_it_was_bound_stays_fenced(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    bind = shop.queue.bind

    async def late(partition: int, epoch: int) -> None:
        if epoch == 1 and max(shop.ledger.rows[0]) == 1:
            await shop.ledger.raise_epoch(0, 1)
            await shop.queue.unbind(0, 1)
        await bind(partition, epoch)

    monkeypatch.setattr(shop.queue, "bind", late)
    async with shop.worker():
        await until(lambda: "recovered" in shop.facts.names())
    assert 1 not in shop.queue._partition(0).bound


async def test_batches_are_cut_at_the_limit_and_a_larger_entry_goes_alone(shop: Shop) -> None:
    for sequence in range(1, 41):
        shop.redis.write(sequence, body(sequence, operations=15 if sequence == 20 else 1))
    async with shop.worker(max_operations=10):
        await until(lambda: shop.ledger.watermark() == 40)
    assert in_order(shop, 40)
    assert max(shop.ledger.batches) == 15
    assert sorted(shop.ledger.batches)[-2] <= 10


async def test_a_backlog_is_worked_off_without_waiting_between_readings(shop: Shop) -> None:
    for sequence in range(1, 3501):
        shop.redis.write(sequence)
    async with shop.worker(idle=60):
        await shop.publish(3500)
        await until(lambda: shop.ledger.watermark() == 3500)
    assert in_order(shop, 3500)


async def test_stop_finishes_what_was_received_and_acknowledges_it(shop: Shop) -> None:
    shop.redis.write(1), shop.redis.write(2)
    committing, go_on = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        committing.set()
        await go_on.wait()

    shop.ledger.before_commit = hold
    worker = shop.worker(idle=60)
    await worker.start()
    await shop.publish(1, 2)
    await committing.wait()
    stopping = asyncio.create_task(worker.stop(timeout=5))
    await asyncio.sleep(0)
    assert not stopping.done()
    go_on.set()
    await stopping
    assert in_order(shop, 2)
    assert shop.queue.acked == [1, 2]


async def test_stop_gives_up_in_time_where_the_database_is_away(shop: Shop) -> None:
    worker = shop.worker()
    await worker.start()
    await worker.ready()
    shop.ledger.down = ConnectionError("no database")
    shop.redis.write(1)
    await shop.publish(1)
    await until(lambda: shop.facts.retried().count("ledger") > 2)
    await worker.stop(timeout=0.02)
    assert shop.queue.acked == []
    assert shop.ledger.applied == []


async def test_cancelled_at_any_await_nothing_is_half_done_and_the_next_worker_finishes() -> None:
    """One worker after another is cancelled a little later in its work, until one gets through."""
    for steps in range(0, 400, 7):
        shop = await open_shop()
        for sequence in range(1, 8):
            shop.redis.write(sequence)
        await shop.publish(2, 1, 5, 7, 4)
        shop.queue.on_ack = lambda messages, shop=shop: _committed(shop, messages)
        worker = shop.worker(idle=0.0005)
        await worker.start()
        for _ in range(steps):
            await asyncio.sleep(0)
        await worker.stop(timeout=0)
        assert shop.ledger.applied == [(1, sequence) for sequence in range(1, len(shop.ledger.applied) + 1)]
        async with shop.worker(idle=0.0005):
            await until(lambda shop=shop: shop.ledger.watermark() == 7 and sorted(set(shop.queue.acked)) == [1, 2, 4, 5, 7])  # type: ignore[misc]
        assert in_order(shop, 7)
        assert set(shop.ledger.operations.values()) == {1}


def _committed(shop: Shop, messages: Sequence[Message]) -> None:
    assert all((1, message.sequence) in shop.ledger.applied for message in messages)


async def test_a_poison_entry_holds_the_partition_is_named_and_never_skipped(shop: Shop) -> None:
    shop.redis.write(1), shop.redis.write(2, '{"v": 99}'), shop.redis.write(3)
    async with shop.worker():
        await shop.publish(1, 2, 3)
        await until(lambda: shop.facts.retried().count("unreadable") > 3)
        assert shop.ledger.watermark() == 1
        assert not {2, 3} & set(shop.queue.acked)
        assert shop.facts.names().count("unreadable") == 1
        await until(lambda: shop.facts.told)
        assert shop.facts.told[0][1]["sequence"] == 2
        shop.redis.write(2)  # a newer release, or a mended journal
        await until(lambda: shop.ledger.watermark() == 3)
    assert in_order(shop, 3)
    assert sorted(shop.queue.acked) == [1, 2, 3]


async def test_a_message_that_was_damaged_on_its_way_is_read_from_the_journal(shop: Shop) -> None:
    shop.redis.write(1)
    async with shop.worker(idle=60):
        await shop.publish(1, text="rubbish")
        await until(lambda: shop.queue.acked == [1])
    assert in_order(shop, 1)


async def test_a_failing_writes_stock_is_bisected_to_the_movement_named_and_held(shop: Shop) -> None:
    broken = True

    async def write(moves: Sequence[Movement], session: Any) -> None:
        if broken and any(move.operation_id == "o13-2" for move in moves):
            raise ValueError("no such product")

    for sequence in range(1, 21):
        shop.redis.write(sequence, body(sequence, operations=4))
    async with shop.worker(writes_stock=[write]):
        await until(lambda: any(name == "writes_stock_failed" for name, _ in shop.facts.told))
        assert shop.ledger.watermark() == 12, "everything before the failing entry is in, nothing after it"
        (facts,) = [facts for name, facts in shop.facts.told if name == "writes_stock_failed"]
        assert (facts["operation_id"], facts["sku"], facts["position"].sequence) == ("o13-2", "sku", 13)
        assert "no such product" in facts["error"]
        attempts = shop.facts.retried().count("writes_stock")
        await until(lambda: shop.facts.retried().count("writes_stock") > attempts + 5)
        assert shop.ledger.watermark() == 12
        assert shop.facts.names().count("writes_stock_failed") == 1, "alerted once, not at every attempt"
        broken = False
        await until(lambda: shop.ledger.watermark() == 20)
    assert in_order(shop, 20)
    assert set(shop.ledger.operations.values()) == {1}


async def test_a_writes_stock_that_fails_only_once_alerts_nobody(shop: Shop) -> None:
    failures = [ValueError("deadlock")]

    async def write(moves: Sequence[Movement], session: Any) -> None:
        if failures:
            raise failures.pop()

    shop.redis.write(1)
    async with shop.worker(writes_stock=[write]):
        await until(lambda: shop.ledger.watermark() == 1)
    assert shop.facts.names() == []


async def test_stop_does_not_wait_for_a_writes_stock_that_keeps_failing(shop: Shop) -> None:
    async def write(moves: Sequence[Movement], session: Any) -> None:
        raise ValueError("never")

    shop.redis.write(1)
    worker = shop.worker(writes_stock=[write])
    await worker.start()
    await until(lambda: "writes_stock_failed" in shop.facts.names())
    async with asyncio.timeout(5):
        await worker.stop(timeout=60)
    assert shop.ledger.applied == []


async def test_refusals_are_told_counted_and_voided_in_redis(shop: Shop) -> None:
    shop.ledger.refuse = {1: "duplicate", 2: "insufficient", 3: "closed"}
    for sequence in range(1, 5):
        shop.redis.write(sequence)
    async with shop.worker() as worker:
        await until(lambda: len(shop.redis.voided) == 3 and len(shop.facts.told) == 3)
        assert await worker._rooms[0][2].send() == 0
    assert [(name, facts["operation_id"], facts["reason"]) for name, facts in shop.facts.told] == [
        ("duplicate", "o1-0", "duplicate"),
        ("rejected", "o2-0", "insufficient"),
        ("rejected", "o3-0", "closed"),
    ]
    assert shop.facts.names() == ["duplicate", "rejected", "rejected"]
    assert len(shop.redis.voided) == 3, "sent once while their journal entries are on the way"


async def test_voids_that_were_pending_at_the_start_are_sent_although_redis_is_away_at_first(shop: Shop) -> None:
    shop.ledger.refuse = {1: "insufficient"}
    shop.redis.write(1)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 1)
    shop.redis.voided.clear()
    shop.redis.down = ConnectionError("gone")
    async with shop.worker():
        await until(lambda: "correction" in shop.facts.retried())
        shop.redis.down = None
        await until(lambda: len(shop.redis.voided) == 1)


async def test_a_subscriber_that_can_not_be_reached_does_not_hold_up_the_stock(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    announce, asked, blocked = shop.queue.announce, asyncio.Event(), asyncio.Event()

    async def refuse(messages: Sequence[Message]) -> None:
        asked.set()
        await blocked.wait()  # a broker behind its disk alarm says nothing at all
        raise ConnectionError("no exchange")

    monkeypatch.setattr(shop.queue, "announce", refuse)
    shop.redis.write(1), shop.redis.write(2), shop.redis.write(3)
    async with shop.worker():
        await shop.publish(1)
        await asked.wait()
        await shop.publish(2, 3)
        await until(lambda: shop.queue.acked == [1, 2, 3])
        blocked.set()
        await until(lambda: "announce" in shop.facts.retried())
        monkeypatch.setattr(shop.queue, "announce", announce)
        await until(lambda: shop.queue.announced == [1, 2, 3])
    assert "announce_failed" not in shop.facts.names()


async def test_announcements_that_can_not_be_made_are_given_up_and_named_at_the_stop(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(messages: Sequence[Message]) -> None:
        raise ConnectionError("no exchange")

    monkeypatch.setattr(shop.queue, "announce", refuse)
    shop.redis.write(1)
    worker = shop.worker()
    await worker.start()
    await until(lambda: "announce" in shop.facts.retried())
    await worker.stop(timeout=0.01)
    assert "announce_failed" in shop.facts.names()


async def test_announcements_beyond_the_bound_push_out_the_oldest(shop: Shop) -> None:
    announcer = Announcer(shop.worker()._parts, 0, most=3, most_characters=50)
    announcer.tell([Message(0, 1, number, "x" * 10) for number in range(1, 6)])
    assert shop.facts.names() == ["announce_failed"]
    announcer.tell([Message(0, 1, 6, "x" * 40)])
    running = asyncio.create_task(announcer.run())
    await announcer.delivered(5.0)
    running.cancel()
    assert shop.queue.announced == [5, 6]


async def test_a_commit_whose_reply_was_lost_is_told_as_if_it_had_come(shop: Shop) -> None:
    shop.ledger.refuse = {2: "insufficient"}
    shop.ledger.lost_replies = 1
    shop.redis.write(1), shop.redis.write(2)
    async with shop.worker():
        await shop.publish(1, 2)
        await until(lambda: shop.queue.acked == [1, 2])
        await until(lambda: shop.queue.announced == [1, 2])
    assert shop.ledger.applied == [(1, 1), (1, 2)]
    assert shop.facts.names().count("rejected") == 1
    assert [facts["reason"] for name, facts in shop.facts.told if name == "rejected"] == ["insufficient"]
    (applied,) = [event for event in shop.facts.events if isinstance(event, Applied) and event.operations]
    assert (applied.sequence, applied.operations, applied.rejected) == (2, 2, 1)


async def test_a_handler_that_hangs_or_raises_does_not_hold_up_the_stock(shop: Shop) -> None:
    shop.ledger.refuse = {1: "insufficient"}
    shop.redis.write(1), shop.redis.write(2)
    called = asyncio.Event()

    async def hang(name: str, facts: Any) -> None:
        called.set()
        await asyncio.Event().wait()

    shop.facts.on_event = hang  # type: ignore[method-assign]
    worker = shop.worker()
    await worker.start()
    await called.wait()
    await until(lambda: shop.ledger.watermark() == 2)
    await worker.stop(timeout=0.01)


async def test_a_task_that_dies_is_seen(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[BaseException] = []
    worker = shop.worker(on_failure=seen.append)
    monkeypatch.setattr(worker._rooms[0][1], "_stay", _bug)
    await worker.start()
    with pytest.raises(ZeroDivisionError):
        await worker.wait()
    assert isinstance(worker.failure, ZeroDivisionError)
    assert seen == [worker.failure]
    assert "task_died" in shop.facts.names()
    with pytest.raises(ZeroDivisionError):
        await worker.ready()
    await worker.stop()
    ((_, facts),) = [told for told in shop.facts.told if told[0] == "task_died"]
    assert facts["task"] == "inventory-follower-0"
    assert "ZeroDivisionError" in facts["error"]


async def _bug(task: object) -> None:
    raise ZeroDivisionError("a mistake of ours")


async def test_a_worker_starts_once_and_stops_twice(shop: Shop) -> None:
    worker = shop.worker()
    await worker.start()
    with pytest.raises(RuntimeError):
        await worker.start()
    await worker.stop()
    await worker.stop()
    await worker.wait()


async def test_a_consumer_that_fails_is_opened_again(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    from inventory_sdk.sync.queues.memory import MemoryConsumer

    get, faults = MemoryConsumer.get, [ConnectionError("lost"), ConnectionError("lost again")]

    async def fail(self: MemoryConsumer, timeout: float) -> Sequence[Message]:
        if faults:
            raise faults.pop()
        return await get(self, timeout)

    monkeypatch.setattr(MemoryConsumer, "get", fail)
    shop.redis.write(1)
    async with shop.worker():
        await shop.publish(1)
        await until(lambda: shop.queue.acked == [1])
    assert shop.facts.retried().count("consume") == 2
    assert in_order(shop, 1)
