"""Runs ``run="later"`` functions: in order per group, quick ones together in one transaction, slow ones several at once in one each;
retried with growing pauses, then a dead letter.

What is shared is bounded, since all locks are held until its end: ``MOST`` functions (``companions``), ``SPAN`` seconds, and a function
that takes longer than ``PATIENCE`` is cut off. That one is undone and runs again alone, for as long as it takes. Where a transaction
was not committed as a whole, its tasks run again, each alone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from inventory_sdk import context
from inventory_sdk.errors import InventoryError
from inventory_sdk.ledger.protocol import Task, TaskFilter, TasksSpoilt, TaskStuck
from inventory_sdk.model import Position, Receipt, ReceiptLine, split_key
from inventory_sdk.sync.backoff import Backoff, waited
from inventory_sdk.sync.companions import Company, Manners, companies
from inventory_sdk.sync.parts import Parts, log

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

CONCURRENCY: Final = 8
ATTEMPTS: Final = 10
FIRST_RETRY: Final = 1.0
LAST_RETRY: Final = 300.0
POLL: Final = 1.0
WINDOW: Final = 128
"""Due tasks that one look reads: four workers find a full company of one hot SKU in it."""
LOOK: Final = 0.05
"""Seconds until the next look where one found nothing to start and something runs."""
SPAN: Final = 0.25
"""Seconds after its first function in which a shared transaction begins further ones."""
PATIENCE: Final = 5.0
"""Seconds that one function may keep its company waiting: more than a database takes to find a deadlock, and more than all shared
transactions of four workers take that queue for one row."""
MAX_ERROR: Final = 2000
"""Characters of an error that are kept with the task."""


class CutOff(Exception):
    """A function kept its company waiting. Not its failure: it runs again, alone."""


class TaskRegistry(Protocol):
    """Knows the functions by their stable names."""

    async def run(self, task: Task, session: AsyncSession, receipt: Receipt) -> None:
        """Decode the arguments and call the function of ``task.name`` in ``session``'s transaction; its error is the task's."""
        ...


class TaskRunner:
    """One per worker; several workers share the work through the ledger's locks. Times are in seconds. ``serves`` says, each time
    that it is asked, which tasks are this worker's; None: all."""

    def __init__(
        self,
        parts: Parts,
        registry: TaskRegistry,
        due: asyncio.Event,
        *,
        concurrency: int = CONCURRENCY,
        attempts: int = ATTEMPTS,
        first_retry: float = FIRST_RETRY,
        last_retry: float = LAST_RETRY,
        poll: float = POLL,
        serves: Callable[[], TaskFilter | None] | None = None,
    ) -> None:
        self._parts = parts
        self._registry = registry
        self._due = due
        self._concurrency = concurrency
        self._attempts = attempts
        self._first_retry = first_retry
        self._last_retry = last_retry
        self._poll = poll
        self._serves = serves
        self._running: dict[asyncio.Task[bool], Company] = {}
        self._ended = asyncio.Event()
        self._manners = Manners()
        self._stuck: dict[int, asyncio.Task[None]] = {}
        """Functions that went on when they were cut off. Their tasks wait until they have ended."""

    async def run(self) -> None:
        """Until the worker stops; what runs then is finished. Cancelled: what runs is rolled back and stays pending."""
        parts = self._parts
        backoff = parts.backoff()
        try:
            while not parts.stopping.is_set():
                self._due.clear()
                self._ended.clear()
                pause = self._poll
                try:
                    started = await self._start_due()
                    backoff.reset()
                    if self._running and not started:
                        # The applier says "due" after each of its batches, and most of that is for the stock that runs already.
                        await waited(self._ended, LOOK)
                except Exception as error:  # noqa: BLE001 - the database is away; the tasks stay where they are
                    pause = backoff.delay()
                    parts.retried("tasks", error, backoff.attempts)
                await waited(self._due, pause)
            if self._running:
                await asyncio.wait(self._running)
        finally:
            for running in self._running:
                running.cancel()
            if self._running:
                await asyncio.gather(*self._running, return_exceptions=True)

    async def _start_due(self) -> bool:
        free = self._concurrency - len(self._running)
        if free <= 0:
            return False
        # What runs here is still in the answer.
        limit = WINDOW + sum(len(company.tasks) for company in self._running.values())
        due = await self._due_tasks(limit)
        if self._parts.stopping.is_set():
            return False
        if len(due) < limit:
            # Others may have done them. (Those that failed run alone anyway.)
            self._manners.apart.intersection_update(task.number for task in due)
        waiting = [task for task in due if task.number not in self._stuck]
        found = companies(waiting, self._running.values(), free, self._manners)
        for company in found:
            first = company.tasks[0]
            running = asyncio.create_task(self._work(company.tasks), name=f"inventory-task-{first.name}-{first.number}")
            self._running[running] = company
            running.add_done_callback(self._done)
        return bool(found)

    async def _due_tasks(self, limit: int) -> list[Task]:
        serves = None if self._serves is None else self._serves()
        ledger = self._parts.ledger
        return await (ledger.due_tasks(limit) if serves is None else ledger.due_tasks(limit, serves))

    def _done(self, running: asyncio.Task[bool]) -> None:
        self._running.pop(running, None)
        self._ended.set()
        if running.cancelled():
            return
        error = running.exception()
        if error is not None:
            # The failure itself could not be noted: the task is still pending and its time will come.
            self._parts.retried("tasks", error, 1)
        elif running.result():
            # Their groups may have another one, and their stock too.
            self._due.set()

    async def _work(self, tasks: Sequence[Task]) -> bool:
        """Run them once, in one transaction; False when other workers have them, or the ledger is away."""
        parts = self._parts
        shared = len(tasks) > 1
        called: list[Task] = []
        until = 0.0

        async def call(task: Task, session: AsyncSession) -> None:
            nonlocal until
            called.append(task)
            try:
                await self._call(task, session, PATIENCE if shared else None)
            finally:
                # Not from its beginning: the first waits for locks that others hold, and then it has them.
                until = until or time.monotonic() + SPAN

        def more() -> bool:
            return time.monotonic() < until and not parts.stopping.is_set()

        try:
            runs = await parts.ledger.run_tasks(tasks, call, more, self._manners.most)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if called and shared:
                self._fell_apart(called, error)
                return True
            if not isinstance(error, Exception):
                raise
            if not called:
                parts.retried("ledger", error, 1)
                return False
            self._manners.apart.discard(tasks[0].number)
            await self._failed(tasks[0], error)
            return True
        for run in runs:
            if isinstance(run.error, CutOff):
                self._manners.apart.add(run.task.number)
                continue
            self._manners.apart.discard(run.task.number)
            self._manners.ran(run)
            if run.error is not None:
                await self._failed(run.task, run.error)
        if runs and (shared or self._manners.most == 1):
            self._manners.went_well()
        return bool(runs)

    def _fell_apart(self, called: Sequence[Task], error: BaseException) -> None:
        """Rolled back, or nobody knows whether it was committed: those that are still pending run again, each alone."""
        self._manners.apart.update(task.number for task in called)
        self._manners.went_wrong()
        if isinstance(error, TasksSpoilt):
            self._manners.spoilt(called[-1])
        self._parts.retried("tasks_together", error, 1)

    async def _call(self, task: Task, session: AsyncSession, patience: float | None) -> None:
        """In an asyncio task of its own: the function goes where its caller went, and what it leaves in its context ends with it."""
        running = asyncio.create_task(self._function(task, session), name=f"inventory-function-{task.name}-{task.number}")
        try:
            await asyncio.wait([running], timeout=patience)
            cut = not running.done()
            if cut:
                running.cancel()
                await asyncio.wait([running], timeout=patience)
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            raise
        if cut:
            self._cut_off(task, running)
        if running.cancelled():
            raise InventoryError(f"task {task.name!r} raised CancelledError, though nobody cancelled it")
        running.result()

    def _cut_off(self, task: Task, running: asyncio.Task[None]) -> None:
        """``CutOff``, ``TaskStuck``; returns where it came to its end all the same."""
        if running.done() and not running.cancelled() and running.exception() is None:
            return
        self._manners.cut_off(task)
        error = CutOff(
            f"task {task.number} ({task.name}) of operation {task.operation_id!r} took over {PATIENCE:g} s; it runs again, alone"
        )
        self._parts.retried("tasks_together", error, 1)
        if running.done():
            raise error
        self._stuck[task.number] = running
        running.add_done_callback(partial(self._unstuck, task.number))
        raise TaskStuck(f"task {task.number} ({task.name}) goes on though it was cancelled")

    def _unstuck(self, number: int, running: asyncio.Task[None]) -> None:
        self._stuck.pop(number, None)
        if not running.cancelled():
            # Its connection was taken from under it; what it says of that is nobody's concern.
            running.exception()
        self._due.set()

    async def _function(self, task: Task, session: AsyncSession) -> None:
        context.unpack(json.loads(task.receipt).get("gray"))
        await self._registry.run(task, session, receipt_of(task))

    async def _failed(self, task: Task, error: Exception) -> None:
        parts = self._parts
        text = f"{type(error).__name__}: {error}"[:MAX_ERROR]
        attempts = task.attempts + 1
        if attempts < self._attempts:
            retry_in = Backoff(self._first_retry * 2**task.attempts, self._last_retry).delay()
            parts.retried("task", error, attempts)
            await parts.ledger.fail_task(task, text, retry_in)
            return
        await parts.ledger.fail_task(task, text, None)
        log.error(
            "task %d (%s) of operation %r failed %d times and is a dead letter: %s",
            task.number,
            task.name,
            task.operation_id,
            attempts,
            text,
            exc_info=error,
        )
        parts.happened("dead_letter", task=task.name)
        parts.tell(
            "dead_letter",
            {"merchant": task.merchant, "operation_id": task.operation_id, "name": task.name, "task": task, "error": text},
        )


def receipt_of(task: Task) -> Receipt:
    """The receipt that the function gets; it is in the ledger, so its durability is ``database``."""
    raw: dict[str, Any] = json.loads(task.receipt)
    flat = raw["lines"]
    remaining = raw["remaining"]
    lines = tuple(
        ReceiptLine(*split_key(field), quantity, left)
        for field, quantity, left in zip(flat[::2], flat[1::2], remaining or [0] * (len(flat) // 2), strict=True)
    )
    position = Position(*raw["position"])
    return Receipt(raw["operation_id"], raw["kind"], raw["merchant"], raw["order"], lines, (position,), "database")
