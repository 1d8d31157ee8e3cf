"""Waiting for the ledger: has it applied this position? One poller per partition and event loop, however many wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakKeyDictionary

from inventory_sdk.errors import DurabilityNotReached
from inventory_sdk.ledger.protocol import Ledger, PartitionRow
from inventory_sdk.model import Position
from inventory_sdk.sync.backoff import waited

SHORTEST: Final = 0.002
LONGEST: Final = 0.05
SIGN_AGE: Final = 10.0
"""Seconds without a sign of any worker after which waiting is pointless."""
SIGN_PERIOD: Final = 1.0

WorkerSeen = Callable[[int], Awaitable[float | None]]
"""Partition → seconds since a worker's last sign; None: none that still counts."""


@dataclass(eq=False, slots=True)
class _Waiter:
    position: Position
    future: asyncio.Future[None]


@dataclass(eq=False, slots=True)
class _Poller:
    waiters: set[_Waiter] = field(default_factory=set)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    applied: Position | None = None
    seen: float | None = None
    trouble: str = ""


class Watermark:
    """Knows how far the ledger is. ``worker_seen`` answers how long ago a worker gave a sign of life."""

    def __init__(self, ledger: Ledger, worker_seen: WorkerSeen, *, shortest: float = SHORTEST, longest: float = LONGEST) -> None:
        self._ledger = ledger
        self._worker_seen = worker_seen
        self._shortest = shortest
        self._longest = longest
        self._loops: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, _Poller]] = WeakKeyDictionary()

    async def reached(self, position: Position, timeout: float = 30.0) -> None:
        """Returns once the ledger has applied ``position`` (or refused it: its row says which). ``DurabilityNotReached`` after
        ``timeout`` seconds, at once when no worker has given a sign for ten, or when the entry was lost with its epoch."""
        await self.settled([position], timeout)

    async def settled(self, positions: Iterable[Position], timeout: float = 30.0) -> None:
        """The same for all of ``positions``, of any partitions, within one ``timeout``."""
        loop = asyncio.get_running_loop()
        waiting: list[tuple[_Poller, _Waiter]] = []
        for position in positions:
            poller = self._pollers().setdefault(position.partition, _Poller())
            if not _passed(poller.applied, position):
                waiting.append((poller, _Waiter(position, loop.create_future())))
        try:
            for poller, waiter in waiting:
                poller.waiters.add(waiter)
                self._wake(waiter.position.partition, poller)
            if waiting:
                futures = [waiter.future for _, waiter in waiting]
                await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
            failed = [waiter for _, waiter in waiting if waiter.future.done() and waiter.future.exception() is not None]
            for waiter in failed:
                waiter.future.result()
            for poller, waiter in waiting:
                if not waiter.future.done():
                    raise self._not_reached(poller, waiter.position, poller.trouble or f"waited {timeout:g} s")
        finally:
            # Also when the caller goes away: the poller ends by itself once nobody waits.
            for poller, waiter in waiting:
                poller.waiters.discard(waiter)
                if waiter.future.done():
                    waiter.future.exception()

    def note(self, applied: Position) -> None:
        """A worker in this event loop has just moved the watermark: no need to poll for that."""
        poller = self._pollers().get(applied.partition)
        if poller is not None:
            self._release(poller, applied)

    async def close(self) -> None:
        """End this loop's pollers; who still waits gets ``DurabilityNotReached``."""
        for poller in self._loops.pop(asyncio.get_running_loop(), {}).values():
            for waiter in poller.waiters:
                if not waiter.future.done():
                    waiter.future.set_exception(self._not_reached(poller, waiter.position, "closed meanwhile"))
            if poller.task is not None:
                poller.task.cancel()
                await asyncio.wait([poller.task])

    def _pollers(self) -> dict[int, _Poller]:
        return self._loops.setdefault(asyncio.get_running_loop(), {})

    def _wake(self, partition: int, poller: _Poller) -> None:
        poller.woken.set()
        if poller.task is None or poller.task.done():
            poller.task = asyncio.get_running_loop().create_task(self._poll(partition, poller), name=f"inventory-watermark-{partition}")

    async def _poll(self, partition: int, poller: _Poller) -> None:
        pause = self._shortest
        sign_at = 0.0
        while poller.waiters:
            before = len(poller.waiters)
            try:
                if time.monotonic() >= sign_at:
                    poller.seen = await self._worker_seen(partition)
                    sign_at = time.monotonic() + SIGN_PERIOD
                row = await self._ledger.partition(partition)
                if row is not None:
                    await self._judge(poller, row)
                poller.trouble = ""
            except Exception as error:  # noqa: BLE001 - the waiters get it as the reason when their time is over
                poller.trouble = f"can't ask: {type(error).__name__}: {error}"
            else:
                if poller.seen is None or poller.seen > SIGN_AGE:
                    self._give_up(poller)
            if not poller.waiters:
                return
            pause = self._shortest if len(poller.waiters) < before else min(self._longest, pause * 2)
            poller.woken.clear()
            if await waited(poller.woken, pause):
                # Somebody new waits: back to the shortest pause, but never without one, however many come.
                pause = self._shortest
                await asyncio.sleep(pause)

    def _release(self, poller: _Poller, applied: Position) -> None:
        if poller.applied is None or applied > poller.applied:
            poller.applied = applied
        for waiter in [w for w in poller.waiters if _passed(applied, w.position)]:
            self._answer(poller, waiter, None)

    async def _judge(self, poller: _Poller, row: PartitionRow) -> None:
        """Those that wait for the newest epoch get its watermark; of those of an older one the ledger's rows decide."""
        self._release(poller, Position(row.partition, row.epoch, row.applied))
        older = [waiter for waiter in poller.waiters if waiter.position.epoch < row.epoch]
        if not older:
            return
        rows = await self._ledger.operations_at([waiter.position for waiter in older])
        found = {each.position for each in rows}
        for waiter in older:
            if waiter.position in found:
                self._answer(poller, waiter, None)
            elif row.state == "open":
                why = f"lost: epoch {waiter.position.epoch} was ended without this entry; repeat it with the same operation_id"
                self._answer(poller, waiter, self._not_reached(poller, waiter.position, why))

    def _give_up(self, poller: _Poller) -> None:
        for waiter in list(poller.waiters):
            self._answer(poller, waiter, self._not_reached(poller, waiter.position, "no worker is running"))

    def _answer(self, poller: _Poller, waiter: _Waiter, error: DurabilityNotReached | None) -> None:
        poller.waiters.discard(waiter)
        if waiter.future.done():
            return
        if error is None:
            waiter.future.set_result(None)
        else:
            waiter.future.set_exception(error)

    def _not_reached(self, poller: _Poller, wanted: Position, why: str) -> DurabilityNotReached:
        return DurabilityNotReached("database", wanted, poller.applied, poller.seen, why)


def _passed(applied: Position | None, wanted: Position) -> bool:
    """Within one epoch the watermark decides; epoch 0 is the ledger's own."""
    return wanted.epoch == 0 or (applied is not None and applied.epoch == wanted.epoch and applied.sequence >= wanted.sequence)
