"""Events as OpenTelemetry metrics: ``inventory.`` and the names of ``series.py``. Needs the API only (extra ``otel``); which SDK
collects and exports them is the service's business.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from inventory_sdk.metrics.series import Series, all_series
from inventory_sdk.metrics.sink import SeriesSink, Write

if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions, Counter, Histogram, MeterProvider, Observation


class OpenTelemetryMetrics(SeriesSink):
    """A sink. ``meter_provider``: None is OpenTelemetry's global one. Gauges are observed when the SDK collects."""

    def __init__(self, meter_provider: MeterProvider | None = None) -> None:
        super().__init__()
        try:
            from opentelemetry import metrics
        except ImportError as error:
            raise ImportError("OpenTelemetryMetrics needs the extra otel: pip install 'inventory_sdk[otel]'") from error
        self._observation = metrics.Observation
        self._gauges: dict[Series, dict[tuple[str, ...], float]] = {}
        self._counters: dict[Series, Counter] = {}
        self._histograms: dict[Series, Histogram] = {}
        meter = metrics.get_meter("inventory_sdk", meter_provider=meter_provider)
        for series in all_series():
            name = f"inventory.{series.name}"
            if series.kind == "counter":
                self._counters[series] = meter.create_counter(name, series.unit or "1", series.what)
            elif series.kind == "gauge":
                self._gauges[series] = {}
                meter.create_observable_gauge(name, [partial(self._observed, series)], series.unit or "1", series.what)
            else:
                self._histograms[series] = meter.create_histogram(
                    name, series.unit, series.what, explicit_bucket_boundaries_advisory=series.buckets
                )

    def opened(self, series: Series, labels: tuple[str, ...]) -> Write:
        """One that carries its attributes along."""
        attributes = dict(zip(series.labels, labels, strict=True))
        if series.kind == "gauge":
            values = self._gauges[series]

            def keep(value: float) -> None:
                values[labels] = value

            return keep
        if series.kind == "counter":
            add = self._counters[series].add
            return lambda value: add(value, attributes)
        observe = self._histograms[series].record
        return lambda value: observe(value, attributes)

    def ended(self, series: Series, labels: tuple[str, ...]) -> bool:
        """It is not observed any more."""
        self._gauges[series].pop(labels, None)
        return True

    def _observed(self, series: Series, options: CallbackOptions) -> list[Observation]:
        """A gauge's values now; called from the thread that collects."""
        rows = self._gauges[series].copy()
        return [self._observation(value, dict(zip(series.labels, labels, strict=True))) for labels, value in rows.items()]
