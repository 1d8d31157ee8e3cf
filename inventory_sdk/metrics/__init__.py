"""Where the SDK's numbers go: one Protocol, small frozen events, sinks for Prometheus and for nowhere, and a fan-out."""

from __future__ import annotations

from inventory_sdk.metrics.events import (
    Applied,
    BatchSent,
    Event,
    Governed,
    Happened,
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
    "Applied",
    "BatchSent",
    "Event",
    "Fanout",
    "Governed",
    "Happened",
    "LaneUsed",
    "Metrics",
    "NoMetrics",
    "Published",
    "Recalculated",
    "Retried",
    "Triggered",
]
