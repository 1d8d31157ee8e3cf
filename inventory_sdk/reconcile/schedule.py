"""Comparisons by themselves, in the worker: hourly over what was touched, daily over everything, by one of many at a time."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Final

from inventory_sdk.beside import Ground
from inventory_sdk.errors import DurabilityNotReached, Overloaded
from inventory_sdk.metrics.events import ComparisonsOverdue, DiscrepanciesOpen, Retried
from inventory_sdk.reconcile.model import Cause, Reconcile
from inventory_sdk.reconcile.sinks.sql import register_of
from inventory_sdk.sync.backoff import Backoff, waited

log = logging.getLogger("inventory_sdk.reconcile")

MEMORY: Final = "reconcile"
"""What the ledger remembers when was last compared under; one for all workers."""
LEASE: Final = 30.0
LONGEST: Final = 30.0
"""Seconds between looks at what is due."""
SCOPES: Final = {"whole": "everything", "touched": "what"}
"""What the metrics call them."""

Compare = Callable[[bool], Awaitable[object]]
"""Everything (True), or what was touched since the last run."""


class Schedule:
    """One worker's; which of them runs is decided by a lease in Redis. Two at once, should a lease end early, find the same."""

    def __init__(self, ground: Ground, settings: Reconcile, compare: Compare, catch_up: Callable[[], Awaitable[object]]) -> None:
        self._ground = ground
        self._settings = settings
        self._compare = compare
        self._catch_up = catch_up
        self._register = register_of(ground)
        self._key = f"{ground.namespace}:reconcile:lease"
        self._token = secrets.token_hex(8)
        self._due_at: dict[str, float] = {}

    async def run(self, stopping: asyncio.Event) -> None:
        """Until the worker stops; a comparison under way is given up then, and begun anew by whoever comes next."""
        backoff = Backoff(1.0, 60.0)
        while not stopping.is_set():
            try:
                pause = await self._round(stopping)
                backoff.reset()
            except Exception as error:  # noqa: BLE001 - a server is away, or the ledger is behind: nothing is half done
                pause = backoff.delay()
                self._tell_overdue()
                reason = type(error).__name__
                self._ground.metrics.record(Retried("reconcile", reason))
                level = logging.INFO if isinstance(error, Overloaded | DurabilityNotReached) else logging.WARNING
                log.log(level, "comparison was put off (%s: %s), again in %.0f s", reason, error, pause)
            await waited(stopping, pause)

    async def _due(self) -> tuple[str | None, float]:
        """What is due, or in how many seconds something is. The clocks of the first run begin with the first worker."""
        times = await self._register.remembered(MEMORY)
        now = time.time()
        fresh = {name: now for name in SCOPES if name not in times}
        if fresh:
            await self._register.remember(MEMORY, {**fresh, **times})
            times = {**fresh, **times}
        intervals = {"whole": self._settings.whole_every, "touched": self._settings.every}
        self._due_at = {name: float(times[name]) + every for name, every in intervals.items() if every is not None}
        self._tell_overdue()
        waits = {name: at - now for name, at in self._due_at.items()}
        for name, wait in waits.items():
            if wait <= 0:
                return name, 0.0
        return None, min(LONGEST, *waits.values(), LONGEST)

    def _tell_overdue(self) -> None:
        """As far as is known here: while the ledger is away, what was due goes on being so."""
        if self._due_at:
            now = time.time()
            self._ground.metrics.record(ComparisonsOverdue({SCOPES[name]: max(0.0, now - at) for name, at in self._due_at.items()}))

    async def _tell_open(self) -> None:
        """By every worker: what one alone had told would stand where another has compared since, or a person has corrected."""
        self._ground.metrics.record(DiscrepanciesOpen(dict.fromkeys(map(str, Cause), 0) | await self._register.counted()))

    async def _round(self, stopping: asyncio.Event) -> float:
        await self._catch_up()
        await self._tell_open()
        what, wait = await self._due()
        if what is None:
            return wait
        if not await self._lease("take"):
            return LONGEST / 3
        try:
            what, wait = await self._due()  # who had the lease until now may have done it
            if what is not None:
                await self._leased(what, stopping)
        finally:
            await self._lease("give")
        return wait

    async def _leased(self, what: str, stopping: asyncio.Event) -> None:
        """Compare, for as long as the lease is ours and the worker goes on."""
        began = time.time()
        work = asyncio.ensure_future(self._compare(what == "whole"))
        stop = asyncio.ensure_future(stopping.wait())
        try:
            while not work.done() and not stop.done():
                await asyncio.wait({work, stop}, timeout=LEASE / 3, return_when=asyncio.FIRST_COMPLETED)
                self._tell_overdue()
                if not work.done() and not stop.done() and not await self._lease("keep"):
                    log.warning("another worker has taken the comparison over")
                    return
            if work.done():
                work.result()
                done = {"touched": began} | ({"whole": began} if what == "whole" else {})
                await self._register.remember(MEMORY, await self._register.remembered(MEMORY) | done)
        finally:
            for task in (work, stop):
                task.cancel()
            await asyncio.wait({work, stop})

    async def _lease(self, what: str) -> bool:
        return bool(await self._ground.engine.wire.run("lease", [self._key], [self._token, what, str(int(LEASE * 1000))]))
