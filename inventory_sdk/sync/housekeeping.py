"""What a partition needs once a second: holds expire, overdue pins are decided, result windows turn, the journal is trimmed."""

from __future__ import annotations

import time
from typing import Final

from inventory_sdk.ledger.protocol import DirectAct, ReservationRow
from inventory_sdk.model import Kind, fingerprint, key_of, split_key
from inventory_sdk.stock.parts import call_of
from inventory_sdk.stock.records import PIN_OVERDUE_MS
from inventory_sdk.sync.backoff import waited
from inventory_sdk.sync.parts import Parts, log

PERIOD: Final = 1.0
EXPIRE_LIMIT: Final = 500
STALE_AGE: Final = 24 * 3600.0
STALE_PERIOD: Final = 60.0
STALE_LIMIT: Final = 100


def ending(row: ReservationRow, verdict: str) -> DirectAct:
    """The act that ends a due hold; of a pinned one, as its decider said and its pin keeps what that means."""
    merchant, name = split_key(row.key)
    kind = Kind.EXPIRE
    if row.pinned:
        kind = Kind.RELEASE if verdict == "aborted" else Kind.CONFIRM if row.expires_at == 1 else Kind.RESUME
    mark = fingerprint(kind, row.key, ()) if kind in (Kind.RELEASE, Kind.CONFIRM) else ""
    ttl_ms = row.expires_at if kind == Kind.RESUME else 0
    return DirectAct(kind.value, key_of(merchant, f"{name}\x1f{kind.value}"), mark, (), "", row.key, ttl_ms, "", "", "d")


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
        """One round. Does nothing in Redis while the partition is not open."""
        parts = self._parts
        await self.expire_direct()
        row = await parts.ledger.partition(self._partition)
        if row is None or row.state != "open":
            return
        state = await parts.stock_side.journal_state(self._partition)
        if state.state != "open" or state.epoch != row.epoch:
            return
        # First: it frees memory, and a Redis that is full lets no hold expire.
        await parts.stock_side.trim(self._partition, row.epoch, row.applied)
        await self.expire()
        await parts.stock_side.rotate(self._partition)
        while not parts.stopping.is_set() and await parts.stock_side.restore_older(self._partition, row.epoch, parts.ledger):
            pass  # what a rebuild has left: a lone chunk a second would take hours
        if time.monotonic() >= self._stale_at:
            await self._report_stale(state.now_ms)
            self._stale_at = time.monotonic() + STALE_PERIOD

    async def expire_direct(self) -> int:
        """Holds that the ledger runs, by its own clock: expire what is due, end overdue pins as their decider says."""
        parts, ended = self._parts, 0
        for row in await parts.ledger.due_holds(self._partition, EXPIRE_LIMIT, PIN_OVERDUE_MS):
            verdict = await parts.ledger.decide(row.key, "aborted") if row.pinned else ""
            answer = await parts.ledger.act(self._partition, ending(row, verdict), parts.writes_stock)
            if answer.code == "done":
                ended += 1
                if not row.pinned:
                    merchant, reservation = split_key(row.key)
                    parts.tell("expired", {"merchant": merchant, "reservation": reservation})
        return ended

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
