"""Which requests wait on a board, as far as this process knows: one that waits covers whatever else its key is asked for.

The board says when a key will be due: before that moment nobody takes it. And it lists the claims, so that a look tells whether a
request still waits; that is enough for a call that would not put the run off anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LONGEST: Final = 1.0
"""Seconds that a clock is trusted."""
LEAD: Final = 0.03
"""Seconds before a key is due at which what was covered until then is written down."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The board as a script saw it. ``claimed``: the keys of the claims after the fence that was known, as far as they are listed."""

    version: int
    fence: int
    claimed: Sequence[str]


@dataclass(frozen=True, slots=True)
class Cover:
    """A request that waits. Monotonic times: ``since`` when, as far as is known here; ``sure``, until which nobody takes it. ``fixed``:
    no call puts its run off any more."""

    version: int
    since: float
    sure: float
    fixed: bool


class Covers:
    """One function's, of one event loop; as many as there are keys that wait for a run."""

    def __init__(self) -> None:
        self.fence = 0
        """The newest claim that is known."""
        self._version = 0
        self._covers: dict[str, Cover] = {}
        self._closed = False

    def of(self, key: str, now: float) -> Cover | None:
        """The request that covers a call made now; None: it has to be written down itself."""
        cover = self._covers.get(key)
        return cover if cover is not None and (cover.fixed or now < cover.sure) else None

    def waits(self, key: str) -> int:
        """The version of its request that was there when the board was seen last; 0: there was none that is known."""
        cover = self._covers.get(key)
        return 0 if cover is None else cover.version

    def saw(self, seen: Seen) -> None:
        """Take out what was claimed; all, where the board does not list it or has gone back in time."""
        claims = seen.fence - self.fence
        if seen.version < self._version or claims < 0 or claims > len(seen.claimed):
            self._covers.clear()
        else:
            for key in seen.claimed:
                self._covers.pop(key, None)
        self.fence, self._version = seen.fence, seen.version

    def wrote(self, key: str, version: int, asked: float, due: float | None, fixed: bool) -> None:
        """A request waits: it was sent at the monotonic time ``asked``, and its key is due so many seconds later. None: it is being
        calculated; then it is not known how long each call puts the next run off."""
        if due is None or self._closed:
            self._covers.pop(key, None)
        else:
            older = self._covers.get(key)
            since = asked if older is None else older.since
            self._covers[key] = Cover(version, since, asked + min(due, LONGEST) - LEAD, fixed)

    def close(self) -> None:
        """Nothing covers anything any more."""
        self._closed = True
        self._covers.clear()
