"""What becomes of each journaled operation: pure Python over what the ledger knew, no I/O.

``Known`` is what was read under the partition's lock. ``Verdicts`` walks the operations in journal order, keeps the counters,
reservations and claims as they stand after each, and collects the rows to write. An operation moves all of its lines or none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from inventory_sdk.errors import InventoryError
from inventory_sdk.ledger.protocol import Refusal
from inventory_sdk.ledger.store import PENDING, clean, dumps
from inventory_sdk.model import (
    LEDGER_DELTAS,
    NO_DELTAS,
    SEPARATOR,
    Deltas,
    JournalEntry,
    JournalOperation,
    Kind,
    Movement,
    Position,
    split_key,
)

APPLIED: Final = "applied"
REJECTED: Final = "rejected"
DUPLICATE: Final = "duplicate"
UNDONE: Final = "undone"

CLAIMING: Final = frozenset({Kind.RESERVE, Kind.DEDUCT, Kind.ADJUST, Kind.CONFIRM, Kind.RELEASE, Kind.REACQUIRE, Kind.CLAIM})
"""Kinds whose id is taken by them; the ids of the others are made from positions."""

HELD, CONFIRMED, RELEASED, EXPIRED = "held", "confirmed", "released", "expired"

LOST: Final = "lost"
"""Instead of a fingerprint: a reservation that the ledger knows only by what ended it, for its reserve is in a named loss."""

OPERATION: Final = (
    "partition", "epoch", "seq", "index", "merchant", "operation_id", "claim", "kind", "order_id", "reference",
    "fingerprint", "lines", "receipt", "status", "kept", "at_ms", "reason",
)  # fmt: skip
CLAIM, STATUS, KEPT = OPERATION.index("claim"), OPERATION.index("status"), OPERATION.index("kept")

CHANGE: Final = (
    "merchant", "sku", "version", "partition", "epoch", "seq", "index", "line", "quantity",
    "available_delta", "reserved_delta", "sold_delta", "supplied_delta", "written_off_delta",
    "available_before", "reserved_before", "sold_before", "supplied_before", "written_off_before",
    "available_after", "reserved_after", "sold_after", "supplied_after", "written_off_after",
)  # fmt: skip

# What a void adds to Redis per unit, (available, reserved): the inverse of what the kind did there.
VOID_OF: Final[dict[str, tuple[int, int]]] = {
    Kind.RESERVE: (1, -1),
    Kind.DEDUCT: (1, 0),
    Kind.ADJUST: (1, 0),
    Kind.REACQUIRE: (1, 0),
    Kind.CONFIRM: (0, 1),
    Kind.RELEASE: (-1, 1),
    Kind.EXPIRE: (-1, 1),
    Kind.CREDIT: (-1, 0),
}

UNDOABLE: Final = frozenset({Kind.RESERVE, Kind.DEDUCT, Kind.ADJUST, Kind.CLAIM})


class Stock:
    """A stock row as it stands after the operations decided so far."""

    __slots__ = ("available", "before", "merchant", "reserved", "sku", "sold", "supplied", "version", "written_off")

    def __init__(self, merchant: str, sku: str, counters: tuple[int, int, int, int, int], version: int) -> None:
        self.merchant = merchant
        self.sku = sku
        self.available, self.reserved, self.sold, self.supplied, self.written_off = counters
        self.version = version
        self.before = (*counters, version)

    def add(self, deltas: Deltas) -> None:
        """One line's movement."""
        self.available += deltas.available
        self.reserved += deltas.reserved
        self.sold += deltas.sold
        self.supplied += deltas.supplied
        self.written_off += deltas.written_off
        self.version += 1

    def after(self) -> tuple[int, int, int, int, int, int]:
        """The counters in order of ``COUNTERS``, then the version."""
        return (self.available, self.reserved, self.sold, self.supplied, self.written_off, self.version)


class Take:
    """An operation that holds a claim. ``row`` is its row if this batch inserts it, None when the ledger has it."""

    __slots__ = ("epoch", "index", "kind", "lines", "order", "row", "seq")

    def __init__(self, kind: str, epoch: int, seq: int, index: int, lines: list[Any], order: str, row: list[Any] | None) -> None:
        self.kind = kind
        self.epoch = epoch
        self.seq = seq
        self.index = index
        self.lines = lines
        self.order = order
        self.row = row


