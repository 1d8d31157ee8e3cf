"""Admission that follows a link: merchants on the candidate are sold by Redis, the others by the database.

Each step is a drain (``stock.adopt``, ``stock.withdraw``), one merchant after another; nothing flips. Every worker does it; steps are safe
to repeat, so several of them are only wasteful.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, Protocol

from inventory_sdk.errors import InventoryError
from inventory_sdk.gray.decision import CANDIDATE, Decider
from inventory_sdk.ledger.protocol import Ledger
from inventory_sdk.metrics import Happened, Metrics, Retried

log = logging.getLogger("inventory_sdk.gray")

PERIOD: Final = 5.0
"""Seconds between two rounds; a change of rules begins one at once."""

Merchants = Callable[[], Awaitable[Iterable[str]]]


class Hands(Protocol):
    """What moves a merchant's stock."""

    async def adopt(self, merchant: str) -> int: ...
    async def withdraw(self, merchant: str) -> int: ...


class AdmissionJob:
    """One link's. While no rules of it are known nothing is moved: a link that nobody has set says nothing about who sells."""

    def __init__(
        self,
        link: str,
        merchants: Merchants,
        known: Mapping[str, Decider],
        hands: Hands,
        ledger: Ledger,
        metrics: Metrics,
        changed: asyncio.Event,
        period: float = PERIOD,
    ) -> None:
        self._link = link
        self._merchants = merchants
        self._known = known
        self._hands = hands
        self._ledger = ledger
        self._metrics = metrics
        self._changed = changed
        self._period = period

    async def run(self, stopping: asyncio.Event) -> None:
        """Until the worker stops; a step that has begun is finished."""
        stopped = asyncio.ensure_future(stopping.wait())
        try:
            while not stopping.is_set():
                self._changed.clear()
                await self.round(stopping)
                changed = asyncio.ensure_future(self._changed.wait())
                try:
                    await asyncio.wait({stopped, changed}, timeout=self._period, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
        finally:
            stopped.cancel()

    async def round(self, stopping: asyncio.Event) -> int:
        """Look at every merchant once; how many were handed over."""
        decider = self._known.get(self._link)
        if decider is None:
            return 0
        moved = 0
        try:
            merchants = list(await self._merchants())
        except Exception as error:
            self._metrics.record(Retried("gray_admission", type(error).__name__))
            log.exception("the merchants of gray link %s can't be listed", self._link)
            return 0
        for merchant in merchants:
            if stopping.is_set():
                break
            wanted = "redis" if decider(merchant).variant == CANDIDATE else "database"
            try:
                if await self._is_there(merchant, wanted):
                    continue
                await (self._hands.adopt(merchant) if wanted == "redis" else self._hands.withdraw(merchant))
            except InventoryError as error:
                # Held by another merchant's reservation, frozen, behind: the next round asks again.
                self._metrics.record(Retried("gray_admission", type(error).__name__))
                log.warning("merchant %s of gray link %s stays where it is for now: %s", merchant, self._link, error)
                continue
            moved += 1
            self._metrics.record(Happened("gray_admission", {"reason": wanted}))
            log.info("merchant %s is sold by %s now, as gray link %s says", merchant, wanted, self._link)
        return moved

    async def _is_there(self, merchant: str, wanted: str) -> bool:
        places = await self._ledger.places([], merchant)
        return places[""] == wanted and all(row.admission == wanted for row in await self._ledger.admission(merchant))
