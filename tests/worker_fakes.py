"""A ledger and a Redis in plain Python for the worker's unit tests, with switches for what servers do when they fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from inventory_sdk.errors import StockFrozen
from inventory_sdk.ledger.protocol import (
    Applied,
    Credit,
    EpochClosed,
    ForkFound,
    LedgerUnavailable,
    OperationRow,
    PartitionRow,
    Refusal,
    ReservationRow,
    Task,
    TaskRun,
    TasksSpoilt,
    TaskStuck,
    Void,
    WatermarkMoved,
    WritesStock,
    WritesStockFailed,
)
from inventory_sdk.metrics import Event
from inventory_sdk.model import JournalEntry, JournalOperation, Movement, Position
from inventory_sdk.stock.journal import encode
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.queues.protocol import Message
from inventory_sdk.sync.stock_side import Expired, JournalState
from inventory_sdk.sync.worker import Worker

SESSION: Any = type("Session", (), {"begin_nested": lambda self: _Savepoint()})()


class _Savepoint:
    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *error: object) -> None: ...


async def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Return as soon as it holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


def body(sequence: int, *, operations: int = 1, nonce: str | None = None) -> str:
    """The text of an entry whose operations are deducts of one unit, ``o<sequence>-<index>``."""
    ops = [["deduct", f"m\x1fo{sequence}-{index}", "f", ["m\x1fsku", 1], [9], "", "", 0, ""] for index in range(operations)]
    return encode(nonce or f"n{sequence}", 1_700_000_000_000, ops)


@dataclass
class Facts:
    """Keeps the events of a worker, as metrics sink and as handler."""

    events: list[Event] = field(default_factory=list)
    told: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def record(self, event: Event) -> None:
        self.events.append(event)

    async def on_event(self, name: str, facts: Mapping[str, Any]) -> None:
        self.told.append((name, facts))

    def names(self) -> list[str]:
        return [event.name for event in self.events if hasattr(event, "name")]

    def retried(self) -> list[str]:
        return [event.what for event in self.events if hasattr(event, "what")]


class FakeLedger:
    """Applies by the rules of the Protocol. ``applied`` lists (epoch, sequence) in the order of commits."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[int, PartitionRow]] = {}
        self.nonces_of: dict[Position, str] = {}
        self.applied: list[tuple[int, int]] = []
        self.rejected: list[tuple[str, str]] = []
        self.lost: list[int] = []
        self.applies = 0
        self.batches: list[int] = []
        self.operations: dict[str, int] = {}
        self.task_faults: list[Exception] = []
        self.down: Exception | None = None
        self.lost_replies = 0
        self.refuse: dict[int, str] = {}
        self.statuses: dict[Position, str] = {}
        self.voids: list[Void] = []
        self.credits: list[Credit] = []
        self.stale: list[ReservationRow] = []
        self.verdicts: dict[str, str] = {}
        self.tasks: dict[int, Task] = {}
        self.waiting: set[int] = set()
        self.dead: dict[int, str] = {}
        self.done: list[int] = []
        self.claimed: set[int] = set()
        self.together: list[list[int]] = []
        """Tasks that were committed in one transaction."""
        self.lost_task_replies = 0
        self.lock = asyncio.Lock()
        self.before_commit: Callable[[], Awaitable[None]] | None = None

    def open_at(self, partition: int, epoch: int, applied: int = 0) -> None:
        self.rows.setdefault(partition, {})[epoch] = PartitionRow(partition, epoch, "open", applied)

    def watermark(self, partition: int = 0) -> int:
        return self.rows[partition][max(self.rows[partition])].applied

    async def partition(self, partition: int) -> PartitionRow | None:
        await self._reach()
        rows = self.rows.get(partition)
        return rows[max(rows)] if rows else None

    async def epochs(self, partition: int) -> list[PartitionRow]:
        await self._reach()
        rows = self.rows.get(partition, {})
        return [rows[epoch] for epoch in sorted(rows) if rows[epoch].state != "closed"]

    async def raise_epoch(self, partition: int, above: int, unless_open: bool = False) -> PartitionRow | None:
        await self._reach()
        rows = self.rows.setdefault(partition, {})
        newest = max(rows, default=0)
        if newest > above or (unless_open and newest and rows[newest].state == "open"):
            return None
        if newest:
            rows[newest] = replace(rows[newest], state="closed" if rows[newest].state == "rebuilding" else "draining")
            for forgotten in range(newest + 1, above + 1):
                rows[forgotten] = PartitionRow(partition, forgotten, "draining", 0)
        rows[above + 1] = PartitionRow(partition, above + 1, "rebuilding", 0)
        return rows[above + 1]

    @asynccontextmanager
    async def rebuilding(self, partition: int, epoch: int) -> AsyncIterator[FakeRebuilding]:
        rows = self.rows[partition]
        if max(rows) != epoch or rows[epoch].state != "rebuilding":
            raise EpochClosed(f"epoch {epoch}")
        async with self.lock:
            before = dict(rows)
            rows.update({each: replace(rows[each], state="closed") for each in rows if each < epoch})
            reading = FakeRebuilding(rows, epoch)
            try:
                yield reading
            finally:
                if rows[epoch].state != "open":
                    rows.update(before)

    async def apply(
        self,
        partition: int,
        epoch: int,
        entries: Sequence[JournalEntry],
        writes: Sequence[WritesStock] = (),
        lost: Sequence[int] = (),
    ) -> Applied:
        async with self.lock:
            self.applies += 1
            await self._reach()
            rows = self.rows[partition]
            row = rows[epoch]
            if row.state not in ("open", "draining"):
                raise EpochClosed(f"epoch {epoch}")
            if lost and epoch == max(rows):
                raise ValueError("an open epoch has no losses")
            fresh: list[JournalEntry] = []
            position = row.applied
            missing = list(lost)
            old = 0
            for entry in sorted(entries, key=lambda entry: entry.sequence):
                if entry.sequence <= row.applied:
                    if self.nonces_of.get(Position(partition, epoch, entry.sequence)) != entry.nonce:
                        raise ForkFound(f"{entry.sequence}")
                    old += 1
                    continue
                while missing and missing[0] == position + 1:
                    position = missing.pop(0)
                if entry.sequence != position + 1:
                    raise WatermarkMoved(f"{position} then {entry.sequence}")
                position = entry.sequence
                fresh.append(entry)
            while missing and missing[0] == position + 1:
                position = missing.pop(0)
            moves = [
                Movement("m", "sku", o.kind, 1, -1, 0, 1, o.operation_id, None, None, Position(partition, epoch, e.sequence), index)
                for e in fresh
                for index, o in enumerate(e.operations)
            ]
            for write in writes if moves else ():
                try:
                    await write(moves, SESSION)
                except Exception as error:
                    raise WritesStockFailed("writes_stock failed") from error
            if self.before_commit is not None:
                await self.before_commit()
            # From here on nothing is awaited: this is the commit.
            refusals: list[Refusal] = []
            for entry in fresh:
                where = Position(partition, epoch, entry.sequence)
                self.nonces_of[where] = entry.nonce
                self.applied.append((epoch, entry.sequence))
                for index, operation in enumerate(entry.operations):
                    self.operations[operation.key] = self.operations.get(operation.key, 0) + 1
                    if (reason := self.refuse.get(entry.sequence)) is not None:
                        self.statuses[where] = "duplicate" if reason == "duplicate" else "rejected"
                        refusals.append(Refusal(where, index, operation.kind, operation.key, reason, tuple(operation.lines)))
                        self.voids.append(Void(where, index, operation.key, operation.kind, "", (), reason != "duplicate"))
            self.lost += lost
            self.nonces_of |= {Position(partition, epoch, sequence): "" for sequence in lost}
            if fresh:
                self.batches.append(sum(len(entry.operations) for entry in fresh))
            rows[epoch] = replace(rows[epoch], applied=position)
            if self.lost_replies:
                self.lost_replies -= 1
                raise ConnectionResetError("the reply to the commit was lost")
            return Applied(position, len(moves), tuple(refusals), old, 0)

    async def operations_at(self, positions: Sequence[Position]) -> list[OperationRow]:
        await self._reach()
        return [
            OperationRow(where, 0, "m\x1fo", "deduct", "f", "", "", (), (), self.statuses.get(where, "applied"), False, 0)
            for where in positions
            if where in self.nonces_of
        ]

    async def nonces(self, positions: Sequence[Position]) -> dict[Position, str]:
        await self._reach()
        return {where: self.nonces_of[where] for where in positions if where in self.nonces_of}

    async def reject(self, entry: JournalEntry, refused: Sequence[tuple[int, str]]) -> None:
        await self._reach()
        self.rejected += [(entry.operations[index].key, why) for index, why in refused]

    async def pending_voids(self, partition: int, epoch: int) -> list[Void]:
        await self._reach()
        return [void for void in self.voids if void.position.partition == partition]

    async def pending_credits(self, partition: int, epoch: int) -> list[Credit]:
        return [credit for credit in self.credits if credit.position.partition == partition]

    async def take_stale(self, partition: int, before_ms: int, limit: int) -> list[ReservationRow]:
        taken, self.stale = self.stale[:limit], self.stale[limit:]
        return taken

    async def due_holds(self, partition: int, limit: int, pinned_before_ms: int) -> list[ReservationRow]:
        return []

    async def decide(self, key: str, verdict: str, connection: Any = None) -> str:
        return self.verdicts.setdefault(key, verdict)

    async def due_tasks(self, limit: int) -> list[Task]:
        await self._reach()
        oldest: dict[str, Task] = {}
        for number in sorted(self.tasks):
            oldest.setdefault(self.tasks[number].group, self.tasks[number])
        return [task for task in oldest.values() if task.number not in self.waiting][:limit]

    async def run_tasks(
        self,
        tasks: Sequence[Task],
        call: Callable[[Task, Any], Awaitable[None]],
        more: Callable[[], bool] = lambda: True,
        most: int = 1000,
    ) -> list[TaskRun]:
        ours = sorted(task.number for task in tasks if task.number in self.tasks and task.number not in self.claimed)[:most]
        self.claimed.update(ours)
        runs: list[TaskRun] = []
        try:
            if ours and self.task_faults:
                raise self.task_faults.pop()
            for task in (task for task in tasks if task.number in ours):
                if runs and not more():
                    break
                began, error = time.perf_counter(), None
                try:
                    await call(task, SESSION)
                except Exception as raised:
                    if len(tasks) == 1 or isinstance(raised, TaskStuck | TasksSpoilt | LedgerUnavailable):
                        raise
                    error = raised
                runs.append(TaskRun(task, error, time.perf_counter() - began))
            done = [run.task.number for run in runs if run.error is None]
            for number in done:
                del self.tasks[number]
            if done:
                self.done += done
                self.together.append(done)
            if self.lost_task_replies:
                self.lost_task_replies -= 1
                raise ConnectionResetError("the reply to the commit was lost")
            return runs
        finally:
            self.claimed.difference_update(ours)

    async def fail_task(self, task: Task, error: str, retry_in: float | None) -> None:
        if retry_in is None:
            del self.tasks[task.number]
            self.dead[task.number] = error
        else:
            self.tasks[task.number] = replace(task, attempts=task.attempts + 1)

    async def _reach(self) -> None:
        await asyncio.sleep(0)
        if self.down is not None:
            raise self.down


