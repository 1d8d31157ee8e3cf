"""The publishing side of one event loop: one connection, made again when it is lost, and publications that always end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import DeliveryError, PublishError

from inventory_sdk.metrics.events import Metrics, Retried
from inventory_sdk.sync.backoff import Backoff
from inventory_sdk.sync.queues.amqp_connection import close_connection, own_cancellation_only
from inventory_sdk.sync.queues.amqp_topology import Topology, declare_exchanges
from inventory_sdk.sync.queues.protocol import PublishFailed, Unroutable

log = logging.getLogger(__name__)

Purpose = Literal["entries", "announcements"]


class Link:
    """Publishes with confirms, at most ``max_in_flight`` at a time."""

    def __init__(
        self,
        connect: Callable[[str], Awaitable[AbstractConnection]],
        topology: Topology,
        max_in_flight: int,
        metrics: Metrics | None,
    ) -> None:
        self._connect = connect
        self._topology = topology
        self._metrics = metrics
        self._slots = asyncio.Semaphore(max_in_flight)
        self._connection: AbstractConnection | None = None
        self._channels: dict[str, AbstractChannel] = {}
        self._opening: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._sending: dict[str, asyncio.Future[None]] = {}
        self._trouble: BaseException | None = None
        self._answered = 0.0

    async def send(self, purpose: Purpose, exchange: str, routing_key: str, message: aio_pika.Message, timeout: float) -> None:
        """Returns once RabbitMQ has confirmed; else ``PublishFailed``, at the latest after ``timeout`` seconds.

        Entries are mandatory: nowhere to go is ``Unroutable``. Announcements that nobody subscribed to are confirmed.
        """
        loop = asyncio.get_running_loop()
        what = f"{message.type} {message.message_id or ''} for {exchange or 'queue'} {routing_key!r}"
        used: AbstractConnection | None = None
        began = loop.time()
        try:
            with own_cancellation_only():
                async with asyncio.timeout(timeout), self._slots, self._alone(message.message_id):
                    channel = await self._channel(purpose)
                    used, began = self._connection, loop.time()
                    target = await channel.get_exchange(exchange, ensure=False)
                    await target.publish(message, routing_key, mandatory=purpose == "entries")
        except PublishError as error:
            self._answered = loop.time()
            raise Unroutable(f"{what} was returned: nothing is bound") from error
        except DeliveryError as error:
            self._answered = loop.time()
            raise PublishFailed(f"{what} was refused by RabbitMQ") from error
        except TimeoutError as error:
            self._doubt(used, began)
            why = f" (no connection: {self._trouble!r})" if used is None and self._trouble else ""
            raise PublishFailed(f"{what} was not confirmed within {timeout:g} s{why}") from error
        except Exception as error:  # whatever the client says: there is no confirm
            raise PublishFailed(f"{what} was not confirmed: {error!r}") from error
        self._answered = loop.time()

    async def close(self) -> None:
        """Close the connection; publications that wait on it fail."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        self._retire()
        if self._closing:
            await asyncio.wait(set(self._closing))

    @asynccontextmanager
    async def _alone(self, message_id: str | None) -> AsyncIterator[None]:
        # aiormq finds the publication of a returned message by its message id. Of two in flight with one id it would fail one
        # and *confirm* the other, so a duplicate waits until the first has its answer.
        if message_id is None:
            yield
            return
        while (other := self._sending.get(message_id)) is not None:
            await asyncio.wait({other})
        mine = self._sending[message_id] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._sending[message_id]
            mine.set_result(None)

    async def _channel(self, purpose: Purpose) -> AbstractChannel:
        while True:
            channel = self._channels.get(purpose)
            if channel is not None and not channel.is_closed and self._connection is not None and not self._connection.is_closed:
                return channel
            if self._opening is None or self._opening.done():
                # A task of its own: a caller whose time runs out must not break off what the others wait for.
                self._opening = asyncio.create_task(self._open(), name="inventory-amqp-connect")
            await asyncio.shield(self._opening)

    async def _open(self) -> None:
        self._retire()
        backoff = Backoff(0.05, 2.0)
        while True:
            try:
                with own_cancellation_only():
                    await self._open_once()
                self._trouble = None
                return
            except Exception as error:  # noqa: BLE001  also a wrong password or vhost: someone may be mending it right now
                self._trouble = error
                pause = backoff.delay()
                if self._metrics is not None:
                    self._metrics.record(Retried("queue", type(error).__name__))
                log.warning("no connection to RabbitMQ for publishing, trying again in %.2f s: %r", pause, error)
            await asyncio.sleep(pause)

    async def _open_once(self) -> None:
        connection = await self._connect("publish")
        try:
            entries = await connection.channel(publisher_confirms=True, on_return_raises=True)
            await declare_exchanges(entries, self._topology)
            # Announcements carry the ids of entries; on a channel of their own they can't be mistaken for them (see _alone).
            announcements = await connection.channel(publisher_confirms=True, on_return_raises=True)
        except BaseException:
            await close_connection(connection)
            raise
        self._connection = connection
        self._channels = {"entries": entries, "announcements": announcements}

    def _doubt(self, used: AbstractConnection | None, began: float) -> None:
        # A peer that vanished without a word is noticed by heartbeats after half a minute. A connection that confirmed nothing
        # for as long as a publication waited is given up now; the next publication opens another.
        if used is not None and used is self._connection and self._answered < began:
            self._retire()

    def _retire(self) -> None:
        connection, self._connection = self._connection, None
        self._channels = {}
        if connection is not None:
            task = asyncio.create_task(close_connection(connection), name="inventory-amqp-close")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
