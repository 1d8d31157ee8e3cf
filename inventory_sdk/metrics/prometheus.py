"""Events as Prometheus series: ``inventory_`` and the names of ``series.py``.

Several inventories in one process write to the same collectors; one collector set per registry. In prometheus_client's multiprocess
mode (``PROMETHEUS_MULTIPROC_DIR``) each gauge says what its processes' values make together.
"""

from __future__ import annotations

import os
from threading import Lock
from typing import Final
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from inventory_sdk.metrics.series import TABLE, Series, all_series
from inventory_sdk.metrics.sink import SeriesSink, Write

Collector = Counter | Gauge | Histogram

WHOLE: Final = {series for reading in TABLE.values() for series in reading.whole}

_made: WeakKeyDictionary[CollectorRegistry, dict[Series, Collector]] = WeakKeyDictionary()
_making = Lock()


def _collectors(registry: CollectorRegistry) -> dict[Series, Collector]:
    with _making:
        made = _made.get(registry)
        if made is None:
            made = _made[registry] = {series: _make(series, registry) for series in all_series()}
        return made


def _make(series: Series, registry: CollectorRegistry) -> Collector:
    name = f"inventory_{series.name}"
    if series.kind == "counter":
        return Counter(name, series.what, series.labels, registry=registry)
    if series.kind == "gauge":
        return Gauge(name, series.what, series.labels, registry=registry, multiprocess_mode=series.across)
    return Histogram(name, series.what, series.labels, buckets=series.buckets, registry=registry)


class PrometheusMetrics(SeriesSink):
    """The default sink. ``registry`` is prometheus_client's global one unless another is given."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        super().__init__()
        self._all = _collectors(registry if registry is not None else REGISTRY)

    def opened(self, series: Series, labels: tuple[str, ...]) -> Write:
        """The labelled child's own method."""
        collector = self._all[series]
        if isinstance(collector, Gauge) and series in WHOLE:
            # Another sink on this registry may have ended the row: a child that was kept would be written to and not be seen.
            return lambda value: collector.labels(*labels).set(value)
        child = collector.labels(*labels) if labels else collector
        if isinstance(child, Counter):
            return child.inc
        return child.set if isinstance(child, Gauge) else child.observe

    def ended(self, series: Series, labels: tuple[str, ...]) -> bool:
        """Forget the child; files that several processes share can't forget, so there it becomes 0."""
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            self._writes[series, labels](0)
            return False
        self._all[series].remove(*labels)
        return True
