"""RabbitMQ: what a quorum queue confirmed survives the loss of Redis."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import aio_pika
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import ChannelPreconditionFailed
from aiormq.abc import DeliveredMessage

from inventory_sdk.errors import InventoryError
from inventory_sdk.metrics.events import Metrics
from inventory_sdk.sync.queues.amqp_connection import close_connection, dial, own_cancellation_only
from inventory_sdk.sync.queues.amqp_consumer import AmqpConsumer
from inventory_sdk.sync.queues.amqp_link import Link
from inventory_sdk.sync.queues.amqp_topology import (
    Topology,
    compose,
    declare_exchanges,
    declare_queue,
    misfit,
    server_version,
    waiting_in,
)
from inventory_sdk.sync.queues.loops import PerLoop
from inventory_sdk.sync.queues.protocol import Message, QueueUnavailable

log = logging.getLogger(__name__)


class AmqpQueue:
    """One quorum queue per partition, one routing key per partition and epoch (``amqp_topology``).

    Nothing is connected before it is needed, and each event loop gets its own connections: one for publishing, one for each
    consumer. ``timeout`` (seconds) bounds everything that has no time-out of its own, ``max_in_flight`` the unconfirmed
    messages of an event loop, ``prefetch`` the unacknowledged ones of a consumer (more where it asks for more). Every
    ``watch_interval`` seconds a consumer makes sure that RabbitMQ still knows it. ``partitions`` is what ``check`` looks at.
    """

    def __init__(
        self,
        url: str,
        namespace: str,
        *,
        partitions: int = 1,
        timeout: float = 5.0,
        max_in_flight: int = 256,
        prefetch: int = 500,
        heartbeat: int = 10,
        watch_interval: float = 15.0,
        metrics: Metrics | None = None,
    ) -> None:
        self._url = url
        self._topology = Topology(namespace)
        self._partitions = partitions
        self._timeout = timeout
        self._prefetch = prefetch
        self._watch_interval = watch_interval
        if "heartbeat=" not in url:
            # aiormq reads it from the URL only, and its own default would notice a vanished server after three minutes.
            self._url += f"{'&' if '?' in url else '?'}heartbeat={heartbeat}"
        self._metrics = metrics
        self._links = PerLoop(lambda: Link(self._connect, self._topology, max_in_flight, metrics))

    @property
    def confirms(self) -> bool:
        """True."""
        return True

    async def start(self) -> None:
        """Nothing to do: a RabbitMQ that is away must not keep a service from starting. ``check`` tells."""

    async def close(self) -> None:
        """Close this event loop's publishing connection; unconfirmed publications fail. Consumers close their own."""
        link = self._links.pop()
        if link is not None:
            await link.close()

    async def bind(self, partition: int, epoch: int) -> None:
        """Declare exchanges and queue, bind the epoch. ``QueueMisconfigured`` for a queue that would lose messages."""
        async with self._administration(f"bind epoch {epoch} of partition {partition}") as connection:
            await declare_queue(connection, self._topology.queue(partition))
            channel = await connection.channel()
            await declare_exchanges(channel, self._topology)
            queue = await channel.get_queue(self._topology.queue(partition), ensure=False)
            await queue.bind(self._topology.journal, self._topology.key(partition, epoch))

    async def unbind(self, partition: int, epoch: int) -> None:
        """Take the epoch's binding away: messages that RabbitMQ gets from now on are returned."""
        async with self._administration(f"unbind epoch {epoch} of partition {partition}") as connection:
            channel = await connection.channel()
            await declare_exchanges(channel, self._topology)
            queue = await channel.get_queue(self._topology.queue(partition), ensure=False)
            await queue.unbind(self._topology.journal, self._topology.key(partition, epoch))

    async def publish(
        self, partition: int, epoch: int, sequence: int, body: str, timeout: float, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Persistent, mandatory, confirmed; or ``PublishFailed``. Also waits for its turn within ``timeout``."""
        message = compose("entry", partition, epoch, sequence, body, headers)
        await self._links.get().send("entries", self._topology.journal, self._topology.key(partition, epoch), message, timeout)

    async def deliver(self, partition: int, epoch: int, sequence: int, body: str, timeout: float) -> None:
        """Through the default exchange, which knows every queue by its name."""
        message = compose("entry", partition, epoch, sequence, body)
        await self._links.get().send("entries", "", self._topology.queue(partition), message, timeout)

    async def mark(self, partition: int, epoch: int, timeout: float) -> None:
        """The marker; a quorum queue keeps it behind all that it confirmed before."""
        message = compose("marker", partition, epoch, 0, "")
        await self._links.get().send("entries", "", self._topology.queue(partition), message, timeout)

    @asynccontextmanager
    async def consume(self, partition: int, epoch: int, after: int) -> AsyncIterator[AmqpConsumer]:
        """Connects in the background and stays in line until it is the active one."""
        queue = self._topology.queue(partition)
        consumer = AmqpConsumer(self._connect, queue, partition, self._prefetch, self._watch_interval, self._park, self._metrics)
        consumer.start()
        try:
            yield consumer
        finally:
            await consumer.stop()

    async def announce(self, messages: Sequence[Message]) -> None:
        """To the topic exchange ``<ns>.applied``, routing key ``<partition>``, persistent and confirmed. Queues that other
        services bound to it get it at least once as far as the worker calls this; without a queue it is gone."""
        link, exchange = self._links.get(), self._topology.applied
        sends = [
            link.send(
                "announcements",
                exchange,
                str(message.partition),
                compose("applied", message.partition, message.epoch, message.sequence, message.body),
                self._timeout,
            )
            for message in messages
        ]
        # All are waited for: one that failed must not leave the others running behind the caller's back.
        for outcome in await asyncio.gather(*sends, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def check(self) -> list[str]:
        """Connection, server version, arguments of the queues, parked messages.

        Policies (``max-length``, ``message-ttl``, ``delivery-limit``) can't be seen over AMQP.
        """
        findings: list[str] = []
        try:
            async with self._administration("check") as connection:
                version = server_version(connection)
                if version < (3, 10):
                    shown = ".".join(map(str, version)) or "of an unknown version"
                    findings.append(f"the server is {shown}: RabbitMQ 3.10 or later is needed")
                for partition in range(self._partitions):
                    wrong = await misfit(connection, self._topology.queue(partition))
                    if wrong is not None:
                        findings.append(wrong)
                parked = await waiting_in(connection, self._topology.dead)
                if parked:
                    dead = self._topology.dead
                    findings.append(f"{parked} unreadable messages are parked in {dead!r}: look at them, then purge it")
        except QueueUnavailable as error:
            findings.append(str(error))
        return findings

    async def delete(self, partition: int) -> None:
        """Delete the queue with all that is in it; the exchanges go with the last one. Parked messages stay."""
        async with self._administration(f"delete the queue of partition {partition}") as connection:
            channel = await connection.channel()
            # if_unused and if_empty are refused by quorum queues, with the whole connection.
            await channel.queue_delete(self._topology.queue(partition), if_unused=False, if_empty=False)
            for exchange in (self._topology.journal, self._topology.applied):
                channel = await connection.channel()
                try:
                    await channel.exchange_delete(exchange, if_unused=True)
                except ChannelPreconditionFailed:
                    log.debug("exchange %s is still in use", exchange)

    async def _connect(self, purpose: str) -> AbstractConnection:
        return await dial(self._url, purpose, self._timeout)

    @asynccontextmanager
    async def _administration(self, what: str) -> AsyncIterator[AbstractConnection]:
        # Rare, and an error closes the channel or the connection that it came over: so each time one of its own.
        try:
            with own_cancellation_only():
                async with asyncio.timeout(self._timeout):
                    connection = await self._connect("administration")
                    try:
                        yield connection
                    finally:
                        await close_connection(connection)
        except InventoryError:
            raise
        except TimeoutError as error:
            raise QueueUnavailable(f"RabbitMQ did not {what} within {self._timeout:g} s") from error
        except Exception as error:
            raise QueueUnavailable(f"RabbitMQ could not {what}: {error!r}") from error

    async def _park(self, delivered: DeliveredMessage, why: str) -> None:
        """Move a copy to ``<ns>.dead``, with its headers and the reason."""
        async with self._administration("declare the parking queue") as connection:
            channel = await connection.channel()
            await channel.declare_queue(self._topology.dead, durable=True, arguments={"x-queue-type": "quorum"})
        properties = delivered.header.properties
        origin = {"x-unreadable": why, "x-from": str(delivered.routing_key), "x-message-id": str(properties.message_id)}
        message = aio_pika.Message(
            delivered.body,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            content_type=properties.content_type,
            type=properties.message_type,
            headers={**(properties.headers or {}), **origin},
        )
        await self._links.get().send("entries", "", self._topology.dead, message, self._timeout)
