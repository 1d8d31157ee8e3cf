"""Stock that the ledger sells itself: where a process believes it is sold, and the same acts there as in Redis.

What a process remembers is a hint that saves a round trip, brief and bounded. A wrong one is corrected by who is asked: the ledger's
update misses stock that went to Redis, and Redis answers that a field is not there, or marked as leaving.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

from inventory_sdk import context
from inventory_sdk.errors import InvalidOperation, InventoryError, StockFrozen, UnknownStock
from inventory_sdk.ledger.protocol import DirectAct, DirectAnswer, EpochClosed, Ledger, WritesStock
from inventory_sdk.metrics.events import BatchSent, Metrics
from inventory_sdk.model import Position, split_key
from inventory_sdk.stock.batch import (
    CLOSED,
    CONFLICT,
    DONE_LINES,
    NOT_DUE,
    NOT_FOUND,
    NOT_OPEN,
    PIN,
    REPLAY,
    SHORT,
    TAKES,
    TOO_LATE,
    Answer,
    Answered,
)
from inventory_sdk.stock.loading import ChangingHands, Loader
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.records import RS, write_result

ADMISSIONS: Final = ("redis", "database", "auto")
REMEMBERED_FOR: Final = 2.0
MOST_REMEMBERED: Final = 10_000
AT_ONCE: Final = 6
"""Direct acts under way in one event loop; a pool of SQLAlchemy has 15 connections unless it was told otherwise."""
ELSEWHERE_BEFORE: Final = "0-0"
"""The position of what was done before its partition changed (``inventory-sdk repartition``): it is remembered, and was not done here."""
SOON: Final = 0.1
"""Seconds after which stock that changes hands may be asked for again."""

_CODES: Final = {
    "conflict": CONFLICT,
    "short": SHORT,
    "closed": CLOSED,
    "not_found": NOT_FOUND,
    "not_open": NOT_OPEN,
    "pinned": PIN,
    "too_late": TOO_LATE,
    "not_due": NOT_DUE,
}


def fields_of(operation: Sequence[Any]) -> list[str]:
    """The stock fields that an operation names itself."""
    named = operation[3][::2]
    return [operation[9]] if operation[0] == "keep" and operation[9] else list(named)


class Direct:
    """Acts on stock that the ledger sells, in one event loop. ``default``: who sells the stock of merchants nobody heard of."""

    def __init__(self, ledger: Ledger, default: str, metrics: Metrics, writes: Sequence[WritesStock], loader: Loader) -> None:
        self._ledger = ledger
        self._default = default != "redis"
        self.auto = default == "auto"
        """Whether SKUs of one merchant are sold on both sides, and what one knows of one says nothing of another."""
        self.bring: Callable[[Sequence[str]], Awaitable[None]] | None = None
        """Gives these fields to Redis, so that one call can have them together with others that are there; None: nobody does."""
        self.known: Callable[[str], bool] = _unheard
        """Whether a field is known to be in Redis, where nobody has said anything of it lately."""
        self._metrics = metrics
        self._writes = writes
        self._loader = loader
        self._seen: dict[str, tuple[bool, float]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._turns = asyncio.Semaphore(AT_ONCE)
        self.busy = self._default
        """Whether ``expects`` could say yes: what a call asks first, because it is almost never so."""
        self.answered: Callable[[str, bool], None] | None = None

    # Where a process believes it is -------------------------------------------------------------------------------------------------

    def expects(self, operation: Sequence[Any]) -> bool:
        """Whether the ledger is to be asked first."""
        if operation[0] == "credit":
            return False  # it is what the ledger owes to Redis
        if operation[8].startswith("0-") and operation[8] != ELSEWHERE_BEFORE and operation[0] in ("undo", "keep"):
            return True  # it was taken there
        fields = fields_of(operation)
        if self.auto and not fields:
            # What closes a hold names no stock. Where it was not taken here lately, Redis is asked, which knows its holds.
            direct, until = self._seen.get(operation[5], (False, 0.0))
            return direct and until > time.monotonic()
        return self.expects_any(fields, split_key(operation[1])[0])

    def expects_any(self, fields: Iterable[str], merchant: str) -> bool:
        """The same for fields, or for a merchant where there are none."""
        now = time.monotonic()
        for name in fields if self.auto else (*fields, merchant):
            direct, until = self._seen.get(name, (False, 0.0))
            if until > now:
                return direct
            if self.known(name):
                return False
        return self._default and bool(not self.auto or fields)

    def note(self, fields: Iterable[str], merchant: str | None, direct: bool) -> None:
        """Somebody who must know has said so; of the merchant as a whole where it is named."""
        now = time.monotonic()
        if len(self._seen) > MOST_REMEMBERED:
            self._seen = {name: seen for name, seen in self._seen.items() if seen[1] > now}
            if len(self._seen) > MOST_REMEMBERED:
                self._seen.clear()
        for name in (*fields, *(() if merchant is None or self.auto else (merchant,))):
            self._seen[name] = (direct, now + REMEMBERED_FOR)
        self.busy = self.busy or direct

    async def sells(self, fields: Sequence[str], merchant: str) -> bool:
        """Ask the ledger: whether it sells all of these, or what is new at the merchant where there are none. ``StockFrozen`` for
        what is on its way to Redis, ``InvalidOperation`` where Redis sells the others."""
        places = await self._ledger.places(fields, merchant)
        there = {places[name] for name in fields if name in places} if fields else {places[""]}
        if "arriving" in there:
            raise _changing(fields)
        if there == {"database", "redis"} and self.bring is not None:
            await self.bring([name for name in fields if places.get(name) == "database"])
            there = {"redis"}
        if there == {"database", "redis"}:
            raise _mixed([name for name in fields if places.get(name) == "redis"])
        self.note(fields, merchant, there == {"database"})
        return there == {"database"}

    # Acts ---------------------------------------------------------------------------------------------------------------------------

    async def act(self, partition: Partition, operation: list[Any], orphaned: Callable[[Answer], None] | None = None) -> Answer | None:
        """The answer as the batch script would give it; None when Redis sells this stock.

        It is done even if its caller goes away meanwhile; ``orphaned`` gets the answer then."""
        task = asyncio.get_running_loop().create_task(self._in_turn(partition, operation), name="inventory direct act")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if orphaned is not None:
                task.add_done_callback(lambda done: _hand_over(done, orphaned))
            raise

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # its caller has it; with no caller left nobody needs it

    async def drain(self) -> None:
        """Waits for acts under way."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _in_turn(self, partition: Partition, operation: list[Any]) -> Answer | None:
        # All wait for one row. With all of the pool's connections waiting there, nobody could move the stock away from it.
        async with self._turns:
            return await self._act(partition, operation)

    async def _act(self, partition: Partition, operation: list[Any]) -> Answer | None:
        started = time.perf_counter()
        kind, key, mark, lines, order, reference, ttl_ms, extra, at, flag = operation
        asked = DirectAct(kind, key, mark, tuple(lines), order, reference, ttl_ms, extra, at, "" if kind == "keep" else flag)
        merchant = split_key(key)[0]
        fields = fields_of(operation)
        try:
            found = await self._ledger.act(partition.number, asked, self._writes)
            if found.code == "unknown" and await self._opened(partition, found.details):
                found = await self._ledger.act(partition.number, asked, self._writes)
        except EpochClosed as error:
            raise StockFrozen(str(error), retry_after=0.5) from error
        if found.code == "elsewhere":
            self.note(fields, merchant, False)
            return None
        if found.code == "arriving":
            raise _changing(found.details)
        if found.code == "mixed" and self.bring is not None:
            await self.bring([name for name in fields if name not in found.details])
            return None
        if found.code == "mixed":
            raise _mixed(found.details)
        if found.code == "unknown":
            self._loader.unknown(found.details)
            raise UnknownStock(*split_key(found.details[0]))
        self.note([*fields, key] if self.auto and kind == "reserve" else fields, merchant, True)
        if self.answered is not None and kind in TAKES and found.code != "pinned":
            self.answered(merchant, found.code in ("done", "replay"))
        self._tell(partition, kind, found.code, time.perf_counter() - started)
        position = found.position or Position(partition.number, 0, 0)
        return _answer(found), Answered(position, None)

    async def _opened(self, partition: Partition, missing: Sequence[str]) -> bool:
        await self._loader.opened(partition, missing)
        places = await self._ledger.places(missing)
        self._loader.arrived(list(places))
        return bool(places)

    def _tell(self, partition: Partition, kind: str, code: str, seconds: float) -> None:
        accepted = {kind: 1} if code == "done" else {}
        refused = {} if code in ("done", "replay") else {"insufficient" if code == "short" else code: 1}
        self._metrics.record(BatchSent(partition.number, context.lane.get(), 1, accepted, refused, int(code == "replay"), seconds))


