"""RabbitMQ that refuses: behind a memory or disk alarm, with a full queue, emptied. Publishes end in time, the stock goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import pytest
from worker_fakes import Facts, FakeLedger, FakeRedis, body, until

from inventory_sdk.metrics.events import Event, Published, Retried
from inventory_sdk.sync.publish import Publisher
from inventory_sdk.sync.queues.amqp import AmqpQueue
from inventory_sdk.sync.queues.protocol import PublishFailed, Unroutable
from inventory_sdk.sync.worker import Worker

pytestmark = pytest.mark.amqp
LONG = 30.0
PUBLISH = b"\x00\x3c\x00\x28"
"""basic.publish: class 60, method 40."""


class AlarmProxy:
    """Does what RabbitMQ does behind a memory or disk alarm: a connection that publishes is told ``connection.blocked`` and
    nothing of it is read any more, until the alarm is over."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._server: asyncio.Server | None = None
        self._pumps: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()
        self._over.set()
        self.port = 0
        self.blocked = 0

    async def __aenter__(self) -> AlarmProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        if self._pumps:
            await asyncio.wait(self._pumps)
        await self._server.wait_closed()

    def alarm(self, on: bool) -> None:
        if on:
            self._over.clear()
        else:
            self._over.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        for source, sink, other in ((reader, far_writer, writer), (far_reader, writer, None)):
            pump = asyncio.create_task(self._pump(source, sink, other))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, client: asyncio.StreamWriter | None) -> None:
        try:
            while data := await source.read(65536):
                if client is not None and not self._over.is_set() and PUBLISH in data:
                    self.blocked += 1
                    client.write(_frame(b"\x00\x0a\x00\x3c" + b"\x0blow on disk"))
                    await self._over.wait()
                    client.write(_frame(b"\x00\x0a\x00\x3d"))
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            sink.transport.abort()
        finally:
            sink.close()


def _frame(payload: bytes) -> bytes:
    """A method frame on channel 0."""
    return b"\x01\x00\x00" + len(payload).to_bytes(4, "big") + payload + b"\xce"


@pytest.fixture
async def direct(amqp_url: str, namespace: str) -> AsyncIterator[AmqpQueue]:
    queue = AmqpQueue(amqp_url, namespace)
    await queue.bind(0, 1)
    try:
        yield queue
    finally:
        await queue.delete(0)
        await queue.close()


@pytest.fixture
async def proxy(amqp_url: str) -> AsyncIterator[AlarmProxy]:
    parts = urlsplit(amqp_url)
    async with AlarmProxy(parts.hostname or "127.0.0.1", parts.port or 5672) as proxy:
        yield proxy


@pytest.fixture
async def queue(amqp_url: str, proxy: AlarmProxy, namespace: str, direct: AmqpQueue) -> AsyncIterator[AmqpQueue]:
    parts = urlsplit(amqp_url)
    login = f"{parts.username}:{parts.password}@" if parts.username else ""
    queue = AmqpQueue(urlunsplit(parts._replace(netloc=f"{login}127.0.0.1:{proxy.port}")), namespace, timeout=2.0)
    try:
        yield queue
    finally:
        proxy.alarm(False)
        await queue.close()


async def test_behind_an_alarm_publishes_end_in_time_and_go_through_when_it_is_over(
    queue: AmqpQueue, direct: AmqpQueue, proxy: AlarmProxy
) -> None:
    await queue.publish(0, 1, 1, body(1), LONG)
    proxy.alarm(True)
    before = len(asyncio.all_tasks())
    outcomes = await asyncio.gather(*(queue.publish(0, 1, 2 + n, body(2 + n), 0.5) for n in range(600)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {PublishFailed}
    assert proxy.blocked
    # Nothing of them stays behind and waits for the end of the alarm in this process' memory.
    assert len(asyncio.all_tasks()) - before < 100
    proxy.alarm(False)
    await queue.publish(0, 1, 1000, body(1000), LONG)
    got: set[int] = set()
    async with direct.consume(0, 1, 0) as consumer, asyncio.timeout(LONG):
        while not {1, 1000} <= got:
            messages = await consumer.get(1.0)
            got |= {message.sequence for message in messages}
            await consumer.ack(messages)


async def test_behind_an_alarm_the_worker_goes_on_applying(queue: AmqpQueue, proxy: AlarmProxy) -> None:
    ledger, redis, facts = FakeLedger(), FakeRedis(), Facts()
    ledger.open_at(0, 1)
    plain: Any = ledger
    stock: Any = redis
    proxy.alarm(True)
    async with Worker(stock, plain, queue, partitions=[0], metrics=facts, on_event=facts.on_event, idle=0.01, first_delay=0.01):
        # Nothing can be published: the journal is read. Nothing can be announced: that waits aside.
        for sequence in range(1, 50):
            redis.write(sequence)
            await until(lambda sequence=sequence: ledger.watermark() == sequence, LONG)
        await until(lambda: "announce" in facts.retried(), LONG)
        proxy.alarm(False)


async def test_a_nack_is_tried_again_until_the_queue_has_room(direct: AmqpQueue, namespace: str, amqp_url: str) -> None:
    """A queue beside ours that is full refuses for all: RabbitMQ nacks what one of its queues rejects."""
    events: list[Event] = []

    class Sink:
        def record(self, event: Event) -> None:
            events.append(event)

    publisher = Publisher(direct, Sink(), timeout=LONG)
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        arguments: Any = {"x-max-length": 1, "x-overflow": "reject-publish"}
        small = await channel.declare_queue(f"{namespace}.small", arguments=arguments, auto_delete=False)
        try:
            await small.bind(f"{namespace}.journal", "0.1")
            await direct.publish(0, 1, 1, body(1), LONG)
            with pytest.raises(PublishFailed, match="refused") as caught:
                await direct.publish(0, 1, 2, body(2), LONG)
            assert not isinstance(caught.value, Unroutable)
            publication = publisher.publish(0, 1, 3, body(3))
            async with asyncio.timeout(LONG):
                while not any(isinstance(event, Retried) and event.what == "publish" for event in events):
                    await asyncio.sleep(0.01)
        finally:
            await channel.queue_delete(f"{namespace}.small")
        await publication
    assert [event.failed for event in events if isinstance(event, Published)] == [None]
    await publisher.close()


async def test_a_broker_that_was_emptied_under_a_running_worker_lets_publishes_in_again(direct: AmqpQueue) -> None:
    ledger, redis, facts = FakeLedger(), FakeRedis(), Facts()
    ledger.open_at(0, 1)
    plain: Any = ledger
    stock: Any = redis
    redis.write(1)
    async with Worker(stock, plain, direct, partitions=[0], metrics=facts, on_event=facts.on_event, idle=0.05, rebind=0.2):
        await direct.publish(0, 1, 1, redis.journal[1, 1], LONG)
        await until(lambda: ledger.watermark() == 1, LONG)
        await direct.delete(0)
        with pytest.raises(PublishFailed):
            await direct.publish(0, 1, 2, redis.write(2), 1.0)
        # The worker makes queue and binding anew; until then everything is returned, and read from the journal.
        async with asyncio.timeout(LONG):
            while True:
                with suppress(PublishFailed):
                    await direct.publish(0, 1, 2, redis.journal[1, 2], 1.0)
                    break
                await asyncio.sleep(0.05)
        await until(lambda: ledger.watermark() == 2, LONG)
