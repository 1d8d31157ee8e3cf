"""What stands in RabbitMQ: names, arguments, messages.

    <ns>.journal   direct exchange, routing key <partition>.<epoch>     what the callers' processes publish
    <ns>.<p>       quorum queue, single active consumer                 one per partition
    <ns>.applied   topic exchange, routing key <partition>              what other services subscribe to
    <ns>.dead      quorum queue                                         messages nobody could read

Connections are made and closed elsewhere (``amqp_connection``).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed
from aiormq.abc import DeliveredMessage

from inventory_sdk.stock.journal import VERSION
from inventory_sdk.sync.queues.protocol import Message, QueueMisconfigured
from inventory_sdk.tracing import HEADERS

log = logging.getLogger(__name__)


class Unparseable(ValueError):
    """The message isn't ours, or was damaged; the text says what is wrong with it."""


class Topology:
    """The names of one namespace."""

    def __init__(self, namespace: str) -> None:
        self.journal = f"{namespace}.journal"
        self.applied = f"{namespace}.applied"
        self.dead = f"{namespace}.dead"
        self._namespace = namespace

    def queue(self, partition: int) -> str:
        """The partition's queue."""
        return f"{self._namespace}.{partition}"

    def key(self, partition: int, epoch: int) -> str:
        """The routing key whose binding is the epoch's gate."""
        return f"{partition}.{epoch}"


def server_version(connection: AbstractConnection) -> tuple[int, ...]:
    """(4, 1, 2) and the like; () where the server doesn't say or isn't RabbitMQ."""
    if connection.transport is None:
        return ()
    properties: Mapping[str, Any] = connection.transport.connection.server_properties or {}
    numbers = str(properties.get("version", "")).partition("-")[0].split(".")
    return tuple(int(number) for number in numbers if number.isdigit())


def queue_arguments(version: tuple[int, ...]) -> dict[str, Any]:
    """A quorum queue with one active consumer and no delivery limit.

    RabbitMQ 4 drops a message after 20 redeliveries unless told -1. RabbitMQ 3 has no limit by default and takes -1 for
    *zero*, which drops a message at its first redelivery: it must not be told.
    """
    arguments: dict[str, Any] = {"x-queue-type": "quorum", "x-single-active-consumer": True}
    if version >= (4,):
        arguments["x-delivery-limit"] = -1
    return arguments


async def declare_queue(connection: AbstractConnection, name: str) -> None:
    """Make the partition's queue, or make sure that the one that is there keeps messages.

    A queue of RabbitMQ 3 that lives on in RabbitMQ 4 can't be given the limit any more; it is used, and ``misfit`` names it.
    """
    wrong = await misfit(connection, name, create=True)
    if wrong is None:
        return
    if "x-delivery-limit" not in wrong:
        raise QueueMisconfigured(wrong)
    log.warning("%s", wrong)


async def misfit(connection: AbstractConnection, name: str, create: bool = False) -> str | None:
    """What is wrong with the queue's arguments, in words; None when they are right or there is no such queue."""
    arguments = queue_arguments(server_version(connection))
    if not create and await waiting_in(connection, name) is None:
        return None
    # The channel is left to the connection's end: closing one waits with wait_for, which may swallow a cancellation in 3.11.
    channel = await connection.channel(publisher_confirms=False)
    try:
        # A declaration is the one way to compare arguments over AMQP: it is refused when they differ.
        await channel.declare_queue(name, durable=True, arguments=arguments)
    except ChannelPreconditionFailed as error:
        return f"queue {name!r} must have {arguments}: {error}; drain it, delete it, and let the worker make it anew"
    return None


async def waiting_in(connection: AbstractConnection, name: str) -> int | None:
    """How many messages are ready in the queue; None where there is no such queue."""
    channel = await connection.channel(publisher_confirms=False)
    try:
        queue = await channel.declare_queue(name, passive=True)
    except ChannelNotFoundEntity:
        return None
    return queue.declaration_result.message_count or 0


async def declare_exchanges(channel: AbstractChannel, topology: Topology) -> None:
    """Both exchanges, durable. Idempotent."""
    await channel.declare_exchange(topology.journal, aio_pika.ExchangeType.DIRECT, durable=True)
    await channel.declare_exchange(topology.applied, aio_pika.ExchangeType.TOPIC, durable=True)


def compose(kind: str, partition: int, epoch: int, sequence: int, body: str, more: Mapping[str, str] | None = None) -> aio_pika.Message:
    """The message; ``kind`` is ``entry``, ``marker`` or ``applied``; ``more``: the headers of a trace."""
    return aio_pika.Message(
        body.encode(),
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        content_type="application/json",
        message_id=f"{partition}/{epoch}-{'end' if kind == 'marker' else sequence}",
        type=kind,
        app_id="inventory_sdk",
        headers={**(more or {}), "partition": partition, "epoch": epoch, "sequence": sequence, "version": VERSION},
    )


def parse(delivered: DeliveredMessage, partition: int, tag: object) -> Message:
    """The message as the worker wants it, or ``Unparseable``."""
    properties = delivered.header.properties
    headers: Mapping[str, Any] = properties.headers or {}
    if properties.message_type not in ("entry", "marker"):
        raise Unparseable(f"type is {properties.message_type!r}, not entry or marker")
    said = [headers.get(name) for name in ("partition", "epoch", "sequence")]
    numbers = [number for number in said if type(number) is int and number >= 0]
    if len(numbers) < len(said):
        raise Unparseable(f"headers partition, epoch, sequence are {said}, not whole numbers")
    of, epoch, sequence = numbers
    if of != partition:
        raise Unparseable(f"it is of partition {of}, this is the queue of {partition}")
    try:
        body = delivered.body.decode()
    except UnicodeDecodeError as error:
        raise Unparseable(f"the body is not UTF-8: {error}") from error
    redelivered = bool(getattr(delivered.delivery, "redelivered", False))
    marker = properties.message_type == "marker"
    traced = {name: value for name in HEADERS if type(value := headers.get(name)) is str}
    return Message(partition, epoch, sequence, body, tag, marker, redelivered, traced or None)
