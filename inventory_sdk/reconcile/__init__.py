"""Comparison of Redis, the ledger and the service's own tables, while sales go on; causes, records, corrections."""

from __future__ import annotations

from inventory_sdk.reconcile.model import Audit, Cause, Comparison, Correction, Discrepancy, Reconcile
from inventory_sdk.reconcile.sinks.elasticsearch import ElasticsearchSink
from inventory_sdk.reconcile.sinks.log import LogSink
from inventory_sdk.reconcile.sinks.protocol import Document, Sink, SinkAway, SinkRefused

__all__ = [
    "Audit",
    "Cause",
    "Comparison",
    "Correction",
    "Discrepancy",
    "Document",
    "ElasticsearchSink",
    "LogSink",
    "Reconcile",
    "Sink",
    "SinkAway",
    "SinkRefused",
]
