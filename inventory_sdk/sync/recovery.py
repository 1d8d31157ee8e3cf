"""From a Redis that is new, empty, foreign or back in time to one that the ledger vouches for. One winner, through the ledger.

The path is always the same (design §7): raise the epoch → freeze Redis at it → unbind the old epoch in the queue → apply what
survived in the journal and in the queue → name what is lost → rebuild Redis under the ledger's lock → open. Whoever finds it
half done raises the epoch once more and walks it from the start; a slower one is fenced off by its epoch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from inventory_sdk.errors import InventoryError, StockFrozen
from inventory_sdk.ledger.protocol import EpochClosed, ForkFound, Ledger, PartitionRow
from inventory_sdk.model import JournalEntry, Position
from inventory_sdk.stock.journal import UnreadableEntry, decode
from inventory_sdk.sync.applier import Applier
from inventory_sdk.sync.backoff import waited
from inventory_sdk.sync.buffer import Buffer
from inventory_sdk.sync.parts import Halted, Parts, log
from inventory_sdk.sync.publish import PUBLISH_TIMEOUT
from inventory_sdk.sync.queues.protocol import Consumer, Queue
from inventory_sdk.sync.stock_side import StockSide

READ_COUNT: Final = 300


class RecoveryNeeded(Exception):
    """Redis (or the ledger) is not what the other remembers. ``why`` is a fixed word for metrics, ``above`` an epoch that was
    seen somewhere and that the new one must exceed."""

    def __init__(self, why: str, detail: str, above: int = 0) -> None:
        super().__init__(f"{why}: {detail}")
        self.why = why
        self.detail = detail
        self.above = above


@dataclass(frozen=True, slots=True)
class Memory:
    """What the worker that recovers remembers: the newest epoch it knows of, the last sequence that it has seen in Redis in the
    epoch it followed (0: none), and since when Redis was not well (monotonic seconds; None: it has never seen it well)."""

    newest: int
    sequence: int = 0
    since: float | None = None


async def open_first(
    stock_side: StockSide, ledger: Ledger, queue: Queue, partition: int, *, timeout: float = 30.0, poll: float = 0.05
) -> PartitionRow:
    """The partition's row once it is open. Where the ledger knows no epoch yet, any process may make the first one; the others
    wait for it, up to ``timeout`` seconds, then ``StockFrozen``. One that dies half-way is followed by a worker's recovery.
    ``InventoryError`` for a Redis that another ledger has filled: nothing of it is touched."""
    row = await ledger.partition(partition)
    if row is None:
        found = await stock_side.journal_state(partition)
        # Whoever made Redis' epoch has raised it in the ledger before.
        row = await ledger.partition(partition) if found.epoch else None
        if found.epoch and row is None:
            raise InventoryError(
                f"Redis has partition {partition} of this namespace at epoch {found.epoch}, and this ledger has never opened it: "
                "it belongs to another database. If the database URL is wrong, correct it; if the old stock is given up, use a new "
                f"namespace=, or delete the Redis keys of partition {partition} ('{{<namespace>:{partition}}}:*')"
            )
        if row is None:
            row = await ledger.raise_epoch(partition, 0)
            if row is not None:
                await rebuild(stock_side, ledger, queue, row)
                row = await ledger.partition(partition)
    try:
        async with asyncio.timeout(timeout):
            while row is None or row.state != "open":
                await asyncio.sleep(poll)
                row = await ledger.partition(partition)
    except TimeoutError:
        raise StockFrozen(f"partition {partition} is being opened by another process", retry_after=timeout) from None
    return row


async def rebuild(stock_side: StockSide, ledger: Ledger, queue: Queue, row: PartitionRow, down_ms: int = 0) -> None:
    """Freeze Redis at the row's epoch, fill it from the ledger, open both, ledger first."""
    # Bound before it opens: an acknowledged publish of the first call must find its way.
    await queue.bind(row.partition, row.epoch)
    await stock_side.freeze(row.partition, row.epoch)
    async with ledger.rebuilding(row.partition, row.epoch) as rebuilding:
        await stock_side.rebuild(row.partition, row.epoch, rebuilding, down_ms)


