"""Waiting between attempts: capped exponential with jitter, ended early by a stop."""

from __future__ import annotations

import asyncio
import random


class Backoff:
    """Delays in seconds: each between half and all of ``first × 2ⁿ``, at most ``cap``. Jitter keeps many workers apart."""

    def __init__(self, first: float = 0.05, cap: float = 5.0) -> None:
        self._first = first
        self._cap = cap
        self.attempts = 0

    def delay(self) -> float:
        """The next delay; ``attempts`` counts them."""
        # The exponent is bounded so that a fault of days can't overflow a float.
        longest: float = min(self._cap, self._first * 2 ** min(self.attempts, 30))
        self.attempts += 1
        jitter: float = random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        return longest * jitter

    def reset(self) -> None:
        """It worked: begin at ``first`` again."""
        self.attempts = 0


async def waited(event: asyncio.Event, seconds: float) -> bool:
    """Wait up to ``seconds`` for the event; whether it is set."""
    if event.is_set():
        return True
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return event.is_set()
    return True
