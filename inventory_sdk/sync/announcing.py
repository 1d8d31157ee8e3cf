"""Tells subscribers what the ledger has applied, aside: a broker that is blocked or away must not hold up the stock."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Final

from inventory_sdk.sync.backoff import waited
from inventory_sdk.sync.parts import Parts, log
from inventory_sdk.sync.queues.protocol import Message

MOST: Final = 10_000
MOST_CHARACTERS: Final = 32_000_000
"""What may wait for a broker, in entries and in characters of their text: older ones are given up, and that is said."""
AT_ONCE: Final = 500


class Announcer:
    """One partition's announcements, in the order of the commits. Tried until they are made, or too many wait behind them."""

    def __init__(self, parts: Parts, partition: int, *, most: int = MOST, most_characters: int = MOST_CHARACTERS) -> None:
        self._parts = parts
        self._partition = partition
        self._most = most
        self._most_characters = most_characters
        self._waiting: deque[Message] = deque()
        self._characters = 0
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def tell(self, messages: Sequence[Message]) -> None:
        """Queue them; returns at once."""
        self._waiting.extend(messages)
        self._characters += sum(len(message.body) for message in messages)
        dropped: list[Message] = []
        while self._waiting and (len(self._waiting) > self._most or self._characters > self._most_characters):
            dropped.append(self._take())
        if dropped:
            self._given_up(dropped, "too many wait for the queue")
        if self._waiting:
            self._arrived.set()
            self._idle.clear()

    async def run(self) -> None:
        """Announce for ever; cancel to end it."""
        backoff = self._parts.backoff()
        while True:
            await self._arrived.wait()
            batch = [self._waiting[place] for place in range(min(AT_ONCE, len(self._waiting)))]
            try:
                await self._parts.queue.announce(batch)
            except Exception as error:  # noqa: BLE001 - counted and tried again
                delay = backoff.delay()
                self._parts.retried("announce", error, backoff.attempts)
                await asyncio.sleep(delay)
                continue
            backoff.reset()
            for message in batch:
                # The oldest may have been given up meanwhile.
                if self._waiting and self._waiting[0] is message:
                    self._take()
            if not self._waiting:
                self._arrived.clear()
                self._idle.set()

    async def delivered(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds until nothing waits; what still does is given up, and that is said."""
        if not await waited(self._idle, timeout) and self._waiting:
            self._given_up(list(self._waiting), "the worker stops")

    def _take(self) -> Message:
        message = self._waiting.popleft()
        self._characters -= len(message.body)
        return message

    def _given_up(self, messages: Sequence[Message], why: str) -> None:
        # Committed stock must not wait for subscribers: it is named, and they can read it from the ledger.
        first, last = messages[0], messages[-1]
        log.error(
            "entries %d/%d-%d to %d-%d were not announced: %s",
            self._partition, first.epoch, first.sequence, last.epoch, last.sequence, why,
        )  # fmt: skip
        self._parts.happened("announce_failed", partition=self._partition)
