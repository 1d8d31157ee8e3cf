"""Calls per key in one event loop: a ring of sub-windows, each a bounded table of heavy hitters.

A sub-window counts at most ``2 * most`` keys. When a new key finds it full, every count is lowered by the ``most``-th largest one and
what is left with nothing goes. At least ``most`` counts lose as much as any, so of N calls in a sub-window no key's count is ever more
than N / most too low, and never too high: a flood of invented keys can hide a little of a key, not make one hot. Finding that cut is
one sort per ``most`` new keys.

The hot path adds to ``counts`` itself; the sub-windows are turned from outside, so that a call looks at no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from heapq import nlargest
from typing import Final

MOST: Final = 1024


class Ring:
    """See above. ``counts``: the sub-window that is open now. ``low``: the most that a count of it is too low by."""

    __slots__ = ("_closed", "counts", "low", "most")

    def __init__(self, windows: int, most: int = MOST) -> None:
        self.counts: dict[str, int] = {}
        self.low = 0
        self.most = most
        self._closed: deque[dict[str, int]] = deque(maxlen=windows)

    def add(self, key: str) -> None:
        """One call for a key that ``counts`` does not have."""
        if len(self.counts) >= 2 * self.most:
            cut = nlargest(self.most, self.counts.values())[-1]
            self.counts = {each: count - cut for each, count in self.counts.items() if count > cut}
            self.low += cut
        self.counts[key] = 1

    def count(self, keys: Iterable[str]) -> None:
        """One call that has these keys."""
        for key in keys:
            if key in self.counts:
                self.counts[key] += 1
            else:
                self.add(key)

    def turn(self) -> dict[str, int]:
        """Close the sub-window, and answer it."""
        closed = self.counts
        self.counts = {}
        self.low = 0
        self._closed.append(closed)
        return closed

    def closed(self) -> dict[str, int]:
        """Sums over the closed sub-windows that the ring has."""
        sums: dict[str, int] = {}
        for window in self._closed:
            for key, count in window.items():
                sums[key] = sums.get(key, 0) + count
        return sums


def top(counts: dict[str, int], most: int) -> list[tuple[str, int]]:
    """The largest, largest first."""
    return nlargest(most, counts.items(), key=lambda item: item[1])
