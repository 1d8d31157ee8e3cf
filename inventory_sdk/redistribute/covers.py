"""Which requests wait on a board, as far as this process knows: one that waits covers whatever else its key is asked for.

The board says when a key will be due: before that moment nobody takes it. And it lists the claims, so that a look tells whether one
that is due still waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

LONGEST: Final = 1.0
"""Seconds that a clock is trusted, and so late a covered call is counted."""
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
    """A request that waits. Monotonic times: ``sure``, until which nobody takes it; ``due``, until which each call puts its run off."""

    arguments: str
    sure: float
    due: float


class Covers:
    """One function's, of one event loop; as many as there are keys that wait for a run."""

    def __init__(self) -> None:
        self.fence = 0
        """The newest claim that is known."""
        self._version = 0
        self._covers: dict[str, Cover] = {}
        self._closed = False

    def of(self, key: str, arguments: str, now: float) -> Cover | None:
        """The request that covers a call made now; None: it has to be written down itself."""
        cover = self._covers.get(key)
        if cover is None or cover.arguments != arguments or cover.sure <= now < cover.due:
            return None
        return cover

    def waits(self, key: str) -> bool:
        """Its request was there when the board was seen last."""
        return key in self._covers

    def saw(self, seen: Seen) -> None:
        """Take out what was claimed; all, where the board does not list it or has gone back in time."""
        claims = seen.fence - self.fence
        if seen.version < self._version or claims < 0 or claims > len(seen.claimed):
            self._covers.clear()
        else:
            for key in seen.claimed:
                self._covers.pop(key, None)
        self.fence, self._version = seen.fence, seen.version

    def wrote(self, key: str, arguments: str, asked: float, due: float | None) -> None:
        """A request waits: it was sent at the monotonic time ``asked``, and its key is due so many seconds later. None: it is being
        calculated; then how long each call puts the next run off is not known."""
        if due is None or self._closed:
            self._covers.pop(key, None)
        else:
            self._covers[key] = Cover(arguments, asked + min(due, LONGEST) - LEAD, asked + due)

    def close(self) -> None:
        """Nothing covers anything any more."""
        self._closed = True
        self._covers.clear()
