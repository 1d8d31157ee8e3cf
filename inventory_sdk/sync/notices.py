"""Events for ``@inventory.on`` handlers, handed over aside: a slow or failing handler must not hold up the sync."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from inventory_sdk.sync.backoff import waited

log = logging.getLogger("inventory_sdk.sync")

MOST: Final = 10_000

OnEvent = Callable[[str, Mapping[str, Any]], Awaitable[None]]
"""(event name, facts), see ``docs``: what ``@inventory.on(name)`` handlers get."""


async def no_handler(name: str, facts: Mapping[str, Any]) -> None:
    """Nobody listens."""


class Notices:
    """At most once each, in order. Above ``most`` waiting the oldest are dropped, and that is logged."""

    def __init__(self, on_event: OnEvent = no_handler, most: int = MOST) -> None:
        self._on_event = on_event
        self._waiting: deque[tuple[str, Mapping[str, Any]]] = deque(maxlen=most)
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def tell(self, name: str, facts: Mapping[str, Any]) -> None:
        """Queue it; returns at once."""
        if len(self._waiting) == self._waiting.maxlen:
            log.error("handlers of events are too slow: event %r was dropped", self._waiting[0][0])
        self._waiting.append((name, facts))
        self._arrived.set()
        self._idle.clear()

    async def run(self) -> None:
        """Hand over for ever; cancel to end it."""
        while True:
            while self._waiting:
                name, facts = self._waiting.popleft()
                try:
                    await self._on_event(name, facts)
                except Exception:
                    log.exception("a handler of event %r failed", name)
            self._idle.set()
            self._arrived.clear()
            await self._arrived.wait()

    async def delivered(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds until nothing waits; whether that is so."""
        done = await waited(self._idle, timeout)
        if not done:
            log.error("handlers of events are too slow: %d events are dropped at the stop", len(self._waiting) + 1)
        return done
