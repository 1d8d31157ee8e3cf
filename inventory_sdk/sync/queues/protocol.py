"""What a queue must do. Implementations: ``stream`` (the journal itself), ``amqp`` (RabbitMQ), ``memory`` (one process)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from inventory_sdk.errors import InventoryError


class PublishFailed(InventoryError):
    """The queue did not confirm the message: connection lost, time-out, nack, or returned (no such epoch is bound)."""


@dataclass(frozen=True, slots=True)
class Message:
    """One journal entry on its way. ``tag`` belongs to the queue. ``marker``: the end of ``epoch``; it has no body."""

    partition: int
    epoch: int
    sequence: int
    body: str
    tag: Any = None
    marker: bool = False
    redelivered: bool = False


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
        """True when a confirmed publish survives the loss of Redis (durability ``queue`` is possible)."""
        ...

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def bind(self, partition: int, epoch: int) -> None:
        """Make the partition's queue if it is missing, and let messages of this epoch in. Idempotent."""
        ...

    async def unbind(self, partition: int, epoch: int) -> None:
        """The fence: a later publish for this epoch is returned, so never confirmed. Idempotent."""
        ...

    async def publish(self, partition: int, epoch: int, sequence: int, body: str, timeout: float) -> None:
        """Returns once the queue has confirmed; else ``PublishFailed``. A duplicate is harmless."""
        ...

    async def mark(self, partition: int, epoch: int, timeout: float) -> None:
        """Put the end-of-epoch marker behind everything that was confirmed (after ``unbind``)."""
        ...

    def consume(self, partition: int, epoch: int, after: int) -> AbstractAsyncContextManager[Consumer]:
        """Become the partition's active consumer, or wait to. ``after``: the ledger's watermark (streams begin there)."""
        ...

    async def check(self) -> list[str]:
        """For ``doctor``: what to change, in words; empty when all is well."""
        ...

    async def delete(self, partition: int) -> None:
        """Remove the partition's queue and bindings (tests, decommissioning)."""
        ...
