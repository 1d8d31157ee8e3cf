"""Business alerts: rules over stock and operations, judged in the worker, told once to where somebody looks."""

from __future__ import annotations

from inventory_sdk.alerts.board import Alert, Silence
from inventory_sdk.alerts.rules import Drift, LedgerBehind, Queueing, RefusalRatio, Rule, ShadowMismatch, StockOut
from inventory_sdk.alerts.sinks import Sink, Webhook, to_log

__all__ = [
    "Alert",
    "Drift",
    "LedgerBehind",
    "Queueing",
    "RefusalRatio",
    "Rule",
    "ShadowMismatch",
    "Silence",
    "Sink",
    "StockOut",
    "Webhook",
    "to_log",
]
