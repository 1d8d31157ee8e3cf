"""The worker: for each partition it follows the journal into the ledger, keeps house in Redis, and runs what is due."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Protocol, Self

from inventory_sdk.ledger.protocol import Ledger, TaskFilter, WritesStock
from inventory_sdk.metrics import Metrics, NoMetrics
from inventory_sdk.model import JournalEntry, Position
from inventory_sdk.sync.announcing import Announcer
from inventory_sdk.sync.applier import MAX_OPERATIONS, Applier
from inventory_sdk.sync.corrections import CREDIT_GRACE, Corrections
from inventory_sdk.sync.depth import Depth
from inventory_sdk.sync.follower import IDLE, REBIND, TAKE_OVER, Follower
from inventory_sdk.sync.following import Following
from inventory_sdk.sync.housekeeping import PERIOD, STALE_AGE, Housekeeping
from inventory_sdk.sync.notices import Notices, OnEvent, no_handler
from inventory_sdk.sync.parts import Parts, log
from inventory_sdk.sync.publish import PUBLISH_TIMEOUT
from inventory_sdk.sync.queues.protocol import Queue
from inventory_sdk.sync.stock_side import Expired, JournalState, StockSide
from inventory_sdk.sync.tasks import ATTEMPTS, CONCURRENCY, FIRST_RETRY, LAST_RETRY, TaskRegistry, TaskRunner

__all__ = ["Expired", "JournalState", "StockSide", "TaskRegistry", "Worker"]

HEARTBEAT: Final = 3.0
DRAIN: Final = 10.0
FIRST_SIGN: Final = 1.0


def _nobody(_: Any) -> None:
    """Nobody wants to know."""


class Job(Protocol):
    """Work beside the journal; ``run`` returns soon after its event is set."""

    @property
    def name(self) -> str: ...

    @property
    def run(self) -> Callable[[asyncio.Event], Coroutine[Any, Any, None]]: ...


class Worker:
    """Runs in one event loop, several partitions at once; other workers may run on the same partitions. Times are in seconds.

    ``on_event`` is awaited aside for ``expired``, ``rejected``, ``duplicate``, ``stale``, ``dead_letter``, ``frozen``, ``recovered``,
    ``lost``, ``fork``, ``late_entry``, ``unreadable``, ``writes_stock_failed`` and ``task_died``. ``publish_timeout`` is what callers give
    a message: a recovery waits as long before it ends an epoch. ``on_applied`` hears of every new watermark at once, ``on_entries`` of
    every entry behind it. ``jobs`` run beside the rest and end when their event is set. ``serves``: which later-functions it runs, None:
    all. A task
    of its own that dies is logged, counted (``task_died``) and kept in ``failure``; ``wait()`` raises it."""

    def __init__(
        self,
        stock_side: StockSide,
        ledger: Ledger,
        queue: Queue,
        *,
        partitions: Sequence[int],
        metrics: Metrics | None = None,
        writes_stock: Sequence[WritesStock] = (),
        on_event: OnEvent = no_handler,
        on_applied: Callable[[Position], None] = _nobody,
        on_failure: Callable[[BaseException], None] = _nobody,
        tasks: TaskRegistry | None = None,
        name: str | None = None,
        max_operations: int = MAX_OPERATIONS,
        idle: float = IDLE,
        heartbeat: float = HEARTBEAT,
        take_over: float = TAKE_OVER,
        rebind: float = REBIND,
        housekeeping: float = PERIOD,
        stale_age: float = STALE_AGE,
        credit_grace: float = CREDIT_GRACE,
        task_concurrency: int = CONCURRENCY,
        task_attempts: int = ATTEMPTS,
        first_task_retry: float = FIRST_RETRY,
        last_task_retry: float = LAST_RETRY,
        first_delay: float = 0.05,
        longest_delay: float = 5.0,
        publish_timeout: float = PUBLISH_TIMEOUT,
        jobs: Sequence[Job] = (),
        on_entries: Sequence[Callable[[Sequence[JournalEntry]], None]] = (),
        serves: Callable[[], TaskFilter | None] | None = None,
    ) -> None:
        self.name = name or f"{socket.gethostname()}:{os.getpid()}"
        self.failure: BaseException | None = None
        self._notices = Notices(on_event)
        self._stopping = asyncio.Event()
        self._died = asyncio.Event()
        self._stopped = asyncio.Event()
        self._on_failure = on_failure
        self._heartbeat = heartbeat
        tasks_due = asyncio.Event()
        self._wakes = [tasks_due]
        self._tasks: list[asyncio.Task[None]] = []
        self._followers: list[tuple[Follower, asyncio.Task[None]]] = []
        self._signs: list[asyncio.Task[None]] = []
        self._aside: list[asyncio.Task[None]] = []
        """They hand over what the others did, and have no end of their own."""
        self._parts = parts = Parts(
            stock_side=stock_side,
            ledger=ledger,
            queue=queue,
            metrics=metrics or NoMetrics(),
            tell=self._notices.tell,
            stopping=self._stopping,
            writes_stock=tuple(writes_stock),
            first_delay=first_delay,
            longest_delay=longest_delay,
            publish_timeout=publish_timeout,
        )
        self._runner = (
            TaskRunner(
                parts,
                tasks,
                tasks_due,
                concurrency=task_concurrency,
                attempts=task_attempts,
                first_retry=first_task_retry,
                last_retry=last_task_retry,
                serves=serves,
            )
            if tasks is not None
            else None
        )
        self._jobs = tuple(jobs)
        self._depth = Depth(parts, partitions)
        self._following = Following(parts)
        self._wakes.append(self._following.due)
        hearers = (self._following.applied, *on_entries)
        self._rooms: list[tuple[int, Follower, Corrections, Housekeeping, asyncio.Event]] = []
        self._announcers: list[Announcer] = []
        for partition in partitions:
            signed, corrections_due = asyncio.Event(), asyncio.Event()
            announcer = Announcer(parts, partition)
            self._announcers.append(announcer)
            applier = Applier(parts, partition, on_applied, tasks_due, corrections_due, announcer, max_operations, hearers)
            follower = Follower(parts, partition, applier, signed, idle=idle, take_over=take_over, rebind=rebind)
            corrections = Corrections(parts, partition, corrections_due, grace=credit_grace)
            keeper = Housekeeping(parts, partition, period=housekeeping, stale_age=stale_age)
            self._rooms.append((partition, follower, corrections, keeper, signed))
            self._wakes += (signed, corrections_due)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start working; returns once that can be seen, or after ``FIRST_SIGN`` seconds. A worker starts once: make a new one after
        ``stop``."""
        if self._tasks or self._stopping.is_set():
            raise RuntimeError("a worker starts once; make a new one")
        self._aside.append(self._spawn("notices", self._notices.run()))
        for (partition, *_), announcer in zip(self._rooms, self._announcers, strict=True):
            self._aside.append(self._spawn(f"announcing-{partition}", announcer.run()))
        for partition, follower, corrections, keeper, signed in self._rooms:
            self._followers.append((follower, self._spawn(f"follower-{partition}", follower.run())))
            self._spawn(f"corrections-{partition}", corrections.run())
            self._spawn(f"housekeeping-{partition}", keeper.run())
            self._signs.append(self._spawn(f"heartbeat-{partition}", self._give_signs(partition, follower, signed)))
        self._spawn("following", self._following.run())
        self._spawn("depth", self._depth.run())
        if self._runner is not None:
            self._spawn("tasks", self._runner.run())
        for job in self._jobs:
            self._spawn(job.name, job.run(self._stopping))
        await self._give_first_signs()

    async def stop(self, timeout: float = DRAIN) -> None:
        """Finish what is received, for at most ``timeout`` seconds, then cancel. What is unfinished comes again to the next
        worker. Idempotent. A caller that goes away meanwhile has cancelled everything at once."""
        self._stopping.set()
        for wake in self._wakes:
            wake.set()
        for follower, task in self._followers:
            if not follower.receiving:
                # Waiting for a message, a server, or its turn as consumer: nothing to finish.
                task.cancel()
        for task in self._signs:
            task.cancel()
        try:
            working = [task for task in self._tasks if task not in self._aside and not task.done()]
            if working:
                await asyncio.wait(working, timeout=timeout)
            if any(not task.done() for task in self._aside):
                rest = min(timeout, 1.0)
                await asyncio.gather(self._notices.delivered(rest), *(announcer.delivered(rest) for announcer in self._announcers))
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            self._stopped.set()

    async def ready(self) -> None:
        """Returns once every partition has made progress or found all well, and said so; raises what killed a task before."""
        while not all(follower.last_sign is not None for _, follower, _, _, _ in self._rooms):
            self._raise_failure()
            await asyncio.sleep(0.005)
        for partition, *_ in self._rooms:
            await self._parts.persist("redis", partial(self._parts.stock_side.heartbeat, partition, self.name))

    async def tidy(self) -> None:
        """A round of housekeeping at once instead of within a second: what is due has expired, and its handlers were told."""
        for _, _, _, keeper, _ in self._rooms:
            await keeper.tidy()
        await self._notices.delivered(DRAIN)

    async def wait(self) -> None:
        """Until the worker has stopped; raises what killed one of its tasks as soon as that happens."""
        waits = [asyncio.create_task(event.wait()) for event in (self._died, self._stopped)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def _give_first_signs(self) -> None:
        """So that who waits for the ledger right after the start is not told that no worker runs. The followers' own come later."""
        signs = [asyncio.create_task(self._parts.stock_side.heartbeat(partition, self.name)) for partition, *_ in self._rooms]
        try:
            await asyncio.wait(signs, timeout=FIRST_SIGN)
        finally:
            for sign in signs:
                sign.cancel()
            await asyncio.gather(*signs, return_exceptions=True)  # a server that is away is told of by what works with it

    async def _give_signs(self, partition: int, follower: Follower, signed: asyncio.Event) -> None:
        """A heartbeat for every span in which the follower gave a sign itself; a stuck one falls silent."""
        backoff = self._parts.backoff()
        given = 0.0
        while not self._stopping.is_set():
            await signed.wait()
            signed.clear()
            left = 0.0 if follower.sign_now else given + self._heartbeat - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
                continue
            try:
                await self._parts.stock_side.heartbeat(partition, self.name)
                given = time.monotonic()
                follower.sign_now = False
                backoff.reset()
            except Exception as error:  # noqa: BLE001 - Redis is away; the sign ends by itself there
                delay = backoff.delay()
                self._parts.retried("redis", error, backoff.attempts)
                await asyncio.sleep(delay)

    def _spawn(self, what: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"inventory-{what}")
        self._tasks.append(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            return
        log.critical("%s of worker %s died", task.get_name(), self.name, exc_info=error)
        self._parts.happened("task_died", task=task.get_name())
        self._parts.tell("task_died", {"task": task.get_name(), "error": repr(error)})
        self.failure = self.failure or error
        self._died.set()
        self._on_failure(error)
