"""What every task of one worker works with, and how it insists: call, count the failure, wait, call again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from inventory_sdk.ledger.protocol import Ledger, LedgerUnavailable, WritesStock
from inventory_sdk.metrics import Happened, Metrics, Retried
from inventory_sdk.sync.backoff import Backoff
from inventory_sdk.sync.publish import PUBLISH_TIMEOUT
from inventory_sdk.sync.queues.protocol import Queue
from inventory_sdk.sync.stock_side import StockSide

log = logging.getLogger("inventory_sdk.sync")

T = TypeVar("T")

Tell = Callable[[str, Mapping[str, Any]], None]
"""(event name, facts): hands an event to ``@inventory.on`` handlers; returns at once and doesn't raise."""


class Halted(Exception):
    """The worker is stopping and what is held here can't go on: leave it unacknowledged."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The rooms and the switches that a worker's tasks share."""

    stock_side: StockSide
    ledger: Ledger
    queue: Queue
    metrics: Metrics
    tell: Tell
    stopping: asyncio.Event
    writes_stock: Sequence[WritesStock] = ()
    first_delay: float = 0.05
    longest_delay: float = 5.0
    publish_timeout: float = PUBLISH_TIMEOUT

    def backoff(self) -> Backoff:
        """A fresh one with this worker's delays."""
        return Backoff(self.first_delay, self.longest_delay)

    def happened(self, name: str, **labels: object) -> None:
        """Count it for alerts."""
        self.metrics.record(Happened(name, {key: str(value) for key, value in labels.items()}))

    def retried(self, what: str, error: BaseException, attempt: int) -> None:
        """Count a failed attempt; say it in the log at the first and then ever more rarely."""
        reason = error.reason if isinstance(error, LedgerUnavailable) else type(error).__name__
        self.metrics.record(Retried(what, reason))
        if attempt & (attempt - 1) == 0:
            log.warning("%s failed (attempt %d), trying again: %s: %s", what, attempt, type(error).__name__, error)

    async def persist(self, what: str, call: Callable[[], Awaitable[T]], *passing: type[Exception]) -> T:
        """The call's result, however long it takes; errors of the kinds in ``passing`` go to the caller. Cancelled from
        outside only: a stop gives what is in hand a bounded time and then cancels."""
        backoff = self.backoff()
        while True:
            try:
                return await call()
            except Exception as error:
                if passing and isinstance(error, passing):
                    raise
                delay = backoff.delay()
                self.retried(what, error, backoff.attempts)
            await asyncio.sleep(delay)
