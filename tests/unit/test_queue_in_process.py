"""What only the queues inside a process, and the stream, have to show."""

from __future__ import annotations

import asyncio
import logging

import pytest
from fakeredis import FakeAsyncRedis, FakeServer

from inventory_sdk.metrics.events import Event, Retried
from inventory_sdk.stock.journal import UnreadableEntry
from inventory_sdk.sync.queues.loops import PerLoop
from inventory_sdk.sync.queues.memory import MAX_ANNOUNCEMENTS, MemoryQueue
from inventory_sdk.sync.queues.protocol import Message
from inventory_sdk.sync.queues.stream import StreamQueue


async def test_subscribers_in_the_process_hear_what_was_applied() -> None:
    queue = MemoryQueue()
    await queue.announce([Message(0, 1, 1, "nobody listens")])
    with queue.subscribe(0) as one, queue.subscribe(0) as two, queue.subscribe(1) as other:
        await queue.announce([Message(0, 1, 2, "heard"), Message(0, 1, 3, "heard too")])
        assert [one.get_nowait().sequence for _ in range(2)] == [2, 3]
        assert two.get_nowait().body == "heard"
        assert other.empty()
    await queue.announce([Message(0, 1, 4, "nobody listens any more")])
    assert one.empty()


async def test_a_subscriber_that_is_behind_loses_its_oldest_announcements() -> None:
    queue = MemoryQueue()
    with queue.subscribe(0) as subscriber:
        await queue.announce([Message(0, 1, sequence, "") for sequence in range(MAX_ANNOUNCEMENTS + 3)])
        assert subscriber.qsize() == MAX_ANNOUNCEMENTS
        assert subscriber.get_nowait().sequence == 3


def test_what_a_consumer_of_a_closed_event_loop_held_comes_to_the_next() -> None:
    queue = MemoryQueue()

    async def leave_without_a_word() -> object:
        await queue.bind(0, 1)
        await queue.publish(0, 1, 1, "body", 1.0)
        line = queue.consume(0, 1, 0)
        consumer = await line.__aenter__()
        assert len(await consumer.get(1.0)) == 1
        return line

    async def take_over() -> list[bool]:
        async with queue.consume(0, 1, 0) as consumer:
            return [message.redelivered for message in await consumer.get(1.0)]

    loop = asyncio.new_event_loop()
    abandoned = loop.run_until_complete(leave_without_a_word())
    loop.close()
    assert asyncio.run(take_over()) == [True]
    del abandoned


async def test_streams_announce_under_a_key_of_the_partition() -> None:
    client = FakeAsyncRedis(decode_responses=True)
    queue = StreamQueue(lambda: client, "ns")
    await queue.announce([Message(2, 1, 5, "five"), Message(2, 1, 6, "six")])
    await queue.announce([Message(2, 1, 6, "six")])
    entries = await client.xrange("{ns:2}:applied")
    assert [fields for _, fields in entries] == [{"i": "1-5", "b": "five"}, {"i": "1-6", "b": "six"}, {"i": "1-6", "b": "six"}]
    await queue.delete(2)
    assert await client.exists("{ns:2}:applied") == 0
    await client.aclose()


async def test_a_reader_begins_exactly_behind_the_watermark() -> None:
    client = FakeAsyncRedis()
    queue = StreamQueue(lambda: client, "ns")
    for place in ("1-8", "1-9", "2-1", "2-2"):
        await client.xadd("{ns:0}:journal", {"b": place}, id=place)
    async with queue.consume(0, 1, 8) as consumer:
        assert [message.body for message in await consumer.get(0)] == ["1-9", "2-1", "2-2"]
    async with queue.consume(0, 2, 1) as consumer:
        assert [message.body for message in await consumer.get(0)] == ["2-2"]
    await client.aclose()


async def test_an_entry_that_cannot_be_read_stops_the_reader_and_is_named() -> None:
    client = FakeAsyncRedis()
    queue = StreamQueue(lambda: client, "ns")
    await client.xadd("{ns:0}:journal", {"b": b"\xff"}, id="1-1")
    async with queue.consume(0, 1, 0) as consumer:
        for _ in range(2):
            with pytest.raises(UnreadableEntry, match="0/1-1"):
                await consumer.get(0)
    await client.aclose()


async def test_a_redis_that_is_away_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    server = FakeServer()
    client = FakeAsyncRedis(server=server)
    events: list[Event] = []

    class Seen:
        def record(self, event: Event) -> None:
            events.append(event)
            if len(events) == 3:
                server.connected = True

    queue = StreamQueue(lambda: client, "ns", Seen())
    await client.xadd("{ns:0}:journal", {"b": "body"}, id="1-1")
    server.connected = False
    with caplog.at_level(logging.ERROR):
        async with queue.consume(0, 1, 0) as consumer:
            assert list(await consumer.get(0)) == []
            assert [message.body for message in await consumer.get(30.0)] == ["body"]
    assert events == [Retried("queue", "ConnectionError")] * 3
    await client.aclose()


def test_each_event_loop_has_its_own_value_and_closed_loops_are_forgotten() -> None:
    made: list[object] = []

    def make() -> object:
        made.append(object())
        return made[-1]

    values: PerLoop[object] = PerLoop(make)

    async def twice() -> bool:
        return values.get() is values.get()

    async def popped() -> tuple[object, object]:
        values.get()
        return values.pop(), values.pop()

    assert asyncio.run(twice())
    assert asyncio.run(twice())
    assert asyncio.run(popped()) == (made[2], None)
    assert len(made) == 3
    assert len(values._values) == 0
