"""An operation of a journal entry that came after its epoch was closed, as the current epoch's script takes it: the same id, the
same fingerprint, so that a caller's own repeat and this one have one effect."""

from __future__ import annotations

import json
from typing import Any, Final

from inventory_sdk.errors import Overloaded
from inventory_sdk.model import JournalOperation, Kind, fingerprint
from inventory_sdk.stock.batch import (
    AWAY,
    CLOSED,
    CONFLICT,
    DONE,
    FROZEN,
    GIVEN_UP,
    JOURNAL_FULL,
    NOT_LOADED,
    NOT_OPEN,
    PIN,
    SHORT,
    Answer,
)
from inventory_sdk.stock.parts import as_replied, call_of
from inventory_sdk.stock.records import PIN_OVERDUE_MS

_TAKES: Final = (Kind.RESERVE, Kind.DEDUCT, Kind.ADJUST)
SETTLED: Final = frozenset({Kind.EXPIRE, Kind.CREDIT, Kind.VOID, Kind.CORRECT, Kind.KEEP})
"""Kinds that need nothing in another epoch: it expires by itself, its rebuild included what was credited, voided or corrected, and
a ``keep`` holds no longer than its epoch."""
_TIMED: Final = (Kind.EXTEND, Kind.RESUME)
_REFUSED: Final = {
    SHORT: "insufficient",
    CONFLICT: "conflict",
    CLOSED: "closed",
    NOT_OPEN: "closed",
    GIVEN_UP: "closed",
    # The database sells it by now: it must not be sold in Redis as well, and nobody may think that it stands.
    AWAY: "withdrawn",
    NOT_LOADED: "withdrawn",
}
_PASSING: Final = {FROZEN: "frozen", PIN: "pinned", JOURNAL_FULL: "behind a full journal"}


def resubmission(operation: JournalOperation, at_ms: int) -> list[Any] | None:
    """The batch operation; None for kinds that are ``SETTLED``, or unknown here. Not for a part of a call (``lost_part``)."""
    kind, key, mark, _, _, order, reference, expires_at, extra = operation
    # Home's entry keeps the lines of other partitions apart; its script takes them all.
    remaining, lines = as_replied(operation)
    left = max(1, expires_at - at_ms) if expires_at else 0
    if kind in _TAKES:
        take = [kind, key, mark, list(lines), order, "", left, extra, "", ""]
        if '"parts":' in extra:
            # Once more the one decision: refused where a part of it was given up meanwhile.
            said = json.loads(extra)
            take[9] = "k" if said.get("kept") else ""
            take += [[[part[0], part[1]] for part in said["parts"]], list(remaining)]
        return take
    if kind in (Kind.CONFIRM, Kind.REACQUIRE):
        whole = mark == fingerprint(Kind.CONFIRM, reference, ())
        # Named by its lines also where it closed all: its reserve may be gone, and then they are what it takes. Redis had accepted
        # it, so where the hold ended meanwhile it takes again what is there.
        stands = json.dumps({**(json.loads(extra) if extra else {}), "stands_in": True}, separators=(",", ":"))
        return [Kind.CONFIRM.value, key, mark, list(lines), order, reference, 0, stands, "", "rs" if whole else "s"]
    if kind in (Kind.RELEASE, Kind.TOMBSTONE):
        # With a tombstone where the reserve is unknown: it may come even later. Named by its lines also where it closed all: who
        # repeats it named none, and is answered with those that are remembered.
        of_all = fingerprint(Kind.RELEASE, reference, ())
        mark = mark or of_all
        return [Kind.RELEASE.value, key, mark, list(lines), order, reference, 0, extra, "", "ts" if mark == of_all else "t"]
    if kind == Kind.CLAIM:
        return [kind, key, mark, [], "", reference, 0, "", "", ""]
    if kind == Kind.UNDO:
        said = json.loads(extra)
        undo = [kind, key, mark, list(lines), "", reference, 0, extra, said["position"], said["of"]]
        return [*undo, []] if "parts" in said else undo
    if kind in _TIMED:
        return [kind, key, mark, [], order, reference, left, extra, "", ""]
    if kind == Kind.PIN:
        return [kind, key, mark, [], order, reference, expires_at, extra, str(PIN_OVERDUE_MS), ""]
    return None


def lost_part(operation: JournalOperation) -> bool:
    """Whether it prepares a part of a call over several partitions: home decides on a part by its position, and taken up at another
    one it would be nobody's, held for ever."""
    return operation.kind == Kind.RESERVE and call_of(operation.key) is not None


def late_verdict(answer: Answer) -> str:
    """Why it was refused, in a word; "" when it stands, or there was nothing to do any more. ``Overloaded`` for what passes."""
    (code, *_), _ = answer
    if code <= DONE:
        return ""
    if code in _PASSING:
        raise Overloaded(f"a late operation is {_PASSING[code]}", retry_after=1.0)
    return _REFUSED.get(code, "")
