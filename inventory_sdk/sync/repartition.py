"""Changing ``partitions`` or ``partition_by`` while nobody sells: freeze, move the ledger's rows, rebuild Redis from them.

    begin → freeze every partition of both layouts, one epoch higher → the ledger's transaction → rebuild → remove what is left over

The ledger's transaction is the turn: before it nothing of the new layout exists, after it nothing of the old one counts. Whoever is
interrupted runs the command again: before the turn it begins anew, behind it goes on. Until the end no process of either layout
sells: the settings name both, so none starts, and one that was running finds its partitions frozen, then laid out in another way.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from inventory_sdk.errors import InventoryError
from inventory_sdk.ledger.protocol import EpochClosed
from inventory_sdk.ledger.repartition import BEFORE, UNFINISHED, Counts, Moved, NotReady
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.metrics.nothing import NoMetrics
from inventory_sdk.model import Layout
from inventory_sdk.stock.engine import Engine, StockSettings
from inventory_sdk.sync.queues.protocol import Queue
from inventory_sdk.sync.recovery import rebuild

Step = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would do. ``turned``: the ledger's rows have moved in an earlier run. ``nothing``: it is like that already.
    ``obstacles``: what must end first."""

    old: Moved
    new: Layout
    turned: bool
    nothing: bool
    obstacles: tuple[str, ...]


async def _silent(step: str) -> None: ...


def engine_for(client: Any, ledger: SqlLedger, namespace: str, old: Moved, new: Layout, timeout: float = 2.0) -> Engine:
    """An engine that reaches the partitions of both layouts, and opens them in the new one."""
    most = max(old.layout.partitions, old.before, new.partitions)
    settings = StockSettings(namespace=namespace, partitions=most, partition_by=new.by, redis_timeout=timeout)
    engine = Engine(client, ledger, settings, NoMetrics(), None, None, lambda *_: None)
    for view in engine.partitions:
        view.layout = str(new)
    return engine


class Repartition:
    """One run of the command. ``engine``: see ``engine_for``; ``step`` hears of each step before it is taken."""

    def __init__(self, engine: Engine, ledger: SqlLedger, queue: Queue, new: Layout, step: Step = _silent) -> None:
        self._engine = engine
        self._ledger = ledger
        self._queue = queue
        self._new = new
        self._step = step

    async def plan(self) -> Plan:
        """Look, and change nothing. ``InventoryError`` where there is no stock yet."""
        old = await self._ledger.layout()
        if old is None:
            raise InventoryError("this ledger has no stock yet: start with the partitions and partition_by that you want")
        turned = bool(old.before)
        nothing = old.layout == self._new and not turned and not old.begun
        obstacles: list[str] = []
        if turned and old.layout != self._new:
            obstacles.append(f"a change to {old.layout} has not ended: finish that one first")
        elif not turned and not nothing:
            for number in range(old.layout.partitions):
                obstacles += await self._unready(number)
            obstacles += await self._ledger.unready()
        return Plan(old, self._new, turned, nothing, tuple(obstacles))

    async def _unready(self, number: int) -> list[str]:
        if await self._engine.upkeep.worker_seen(number) is not None:
            return [f"a worker of partition {number} is alive: stop all workers and callers, and wait ten seconds"]
        if behind := await self._behind(number):
            return [f"partition {number}: {behind} journal entries are not applied: let a worker run until they are, then stop it"]
        return []

    async def _behind(self, number: int) -> int:
        """Journal entries that the ledger has not applied, of any epoch that is not over; at most a thousand are counted in each."""
        found = 0
        for row in await self._ledger.epochs(number):
            found += len(await self._engine.upkeep.read_journal(number, row.epoch, row.applied, None, 1000))
        return found

    async def run(self) -> Counts | None:
        """All of it, or what is left of it; None where the ledger's rows had moved before. ``NotReady``: nothing has moved."""
        plan = await self.plan()
        if plan.obstacles:
            raise NotReady("; ".join(plan.obstacles))
        if plan.nothing:
            return None
        counts = None
        began = time.monotonic()
        if not plan.turned:
            counts = await self._turn(plan.old)
        before = plan.old.before or plan.old.layout.partitions
        await self._step("rebuild")
        for number in range(self._new.partitions):
            await self._rebuild(number, int((time.monotonic() - began) * 1000))
        await self._step("remove")
        await self._remove(before)
        await self._step("end")
        await self._ledger.settle({BEFORE: ""})
        return counts

    async def _turn(self, old: Moved) -> Counts:
        await self._step("begin")
        await self._ledger.settle({"partitions": f"{old.layout.partitions} {UNFINISHED}", "partition_by": f"{old.layout.by} {UNFINISHED}"})
        every = range(max(old.layout.partitions, self._new.partitions))
        epoch = 0
        for number in every:
            row = await self._ledger.partition(number)
            epoch = max(epoch, row.epoch if row is not None else 0, (await self._engine.partitions[number].hello()).epoch or 0)
        for number in every:
            await self._step(f"freeze {number}")
            before = await self._ledger.epochs(number)
            raised = await self._ledger.raise_epoch(number, epoch)
            if raised is None:
                raise NotReady(f"partition {number}: another process recovers it; stop all workers, and run this again")
            await self._engine.upkeep.freeze(number, raised.epoch)
            for row in before:
                await self._queue.unbind(number, row.epoch)
        if late := [number for number in every if await self._behind(number)]:
            # Somebody has sold between the look and the freeze. The old settings again: a worker recovers these, and applies it.
            await self._ledger.settle({"partitions": str(old.layout.partitions), "partition_by": old.layout.by})
            raise NotReady(f"partitions {late} were sold from meanwhile: stop all callers, let a worker run, stop it, and run this again")
        await self._step("turn")
        return await self._ledger.repartition(old, self._new, epoch)

    async def _rebuild(self, number: int, down_ms: int) -> None:
        view, ledger = self._engine.partitions[number], self._ledger
        row = await ledger.partition(number)
        hello = await view.hello()
        if row is not None and row.state == "open" and (hello.epoch, hello.state) == (row.epoch, "open") and hello.layout == str(self._new):
            return
        if row is None or row.state != "rebuilding" or (hello.epoch, hello.state) != (row.epoch, "frozen"):
            row = await ledger.raise_epoch(number, max(row.epoch if row is not None else 0, hello.epoch or 0))
        if row is None:
            raise EpochClosed(f"partition {number}: another process rebuilds it; run this again")
        await rebuild(self._engine.upkeep, ledger, self._queue, row, down_ms)

    async def _remove(self, before: int) -> None:
        client: Any = self._engine.wire.client
        for number in range(self._new.partitions, before):
            await self._queue.delete(number)
            keys = [key async for key in client.scan_iter(match=f"{self._engine.partitions[number].tag}:*", count=1000)]
            for key in keys:
                await client.unlink(key)
