"""What a queue must do. Implementations: ``stream`` (the journal itself), ``amqp`` (RabbitMQ), ``memory`` (one process)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from inventory_sdk.errors import InventoryError


class PublishFailed(InventoryError):
    """The queue did not confirm the message: connection lost, time-out, nack, or returned. It may have arrived all the same."""


class Unroutable(PublishFailed):
    """Returned: this epoch is not bound (any more), so the message is nowhere. Trying again can't help."""


class QueueUnavailable(InventoryError):
    """``bind``, ``unbind``, ``delete`` could not be done now; all three may be repeated."""


class QueueMisconfigured(InventoryError):
    """The queue exists with settings that would lose messages; the message says which."""


@dataclass(frozen=True, slots=True)
class Message:
    """One journal entry on its way. ``tag`` belongs to the queue. ``marker``: the end of ``epoch``; it has no body. ``headers``: what
    was published along with it, where the queue carries any."""

    partition: int
    epoch: int
    sequence: int
    body: str
    tag: Any = None
    marker: bool = False
    redelivered: bool = False
    headers: Mapping[str, str] | None = None


class Consumer(Protocol):
    """Messages of one partition, at least once each, maybe out of order."""

    async def get(self, timeout: float) -> Sequence[Message]:
        """All that is there, after waiting up to ``timeout`` seconds for the first; empty when nothing came."""
        ...

    async def ack(self, messages: Sequence[Message]) -> None:
        """These are in the ledger. Unacknowledged ones come again to the next consumer."""
        ...


class Queue(Protocol):
    """A way from the process that journaled an entry to the worker."""

    @property
    def confirms(self) -> bool:
        """True when a confirmed publish survives the loss of Redis (durability ``queue`` is possible).

        False: nothing needs to be published, the consumer reads the journal."""
        ...

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def bind(self, partition: int, epoch: int) -> None:
        """Make the partition's queue if it is missing, and let messages of this epoch in. Idempotent."""
        ...

    async def unbind(self, partition: int, epoch: int) -> None:
        """The fence: a later publish for this epoch is returned, so never confirmed. Idempotent."""
        ...

    async def publish(
        self, partition: int, epoch: int, sequence: int, body: str, timeout: float, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Returns once the queue has confirmed; else ``PublishFailed`` (``Unroutable`` below it). A duplicate is harmless.
        ``timeout`` is in seconds and is kept, whatever state the connection is in. ``headers`` (of a trace) come along with the
        message where the queue can carry them."""
        ...

    async def deliver(self, partition: int, epoch: int, sequence: int, body: str, timeout: float) -> None:
        """Like ``publish``, but straight into the partition's queue, past the bindings: recovery sends what it found in the
        journal of an epoch that is fenced."""
        ...

    async def mark(self, partition: int, epoch: int, timeout: float) -> None:
        """Put the end-of-epoch marker behind everything that was confirmed (after ``unbind``)."""
        ...

    def consume(self, partition: int, epoch: int, after: int) -> AbstractAsyncContextManager[Consumer]:
        """Become the partition's active consumer, or wait to. ``after``: the ledger's watermark (streams begin there)."""
        ...

    async def announce(self, messages: Sequence[Message]) -> None:
        """Tell subscribers that the ledger has applied these entries; a body is ``announcement.announcement(…)``. For the
        worker, after its commit. ``PublishFailed`` when it is not sure of all of them; repeating is harmless."""
        ...

    async def check(self) -> list[str]:
        """For ``doctor``: what to change, in words; empty when all is well."""
        ...

    async def delete(self, partition: int) -> None:
        """Remove the partition's queue and bindings (tests, decommissioning)."""
        ...
