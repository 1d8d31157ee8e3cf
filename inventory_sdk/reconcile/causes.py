"""What a drift most likely is. Each explanation says how many units it accounts for; the one that accounts for all of them is named.

The evidence is what was looked at, so that a person can judge it: positions, operations, ranges.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.errors import InventoryError
from inventory_sdk.ledger.accounts import Past, Refused
from inventory_sdk.model import LEDGER_DELTAS, NO_DELTAS, JournalOperation, Kind
from inventory_sdk.reconcile.comparing import Drift
from inventory_sdk.reconcile.model import Cause, Discrepancy
from inventory_sdk.reconcile.redis_side import remembered
from inventory_sdk.stock.batch import read_entries
from inventory_sdk.stock.journal import decode
from inventory_sdk.stock.partition import Partition

if TYPE_CHECKING:
    from inventory_sdk.ledger.comparing import Comparing
    from inventory_sdk.ledger.register import Register

HISTORY: Final = 200
"""Changes of a SKU that are looked at, newest first."""
SHOWN: Final = 20
"""Operations or ranges that an evidence names."""
GAPS: Final = 100
ENTRIES: Final = 10_000
"""Entries of missing ranges that are read from the journal."""
MARGIN_MS: Final = 60_000
"""So much younger than the results window an operation must be for Redis to be expected to remember it."""
REMEMBERED: Final = frozenset({Kind.RESERVE, Kind.DEDUCT, Kind.ADJUST, Kind.CONFIRM, Kind.RELEASE})

PAGE: Final = 500
LEDGERS_WAYS: Final = ("write_off", "supply")
"""Corrections that move the ledger to where Redis is."""

Units = tuple[int, int]
"""(available, reserved)"""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One cause, the units of the drift that it accounts for, and what shows it."""

    cause: Cause
    units: Units
    evidence: dict[str, Any]


@dataclass(slots=True)
class _Known:
    """What was read once for a partition, for all of its drifts in a run."""

    refused: dict[str, list[Refused]] = field(default_factory=dict)
    missing: dict[str, Units] = field(default_factory=dict)
    ranges: list[tuple[int, int]] = field(default_factory=list)
    unread: int = 0
    """Entries of missing ranges that the journal does not have any more."""


