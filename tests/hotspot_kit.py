"""Hotspots without waiting: a clock that is turned by hand, a shared rate that says what it is told."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

from inventory_sdk.hotspot.rates import Rate


class Timer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Clock:
    """What a pacer needs of an event loop. ``timers``: how many are set."""

    def __init__(self) -> None:
        self.now = 100.0
        self._due: list[tuple[float, int, Timer]] = []
        self._numbers = count()

    @property
    def timers(self) -> int:
        return sum(not timer.cancelled for _, _, timer in self._due)

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, callback: Callable[[], object]) -> Any:
        timer = Timer(callback)
        heapq.heappush(self._due, (when, next(self._numbers), timer))
        return timer

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    def turn(self, seconds: float) -> None:
        """Let so much time pass; what is due then is called at its own time."""
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            when, _, timer = heapq.heappop(self._due)
            if not timer.cancelled:
                self.now = max(self.now, when)
                timer.callback()
        self.now = end


class Permits:
    """A lease with so many permits, for ever or until ``give`` brings more."""

    def __init__(self, per_second: float, permits: float = float("inf")) -> None:
        self.interval = self.pace = 1 / per_second
        self.permits = permits
        self.taken = 0
        self.stopped = 0.0

    def take(self, now: float) -> bool:
        if self.permits < 1:
            return False
        self.permits -= 1
        self.taken += 1
        return True

    def blocked(self, now: float) -> float:
        return max(0.0, self.stopped - now)

    def put_back(self) -> None:
        self.permits += 1
        self.taken -= 1


class Window:
    """A shared rate. ``answers``: what it says next, and then ``after``; an error is raised."""

    def __init__(self, *answers: bool | BaseException, after: bool | BaseException = True) -> None:
        self.answers = deque(answers)
        self.after = after
        self.costs: list[int] = []

    async def hit(self, limit: Rate, key: str, cost: int) -> bool:
        self.costs.append(cost)
        answer = self.answers.popleft() if self.answers else self.after
        if isinstance(answer, BaseException):
            raise answer
        return answer


async def settle() -> None:
    """Every task that can go on has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)
