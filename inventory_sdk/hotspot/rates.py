"""Rates as text: ``"200/second"``, ``"30/minute"``, and what one hotspot decorator was told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from inventory_sdk.errors import InvalidOperation

UNITS: Final = {"second": 1, "minute": 60, "hour": 3600}
MOST: Final = 1_000_000
MAX_WAIT: Final = 60.0
_WRITTEN: Final = re.compile(r"\s*([0-9]{1,9})\s*(?:/|per)\s*(second|minute|hour)s?\s*")

Overflow = Literal["queue", "reject"]


@dataclass(frozen=True, slots=True)
class Rate:
    """``amount`` calls in ``seconds``."""

    amount: int
    seconds: int

    @property
    def per_second(self) -> float:
        return self.amount / self.seconds

    def __str__(self) -> str:
        return f"{self.amount}/{next(name for name, seconds in UNITS.items() if seconds == self.seconds)}"


def parse_rate(field: str, text: object) -> Rate:
    """``InvalidOperation`` for anything but a positive whole number per second, minute or hour."""
    found = _WRITTEN.fullmatch(text) if isinstance(text, str) else None
    if found is None or not 1 <= int(found[1]) <= MOST:
        raise InvalidOperation(field, text, f"must be a rate such as '200/second' or '30/minute', from 1 to {MOST}")
    return Rate(int(found[1]), UNITS[found[2]])


@dataclass(frozen=True, slots=True)
class Rule:
    """What a decorator was told. ``threshold``: calls per second at which a key is hot; ``limit``: what all processes together let
    through of it then; ``max_wait``: the longest wait in line, in seconds (0 with ``overflow="reject"``)."""

    threshold: float
    limit: Rate
    max_wait: float
    overflow: Overflow


def make_rule(threshold: object, limit: object, max_wait: object, overflow: object) -> Rule:
    """``InvalidOperation`` names what does not fit."""
    hot, pace = parse_rate("threshold", threshold), parse_rate("limit", limit)
    number = max_wait if isinstance(max_wait, int | float) and not isinstance(max_wait, bool) else -1.0
    if not 0 <= number <= MAX_WAIT:
        raise InvalidOperation("max_wait", max_wait, f"must be seconds, from 0 to {MAX_WAIT:g}")
    if overflow == "queue":
        return Rule(hot.per_second, pace, float(number), "queue")
    if overflow == "reject":
        return Rule(hot.per_second, pace, 0.0, "reject")
    raise InvalidOperation("overflow", overflow, "must be 'queue' or 'reject'")
