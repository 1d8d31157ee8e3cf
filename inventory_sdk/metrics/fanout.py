"""Several sinks as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from inventory_sdk.metrics.events import Event, Metrics

log = logging.getLogger("inventory_sdk.metrics")


class Fanout:
    """Hands every event to every sink, in order. A sink that raises is logged once and goes on getting events; the others and
    the caller don't notice."""

    def __init__(self, sinks: Sequence[Metrics]) -> None:
        self._sinks = tuple(sinks)
        self._complained: set[int] = set()

    def record(self, event: Event) -> None:
        """Pass it on; doesn't raise."""
        for index, sink in enumerate(self._sinks):
            try:
                sink.record(event)
            except Exception:
                if index not in self._complained:
                    self._complained.add(index)
                    log.exception("metrics sink %r failed; further failures of it are not logged", sink)
