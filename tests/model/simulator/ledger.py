"""The double of the SQL ledger at the Ledger protocol: tables in memory, transactions behind locks.

What becomes of an operation is decided by the SDK's own pure rules (``ledger/decide.py`` and the walk of ``ledger/enter.py``); what
is written here by hand are the tables, the locks, the epochs and the readings. A differential test holds it against SQLite.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.errors import OperationConflict
from inventory_sdk.ledger.decide import (
    CLAIM,
    HELD,
    KEPT,
    OPERATION,
    STATUS,
    UNDOABLE,
    Hold,
    Known,
    Stock,
    Take,
    Verdicts,
    abort_keys,
    parse_json,
    parse_position,
    parts_of,
)
from inventory_sdk.ledger.enter import _check, _Entering
from inventory_sdk.ledger.protocol import (
    Applied,
    Balance,
    Credit,
    DirectAct,
    DirectAnswer,
    Entered,
    Entering,
    EpochClosed,
    ForkFound,
    LedgerUnavailable,
    OperationRow,
    PartitionRow,
    ReservationRow,
    StockRow,
    Void,
    WatermarkMoved,
)
from inventory_sdk.ledger.rebuild import FORGOTTEN
from inventory_sdk.ledger.rows import reservation_row
from inventory_sdk.model import JournalEntry, Kind, Position, key_of, split_key

if TYPE_CHECKING:
    from tests.model.simulator.world import Process, World

_AT: Final = {name: OPERATION.index(name) for name in OPERATION}


def database_gone(why: str) -> LedgerUnavailable:
    """The connection broke. Whether a commit that was under way took place is not known."""
    return LedgerUnavailable("disconnected", ConnectionError(why))


@dataclass(eq=False, slots=True)
class _Claimant:
    process: Process
    shared: bool
    future: asyncio.Future[None]


class RowLock:
    """FOR UPDATE and FOR SHARE, first come, first served."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.holders: list[_Claimant] = []
        self._line: deque[_Claimant] = deque()

    async def take(self, process: Process, shared: bool) -> _Claimant:
        """Returns once it is ours."""
        claimant = _Claimant(process, shared, self._world.loop.create_future())
        self._line.append(claimant)
        self._grant()
        try:
            await claimant.future
        except BaseException:
            self.leave(claimant)
            raise
        return claimant

    def leave(self, claimant: _Claimant) -> None:
        """Commit, rollback, or nobody waits any more."""
        if claimant in self.holders:
            self.holders.remove(claimant)
        if claimant in self._line:
            self._line.remove(claimant)
        self._grant()

    def abandoned(self, process: Process) -> list[_Claimant]:
        """Those of a dead process; who only waited is gone at once."""
        for claimant in [each for each in self._line if each.process is process]:
            self._line.remove(claimant)
        return [each for each in self.holders if each.process is process]

    def _grant(self) -> None:
        while self._line:
            first = self._line[0]
            if self.holders and not (first.shared and all(each.shared for each in self.holders)):
                return
            self._line.popleft()
            self.holders.append(first)
            if not first.future.done():
                first.future.set_result(None)


@dataclass
class Tables:
    """All rows. ``epochs``: partition → epoch → [state, applied]."""

    epochs: dict[int, dict[int, list[Any]]] = field(default_factory=dict)
    entries: dict[tuple[int, int, int], tuple[str, int]] = field(default_factory=dict)
    operations: dict[tuple[int, int, int, int], list[Any]] = field(default_factory=dict)
    claims: dict[str, list[Any]] = field(default_factory=dict)
    changes: list[tuple[Any, ...]] = field(default_factory=list)
    stock: dict[str, Stock] = field(default_factory=dict)
    home: dict[str, int] = field(default_factory=dict)
    """Stock field → partition."""
    holds: dict[str, Hold] = field(default_factory=dict)
    voids: dict[tuple[int, int, int, int], list[Any]] = field(default_factory=dict)
    """(partition, epoch, seq, index) → [key, kind, reference, deltas, freeze, state]"""
    credits: dict[tuple[int, int], list[Any]] = field(default_factory=dict)
    """(partition, seq) → [epoch, key, lines, state]"""
    decisions: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


