"""``admission="auto"``: a SKU is sold by the database until it is hot, then by Redis, and by the database again once it is cool.

A worker moves them, one of many at a time; a crash at any point is followed by the next look. What was moved is noted in ``promoted``
before it moves, so that it finds its way back; what a person has adopted is not noted, and stays until a person withdraws it.

Two things join SKUs, which then move together: a live reservation that holds several, and a call that takes one from each side. The
second is brought over by the process that has the call, at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from typing import Final
from uuid import uuid4

from redis.exceptions import RedisError

from inventory_sdk.beside import Ground
from inventory_sdk.errors import DurabilityNotReached, InvalidOperation, InventoryError
from inventory_sdk.hotspot.detector import STOCK, Detector
from inventory_sdk.metrics import Happened, PromotionsWaiting, Retried
from inventory_sdk.model import Position, split_key
from inventory_sdk.stock import handover

SETTLED: Final = 30.0
"""Seconds that the ledger has to apply what Redis sold."""
MOVER_FOR: Final = 3000
"""Milliseconds after which a mover that gives no sign is followed by another. Two at once harm nothing: every step is fenced."""
AGAIN: Final = 3
"""Tries of an adoption while new reservations join other SKUs."""
MOST_AT_ONCE: Final = 64
"""SKUs of one look that are moved back."""


class Promotion:
    """See above, in one event loop."""

    def __init__(self, ground: Ground, detector: Detector) -> None:
        self._ground = ground
        self._detector = detector
        self._name = uuid4().hex
        self._bringing: dict[str, asyncio.Task[None]] = {}
        self._wanted = asyncio.Event()
        self._not_before: dict[str, float] = {}
        self._told: tuple[int, int] | None = None
        detector.heated.append(lambda watch, _: self._wanted.set() if watch.stream == STOCK else None)

    def known(self, field: str) -> bool:
        """Whether it was moved to Redis, as far as this process knows."""
        return field in self._detector.promoted

    # The worker's part ----------------------------------------------------------------------------------------------------------------

    async def run(self, stopping: asyncio.Event) -> None:
        """Move what is hot and what is cool again, until the worker stops."""
        stop = asyncio.create_task(stopping.wait())
        try:
            while not stopping.is_set():
                looked = asyncio.create_task(self._detector.looked.wait())
                wanted = asyncio.create_task(self._wanted.wait())
                try:
                    await asyncio.wait((stop, looked, wanted), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in (looked, wanted):
                        task.cancel()
                self._wanted.clear()
                if not stopping.is_set():
                    await self.move()
        finally:
            stop.cancel()
            self._tell_waiting(0, 0)

    async def move(self) -> None:
        """What there is to move now, if no other worker is at it. What fails is counted, and tried at the next look."""
        hot = self._hot()
        there = self._detector.promoted
        stayed = time.time_ns() // 1_000_000 - int(self._detector.detection.stay * 1000)
        coming = hot.difference(there)
        cool = {field for field, since in there.items() if field not in hot and since <= stayed}
        if not coming and not cool:
            self._tell_waiting(0, 0)
            return
        stays = len(coming)
        try:
            if not await self._may_move():
                self._tell_waiting(0, 0)  # that is the other's to tell
                return
            if coming:
                await self.promote(sorted(coming))
            stays = 0
            now = time.monotonic()
            self._not_before = {field: at for field, at in self._not_before.items() if field in cool}
            due = [field for field in sorted(cool) if self._not_before.get(field, now) <= now]
            for field in due[:MOST_AT_ONCE]:
                self._not_before[field] = now + self._detector.detection.stay / 4
                if await self._may_move() and await self.demote([field]):
                    self._not_before.pop(field, None)
        except (InventoryError, RedisError, OSError) as error:
            self._ground.metrics.record(Retried("promotion", type(error).__name__))
        self._tell_waiting(stays, len(cool.intersection(self._detector.promoted)))

    def _tell_waiting(self, to_redis: int, to_database: int) -> None:
        """Where it has changed: a look is made five times a second."""
        if (to_redis, to_database) != self._told:
            self._told = to_redis, to_database
            self._ground.metrics.record(PromotionsWaiting(to_redis, to_database))

    async def promote(self, fields: Sequence[str]) -> int:
        """Redis sells these, and what live reservations join with them, from now on; how many went."""
        went = 0
        for number, mine in self._by_partition(fields).items():
            for last in range(AGAIN):
                joined = await self._ground.ledger.joined(number, mine)
                try:
                    went += await self._adopt(number, joined)
                    break
                except (InvalidOperation, handover.Overtaken):
                    # A reservation has joined more, or another process brings some of these too.
                    if last == AGAIN - 1:
                        raise
        return went

    async def demote(self, fields: Sequence[str]) -> int:
        """The database sells these, and what live reservations join with them, from now on; how many went. 0 where one of those is hot,
        or was adopted by a person: then they stay together until the reservation has ended."""
        went = 0
        for number, mine in self._by_partition(fields).items():
            joined = await self._ground.ledger.joined(number, mine)
            promoted = await self._promoted()
            if self._hot().intersection(joined) or not promoted.issuperset(joined):
                continue
            engine = self._ground.engine
            try:
                went += await handover.withdraw(engine, engine.partitions[number], split_key(joined[0])[0], self._settled, joined)
            except (handover.Overtaken, InvalidOperation, DurabilityNotReached) as error:
                # Somebody moves it too, a reservation has joined it with what stays, or no worker applies: Redis sells on.
                self._ground.metrics.record(Retried("demotion", type(error).__name__))
                continue
            board = self._detector.board
            await board.client.hdel(board.key("promoted"), *joined)
            self._detector.promoted = {field: at for field, at in self._detector.promoted.items() if field not in set(joined)}
            self._ground.metrics.record(Happened("demoted"))
        return went

    # Everyone's part --------------------------------------------------------------------------------------------------------------------

    async def bring(self, fields: Sequence[str]) -> None:
        """A call has these together with others that are in Redis. Calls that want the same share one adoption; one that goes away does
        not end it for the others."""
        loop = asyncio.get_running_loop()
        new = [field for field in fields if field not in self._bringing]
        if new:
            task = loop.create_task(self._bring(new), name="inventory bring")
            for field in new:
                self._bringing[field] = task
        for task in {self._bringing[field] for field in fields if field in self._bringing}:
            await asyncio.shield(task)

    async def _bring(self, fields: Sequence[str]) -> None:
        try:
            await self.promote(fields)
        finally:
            for field in fields:
                self._bringing.pop(field, None)

    async def _adopt(self, number: int, fields: Sequence[str]) -> int:
        """Those that the database sells; what a person has adopted is not noted as ours."""
        places = await self._ground.ledger.places(fields)
        coming = [field for field in fields if places.get(field) in ("database", "arriving")]
        engine, board = self._ground.engine, self._detector.board
        if not coming:
            engine.direct.note([field for field in fields if field in places], None, False)
            return 0
        since = dict.fromkeys(coming, time.time_ns() // 1_000_000)
        await board.client.hset(board.key("promoted"), mapping=since)
        went = await handover.adopt(engine, engine.partitions[number], split_key(coming[0])[0], coming)
        self._detector.promoted = {**self._detector.promoted, **since}
        self._ground.metrics.record(Happened("promoted"))
        return went

    async def _settled(self, position: Position) -> None:
        await self._ground.watermark.reached(position, SETTLED)

    async def _promoted(self) -> set[str]:
        board = self._detector.board
        return {field.decode() for field in await board.client.hkeys(board.key("promoted"))}

    async def _may_move(self) -> bool:
        """Whether this is the worker that moves."""
        board = self._detector.board
        key = board.key("mover")
        if await board.client.set(key, self._name, nx=True, px=MOVER_FOR):
            return True
        if await board.client.get(key) != self._name.encode():
            return False
        await board.client.pexpire(key, MOVER_FOR)
        return True

    def _hot(self) -> set[str]:
        return {key for watch in self._detector.watches.values() if watch.stream == STOCK for key in watch.hot}

    def _by_partition(self, fields: Collection[str]) -> dict[int, list[str]]:
        engine = self._ground.engine
        found: dict[int, list[str]] = {}
        for field in fields:
            found.setdefault(engine.layout.of(field), []).append(field)
        return found
