"""What a partition needs once a second: holds expire, overdue pins are decided, result windows turn, the journal is trimmed."""

from __future__ import annotations

import time
from typing import Final

from inventory_sdk.model import split_key
from inventory_sdk.stock.parts import call_of
from inventory_sdk.sync.backoff import waited
from inventory_sdk.sync.parts import Parts, log

PERIOD: Final = 1.0
EXPIRE_LIMIT: Final = 500
STALE_AGE: Final = 24 * 3600.0
STALE_PERIOD: Final = 60.0
STALE_LIMIT: Final = 100


class Housekeeping:
    """One partition's; several workers may do it at the same time."""

    def __init__(self, parts: Parts, partition: int, *, period: float = PERIOD, stale_age: float = STALE_AGE) -> None:
        self._parts = parts
        self._partition = partition
        self._period = period
        self._stale_age = stale_age
        self._stale_at = 0.0

    async def run(self) -> None:
        """Until the worker stops."""
        parts = self._parts
        backoff = parts.backoff()
        while not parts.stopping.is_set():
            pause = self._period
            try:
                await self.tidy()
                backoff.reset()
            except Exception as error:  # noqa: BLE001 - a server is away, or the partition is being recovered; nothing is half done
                pause = max(self._period, backoff.delay())
                parts.retried("housekeeping", error, backoff.attempts)
            await waited(parts.stopping, pause)

    async def tidy(self) -> None:
        """One round. Does nothing while the partition is not open."""
        parts = self._parts
        row = await parts.ledger.partition(self._partition)
        if row is None or row.state != "open":
            return
        state = await parts.stock_side.journal_state(self._partition)
        if state.state != "open" or state.epoch != row.epoch:
            return
        await self.expire()
        await parts.stock_side.rotate(self._partition)
        await parts.stock_side.trim(self._partition, row.epoch, row.applied)
        if time.monotonic() >= self._stale_at:
            await self._report_stale(state.now_ms)
            self._stale_at = time.monotonic() + STALE_PERIOD

    async def expire(self) -> int:
        """Expire all that is due; how many holds ended. A pinned one is ended as its decider says, which is ``aborted`` from
        now on where it has said nothing yet."""
        parts = self._parts
        ended = 0
        asked: set[str] = set()
        while keys := [key for key in await parts.stock_side.due_expiries(self._partition, EXPIRE_LIMIT) if key not in asked]:
            asked.update(keys)
            result = await parts.stock_side.expire(self._partition, keys)
            for key in result.keys:
                merchant, reservation = split_key(key)
                parts.tell("expired", {"merchant": merchant, "reservation": reservation})
            for key in result.pinned:
                if call_of(key) is not None:
                    if not await parts.stock_side.resolve_part(self._partition, key):
                        parts.happened("part_waits", partition=self._partition)
                    continue
                verdict = await parts.ledger.decide(key, "aborted")
                await parts.stock_side.settle_pin(self._partition, key, verdict)
            ended += len(result.keys) + len(result.pinned)
        return ended

    async def _report_stale(self, now_ms: int) -> None:
        parts = self._parts
        before = now_ms - int(self._stale_age * 1000)
        while rows := await parts.ledger.take_stale(self._partition, before, STALE_LIMIT):
            for row in rows:
                if call_of(row.key) is not None:
                    continue  # its call is reported at home
                merchant, reservation = split_key(row.key)
                log.warning("reservation %r of merchant %r is held for more than %.0f s", reservation, merchant, self._stale_age)
                parts.happened("stale", partition=self._partition)
                parts.tell("stale", {"merchant": merchant, "reservation": reservation, "order": row.order, "lines": row.lines})
