"""What all sinks that measure have in common: events become samples of series, and labels stay few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Final

from inventory_sdk.metrics.events import Event
from inventory_sdk.metrics.series import TABLE, Sample, Series

MOST: Final = 1000
"""Label combinations of one series; further ones are counted together."""
TOP: Final = 20
"""Rows of a series that an event replaces as a whole: hot SKUs, merchants."""
OTHER: Final = "other"

Row = tuple[Series, tuple[str, ...]]
Write = Callable[[float], None]


class SeriesSink:
    """Reads events by ``TABLE``. A sink for a system of its own says how one labelled series is written (``opened``) and how it ends
    (``ended``). What it was given once is kept: to find it again costs one dictionary access. Event loops of several threads may share
    a sink."""

    def __init__(self) -> None:
        self._writes: dict[Row, Write] = {}
        self._counted: Counter[Series] = Counter()
        self._shown: set[Row] = set()
        self._opening = Lock()

    def opened(self, series: Series, labels: tuple[str, ...]) -> Write:
        """What adds to this counter, sets this gauge, or observes for this histogram."""
        raise NotImplementedError

    def ended(self, series: Series, labels: tuple[str, ...]) -> bool:
        """This row of a whole series is no more. False: the system can't forget it, so it is 0 from now on, and goes on counting as one of
        the rows that a series may have."""
        raise NotImplementedError

    def record(self, event: Event) -> None:
        """Measure it. An event without a series is none of a sink's business."""
        reading = TABLE.get(type(event))
        if reading is None:
            return
        samples: Iterable[Sample] = reading.read(event)
        if reading.whole:
            samples = self._replaced(samples, reading.whole)
        writes = self._writes
        for series, labels, value in samples:
            write = writes.get((series, labels))
            if write is None:
                write = self._open(series, labels)
            write(value)

    def _open(self, series: Series, labels: tuple[str, ...]) -> Write:
        with self._opening:
            return self._writes[self._placed(series, labels)]

    def _placed(self, series: Series, labels: tuple[str, ...]) -> Row:
        """The row that these labels are counted in; the lock is held."""
        row = series, labels
        if row not in self._writes:
            if self._counted[series] >= MOST:
                row = series, (OTHER,) * len(labels)
            if row not in self._writes:
                self._writes[row] = self.opened(*row)
                self._counted[series] += 1
        return row

    def _replaced(self, samples: Iterable[Sample], whole: tuple[Series, ...]) -> list[Sample]:
        kept: list[Sample] = []
        shown: set[Row] = set()
        with self._opening:
            for series, labels, value in samples:
                if series not in whole:
                    kept.append((series, labels, value))
                elif sum(row[0] is series for row in shown) < TOP:
                    row = self._placed(series, labels)
                    shown.add(row)
                    kept.append((*row, value))
            for row in self._shown - shown:
                if row[0] in whole:
                    if self.ended(*row):
                        del self._writes[row]
                        self._counted[row[0]] -= 1
                else:
                    shown.add(row)
            self._shown = shown
        return kept
