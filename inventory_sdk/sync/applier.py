"""One run of entries into the ledger: one transaction, retried in place, bisected where the service's own write fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from inventory_sdk import tracing
from inventory_sdk.ledger.protocol import (
    Applied,
    EpochClosed,
    ForkFound,
    OperationRow,
    Refusal,
    WatermarkMoved,
    WritesStock,
    WritesStockFailed,
)
from inventory_sdk.metrics import events
from inventory_sdk.model import JournalEntry, Kind, Movement, Position, split_key
from inventory_sdk.sync.announcing import Announcer
from inventory_sdk.sync.backoff import waited
from inventory_sdk.sync.buffer import Buffer
from inventory_sdk.sync.parts import Halted, Parts, log
from inventory_sdk.sync.queues.announcement import announcement
from inventory_sdk.sync.queues.protocol import Message

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

MAX_OPERATIONS: Final = 2000
REFUSED: Final = ("rejected", "duplicate")
_TAKES: Final = frozenset({Kind.RESERVE, Kind.DEDUCT, Kind.ADJUST, Kind.REACQUIRE})


class Applier:
    """Commits the next run of a partition's buffer. What is committed is told on; acknowledging is the caller's."""

    def __init__(
        self,
        parts: Parts,
        partition: int,
        on_applied: Callable[[Position], None],
        tasks_due: asyncio.Event,
        corrections_due: asyncio.Event,
        announcer: Announcer,
        max_operations: int = MAX_OPERATIONS,
        hearers: Sequence[Callable[[Sequence[JournalEntry]], None]] = (),
    ) -> None:
        self._hearers = hearers
        self._parts = parts
        self._announcer = announcer
        self._partition = partition
        self._on_applied = on_applied
        self._tasks_due = tasks_due
        self._corrections_due = corrections_due
        self._max_operations = max_operations
        self._suspect: int | None = None
        """Last sequence of a run whose ``writes_stock`` failed: somewhere up to it is the movement that it can't write."""

    async def commit(self, buffer: Buffer, lost: Sequence[int] = ()) -> bool:
        """Apply the next consecutive entries (behind ``lost`` ones, in a recovery) and compare old copies; False when there is
        nothing to do. Database faults are retried here. ``EpochClosed``, ``ForkFound`` and a ``WatermarkMoved`` backwards go to
        the caller; ``Halted`` when the worker stops while ``writes_stock`` keeps failing. Cancelled: rolled back, or committed
        and redelivered, never half."""
        run = buffer.run(self._max_operations, lost[-1] if lost else None)
        if self._suspect is not None and run:
            remaining = max(1, self._suspect - run[0].sequence + 1)
            run = run[: max(1, remaining // 2)]
        old = buffer.old()
        if not (run or old or lost):
            return False
        traced = buffer.headers(run) if tracing.active is not None else ()
        with tracing.applying(traced, partition=self._partition, epoch=buffer.epoch, entries=len(run)):
            return await self._commit(buffer, run, old, lost)

    async def _commit(self, buffer: Buffer, run: list[JournalEntry], old: list[JournalEntry], lost: Sequence[int]) -> bool:
        parts = self._parts
        backoff = parts.backoff()
        named: tuple[int, str] | None = None
        doubt = False
        while True:
            started = time.monotonic()
            entries = [*old, *run]
            try:
                with tracing.transaction():
                    applied = await parts.ledger.apply(self._partition, buffer.epoch, entries, parts.writes_stock, lost)
                break
            except WatermarkMoved:
                before = buffer.watermark
                await self.reread(buffer)
                if buffer.watermark == before:
                    # It did not move on: the ledger stands before what this worker knew, and must be followed from there.
                    raise
                return True
            except (EpochClosed, ForkFound):
                raise
            except WritesStockFailed as error:
                delay = backoff.delay()
                parts.retried("writes_stock", error, backoff.attempts)
                if len(run) > 1:
                    self._suspect = run[-1].sequence
                    run = run[: len(run) // 2]
                    continue
                if backoff.attempts > 1 and run:
                    named = await self._name(buffer, run[0], error, lost, named)
                if await waited(parts.stopping, delay):
                    raise Halted from error
            except Exception as error:  # noqa: BLE001 - whatever a driver raises: the entries stay here, unacknowledged
                doubt = True
                delay = backoff.delay()
                parts.retried("ledger", error, backoff.attempts)
                await asyncio.sleep(delay)
        fresh = [entry for entry in entries if entry.sequence > buffer.watermark]
        bodies = {entry.sequence: buffer.body(entry.sequence) for entry in fresh}
        buffer.moved(applied.sequence, entries)
        if doubt and fresh and not applied.operations:
            # They were there already: our own commit, whose reply was lost. What it brought about is told all the same.
            applied = await self._recount(buffer.epoch, fresh, applied)
        self._tell(buffer.epoch, fresh, bodies, applied, time.monotonic() - started)
        return True

    async def reread(self, buffer: Buffer) -> None:
        """Take over the ledger's watermark of the buffer's epoch; ``EpochClosed`` when it is closed for applying."""
        rows = await self._parts.persist("ledger", lambda: self._parts.ledger.epochs(self._partition))
        for row in rows:
            if row.epoch == buffer.epoch:
                buffer.moved(row.applied)
                return
        raise EpochClosed(f"epoch {buffer.epoch} of partition {self._partition} takes no entries any more")

    async def _recount(self, epoch: int, fresh: Sequence[JournalEntry], applied: Applied) -> Applied:
        """What a lost reply would have said of these entries, from the ledger's rows."""
        places = [Position(self._partition, epoch, entry.sequence) for entry in fresh]
        rows = await self._parts.persist("ledger", lambda: self._parts.ledger.operations_at(places))
        refusals = tuple(
            Refusal(row.position, row.index, row.kind, row.key, _reason(row), row.lines) for row in rows if row.status in REFUSED
        )
        return Applied(applied.sequence, len(rows), refusals, applied.redelivered - len(fresh), 1)

    def _tell(self, epoch: int, fresh: Sequence[JournalEntry], bodies: dict[int, str], applied: Applied, seconds: float) -> None:
        """Metrics, handlers, waiting callers and subscribers hear of what was committed."""
        parts = self._parts
        if self._suspect is not None and applied.sequence >= self._suspect:
            self._suspect = None
        self._on_applied(Position(self._partition, epoch, applied.sequence))
        if applied.tasks:
            self._tasks_due.set()
        for hear in self._hearers:
            hear(fresh)
        duplicates = sum(refusal.reason == "duplicate" for refusal in applied.refusals)
        lag = max(0.0, time.time() - fresh[-1].at_ms / 1000) if fresh else 0.0
        parts.metrics.record(
            events.Applied(
                partition=self._partition,
                epoch=epoch,
                sequence=applied.sequence,
                operations=applied.operations,
                rejected=len(applied.refusals) - duplicates,
                duplicates=duplicates,
                redelivered=applied.redelivered,
                lag_seconds=lag,
                seconds=seconds,
            )
        )
        refused: dict[int, dict[int, str]] = {}
        for refusal in applied.refusals:
            refused.setdefault(refusal.position.sequence, {})[refusal.index] = refusal.reason
            self._tell_refusal(epoch, refusal)
        if applied.refusals:
            self._corrections_due.set()
        self._announcer.tell(
            [
                Message(self._partition, epoch, e.sequence, announcement(bodies[e.sequence], refused.get(e.sequence, {})))
                for e in fresh
            ]
        )  # fmt: skip

    def _tell_refusal(self, epoch: int, refusal: Refusal) -> None:
        name = "duplicate" if refusal.reason == "duplicate" else "rejected"
        merchant, operation_id = split_key(refusal.key)
        where = f"{self._partition}/{epoch}-{refusal.position.sequence}[{refusal.index}]"
        log.warning("ledger refused %s %r of merchant %r at %s: %s", refusal.kind, operation_id, merchant, where, refusal.reason)
        self._parts.happened(name, partition=self._partition, kind=refusal.kind, reason=refusal.reason)
        self._parts.tell(
            name,
            {
                "merchant": merchant,
                "operation_id": operation_id,
                "kind": refusal.kind,
                "reason": refusal.reason,
                "lines": refusal.lines,
                "position": refusal.position,
            },
        )

    async def _name(
        self, buffer: Buffer, entry: JournalEntry, error: WritesStockFailed, lost: Sequence[int], before: tuple[int, str] | None
    ) -> tuple[int, str] | None:
        """Find the movement by writing them one at a time, in a transaction that is always rolled back; alert once per cause."""
        found: list[tuple[Movement, Exception]] = []

        def alone(write: WritesStock) -> WritesStock:
            async def each(moves: Sequence[Movement], session: AsyncSession) -> None:
                for move in moves:
                    try:
                        async with session.begin_nested():
                            await write([move], session)
                    except Exception as cause:
                        found.append((move, cause))
                        raise

            return each

        async def end(moves: Sequence[Movement], session: AsyncSession) -> None:
            raise _ProbeDone

        probes = [*(alone(write) for write in self._parts.writes_stock), end]
        try:
            await self._parts.ledger.apply(self._partition, buffer.epoch, [entry], probes, lost)
        except WritesStockFailed as failed:
            log.debug("probed %d/%d-%d: %s", self._partition, buffer.epoch, entry.sequence, failed)
        except Exception as fault:  # noqa: BLE001 - the database left during the probe; the next attempt probes again
            self._parts.retried("ledger", fault, 1)
            return before
        cause: BaseException
        if found:
            move, cause = found[0]
            what = f"operation {move.operation_id!r}, {move.kind} of {move.quantity} {move.sku!r}"
            facts = {"merchant": move.merchant, "sku": move.sku, "operation_id": move.operation_id, "movement": move}
        else:
            cause, what, facts = error.__cause__ or error, "its movements together, each alone passes", {}
        now = (entry.sequence, f"{what}: {cause!r}")
        if now != before:
            log.error("writes_stock failed at %d/%d-%d, %s; held and tried again", self._partition, buffer.epoch, *now)
            self._parts.happened("writes_stock_failed", partition=self._partition)
            position = Position(self._partition, buffer.epoch, entry.sequence)
            self._parts.tell("writes_stock_failed", {**facts, "position": position, "error": repr(cause)})
        return now


def _reason(row: OperationRow) -> str:
    """The rows keep that it was refused; why follows from the kind."""
    if row.status == "duplicate":
        return row.status
    return "insufficient" if row.kind in _TAKES else "closed"


class _ProbeDone(Exception):
    """Every movement passed alone; roll the probe back."""
