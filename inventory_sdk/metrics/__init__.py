"""Where the SDK's numbers go: one Protocol, small frozen events, sinks for Prometheus and for nowhere, and a fan-out."""

from __future__ import annotations

from inventory_sdk.metrics.events import Applied, BatchSent, Event, Happened, HotspotsUsed, LaneUsed, Metrics, Published, Retried
from inventory_sdk.metrics.fanout import Fanout
from inventory_sdk.metrics.nothing import NoMetrics

__all__ = [
    "Applied",
    "BatchSent",
    "Event",
    "Fanout",
    "Happened",
    "HotspotsUsed",
    "LaneUsed",
    "Metrics",
    "NoMetrics",
    "Published",
    "Retried",
]
