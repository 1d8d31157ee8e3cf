"""Publishing by the process that journaled: every batch goes to the queue at once, and who needs the confirm waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Final

from inventory_sdk import tracing
from inventory_sdk.metrics.events import Metrics, Published, Retried
from inventory_sdk.sync.backoff import Backoff
from inventory_sdk.sync.queues.loops import PerLoop
from inventory_sdk.sync.queues.protocol import PublishFailed, Queue, Unroutable

log = logging.getLogger(__name__)

ATTEMPTS: Final = 5
PUBLISH_TIMEOUT: Final = 5.0
"""Seconds that one entry gets in all. A recovery waits as long before it ends an epoch: nobody still waits for a confirm then."""


class Publication:
    """One entry on its way. Awaiting it is ``publisher.confirmed(it)``; nobody has to."""

    __slots__ = ("_publisher", "body", "position", "task")

    def __init__(self, publisher: Publisher, position: tuple[int, int, int], body: str) -> None:
        self._publisher = publisher
        self.position = position
        self.body = body
        self.task: asyncio.Task[None] | None = None

    def __await__(self) -> Generator[object, None, None]:
        return self._publisher.confirmed(self).__await__()

    def __str__(self) -> str:
        partition, epoch, sequence = self.position
        return f"journal entry {partition}/{epoch}-{sequence}"


@dataclass(slots=True)
class _Traffic:
    """What one event loop has on its way."""

    slots: asyncio.Semaphore
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    pending: dict[tuple[int, int, int], Publication] = field(default_factory=dict)


class Publisher:
    """Publishes journal entries with retries. ``timeout`` (seconds, by the monotonic clock) is what one entry gets in all.

    At most ``max_in_flight`` entries of an event loop are on their way. An entry beyond them is sent once somebody waits for
    it; if nobody does, it is not sent at all (counted as failed: ``full``): the worker finds it in the journal.
    """

    def __init__(self, queue: Queue, metrics: Metrics, *, timeout: float = PUBLISH_TIMEOUT, max_in_flight: int = 1024) -> None:
        self._queue = queue
        self._metrics = metrics
        self._timeout = timeout
        self._max_in_flight = max_in_flight
        self._traffic = PerLoop(lambda: _Traffic(asyncio.Semaphore(max_in_flight)))
        self._failing = False

    def publish(self, partition: int, epoch: int, sequence: int, body: str) -> Publication:
        """Send the entry; returns at once and raises nothing. One that is on its way already is not sent again."""
        position = (partition, epoch, sequence)
        if not self._queue.confirms:
            return Publication(self, position, "")
        traffic = self._traffic.get()
        known = traffic.pending.get(position)
        if known is not None and known.body == body:
            return known
        publication = Publication(self, position, body)
        if len(traffic.tasks) < self._max_in_flight:
            self._begin(traffic, publication)
        else:
            self._metrics.record(Published(partition, 0.0, "full"))
        return publication

    async def confirmed(self, *publications: Publication, timeout: float | None = None) -> None:
        """Returns once the queue has confirmed all of them; ``PublishFailed`` when one failed, or after ``timeout`` seconds
        (None: the publisher's). Whoever stops waiting takes nothing away from those who still do."""
        if not self._queue.confirms:
            raise PublishFailed("this queue does not confirm: durability 'queue' needs RabbitMQ")
        traffic = self._traffic.get()
        tasks = [one.task if one.task is not None else self._begin(traffic, one) for one in publications]
        if tasks:
            await asyncio.wait(tasks, timeout=self._timeout if timeout is None else timeout)
        for publication, task in zip(publications, tasks, strict=True):
            if not task.done():
                raise PublishFailed(f"{publication} is not confirmed yet")
            if task.cancelled():
                raise PublishFailed(f"{publication} was not confirmed before the publisher was closed")
            error = task.exception()
            if error is not None:
                # A new one for each who waits: raising one exception in many tasks would grow its traceback without end.
                kind = Unroutable if isinstance(error, Unroutable) else PublishFailed
                raise kind(str(error)) from error

    async def close(self, timeout: float = 5.0) -> None:
        """Give what is on its way up to ``timeout`` seconds, then cancel it. For this event loop's entries."""
        traffic = self._traffic.pop()
        if traffic is None or not traffic.tasks:
            return
        tasks = set(traffic.tasks)
        try:
            await asyncio.wait(tasks, timeout=timeout)
        finally:
            for task in tasks:
                task.cancel()
        await asyncio.wait(tasks)

    def _begin(self, traffic: _Traffic, publication: Publication) -> asyncio.Task[None]:
        task = asyncio.create_task(self._send(traffic, publication), name="inventory-publish")
        publication.task = task
        traffic.tasks.add(task)
        traffic.pending[publication.position] = publication

        def ended(_: asyncio.Task[None]) -> None:
            traffic.tasks.discard(task)
            if traffic.pending.get(publication.position) is publication:
                del traffic.pending[publication.position]
            if not task.cancelled():
                task.exception()  # was counted; that nobody waited for it is no news

        task.add_done_callback(ended)
        return task

    async def _send(self, traffic: _Traffic, publication: Publication) -> None:
        partition = publication.position[0]
        started = asyncio.get_running_loop().time()
        failed = "error"
        try:
            with tracing.current() as headers:
                await self._attempt(traffic, publication, started + self._timeout, headers)
            failed = ""
        except Unroutable:
            failed = "returned"
            raise
        except PublishFailed as error:
            failed = "unconfirmed"
            if not self._failing:
                self._failing = True
                log.warning("entries are not confirmed by the queue, the worker reads them from the journal: %s", error)
            raise
        except asyncio.CancelledError:
            failed = "closed"
            raise
        finally:
            seconds = asyncio.get_running_loop().time() - started
            self._metrics.record(Published(partition, seconds, failed or None))
        if self._failing:
            self._failing = False
            log.info("the queue confirms again")

    async def _attempt(self, traffic: _Traffic, publication: Publication, deadline: float, headers: Mapping[str, str] | None) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                await traffic.slots.acquire()
        except TimeoutError as error:
            raise PublishFailed(f"{publication} found no room among {self._max_in_flight} others in time") from error
        try:
            backoff = Backoff(0.02, 1.0)
            while True:
                remaining = max(0.0, deadline - loop.time())
                # Half of what is left, so that an attempt that hangs in a dead connection leaves time for one in a new one.
                share = remaining / 2 if backoff.attempts + 1 < ATTEMPTS else remaining
                try:
                    if headers is None:
                        await self._queue.publish(*publication.position, publication.body, share)
                    else:
                        await self._queue.publish(*publication.position, publication.body, share, headers=headers)
                    return
                except Unroutable:
                    raise  # the epoch is fenced: it will not be let in later either
                except PublishFailed as error:
                    pause = backoff.delay()
                    if backoff.attempts >= ATTEMPTS or loop.time() + pause >= deadline:
                        raise PublishFailed(f"{publication}, attempt {backoff.attempts}: {error}") from error
                    self._metrics.record(Retried("publish", type(error.__cause__ or error).__name__))
                await asyncio.sleep(pause)
        finally:
            traffic.slots.release()
