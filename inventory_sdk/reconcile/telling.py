"""Documents on their way to the sinks. Each is kept in the ledger as a letter, in the transaction that makes it true, until its sink has
it: whoever is cancelled or dies in between has told it all the same, by the next one who looks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.beside import Ground
from inventory_sdk.ledger.accounts import Row
from inventory_sdk.metrics.events import Happened
from inventory_sdk.reconcile.model import discrepancy
from inventory_sdk.reconcile.sinks.protocol import Document, Event, Sink, SinkRefused, document
from inventory_sdk.reconcile.sinks.sql import register_of

if TYPE_CHECKING:
    from inventory_sdk.ledger.register import Letters

log = logging.getLogger("inventory_sdk.reconcile")

LETTERS: Final = 500
FRESH_MS: Final = 60_000
"""A letter that is younger is on its way with the process that wrote it."""
PATIENCE: Final = 60.0
"""Seconds that a sink may take for one batch: one that never answers must not stop the comparison."""
SLOW: Final = 5.0
REST: Final = 10
"""A sink that failed after ``SLOW`` seconds is left alone for so many times as long as it took: a run asks it again and again."""
OURS: Final = 10_000
"""Letters of this process that are remembered as such; the others go when they are no longer fresh."""
REFUSED: Final = ".refused"
"""Behind a sink's name: letters that it will never take, for somebody to look at."""


class Handlers:
    """The service's ``on("drift")`` handlers and the metric, told like a sink of their own."""

    name = "\x1fhandlers"

    def __init__(self) -> None:
        self._ground: Ground | None = None

    async def start(self, ground: Ground) -> None:
        """Whose handlers."""
        self._ground = ground

    async def write(self, documents: Sequence[Document]) -> None:
        """What a handler raises is its own affair: it was told."""
        ground = self._ground
        assert ground is not None, "started"
        for each in documents:
            found = each.discrepancy
            ground.metrics.record(Happened("drift", {"reason": found.cause}))
            facts = {
                "number": found.number, "what": found.what, "merchant": found.merchant, "sku": found.sku,
                "reservation": found.reservation, "cause": found.cause, "available": found.available, "reserved": found.reserved,
            }  # fmt: skip
            try:
                await ground.tell("drift", facts)
            except Exception:
                log.exception("a handler of event 'drift' failed")

    async def close(self) -> None:
        """Nothing to end."""


class Teller:
    """Of one event loop. A sink that fails never fails a comparison: the register has it all."""

    def __init__(self, ground: Ground, sinks: Sequence[Sink]) -> None:
        self._ground = ground
        self._register = register_of(ground)
        self._handlers = Handlers()
        self._sinks: tuple[Sink, ...] = (self._handlers, *sinks)
        self._ours: set[tuple[str, str]] = set()
        self._busy = asyncio.Lock()
        self._rests: dict[str, float] = {}

    async def start(self) -> None:
        """Start the sinks; those that were are ended again where one can't be."""
        for at, sink in enumerate(self._sinks):
            try:
                await sink.start(self._ground)
            except BaseException:
                await self._close(self._sinks[:at])
                raise

    async def close(self) -> None:
        """End the sinks; the first error is raised when all were."""
        failures = await self._close(self._sinks)
        if failures:
            raise failures[0]

    async def _close(self, sinks: Sequence[Sink]) -> list[Exception]:
        failures: list[Exception] = []
        for sink in sinks:
            try:
                await sink.close()
            except Exception as error:
                log.exception("closing sink %s failed", sink.name)
                failures.append(error)
        return failures

    def letters(self, event: Event) -> Letters:
        """What the register keeps for the sinks when this happens to a discrepancy; ``deliver`` brings it there."""

        def of(row: Row) -> Sequence[tuple[str, Mapping[str, Any]]]:
            found = discrepancy(row)
            # Its time is in its name: a ledger that was restored from a copy gives the same numbers again.
            name = f"{self._ground.namespace}-{found.number}-{found.found_ms}-{event}"
            told = Document(name, time.time_ns() // 1_000_000, event, self._ground.namespace, found)
            sinks = self._sinks if event == "found" else self._sinks[1:]
            if len(self._ours) >= OURS:
                self._ours.clear()
            self._ours |= {(sink.name, told.id) for sink in sinks}
            return [(sink.name, told.fields()) for sink in sinks]

        return of

    async def deliver(self) -> bool:
        """Bring every sink what this process has kept for it, and what no other process has brought it; whether nothing is left."""
        async with self._busy:
            left = [sink.name for sink in self._sinks if not await self._delivered(sink)]
        return not left

    async def _delivered(self, sink: Sink) -> bool:
        if time.monotonic() < self._rests.get(sink.name, 0.0):
            return False
        after = 0
        while letters := await self._register.letters(sink.name, LETTERS, after):
            after = letters[-1][0]
            old = time.time_ns() // 1_000_000 - FRESH_MS
            due = {number: document(each) for number, at_ms, each in letters if at_ms <= old or (sink.name, each["id"]) in self._ours}
            if due and not await self._taken(sink, due):
                return False
            self._ours -= {(sink.name, each.id) for each in due.values()}
        return True

    async def _taken(self, sink: Sink, letters: Mapping[int, Document]) -> bool:
        """Whether these are off our hands: the sink has them, or they are kept aside."""
        began, documents, aside = time.monotonic(), list(letters.values()), list[Document]()
        try:
            async with asyncio.timeout(PATIENCE):
                await sink.write(documents)
        except SinkRefused as error:
            log.error("sink %s refused documents for good, they are kept as %s%s: %s", sink.name, sink.name, REFUSED, error)
            self._ground.metrics.record(Happened("sink_refused", {"reason": sink.name}))
            # One that names none of them has not said which it took.
            aside = [each for each in documents if each.id in error.ids] or documents
        except Exception as error:  # noqa: BLE001 - a sink is somebody else's server or code; what it did not take is kept
            log.warning("sink %s did not take %d documents, they wait in the ledger: %r", sink.name, len(documents), error)
            self._ground.metrics.record(Happened("sink_away", {"reason": sink.name}))
            took = time.monotonic() - began
            if took > SLOW:
                self._rests[sink.name] = time.monotonic() + REST * took
            return False
        await self._register.delivered(list(letters), [(sink.name + REFUSED, each.fields()) for each in aside])
        return True
