"""What the SDK tells its metrics: small frozen events, one Protocol that receives them.

A sink must not raise and must not block: it is called from the hot path, once per batch and not once per call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class BatchSent:
    """One script call: how many operations it carried, what became of them, how long it took (seconds)."""

    partition: int
    lane: str
    operations: int
    accepted: Mapping[str, int]
    """Operations accepted, by kind."""
    refused: Mapping[str, int]
    """Operations refused, by reason (``insufficient``, ``conflict``, ``closed``, …)."""
    replayed: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Published:
    """One journal entry confirmed by the queue (``failed``: the reason why not; the worker will read it from the journal)."""

    partition: int
    seconds: float
    failed: str | None = None


@dataclass(frozen=True, slots=True)
class Applied:
    """One ledger transaction: operations it wrote, refused and voided; lag of its newest operation in seconds."""

    partition: int
    epoch: int
    sequence: int
    operations: int
    rejected: int
    duplicates: int
    redelivered: int
    lag_seconds: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Retried:
    """Something failed and is tried again; ``what`` is a fixed name (``redis``, ``publish``, ``ledger``, ``task``, …)."""

    what: str
    reason: str


@dataclass(frozen=True, slots=True)
class Happened:
    """Something worth counting and maybe an alert. ``name`` is one of

    ``frozen``, ``recovered``, ``refused``, ``lost``, ``late_entry``, ``fork``, ``unreadable``, ``part_waits`` (a partition);
    ``rejected``, ``duplicate``, ``writes_stock_failed``, ``announce_failed``, ``stale`` (operations and holds);
    ``dead_letter``, ``task_died``, ``background_failed``; ``mismatch``; ``drift``, ``sink_away``, ``sink_refused`` (comparisons);
    ``hotspot_heated``, ``hotspot_cooled``, ``promoted``, ``demoted``; ``gray_guard``, ``gray_admission``, ``gray_brought_back``,
    ``gray_unreadable``, ``gray_baggage_unreadable``, ``gray_attributes_failed``, ``gray_snapshot_failed``;
    ``recalculation_failed``, ``recalculation_cut_off``, ``recalculation_stuck``, ``recalculation_lease_lost``,
    ``recalculation_taken_over``; ``metrics_sink_failed``.

    Labels have few values: partition, kind, reason, why, status, queue, function, task (a coalesced function too)."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LaneUsed:
    """What one lane did since its last report (twice a second while it is used).

    ``running``, ``waiting`` and ``lent`` (of its slots, to other lanes) are the numbers now, the others counts since then.
    """

    lane: str
    running: int
    waiting: int
    lent: int
    admitted: int
    overdue: int
    """Calls that were ended by their deadline."""
    waits: Sequence[float]
    """Seconds that calls waited in line, those given up included."""
    refused: Mapping[str, int]
    """Calls refused at the door, by reason: ``queue_full``, ``predicted_wait``, ``waited``, ``deadline``."""


@dataclass(frozen=True, slots=True)
class Behind:
    """How far the ledger is behind one partition's journal, about once a second from each worker: ``entries`` exactly,
    ``operations`` exactly up to a few hundred entries and by their average beyond, ``seconds`` the age of the oldest by Redis' clock.
    ``journal``: the entries that Redis keeps, applied ones too."""

    partition: int
    entries: int
    operations: int
    seconds: float
    journal: int


@dataclass(frozen=True, slots=True)
class PartitionOpen:
    """Whether one partition sells, about once a second from each worker: Redis and the ledger are in one epoch, and it is open in both."""

    partition: int
    open: bool


@dataclass(frozen=True, slots=True)
class Alerting:
    """Business alerts that fire, by rule; every rule is in it."""

    firing: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class GrayRouted:
    """Calls that went through a gray link to one side within the last second: how many failed, and their seconds together."""

    link: str
    variant: str
    calls: int
    errors: int
    seconds: float


