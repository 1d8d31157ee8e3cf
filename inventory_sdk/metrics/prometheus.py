"""Events as Prometheus series: base units, fixed names (``inventory_…``), labels with few values.

Several inventories in one process write to the same collectors; one collector set per registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from inventory_sdk.metrics.events import (
    Applied,
    BatchSent,
    Event,
    Governed,
    Happened,
    LaneUsed,
    Published,
    Recalculated,
    Retried,
    Triggered,
)

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LAG_SECONDS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
OPERATIONS: Final = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2000)


class _Collectors(NamedTuple):
    accepted: Counter
    refused: Counter
    replayed: Counter
    batch_operations: Histogram
    batch_seconds: Histogram
    published: Counter
    publish_failed: Counter
    publish_seconds: Histogram
    applied: Counter
    rejected: Counter
    duplicates: Counter
    redelivered: Counter
    apply_operations: Histogram
    apply_seconds: Histogram
    apply_lag: Histogram
    epoch: Gauge
    sequence: Gauge
    retries: Counter
    events: Counter
    lane_running: Gauge
    lane_waiting: Gauge
    lane_lent: Gauge
    lane_admitted: Counter
    lane_overdue: Counter
    lane_refused: Counter
    lane_wait_seconds: Histogram
    trigger_calls: Counter
    recalculations: Counter
    recalculation_calls: Counter
    recalculation_cpu: Counter
    recalculation_seconds: Histogram
    recalculation_wait: Histogram
    cpu_in_use: Gauge
    loop_lag: Gauge
    governor_share: Gauge


_made: WeakKeyDictionary[CollectorRegistry, _Collectors] = WeakKeyDictionary()
_making = Lock()


def _collectors(registry: CollectorRegistry) -> _Collectors:
    with _making:
        made = _made.get(registry)
        if made is None:
            made = _made[registry] = _make(registry)
        return made


def _make(registry: CollectorRegistry) -> _Collectors:
    def counter(name: str, what: str, labels: Sequence[str]) -> Counter:
        return Counter(f"inventory_{name}", what, labels, registry=registry)

    def gauge(name: str, what: str, labels: Sequence[str]) -> Gauge:
        return Gauge(f"inventory_{name}", what, labels, registry=registry)

    def histogram(name: str, what: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(f"inventory_{name}", what, labels, buckets=buckets, registry=registry)

    return _Collectors(
        accepted=counter("operations_accepted", "Operations that Redis accepted.", ["kind"]),
        refused=counter("operations_refused", "Operations that Redis refused; nothing moved.", ["reason"]),
        replayed=counter("operations_replayed", "Repeats that were answered with the first receipt.", ["lane"]),
        batch_operations=histogram("batch_operations", "Operations in one script call.", ["lane"], OPERATIONS),
        batch_seconds=histogram("batch_seconds", "Duration of one script call.", ["lane"], SECONDS),
        published=counter("entries_published", "Journal entries that the queue confirmed.", ["partition"]),
        publish_failed=counter("publish_failures", "Journal entries that the queue did not confirm.", ["partition", "reason"]),
        publish_seconds=histogram("publish_seconds", "Time until the queue confirmed an entry.", ["partition"], SECONDS),
        applied=counter("operations_applied", "Operations that the ledger committed.", ["partition"]),
        rejected=counter("operations_rejected", "Accepted operations that the ledger rejected (drift).", ["partition"]),
        duplicates=counter("operations_duplicate", "Accepted repeats that the ledger found and voided.", ["partition"]),
        redelivered=counter("entries_redelivered", "Journal entries that came again.", ["partition"]),
        apply_operations=histogram("apply_operations", "Operations in one ledger transaction.", ["partition"], OPERATIONS),
        apply_seconds=histogram("apply_seconds", "Duration of one ledger transaction.", ["partition"], SECONDS),
        apply_lag=histogram("apply_lag_seconds", "Age of an entry when the ledger committed it.", ["partition"], LAG_SECONDS),
        epoch=gauge("applied_epoch", "Epoch of the last journal entry in the ledger.", ["partition"]),
        sequence=gauge("applied_sequence", "Sequence, within its epoch, of the last journal entry in the ledger.", ["partition"]),
        retries=counter("retries", "Attempts that failed and were made again.", ["what", "reason"]),
        events=counter("events", "Happenings that may need somebody.", ["name", "partition", "reason"]),
        lane_running=gauge("lane_running", "Calls that run in a lane.", ["lane"]),
        lane_waiting=gauge("lane_waiting", "Calls that wait in line for a lane.", ["lane"]),
        lane_lent=gauge("lane_lent", "Slots of a lane that calls of other lanes use.", ["lane"]),
        lane_admitted=counter("lane_admitted", "Calls that a lane let in.", ["lane"]),
        lane_overdue=counter("lane_deadline_exceeded", "Calls that were ended by their deadline.", ["lane"]),
        lane_refused=counter("lane_refused", "Calls that a lane refused at its door.", ["lane", "reason"]),
        lane_wait_seconds=histogram("lane_wait_seconds", "Time that calls waited in line for a lane.", ["lane"], SECONDS),
        trigger_calls=counter("trigger_calls", "Calls that asked for a recalculation.", ["function", "trigger"]),
        recalculations=counter("recalculations", "Runs of a coalesced function.", ["function", "outcome"]),
        recalculation_calls=counter("recalculation_calls", "Requests that runs answered.", ["function"]),
        recalculation_cpu=counter("recalculation_cpu_seconds", "CPU time of runs.", ["function"]),
        recalculation_seconds=histogram("recalculation_seconds", "Duration of a run.", ["function"], LAG_SECONDS),
        recalculation_wait=histogram("recalculation_wait_seconds", "From the first request to its run.", ["function"], LAG_SECONDS),
        cpu_in_use=gauge("cpu_in_use_ratio", "Share of the CPU in use, as the governor sees it.", []),
        loop_lag=gauge("loop_lag_seconds", "Lateness of the event loop, smoothed.", []),
        governor_share=gauge("governor_share_ratio", "What the governor lets redistribution or a lane use of its own.", ["what"]),
    )


class PrometheusMetrics:
    """The default sink. ``registry`` is prometheus_client's global one unless another is given.

    Labelled children are made once per label value and kept: finding one costs a dictionary access."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self._all = _collectors(registry if registry is not None else REGISTRY)
        self._batches: dict[str, tuple[Counter, Histogram, Histogram]] = {}
        self._accepted: dict[str, Counter] = {}
        self._refused: dict[str, Counter] = {}
        self._publishing: dict[int, tuple[Counter, Histogram]] = {}
        self._publish_failed: dict[tuple[int, str], Counter] = {}
        self._applying: dict[int, _Applying] = {}
        self._retries: dict[tuple[str, str], Counter] = {}
        self._events: dict[tuple[str, str, str], Counter] = {}
        self._lanes: dict[str, _LaneChildren] = {}

    def record(self, event: Event) -> None:
        """Count it."""
        if isinstance(event, BatchSent):
            self._batch(event)
        elif isinstance(event, Published):
            self._published(event)
        elif isinstance(event, Applied):
            self._applied(event)
        elif isinstance(event, Retried):
            key = (event.what, event.reason)
            retries = self._retries.get(key)
            if retries is None:
                retries = self._retries[key] = self._all.retries.labels(*key)
            retries.inc()
        elif isinstance(event, LaneUsed):
            self._lane(event)
        elif isinstance(event, Happened):
            self._happened(event)
        elif isinstance(event, Triggered | Recalculated):
            self._redistributed(event)
        elif isinstance(event, Governed):
            self._governed(event)

    def _batch(self, event: BatchSent) -> None:
        lane = self._batches.get(event.lane)
        if lane is None:
            lane = self._batches[event.lane] = (
                self._all.replayed.labels(event.lane),
                self._all.batch_operations.labels(event.lane),
                self._all.batch_seconds.labels(event.lane),
            )
        replayed, operations, seconds = lane
        operations.observe(event.operations)
        seconds.observe(event.seconds)
        if event.replayed:
            replayed.inc(event.replayed)
        for kind, count in event.accepted.items():
            accepted = self._accepted.get(kind)
            if accepted is None:
                accepted = self._accepted[kind] = self._all.accepted.labels(kind)
            accepted.inc(count)
        for reason, count in event.refused.items():
            refused = self._refused.get(reason)
            if refused is None:
                refused = self._refused[reason] = self._all.refused.labels(reason)
            refused.inc(count)

    def _published(self, event: Published) -> None:
        if event.failed is not None:
            key = (event.partition, event.failed)
            failed = self._publish_failed.get(key)
            if failed is None:
                failed = self._publish_failed[key] = self._all.publish_failed.labels(*key)
            failed.inc()
            return
        children = self._publishing.get(event.partition)
        if children is None:
            children = self._publishing[event.partition] = (
                self._all.published.labels(event.partition),
                self._all.publish_seconds.labels(event.partition),
            )
        children[0].inc()
        children[1].observe(event.seconds)

    def _applied(self, event: Applied) -> None:
        children = self._applying.get(event.partition)
        if children is None:
            made = self._all
            children = self._applying[event.partition] = _Applying(
                applied=made.applied.labels(event.partition),
                rejected=made.rejected.labels(event.partition),
                duplicates=made.duplicates.labels(event.partition),
                redelivered=made.redelivered.labels(event.partition),
                operations=made.apply_operations.labels(event.partition),
                seconds=made.apply_seconds.labels(event.partition),
                lag=made.apply_lag.labels(event.partition),
                epoch=made.epoch.labels(event.partition),
                sequence=made.sequence.labels(event.partition),
            )
        children.applied.inc(event.operations)
        children.rejected.inc(event.rejected)
        children.duplicates.inc(event.duplicates)
        children.redelivered.inc(event.redelivered)
        children.operations.observe(event.operations)
        children.seconds.observe(event.seconds)
        children.lag.observe(event.lag_seconds)
        children.epoch.set(event.epoch)
        children.sequence.set(event.sequence)

    def _lane(self, event: LaneUsed) -> None:
        children = self._lanes.get(event.lane)
        if children is None:
            made = self._all
            children = self._lanes[event.lane] = _LaneChildren(
                running=made.lane_running.labels(event.lane),
                waiting=made.lane_waiting.labels(event.lane),
                lent=made.lane_lent.labels(event.lane),
                admitted=made.lane_admitted.labels(event.lane),
                overdue=made.lane_overdue.labels(event.lane),
                wait_seconds=made.lane_wait_seconds.labels(event.lane),
            )
        children.running.set(event.running)
        children.waiting.set(event.waiting)
        children.lent.set(event.lent)
        children.admitted.inc(event.admitted)
        children.overdue.inc(event.overdue)
        for seconds in event.waits:
            children.wait_seconds.observe(seconds)
        for reason, count in event.refused.items():
            self._all.lane_refused.labels(event.lane, reason).inc(count)

    def _redistributed(self, event: Triggered | Recalculated) -> None:
        made, function = self._all, event.function
        if isinstance(event, Triggered):
            for trigger, calls in event.calls.items():
                made.trigger_calls.labels(function, trigger).inc(calls)
            return
        made.recalculations.labels(function, event.outcome).inc()
        made.recalculation_cpu.labels(function).inc(event.cpu_seconds)
        made.recalculation_seconds.labels(function).observe(event.seconds)
        if event.outcome in ("done", "failed", "cut_off"):
            made.recalculation_calls.labels(function).inc(event.calls)
            made.recalculation_wait.labels(function).observe(event.waited_seconds)

    def _governed(self, event: Governed) -> None:
        self._all.cpu_in_use.set(event.cpu)
        self._all.loop_lag.set(event.lag_seconds)
        for what, share in event.shares.items():
            self._all.governor_share.labels(what).set(share)

    def _happened(self, event: Happened) -> None:
        labels = event.labels
        key = (event.name, labels.get("partition", ""), labels.get("reason") or labels.get("why") or labels.get("task", ""))
        events = self._events.get(key)
        if events is None:
            events = self._events[key] = self._all.events.labels(*key)
        events.inc()


class _Applying(NamedTuple):
    applied: Counter
    rejected: Counter
    duplicates: Counter
    redelivered: Counter
    operations: Histogram
    seconds: Histogram
    lag: Histogram
    epoch: Gauge
    sequence: Gauge


class _LaneChildren(NamedTuple):
    running: Gauge
    waiting: Gauge
    lent: Gauge
    admitted: Counter
    overdue: Counter
    wait_seconds: Histogram