class Causes:
    """Names causes during one run."""

    def __init__(self, comparing: Comparing, register: Register, results_window: float) -> None:
        self._comparing = comparing
        self._register = register
        self._window_ms = int(results_window * 1000)
        self._known: dict[tuple[int, int], _Known] = {}

    async def of(self, partition: Partition, drift: Drift, before: Discrepancy | None = None) -> tuple[Cause, dict[str, Any]]:
        """The cause of a difference between Redis and the ledger, and the evidence. ``before``: what is on record of it."""
        base: dict[str, Any] = {
            "epoch": drift.epoch,
            "position": f"{partition.number}/{drift.epoch}-{drift.sequence}",
            "watermark": drift.watermark,
            "redis": list(drift.found),
            "expected": [drift.found[0] - drift.available, drift.found[1] - drift.reserved],
            "ledger": dict(zip(("available", "reserved", "sold", "supplied", "written_off"), drift.account.row, strict=True)),
        }
        known = await self._learn(partition, drift.epoch)
        explanations = [*self._books(drift), *self._rejected(known, drift), *self._missing(known, drift)]
        for each in explanations:
            if each.units == drift.units:
                return each.cause, base | each.evidence
        past = await self._comparing.past(drift.field, HISTORY)
        explanations += await self._went_back(partition, drift, past)
        for count in range(1, len(explanations) + 1):
            for some in combinations(explanations, count):
                if _sum(each.units for each in some) == drift.units:
                    more = {key: value for each in some for key, value in each.evidence.items()}
                    if count > 1:
                        more["together"] = [each.cause.value for each in some]
                        more["parts"] = [[each.cause.value, *each.units] for each in some]
                    return some[0].cause, base | more
        if known.unread and known.ranges:
            if before is not None and (before.available, before.reserved) == drift.units and "unread" not in before.evidence:
                return Cause(before.cause), {**before.evidence, **base}  # it was found while the journal still had them
            why = {
                "missing": _ranges(known.ranges),
                "unread": known.unread,
                "why": f"{known.unread} missing entries are not in the journal any more either",
            }
            return Cause.MISSING_JOURNAL, base | why
        last = {"last": [_shown(each) for each in past[:3]], "why": "nothing that was journaled explains the difference"}
        return Cause.MANUAL_REDIS, base | last

    async def _learn(self, partition: Partition, epoch: int) -> _Known:
        known = self._known.get((partition.number, epoch))
        if known is None:
            known = _Known()
            for refused in await self._comparing.refused(partition.number, epoch):
                for at in range(0, len(refused.deltas), 3):
                    known.refused.setdefault(refused.deltas[at], []).append(refused)
            await self._read_gaps(partition, epoch, known)
            if known.missing:
                await self._made_good(epoch, known)
            self._known[partition.number, epoch] = known
        return known

    async def _read_gaps(self, partition: Partition, epoch: int, known: _Known) -> None:
        known.ranges = await self._comparing.gaps(partition.number, epoch, GAPS)
        room = ENTRIES
        for first, last in known.ranges:
            expected = last - first + 1
            entries = await read_entries(partition, epoch, first - 1, last, min(expected, room)) if room else []
            room -= len(entries)
            known.unread += expected - len(entries)
            for sequence, body in entries:
                for operation in decode(partition.number, epoch, sequence, body).operations:
                    for name, available, reserved in redis_deltas(operation):
                        known.missing[name] = _sum([known.missing.get(name, (0, 0)), (available, reserved)])

    async def _made_good(self, epoch: int, known: _Known) -> None:
        """What corrections have given the ledger of these ranges is no difference any more, though the hole is still there."""
        after: int | None = None
        while rows := await self._register.find(kind=Cause.MISSING_JOURNAL.value, state="corrected", limit=PAGE, after=after):
            after = rows[-1].number
            for row in rows:
                made, name = row.details.get("correction") or {}, row.details.get("name")
                if name in known.missing and made.get("epoch") == epoch and made.get("way") in LEDGERS_WAYS:
                    known.missing[name] = _sum([known.missing[name], (-made["available"], -made["reserved"])])
        known.missing = {name: units for name, units in known.missing.items() if units != (0, 0)}

    def _books(self, drift: Drift) -> Iterable[Explanation]:
        """The row was changed past its chain: what its last change left would agree."""
        row, left = drift.account.row, drift.account.left
        if left is not None and left != row:
            units = (left[0] - row[0], left[1] - row[1])
            yield Explanation(Cause.LEDGER_BOOKS, units, {"row": list(row), "last_change_left": list(left)})

    def _rejected(self, known: _Known, drift: Drift) -> Iterable[Explanation]:
        """Refused, and its void neither pending nor made: what it moved in Redis still stands there."""
        lost = [each for each in known.refused.get(drift.field, ()) if not each.voided and each.state != "pending"]
        if lost:
            units = _sum(_of(each.deltas, drift.field, -1) for each in lost)
            named = [f"{each.kind} {each.key!r} at {each.epoch}-{each.sequence}-{each.index}" for each in lost[:SHOWN]]
            yield Explanation(Cause.REJECTED, units, {"rejected": named})

    def _missing(self, known: _Known, drift: Drift) -> Iterable[Explanation]:
        units = known.missing.get(drift.field)
        if units is not None:
            yield Explanation(Cause.MISSING_JOURNAL, units, {"missing": _ranges(known.ranges)})

    async def _went_back(self, partition: Partition, drift: Drift, past: Sequence[Past]) -> Iterable[Explanation]:
        """Operations that the ledger has and Redis must still remember, and does not."""
        hello = await partition.hello()
        since = hello.now_ms - self._window_ms + MARGIN_MS
        young = [each for each in past if each.epoch == drift.epoch and each.at_ms > since and each.sequence <= drift.sequence]
        asked = [each for each in young if each.kind in REMEMBERED and each.status == "applied"]
        if not asked or hello.older:
            return []
        there = await remembered(partition, [each.key for each in asked])
        forgotten = [each for each, known in zip(asked, there, strict=True) if not known]
        if not forgotten:
            return []
        versions = [each.version for each in forgotten]
        # What nobody asks for again (an expiry, an undo) is not remembered by name: it went with those around it.
        between = [each for each in young if min(versions) <= each.version <= max(versions)]
        evidence = {"forgotten": [_shown(each) for each in forgotten[:SHOWN]], "forgotten_count": len(forgotten)}
        units = [_sum((-each.available, -each.reserved) for each in some) for some in (forgotten, between)]
        right = units[1] if units[1] == drift.units else units[0]
        return [Explanation(Cause.WENT_BACK, right, evidence)]


def redis_deltas(operation: JournalOperation) -> list[tuple[str, int, int]]:
    """(field, available, reserved) that a journaled operation moved in Redis."""
    lines = operation.lines
    if operation.kind in (Kind.VOID, Kind.CORRECT):
        return [(lines[at], lines[at + 1], lines[at + 2]) for at in range(0, len(lines), 3)]
    if operation.kind == Kind.CREDIT:
        per_unit: Units = (1, 0)
    elif operation.kind == Kind.UNDO:
        try:
            of = json.loads(operation.extra)["of"]
            undone = NO_DELTAS if of == Kind.CLAIM else LEDGER_DELTAS[of].negated()
        except (ValueError, KeyError, TypeError) as error:
            raise InventoryError(f"undo {operation.key!r} does not say of what: {operation.extra!r}") from error
        per_unit = (undone.available, undone.reserved)
    else:
        deltas = LEDGER_DELTAS.get(operation.kind)
        if deltas is None:
            return []
        per_unit = (deltas.available, deltas.reserved)
    return [(lines[at], per_unit[0] * lines[at + 1], per_unit[1] * lines[at + 1]) for at in range(0, len(lines), 2)]


def _of(deltas: Sequence[Any], name: str, sign: int) -> Units:
    found = [(deltas[at + 1] * sign, deltas[at + 2] * sign) for at in range(0, len(deltas), 3) if deltas[at] == name]
    return _sum(found)


def _sum(units: Iterable[Units]) -> Units:
    available = reserved = 0
    for each in units:
        available += each[0]
        reserved += each[1]
    return available, reserved


def _ranges(ranges: Sequence[tuple[int, int]]) -> list[str]:
    return [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:SHOWN]]


def _shown(past: Past) -> dict[str, Any]:
    return {
        "operation": past.key,
        "kind": past.kind,
        "position": f"{past.epoch}-{past.sequence}",
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(past.at_ms / 1000)),
        "available": past.available,
        "reserved": past.reserved,
    }
