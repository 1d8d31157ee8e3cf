"""The journal itself as the queue: no second server, no second copy.

Redis Streams keep what the batch script wrote, so publishing is nothing to do and a consumer is a place in the stream. Nothing
here holds a second worker back: where two read one partition, the ledger's partition row decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from redis import exceptions
from redis.asyncio import Redis, RedisCluster

from inventory_sdk.metrics.events import Metrics, Retried
from inventory_sdk.stock.journal import UnreadableEntry
from inventory_sdk.sync.backoff import Backoff
from inventory_sdk.sync.queues.protocol import Message, PublishFailed
from inventory_sdk.tracing import PARENT

log = logging.getLogger(__name__)

MAX_ENTRIES: Final = 300
"""Entries of one answer: at 4 KB each they take 2 ms."""
MAX_BLOCK: Final = 1.0
"""Seconds of one blocking read: well below redis-py's socket timeout (5 s), which would take the silence for a fault."""
MAX_ANNOUNCEMENTS: Final = 10_000
_PASSING: Final = (
    exceptions.ConnectionError,  # BusyLoadingError is one
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.TryAgainError,
    exceptions.ClusterDownError,
    exceptions.ClusterError,  # too many redirections while a slot moves
    exceptions.RedisClusterException,  # no node answers, or nobody has the slot
)


class StreamConsumer:
    """A place in one journal. Moves on when ``get`` returns; a new consumer begins at the ledger's watermark."""

    def __init__(
        self, client_factory: Callable[[], Redis | RedisCluster], key: str, partition: int, epoch: int, after: int, metrics: Metrics | None
    ) -> None:
        self._client_factory = client_factory
        self._key = key
        self._partition = partition
        self._place = f"{epoch}-{after}"
        self._metrics = metrics
        self._backoff = Backoff(0.05, 2.0)

    async def get(self, timeout: float) -> Sequence[Message]:
        """Up to 300 entries behind the last ones, also of later epochs; a Redis that is away is waited for within ``timeout``."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            remaining = deadline - loop.time()
            try:
                entries = await self._read(min(remaining, MAX_BLOCK))
                self._backoff.reset()
            except _PASSING as error:
                await self._pause(error, deadline - loop.time())
                entries = []
            if entries:
                messages = [self._message(entry_id, fields) for entry_id, fields in entries]
                last = messages[-1]
                self._place = f"{last.epoch}-{last.sequence}"
                return messages
            if loop.time() >= deadline:
                return []

    async def ack(self, messages: Sequence[Message]) -> None:
        """Nothing to do: the ledger's watermark is the acknowledgement."""

    async def _read(self, block: float) -> list[tuple[Any, dict[Any, Any]]]:
        # BLOCK 0 would mean for ever; below a millisecond is no waiting at all.
        milliseconds = int(block * 1000)
        client = self._client_factory()
        place: dict[Any, Any] = {self._key: self._place}
        answer: Any = await client.xread(place, count=MAX_ENTRIES, block=milliseconds if milliseconds > 0 else None)
        if not answer:
            return []
        if isinstance(answer, dict):  # RESP3: {key: [[entry, …]]}
            (batches,) = answer.values()
            return [entry for batch in batches for entry in batch]
        ((_, entries),) = answer  # RESP2: [[key, [entry, …]]]
        return list(entries)

    async def _pause(self, error: Exception, remaining: float) -> None:
        if self._metrics is not None:
            self._metrics.record(Retried("queue", type(error).__name__))
        log.warning("reading the journal %s failed and is tried again: %s", self._key, error)
        await asyncio.sleep(max(0.0, min(self._backoff.delay(), remaining)))

    def _message(self, entry_id: str | bytes, fields: dict[Any, Any]) -> Message:
        place = _text(entry_id)
        epoch, _, sequence = place.partition("-")
        body = fields.get(b"b", fields.get("b"))
        try:
            if body is None:
                raise KeyError("b")
            traced = fields.get(b"t", fields.get("t"))
            headers = None if traced is None else {PARENT: _text(traced)}
            return Message(self._partition, int(epoch), int(sequence), _text(body), headers=headers)
        except (KeyError, ValueError) as error:
            # Not passed over: the watermark must not move beyond an entry that nobody has read.
            raise UnreadableEntry(f"journal entry {self._partition}/{place} in {self._key} can't be read: {error!r}") from error


class StreamQueue:
    """Redis Streams. ``client_factory`` gives the running event loop's client; this class makes and closes none.

    ``confirms`` is False: Redis has the only copy until the ledger has it.
    """

    def __init__(self, client_factory: Callable[[], Redis | RedisCluster], namespace: str, metrics: Metrics | None = None) -> None:
        self._client_factory = client_factory
        self._namespace = namespace
        self._metrics = metrics

    @property
    def confirms(self) -> bool:
        """False."""
        return False

    async def start(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do: the client is its maker's."""

    async def bind(self, partition: int, epoch: int) -> None:
        """Nothing to do."""

    async def unbind(self, partition: int, epoch: int) -> None:
        """Nothing to do: the freeze script is the fence."""

    async def publish(
        self, partition: int, epoch: int, sequence: int, body: str, timeout: float, *, headers: Mapping[str, str] | None = None
    ) -> None:
        """Nothing to do: the entry is where the worker reads."""

    async def deliver(self, partition: int, epoch: int, sequence: int, body: str, timeout: float) -> None:
        """Nothing to do: recovery found it where the worker reads."""

    async def mark(self, partition: int, epoch: int, timeout: float) -> None:
        """Nothing to do: behind the freeze script comes no entry of this epoch."""

    @asynccontextmanager
    async def consume(self, partition: int, epoch: int, after: int) -> AsyncIterator[StreamConsumer]:
        """Read the partition's journal behind ``epoch-after``. Several may; each sees every entry."""
        yield StreamConsumer(self._client_factory, self._key(partition, "journal"), partition, epoch, after, self._metrics)

    async def announce(self, messages: Sequence[Message]) -> None:
        """Append to the stream ``{ns:p}:applied`` (field ``i``: epoch-sequence, ``b``: the announcement), about 10,000 long."""
        try:
            async with self._client_factory().pipeline(transaction=False) as pipeline:
                for message in messages:
                    fields: dict[Any, Any] = {"i": f"{message.epoch}-{message.sequence}", "b": message.body}
                    key = self._key(message.partition, "applied")
                    pipeline.xadd(key, fields, maxlen=MAX_ANNOUNCEMENTS, approximate=True)
                await pipeline.execute()
        except (exceptions.RedisError, exceptions.RedisClusterException) as error:
            raise PublishFailed(f"{len(messages)} announcements may not have been made: {error!r}") from error

    async def check(self) -> list[str]:
        """Nothing of its own: persistence and eviction are Redis' settings, and its own check looks at them."""
        return []

    async def delete(self, partition: int) -> None:
        """Remove the announcements. The journal is the stock room's."""
        await self._client_factory().delete(self._key(partition, "applied"))

    def _key(self, partition: int, name: str) -> str:
        return f"{{{self._namespace}:{partition}}}:{name}"


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
