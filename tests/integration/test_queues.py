"""The contract of a queue, for every implementation: what the worker may rely on."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from fakeredis import FakeAsyncRedis, FakeServer
from redis.asyncio import Redis

from inventory_sdk.sync.queues.amqp import AmqpQueue
from inventory_sdk.sync.queues.loops import PerLoop
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.queues.protocol import Consumer, Message, Queue, Unroutable
from inventory_sdk.sync.queues.stream import StreamQueue

PARTITION, EPOCH = 3, 7
LONG = 10.0
"""Seconds that are long enough for anything that is going to happen; no test waits them out."""
SHORT = 0.2
"""Seconds to see that nothing comes."""


@dataclass
class Rig:
    """A queue and how a caller's process hands an entry over to it."""

    queue: Queue
    client: Callable[[], Redis] | None = None
    namespace: str = ""
    partitions: set[int] = field(default_factory=lambda: {PARTITION})

    @property
    def brokered(self) -> bool:
        """Keeps messages of its own, and so repeats and redelivers."""
        return not isinstance(self.queue, StreamQueue)

    async def send(self, *sequences: int, epoch: int = EPOCH, body: str | None = None, partition: int = PARTITION) -> None:
        for sequence in sequences:
            text = body if body is not None else f"entry {epoch}-{sequence}"
            if self.client is not None:
                await self.client().xadd(f"{{{self.namespace}:{partition}}}:journal", {"b": text}, id=f"{epoch}-{sequence}")
            await self.queue.publish(partition, epoch, sequence, text, LONG)

    async def clean(self) -> None:
        for partition in self.partitions:
            await self.queue.delete(partition)
            if self.client is not None:
                await self.client().delete(f"{{{self.namespace}:{partition}}}:journal")
        await self.queue.close()
        if self.client is not None:
            await self.client().aclose()


def fake_streams(namespace: str) -> Rig:
    server = FakeServer()
    client = PerLoop(lambda: FakeAsyncRedis(server=server)).get
    return Rig(StreamQueue(client, namespace), client, namespace)


def streams(namespace: str, protocol: int, url: str) -> Rig:
    client = PerLoop(lambda: Redis.from_url(url, protocol=protocol)).get
    return Rig(StreamQueue(client, namespace), client, namespace)


BROKERS = ["memory", pytest.param("amqp", marks=pytest.mark.amqp)]
"""They fence, have one active consumer and redeliver; a stream leaves these to Redis and the ledger."""
STREAMS = [
    "fake-stream",
    pytest.param("resp3-stream", marks=pytest.mark.redis),
    pytest.param("resp2-stream", marks=pytest.mark.redis),
]


def build(kind: str, namespace: str, redis_url: str, amqp_url: str) -> Rig:
    match kind:
        case "memory":
            return Rig(MemoryQueue())
        case "amqp":
            return Rig(AmqpQueue(amqp_url, namespace))
        case "fake-stream":
            return fake_streams(namespace)
        case _:
            return streams(namespace, 3 if kind == "resp3-stream" else 2, redis_url)


@pytest.fixture(params=[*BROKERS, *STREAMS])
def unstarted(request: pytest.FixtureRequest, namespace: str, redis_url: str, amqp_url: str) -> Rig:
    """For tests that bring their own event loops."""
    return build(request.param, namespace, redis_url, amqp_url)


@asynccontextmanager
async def started(rig: Rig) -> AsyncIterator[Rig]:
    await rig.queue.start()
    await rig.queue.bind(PARTITION, EPOCH)
    try:
        yield rig
    finally:
        await rig.clean()


@pytest.fixture
async def rig(unstarted: Rig) -> AsyncIterator[Rig]:
    async with started(unstarted):
        yield unstarted


@pytest.fixture(params=BROKERS)
async def broker(request: pytest.FixtureRequest, namespace: str, redis_url: str, amqp_url: str) -> AsyncIterator[Rig]:
    async with started(build(request.param, namespace, redis_url, amqp_url)) as rig:
        yield rig


async def collect(consumer: Consumer, count: int) -> list[Message]:
    """So many messages; markers and repeats count."""
    messages: list[Message] = []
    async with asyncio.timeout(LONG):
        while len(messages) < count:
            messages.extend(await consumer.get(1.0))
    return messages


def sequences(messages: Sequence[Message]) -> list[int]:
    return [message.sequence for message in messages]


async def test_what_was_published_is_delivered_whole_and_with_its_position(rig: Rig) -> None:
    await rig.send(1, 2, 3)
    async with rig.queue.consume(PARTITION, EPOCH, 0) as consumer:
        messages = await collect(consumer, 3)
        await consumer.ack(messages)
    assert [(m.partition, m.epoch, m.sequence, m.body, m.marker) for m in messages] == [
        (PARTITION, EPOCH, sequence, f"entry {EPOCH}-{sequence}", False) for sequence in (1, 2, 3)
    ]


async def test_a_waiting_consumer_gets_what_comes(rig: Rig) -> None:
    async with rig.queue.consume(PARTITION, EPOCH, 0) as consumer:
        waiting = asyncio.create_task(consumer.get(LONG))
        await asyncio.sleep(0)
        await rig.send(1)
        assert sequences(await waiting) == [1]


