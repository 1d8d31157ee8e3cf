"""Several sinks as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from inventory_sdk.metrics.events import Event, Happened, Metrics

log = logging.getLogger("inventory_sdk.metrics")


class Fanout:
    """Hands every event to every sink, in order. A sink that raises goes on getting events; neither the caller nor the other sinks
    notice, but those count it: ``metrics_sink_failed``, with the sink's class as the reason. ``failures``: by the sink's place.
    It is logged at the first, the second, the fourth, … failure."""

    def __init__(self, sinks: Sequence[Metrics]) -> None:
        self._sinks = tuple(sinks)
        self.failures = [0] * len(self._sinks)

    def record(self, event: Event) -> None:
        """Pass it on; doesn't raise."""
        for index, sink in enumerate(self._sinks):
            try:
                sink.record(event)
            except Exception as error:  # noqa: BLE001 - whatever it is: measuring must not hurt selling
                self._failed(index, error)

    def _failed(self, index: int, error: Exception) -> None:
        name = type(self._sinks[index]).__name__
        self.failures[index] += 1
        if (count := self.failures[index]) & (count - 1) == 0:
            log.error("metrics sink %s failed (%d times by now), it goes on getting events", name, count, exc_info=error)
        told = Happened("metrics_sink_failed", {"reason": name})
        for other, sink in enumerate(self._sinks):
            if other != index:
                try:
                    sink.record(told)
                except Exception:  # noqa: BLE001 - it failed of the event itself, too, or will: that is where it is counted
                    self.failures[other] += 1
