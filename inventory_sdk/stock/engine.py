"""Stock in one event loop: partitions, batches, loads, and what happens to an operation whose caller went away."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from redis.asyncio import Redis, RedisCluster

from inventory_sdk import context
from inventory_sdk.errors import InvalidOperation, Overloaded
from inventory_sdk.ledger.protocol import Ledger, WritesStock
from inventory_sdk.metrics.events import Happened, Metrics
from inventory_sdk.model import JournalOperation, Layout, split_key
from inventory_sdk.stock.admission import Direct, fields_of, leaving
from inventory_sdk.stock.batch import AWAY, NOT_FOUND, NOT_LOADED, PIN, TOO_LATE, Answer, Batcher, Publish, read_entries
from inventory_sdk.stock.deciding import resolve
from inventory_sdk.stock.givers import Givers
from inventory_sdk.stock.journal import decode
from inventory_sdk.stock.loading import ChangingHands, Loader
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.routed import scripts_on
from inventory_sdk.stock.share import SharingBatcher
from inventory_sdk.stock.upkeep import Upkeep
from inventory_sdk.stock.waits import Waits

log = logging.getLogger("inventory_sdk.stock")

PIN_WAITS: Final = (0.01, 0.05, 0.1, 0.2, 0.4)
"""Seconds between looks at a hold that its decider has pinned: a commit takes milliseconds."""


HANDOVER_WAITS: Final = (0.005, 0.01, 0.02, 0.04, *((0.05,) * 38))
"""Seconds between looks at a SKU that changes hands by itself: milliseconds to Redis, to the database as long as the worker is behind."""

LOOKED_AT: Final = frozenset({NOT_LOADED, PIN, AWAY, NOT_FOUND, TOO_LATE})
"""Answers that may not be the last word."""


@dataclass(frozen=True, slots=True)
class StockSettings:
    """What all processes on one stock share, and how this one talks to Redis. Times in seconds; ``journal_cap`` in entries of one
    partition (0: none), at which takes are refused. ``replicas``: how many must have what is acknowledged at ``replica``;
    ``wait_timeout``: how long it and ``aof`` are waited for."""

    namespace: str = "inventory"
    partitions: int = 1
    partition_by: str = "merchant"
    redis_timeout: float = 2.0
    journal_cap: int = 1_000_000
    results_window: float = 86_400.0
    results_most: int = 20_000_000
    replicas: int = 1
    wait_timeout: float = 5.0
    connections: Mapping[str, int] = field(default_factory=dict)
    """Script calls that a lane may have under way at once, over all partitions; a lane that is not there: one per partition."""
    admission: str = "redis"


class Engine:
    """Everything of the stock room that belongs to one event loop."""

    def __init__(
        self,
        client: Redis | RedisCluster,
        ledger: Ledger,
        settings: StockSettings,
        metrics: Metrics,
        publish: Publish | None,
        opener: Callable[[Engine, Partition, Sequence[str]], Awaitable[None]] | None,
        on_refused: Callable[[int, str], None],
        writes_stock: Sequence[WritesStock] = (),
    ) -> None:
        self.writes_stock = writes_stock
        self.ledger = ledger
        self.settings = settings
        self.layout = Layout(settings.partitions, settings.partition_by)
        self.relaid = 0
        """When partitions were told apart in another way before (Unix milliseconds), 0: never. Calls of that time were spread otherwise."""
        self.metrics = metrics
        self.publish = publish
        self.wire = scripts_on(client, settings.redis_timeout, metrics)
        self.partitions = tuple(Partition(number, settings.namespace, self.wire, str(self.layout)) for number in range(settings.partitions))
        self._batchers: dict[tuple[int, str], Batcher] = {}
        self._shares = {lane: asyncio.Semaphore(most) for lane, most in settings.connections.items()}
        self._on_refused = on_refused
        self._answered: Callable[[str, bool], None] | None = None
        self.kept = {"redis"}
        """Durability levels that are known to be kept here."""
        self.asking = asyncio.Lock()
        self.count: Callable[[Sequence[str]], None] | None = None
        """Hears of the fields of every take, where somebody wants to know what is hot."""
        self.waits = Waits(settings.replicas, settings.wait_timeout, self.in_background)
        self.givers = Givers(publish, self.in_background, metrics) if publish is not None else None
        self._background: set[asyncio.Task[Any]] = set()
        self.loader = Loader(ledger, partial(opener, self) if opener is not None else None)
        self.direct = Direct(ledger, settings.admission, metrics, writes_stock, self.loader)
        self.upkeep = Upkeep(
            self.partitions.__getitem__,
            self._submit_upkeep,
            self.loader.load,
            settings.results_window,
            settings.results_most,
            # Half of the cap: what is applied must never be what fills the journal.
            settings.journal_cap // 2,
            partial(resolve, self),
        )

    def tell_takes(self, answered: Callable[[str, bool], None]) -> None:
        """``answered`` hears of every take from now on: its merchant, and whether it was accepted. It must neither wait nor raise."""
        self._answered = self.direct.answered = answered
        for batcher in self._batchers.values():
            batcher.answered = answered

    def home(self, key: str) -> Partition:
        """The partition that decides on an operation or a reservation."""
        return self.partitions[self.layout.home(key)]

    def place(self, field: str) -> Partition:
        """The partition of a stock field."""
        return self.partitions[self.layout.of(field)]

    @property
    def relaid_lately(self) -> bool:
        """Whether calls of the layout before are still remembered in Redis."""
        return bool(self.relaid) and time.time() * 1000 - self.relaid < self.settings.results_window * 1000

    def batcher(self, partition: Partition, lane: str) -> Batcher:
        """The lane's batcher, made when first used."""
        key = (partition.number, lane)
        batcher = self._batchers.get(key)
        if batcher is None:
            parts = (partition, lane, self.metrics, self.publish, self.settings.journal_cap, self._on_refused, self.waits, self.givers)
            share = self._shares.get(lane)
            batcher = Batcher(*parts) if share is None else SharingBatcher(share, *parts)
            batcher.answered = self._answered
            self._batchers[key] = batcher
        return batcher

    async def send(self, partition: Partition, operation: list[Any]) -> Answer:
        """One operation's answer, from Redis or from the ledger, whoever sells its stock; loaded first where it was not; waits a
        moment for a pinned hold's decider."""
        answer = await self._once(partition, operation, None)
        if answer[0][0] not in LOOKED_AT:
            return answer
        return await self.send_again(partition, operation, answer, None)

    async def _once(
        self, partition: Partition, operation: list[Any], orphaned: Callable[[Answer], None] | None, there: bool = False
    ) -> Answer:
        """Where it is believed to be sold (``there``: it is known that the ledger runs it); the ledger knows when that is wrong, and
        then it is sold in Redis."""
        if there or ((self.direct.busy or operation[8]) and self.direct.expects(operation)):
            if len(operation) > 10 or "p" in operation[9]:
                if self.direct.bring is None:
                    raise _over_several(operation)
                await self.direct.bring(fields_of(operation))
            else:
                found = await self.act(partition, operation, orphaned)
                if found is not None:
                    return found
        batcher = self.batcher(partition, context.lane.get())
        return await (batcher.submit(operation) if orphaned is None else batcher.ask(operation, orphaned))

    async def act(self, partition: Partition, operation: list[Any], orphaned: Callable[[Answer], None] | None) -> Answer | None:
        """``Direct.act``; where SKUs move by themselves, a moment that one is on its way is waited for and not an error."""
        waits = iter(HANDOVER_WAITS if self.direct.auto else ())
        while True:
            try:
                return await self.direct.act(partition, operation, orphaned)
            except ChangingHands:
                pause = next(waits, None)
                if pause is None:
                    raise
            await asyncio.sleep(pause)

    async def send_again(
        self, partition: Partition, operation: list[Any], answer: Answer, orphaned: Callable[[Answer], None] | None
    ) -> Answer:
        """What ``send`` does after an answer that something is not loaded, pinned, or not here."""
        loads = 0
        there = False
        pins = iter(PIN_WAITS)
        changing = iter(HANDOVER_WAITS if self.direct.auto else ())
        while True:
            code = answer[0][0]
            try:
                if code == NOT_LOADED:
                    loads += 1
                    if loads > 5:
                        raise Overloaded("the stock of this operation does not stay loaded; the partition is being recovered", 0.5)
                    await self._load(partition, operation, answer[0][1:])
                elif code == AWAY:
                    loads += 1
                    if loads > 5:
                        raise Overloaded("the stock of this operation keeps changing hands", 0.5)
                    # All that it names, where SKUs go their own ways: Redis has found some of them away, and may sell the others.
                    named = fields_of(operation) if self.direct.auto else []
                    await leaving(self.direct, named or answer[0][1:], split_key(operation[1])[0])
                elif code in (NOT_FOUND, TOO_LATE) and answer[1].position.epoch and loads < 2:
                    loads += 1
                    if not await self._elsewhere(partition, operation):
                        return answer
                    there = self.direct.auto and operation[0] not in ("undo", "keep")
                elif code == PIN:
                    pause = next(pins, None)
                    if pause is None:
                        name = split_key(operation[5])[1]
                        raise Overloaded(f"reservation {name!r} is pinned by a transaction that has not ended", retry_after=1.0)
                    await asyncio.sleep(pause)
                else:
                    return answer
            except ChangingHands:
                pause = next(changing, None)
                if pause is None:
                    raise
                loads -= 1
                await asyncio.sleep(pause)
            answer = await self._once(partition, operation, orphaned, there)

    async def _load(self, partition: Partition, operation: list[Any], fields: Sequence[str]) -> None:
        """Into Redis; or it is noted that the ledger sells all of the operation's stock."""
        merchant = split_key(operation[1])[0]
        direct = await self.loader.load(partition, fields)
        if direct and len(set(direct)) < len(set(fields_of(operation))):
            await self.direct.sells(fields_of(operation), merchant)
        elif direct:
            self.direct.note(direct, merchant, True)

    async def _elsewhere(self, partition: Partition, operation: list[Any]) -> bool:
        """Redis does not know the hold, or the take: whether it is worth to ask again, because the ledger runs it, or because it
        has been brought now."""
        merchant = split_key(operation[1])[0]
        if operation[0] in ("undo", "keep"):
            fields = fields_of(operation)
            return bool(fields) and await self.direct.sells(fields, merchant)
        row = await self.ledger.reservation(operation[5])
        held = row is not None and row.state == "held"
        open_ = [row.lines[at] for at in range(0, len(row.lines), 5) if row.lines[at + 2]] if row is not None and held else []
        if self.direct.auto and not held:
            return False
        if await self.direct.sells(open_, merchant):
            return True
        if not held:
            return False
        # It was handed over by reads_stock, with stock that nobody has asked for since.
        await self.loader.load(partition, open_)
        return True

    async def _submit_upkeep(self, partition: Partition, operation: list[Any]) -> Answer:
        return await self.batcher(partition, "upkeep").submit(operation)

    async def journaled(self, partition: Partition, key: str, epoch: int, sequence: int) -> JournalOperation | None:
        """The operation of this key at a journal position; None once the entry is trimmed."""
        entries = await read_entries(partition, epoch, sequence - 1, sequence, 1)
        if not entries:
            return None
        for operation in decode(partition.number, epoch, sequence, entries[0][1]).operations:
            if operation.key == key:
                return operation
        return None

    def in_background(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A task that outlives its caller; ``close`` waits for it, a failure is logged and counted."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            log.error("%s failed: %s", task.get_name(), error, exc_info=error)
            self.metrics.record(Happened("background_failed", {"task": task.get_name().partition(" of ")[0]}))

    async def close(self) -> None:
        """Drains, then closes the connections: nobody may use them any more, the worker's upkeep neither."""
        await self.drain()
        await self.wire.close()

    async def drain(self) -> None:
        """Waits for batches, loads and undos under way."""
        while self._background:
            await asyncio.wait(set(self._background))
        await self.direct.drain()
        await self.loader.close()
        for batcher in self._batchers.values():
            await batcher.close()
        while self._background:
            await asyncio.wait(set(self._background))


def _over_several(operation: Sequence[Any]) -> InvalidOperation:
    why = "are of several partitions, and the database sells some of them: adopt their merchants, or take them one by one"
    return InvalidOperation("lines", [split_key(name)[1] for name in fields_of(operation)], why)
