"""A queue inside one process, with RabbitMQ's manners: bindings, returned messages, one active consumer, redelivery."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from inventory_sdk.sync.queues.protocol import Message, Unroutable

MAX_ANNOUNCEMENTS: Final = 10_000
"""What a subscriber may be behind; then it loses the oldest, as a Redis stream of that length would."""


@dataclass(slots=True)
class _Partition:
    bound: set[int] = field(default_factory=set)
    waiting: deque[Message] = field(default_factory=deque)
    consumers: list[MemoryConsumer] = field(default_factory=list)

    def active(self) -> MemoryConsumer | None:
        """The consumer that came first. One whose event loop was closed under it can't come back: its messages do."""
        while self.consumers:
            first = self.consumers[0]
            if not first.loop.is_closed():
                return first
            first.leave()
        return None

    def wake(self) -> None:
        active = self.active()
        if active is not None and self.waiting:
            active.arrived.set()


class MemoryConsumer:
    """The contract's consumer; several of a partition take over from each other in the order they came."""

    def __init__(self, partition: _Partition) -> None:
        self.loop = asyncio.get_running_loop()
        self.arrived = asyncio.Event()
        self._partition = partition
        self._unacked: dict[int, Message] = {}

    async def get(self, timeout: float) -> Sequence[Message]:
        """All that is there, after up to ``timeout`` seconds for the first."""
        partition = self._partition
        if not (partition.waiting and partition.active() is self):
            self.arrived.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self.arrived.wait()
            except TimeoutError:
                return []
        # Nothing is awaited from here on, so a cancelled get() has taken nothing.
        taken = list(partition.waiting)
        partition.waiting.clear()
        self._unacked.update((message.tag, message) for message in taken)
        return taken

    async def ack(self, messages: Sequence[Message]) -> None:
        """Forget them. Those that another consumer has meanwhile are left alone."""
        for message in messages:
            self._unacked.pop(message.tag, None)

    def leave(self) -> None:
        """Give back what was not acknowledged, in its order, to the next consumer."""
        partition = self._partition
        if self in partition.consumers:
            partition.consumers.remove(self)
        partition.waiting.extendleft(replace(message, redelivered=True) for message in reversed(self._unacked.values()))
        self._unacked.clear()
        partition.wake()


class MemoryQueue:
    """For ``memory://`` and tests. What it confirms survives the loss of Redis, and nothing survives the process.

    Several event loops may use it one after another, not at the same time.
    """

    def __init__(self) -> None:
        self._partitions: dict[int, _Partition] = {}
        self._subscribers: dict[int, list[asyncio.Queue[Message]]] = {}
        self._last_tag = 0

    @property
    def confirms(self) -> bool:
        """True."""
        return True

    async def start(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do: what was not consumed stays, as it would in a broker."""

    async def bind(self, partition: int, epoch: int) -> None:
        """Let messages of this epoch in."""
        self._partition(partition).bound.add(epoch)

    async def unbind(self, partition: int, epoch: int) -> None:
        """Return later messages of this epoch."""
        self._partition(partition).bound.discard(epoch)

    async def publish(
        self, partition: int, epoch: int, sequence: int, body: str, timeout: float, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Taken at once, or ``Unroutable``."""
        if epoch not in self._partition(partition).bound:
            raise Unroutable(f"journal entry {partition}/{epoch}-{sequence} was returned: epoch {epoch} is not bound")
        self._put(Message(partition, epoch, sequence, body, self._next_tag(), headers=headers))

    async def deliver(self, partition: int, epoch: int, sequence: int, body: str, timeout: float) -> None:
        """Taken at once, bound or not."""
        self._put(Message(partition, epoch, sequence, body, self._next_tag()))

    async def mark(self, partition: int, epoch: int, timeout: float) -> None:
        """The marker goes behind all that was published."""
        self._put(Message(partition, epoch, 0, "", self._next_tag(), marker=True))

    @asynccontextmanager
    async def consume(self, partition: int, epoch: int, after: int) -> AsyncIterator[MemoryConsumer]:
        """Stand in line for the partition; active once all who came before have left."""
        line = self._partition(partition)
        consumer = MemoryConsumer(line)
        line.consumers.append(consumer)
        line.wake()
        try:
            yield consumer
        finally:
            consumer.leave()

    @contextmanager
    def subscribe(self, partition: int) -> Iterator[asyncio.Queue[Message]]:
        """Announcements of this partition from now on, as messages whose body is the announcement. At most once."""
        subscriber: asyncio.Queue[Message] = asyncio.Queue(MAX_ANNOUNCEMENTS)
        subscribers = self._subscribers.setdefault(partition, [])
        subscribers.append(subscriber)
        try:
            yield subscriber
        finally:
            subscribers.remove(subscriber)

    async def announce(self, messages: Sequence[Message]) -> None:
        """To every subscriber; one that is full loses its oldest."""
        for message in messages:
            for subscriber in self._subscribers.get(message.partition, ()):
                if subscriber.full():
                    subscriber.get_nowait()
                subscriber.put_nowait(message)

    async def check(self) -> list[str]:
        """Nothing can be set up wrong."""
        return []

    async def delete(self, partition: int) -> None:
        """Drop the bindings and what waits; consumers stay in line."""
        line = self._partition(partition)
        line.bound.clear()
        line.waiting.clear()

    def _partition(self, partition: int) -> _Partition:
        return self._partitions.setdefault(partition, _Partition())

    def _next_tag(self) -> int:
        self._last_tag += 1
        return self._last_tag

    def _put(self, message: Message) -> None:
        line = self._partition(message.partition)
        line.waiting.append(message)
        line.wake()