@dataclass(slots=True)
class Hold:
    """A reservation. ``lines``: field → [original, open, confirmed, released]. ``stored``: the ledger has its row."""

    key: str
    state: str
    fingerprint: str
    partition: int
    epoch: int
    seq: int
    order: str
    expires_at: int
    pinned: bool
    lines: dict[str, list[int]]
    opened_ms: int = 0
    stored: bool = False
    touched: bool = False
    moved: set[str] = field(default_factory=set)
    born: set[str] = field(default_factory=set)
    """Lines that a stored hold has gained."""
    foreign: dict[str, list[int]] = field(default_factory=dict)
    """At the home of a call over several partitions: field there → [partition, original, open, confirmed, released]."""

    def close(self, lines: list[Any], column: int, ending: str | None) -> None:
        """Move units from open to ``column`` (2 confirmed, 3 released); the state when nothing is open is ``ending``, or
        confirmed if anything was."""
        for at in range(0, len(lines), 2):
            counts = self.lines[lines[at]]
            counts[1] -= lines[at + 1]
            counts[column] += lines[at + 1]
            self.moved.add(lines[at])
        self.end(ending)

    def close_elsewhere(self, parts: list[Any], column: int, ending: str | None) -> None:
        """The same for lines in other partitions, which move there."""
        for part in parts:
            for at in range(0, len(part[2]), 2):
                counts = self.foreign.get(part[2][at])
                if counts is not None:
                    counts[2] -= part[2][at + 1]
                    counts[column + 1] += part[2][at + 1]
        self.touched = True
        self.end(ending)

    def end(self, ending: str | None) -> None:
        """Closed, if nothing is open any more."""
        if not any(counts[1] for counts in self.lines.values()) and not any(counts[2] for counts in self.foreign.values()):
            sold = any(counts[2] for counts in self.lines.values()) or any(counts[3] for counts in self.foreign.values())
            self.state = ending or (CONFIRMED if sold else RELEASED)
            self.touched = True

    def has(self, lines: list[Any], column: int) -> bool:
        """Whether ``column`` covers these lines."""
        for at in range(0, len(lines), 2):
            counts = self.lines.get(lines[at])
            if counts is None or counts[column] < lines[at + 1]:
                return False
        return True


@dataclass(slots=True)
class Known:
    """What the ledger knew before this batch."""

    claims: dict[str, Take] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    stock: dict[str, Stock] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    """Keys of refused takes among the references."""
    returned: set[str] = field(default_factory=set)
    """Undone deducts of which something was taken back."""
    credits: set[int] = field(default_factory=set)
    """Sequences of pending credits among those that this batch makes."""
    voids: dict[tuple[int, int, int], list[Any]] = field(default_factory=dict)
    """Deltas of the voids that this batch makes; None where made already."""
    voids_made: set[tuple[int, int, int]] = field(default_factory=set)
    lost_from: int | None = None
    """The first sequence of this epoch that is lost for good: what follows it may concern an operation that went with it."""


def parse_json(extra: str, where: object) -> dict[str, Any]:
    """An operation's ``extra``; ``InventoryError`` if it is not a JSON object."""
    if not extra:
        return {}
    try:
        parsed = json.loads(extra)
    except ValueError as error:
        raise InventoryError(f"{where}: extra can't be read: {extra!r}") from error
    if not isinstance(parsed, dict):
        raise InventoryError(f"{where}: extra must be an object: {extra!r}")
    return parsed


def parts_of(extra: dict[str, Any]) -> list[Any]:
    """What an operation of several partitions has in the others: [partition, position or "", flat lines, remaining], …"""
    return [[part[0], part[1], part[2] or [], part[3] or []] for part in extra.get("parts") or ()]


def abort_keys(key: str, parts: list[Any]) -> list[str]:
    """The tombstones that stand where a part was given up before its call decided."""
    return [f"{key}{SEPARATOR}abort{SEPARATOR}{part[0]}{SEPARATOR}{part[1]}" for part in parts if part[1]]


def parse_position(operation: JournalOperation, extra: dict[str, Any], parts: int) -> tuple[int, ...]:
    """The ``position`` in an ``extra``, "epoch-seq" or "epoch-seq-index"."""
    try:
        numbers = tuple(int(part) for part in str(extra["position"]).split("-"))
    except (KeyError, ValueError) as error:
        raise InventoryError(f"{operation.kind} {operation.key!r}: no position in extra {operation.extra!r}") from error
    if len(numbers) != parts:
        raise InventoryError(f"{operation.kind} {operation.key!r}: position needs {parts} numbers: {operation.extra!r}")
    return numbers


