"""From a Redis that is new, empty, foreign or back in time to one that the ledger vouches for. One winner, through the ledger.

The path is always the same (design §7): raise the epoch → freeze Redis at it → unbind the old epoch in the queue → apply what
survived in the journal and in the queue → name what is lost → rebuild Redis under the ledger's lock → open. Whoever finds it
half done raises the epoch once more and walks it from the start; a slower one is fenced off by its epoch.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

from inventory_sdk.errors import StockFrozen
from inventory_sdk.ledger.protocol import EpochClosed, ForkFound, Ledger, PartitionRow
from inventory_sdk.sync.applier import Applier
from inventory_sdk.sync.backoff import waited
from inventory_sdk.sync.buffer import Buffer
from inventory_sdk.sync.parts import Halted, Parts, log
from inventory_sdk.sync.queues.protocol import Consumer, Queue
from inventory_sdk.sync.stock_side import StockSide

READ_COUNT: Final = 300
PUBLISH_TIMEOUT: Final = 5.0


class RecoveryNeeded(Exception):
    """Redis (or the ledger) is not what the other remembers. ``why`` is a fixed word for metrics, ``above`` an epoch that was
    seen somewhere and that the new one must exceed."""

    def __init__(self, why: str, detail: str, above: int = 0) -> None:
        super().__init__(f"{why}: {detail}")
        self.why = why
        self.detail = detail
        self.above = above


async def open_first(
    stock_side: StockSide, ledger: Ledger, queue: Queue, partition: int, *, timeout: float = 30.0, poll: float = 0.05
) -> PartitionRow:
    """The partition's row once it is open. Where the ledger knows no epoch yet, any process may make the first one; the others
    wait for it, up to ``timeout`` seconds, then ``StockFrozen``. One that dies half-way is followed by a worker's recovery."""
    row = await ledger.partition(partition)
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


async def rebuild(stock_side: StockSide, ledger: Ledger, queue: Queue, row: PartitionRow) -> None:
    """Freeze Redis at the row's epoch, fill it from the ledger, open both, ledger first."""
    # Bound before it opens: an acknowledged publish of the first call must find its way.
    await queue.bind(row.partition, row.epoch)
    await stock_side.freeze(row.partition, row.epoch)
    async with ledger.rebuilding(row.partition, row.epoch) as rebuilding:
        await stock_side.rebuild(row.partition, row.epoch, rebuilding)


async def recover(parts: Parts, applier: Applier, consumer: Consumer, received: Buffer, need: RecoveryNeeded, seen: int) -> bool:
    """Walk the whole path as the partition's active consumer; ``received`` is what it holds of the old epoch, ``seen`` the newest
    epoch it knows of. False when another process won. Faults go to the caller, who begins again with a higher epoch."""
    partition = received.partition
    ledger = parts.ledger
    newest = await ledger.partition(partition)
    if newest is not None and newest.epoch > seen:
        return False
    # Where the ledger is older than Redis (a restored backup), epochs that Redis has used must not come again.
    above = max(need.above, seen)
    raised = await ledger.raise_epoch(partition, max(above, newest.epoch if newest else 0))
    if raised is None:
        return False
    epoch = raised.epoch
    log.error("partition %d is frozen for recovery, epoch %d to %d: %s", partition, received.epoch, epoch, need)
    parts.happened("frozen", partition=partition, why=need.why)
    parts.tell("frozen", {"partition": partition, "epoch": epoch, "why": need.why, "detail": need.detail})
    await parts.persist("redis", lambda: parts.stock_side.freeze(partition, epoch), StockFrozen, EpochClosed)
    closing = [row for row in await ledger.epochs(partition) if row.epoch < epoch]
    for row in closing:
        await parts.persist("queue", partial(parts.queue.unbind, partition, row.epoch))
    for row in closing:
        if row.epoch == received.epoch:
            received.moved(row.applied)
            await _finish(parts, applier, consumer, received)
        else:
            await _finish(parts, applier, consumer, Buffer(partition, row.epoch, row.applied))
    await rebuild(parts.stock_side, ledger, parts.queue, raised)
    log.warning("partition %d is open again at epoch %d", partition, epoch)
    parts.happened("recovered", partition=partition)
    parts.tell("recovered", {"partition": partition, "epoch": epoch})
    return True


async def _finish(parts: Parts, applier: Applier, consumer: Consumer, buffer: Buffer) -> None:
    """Apply all of a closed epoch that journal and queue still have; what is missing between is the named loss."""
    partition, epoch, after = buffer.partition, buffer.epoch, buffer.watermark
    while pairs := await parts.persist(
        "redis", partial(parts.stock_side.read_journal, partition, epoch, after, None, READ_COUNT), StockFrozen
    ):
        for sequence, body in pairs:
            buffer.read(sequence, body)
        after = pairs[-1][0]
        await _apply_consecutive(parts, applier, consumer, buffer)
    if parts.queue.confirms:
        await parts.persist("queue", lambda: parts.queue.mark(partition, epoch, PUBLISH_TIMEOUT))
        await _receive_to_marker(parts, applier, consumer, buffer)
    await _apply_consecutive(parts, applier, consumer, buffer)
    while buffer.waiting:
        await until_readable(parts, buffer)
        if lost := buffer.gap():
            log.error("lost for good: %d-%d to %d of partition %d, %d entries", epoch, lost[0], lost[-1], partition, len(lost))
            parts.happened("lost", partition=partition)
            parts.tell("lost", {"partition": partition, "epoch": epoch, "sequences": tuple(lost)})
            await applier.commit(buffer, lost)
        await _apply_consecutive(parts, applier, consumer, buffer)


async def _receive_to_marker(parts: Parts, applier: Applier, consumer: Consumer, buffer: Buffer) -> None:
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
                _name_fork(parts, buffer, fork)
        await _apply_consecutive(parts, applier, consumer, buffer)


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