class FakeRebuilding:
    def __init__(self, rows: dict[int, PartitionRow], epoch: int) -> None:
        self._rows = rows
        self._epoch = epoch

    async def open(self) -> None:
        self._rows[self._epoch] = replace(self._rows[self._epoch], state="open")


class FakeRedis:
    """One partition. ``journal``: (epoch, sequence) → body."""

    def __init__(self, epoch: int = 1) -> None:
        self.journal: dict[tuple[int, int], str] = {}
        self.epoch = epoch
        self.sequence = 0
        self.state = "open" if epoch else "missing"
        self.run_id_known = True
        self.told_applied = 0
        self.why, self.seen = "", 0
        self.resubmitted: list[str] = []
        self.refused: dict[str, str] = {}
        self.signed_at = 0.0
        self.down: Exception | None = None
        self.reads: list[tuple[int, int | None]] = []
        self.voided: list[Void] = []
        self.credited: list[Credit] = []
        self.due: list[str] = []
        self.pinned: list[str] = []
        self.settled: list[tuple[str, str]] = []
        self.trimmed: list[int] = []
        self.signs: list[str] = []
        self.calls: list[str] = []

    def write(self, sequence: int, text: str | None = None) -> str:
        """Journal an entry, as a batch script would."""
        text = text or body(sequence)
        self.journal[self.epoch, sequence] = text
        self.sequence = max(self.sequence, sequence)
        return text

    def empty(self) -> None:
        """FLUSHALL."""
        self.journal.clear()
        self.epoch = self.sequence = self.told_applied = 0
        self.state = "missing"

    async def read_journal(self, partition: int, epoch: int, after: int, upto: int | None, count: int) -> list[tuple[int, str]]:
        await self._reach()
        self.reads.append((after, upto))
        found = sorted(
            (sequence, text)
            for (each, sequence), text in self.journal.items()
            if each == epoch and sequence > after and (upto is None or sequence <= upto)
        )
        return found[:count]

    async def read_back(self, partition: int, epoch: int, upto: int, count: int) -> list[tuple[int, str]]:
        await self._reach()
        found = sorted((sequence, text) for (each, sequence), text in self.journal.items() if each == epoch and sequence <= upto)
        return found[::-1][:count]

    async def resubmit(self, partition: int, epoch: int, operation: JournalOperation, at_ms: int) -> str:
        await self._reach()
        if epoch != self.epoch or self.state != "open":
            raise StockFrozen("moved")
        self.resubmitted.append(operation.key)
        return self.refused.get(operation.key, "")

    async def restore_older(self, partition: int, epoch: int, ledger: Any) -> bool:
        return False

    async def journal_state(self, partition: int) -> JournalState:
        await self._reach()
        kept = [sequence for epoch, sequence in self.journal if epoch == self.epoch]
        oldest = min(kept, default=None)
        return JournalState(
            self.epoch, self.sequence, self.state, self.run_id_known, oldest, 1_700_000_000_000, self.told_applied, self.why, self.seen
        )

    async def trim(self, partition: int, epoch: int, upto_sequence: int) -> None:
        self.trimmed.append(upto_sequence)
        if epoch == self.epoch:
            self.told_applied = max(self.told_applied, upto_sequence)

    async def void(self, partition: int, epoch: int, void: Void) -> None:
        await self._reach()
        self.voided.append(void)

    async def credit(self, partition: int, epoch: int, credit: Credit) -> None:
        await self._reach()
        if epoch != self.epoch:
            raise StockFrozen("moved")
        self.credited.append(credit)

    async def due_expiries(self, partition: int, limit: int) -> list[str]:
        return (self.due + self.pinned)[:limit]

    async def expire(self, partition: int, keys: Sequence[str]) -> Expired:
        ended = [key for key in keys if key in self.due]
        self.due = [key for key in self.due if key not in ended]
        return Expired(ended, [key for key in keys if key in self.pinned])

    async def settle_pin(self, partition: int, key: str, verdict: str) -> None:
        self.pinned.remove(key)
        self.settled.append((key, verdict))

    async def rotate(self, partition: int) -> None:
        self.calls.append("rotate")

    async def freeze(self, partition: int, epoch: int) -> None:
        await self._reach()
        self.calls.append(f"freeze {epoch}")
        if epoch < self.epoch:
            raise StockFrozen("moved")
        self.epoch, self.sequence, self.state, self.told_applied = epoch, 0, "frozen", 0
        self.why, self.seen = "", 0

    async def rebuild(self, partition: int, epoch: int, rebuilding: FakeRebuilding, down_ms: int = 0) -> None:
        await self._reach()
        self.calls.append(f"rebuild {epoch}")
        await rebuilding.open()
        self.state = "open"
        self.run_id_known = True

    async def heartbeat(self, partition: int, worker: str) -> None:
        await self._reach()
        self.signs.append(worker)
        self.signed_at = time.monotonic()

    async def worker_seen(self, partition: int) -> float | None:
        return time.monotonic() - self.signed_at if self.signs else None

    async def _reach(self) -> None:
        await asyncio.sleep(0)
        if self.down is not None:
            raise self.down