class Database:
    """The server."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        self.tables = Tables()
        self.log: list[tuple[str, tuple[Any, ...], Any]] = []
        """(method, arguments, result) of what was committed, in order, for the comparison with SQL."""
        self._locks: dict[int, RowLock] = {}

    def lock(self, partition: int) -> RowLock:
        """One per partition stands for its epoch rows and the stock rows behind them."""
        found = self._locks.get(partition)
        if found is None:
            found = self._locks[partition] = RowLock(self.world)
        return found

    def abandoned(self, process: Process) -> None:
        """Its transactions are rolled back once the server has noticed."""
        for lock in self._locks.values():
            for claimant in lock.abandoned(process):
                self.world.later(self.world.random.choice((0.001, 0.05, 1.0)), lambda lock=lock, c=claimant: lock.leave(c))

    def restart(self, seconds: float) -> None:
        """Open transactions are rolled back; nothing answers for a while."""
        self.up = False
        self.world.trace("database", f"away for {seconds:.2f} s")
        self.world.later(seconds, lambda: setattr(self, "up", True))


class SimLedger:
    """One process' connections to the database."""

    def __init__(self, process: Process, database: Database) -> None:
        self._process = process
        self._database = database

    @property
    def _tables(self) -> Tables:
        return self._database.tables

    async def start(self) -> None:
        await self._query()

    async def close(self) -> None:
        """Nothing is kept open."""

    async def create_schema(self) -> None:
        """Tables are there."""

    async def check_schema(self) -> list[str]:
        return []

    async def settle_setting(self, name: str, value: str) -> str:
        await self._query()
        return self._tables.settings.setdefault(name, value)

    # The way there -----------------------------------------------------------------------------------------------------------

    async def _query(self) -> None:
        """One statement's way there; reading happens when this returns."""
        world = self._database.world
        await self._process.away(world.network.latency())
        if not self._database.up or world.chance("database_gone"):
            raise database_gone("the connection to the database broke")

    @asynccontextmanager
    async def _transaction(self, partition: int, shared: bool = False) -> AsyncIterator[_Claimant]:
        await self._query()
        lock = self._database.lock(partition)
        claimant = await lock.take(self._process, shared)
        try:
            await self._query()
            yield claimant
        finally:
            lock.leave(claimant)

    async def _commit(self) -> None:
        """Before the writes become visible: the last moment at which they can be lost."""
        world = self._database.world
        if not self._database.up or world.chance("commit_broken"):
            raise database_gone("the connection broke before the commit")
        await self._process.away(world.network.latency())
        if not self._database.up:
            raise database_gone("the connection broke before the commit")

    async def _committed(self) -> None:
        """The commit has happened; its reply may get lost."""
        world = self._database.world
        if world.chance("commit_unheard"):
            raise database_gone("the connection broke after the commit")
        await self._process.away(world.network.latency())

    # Epochs --------------------------------------------------------------------------------------------------------------------

    def _newest(self, partition: int) -> PartitionRow | None:
        rows = {epoch: row for epoch, row in self._tables.epochs.get(partition, {}).items() if epoch > 0}
        if not rows:
            return None
        epoch = max(rows)
        return PartitionRow(partition, epoch, *rows[epoch])

    async def partition(self, partition: int) -> PartitionRow | None:
        await self._query()
        return self._newest(partition)

    async def epochs(self, partition: int) -> list[PartitionRow]:
        await self._query()
        rows = self._tables.epochs.get(partition, {})
        return [PartitionRow(partition, epoch, *rows[epoch]) for epoch in sorted(rows) if epoch > 0 and rows[epoch][0] != "closed"]

    async def raise_epoch(self, partition: int, above: int, unless_open: bool = False) -> PartitionRow | None:
        async with self._transaction(partition):
            rows = self._tables.epochs.setdefault(partition, {})
            rows.setdefault(0, ["ledger", 0])
            newest = self._newest(partition)
            if newest is not None and (newest.epoch > above or (unless_open and newest.state == "open")):
                return None
            await self._commit()
            if newest is not None:
                # One that was never opened has accepted nothing.
                rows[newest.epoch][0] = "closed" if newest.state == "rebuilding" else "draining"
                for forgotten in range(max(newest.epoch, above - FORGOTTEN) + 1, above + 1):
                    rows[forgotten] = ["draining", 0]
            rows[above + 1] = ["rebuilding", 0]
            self._database.log.append(("raise_epoch", (partition, above), None))
        await self._committed()
        return PartitionRow(partition, above + 1, "rebuilding", 0)

    @asynccontextmanager
    async def rebuilding(self, partition: int, epoch: int) -> AsyncIterator[Any]:
        async with self._transaction(partition) as claimant:
            row = self._tables.epochs.get(partition, {}).get(epoch)
            if row is None or row[0] != "rebuilding":
                raise EpochClosed(f"partition {partition}: epoch {epoch} is {row[0] if row else 'unknown'}, not rebuilding")
            yield SimRebuilding(self, partition, epoch, claimant)

    # Applying --------------------------------------------------------------------------------------------------------------------

    async def apply(
        self, partition: int, epoch: int, entries: Sequence[JournalEntry], writes: Sequence[Any] = (), lost: Sequence[int] = ()
    ) -> Applied:
        async with self._transaction(partition):
            tables = self._tables
            row = tables.epochs.get(partition, {}).get(epoch)
            if epoch <= 0 or row is None or row[0] not in ("open", "draining"):
                raise EpochClosed(f"partition {partition}: epoch {epoch} is {row[0] if row else 'unknown'}, nothing is applied in it")
            applied = row[1]
            if lost and row[0] != "draining":
                raise ValueError(f"partition {partition}: epoch {epoch} is {row[0]}, nothing of it is lost for good")
            fresh, gone, redelivered = self._sift(partition, epoch, entries, lost, applied)
            if not fresh and not gone:
                return Applied(applied, 0, (), redelivered, 0)
            known = self._learn(partition, epoch, fresh)
            if row[0] == "draining":
                known.lost_from = self._lost_from(partition, epoch, gone)
            verdicts = Verdicts(partition, known, bool(writes))
            for entry in fresh:
                verdicts.walk(entry)
            last = applied + len(fresh) + len(gone)
            await self._commit()
            for sequence in gone:
                tables.entries[partition, epoch, sequence] = ("", 0)
            for entry in fresh:
                tables.entries[partition, epoch, entry.sequence] = (entry.nonce, entry.at_ms)
            self._write(partition, verdicts)
            row[1] = last
            done = Applied(last, len(verdicts.operations), tuple(verdicts.refusals), redelivered, len(verdicts.tasks))
            self._database.log.append(("apply", (partition, epoch, tuple(entries), (), tuple(lost)), done))
        self._database.world.auditor.applied(partition, epoch, [entry.sequence for entry in fresh], gone)
        await self._committed()
        return done

    def _sift(
        self, partition: int, epoch: int, entries: Sequence[JournalEntry], lost: Sequence[int], applied: int
    ) -> tuple[list[JournalEntry], list[int], int]:
        new: dict[int, JournalEntry] = {}
        old: list[JournalEntry] = []
        for entry in entries:
            if entry.sequence <= applied or entry.sequence in new:
                old.append(entry)
            else:
                new[entry.sequence] = entry
        gone = sorted({sequence for sequence in lost if sequence > applied})
        if both := new.keys() & set(gone):
            raise ValueError(f"partition {partition}: {sorted(both)} of epoch {epoch} are here and lost at once")
        for expected, sequence in enumerate(sorted([*new, *gone]), applied + 1):
            if sequence != expected:
                raise WatermarkMoved(f"partition {partition}: {epoch}-{expected} comes next, not {epoch}-{sequence}")
        for entry in old:
            known = self._tables.entries.get((partition, epoch, entry.sequence))
            nonce = known[0] if known is not None else new[entry.sequence].nonce
            if nonce != entry.nonce:
                raise ForkFound(f"journal entry {partition}/{epoch}-{entry.sequence}: nonce {entry.nonce!r} is not the one applied there")
        return [new[sequence] for sequence in sorted(new)], gone, len(old)

    def _lost_from(self, partition: int, epoch: int, gone: Sequence[int]) -> int | None:
        """The first lost sequence of the epoch, those of this batch included."""
        before = [seq for (p, e, seq), (nonce, _) in self._tables.entries.items() if (p, e, nonce) == (partition, epoch, "")]
        return min([*before, *gone[:1]], default=None)

    def _learn(self, partition: int, epoch: int, fresh: Sequence[JournalEntry]) -> Known:
        tables, known = self._tables, Known()
        references: set[str] = set()
        keys: set[str] = set()
        for entry in fresh:
            for operation in entry.operations:
                kind = operation.kind
                keys.update((operation.key, operation.reference))
                if operation.reference:
                    references.add(operation.reference)
                if kind in UNDOABLE and operation.extra:
                    keys.update(abort_keys(operation.key, parts_of(parse_json(operation.extra, operation.key))))
                step = 3 if kind == Kind.VOID else 2
                for name in operation.lines[::step]:
                    if name in tables.stock and name not in known.stock:
                        known.stock[name] = _copy(tables.stock[name])
                if kind == Kind.CREDIT:
                    seq = parse_position(operation, parse_json(operation.extra, operation.key), 2)[1]
                    credit = tables.credits.get((partition, seq))
                    if credit is not None and credit[0] == epoch and credit[3] == "pending":
                        known.credits.add(seq)
                elif kind == Kind.VOID:
                    e, s, i = parse_position(operation, parse_json(operation.extra, operation.key), 3)
                    void = tables.voids.get((partition, e, s, i))
                    if void is not None:
                        known.voids[e, s, i] = list(void[3])
                        if void[5] != "pending":
                            known.voids_made.add((e, s, i))
        for key in sorted(keys):
            row = tables.claims.get(key)
            if row is not None:
                lines = json.loads(row[_AT["receipt"]])[0]
                where = (row[_AT["epoch"]], row[_AT["seq"]], row[_AT["index"]])
                known.claims[key] = Take(row[_AT["kind"]], *where, lines, row[_AT["order_id"]] or "", None)
            hold = tables.holds.get(key)
            if hold is not None:
                known.holds[key] = _as_stored(hold)
        known.refused = {void[0] for void in tables.voids.values() if void[0] in references}
        for row in tables.operations.values():
            if row[_AT["kind"]] == Kind.TAKE_BACK and row[STATUS] == "applied" and row[_AT["reference"]] in references:
                known.returned.add(row[_AT["reference"]])
        return known

    def _write(self, partition: int, verdicts: Verdicts) -> None:
        tables = self._tables
        for at in verdicts.undone:
            row = tables.operations[partition, *at]
            tables.claims.pop(row[CLAIM], None)
            row[STATUS], row[CLAIM] = "undone", None
        for at in verdicts.kept:
            tables.operations[partition, *at][KEPT] = True
        self._insert(verdicts.operations)
        tables.changes += verdicts.changes
        for name, row in verdicts.known.stock.items():
            tables.stock[name] = _copy(row)
        for hold in verdicts.deleted:
            del tables.holds[hold.key]
        for key, hold in verdicts.known.holds.items():
            tables.holds[key] = _as_stored(hold)
        for p, e, s, i, key, kind, reference, deltas, freeze, state in verdicts.voids:
            tables.voids[p, e, s, i] = [key, kind, reference, json.loads(deltas), freeze, state]
        for seq in verdicts.credits:
            tables.credits[partition, seq][3] = "made"
        for at in verdicts.voided:
            tables.voids[partition, *at][5] = "made"

    def _insert(self, rows: Sequence[list[Any]]) -> None:
        tables = self._tables
        for row in rows:
            place = tuple(row[:4])
            assert place not in tables.operations, f"operation {place} is there already"
            tables.operations[place] = row  # type: ignore[index]
            if row[CLAIM] is not None:
                assert row[CLAIM] not in tables.claims, f"claim {row[CLAIM]!r} is taken"
                tables.claims[row[CLAIM]] = row

    # Entering ----------------------------------------------------------------------------------------------------------------------

    async def enter(self, partition: int, epoch: int, operations: Sequence[Entering], writes: Sequence[Any] = ()) -> list[Entered]:
        return (await self.enter_parts([(partition, epoch, operations)], writes))[0]

    async def enter_parts(self, parts: Sequence[tuple[int, int, Sequence[Entering]]], writes: Sequence[Any] = ()) -> list[list[Entered]]:
        for _, _, operations in parts:
            for operation in operations:
                _check(operation)
        ordered = sorted(parts, key=lambda part: part[0])
        done: dict[int, list[Entered]] = {}
        works: list[tuple[_Entering, list[Any]]] = []
        async with AsyncExitStack() as stack:
            for partition, epoch, operations in ordered:
                await stack.enter_async_context(self._transaction(partition))
                work, zero = self._entering(partition, epoch, operations, bool(writes))
                done[partition] = self._walk_entering(work, epoch, operations)
                works.append((work, zero))
            moved = [(work, zero) for work, zero in works if work.seq != zero[1]]
            if moved:
                await self._commit()
                for work, zero in moved:
                    self._enter_write(work.partition, work, zero)
                self._database.log.append(("enter_parts", (tuple(ordered),), [done[part[0]] for part in ordered]))
        for work, _ in moved:
            self._database.world.auditor.entered(work.operations)
        await self._committed()
        return [done[part[0]] for part in parts]

    def _entering(self, partition: int, epoch: int, operations: Sequence[Entering], moving: bool) -> tuple[_Entering, list[Any]]:
        tables = self._tables
        row = tables.epochs.get(partition, {}).get(epoch)
        if row is None or row[0] != "open":
            raise EpochClosed(f"partition {partition}: epoch {epoch} is {row[0] if row else 'unknown'}, nothing enters in it")
        zero = tables.epochs[partition][0]
        stock = self._entering_stock([each for each in operations if each.key not in tables.claims])
        sold = self._sold({each.reference for each in operations if each.kind == Kind.TAKE_BACK})
        return _Entering(partition, epoch, zero[1], stock, set(), {}, sold, movements=moving), zero

    def _walk_entering(self, work: _Entering, epoch: int, operations: Sequence[Entering]) -> list[Entered]:
        tables = self._tables
        done: list[Entered] = []
        for operation in operations:
            before = tables.claims.get(operation.key)
            if before is None:
                done.append(work.take(operation))
                continue
            known = _operation_row(before)
            if known.fingerprint != operation.fingerprint:
                raise OperationConflict(split_key(operation.key)[1])
            ours = (known.position.partition, known.position.epoch) == (work.partition, 0)
            pending = tables.credits.get((work.partition, known.position.sequence)) if ours else None
            credit = None
            if pending is not None and pending[0] == epoch and pending[3] == "pending":
                credit = Credit(known.position, epoch, known.key, tuple(pending[2]))
            done.append(Entered(known.position, known.remaining, credit, True))
        return done

    def _entering_stock(self, operations: Sequence[Entering]) -> dict[str, Stock]:
        found: dict[str, Stock] = {}
        for each in operations:
            for name in each.lines[::2]:
                if name in self._tables.stock:
                    found[name] = _copy(self._tables.stock[name])
                elif each.kind != Kind.TAKE_BACK:
                    found[name] = Stock(*split_key(name), (0, 0, 0, 0, 0), 0)
        return found

    def _sold(self, wanted: set[str]) -> dict[str, dict[str, int]]:
        tables = self._tables
        sold: dict[str, dict[str, int]] = {}
        for key in wanted:
            row, hold = tables.claims.get(key), tables.holds.get(key)
            if row is not None and row[_AT["kind"]] == Kind.DEDUCT:
                flat = json.loads(row[_AT["receipt"]])[0]
                sold[key] = dict(zip(flat[::2], flat[1::2], strict=True))
            if hold is not None:
                sold[key] = {name: counts[2] for name, counts in hold.lines.items()}
        for row in tables.operations.values():
            if row[_AT["kind"]] == Kind.TAKE_BACK and row[STATUS] == "applied" and row[_AT["reference"]] in wanted:
                left = sold.get(row[_AT["reference"]], {})
                flat = json.loads(row[_AT["receipt"]])[0]
                for name, quantity in zip(flat[::2], flat[1::2], strict=True):
                    left[name] = left.get(name, 0) - quantity
        return sold

    def _enter_write(self, partition: int, work: _Entering, zero: list[Any]) -> None:
        tables = self._tables
        zero[1] = work.seq
        for p, e, s, nonce, at_ms, _ in work.entries:
            tables.entries[p, e, s] = (nonce, at_ms)
        self._insert(work.operations)
        tables.changes += work.changes
        for name, row in work.stock.items():
            tables.stock[name] = _copy(row)
            tables.home.setdefault(name, partition)
        for _, seq, _, epoch, key, merchant, sku, quantity, state in work.credits:
            tables.credits.setdefault((partition, seq), [epoch, key, [], state])[2].extend((key_of(merchant, sku), quantity))

    # Readings ----------------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def balances(self, partition: int, epoch: int, fields: Sequence[str]) -> AsyncIterator[Mapping[str, Balance]]:
        async with self._transaction(partition, shared=True):
            row = self._tables.epochs.get(partition, {}).get(epoch)
            if row is None or row[0] != "open":
                raise EpochClosed(f"partition {partition}: epoch {epoch} is {row[0] if row else 'unknown'}, nothing is loaded in it")
            coming: dict[str, int] = {}
            for (p, _), (at, _, flat, state) in self._tables.credits.items():
                if p == partition and at == epoch and state == "pending":
                    for name, quantity in zip(flat[::2], flat[1::2], strict=True):
                        coming[name] = coming.get(name, 0) + quantity
            found = {name: self._tables.stock[name] for name in fields if name in self._tables.stock}
            yield {name: Balance(name, row.available - coming.get(name, 0), row.reserved) for name, row in found.items()}

    async def stock(self, fields: Sequence[str]) -> list[StockRow]:
        await self._query()
        found = [self._tables.stock[name] for name in sorted(set(fields)) if name in self._tables.stock]
        return [StockRow(row.merchant, row.sku, *row.after()) for row in found]

    async def all_stock(self, merchant: str | None = None) -> list[StockRow]:
        await self._query()
        rows = [row for _, row in sorted(self._tables.stock.items()) if merchant is None or row.merchant == merchant]
        return [StockRow(row.merchant, row.sku, *row.after()) for row in rows]

    async def operation(self, key: str) -> OperationRow | None:
        await self._query()
        row = self._tables.claims.get(key)
        return None if row is None else _operation_row(row)

    async def operations_at(self, positions: Sequence[Position]) -> list[OperationRow]:
        await self._query()
        wanted = {tuple(position) for position in positions}
        return [_operation_row(row) for place, row in sorted(self._tables.operations.items()) if place[:3] in wanted]

    async def reservation(self, key: str) -> ReservationRow | None:
        await self._query()
        hold = self._tables.holds.get(key)
        return None if hold is None else reservation_row(_as_stored(hold))

    async def take_stale(self, partition: int, before_ms: int, limit: int) -> list[ReservationRow]:
        await self._query()
        return []

    async def pending_credits(self, partition: int, epoch: int) -> list[Credit]:
        await self._query()
        return [
            Credit(Position(partition, 0, seq), epoch, key, tuple(flat))
            for (p, seq), (at, key, flat, state) in sorted(self._tables.credits.items())
            if p == partition and at == epoch and state == "pending"
        ]

    async def pending_voids(self, partition: int, epoch: int) -> list[Void]:
        await self._query()
        return [
            Void(Position(p, e, s), i, key, kind, reference or "", tuple(deltas), bool(freeze))
            for (p, e, s, i), (key, kind, reference, deltas, freeze, state) in sorted(self._tables.voids.items())
            if p == partition and e == epoch and state == "pending"
        ]

    async def decide(self, key: str, verdict: str, connection: Any = None) -> str:
        await self._query()
        return self._tables.decisions.setdefault(key, verdict)

    async def due_tasks(self, limit: int) -> list[Any]:
        return []

    async def act(self, partition: int, act: DirectAct, writes: Sequence[Any] = ()) -> DirectAnswer:
        await self._query()
        return DirectAnswer("elsewhere")

    async def places(self, fields: Sequence[str], merchant: str | None = None) -> dict[str, str]:
        await self._query()
        there = {name: "redis" for name in fields if name in self._tables.stock}
        return {**there, "": "redis"} if merchant is not None else there

    async def due_holds(self, partition: int, limit: int, pinned_before_ms: int) -> list[ReservationRow]:
        return []

    async def live_holds(self, partition: int, fields: Sequence[str]) -> list[ReservationRow]:
        await self._query()
        wanted = set(fields)
        found = [
            hold
            for _, hold in sorted(self._tables.holds.items())
            if hold.state == HELD and hold.partition == partition and any(hold.lines[name][1] for name in wanted & hold.lines.keys())
        ]
        return [reservation_row(_as_stored(hold)) for hold in found]

    async def nonces(self, positions: Sequence[Position]) -> dict[Position, str]:
        await self._query()
        entries = self._tables.entries
        return {each: entries[tuple(each)][0] for each in positions if tuple(each) in entries}

    def _remembered(self, partition: int, since_ms: int) -> list[tuple[tuple[int, ...], OperationRow]]:
        """Applied operations with a claim, and tombstones, newest first."""
        tables = self._tables
        found = []
        for row in tables.operations.values():
            known = _operation_row(row)
            where = (known.position.partition, known.position.epoch, known.position.sequence)
            at_ms = tables.entries[where][1]
            claimed = row[_AT["claim"]] is not None or known.kind == "tombstone"
            if where[0] == partition and at_ms >= since_ms and known.status == "applied" and claimed:
                found.append(((at_ms, *where[1:], known.index), known))
        found.sort(key=lambda each: each[0], reverse=True)
        return found

    async def results(
        self, partition: int, since_ms: int, before: tuple[int, int, int] | None, size: int
    ) -> tuple[list[OperationRow], tuple[int, int, int] | None]:
        await self._query()
        found = [each for each in self._remembered(partition, since_ms) if before is None or each[0][:3] < before]
        if len(found) <= size:
            return [row for _, row in found], None
        last = found[size - 1][0][:3]
        page = [each for each in found if each[0][:3] >= last]
        return [row for _, row in page], last if len(page) < len(found) else None

    async def reject(self, entry: JournalEntry, refused: Sequence[tuple[int, str]]) -> None:
        async with self._transaction(entry.partition):
            zero = self._tables.epochs[entry.partition][0]
            await self._commit()
            zero[1] += 1
            where = (entry.partition, 0, zero[1])
            self._tables.entries[where] = (entry.nonce, entry.at_ms)
            rows = []
            for index, reason in refused:
                operation = entry.operations[index]
                row: list[Any] = [None] * len(_AT)
                merchant, operation_id = split_key(operation.key)
                values = {
                    "partition": where[0], "epoch": 0, "seq": where[2], "index": index, "merchant": merchant,
                    "operation_id": operation_id, "claim": None, "kind": operation.kind, "order_id": operation.order or None,
                    "reference": operation.reference or None, "fingerprint": operation.fingerprint,
                    "receipt": json.dumps([list(operation.lines), list(operation.remaining)]), "status": "rejected",
                    "kept": False, "at_ms": entry.at_ms, "reason": reason, "lines": len(operation.lines) // 2,
                }  # fmt: skip
                for name, value in values.items():
                    row[_AT[name]] = value
                rows.append(row)
            self._insert(rows)
            self._database.log.append(("reject", (entry, tuple(refused)), None))
        await self._committed()


