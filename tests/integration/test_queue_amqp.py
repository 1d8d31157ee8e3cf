"""RabbitMQ under faults: lost and stuck connections, foreign messages, queues that would lose messages."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import pytest

from inventory_sdk.metrics.events import Event, Happened
from inventory_sdk.stock.journal import encode
from inventory_sdk.sync.queues.amqp import AmqpQueue
from inventory_sdk.sync.queues.announcement import announcement, read_announcement
from inventory_sdk.sync.queues.protocol import Consumer, Message, PublishFailed, QueueMisconfigured, QueueUnavailable

pytestmark = pytest.mark.amqp

LONG = 15.0


class Proxy:
    """A TCP proxy in front of a server. ``cut`` breaks what is connected; while ``stalled`` nothing comes through."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None
        self.cut()
        if self._pumps:
            await asyncio.wait(self._pumps)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        for pump in self._pumps:
            pump.cancel()

    def stall(self) -> None:
        """What is connected now stays connected and says nothing more; new connections work."""
        self._flowing.clear()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, far_writer}
        flowing = self._flowing
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            pump = asyncio.create_task(self._pump(source, sink, flowing))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
        try:
            while data := await source.read(65536):
                await flowing.wait()
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            sink.transport.abort()
        finally:
            sink.close()
            self._writers.discard(sink)


@pytest.fixture
async def proxy(amqp_url: str) -> AsyncIterator[Proxy]:
    parts = urlsplit(amqp_url)
    proxy = Proxy(parts.hostname or "127.0.0.1", parts.port or 5672)
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()


@pytest.fixture
def proxied_url(proxy: Proxy, amqp_url: str) -> str:
    parts = urlsplit(amqp_url)
    credentials = f"{parts.username}:{parts.password}@" if parts.username else ""
    return urlunsplit(parts._replace(netloc=f"{credentials}127.0.0.1:{proxy.port}"))


@pytest.fixture
async def direct(amqp_url: str, namespace: str) -> AsyncIterator[AmqpQueue]:
    """The same queues without the proxy."""
    queue = AmqpQueue(amqp_url, namespace)
    await queue.bind(0, 1)
    try:
        yield queue
    finally:
        await queue.delete(0)
        await queue.close()


@pytest.fixture
async def queue(proxied_url: str, namespace: str, direct: AmqpQueue) -> AsyncIterator[AmqpQueue]:
    queue = AmqpQueue(proxied_url, namespace, timeout=3.0)
    try:
        yield queue
    finally:
        await queue.close()


@asynccontextmanager
async def raw_channel(url: str) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    connection = await aio_pika.connect(url)
    async with connection:
        yield await connection.channel()


async def drained(consumer: Consumer, count: int, acknowledge: bool = True) -> list[Message]:
    """At least so many different messages."""
    messages: list[Message] = []
    async with asyncio.timeout(LONG):
        while len({(message.epoch, message.sequence) for message in messages}) < count:
            batch = await consumer.get(1.0)
            messages.extend(batch)
            if acknowledge:
                await consumer.ack(batch)
    return messages


def sequences(messages: Sequence[Message]) -> set[int]:
    return {message.sequence for message in messages}


async def test_cut_amid_publishes_each_ends_in_time_and_all_confirmed_ones_arrive(
    queue: AmqpQueue, direct: AmqpQueue, proxy: Proxy
) -> None:
    confirmed: set[int] = set()
    failed: set[int] = set()
    numbers = iter(range(1, 1201))

    async def publisher() -> None:
        for number in numbers:
            try:
                async with asyncio.timeout(LONG):
                    await queue.publish(0, 1, number, "x" * 4000, 5.0)
            except PublishFailed:
                failed.add(number)
            else:
                confirmed.add(number)
            if number % 300 == 0:
                proxy.cut()

    await asyncio.gather(*(publisher() for _ in range(32)))
    assert confirmed | failed == set(range(1, 1201))
    assert failed, "no cut met a publish: the test shows nothing"
    assert confirmed
    async with direct.consume(0, 1, 0) as consumer:
        arrived: set[int] = set()
        async with asyncio.timeout(LONG):
            while not confirmed <= arrived:
                batch = await consumer.get(1.0)
                await consumer.ack(batch)
                arrived |= sequences(batch)


async def test_a_stuck_connection_fails_its_publishes_in_time_and_the_next_uses_another(queue: AmqpQueue, proxy: Proxy) -> None:
    await queue.publish(0, 1, 1, "before", LONG)
    proxy.stall()
    async with asyncio.timeout(LONG):
        with pytest.raises(PublishFailed, match=r"not confirmed within 0\.3 s"):
            await queue.publish(0, 1, 2, "lost in a stuck connection", 0.3)
        await queue.publish(0, 1, 3, "after", LONG)