async def test_nothing_to_get_is_an_empty_answer(rig: Rig) -> None:
    async with rig.queue.consume(PARTITION, EPOCH, 0) as consumer:
        assert list(await consumer.get(0.01)) == []
        assert list(await consumer.get(0)) == []


async def test_what_a_consumer_left_unacknowledged_comes_again_to_the_next(rig: Rig) -> None:
    await rig.send(1, 2, 3, 4)
    async with rig.queue.consume(PARTITION, EPOCH, 0) as consumer:
        messages = await collect(consumer, 4)
        await consumer.ack(messages[:2])
    async with rig.queue.consume(PARTITION, EPOCH, 2) as consumer:
        again = await collect(consumer, 2)
        assert sequences(again) == [3, 4]
        assert all(message.redelivered for message in again) is rig.brokered
        await consumer.ack(again)
    async with rig.queue.consume(PARTITION, EPOCH, 4) as consumer:
        assert list(await consumer.get(SHORT)) == []


async def test_acknowledging_out_of_order_acknowledges_nothing_else(broker: Rig) -> None:
    await broker.send(*range(1, 11))
    async with broker.queue.consume(PARTITION, EPOCH, 0) as consumer:
        messages = await collect(consumer, 10)
        for one in (messages[3], messages[1], messages[9], messages[0]):
            await consumer.ack([one])
        await consumer.ack([messages[6], messages[5]])
        await consumer.ack([messages[6]])
    async with broker.queue.consume(PARTITION, EPOCH, 0) as consumer:
        assert sorted(sequences(await collect(consumer, 4))) == [3, 5, 8, 9]


async def test_a_second_consumer_waits_until_the_first_has_left(broker: Rig) -> None:
    await broker.send(1)
    async with broker.queue.consume(PARTITION, EPOCH, 0) as first:
        held = await collect(first, 1)
        async with broker.queue.consume(PARTITION, EPOCH, 0) as second:
            await broker.send(2)
            assert list(await second.get(SHORT)) == []
            held += await collect(first, 1)
            assert sequences(held) == [1, 2]
    async with broker.queue.consume(PARTITION, EPOCH, 0) as third:
        assert sorted(sequences(await collect(third, 2))) == [1, 2]


async def test_a_waiting_consumer_takes_over(broker: Rig) -> None:
    first = broker.queue.consume(PARTITION, EPOCH, 0)
    await broker.send(1)
    held = await collect(await first.__aenter__(), 1)
    assert sequences(held) == [1]
    async with broker.queue.consume(PARTITION, EPOCH, 0) as second:
        assert list(await second.get(SHORT)) == []
        await first.__aexit__(None, None, None)
        assert sequences(await collect(second, 1)) == [1]


async def test_an_unbound_epoch_takes_nothing_and_says_so(broker: Rig) -> None:
    await broker.send(1)
    await broker.queue.unbind(PARTITION, EPOCH)
    await broker.queue.unbind(PARTITION, EPOCH)
    for _ in range(2):
        with pytest.raises(Unroutable):
            await broker.send(2)
    await broker.queue.bind(PARTITION, EPOCH + 1)
    with pytest.raises(Unroutable):
        await broker.send(3)
    await broker.send(1, epoch=EPOCH + 1)
    async with broker.queue.consume(PARTITION, EPOCH, 0) as consumer:
        messages = await collect(consumer, 2)
        assert [(message.epoch, message.sequence) for message in messages] == [(EPOCH, 1), (EPOCH + 1, 1)]