class SimRebuilding:
    """A reading under the partition's lock; what it changes is written by ``open`` or not at all."""

    def __init__(self, ledger: SimLedger, partition: int, epoch: int, claimant: _Claimant) -> None:
        self._ledger = ledger
        self._claimant = claimant
        self._partition = partition
        self._epoch = epoch
        self._extended = 0

    async def balances(self, size: int) -> AsyncIterator[Sequence[Balance]]:
        tables = self._ledger._tables
        found = [Balance(name, row.available, row.reserved) for name, row in sorted(tables.stock.items()) if self._ours(name)]
        for start in range(0, len(found), size):
            await self._ledger._query()
            yield found[start : start + size]

    def _ours(self, name: str) -> bool:
        return self._ledger._tables.home[name] == self._partition

    async def reservations(self, size: int) -> AsyncIterator[Sequence[ReservationRow]]:
        holds = sorted(self._ledger._tables.holds.items())
        found = []
        for hold in [hold for _, hold in holds if hold.state == HELD and hold.partition == self._partition]:
            stored = _as_stored(hold)
            if stored.expires_at and not stored.pinned:
                stored.expires_at += self._extended
            found.append(reservation_row(stored))
        for start in range(0, len(found), size):
            await self._ledger._query()
            yield found[start : start + size]

    async def results(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        found = self._ledger._remembered(self._partition, since_ms)
        rows = [known for _, known in found]
        for start in range(0, len(rows), size):
            await self._ledger._query()
            yield rows[start : start + size]

    async def extend(self, milliseconds: int) -> None:
        self._extended = milliseconds

    async def open(self) -> None:
        await self._ledger._commit()
        for hold in self._ledger._tables.holds.values():
            if hold.state == HELD and hold.partition == self._partition and hold.expires_at and not hold.pinned:
                hold.expires_at += self._extended
        tables = self._ledger._tables
        rows = tables.epochs[self._partition]
        if rows[self._epoch][0] != "rebuilding":
            raise EpochClosed(f"partition {self._partition}: epoch {self._epoch} is not rebuilding")
        for epoch, row in rows.items():
            if 0 < epoch < self._epoch:
                row[0] = "closed"
        for credit in (each for (p, _), each in tables.credits.items() if p == self._partition):
            if credit[0] < self._epoch and credit[3] == "pending":
                credit[3] = "closed"
        for (p, e, _, _), void in tables.voids.items():
            if p == self._partition and e < self._epoch and void[5] == "pending":
                void[5] = "closed"
        rows[self._epoch][0] = "open"
        self._ledger._database.log.append(("open", (self._partition, self._epoch), self._extended))
        self._ledger._database.lock(self._partition).leave(self._claimant)
        self._ledger._database.world.auditor.opened(self._partition, self._epoch)
        await self._ledger._committed()


def _copy(row: Stock) -> Stock:
    return Stock(row.merchant, row.sku, row.after()[:5], row.version)


def _as_stored(hold: Hold) -> Hold:
    """As a fresh reading of its rows would give it."""
    found = copy.copy(hold)
    found.lines = {name: list(counts) for name, counts in hold.lines.items()}
    found.foreign = {name: list(counts) for name, counts in hold.foreign.items()}
    found.stored, found.touched, found.moved, found.born = True, False, set(), set()
    return found


def _operation_row(row: list[Any]) -> OperationRow:
    flat, remaining, *parts = json.loads(row[_AT["receipt"]])
    return OperationRow(
        position=Position(*row[:3]),
        index=row[3],
        key=key_of(row[_AT["merchant"]], row[_AT["operation_id"]]),
        kind=row[_AT["kind"]],
        fingerprint=row[_AT["fingerprint"]],
        order=row[_AT["order_id"]] or "",
        reference=row[_AT["reference"]] or "",
        lines=tuple(flat),
        remaining=tuple(remaining),
        status=row[STATUS],
        kept=row[KEPT],
        at_ms=row[_AT["at_ms"]],
        parts=tuple(tuple(part) for part in parts[0]) if parts else (),
    )