async def test_while_rabbitmq_is_away_publishes_fail_and_consumers_wait(queue: AmqpQueue, proxy: Proxy) -> None:
    await proxy.close()
    with pytest.raises(PublishFailed, match="no connection"):
        await queue.publish(0, 1, 1, "body", 0.3)
    with pytest.raises(QueueUnavailable, match="bind epoch 2"):
        await queue.bind(0, 2)
    assert ["RabbitMQ could not check" in finding for finding in await queue.check()] == [True]
    async with queue.consume(0, 1, 0) as consumer:
        assert list(await consumer.get(0.2)) == []
        await proxy.open()
        await queue.publish(0, 1, 2, "back", LONG)
        assert sequences(await drained(consumer, 1)) == {2}


async def test_a_cut_consumer_gets_the_unacknowledged_again_and_never_acknowledges_by_stale_tags(
    queue: AmqpQueue, direct: AmqpQueue, proxy: Proxy
) -> None:
    for number in range(1, 6):
        await direct.publish(0, 1, number, "body", LONG)
    async with queue.consume(0, 1, 0) as consumer:
        before = await drained(consumer, 5, acknowledge=False)
        proxy.cut()
        after = await drained(consumer, 5, acknowledge=False)
        assert all(message.redelivered for message in after)
        await consumer.ack(before)
        await consumer.ack([message for message in after if message.sequence == 3])
    async with direct.consume(0, 1, 0) as consumer:
        assert sequences(await drained(consumer, 4)) == {1, 2, 4, 5}


