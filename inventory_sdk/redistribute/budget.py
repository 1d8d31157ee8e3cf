"""A CPU budget: what runs took is a debt, paid off at a steady rate; nothing starts while there is one."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """``rate``: CPU seconds per second. What was not used is not saved up, so a quiet hour doesn't pay for a storm."""

    __slots__ = ("_at", "_clock", "_debt", "_rate")

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._debt = 0.0
        self._at = clock()

    def charge(self, cpu_seconds: float) -> None:
        """So much was taken."""
        self._debt = self._left() + cpu_seconds

    def wait(self) -> float:
        """Seconds until something may start."""
        return self._left() / self._rate

    def _left(self) -> float:
        now = self._clock()
        self._debt = max(0.0, self._debt - (now - self._at) * self._rate)
        self._at = now
        return self._debt
