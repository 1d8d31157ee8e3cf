"""Stock fields come into Redis from ledger rows, only if absent, while the row is held: coalesced, bounded, and forgetful of nonsense."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from redis.exceptions import OutOfMemoryError

from inventory_sdk.errors import JournalFull, StockFrozen, UnknownStock
from inventory_sdk.ledger.protocol import EpochClosed, Ledger
from inventory_sdk.model import key_of, split_key
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.records import write_reservation
from inventory_sdk.stock.wire import NotExecuted, ReplyLost

AT_ONCE: Final = 8
PER_LOAD: Final = 256
UNKNOWN_FOR: Final = 1.0
MOST_UNKNOWN: Final = 10_000

LOAD_KEYS: Final = ("meta", "available", "reserved", "reservations", "expiry", "results:0", "results:1")


class ChangingHands(StockFrozen):
    """It is on its way from the database to Redis or back; nobody sells it for the moment that this takes."""


Opener = Callable[[Partition, Sequence[str]], Awaitable[None]]
"""Asks ``reads_stock`` for opening balances of these fields and enters them into the ledger."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load could not bring: fields that the ledger does not have, and those that it sells itself."""

    missing: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()


class Loader:
    """Loads of one event loop."""

    def __init__(self, ledger: Ledger, opener: Opener | None) -> None:
        self._ledger = ledger
        self._opener = opener
        self._under_way: dict[str, asyncio.Task[Loaded]] = {}
        self._unknown: dict[str, float] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)

    @property
    def has_unknown(self) -> bool:
        """Whether ``check_known`` could find anything: almost never."""
        return bool(self._unknown)

    def check_known(self, fields: Sequence[str]) -> None:
        """``UnknownStock`` for a field that was not in the ledger a moment ago."""
        now = time.monotonic()
        for field in fields:
            if self._unknown.get(field, 0.0) > now:
                raise UnknownStock(*split_key(field))

    async def load(self, partition: Partition, fields: Sequence[str]) -> list[str]:
        """Bring these fields into Redis; those that the ledger sells itself are not brought but answered. ``UnknownStock`` names
        the first that the ledger does not have, ``StockFrozen`` one that is on its way to Redis.

        Callers that want the same field share one load; a cancelled caller does not end it for the others.
        """
        self.check_known(fields)
        new = [field for field in fields if field not in self._under_way]
        for start in range(0, len(new), PER_LOAD):
            part = new[start : start + PER_LOAD]
            task = asyncio.get_running_loop().create_task(self._load(partition, part), name="inventory load")
            for field in part:
                self._under_way[field] = task
            task.add_done_callback(partial(self._forget, tuple(part)))
        missing: set[str] = set()
        direct: set[str] = set()
        for task in {self._under_way[field] for field in fields if field in self._under_way}:
            loaded = await asyncio.shield(task)
            missing.update(loaded.missing)
            direct.update(loaded.direct)
        for field in fields:
            if field in missing:
                raise UnknownStock(*split_key(field))
        return [field for field in fields if field in direct]

    async def opened(self, partition: Partition, fields: Sequence[str]) -> None:
        """Before anything enters: what the service's tables say of fields that the ledger has no row for. An operation that made
        the row would hide their opening balance for good."""
        if self._opener is not None:
            known = {key_of(row.merchant, row.sku) for row in await self._ledger.stock(fields)}
            missing = [field for field in fields if field not in known]
            if missing:
                await self._opener(partition, missing)

    def arrived(self, fields: Sequence[str]) -> None:
        """The ledger has rows for these now: a seller must not hear for another second that they are unknown."""
        for field in fields:
            self._unknown.pop(field, None)

    async def close(self) -> None:
        """Waits for loads under way."""
        tasks = set(self._under_way.values())
        if tasks:
            await asyncio.wait(tasks)

    def _forget(self, part: Sequence[str], task: asyncio.Task[Loaded]) -> None:
        for field in part:
            if self._under_way.get(field) is task:
                del self._under_way[field]
        if not task.cancelled():
            task.exception()  # every waiter has it; with no waiter left nobody needs it

    async def _load(self, partition: Partition, fields: list[str]) -> Loaded:
        async with self._slots:
            loaded = await self._insist(partition, fields)
            if loaded.missing and self._opener is not None:
                await self._opener(partition, loaded.missing)
                again = await self._insist(partition, list(loaded.missing))
                loaded = Loaded(again.missing, loaded.direct + again.direct)
            self.unknown(loaded.missing)
            return loaded

    def unknown(self, fields: Sequence[str]) -> None:
        """The ledger does not have these: for a second nobody asks again."""
        now = time.monotonic()
        if len(self._unknown) + len(fields) > MOST_UNKNOWN:
            self._unknown = {field: until for field, until in self._unknown.items() if until > now}
            if len(self._unknown) > MOST_UNKNOWN:
                self._unknown.clear()
        for field in fields:
            self._unknown[field] = now + UNKNOWN_FOR

    async def _insist(self, partition: Partition, fields: list[str]) -> Loaded:
        """``_copy``, once more where its answer was lost."""
        try:
            return await self._copy(partition, fields)
        except NotExecuted:
            return await self._copy(partition, fields)

    async def _copy(self, partition: Partition, fields: list[str]) -> Loaded:
        """Ledger rows → Redis, with the live holds that stand on them; the rows are held until the script has answered (or can't
        run any more)."""
        await partition.known()
        epoch = partition.epoch
        try:
            async with self._ledger.balances(partition.number, int(epoch), fields) as rows:
                flat: list[Any] = []
                for field, row in rows.items():
                    if row.admission == "arriving":
                        merchant, sku = split_key(field)
                        raise ChangingHands(f"sku {sku!r} of merchant {merchant!r} is on its way to Redis", retry_after=0.1)
                    if row.admission == "redis":
                        flat += (field, row.available, row.reserved)
                if flat:
                    held = [field for field in flat[::3] if rows[field].reserved]
                    holds = await self._holds(partition, held) if held else []
                    not_after = partition.not_after()
                    sent = time.monotonic()
                    keys = [partition.key(name) for name in LOAD_KEYS]
                    try:
                        loaded = await partition.wire.run("load", keys, [epoch, str(not_after), json.dumps(flat), json.dumps(holds)])
                    except OutOfMemoryError as error:
                        raise JournalFull(f"Redis is out of memory: {error}", retry_after=1.0) from error
                    except ReplyLost as error:
                        await partition.outlive(sent)
                        raise NotExecuted(str(error)) from error  # what it wrote, if it ran, is what the ledger says
                    if not loaded:
                        partition.forget()
                return Loaded(
                    tuple(field for field in fields if field not in rows),
                    tuple(field for field, row in rows.items() if row.admission == "database"),
                )
        except EpochClosed as error:
            partition.forget()
            raise StockFrozen(str(error), retry_after=0.5) from error

    async def _holds(self, partition: Partition, fields: Sequence[str]) -> list[Any]:
        """[key, record, due ms, …] of live holds on these fields: those that ``reads_stock`` handed over. Holds of the SDK's own
        have come to Redis before, or with a rebuild, and there the script leaves them as they are."""
        flat: list[Any] = []
        for row in await self._ledger.live_holds(partition.number, fields):
            flat += (row.key, write_reservation(row), row.expires_at)
        return flat
