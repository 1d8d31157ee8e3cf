"""What the worker needs of the stock room. ``stock`` implements it on Redis; the sync room never speaks to Redis itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from inventory_sdk.ledger.protocol import Credit, Ledger, Rebuilding, Void
from inventory_sdk.model import JournalOperation
from inventory_sdk.stock.upkeep import Expired, JournalState

__all__ = ["Expired", "JournalState", "StockSide"]


class StockSide(Protocol):
    """Redis as the sync room sees it. Every method may raise the client's connection errors (the caller retries) and, where
    the epoch is given and is no longer Redis' own, ``StockFrozen``. All are safe to repeat."""

    async def read_journal(self, partition: int, epoch: int, after: int, upto: int | None, count: int) -> list[tuple[int, str]]:
        """(sequence, body) of at most ``count`` entries of ``epoch`` with after < sequence ≤ upto (None: to its end), in order.
        Also of an epoch that is closed by now."""
        ...

    async def read_back(self, partition: int, epoch: int, upto: int, count: int) -> list[tuple[int, str]]:
        """The last ``count`` entries of ``epoch`` up to a sequence, newest first. Also of an epoch that is closed by now."""
        ...

    async def resubmit(self, partition: int, epoch: int, operation: JournalOperation, at_ms: int) -> str:
        """An operation of an entry that came after its epoch was closed (``at_ms``: the entry's time), under its id, in the open
        epoch. "" when it stands or there is nothing to do any more, else why it was refused, in a word. ``Overloaded`` for
        what passes by itself."""
        ...

    async def journal_state(self, partition: int) -> JournalState: ...

    async def trim(self, partition: int, epoch: int, upto_sequence: int) -> None:
        """Entries up to this one are applied; those older than ten minutes may go."""
        ...

    async def void(self, partition: int, epoch: int, void: Void) -> None: ...
    async def credit(self, partition: int, epoch: int, credit: Credit) -> None: ...

    async def due_expiries(self, partition: int, limit: int) -> list[str]:
        """Keys of reservations whose time is over, by Redis' clock, pinned ones included; oldest first."""
        ...

    async def expire(self, partition: int, keys: Sequence[str]) -> Expired:
        """Expire those that are (still) due; overdue pinned ones are left as they are and named."""
        ...

    async def settle_pin(self, partition: int, key: str, verdict: str) -> None:
        """End an overdue pinned hold as its decider says: ``committed`` or ``aborted``."""
        ...

    async def resolve_part(self, partition: int, key: str, journaled: str | None = None) -> bool:
        """Bring the part ``key`` of a call over several partitions in line with what its home has decided; False: it can't be told
        now. ``journaled``: its position in home's entry ("" if that has none); None: it is overdue, and given up if undecided."""
        ...

    async def rotate(self, partition: int) -> None:
        """Start a new results window where the current one is full or old."""
        ...

    async def freeze(self, partition: int, epoch: int) -> None:
        """Nothing is accepted from now on; the partition is at ``epoch``, which is higher than the one it was at. The only way
        to make ``meta``. The journal of the earlier epochs stays readable."""
        ...

    async def rebuild(self, partition: int, epoch: int, rebuilding: Rebuilding, down_ms: int = 0) -> None:
        """Write counters, reservations and recent results from the ledger in chunks, then ``await rebuilding.open()`` (the
        ledger's commit), and only then open ``meta``: a Redis that accepts must find an open epoch in the ledger. Holds get
        the time of the freeze back, ``down_ms`` if that is longer."""
        ...

    async def restore_older(self, partition: int, epoch: int, ledger: Ledger) -> bool:
        """One chunk of the results that the last rebuild left for behind its opening; False when nothing is left to do here."""
        ...

    async def heartbeat(self, partition: int, worker: str) -> None:
        """A worker of this name is in order; the sign holds for ten seconds."""
        ...

    async def worker_seen(self, partition: int) -> float | None:
        """Seconds since the last heartbeat of any worker; None: none within ten seconds."""
        ...