class RecordingQueue(MemoryQueue):
    """Keeps what was acknowledged and announced; ``on_ack`` runs before."""

    def __init__(self) -> None:
        super().__init__()
        self.acked: list[int] = []
        self.announced: list[int] = []
        self.on_ack: Callable[[Sequence[Message]], None] | None = None

    @asynccontextmanager
    async def consume(self, partition: int, epoch: int, after: int) -> AsyncIterator[Any]:
        async with super().consume(partition, epoch, after) as consumer:
            acknowledge = consumer.ack

            async def ack(messages: Sequence[Message]) -> None:
                await asyncio.sleep(0)
                if self.on_ack is not None:
                    self.on_ack(messages)
                self.acked += [message.sequence for message in messages if not message.marker]
                await acknowledge(messages)

            consumer.ack = ack  # type: ignore[method-assign]
            yield consumer

    async def announce(self, messages: Sequence[Message]) -> None:
        await asyncio.sleep(0)
        self.announced += [message.sequence for message in messages]


@dataclass
class Shop:
    """One partition with everything around it."""

    ledger: FakeLedger = field(default_factory=FakeLedger)
    redis: FakeRedis = field(default_factory=FakeRedis)
    queue: RecordingQueue = field(default_factory=RecordingQueue)
    facts: Facts = field(default_factory=Facts)

    def worker(self, **options: Any) -> Worker:
        options = {
            "idle": 0.01,
            "take_over": 0.05,
            "first_delay": 0.001,
            "longest_delay": 0.01,
            "housekeeping": 0.01,
            "publish_timeout": 0.01,
        } | options
        redis: Any = self.redis
        ledger: Any = self.ledger
        return Worker(redis, ledger, self.queue, partitions=[0], metrics=self.facts, on_event=self.facts.on_event, name="w", **options)

    async def publish(self, *sequences: int, text: str | None = None) -> None:
        for sequence in sequences:
            await self.queue.publish(0, self.redis.epoch, sequence, text or self.redis.journal[self.redis.epoch, sequence], 1.0)


async def open_shop() -> Shop:
    shop = Shop()
    shop.ledger.open_at(0, 1)
    await shop.queue.bind(0, 1)
    return shop