async def recover(
    parts: Parts,
    applier: Applier,
    consumer: Consumer,
    received: Buffer,
    need: RecoveryNeeded,
    memory: Memory,
    sign: Callable[[], None],
) -> list[JournalEntry] | None:
    """Walk the whole path as the partition's active consumer; ``received`` is what it holds of the old epoch. ``sign`` is given
    at every progress: who waits leaves a recovery alone that signs. None when another process won; else entries that
    only Redis had and whose positions are taken: to be sent again (``late``). Faults go to the caller, who begins again with a
    higher epoch."""
    partition, ledger = received.partition, parts.ledger
    newest = await ledger.partition(partition)
    if newest is not None and newest.epoch > memory.newest:
        return None
    # Where the ledger is older than Redis (a restored backup), epochs that Redis has used must not come again.
    above = max(need.above, memory.newest, newest.epoch if newest else 0)
    # Who takes over from one that was only slow finds its work done.
    raised = await ledger.raise_epoch(partition, above, unless_open=need.why == "abandoned")
    if raised is None:
        return None
    epoch = raised.epoch
    log.error("partition %d is frozen for recovery, epoch %d to %d: %s", partition, received.epoch, epoch, need)
    parts.happened("frozen", partition=partition, why=need.why)
    parts.tell("frozen", {"partition": partition, "epoch": epoch, "why": need.why, "detail": need.detail})
    await parts.persist("redis", lambda: parts.stock_side.freeze(partition, epoch), StockFrozen, EpochClosed)
    sign()
    ending = _Ending(parts, applier, consumer, sign)
    closing = [row for row in await ledger.epochs(partition) if row.epoch < epoch]
    for row in closing:
        await parts.persist("queue", partial(parts.queue.unbind, partition, row.epoch))
    fenced = time.monotonic()
    for row in closing:
        if row.epoch == received.epoch and received.watermark <= row.applied:
            received.moved(row.applied)
            await ending.finish(received, fenced, memory.sequence)
        else:
            await ending.finish(Buffer(partition, row.epoch, row.applied), fenced)
    down_ms = int((time.monotonic() - memory.since) * 1000) if memory.since is not None else 0
    await rebuild(parts.stock_side, ledger, parts.queue, raised, down_ms)
    log.warning("partition %d is open again at epoch %d", partition, epoch)
    parts.happened("recovered", partition=partition)
    parts.tell("recovered", {"partition": partition, "epoch": epoch})
    return ending.aside


class _Ending:
    """Ends the closed epochs of one recovery."""

    def __init__(self, parts: Parts, applier: Applier, consumer: Consumer, sign: Callable[[], None]) -> None:
        self._parts = parts
        self._applier = applier
        self._consumer = consumer
        self._sign = sign
        self.aside: list[JournalEntry] = []

    async def finish(self, buffer: Buffer, fenced: float, seen: int = 0) -> None:
        """Apply all of a closed epoch that journal and queue still have; what is missing between, and up to the entry that the
        worker has ``seen``, is the named loss. ``fenced``: when later publishes began to be returned (monotonic seconds)."""
        parts = self._parts
        partition, epoch, after = buffer.partition, buffer.epoch, buffer.watermark
        await self._find_fork(buffer)
        while pairs := await parts.persist(
            "redis", partial(parts.stock_side.read_journal, partition, epoch, after, None, READ_COUNT), StockFrozen
        ):
            for sequence, body in pairs:
                try:
                    buffer.read(sequence, body)
                except ForkFound as fork:
                    # The queue has brought another one. Neither is in the ledger yet; the journal's comes behind the marker.
                    _name_fork(parts, buffer, fork)
                    await self._set_aside(decode(partition, epoch, sequence, body), body)
            after = pairs[-1][0]
            await self._apply(buffer)
        if parts.queue.confirms:
            # Whoever published before the fence has its confirm by now, or has been told that there is none.
            await waited(parts.stopping, max(0.0, fenced + parts.publish_timeout - time.monotonic()))
            if parts.stopping.is_set():
                raise Halted
            self._sign()
            await parts.persist("queue", lambda: parts.queue.mark(partition, epoch, PUBLISH_TIMEOUT))
            await self._receive_to_marker(buffer)
        await self._apply(buffer)
        while buffer.waiting:
            await until_readable(parts, buffer)
            if lost := buffer.gap():
                await self._lose(buffer, lost)
            await self._apply(buffer)
        if buffer.watermark < seen:
            await self._lose(buffer, list(range(buffer.watermark + 1, seen + 1)))

    async def _lose(self, buffer: Buffer, lost: list[int]) -> None:
        parts, partition, epoch = self._parts, buffer.partition, buffer.epoch
        log.error("lost for good: %d-%d to %d of partition %d, %d entries", epoch, lost[0], lost[-1], partition, len(lost))
        parts.happened("lost", partition=partition)
        parts.tell("lost", {"partition": partition, "epoch": epoch, "sequences": tuple(lost)})
        await self._applier.commit(buffer, lost)

    async def _find_fork(self, buffer: Buffer) -> None:
        """A Redis that went back and sold on has other entries than the ledger at its end: from there back to the first that
        both have."""
        parts, partition, epoch, upto = self._parts, buffer.partition, buffer.epoch, buffer.watermark
        while upto > 0:
            pairs = await parts.persist("redis", partial(parts.stock_side.read_back, partition, epoch, upto, READ_COUNT), StockFrozen)
            positions = [Position(partition, epoch, sequence) for sequence, _ in pairs]
            nonces = await parts.persist("ledger", partial(parts.ledger.nonces, positions))
            for sequence, body in pairs:
                try:
                    entry = decode(partition, epoch, sequence, body)
                except UnreadableEntry:
                    continue  # the ledger has passed it
                known = nonces.get(Position(partition, epoch, sequence))
                if known is None or known == entry.nonce:
                    return
                _name_fork(parts, buffer, ForkFound(f"Redis has {entry.nonce!r} at {epoch}-{sequence}, the ledger {known!r}"))
                await self._set_aside(entry, body)
            if len(pairs) < READ_COUNT:
                return
            upto = pairs[-1][0] - 1

    async def _set_aside(self, entry: JournalEntry, body: str) -> None:
        parts = self._parts
        if not parts.queue.confirms:
            self.aside.append(entry)
            return
        place = (entry.partition, entry.epoch, entry.sequence)
        await parts.persist("queue", lambda: parts.queue.deliver(*place, body, PUBLISH_TIMEOUT))

    async def _receive_to_marker(self, buffer: Buffer) -> None:
        parts, consumer = self._parts, self._consumer
        while True:
            for message in await consumer.get(1.0):
                if message.epoch != buffer.epoch:
                    # Of another epoch: it stays unacknowledged and comes again to whoever follows that one.
                    continue
                if message.marker:
                    await consumer.ack([message])
                    return
                try:
                    buffer.receive(message)
                except ForkFound as fork:
                    # Unacknowledged too: in the new epoch it is a late entry.
                    _name_fork(parts, buffer, fork)
            if parts.stopping.is_set():
                raise Halted
            await self._apply(buffer)

    async def _apply(self, buffer: Buffer) -> None:
        before = buffer.watermark
        await _apply_consecutive(self._parts, self._applier, self._consumer, buffer)
        if buffer.watermark > before:
            self._sign()


