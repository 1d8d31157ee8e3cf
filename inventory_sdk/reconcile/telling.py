"""Documents on their way to the sinks: what one can't take now waits in the ledger and goes first the next time."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final

from inventory_sdk.beside import Ground
from inventory_sdk.metrics.events import Happened
from inventory_sdk.reconcile.model import Discrepancy
from inventory_sdk.reconcile.sinks.protocol import Document, Event, Sink, SinkRefused, document
from inventory_sdk.reconcile.sinks.sql import register_of

log = logging.getLogger("inventory_sdk.reconcile")

LETTERS: Final = 500
REFUSED: Final = ".refused"
"""Behind a sink's name: letters that it will never take, for somebody to look at."""


class Teller:
    """Of one event loop. A sink that fails never fails a comparison: the register has it all."""

    def __init__(self, ground: Ground, sinks: Sequence[Sink]) -> None:
        self._ground = ground
        self._register = register_of(ground)
        self._sinks = tuple(sinks)

    async def start(self) -> None:
        """Start the sinks."""
        for sink in self._sinks:
            await sink.start(self._ground)

    async def close(self) -> None:
        """End the sinks; the first error is raised when all were."""
        failures: list[Exception] = []
        for sink in self._sinks:
            try:
                await sink.close()
            except Exception as error:
                log.exception("closing sink %s failed", sink.name)
                failures.append(error)
        if failures:
            raise failures[0]

    async def tell(self, event: Event, found: Sequence[Discrepancy]) -> None:
        """To every sink."""
        now = time.time_ns() // 1_000_000
        namespace = self._ground.namespace
        documents = [Document(f"{namespace}-{each.number}-{event}", now, event, namespace, each) for each in found]
        for sink in self._sinks:
            if documents and not (await self._caught_up(sink) and await self._taken(sink, documents)):
                await self._register.post(sink.name, [each.fields() for each in documents])

    async def catch_up(self) -> bool:
        """Send what is waiting; whether nothing is left."""
        left = [sink.name for sink in self._sinks if not await self._caught_up(sink)]
        return not left

    async def _caught_up(self, sink: Sink) -> bool:
        while letters := await self._register.letters(sink.name, LETTERS):
            if not await self._taken(sink, [document(each) for _, each in letters]):
                return False
            await self._register.delivered([number for number, _ in letters])
        return True

    async def _taken(self, sink: Sink, documents: Sequence[Document]) -> bool:
        try:
            await sink.write(documents)
        except SinkRefused as error:
            log.error("sink %s refused documents for good, they are kept as %s%s: %s", sink.name, sink.name, REFUSED, error)
            self._ground.metrics.record(Happened("sink_refused", {"reason": sink.name}))
            await self._register.post(sink.name + REFUSED, [each.fields() for each in documents if each.id in error.ids])
        except Exception as error:  # noqa: BLE001 - a sink is somebody else's server or code; what it did not take is kept
            log.warning("sink %s did not take %d documents, they wait in the ledger: %s", sink.name, len(documents), error)
            self._ground.metrics.record(Happened("sink_away", {"reason": sink.name}))
            return False
        return True
