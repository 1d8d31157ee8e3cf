"""Waiting between attempts: tenacity's exponential delays with jitter, for loops that live as long as their process.

tenacity's own loops end with their call. A follower, a consumer, a publisher goes on for ever instead: it counts failures in a
row, begins anew after a success, and its pauses end with the worker. That is all that is here.
"""

from __future__ import annotations

import asyncio

from tenacity import AsyncRetrying, RetryCallState, wait_exponential, wait_random_exponential


class Backoff:
    """Delays in seconds: each between half and all of ``first × 2ⁿ``, at most ``cap``. Jitter keeps many workers apart."""

    def __init__(self, first: float = 0.05, cap: float = 5.0) -> None:
        # Two halves, one fixed, one random. (wait_exponential_jitter has no jitter left once it is at its cap.)
        self._wait = wait_exponential(first / 2, cap / 2) + wait_random_exponential(first / 2, cap / 2)
        self._state = RetryCallState(AsyncRetrying(), None, (), {})
        self.attempts = 0

    def delay(self) -> float:
        """The next delay; ``attempts`` counts them."""
        self.attempts += 1
        self._state.attempt_number = self.attempts
        return self._wait(self._state)

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