async def test_messages_keep_coming_while_the_consumer_is_cut_again_and_again(queue: AmqpQueue, direct: AmqpQueue, proxy: Proxy) -> None:
    seen: set[int] = set()
    async with asyncio.timeout(4 * LONG), queue.consume(0, 1, 0) as consumer:
        for round_number in range(8):
            for number in range(20):
                await direct.publish(0, 1, round_number * 20 + number, "body", LONG)
            while not (batch := list(await consumer.get(1.0))):
                pass
            some = random.sample(batch, len(batch) // 2)
            await consumer.ack(some)
            seen |= sequences(some)
            proxy.cut()
        while len(seen) < 160:
            batch = list(await consumer.get(1.0))
            await consumer.ack(batch)
            seen |= sequences(batch)
    assert seen == set(range(160))


async def test_cancelled_publishes_leave_the_channel_in_order(direct: AmqpQueue) -> None:
    tasks = [asyncio.create_task(direct.publish(0, 1, number, "x" * 20_000, LONG)) for number in range(1, 101)]
    confirmed: set[int] = set()
    for turn, task in enumerate(tasks):
        for _ in range(turn % 7):
            await asyncio.sleep(0)
        if turn % 2:
            task.cancel()
    for number, outcome in enumerate(await asyncio.gather(*tasks, return_exceptions=True), start=1):
        assert outcome is None or isinstance(outcome, asyncio.CancelledError)
        if outcome is None:
            confirmed.add(number)
    await direct.publish(0, 1, 101, "body", LONG)
    await direct.unbind(0, 1)
    with pytest.raises(PublishFailed, match="returned"):
        await direct.publish(0, 1, 102, "body", LONG)
    async with direct.consume(0, 1, 0) as consumer:
        arrived: set[int] = set()  # a cancelled publish may have arrived or not
        async with asyncio.timeout(LONG):
            while not confirmed | {101} <= arrived:
                arrived |= sequences(await consumer.get(1.0))


async def test_more_waiting_messages_than_the_prefetch_can_be_read_without_acknowledging(
    direct: AmqpQueue, amqp_url: str, namespace: str
) -> None:
    """A gap at the front of an epoch holds back everything behind it, and the end marker comes last."""
    for number in range(1, 101):
        await direct.publish(0, 1, number, "body", LONG)
    await direct.mark(0, 1, LONG)
    narrow = AmqpQueue(amqp_url, namespace, prefetch=5)
    async with narrow.consume(0, 1, 0) as consumer:
        async with asyncio.timeout(LONG):
            messages: list[Message] = []
            while not any(message.marker for message in messages):
                messages.extend(await consumer.get(0.1))
        assert sequences(messages) == set(range(101))


async def test_an_unreadable_message_is_parked_counted_and_holds_nothing_up(direct: AmqpQueue, amqp_url: str, namespace: str) -> None:
    events: list[Event] = []

    class Seen:
        def record(self, event: Event) -> None:
            events.append(event)

    headers = {"partition": 0, "epoch": 1, "sequence": 2}
    foreign = [
        aio_pika.Message(b"not ours"),
        aio_pika.Message(b"{}", type="entry", headers={**headers, "sequence": "2"}),
        aio_pika.Message(b"{}", type="entry", headers={**headers, "partition": 9}),
        aio_pika.Message(b"\xff\xfe", type="entry", headers=headers),
    ]
    async with raw_channel(amqp_url) as channel:
        try:
            await direct.publish(0, 1, 1, "first", LONG)
            for message in foreign:
                await channel.default_exchange.publish(message, f"{namespace}.0")
            await direct.publish(0, 1, 3, "last", LONG)
            watched = AmqpQueue(amqp_url, namespace, metrics=Seen())
            async with watched.consume(0, 1, 0) as consumer:
                assert sequences(await drained(consumer, 2)) == {1, 3}
                async with asyncio.timeout(LONG):
                    while len(events) < len(foreign):
                        assert list(await consumer.get(0.05)) == []
            await watched.close()
            assert events == [Happened("dead_letter", {"queue": f"{namespace}.0"})] * len(foreign)
            assert await direct.check() == [f"4 unreadable messages are parked in '{namespace}.dead': look at them, then purge it"]
            parked = await channel.get_queue(f"{namespace}.dead")
            bodies = []
            for _ in foreign:
                message = await parked.get()
                assert "x-unreadable" in message.headers
                bodies.append(message.body)
                await message.ack()
            assert bodies == [message.body for message in foreign]
            async with direct.consume(0, 1, 0) as consumer:
                assert list(await consumer.get(0.2)) == []
        finally:
            await channel.queue_delete(f"{namespace}.dead")


async def test_a_queue_that_would_lose_messages_is_refused_and_named(amqp_url: str, namespace: str) -> None:
    queue = AmqpQueue(amqp_url, namespace, partitions=2)
    async with raw_channel(amqp_url) as channel:
        await channel.declare_queue(f"{namespace}.1", durable=True)
    try:
        assert [f"{namespace}.1" in finding and "quorum" in finding for finding in await queue.check()] == [True]
        with pytest.raises(QueueMisconfigured, match="x-queue-type"):
            await queue.bind(1, 1)
        with pytest.raises(QueueMisconfigured):
            async with queue.consume(1, 1, 0) as consumer:
                await consumer.get(LONG)
    finally:
        await queue.delete(1)


async def test_a_queue_deleted_under_its_consumer_comes_back(direct: AmqpQueue, amqp_url: str, namespace: str) -> None:
    """Made again in the same breath, RabbitMQ 3.10 may hand the next message to the consumer that it had before, who never sees
    it; the worker then finds the entry in the journal. So here the consumer notices first."""
    watching = AmqpQueue(amqp_url, namespace, watch_interval=0.1)
    async with watching.consume(0, 1, 0) as consumer:
        await direct.publish(0, 1, 1, "body", LONG)
        assert sequences(await drained(consumer, 1)) == {1}
        before = consumer._generation
        await direct.delete(0)
        async with asyncio.timeout(LONG):
            while consumer._generation == before or consumer._channel is None:
                await asyncio.sleep(0.01)
        await direct.bind(0, 1)
        await direct.publish(0, 1, 2, "body", LONG)
        assert sequences(await drained(consumer, 1)) == {2}


async def test_a_consumer_that_rabbitmq_has_forgotten_comes_back(direct: AmqpQueue, amqp_url: str, namespace: str) -> None:
    """As after deleting and making a queue in one breath, which RabbitMQ 3.10 doesn't always tell."""
    watching = AmqpQueue(amqp_url, namespace, watch_interval=0.1)
    async with watching.consume(0, 1, 0) as consumer:
        await direct.publish(0, 1, 1, "body", LONG)
        assert sequences(await drained(consumer, 1)) == {1}
        channel = consumer._channel
        assert channel is not None
        await channel.basic_cancel(next(iter(channel.consumers)))
        await direct.publish(0, 1, 2, "body", LONG)
        assert sequences(await drained(consumer, 1)) == {2}


async def test_entries_are_persistent_and_carry_their_position(direct: AmqpQueue, amqp_url: str, namespace: str) -> None:
    await direct.publish(0, 1, 5, "body", LONG)
    await direct.mark(0, 1, LONG)
    async with raw_channel(amqp_url) as channel:
        queue = await channel.get_queue(f"{namespace}.0")
        arrived: asyncio.Queue[aio_pika.abc.AbstractIncomingMessage] = asyncio.Queue()
        await queue.consume(arrived.put)
        async with asyncio.timeout(LONG):
            entry, marker = await arrived.get(), await arrived.get()
    assert entry.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert entry.routing_key == "0.1"
    assert (entry.message_id, entry.type, entry.content_type) == ("0/1-5", "entry", "application/json")
    assert entry.headers == {"partition": 0, "epoch": 1, "sequence": 5, "version": 1}
    assert (marker.message_id, marker.type, marker.body) == ("0/1-end", "marker", b"")


async def test_subscribers_hear_of_applied_entries_and_nobody_has_to_listen(direct: AmqpQueue, amqp_url: str, namespace: str) -> None:
    entry = encode("n1", 1, [["deduct", "m1\x1fo1", "f", ["m1\x1fa", 2], [3], "", "", 0, ""]])
    heard = Message(0, 1, 1, announcement(entry, {0: "insufficient"}))
    await direct.announce([heard])
    async with raw_channel(amqp_url) as channel:
        mailbox = await channel.declare_queue(exclusive=True)
        await mailbox.bind(f"{namespace}.applied", "0")
        await direct.announce([heard, Message(0, 1, 2, announcement(entry, {}))])
        first, second = await mailbox.get(), await mailbox.get()
    assert [first.message_id, second.message_id] == ["0/1-1", "0/1-2"]
    read = read_announcement(0, 1, 1, first.body)
    assert read.refused == {0: "insufficient"}
    assert read.entry.operations[0].operation_id == "o1"