@dataclass(frozen=True, slots=True)
class GrayRules:
    """A link's rules took effect in this process."""

    link: str
    version: int
    percentage: float
    killed: bool
    paused: bool


@dataclass(frozen=True, slots=True)
class GrayRulesRead:
    """About once a second where there are gray links: seconds since this process last saw all rules as they stand in Redis (or since its
    start). A kill that was made since may be unknown here."""

    age_seconds: float


@dataclass(frozen=True, slots=True)
class Compared:
    """One comparison of Redis, ledger and the service's tables. ``scope``: ``everything``, ``what`` (was touched), ``merchant``,
    ``discrepancy``. ``open``: discrepancies by cause, of a comparison of everything; empty for others."""

    scope: str
    skus: int
    holds: int
    open: Mapping[str, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class DiscrepanciesOpen:
    """From each worker, several times a minute: discrepancies that nobody has corrected or seen end, by cause; every cause is in it."""

    open: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class ComparisonsOverdue:
    """From each worker, several times a minute: seconds since a scheduled comparison should have been made, 0 where it is not due.
    ``seconds``: by scope, ``everything`` and ``what`` (was touched); one that is not scheduled is not in it."""

    seconds: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PromotionsWaiting:
    """After each look of the worker that moves SKUs (``admission="auto"``): those that should be elsewhere and could not be moved."""

    to_redis: int
    to_database: int


@dataclass(frozen=True, slots=True)
class HotspotsUsed:
    """What hotspots did since their last report (once a second while anything is hot).

    ``hot``, ``waiting``, ``alone`` (keys whose rate this process keeps alone, because Redis does not answer) and ``top`` are as things
    are now, the others counts since then.
    """

    hot: int
    waiting: int
    alone: int
    admitted: int
    waits: Sequence[float]
    """Seconds that calls waited in a hot key's line, those given up included."""
    refused: Mapping[str, int]
    """Calls refused, by reason: ``predicted_wait``, ``waited``, ``rejected``, ``lane_share``, ``deadline``."""
    leases: Mapping[str, int]
    """Requests for a part of the shared rate, by what came of them: ``granted``, ``refused``, ``away``."""
    top: Sequence[tuple[str, str, float]]
    """The hottest keys, at most ten: merchant, sku (or the key where it has no SKU), calls per second over all processes."""


@dataclass(frozen=True, slots=True)
class Triggered:
    """Requests of one coalesced function that Redis has written down: calls by trigger."""

    function: str
    calls: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Recalculated:
    """One run of a coalesced function has ended: ``outcome`` is ``done``, ``failed``, ``cut_off``, ``lost`` (the lease) or
    ``given_back`` (the process closes)."""

    function: str
    outcome: str
    seconds: float
    cpu_seconds: float
    calls: int
    """Requests that it answered."""
    waited_seconds: float
    """From the first of them to the start of the run."""


@dataclass(frozen=True, slots=True)
class RecalculationsDue:
    """One coalesced function's keys that nobody calculates although they are due, over all processes; every two seconds from each.
    ``overdue_seconds``: of the longest."""

    function: str
    keys: int
    overdue_seconds: float


@dataclass(frozen=True, slots=True)
class Governed:
    """The CPU governor, once a second: share of the CPU in use, lateness of the event loop, and what each may use of its own
    (``redistribution``, and the lanes that it may slow), from the floor to 1."""

    cpu: float
    lag_seconds: float
    shares: Mapping[str, float]


Event = (
    BatchSent
    | Published
    | Applied
    | Retried
    | Happened
    | LaneUsed
    | Behind
    | PartitionOpen
    | Alerting
    | GrayRouted
    | GrayRules
    | GrayRulesRead
    | Compared
    | DiscrepanciesOpen
    | ComparisonsOverdue
    | PromotionsWaiting
    | HotspotsUsed
    | Triggered
    | Recalculated
    | RecalculationsDue
    | Governed
)


class Metrics(Protocol):
    """A sink for events."""

    def record(self, event: Event) -> None:
        """Take note of one event; must not raise or block."""
        ...