async def test_duplicates_of_a_returned_entry_in_flight_are_all_returned(broker: Rig) -> None:
    """aiormq confuses two publications in flight with one message id: it would confirm one of them."""
    await broker.queue.unbind(PARTITION, EPOCH)
    outcomes = await asyncio.gather(*(broker.send(5) for _ in range(20)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Unroutable] * 20


async def test_recovery_delivers_past_the_fence(broker: Rig) -> None:
    await broker.queue.unbind(PARTITION, EPOCH)
    await broker.queue.deliver(PARTITION, EPOCH, 4, "found", LONG)
    async with broker.queue.consume(PARTITION, EPOCH, 0) as consumer:
        (message,) = await collect(consumer, 1)
        assert (message.epoch, message.sequence, message.body) == (EPOCH, 4, "found")


async def test_the_marker_comes_behind_everything_confirmed(broker: Rig) -> None:
    await asyncio.gather(*(broker.send(sequence) for sequence in range(1, 101)))
    await broker.queue.unbind(PARTITION, EPOCH)
    await broker.queue.mark(PARTITION, EPOCH, LONG)
    async with broker.queue.consume(PARTITION, EPOCH, 0) as consumer:
        messages = await collect(consumer, 101)
    assert [message.marker for message in messages] == [False] * 100 + [True]
    assert messages[-1].epoch == EPOCH
    assert sorted(sequences(messages[:-1])) == list(range(1, 101))


async def test_duplicates_are_harmless(rig: Rig) -> None:
    await rig.send(1)
    await rig.queue.publish(PARTITION, EPOCH, 1, f"entry {EPOCH}-1", LONG)
    await rig.send(2)
    async with rig.queue.consume(PARTITION, EPOCH, 0) as consumer:
        messages = await collect(consumer, 3 if rig.brokered else 2)
        assert set(sequences(messages)) == {1, 2}
        await consumer.ack(messages)
        await consumer.ack(messages)
        await rig.send(3)
        assert sequences(await collect(consumer, 1)) == [3]


@pytest.mark.parametrize("body", ["x" * 1_000_000, "Ä ß 漢字 🙂 m1\x1fsku-1 \x00 \\u001f", "ü" * 300_000], ids=["1 MB", "text", "unicode"])
async def test_bodies_come_as_they_were_sent(rig: Rig, body: str) -> None:
    await rig.send(1, body=body)
    async with rig.queue.consume(PARTITION, EPOCH, 0) as consumer:
        (message,) = await collect(consumer, 1)
        assert message.body == body


async def test_many_entries_all_come(rig: Rig) -> None:
    await rig.send(*range(1, 1001))
    seen: list[int] = []
    async with rig.queue.consume(PARTITION, EPOCH, 0) as consumer:
        async with asyncio.timeout(LONG):
            while len(seen) < 1000:
                messages = await consumer.get(1.0)
                await consumer.ack(messages)
                seen.extend(sequences(messages))
    assert sorted(seen) == list(range(1, 1001))


async def test_a_cancelled_get_loses_nothing(rig: Rig) -> None:
    seen: set[int] = set()
    async with rig.queue.consume(PARTITION, EPOCH, 0) as consumer:
        sent = 0
        # The cancellation comes after more and more turns of the loop, so that it meets the delivery at every stage.
        for turns in itertools.chain(range(40), [400]):
            waiting = asyncio.create_task(consumer.get(LONG))
            await asyncio.sleep(0)
            sent += 1
            await rig.send(sent)
            for _ in range(turns):
                await asyncio.sleep(0)
            waiting.cancel()
            (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
            if not isinstance(outcome, BaseException):
                seen.update(sequences(outcome))
        async with asyncio.timeout(LONG):
            while len(seen) < sent:
                seen.update(sequences(await consumer.get(1.0)))
    assert seen == set(range(1, sent + 1))


async def test_partitions_do_not_see_each_other(rig: Rig) -> None:
    rig.partitions.add(PARTITION + 1)
    await rig.queue.bind(PARTITION + 1, EPOCH)
    await rig.send(1)
    await rig.send(2, partition=PARTITION + 1)
    async with rig.queue.consume(PARTITION + 1, EPOCH, 0) as consumer:
        assert sequences(await collect(consumer, 1)) == [2]
        assert list(await consumer.get(SHORT)) == []


async def test_entries_of_a_later_epoch_come_through_the_same_consumer(rig: Rig) -> None:
    await rig.queue.bind(PARTITION, EPOCH + 1)
    await rig.send(5)
    await rig.send(1, epoch=EPOCH + 1)
    async with rig.queue.consume(PARTITION, EPOCH, 4) as consumer:
        messages = await collect(consumer, 2)
    assert [(message.epoch, message.sequence) for message in messages] == [(EPOCH, 5), (EPOCH + 1, 1)]


def test_one_object_serves_one_event_loop_after_another(unstarted: Rig) -> None:
    async def day(first: int, last: bool) -> list[int]:
        await unstarted.queue.start()
        await unstarted.queue.bind(PARTITION, EPOCH)
        await asyncio.gather(*(unstarted.send(sequence) for sequence in (first,)))
        async with unstarted.queue.consume(PARTITION, EPOCH, first - 1) as consumer:
            messages = await collect(consumer, 1)
            await consumer.ack(messages)
        if last:
            await unstarted.clean()
        elif unstarted.client is not None:
            await unstarted.client().aclose()
        await unstarted.queue.close()
        return sequences(messages)

    assert asyncio.run(day(1, last=False)) == [1]
    assert asyncio.run(day(2, last=True)) == [2]


async def test_check_finds_nothing_wrong(rig: Rig) -> None:
    assert await rig.queue.check() == []


async def test_deleting_twice_is_no_error(rig: Rig) -> None:
    await rig.queue.delete(PARTITION)
    await rig.queue.delete(PARTITION)


async def test_the_headers_of_a_trace_come_along_where_there_is_a_broker(rig: Rig) -> None:
    await rig.queue.bind(PARTITION, EPOCH)
    headers = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "shop=1"}
    async with rig.queue.consume(PARTITION, EPOCH, 0) as consumer:
        await rig.send(1)
        if rig.brokered:
            await rig.queue.publish(PARTITION, EPOCH, 2, "entry 7-2", LONG, headers=headers)
        messages: list[Message] = []
        while len(messages) < (2 if rig.brokered else 1):
            messages += await consumer.get(LONG)
        assert [message.headers for message in messages] == [None, headers][: len(messages)]
        await consumer.ack(messages)
