"""Names and lines of a call over several partitions: who is home, what the parts are called, how foreign lines are written.

The *home* of a call depends on its merchant and id alone (``model.Layout``), so whoever knows the id finds it. What the call does
in another partition is a *part*: an operation of its own under a key derived from the call's. Where home keeps a line of another
partition, its field reads ``\\x1d<partition>\\x1d<field>``: no user can send that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from inventory_sdk.model import PART, JournalOperation, Kind, Layout, Position

ELSEWHERE: Final = "\x1d"

HOLD_ON, SELL, WRITE_OFF = 0, 1, 2
"""What a commit means for a part; kept with it, so that whoever finds it overdue needs no other knowledge."""
MEANING: Final[dict[str, int]] = {Kind.RESERVE: HOLD_ON, Kind.DEDUCT: SELL, Kind.ADJUST: WRITE_OFF}


class Instance(NamedTuple):
    """One preparation of one part; ``mark`` is its position, "epoch-sequence". After an abort the same part may be prepared anew."""

    partition: int
    mark: str

    @property
    def position(self) -> Position:
        epoch, _, sequence = self.mark.partition("-")
        return Position(self.partition, int(epoch), int(sequence))


@dataclass(frozen=True, slots=True)
class Spread:
    """The lines of one call by partition. ``lines``: all of them, foreign ones marked; ``parts``: partition → flat lines there."""

    lines: list[Any]
    own: list[Any]
    parts: dict[int, list[Any]]


def part_key(key: str, partition: int) -> str:
    """The key of the part that the call ``key`` has in ``partition``."""
    return f"{key}{PART}{partition}"


def sale_in(of: str, partition: int, layout: Layout) -> str:
    """Under which key the call ``of`` has sold in a partition; "" where it names nothing."""
    return of if not of or layout.home(of) == partition else part_key(of, partition)


def call_of(key: str) -> str | None:
    """The key of the call that the part ``key`` belongs to; None for what is no part."""
    call, found, _ = key.rpartition(PART)
    return call if found else None


def spread(flat: Sequence[Any], home: int, layout: Layout) -> Spread | None:
    """Where the lines of a call stand; None when all are at home."""
    if layout.partitions == 1:
        return None
    lines: list[Any] = []
    own: list[Any] = []
    parts: dict[int, list[Any]] = {}
    for field, quantity in zip(flat[::2], flat[1::2], strict=True):
        there = layout.of(field)
        if there == home:
            own += (field, quantity)
            lines += (field, quantity)
        else:
            parts.setdefault(there, []).extend((field, quantity))
            lines += (marked(field, there), quantity)
    return Spread(lines, own, dict(sorted(parts.items()))) if parts else None


def marked(field: str, partition: int) -> str:
    """A field of another partition as home writes it."""
    return f"{ELSEWHERE}{partition}{ELSEWHERE}{field}"


def plain(field: str) -> tuple[str, int | None]:
    """The field, and its partition if it is of another one."""
    if not field.startswith(ELSEWHERE):
        return field, None
    _, partition, name = field.split(ELSEWHERE, 2)
    return name, int(partition)


def unmarked(flat: Sequence[Any]) -> list[Any]:
    """Flat lines with plain fields."""
    return [plain(value)[0] if at % 2 == 0 else value for at, value in enumerate(flat)]


def spans(flat: Sequence[Any]) -> bool:
    """Whether any of these lines stands in another partition."""
    return any(field.startswith(ELSEWHERE) for field in flat[::2])


def as_replied(operation: JournalOperation) -> tuple[list[int], list[Any]]:
    """What remained, and the lines, as the script's reply had them: home's entry keeps those of other partitions apart."""
    own, remaining = operation.lines, operation.remaining
    if '"parts":' not in operation.extra:
        return remaining, own
    rows = [(field, field, units, left) for field, units, left in zip(own[::2], own[1::2], remaining, strict=True)]
    for partition, _, flat, known in json.loads(operation.extra)["parts"]:
        there = known or [0] * (len(flat) // 2)
        rows += [(field, marked(field, partition), units, left) for field, units, left in zip(flat[::2], flat[1::2], there, strict=True)]
    rows.sort()
    return [row[3] for row in rows], [value for _, field, units, _ in rows for value in (field, units)]


def read_instances(text: str) -> tuple[Instance, ...]:
    """The ``partition:position`` list of a result record."""
    found = []
    for each in text.split():
        partition, _, mark = each.partition(":")
        found.append(Instance(int(partition), mark))
    return tuple(found)


def merged(lines: Sequence[Any], remaining: Sequence[int], parts: Iterable[Sequence[Any]]) -> tuple[list[Any], list[int]]:
    """Home's own lines and those of its parts (``[partition, mark, lines, remaining]``), sorted; what is not known to have
    remained is 0."""
    rows: list[tuple[str, int, int]] = []
    for flat, left in ((lines, remaining), *((part[2] or (), part[3] or ()) for part in parts)):
        known = [*left, *[0] * (len(flat) // 2 - len(left))]
        rows += zip(flat[::2], flat[1::2], known, strict=True)
    rows.sort()
    return [value for field, quantity, _ in rows for value in (field, quantity)], [left for _, _, left in rows]
