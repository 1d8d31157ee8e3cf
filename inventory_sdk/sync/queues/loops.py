"""One value per event loop: connections, locks and futures belong to the loop that made them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerLoop(Generic[T]):
    """Makes a value for each event loop that asks, so that one object serves ``asyncio.run`` after ``asyncio.run``."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._values: dict[asyncio.AbstractEventLoop, T] = {}

    def get(self) -> T:
        """The running loop's value, made now if it has none."""
        loop = asyncio.get_running_loop()
        value = self._values.get(loop)
        if value is None:
            # A closed loop's value holds futures, and those hold the loop: a weak mapping would never let go of either.
            for closed in [known for known in self._values if known.is_closed()]:
                del self._values[closed]
            value = self._values[loop] = self._make()
        return value

    def pop(self) -> T | None:
        """The running loop's value, which it forgets; None if there is none."""
        return self._values.pop(asyncio.get_running_loop(), None)