class Verdicts:
    """Walks a batch; afterwards its attributes are the rows to write."""

    def __init__(self, partition: int, known: Known, movements: bool) -> None:
        self.partition = partition
        self.known = known
        self.operations: list[list[Any]] = []
        self.changes: list[tuple[Any, ...]] = []
        self.refusals: list[Refusal] = []
        self.voids: list[tuple[Any, ...]] = []
        self.tasks: list[tuple[Any, ...]] = []
        self.undone: list[tuple[int, int, int]] = []
        self.kept: list[tuple[int, int, int]] = []
        self.deleted: list[Hold] = []
        self.credits: list[int] = []
        self.voided: list[tuple[int, int, int]] = []
        self.movements: list[Movement] = []
        self._moving = movements
        self._quoted: dict[str, str] = {}
        self._kinds: dict[str, Callable[[JournalOperation, dict[str, Any]], None]] = {
            Kind.RESERVE: self._reserve,
            Kind.DEDUCT: self._take,
            Kind.ADJUST: self._take,
            Kind.CONFIRM: self._close,
            Kind.RELEASE: self._close,
            Kind.EXPIRE: self._close,
            Kind.REACQUIRE: self._reacquire,
            Kind.UNDO: self._undo,
            Kind.KEEP: self._keep,
            Kind.CLAIM: self._claim_id,
            Kind.TOMBSTONE: self._tombstone,
            Kind.EXTEND: self._mark,
            Kind.PIN: self._mark,
            Kind.RESUME: self._mark,
            Kind.CREDIT: self._credit,
            Kind.VOID: self._void,
            Kind.CORRECT: self._note,
        }
        self._epoch = self._seq = self._index = self._at_ms = 0

    def walk(self, entry: JournalEntry) -> None:
        """Decide one entry's operations; ``InventoryError`` for what this release can't read."""
        self._epoch, self._seq, self._at_ms = entry.epoch, entry.sequence, entry.at_ms
        kinds = self._kinds
        for index, operation in enumerate(entry.operations):
            self._index = index
            decide = kinds.get(operation.kind)
            if decide is None:
                raise InventoryError(f"journal entry {self._where()}: kind {operation.kind!r} is unknown to this release")
            decide(operation, parse_json(operation.extra, self._where()) if operation.extra else {})

    def _where(self) -> str:
        return f"{self.partition}/{self._epoch}-{self._seq}-{self._index}"

    # What every kind ends in: one row.

    def _row(self, operation: JournalOperation, extra: dict[str, Any], status: str) -> list[Any]:
        kind, key, fingerprint, lines, remaining, order, reference, _, _ = operation
        merchant, _, operation_id = key.partition(SEPARATOR)
        reason = extra.get("reason")
        row = [
            self.partition, self._epoch, self._seq, self._index, merchant, operation_id,
            key if status == APPLIED and kind in CLAIMING else None,
            kind, order or None, reference or None, fingerprint, len(lines) // 2, self._receipt(lines, remaining, extra), status, False,
            self._at_ms, clean(str(reason)) if reason else None,
        ]  # fmt: skip
        self.operations.append(row)
        return row

    def _receipt(self, lines: list[Any], remaining: list[int], extra: dict[str, Any]) -> str:
        if "parts" in extra:
            return dumps([lines, remaining, parts_of(extra)])
        if len(lines) != 2 or len(remaining) != 1:
            return dumps([lines, remaining])
        # The common case by hand: an encoder costs more than the rest of the row.
        field = lines[0]
        quoted = self._quoted.get(field)
        if quoted is None:
            quoted = self._quoted[field] = dumps(field)
        return f"[[{quoted},{lines[1]:d}],[{remaining[0]:d}]]"

    def _accept(self, operation: JournalOperation, extra: dict[str, Any]) -> list[Any]:
        row = self._row(operation, extra, APPLIED)
        task = extra.get("task")
        if task:
            self._task(operation, task, row)
        return row

    def _task(self, operation: JournalOperation, task: dict[str, Any], row: list[Any]) -> None:
        merchant, operation_id = split_key(operation.key)
        position = (self.partition, self._epoch, self._seq)
        self.tasks.append(task_row(task, merchant, operation_id, operation.kind, operation.order, row, (*position, self._index)))

    def _refuse(
        self, operation: JournalOperation, extra: dict[str, Any], reason: str, freeze: bool, signs: tuple[int, int] | None = None
    ) -> None:
        self._row(operation, extra, DUPLICATE if reason == "duplicate" else REJECTED)
        lines = operation.lines
        position = Position(self.partition, self._epoch, self._seq)
        self.refusals.append(Refusal(position, self._index, operation.kind, operation.key, reason, tuple(lines)))
        if operation.kind in CLAIMING:
            self.known.refused.add(operation.key)
        per_unit = signs or VOID_OF.get(operation.kind)
        # Home's take is a hold or a result in Redis also where all of its lines are elsewhere.
        if per_unit is not None and (lines or (operation.kind in UNDOABLE and "parts" in extra)):
            available, reserved = per_unit
            deltas = []
            for at in range(0, len(lines), 2):
                deltas += [lines[at], available * lines[at + 1], reserved * lines[at + 1]]
            self._pend(operation, deltas, freeze)

    def _pend(self, operation: JournalOperation, deltas: list[Any], freeze: bool) -> None:
        place = (self.partition, self._epoch, self._seq, self._index)
        what = (operation.key, operation.kind, operation.reference or None)
        self.voids.append((*place, *what, dumps(deltas), freeze, PENDING))

    # Counters.

    def _move(self, lines: list[Any], per_unit: Deltas) -> bool:
        """Move all lines, or none and False: a row is missing, or a counter would go below zero."""
        stock = self.known.stock
        available, reserved, sold, supplied, written_off = per_unit
        start = len(self.changes)
        for at in range(0, len(lines), 2):
            row = stock.get(lines[at])
            quantity = lines[at + 1]
            if row is None:
                return self._revert(start)
            a, r, s, u, w = row.available, row.reserved, row.sold, row.supplied, row.written_off
            da, dr, ds = available * quantity, reserved * quantity, sold * quantity
            du, dw = supplied * quantity, written_off * quantity
            na, nr, ns, nu, nw = a + da, r + dr, s + ds, u + du, w + dw
            if na < 0 or nr < 0 or ns < 0 or nu < 0 or nw < 0:
                return self._revert(start)
            row.available, row.reserved, row.sold, row.supplied, row.written_off = na, nr, ns, nu, nw
            row.version += 1
            change = (
                row.merchant, row.sku, row.version, self.partition, self._epoch, self._seq, self._index, at >> 1, quantity,
                da, dr, ds, du, dw, a, r, s, u, w, na, nr, ns, nu, nw,
            )  # fmt: skip
            self.changes.append(change)
        return True

    def _revert(self, start: int) -> bool:
        for change in reversed(self.changes[start:]):
            row = self.known.stock[change[0] + SEPARATOR + change[1]]
            row.available, row.reserved, row.sold, row.supplied, row.written_off = change[14:19]
            row.version -= 1
        del self.changes[start:]
        return False

    def _tell(self, operation: JournalOperation, per_unit: Deltas, extra: dict[str, Any], hold: str | None, order: str) -> None:
        if not self._moving:
            return
        position = Position(self.partition, self._epoch, self._seq)
        lines = operation.lines
        name = split_key(hold)[1] if hold else None
        for at in range(0, len(lines), 2):
            merchant, sku = split_key(lines[at])
            quantity = lines[at + 1]
            moved = (per_unit.available * quantity, per_unit.reserved * quantity, per_unit.sold * quantity)
            whose = (operation.operation_id, operation.order or order or None, name)
            where = (position, self._index, extra.get("reason"))
            self.movements.append(Movement(merchant, sku, operation.kind, quantity, *moved, *whose, *where))

    # Takes.

    def _claim(self, operation: JournalOperation, row: list[Any]) -> None:
        self.known.claims[operation.key] = Take(operation.kind, self._epoch, self._seq, self._index, operation.lines, operation.order, row)

    def _given_up(self, operation: JournalOperation, extra: dict[str, Any]) -> bool:
        """Whether a part of it was given up before: then the call as a whole did not happen."""
        return bool(extra) and any(key in self.known.holds for key in abort_keys(operation.key, parts_of(extra)))

    def _take(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        if operation.key in self.known.claims:
            self._refuse(operation, extra, "duplicate", freeze=False)
            return
        if self._given_up(operation, extra):
            self._refuse(operation, extra, "closed", freeze=False)
            return
        per_unit = LEDGER_DELTAS[operation.kind]
        if not self._move(operation.lines, per_unit):
            self._refuse(operation, extra, "insufficient", freeze=True)
            return
        row = self._accept(operation, extra)
        row[KEPT] = bool(extra.get("kept"))
        self._claim(operation, row)
        if self._moving:
            self._tell(operation, per_unit, extra, None, "")

    def _reserve(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        key, lines = operation.key, operation.lines
        if key in self.known.claims or key in self.known.holds:
            self._refuse(operation, extra, "duplicate", freeze=False)
            return
        if self._given_up(operation, extra):
            self._refuse(operation, extra, "closed", freeze=False)
            return
        per_unit = LEDGER_DELTAS[Kind.RESERVE]
        if not self._move(lines, per_unit):
            self._refuse(operation, extra, "insufficient", freeze=True)
            return
        self._claim(operation, self._accept(operation, extra))
        counts = {lines[at]: [lines[at + 1], lines[at + 1], 0, 0] for at in range(0, len(lines), 2)}
        self._hold(operation, key, HELD, counts)
        if extra:
            hold = self.known.holds[key]
            hold.pinned = bool(extra.get("pinned"))
            for part in parts_of(extra):
                for at in range(0, len(part[2]), 2):
                    hold.foreign[part[2][at]] = [part[0], part[2][at + 1], part[2][at + 1], 0, 0]
        if self._moving:
            self._tell(operation, per_unit, extra, key, "")

    def _hold(self, operation: JournalOperation, key: str, state: str, counts: dict[str, list[int]]) -> None:
        self.known.holds[key] = Hold(
            key, state, operation.fingerprint, self.partition, self._epoch, self._seq, operation.order, operation.expires_at,
            False, counts, self._at_ms,
        )  # fmt: skip

    # What ends a hold.

    def _close(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        kind, lines, reference = operation.kind, operation.lines, operation.reference
        if kind != Kind.EXPIRE and operation.key in self.known.claims:
            self._refuse(operation, extra, "duplicate", freeze=False)
            return
        hold = self.known.holds.get(reference)
        if self._went_with_a_loss(hold, reference):
            if kind == Kind.CONFIRM:
                self._stand_in(operation, extra, hold)
            else:
                self._nothing_left(operation, extra, hold, EXPIRED if kind == Kind.EXPIRE else RELEASED)
            return
        if hold is None or not hold.has(lines, 1):
            self._refuse(operation, extra, "closed", freeze=reference not in self.known.refused)
            return
        per_unit = LEDGER_DELTAS[kind]
        if not self._move(lines, per_unit):
            self._refuse(operation, extra, "insufficient", freeze=True)
            return
        row = self._accept(operation, extra)
        column, ending = (2, None) if kind == Kind.CONFIRM else (3, EXPIRED if kind == Kind.EXPIRE else None)
        hold.close(lines, column, ending)
        if "parts" in extra:
            hold.close_elsewhere(parts_of(extra), column, ending)
        if kind != Kind.EXPIRE:
            self._claim(operation, row)
        if self._moving:
            self._tell(operation, per_unit, extra, reference, hold.order)

    def _reacquire(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        lines, reference = operation.lines, operation.reference
        if operation.key in self.known.claims:
            self._refuse(operation, extra, "duplicate", freeze=False)
            return
        hold = self.known.holds.get(reference)
        if self._went_with_a_loss(hold, reference) or (hold is None and extra.get("stands_in")):
            self._stand_in(operation, extra, hold)
            return
        if hold is None or not hold.has(lines, 3):
            self._refuse(operation, extra, "closed", freeze=reference not in self.known.refused)
            return
        per_unit = LEDGER_DELTAS[Kind.REACQUIRE]
        if not self._move(lines, per_unit):
            self._refuse(operation, extra, "insufficient", freeze=True)
            return
        self._claim(operation, self._accept(operation, extra))
        for at in range(0, len(lines), 2):
            counts = hold.lines[lines[at]]
            counts[2] += lines[at + 1]
            counts[3] -= lines[at + 1]
            hold.moved.add(lines[at])
        if not any(counts[1] for counts in hold.lines.values()):
            hold.state = CONFIRMED
        hold.touched = True
        if self._moving:
            self._tell(operation, per_unit, extra, reference, hold.order)

    def _undo(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        reference, known = operation.reference, self.known
        kind = str(extra.get("of"))
        if kind not in UNDOABLE:
            raise InventoryError(f"journal entry {self._where()}: undo of {kind!r}; extra {operation.extra!r}")
        epoch, seq = parse_position(operation, extra, 2)
        available, reserved = VOID_OF.get(kind, (0, 0))
        signs = (-available, -reserved)
        take = known.claims.get(reference)
        hold = known.holds.get(reference) if kind == Kind.RESERVE else None
        # The position tells the take that is undone from another one under the same id: from the one that a duplicate repeated,
        # and from the one that came after an earlier undo.
        standing = (
            take is not None
            and (take.epoch, take.seq, take.kind) == (epoch, seq, kind)
            and list(take.lines) == list(operation.lines)
            and reference not in known.returned
        )
        whole = kind != Kind.RESERVE or (hold is not None and all(counts[0] == counts[1] for counts in hold.lines.values()))
        if take is None or not standing or not whole:
            if take is None and hold is None and epoch == self._epoch and self._went_with_a_loss(None, reference):
                self._row(operation._replace(lines=[], remaining=[]), extra, APPLIED)
                return
            self._refuse(operation, extra, "closed", freeze=reference not in known.refused, signs=signs)
            return
        per_unit = LEDGER_DELTAS.get(kind, NO_DELTAS).negated()
        if not self._move(operation.lines, per_unit):
            self._refuse(operation, extra, "insufficient", freeze=True, signs=signs)
            return
        self._accept(operation, extra)
        del known.claims[reference]
        if take.row is None:
            self.undone.append((take.epoch, take.seq, take.index))
        else:
            take.row[STATUS], take.row[CLAIM] = UNDONE, None
        if hold is not None:
            del known.holds[reference]
            if hold.stored:
                self.deleted.append(hold)
        if self._moving:
            self._tell(operation, per_unit, extra, reference if hold is not None else None, take.order)

    # What concerns an operation in a named loss. Its take never reached the ledger, so there is nothing to give back.

    def _went_with_a_loss(self, hold: Hold | None, reference: str) -> bool:
        lost_from = self.known.lost_from
        if lost_from is None or self._seq < lost_from or reference in self.known.refused:
            return False
        return hold is None or hold.fingerprint == LOST

    def _stand_in(self, operation: JournalOperation, extra: dict[str, Any], hold: Hold | None) -> None:
        """A confirm carries its lines: it sells what the lost reserve had taken."""
        lines, per_unit = operation.lines, LEDGER_DELTAS[Kind.REACQUIRE]
        if not self._move(lines, per_unit):
            self._refuse(operation, extra, "insufficient", freeze=True, signs=VOID_OF[operation.kind])
            return
        operation = operation._replace(kind=Kind.REACQUIRE)
        self._claim(operation, self._accept(operation, extra))
        if hold is None:
            self._hold(operation._replace(fingerprint=LOST), operation.reference, CONFIRMED, {})
            hold = self.known.holds[operation.reference]
        for at in range(0, len(lines), 2):
            if lines[at] in hold.lines:
                counts = hold.lines[lines[at]]
                hold.moved.add(lines[at])
            else:
                counts = hold.lines[lines[at]] = [0, 0, 0, 0]
                hold.born.add(lines[at])
            counts[0] += lines[at + 1]
            counts[2] += lines[at + 1]
        hold.state, hold.touched = CONFIRMED, True
        if self._moving:
            self._tell(operation, per_unit, extra, operation.reference, hold.order)

    def _nothing_left(self, operation: JournalOperation, extra: dict[str, Any], hold: Hold | None, state: str) -> None:
        """A release or expiry is true already. It is kept on record, so that the reserve, should it turn up late, takes nothing."""
        operation = operation._replace(lines=[], remaining=[])
        row = self._accept(operation, extra)
        if operation.kind != Kind.EXPIRE:
            self._claim(operation, row)
        if hold is None:
            self._hold(operation._replace(fingerprint=LOST), operation.reference, state, {})

    # What moves nothing.

    def _note(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        self._accept(operation, extra)

    def _keep(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        take = self.known.claims.get(operation.reference)
        if take is None:
            self._refuse(operation, extra, "closed", freeze=False)
            return
        self._accept(operation, extra)
        if take.row is None:
            self.kept.append((take.epoch, take.seq, take.index))
        else:
            take.row[KEPT] = True

    def _claim_id(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        if operation.key in self.known.claims:
            # Redis had forgotten it. Nothing moved, and the act itself is judged where it is done.
            self._row(operation, extra, DUPLICATE)
            return
        self._claim(operation, self._accept(operation, extra))

    def _tombstone(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        self._accept(operation, extra)
        if operation.reference not in self.known.holds:
            self._hold(operation, operation.reference, RELEASED, {})

    def _mark(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        hold = self.known.holds.get(operation.reference)
        if hold is None or hold.state != HELD:
            self._refuse(operation, extra, "closed", freeze=False)
            return
        self._accept(operation, extra)
        hold.expires_at = operation.expires_at
        if operation.kind != Kind.EXTEND:
            hold.pinned = operation.kind == Kind.PIN
        hold.touched = True

    def _credit(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        epoch, seq = parse_position(operation, extra, 2)
        if epoch != 0:
            raise InventoryError(f"journal entry {self._where()}: a credit is of epoch 0: {operation.extra!r}")
        if seq not in self.known.credits:
            # Redis was raised twice for one credit: take the second back.
            self._refuse(operation, extra, "duplicate", freeze=False)
            return
        self._accept(operation, extra)
        self.known.credits.discard(seq)
        self.credits.append(seq)

    def _void(self, operation: JournalOperation, extra: dict[str, Any]) -> None:
        epoch, seq, index = parse_position(operation, extra, 3)
        at = (epoch, seq, index)
        deltas = self.known.voids.get(at)
        if deltas is None:
            raise InventoryError(f"journal entry {self._where()}: no void stands at {operation.extra!r}")
        if at in self.known.voids_made:
            self._row(operation, extra, DUPLICATE)
            position = Position(self.partition, self._epoch, self._seq)
            self.refusals.append(Refusal(position, self._index, operation.kind, operation.key, "duplicate", tuple(operation.lines)))
            back = [value if place % 3 == 0 else -value for place, value in enumerate(deltas)]
            self._pend(operation, back, freeze=False)
            return
        self._accept(operation, extra)
        self.known.voids_made.add(at)
        self.voided.append(at)


def task_row(
    task: dict[str, Any], merchant: str, operation_id: str, kind: str, order: str, row: list[Any], position: tuple[int, int, int, int]
) -> tuple[Any, ...]:
    """A task's columns, see ``TASK``. Its receipt is JSON: kind, merchant, operation_id, order, lines (flat), remaining,
    position (partition, epoch, sequence), and gray, the caller's context (``context.packed``), where it had one."""
    lines, remaining, *elsewhere = json.loads(row[OPERATION.index("receipt")])
    if elsewhere:
        lines, remaining = _merged(lines, remaining, elsewhere[0])
    receipt = {
        "kind": kind,
        "merchant": merchant,
        "operation_id": operation_id,
        "order": order or None,
        "lines": lines,
        "remaining": remaining,
        "position": position[:3],
    }
    if task.get("gray"):
        receipt["gray"] = task["gray"]
    arguments = task.get("arguments", {})
    return (
        *position, task["name"], int(task.get("version", 1)), arguments if isinstance(arguments, str) else dumps(arguments),
        merchant, order or operation_id, operation_id, dumps(receipt), 0, 0, "pending", task.get("route", ""),
    )  # fmt: skip


def _merged(lines: list[Any], remaining: list[int], parts: list[Any]) -> tuple[list[Any], list[int]]:
    rows = list(zip(lines[::2], lines[1::2], remaining, strict=True))
    for part in parts:
        left = part[3] or [0] * (len(part[2]) // 2)
        rows += zip(part[2][::2], part[2][1::2], left, strict=True)
    rows.sort()
    return [value for row in rows for value in row[:2]], [row[2] for row in rows]


TASK: Final = (
    "partition", "epoch", "seq", "index", "name", "version", "arguments",
    "merchant", "group_id", "operation_id", "receipt", "attempts", "due_ms", "state", "route",
)  # fmt: skip
