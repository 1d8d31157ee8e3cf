"""What there is to measure, once for all sinks: the series, and how each event is read into them.

A new event is one row of ``TABLE`` (and its series above it); no sink has to know it. Base units, names without the sink's prefix,
labels with few values: a SKU or a merchant is only ever a label of a ``whole`` series, which an event replaces with its few rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from inventory_sdk.metrics.events import (
    Alerting,
    Applied,
    BatchSent,
    Behind,
    Compared,
    ComparisonsOverdue,
    DiscrepanciesOpen,
    Governed,
    GrayRouted,
    GrayRules,
    GrayRulesRead,
    Happened,
    HotspotsUsed,
    LaneUsed,
    PartitionOpen,
    PromotionsWaiting,
    Published,
    Recalculated,
    RecalculationsDue,
    Retried,
    Triggered,
)

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LAG_SECONDS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
COUNTS: Final = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2000)

Across = Literal["livesum", "livemin", "livemax", "livemostrecent"]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One name with its labels. ``unit`` is its base unit (``s`` or a word; counts have none). ``across``: what several processes'
    gauges of one name make together (prometheus_client's multiprocess mode)."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    what: str
    labels: tuple[str, ...]
    unit: str = ""
    buckets: tuple[float, ...] = ()
    across: Across = "livesum"


Sample = tuple[Series, tuple[str, ...], float]
"""Series, label values (as its ``labels``), value: added to a counter, set on a gauge, observed by a histogram."""


class Reading(NamedTuple):
    """How one kind of event is read. ``whole``: series of which each such event brings all rows: others are gone."""

    read: Callable[[Any], Iterable[Sample]]
    whole: tuple[Series, ...] = ()


def _counter(name: str, what: str, *labels: str, unit: str = "") -> Series:
    return Series(name, "counter", what, labels, unit)


def _gauge(name: str, what: str, *labels: str, unit: str = "", across: Across = "livesum") -> Series:
    return Series(name, "gauge", what, labels, unit, across=across)


def _histogram(name: str, what: str, *labels: str, unit: str = "s", buckets: tuple[float, ...] = SECONDS) -> Series:
    return Series(name, "histogram", what, labels, unit, buckets)


ACCEPTED = _counter("operations_accepted", "Operations that Redis accepted.", "kind")
REFUSED = _counter("operations_refused", "Operations that Redis refused; nothing moved.", "reason")
REPLAYED = _counter("operations_replayed", "Repeats that were answered with the first receipt.", "lane")
BATCH_OPERATIONS = _histogram("batch_operations", "Operations in one script call.", "lane", unit="{operation}", buckets=COUNTS)
BATCH_SECONDS = _histogram("batch_seconds", "Duration of one script call.", "lane")


def _batch(event: BatchSent) -> Iterator[Sample]:
    lane = (event.lane,)
    yield BATCH_OPERATIONS, lane, event.operations
    yield BATCH_SECONDS, lane, event.seconds
    if event.replayed:
        yield REPLAYED, lane, event.replayed
    for kind, count in event.accepted.items():
        yield ACCEPTED, (kind,), count
    for reason, count in event.refused.items():
        yield REFUSED, (reason,), count


PUBLISHED = _counter("entries_published", "Journal entries that the queue confirmed.", "partition")
PUBLISH_FAILED = _counter("publish_failures", "Journal entries that the queue did not confirm.", "partition", "reason")
PUBLISH_SECONDS = _histogram("publish_seconds", "Time until the queue confirmed an entry.", "partition")


def _published(event: Published) -> Iterator[Sample]:
    partition = str(event.partition)
    if event.failed is not None:
        yield PUBLISH_FAILED, (partition, event.failed), 1
        return
    yield PUBLISHED, (partition,), 1
    yield PUBLISH_SECONDS, (partition,), event.seconds


APPLIED = _counter("operations_applied", "Operations that the ledger committed.", "partition")
REJECTED = _counter("operations_rejected", "Accepted operations that the ledger rejected (drift).", "partition")
DUPLICATE = _counter("operations_duplicate", "Accepted repeats that the ledger found and voided.", "partition")
REDELIVERED = _counter("entries_redelivered", "Journal entries that came again.", "partition")
APPLY_OPERATIONS = _histogram("apply_operations", "Operations in one ledger transaction.", "partition", unit="{operation}", buckets=COUNTS)
APPLY_SECONDS = _histogram("apply_seconds", "Duration of one ledger transaction.", "partition")
APPLY_LAG = _histogram("apply_lag_seconds", "Age of an entry when the ledger committed it.", "partition", buckets=LAG_SECONDS)
EPOCH = _gauge("applied_epoch", "Epoch of the last journal entry in the ledger.", "partition", across="livemax")
SEQUENCE = _gauge("applied_sequence", "Sequence, within its epoch, of the last entry in the ledger.", "partition", across="livemostrecent")


def _applied(event: Applied) -> Iterator[Sample]:
    partition = (str(event.partition),)
    yield APPLIED, partition, event.operations
    yield REJECTED, partition, event.rejected
    yield DUPLICATE, partition, event.duplicates
    yield REDELIVERED, partition, event.redelivered
    yield APPLY_OPERATIONS, partition, event.operations
    yield APPLY_SECONDS, partition, event.seconds
    yield APPLY_LAG, partition, event.lag_seconds
    yield EPOCH, partition, event.epoch
    yield SEQUENCE, partition, event.sequence


BEHIND_ENTRIES = _gauge("behind_entries", "Journal entries that the ledger has not applied yet.", "partition", across="livemostrecent")
BEHIND_OPERATIONS = _gauge("behind_operations", "Operations that the ledger has not applied yet.", "partition", across="livemostrecent")
BEHIND_SECONDS = _gauge(
    "behind_seconds", "Age of the oldest entry that the ledger has not applied yet.", "partition", unit="s", across="livemostrecent"
)
JOURNAL_ENTRIES = _gauge("journal_entries", "Entries that Redis keeps, applied ones too.", "partition", across="livemostrecent")


def _behind(event: Behind) -> Iterator[Sample]:
    partition = (str(event.partition),)
    yield BEHIND_ENTRIES, partition, event.entries
    yield BEHIND_OPERATIONS, partition, event.operations
    yield BEHIND_SECONDS, partition, event.seconds
    yield JOURNAL_ENTRIES, partition, event.journal


PARTITION_OPEN = _gauge(
    "partition_open", "1 while a partition sells, 0 while it is frozen or rebuilt.", "partition", across="livemostrecent"
)


def _partition_open(event: PartitionOpen) -> Iterator[Sample]:
    yield PARTITION_OPEN, (str(event.partition),), int(event.open)


RETRIES = _counter("retries", "Attempts that failed and were made again.", "what", "reason")
EVENTS = _counter("events", "Happenings that may need somebody.", "name", "partition", "reason")


_REASONS: Final = ("reason", "why", "status", "task", "function", "queue")
"""Labels of a happening, the first that it has is its reason."""


def _retried(event: Retried) -> Iterator[Sample]:
    yield RETRIES, (event.what, event.reason), 1


def _happened(event: Happened) -> Iterator[Sample]:
    labels = event.labels
    reason = next((labels[name] for name in _REASONS if labels.get(name)), "")
    yield EVENTS, (event.name, labels.get("partition", ""), reason), 1


LANE_RUNNING = _gauge("lane_running", "Calls that run in a lane.", "lane")
LANE_WAITING = _gauge("lane_waiting", "Calls that wait in line for a lane.", "lane")
LANE_LENT = _gauge("lane_lent", "Slots of a lane that calls of other lanes use.", "lane")
LANE_ADMITTED = _counter("lane_admitted", "Calls that a lane let in.", "lane")
LANE_OVERDUE = _counter("lane_deadline_exceeded", "Calls that were ended by their deadline.", "lane")
LANE_REFUSED = _counter("lane_refused", "Calls that a lane refused at its door.", "lane", "reason")
LANE_WAIT = _histogram("lane_wait_seconds", "Time that calls waited in line for a lane.", "lane")


def _lane(event: LaneUsed) -> Iterator[Sample]:
    lane = (event.lane,)
    yield LANE_RUNNING, lane, event.running
    yield LANE_WAITING, lane, event.waiting
    yield LANE_LENT, lane, event.lent
    yield LANE_ADMITTED, lane, event.admitted
    yield LANE_OVERDUE, lane, event.overdue
    for seconds in event.waits:
        yield LANE_WAIT, lane, seconds
    for reason, count in event.refused.items():
        yield LANE_REFUSED, (event.lane, reason), count


HOT_KEYS = _gauge("hotspot_keys", "Keys that are hot.", across="livemax")
HOT_WAITING = _gauge("hotspot_waiting", "Calls that wait for the pace of a hot key.")
HOT_ALONE = _gauge("hotspot_alone", "Hot keys whose rate this process keeps alone, because Redis does not answer.", across="livemax")
HOT_RATE = _gauge(
    "hotspot_rate", "Calls per second of the hottest keys, at most ten, over all processes.", "merchant", "sku", across="livemax"
)
HOT_ADMITTED = _counter("hotspot_admitted", "Calls of hot keys that were let in.")
HOT_REFUSED = _counter("hotspot_refused", "Calls of hot keys that were refused.", "reason")
HOT_LEASES = _counter("hotspot_leases", "Requests for a part of the shared rate.", "outcome")
HOT_WAIT = _histogram("hotspot_wait_seconds", "Time that calls waited for the pace of a hot key.")


def _hotspots(event: HotspotsUsed) -> Iterator[Sample]:
    yield HOT_KEYS, (), event.hot
    yield HOT_WAITING, (), event.waiting
    yield HOT_ALONE, (), event.alone
    yield HOT_ADMITTED, (), event.admitted
    for seconds in event.waits:
        yield HOT_WAIT, (), seconds
    for reason, count in event.refused.items():
        yield HOT_REFUSED, (reason,), count
    for outcome, count in event.leases.items():
        yield HOT_LEASES, (outcome,), count
    for merchant, sku, rate in event.top:
        yield HOT_RATE, (merchant, sku), rate


PROMOTION_WAITING = _gauge("promotion_waiting", "SKUs that should be sold elsewhere and could not be moved.", "to", across="livemax")


def _promotions_waiting(event: PromotionsWaiting) -> Iterator[Sample]:
    yield PROMOTION_WAITING, ("redis",), event.to_redis
    yield PROMOTION_WAITING, ("database",), event.to_database


GRAY_CALLS = _counter("gray_calls", "Calls that went through a gray link to one of its sides.", "link", "variant")
GRAY_ERRORS = _counter("gray_errors", "Those of them that raised.", "link", "variant")
GRAY_SECONDS = _counter("gray_seconds", "Seconds that they took together.", "link", "variant", unit="s")
GRAY_VERSION = _gauge("gray_rules_version", "Version of the rules that this process goes by.", "link", across="livemostrecent")
GRAY_PERCENTAGE = _gauge(
    "gray_percentage", "Percentage of merchants that the rules send to the candidate.", "link", across="livemostrecent"
)
GRAY_KILLED = _gauge("gray_killed", "1 while everybody is on the stable side.", "link", across="livemostrecent")
GRAY_RULES_AGE = _gauge(
    "gray_rules_age_seconds", "Time since a process last saw the gray links' rules as they stand in Redis.", unit="s", across="livemax"
)
GRAY_PAUSED = _gauge("gray_paused", "1 while the percentage may not be raised.", "link", across="livemostrecent")


def _gray_routed(event: GrayRouted) -> Iterator[Sample]:
    side = (event.link, event.variant)
    yield GRAY_CALLS, side, event.calls
    yield GRAY_ERRORS, side, event.errors
    yield GRAY_SECONDS, side, event.seconds


def _gray_rules(event: GrayRules) -> Iterator[Sample]:
    link = (event.link,)
    yield GRAY_VERSION, link, event.version
    yield GRAY_PERCENTAGE, link, event.percentage
    yield GRAY_KILLED, link, int(event.killed)
    yield GRAY_PAUSED, link, int(event.paused)


def _gray_rules_read(event: GrayRulesRead) -> Iterator[Sample]:
    yield GRAY_RULES_AGE, (), event.age_seconds


COMPARED_SKUS = _counter("compared_skus", "SKUs whose Redis counters were compared with the ledger.", "scope")
COMPARED_HOLDS = _counter("compared_holds", "Reservations that were compared.", "scope")
COMPARISON_SECONDS = _histogram("comparison_seconds", "Duration of a comparison.", "scope", buckets=LAG_SECONDS)
DISCREPANCIES = _gauge("discrepancies_open", "Discrepancies that are open.", "cause", across="livemostrecent")


def _compared(event: Compared) -> Iterator[Sample]:
    scope = (event.scope,)
    yield COMPARED_SKUS, scope, event.skus
    yield COMPARED_HOLDS, scope, event.holds
    yield COMPARISON_SECONDS, scope, event.seconds
    for cause, count in event.open.items():
        yield DISCREPANCIES, (cause,), count


COMPARISON_OVERDUE = _gauge(
    "comparison_overdue_seconds", "Time since a scheduled comparison should have been made.", "scope", unit="s", across="livemin"
)


def _discrepancies(event: DiscrepanciesOpen) -> Iterator[Sample]:
    for cause, count in event.open.items():
        yield DISCREPANCIES, (cause,), count


def _comparisons_overdue(event: ComparisonsOverdue) -> Iterator[Sample]:
    for scope, seconds in event.seconds.items():
        yield COMPARISON_OVERDUE, (scope,), seconds


TRIGGER_CALLS = _counter("trigger_calls", "Calls that asked for a recalculation.", "function", "trigger")
RECALCULATIONS = _counter("recalculations", "Runs of a coalesced function.", "function", "outcome")
RECALCULATION_CALLS = _counter("recalculation_calls", "Requests that runs answered.", "function")
RECALCULATION_CPU = _counter("recalculation_cpu_seconds", "CPU time of runs.", "function", unit="s")
RECALCULATION_SECONDS = _histogram("recalculation_seconds", "Duration of a run.", "function", buckets=LAG_SECONDS)
RECALCULATION_WAIT = _histogram("recalculation_wait_seconds", "From the first request to its run.", "function", buckets=LAG_SECONDS)
RECALCULATIONS_DUE = _gauge("recalculations_due", "Keys that are due and that nobody calculates.", "function", across="livemostrecent")
RECALCULATION_OVERDUE = _gauge(
    "recalculation_overdue_seconds", "How long the longest overdue key is due.", "function", unit="s", across="livemostrecent"
)
CPU_IN_USE = _gauge("cpu_in_use_ratio", "Share of the CPU in use, as the governor sees it.", across="livemax")
LOOP_LAG = _gauge("loop_lag_seconds", "Lateness of the event loop, smoothed.", unit="s", across="livemax")
GOVERNOR_SHARE = _gauge(
    "governor_share_ratio", "What the governor lets redistribution or a lane use of its own.", "what", across="livemostrecent"
)


def _triggered(event: Triggered) -> Iterator[Sample]:
    for trigger, calls in event.calls.items():
        yield TRIGGER_CALLS, (event.function, trigger), calls


def _recalculated(event: Recalculated) -> Iterator[Sample]:
    function = (event.function,)
    yield RECALCULATIONS, (event.function, event.outcome), 1
    yield RECALCULATION_CPU, function, event.cpu_seconds
    yield RECALCULATION_SECONDS, function, event.seconds
    if event.outcome in ("done", "failed", "cut_off"):
        yield RECALCULATION_CALLS, function, event.calls
        yield RECALCULATION_WAIT, function, event.waited_seconds


def _recalculations_due(event: RecalculationsDue) -> Iterator[Sample]:
    yield RECALCULATIONS_DUE, (event.function,), event.keys
    yield RECALCULATION_OVERDUE, (event.function,), event.overdue_seconds


def _governed(event: Governed) -> Iterator[Sample]:
    yield CPU_IN_USE, (), event.cpu
    yield LOOP_LAG, (), event.lag_seconds
    for what, share in event.shares.items():
        yield GOVERNOR_SHARE, (what,), share


ALERTS_FIRING = _gauge("alerts_firing", "Business alerts that fire now.", "rule", across="livemostrecent")


def _alerting(event: Alerting) -> Iterator[Sample]:
    for rule, count in event.firing.items():
        yield ALERTS_FIRING, (rule,), count


TABLE: Final[dict[type[Any], Reading]] = {
    BatchSent: Reading(_batch),
    Published: Reading(_published),
    Applied: Reading(_applied),
    Behind: Reading(_behind),
    PartitionOpen: Reading(_partition_open),
    Retried: Reading(_retried),
    Happened: Reading(_happened),
    LaneUsed: Reading(_lane),
    HotspotsUsed: Reading(_hotspots, (HOT_RATE,)),
    GrayRouted: Reading(_gray_routed),
    GrayRules: Reading(_gray_rules),
    GrayRulesRead: Reading(_gray_rules_read),
    PromotionsWaiting: Reading(_promotions_waiting),
    Compared: Reading(_compared),
    DiscrepanciesOpen: Reading(_discrepancies),
    ComparisonsOverdue: Reading(_comparisons_overdue),
    Triggered: Reading(_triggered),
    Recalculated: Reading(_recalculated),
    RecalculationsDue: Reading(_recalculations_due),
    Governed: Reading(_governed),
    Alerting: Reading(_alerting),
}
"""Every event that has a series."""


def all_series() -> list[Series]:
    """In the order in which they stand in this file."""
    return [value for value in globals().values() if isinstance(value, Series)]
