"""Where the SDK's numbers go: one Protocol, small frozen events, sinks for Prometheus, OpenTelemetry,
StatsD and for nowhere, and a fan-out."""

from __future__ import annotations

from inventory_sdk.metrics.events import (
    Alerting,
    Applied,
    BatchSent,
    Behind,
    Compared,
    Event,
    Governed,
    GrayRouted,
    GrayRules,
    Happened,
    HotspotsUsed,
    LaneUsed,
    Metrics,
    Published,
    Recalculated,
    Retried,
    Triggered,
)
from inventory_sdk.metrics.fanout import Fanout
from inventory_sdk.metrics.nothing import NoMetrics

__all__ = [
    "Alerting",
    "Applied",
    "BatchSent",
    "Behind",
    "Compared",
    "Event",
    "Fanout",
    "Governed",
    "GrayRouted",
    "GrayRules",
    "Happened",
    "HotspotsUsed",
    "LaneUsed",
    "Metrics",
    "NoMetrics",
    "Published",
    "Recalculated",
    "Retried",
    "Triggered",
]
