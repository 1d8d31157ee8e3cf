"""Runs ``run="later"`` functions: in order per group, several groups at once, retried with growing pauses, then a dead letter."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from inventory_sdk import context
from inventory_sdk.ledger.protocol import Task, TaskFilter
from inventory_sdk.model import Position, Receipt, ReceiptLine, split_key
from inventory_sdk.sync.backoff import Backoff, waited
from inventory_sdk.sync.parts import Parts, log

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

CONCURRENCY: Final = 8
ATTEMPTS: Final = 10
FIRST_RETRY: Final = 1.0
LAST_RETRY: Final = 300.0
POLL: Final = 1.0
MAX_ERROR: Final = 2000
"""Characters of an error that are kept with the task."""


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
        self._running: dict[str, asyncio.Task[bool]] = {}

    async def run(self) -> None:
        """Until the worker stops; what runs then is finished. Cancelled: what runs is rolled back and stays pending."""
        parts = self._parts
        backoff = parts.backoff()
        try:
            while not parts.stopping.is_set():
                self._due.clear()
                pause = self._poll
                try:
                    await self._start_due()
                    backoff.reset()
                except Exception as error:  # noqa: BLE001 - the database is away; the tasks stay where they are
                    pause = backoff.delay()
                    parts.retried("tasks", error, backoff.attempts)
                await waited(self._due, pause)
            if self._running:
                await asyncio.wait(self._running.values())
        finally:
            for running in self._running.values():
                running.cancel()
            if self._running:
                await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _start_due(self) -> None:
        free = self._concurrency - len(self._running)
        if free <= 0:
            return
        # Groups that run here still have their task in the answer: ask for as many more.
        for task in await self._due_tasks(free + len(self._running)):
            if task.group in self._running or len(self._running) >= self._concurrency:
                continue
            running = asyncio.create_task(self.attempt(task), name=f"inventory-task-{task.name}-{task.number}")
            self._running[task.group] = running
            running.add_done_callback(partial(self._ended, task.group))

    async def _due_tasks(self, limit: int) -> list[Task]:
        serves = None if self._serves is None else self._serves()
        ledger = self._parts.ledger
        return await (ledger.due_tasks(limit) if serves is None else ledger.due_tasks(limit, serves))

    def _ended(self, group: str, done: asyncio.Task[bool]) -> None:
        self._running.pop(group, None)
        if done.cancelled():
            return
        error = done.exception()
        if error is not None:
            # The failure itself could not be noted: the task is still pending and its time will come.
            self._parts.retried("tasks", error, 1)
        elif done.result():
            # Its group may have another one.
            self._due.set()

    async def attempt(self, task: Task) -> bool:
        """Run it once, in one transaction with its own end; False when another worker has it, or the ledger is away."""
        parts = self._parts
        called = False

        async def call(session: AsyncSession) -> None:
            nonlocal called
            called = True
            # Each attempt has a task of its own, so this ends with it: the function goes where its caller went.
            context.unpack(json.loads(task.receipt).get("gray"))
            await self._registry.run(task, session, receipt_of(task))

        try:
            return await parts.ledger.run_task(task, call)
        except Exception as error:  # noqa: BLE001 - the user's function may raise anything
            if not called:
                parts.retried("ledger", error, 1)
                return False
            await self._failed(task, error)
            return True

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
