"""What all sinks that measure have in common: events become samples of series, and labels stay few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from inventory_sdk.metrics.events import Event
from inventory_sdk.metrics.series import TABLE, Sample, Series

MOST: Final = 1000
"""Label combinations of one series; further ones are counted together."""
TOP: Final = 20
"""Rows of a series that an event replaces as a whole: hot SKUs, merchants."""
OTHER: Final = "other"

Write = Callable[[float], None]


class SeriesSink:
    """Reads events by ``TABLE``. A sink for a system of its own says how one labelled series is written (``opened``) and, where the
    system can do so, how it ends (``ended``). What it was given once is kept: to find it again costs one dictionary access."""

    def __init__(self) -> None:
        self._writes: dict[tuple[Series, tuple[str, ...]], Write] = {}
        self._counted: Counter[Series] = Counter()

    def opened(self, series: Series, labels: tuple[str, ...]) -> Write:
        """What adds to this counter, sets this gauge, or observes for this histogram."""
        raise NotImplementedError

    def ended(self, series: Series, labels: tuple[str, ...]) -> None:
        """This row of a whole series is no more."""

    def record(self, event: Event) -> None:
        """Measure it. An event without a series is none of a sink's business."""
        reading = TABLE.get(type(event))
        if reading is None:
            return
        samples: Iterable[Sample] = reading.read(event)
        if reading.whole:
            samples = self._replaced(list(samples), reading.whole)
        writes = self._writes
        for series, labels, value in samples:
            write = writes.get((series, labels))
            if write is None:
                write = self._open(series, labels)
            write(value)

    def _open(self, series: Series, labels: tuple[str, ...]) -> Write:
        if self._counted[series] >= MOST:
            labels = (OTHER,) * len(labels)
            known = self._writes.get((series, labels))
            if known is not None:
                return known
        self._counted[series] += 1
        write = self._writes[series, labels] = self.opened(series, labels)
        return write

    def _replaced(self, samples: list[Sample], whole: tuple[Series, ...]) -> list[Sample]:
        kept: list[Sample] = []
        rows: Counter[Series] = Counter()
        for sample in samples:
            if sample[0] in whole:
                rows[sample[0]] += 1
                if rows[sample[0]] > TOP:
                    continue
            kept.append(sample)
        now = {(series, labels) for series, labels, _ in kept}
        for key in [key for key in self._writes if key[0] in whole and key not in now]:
            del self._writes[key]
            self._counted[key[0]] -= 1
            self.ended(*key)
        return kept
