"""Who has to wait before the next password: what one process remembers of sign-ins that failed.

Counted are a name from one address, and all names from one address. A name from everywhere is not: whoever knows it could keep its owner
out. Who has been quiet for an hour begins anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final

FREE: Final = 5
"""Wrong passwords of a name from one address."""
FREE_OF_ADDRESS: Final = 50
"""Of any names."""
LONGEST_WAIT: Final = 60.0
FORGOTTEN: Final = 3600.0
"""Seconds without a failure after which one begins anew."""
MOST_REMEMBERED: Final = 10_000


@dataclass(frozen=True, slots=True)
class _Failures:
    count: int
    last: float
    until: float


Subject = tuple[str, str]
"""Name and address; an empty name stands for all."""


class Tries:
    """One process' memory. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._failures: dict[Subject, _Failures] = {}

    def __len__(self) -> int:
        return len(self._failures)

    def wait(self, name: str, address: str) -> float:
        """Seconds until this one may try again; 0: now."""
        now = time.monotonic()
        found = [self._failures[subject].until - now for subject, _ in _subjects(name, address) if subject in self._failures]
        return max(0.0, *found, 0.0)

    def failed(self, name: str, address: str) -> None:
        """One more; from the last free one on there is a pause, twice as long each time."""
        now = time.monotonic()
        for subject, free in _subjects(name, address):
            known = self._failures.pop(subject, None)  # again, at the end: the oldest is forgotten first
            count = known.count + 1 if known is not None and now - known.last < FORGOTTEN else 1
            pause = min(LONGEST_WAIT, 2.0 ** min(count - free, 10)) if count >= free else 0.0
            self._failures[subject] = _Failures(count, now, now + pause)
        while len(self._failures) > MOST_REMEMBERED:
            del self._failures[next(iter(self._failures))]

    def right(self, name: str, address: str) -> None:
        """The last one was none: that name begins anew, and of what was tried from there with others one less stays."""
        mine, others = [subject for subject, _ in _subjects(name, address)]
        self._failures.pop(mine, None)
        known = self._failures.get(others)
        if known is not None:
            self._failures[others] = _Failures(known.count - 1, known.last, time.monotonic())


def _subjects(name: str, address: str) -> Iterator[tuple[Subject, int]]:
    network = _network(address)
    yield (name, network), FREE
    yield ("", network), FREE_OF_ADDRESS


def _network(address: str) -> str:
    """Of IPv6 the first half: the other one is its owner's to choose, anew for each try."""
    try:
        found = ip_address(address)
    except ValueError:
        return address or "unknown"
    if not isinstance(found, IPv6Address):
        return str(found)
    return str(found.ipv4_mapped or IPv6Address(int(found) >> 64 << 64))
