"""Entries that gave stock back and that the queue has not confirmed yet.

Units of an unpublished release can be sold again. If that sale is acknowledged at ``queue`` and Redis is then lost with the
release, the ledger can't cover the sale. So the batch script keeps, per SKU, which entries gave (``givers``), a sale at ``queue``
sends those to the queue along with its own, and an entry that is confirmed leaves.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from itertools import pairwise
from typing import Any, Final

from redis.exceptions import RedisError

from inventory_sdk.errors import InventoryError
from inventory_sdk.metrics.events import Metrics, Retried
from inventory_sdk.stock.batch import Publish, read_entries
from inventory_sdk.stock.partition import Partition

MOST: Final = 256
"""More entries than this are not published for one batch: it waits for the ledger instead."""
SWEPT_AT_ONCE: Final = 1000


class _Safe:
    """What one partition's queue has confirmed and ``givers`` does not know yet."""

    __slots__ = ("fields", "sequences", "telling")

    def __init__(self) -> None:
        self.fields: set[str] = set()
        self.sequences: set[int] = set()
        self.telling = False


class Givers:
    """One event loop's. ``publish`` sends an entry to the queue; what it answers ends with the queue's confirm."""

    def __init__(self, publish: Publish, in_background: Callable[[Coroutine[Any, Any, Any], str], Any], metrics: Metrics) -> None:
        self._publish = publish
        self._in_background = in_background
        self._metrics = metrics
        self._flying: dict[tuple[int, int, int], Awaitable[Any]] = {}
        self._safe: dict[tuple[int, int], _Safe] = {}

    def gave(self, partition: Partition, epoch: int, sequence: int, fields: Iterable[str], confirmed: Awaitable[Any]) -> None:
        """This entry gave back stock of these fields and is on its way to the queue."""
        position = partition.number, epoch, sequence
        self._flying[position] = confirmed
        self._in_background(self._settle(partition, position, set(fields)), f"confirm of giver {position}")

    async def confirm(self, partition: Partition, epoch: int, found: Sequence[str]) -> int:
        """Have the queue confirm what the script found, [field, sequences, …]: from the journal where it is not on its way.

        Answers 0 when all are confirmed; else the sequence up to which the ledger must have applied: there are more than
        ``MOST``, or entries are not in the journal any more. Raises what the queue's failure is."""
        fields: dict[int, list[str]] = {}
        upto = 0
        for field, sequences in zip(found[::2], found[1::2], strict=True):
            if sequences.startswith("*"):
                upto = max(upto, int(sequences[1:]))
                continue
            for text in sequences.split(","):
                fields.setdefault(int(text), []).append(field)
        if upto or len(fields) > MOST:
            return max(upto, *fields) if fields else upto
        absent = [sequence for sequence in sorted(fields) if (partition.number, epoch, sequence) not in self._flying]
        for first, last in _runs(absent):
            kept = 0
            for sequence, body in await read_entries(partition, epoch, first - 1, last, last - first + 1):
                kept += 1
                confirmed = self._publish(partition.number, epoch, sequence, body.decode())
                self.gave(partition, epoch, sequence, fields[sequence], confirmed)
            if kept <= last - first:
                upto = last
        flying = [self._flying.get((partition.number, epoch, sequence)) for sequence in fields]
        for outcome in await asyncio.gather(*(each for each in flying if each is not None), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
        return upto

    async def _settle(self, partition: Partition, position: tuple[int, int, int], fields: set[str]) -> None:
        try:
            await self._flying[position]
        except Exception:  # noqa: BLE001 - the publisher has counted it; whoever rests on the entry publishes it again
            del self._flying[position]
            return
        _, epoch, sequence = position
        safe = self._safe.setdefault((partition.number, epoch), _Safe())
        safe.fields |= fields
        safe.sequences.add(sequence)
        if not safe.telling:
            safe.telling = True
            try:
                await self._tell(partition, epoch, safe)
            finally:
                del self._safe[partition.number, epoch]

    async def _tell(self, partition: Partition, epoch: int, safe: _Safe) -> None:
        """One script for all that was confirmed while the last one ran."""
        while safe.sequences:
            fields, sequences = safe.fields, safe.sequences
            safe.fields, safe.sequences = set(), set()
            try:
                await _given(partition, str(epoch), 0, sorted(fields), sorted(sequences))
            except (InventoryError, RedisError) as error:
                # They stay until the worker's next round, and are published once more by who rests on them: slower, not wrong.
                self._metrics.record(Retried("givers", type(error).__name__))
            for sequence in sequences:
                self._flying.pop((partition.number, epoch, sequence), None)


async def sweep(partition: Partition, epoch: int, applied: int) -> None:
    """The worker's round: what the ledger has applied leaves ``givers``, whoever published it."""
    client: Any = partition.wire.client
    cursor = 0
    while True:
        cursor, found = await client.hscan(partition.key("givers"), cursor, count=SWEPT_AT_ONCE)
        if found:
            await _given(partition, str(epoch), applied, [field.decode() for field in found], [])
        if int(cursor) == 0:
            return


async def _given(partition: Partition, epoch: str, applied: int, fields: Sequence[str], sequences: Sequence[int]) -> None:
    keys = [partition.key("meta"), partition.key("givers")]
    arguments = [epoch, partition.run_id, str(applied), json.dumps(fields), json.dumps(sequences)]
    await partition.wire.run("given", keys, arguments)


def _runs(sequences: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive numbers as (first, last)."""
    if not sequences:
        return []
    cuts = [at for at, (one, two) in enumerate(pairwise(sequences), 1) if two != one + 1]
    return [(sequences[first], sequences[last - 1]) for first, last in zip([0, *cuts], [*cuts, len(sequences)], strict=True)]
