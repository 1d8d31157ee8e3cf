"""How far the ledger is behind the journal, and whether a partition sells, looked at from outside: a follower that is stuck would not
say so itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from inventory_sdk.metrics.events import Behind, PartitionOpen
from inventory_sdk.stock.journal import UnreadableEntry, decode
from inventory_sdk.sync.backoff import waited
from inventory_sdk.sync.parts import Parts

PERIOD: Final = 1.0
COUNTED: Final = 50
"""Entries whose operations are counted; of more, their average is taken. Full ones, 256 operations each, take 10 ms to read."""


class Depth:
    """Reports ``PartitionOpen`` and ``Behind`` of each partition; several workers report the same."""

    def __init__(self, parts: Parts, partitions: Sequence[int], *, period: float = PERIOD) -> None:
        self._parts = parts
        self._partitions = tuple(partitions)
        self._period = period

    async def run(self) -> None:
        """Until the worker stops."""
        parts = self._parts
        backoff = parts.backoff()
        while not parts.stopping.is_set():
            pause = self._period
            try:
                for partition in self._partitions:
                    found = await self.look(partition)
                    if found is not None:
                        parts.metrics.record(found)
                backoff.reset()
            except Exception as error:  # noqa: BLE001 - a server is away: counted; the last numbers stand until it is back
                pause = max(self._period, backoff.delay())
                parts.retried("depth", error, backoff.attempts)
            await waited(parts.stopping, pause)

    async def look(self, partition: int) -> Behind | None:
        """None while the partition is of another epoch than the ledger: how much is behind then is the recovery's to say."""
        parts = self._parts
        row = await parts.ledger.partition(partition)
        state = await parts.stock_side.journal_state(partition)
        same = row is not None and state.epoch == row.epoch
        if row is not None:  # without one it was never started
            parts.metrics.record(PartitionOpen(partition, same and state.state == row.state == "open"))
        if row is None or not same:
            return None
        oldest = state.oldest_kept_sequence
        kept = 0 if oldest is None else state.sequence - oldest + 1
        entries = max(0, state.sequence - row.applied)
        if not entries:
            return Behind(partition, 0, 0, 0.0, kept)
        read = await parts.stock_side.read_journal(partition, row.epoch, row.applied, state.sequence, COUNTED)
        operations, since = 0, state.now_ms
        for sequence, body in read:
            try:
                entry = decode(partition, row.epoch, sequence, body)
            except UnreadableEntry:
                continue  # the follower names it
            operations += len(entry.operations)
            since = min(since, entry.at_ms)
        if read and entries > len(read):
            operations = round(operations / len(read) * entries)
        return Behind(partition, entries, operations, max(0.0, (state.now_ms - since) / 1000), kept)