async def _apply_consecutive(parts: Parts, applier: Applier, consumer: Consumer, buffer: Buffer) -> None:
    while True:
        try:
            moved = await applier.commit(buffer)
        except ForkFound as fork:
            # The ledger has that position with another content, and the ledger is the truth: the other copy is named and left
            # unacknowledged; in the new epoch it counts as a late entry.
            before = buffer.watermark
            await applier.reread(buffer)
            if not buffer.set_aside_old() and buffer.watermark == before:
                raise
            _name_fork(parts, buffer, fork)
            continue
        if done := buffer.acknowledgeable():
            await consumer.ack(done)
        if not moved:
            return


def _name_fork(parts: Parts, buffer: Buffer, fork: ForkFound) -> None:
    log.error("fork in partition %d, epoch %d: %s", buffer.partition, buffer.epoch, fork)
    parts.happened("fork", partition=buffer.partition)
    parts.tell("fork", {"partition": buffer.partition, "epoch": buffer.epoch, "error": str(fork)})


async def until_readable(parts: Parts, buffer: Buffer) -> None:
    """Hold while the entry right after the watermark can't be read: say so once, look again in the journal (a newer release may
    run this worker's successor; a damaged message may be whole there). Never passed. ``Halted`` when the worker stops."""
    backoff = parts.backoff()
    while (error := buffer.held()) is not None:
        sequence = buffer.watermark + 1
        try:
            pairs = await parts.stock_side.read_journal(buffer.partition, buffer.epoch, sequence - 1, sequence, 1)
            for found, body in pairs:
                buffer.read(found, body)
        except Exception as fault:  # noqa: BLE001 - Redis is away: counted, asked again
            parts.retried("redis", fault, backoff.attempts + 1)
        if buffer.held() is None:
            return
        delay = backoff.delay()
        parts.retried("unreadable", error, backoff.attempts)
        if backoff.attempts == 1:
            log.error("partition %d is held: %s", buffer.partition, error)
            parts.happened("unreadable", partition=buffer.partition)
            parts.tell("unreadable", {"partition": buffer.partition, "epoch": buffer.epoch, "sequence": sequence, "error": str(error)})
        if await waited(parts.stopping, delay):
            raise Halted from error
