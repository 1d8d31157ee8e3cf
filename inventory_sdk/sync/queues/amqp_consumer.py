"""The worker's side of RabbitMQ: a consumer that survives its connections and acknowledges only what it was told to."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from aio_pika.abc import AbstractConnection
from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.exceptions import AMQPError

from inventory_sdk.metrics.events import Happened, Metrics, Retried
from inventory_sdk.sync.backoff import Backoff, waited
from inventory_sdk.sync.queues.amqp_connection import close_connection, own_cancellation_only
from inventory_sdk.sync.queues.amqp_topology import Unparseable, declare_queue, parse
from inventory_sdk.sync.queues.protocol import Message, PublishFailed, QueueMisconfigured

log = logging.getLogger(__name__)

MAX_PREFETCH: Final = 65_535

Park = Callable[[DeliveredMessage, str], Awaitable[None]]


class AckLedger:
    """Which delivery tags of one channel are settled, and the fewest frames that settle more of them.

    RabbitMQ closes the channel over a tag it doesn't expect, so each tag is settled exactly once. ``multiple`` reaches only
    as far as every tag below was asked for.
    """

    def __init__(self) -> None:
        self.delivered = 0
        self._floor = 0
        self._asked: set[int] = set()
        self._singly: set[int] = set()

    @property
    def outstanding(self) -> int:
        """Delivered and not settled."""
        return self.delivered - self._floor - len(self._singly)

    def ask(self, tag: int) -> None:
        """The tag may be settled."""
        if self._floor < tag <= self.delivered and tag not in self._singly:
            self._asked.add(tag)

    def next_frame(self) -> tuple[int, bool] | None:
        """(tag, multiple) to send next, None when all that was asked is settled. Call ``sent`` once it is on its way."""
        top = prefix = self._floor
        while prefix + 1 in self._asked or prefix + 1 in self._singly:
            prefix += 1
            if prefix in self._asked:
                top = prefix
        if top > self._floor:
            return top, True
        return (min(self._asked), False) if self._asked else None

    def sent(self, tag: int, multiple: bool) -> None:
        """The frame is on its way."""
        if not multiple:
            self._asked.discard(tag)
            self._singly.add(tag)
            return
        self._floor = tag
        self._asked = {asked for asked in self._asked if asked > tag}
        self._singly = {singly for singly in self._singly if singly > tag}


class AmqpConsumer:
    """Consumes one partition's queue over a connection of its own; after a loss it connects again and all that was not
    acknowledged comes again. A tag is (generation, delivery tag): one of an earlier channel is never acknowledged on this one.
    """

    def __init__(
        self,
        connect: Callable[[str], Awaitable[AbstractConnection]],
        queue: str,
        partition: int,
        prefetch: int,
        watch_interval: float,
        park: Park,
        metrics: Metrics | None,
    ) -> None:
        self._connect = connect
        self._queue = queue
        self._partition = partition
        self._prefetch = prefetch
        self._watch_interval = watch_interval
        self._park = park
        self._metrics = metrics
        self._buffer: deque[Message] = deque()
        self._unreadable: deque[tuple[DeliveredMessage, str, int]] = deque()
        self._arrived = asyncio.Event()
        self._found_unreadable = asyncio.Event()
        self._generation = 0
        self._channel: AbstractChannel | None = None
        self._acks = AckLedger()
        self._acking = asyncio.Lock()
        self._lost = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to connect; ``get`` answers nothing until then."""
        for task in (asyncio.create_task(self._keep_consuming()), asyncio.create_task(self._park_unreadable())):
            task.set_name(f"inventory-consume-{self._queue}")
            task.add_done_callback(lambda _: self._arrived.set())
            self._tasks.add(task)

    async def stop(self) -> None:
        """Close the connection; what was not acknowledged goes to the next consumer."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)

    async def get(self, timeout: float) -> Sequence[Message]:
        """All that was delivered, after up to ``timeout`` seconds for the first. To call it says that there is room for more."""
        if not self._buffer:
            self._raise_if_dead()
            try:
                async with asyncio.timeout(timeout):
                    await self._arrived.wait()
            except TimeoutError:
                self._widen()
                return []
            self._raise_if_dead()
        # Nothing is awaited from here on, so a cancelled get() has taken nothing.
        taken = list(self._buffer)
        self._buffer.clear()
        self._arrived.clear()
        return taken

    async def ack(self, messages: Sequence[Message]) -> None:
        """Settle these. Those of a lost channel are skipped: they come again anyway."""
        for message in messages:
            generation, tag = message.tag
            if generation == self._generation:
                self._acks.ask(tag)
        await self._settle()

    async def _settle(self) -> None:
        async with self._acking:
            acks, channel = self._acks, self._channel
            try:
                while channel is not None and acks is self._acks and (frame := acks.next_frame()) is not None:
                    tag, multiple = frame
                    # Without waiting for the socket: a cancellation here has sent either all of the frame or nothing.
                    await channel.basic_ack(tag, multiple=multiple, wait=False)
                    acks.sent(tag, multiple)
            except (AMQPError, ConnectionError) as error:
                log.info("acknowledgements for %s went down with their channel, the messages come again: %r", self._queue, error)

    def _raise_if_dead(self) -> None:
        for task in self._tasks:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error

    def _widen(self) -> None:
        # All of the prefetch is out, the caller still asks for more: it waits for one that is queued behind (a gap, the end
        # of an epoch). Prefetch belongs to the consumer's birth, so the channel is opened again with more of it.
        if self._channel is not None and 0 < self._prefetch <= self._acks.outstanding:
            self._prefetch = self._prefetch * 4 if self._prefetch * 4 <= MAX_PREFETCH else 0
            shown = self._prefetch or "unlimited"
            log.info("%s: all prefetched messages wait unacknowledged, prefetch becomes %s", self._queue, shown)
            self._lost.set()

    async def _keep_consuming(self) -> None:
        backoff = Backoff(0.05, 2.0)
        while True:
            generation, prefetch = self._generation, self._prefetch
            reason: object = "connection lost"
            try:
                with own_cancellation_only():
                    await self._consume_once()
            except QueueMisconfigured:
                raise
            except Exception as error:  # noqa: BLE001  also a wrong password: someone may be mending it right now
                reason = error
            if self._prefetch != prefetch:
                continue
            if self._generation > generation:
                backoff.reset()
            pause = backoff.delay()
            if self._metrics is not None:
                self._metrics.record(Retried("queue", type(reason).__name__ if isinstance(reason, Exception) else "lost"))
            log.warning("consuming %s: %r, connecting again in %.2f s", self._queue, reason, pause)
            await asyncio.sleep(pause)

    async def _consume_once(self) -> None:
        """Until the channel is lost."""
        connection = await self._connect("consume")
        try:
            await declare_queue(connection, self._queue)
            outer = await connection.channel(publisher_confirms=False)
            await outer.set_qos(prefetch_count=self._prefetch)
            channel = await outer.get_underlay_channel()
            lost = self._lost = asyncio.Event()
            outer.close_callbacks.add(lambda *_: lost.set())
            channel.on_consumer_cancel_callbacks.add(lambda _: lost.set())  # the queue was deleted
            self._generation += 1
            self._acks = AckLedger()
            self._channel = channel
            generation = self._generation
            await channel.basic_consume(self._queue, partial(self._take, generation))
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # The client's own waits (wait_for, Python 3.11) may have swallowed it, and nobody will repeat it.
                raise asyncio.CancelledError
            stuck_at = -1
            while not (outer.is_closed or await waited(lost, self._watch_interval)):
                # Where a queue is deleted and made again at once, RabbitMQ 3.10 forgets its consumer without telling it, or goes
                # on counting it and delivers nothing. (A standby that waits for its turn just connects again now and then.)
                found = (await outer.declare_queue(self._queue, passive=True)).declaration_result
                if found.consumer_count == 0:
                    raise ConnectionError("RabbitMQ no longer knows this consumer")
                room = not self._prefetch or self._acks.outstanding < self._prefetch
                if found.message_count and room and stuck_at == self._acks.delivered:
                    raise ConnectionError("messages are ready and RabbitMQ delivers none")
                stuck_at = self._acks.delivered if found.message_count and room else -1
        finally:
            self._channel = None
            self._buffer.clear()
            self._arrived.clear()
            self._unreadable.clear()
            await close_connection(connection)

    async def _take(self, generation: int, delivered: DeliveredMessage) -> None:
        tag = delivered.delivery_tag
        if generation != self._generation or self._channel is None or tag is None:
            return
        self._acks.delivered = max(self._acks.delivered, tag)
        try:
            message = parse(delivered, self._partition, (generation, tag))
        except Unparseable as error:
            self._unreadable.append((delivered, str(error), generation))
            self._found_unreadable.set()
            return
        self._buffer.append(message)
        self._arrived.set()

    async def _park_unreadable(self) -> None:
        while True:
            await self._found_unreadable.wait()
            self._found_unreadable.clear()
            while self._unreadable:
                delivered, why, generation = self._unreadable.popleft()
                try:
                    await self._park(delivered, why)
                except PublishFailed as error:
                    # Still unacknowledged, so not lost; the pause is for a RabbitMQ that refuses at once.
                    log.warning("an unreadable message of %s could not be parked yet: %s", self._queue, error)
                    if generation == self._generation and self._channel is not None:
                        self._unreadable.appendleft((delivered, why, generation))
                    await asyncio.sleep(1.0)
                    continue
                log.error("an unreadable message of %s was parked: %s", self._queue, why)
                if self._metrics is not None:
                    self._metrics.record(Happened("dead_letter", {"queue": self._queue}))
                if generation == self._generation and delivered.delivery_tag is not None:
                    self._acks.ask(delivered.delivery_tag)
                    await self._settle()
