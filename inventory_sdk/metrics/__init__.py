"""Where the SDK's numbers go: one Protocol, small frozen events, sinks for Prometheus, OpenTelemetry,
StatsD and for nowhere, and a fan-out."""

from __future__ import annotations

from inventory_sdk.metrics.events import (
    Alerting,
    Applied,
    BatchSent,
    Behind,
    Compared,
    ComparisonsOverdue,
    Event,
    Governed,
    GrayRouted,
    GrayRules,
    GrayRulesRead,
    Happened,
    HotspotsUsed,
    LaneUsed,
    Metrics,
    PartitionOpen,
    PromotionsWaiting,
    Published,
    Recalculated,
    RecalculationsDue,
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
    "ComparisonsOverdue",
    "Event",
    "Fanout",
    "Governed",
    "GrayRouted",
    "GrayRules",
    "GrayRulesRead",
    "Happened",
    "HotspotsUsed",
    "LaneUsed",
    "Metrics",
    "NoMetrics",
    "PartitionOpen",
    "PromotionsWaiting",
    "Published",
    "Recalculated",
    "RecalculationsDue",
    "Retried",
    "Triggered",
]
