"""What the ledger owes Redis: voids of refused entries, and credits whose caller went away. Sent until they came back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Hashable
from typing import Final

from inventory_sdk.errors import StockFrozen
from inventory_sdk.sync.backoff import waited
from inventory_sdk.sync.parts import Parts

PERIOD: Final = 1.0
CREDIT_GRACE: Final = 5.0
"""Seconds that the process which entered an operation has to make its credit itself."""
RESEND: Final = 30.0
"""Seconds after which one that was sent, but whose journal entry did not come back, is sent once more (it is idempotent)."""


class Corrections:
    """One partition's pending voids and credits; the pending rows in the ledger are the only trigger, so none is forgotten."""

    def __init__(self, parts: Parts, partition: int, due: asyncio.Event, *, period: float = PERIOD, grace: float = CREDIT_GRACE) -> None:
        self._parts = parts
        self._partition = partition
        self._due = due
        self._period = period
        self._grace = grace
        self._sent: dict[Hashable, float] = {}
        self._seen: dict[Hashable, float] = {}

    async def run(self) -> None:
        """Until the worker stops: at the start, at every refusal, and once a period."""
        parts = self._parts
        backoff = parts.backoff()
        while not parts.stopping.is_set():
            self._due.clear()
            pause = self._period
            try:
                await self.send()
                backoff.reset()
            except Exception as error:  # noqa: BLE001 - Redis or database is away; the rows stay pending
                pause = backoff.delay()
                parts.retried("correction", error, backoff.attempts)
            await waited(self._due, pause)

    async def send(self) -> int:
        """One round; how many were sent. ``StockFrozen`` ends it quietly: a rebuild closes what is pending."""
        parts = self._parts
        row = await parts.ledger.partition(self._partition)
        if row is None or row.state != "open":
            return 0
        now = time.monotonic()
        voids = await parts.ledger.pending_voids(self._partition, row.epoch)
        raises = await parts.ledger.pending_credits(self._partition, row.epoch)
        pending = {("void", v.position, v.index) for v in voids} | {("credit", c.position, c.key) for c in raises}
        self._sent = {name: at for name, at in self._sent.items() if name in pending and now - at < RESEND}
        self._seen = {name: at for name, at in self._seen.items() if name in pending}
        sent = 0
        try:
            for void in voids:
                name: Hashable = ("void", void.position, void.index)
                if name not in self._sent:
                    await parts.stock_side.void(self._partition, row.epoch, void)
                    self._sent[name] = now
                    sent += 1
            for credit in raises:
                name = ("credit", credit.position, credit.key)
                if name not in self._sent and now - self._seen.setdefault(name, now) >= self._grace:
                    await parts.stock_side.credit(self._partition, row.epoch, credit)
                    self._sent[name] = now
                    sent += 1
        except StockFrozen as frozen:
            parts.retried("correction", frozen, 1)
        return sent