def _unheard(field: str) -> bool:
    return False


def _hand_over(task: asyncio.Task[Answer | None], orphaned: Callable[[Answer], None]) -> None:
    if not task.cancelled() and task.exception() is None and (answer := task.result()) is not None:
        orphaned(answer)


def _answer(found: DirectAnswer) -> list[Any]:
    if found.code == "done":
        return [DONE_LINES, list(found.remaining), list(found.lines), found.order]
    if found.code == "replay":
        if found.row is not None:
            return [REPLAY, write_result(found.row)]
        hold = found.hold
        if hold is None:
            raise InventoryError("the ledger answered a replay of nothing")
        # A hold that reads_stock handed over has no first receipt; it answers for itself.
        return [REPLAY, RS.join((hold.fingerprint, f"{hold.position.epoch}-{hold.position.sequence}", "", "", hold.order))]
    return [_CODES[found.code], *found.details]


def _changing(fields: Sequence[str]) -> ChangingHands:
    merchant, sku = split_key(fields[0]) if fields else ("", "")
    return ChangingHands(f"sku {sku!r} of merchant {merchant!r} is changing hands between Redis and the database", retry_after=SOON)


def _mixed(fields: Sequence[str]) -> InvalidOperation:
    merchant, sku = split_key(fields[0])
    why = f"is sold by Redis (sku {sku!r}) and other lines of this call by the database: take them in calls of their own"
    return InvalidOperation("lines", merchant, why)


async def leaving(direct: Direct, fields: Sequence[str], merchant: str) -> None:
    """After Redis said that these fields are leaving: returns once the ledger sells them, else ``StockFrozen``."""
    if not await direct.sells(fields, merchant):
        raise _changing(fields)
