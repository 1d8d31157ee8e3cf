"""What a comparison finds and what a person does about it, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.ledger.accounts import AuditRow, Row
from inventory_sdk.model import SEPARATOR, check_text, split_key

if TYPE_CHECKING:
    from inventory_sdk.reconcile.sinks.protocol import Sink

DAY: Final = 86_400.0


class Cause(StrEnum):
    """What a discrepancy most likely is. The evidence is beside it."""

    WENT_BACK = "went_back"
    """Redis went back: it does not remember operations that the ledger has, and their units are the difference."""
    SERVICE_TABLE = "service_table"
    """The service's own table was written past the SDK: Redis and ledger agree with each other."""
    MISSING_JOURNAL = "missing_journal"
    """Sequences below the watermark left nothing in the ledger, and what their entries moved is the difference."""
    REJECTED = "rejected"
    """The ledger refused an accepted operation, and what should have taken it back in Redis never came there."""
    EXPIRY_LOST = "expiry_lost"
    """A hold in Redis that nothing will end: its time is not in the list of those that run out."""
    MANUAL_REDIS = "manual_redis"
    """Redis was changed by hand: nothing that was journaled explains the difference."""
    LEDGER_BOOKS = "ledger_books"
    """The ledger's own books don't close: a row was changed past its change rows."""


class What(StrEnum):
    """Which two sides disagree."""

    STOCK = "stock"
    """Redis and the ledger, one SKU."""
    SERVICE = "service"
    """The service's own table and the ledger, one SKU."""
    HOLD = "hold"
    """A reservation in Redis: against itself, or against the ledger."""
    BOOKS = "books"
    """The ledger against itself."""
    PARTITION = "partition"
    """A partition's sequence in Redis and the ledger's watermark."""


def subject_of(what: What, name: str) -> str:
    """What a discrepancy is about; there is one open at a time."""
    return f"{what}{SEPARATOR}{name}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one comparison found. ``name`` is the field, the reservation's key, or a partition's number. ``available`` and
    ``reserved`` are by how much the first side is above the ledger."""

    what: What
    name: str
    cause: Cause
    available: int = 0
    reserved: int = 0
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """See ``subject_of``."""
        return subject_of(self.what, self.name)


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """A finding on record. ``state``: ``open``, ``correcting`` (begun, and to be repeated), ``corrected``, ``undone``, ``gone`` (a
    later comparison found nothing any more). ``available`` and ``reserved``: units by which Redis (or the service's table) is above
    the ledger. Times are Unix milliseconds. ``name``: merchant, ``\\x1f`` and SKU or reservation; a partition's number."""

    number: int
    what: str
    name: str
    merchant: str
    sku: str | None
    reservation: str | None
    cause: str
    available: int
    reserved: int
    evidence: Mapping[str, Any]
    state: str
    found_ms: int
    resolved_ms: int | None
    correction: Mapping[str, Any] | None


def discrepancy(row: Row) -> Discrepancy:
    """A row of the register."""
    details = row.details
    return Discrepancy(
        number=row.number,
        what=str(details.get("what", "")),
        name=str(details.get("name", "")),
        merchant=row.merchant,
        sku=row.sku,
        reservation=details.get("reservation"),
        cause=row.kind,
        available=int(details.get("available", 0)),
        reserved=int(details.get("reserved", 0)),
        evidence=details.get("evidence", {}),
        state=row.state,
        found_ms=row.created_ms,
        resolved_ms=row.resolved_ms,
        correction=details.get("correction"),
    )


def details_of(found: Finding) -> dict[str, Any]:
    """What the register keeps of a finding."""
    details = {
        "what": found.what.value,
        "name": found.name,
        "available": found.available,
        "reserved": found.reserved,
        "evidence": dict(found.evidence),
    }
    if found.what is What.HOLD:
        details["reservation"] = split_key(found.name)[1]
    return details


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one run looked at, and what it found. ``skus`` were compared with Redis, ``absent`` of the ledger's are not in Redis (they
    come when somebody asks for them), ``direct`` are sold by the database and have no second side there. ``moving`` changed hands
    meanwhile, or somebody was at them, and ``unopened`` partitions were being recovered: the next run looks at them. ``service`` SKUs
    were compared with the service's own tables, ``holds`` reservations with their expiry. ``open`` are the discrepancies that this
    run saw."""

    scope: str
    skus: int
    absent: int
    direct: int
    service: int
    holds: int
    moving: tuple[str, ...]
    unopened: tuple[int, ...]
    open: tuple[Discrepancy, ...]
    gone: int
    seconds: float

    @property
    def clean(self) -> bool:
        """Nothing disagrees, and nothing was left out."""
        return not (self.open or self.moving or self.unopened)


@dataclass(frozen=True, slots=True)
class Correction:
    """What ``correct`` would do, and has not done. ``side``: ``redis`` (a journaled delta there), ``ledger`` (an adjustment, as a
    count would make it), ``service`` (a movement handed to ``writes_stock``), ``hold`` (its time is set anew). ``units`` is its
    size for limits; ``why_not`` says why it can't be made, and is empty where it can."""

    number: int
    side: str
    merchant: str
    sku: str | None
    reservation: str | None
    available: int
    reserved: int
    units: int
    steps: tuple[str, ...]
    needs_confirmation: bool
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Audit:
    """Who did what, when and why; ``undoes`` is the number of the discrepancy of an undone correction."""

    number: int
    merchant: str
    sku: str | None
    kind: str
    who: str
    operation_id: str | None
    details: Mapping[str, Any]
    at_ms: int


def audit(row: AuditRow) -> Audit:
    """A row of the register."""
    return Audit(row.number, row.merchant, row.sku, row.kind, row.actor, row.operation_id, row.details, row.created_ms)


Progress = Callable[[int, int], None]
"""(SKUs looked at, SKUs there are)"""


@dataclass(frozen=True, slots=True)
class Reconcile:
    """How an Inventory compares and corrects. Times are in seconds.

    ``every``: between comparisons of what was touched, by one of the workers; None: none by itself. ``whole_every``: between
    comparisons of everything. ``rate``: most SKUs per second of a comparison. ``settle``: a service without ``writes_stock`` writes
    its own tables in its own time, so a difference there counts only when it stands for so long with nothing moving. ``sinks``:
    where discrepancies are told besides the ledger's register. ``confirm_above``: units from which a correction must be confirmed.
    ``daily_limit``: most units that corrections of one merchant may move in 24 hours; ``limits`` for single merchants.
    """

    every: float | None = 3600.0
    whole_every: float | None = DAY
    rate: float = 20_000.0
    settle: float = 5.0
    sinks: Sequence[Sink] = ()
    confirm_above: int = 100
    daily_limit: int = 10_000
    limits: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("every", "whole_every"):
            value = getattr(self, name)
            if value is not None and not _positive(value):
                raise InvalidOperation(name, value, "must be seconds, more than 0, or None: never by itself")
        for name in ("rate", "settle"):
            if not _positive(getattr(self, name)):
                raise InvalidOperation(name, getattr(self, name), "must be more than 0")
        for name, value in (("confirm_above", self.confirm_above), ("daily_limit", self.daily_limit), *self.limits.items()):
            if type(value) is not int or value < 0:
                raise InvalidOperation(name, value, "must be a whole number of units, at least 0")
        for merchant in self.limits:
            check_text("merchant", merchant)

    def limit(self, merchant: str) -> int:
        """Units a day."""
        return self.limits.get(merchant, self.daily_limit)


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
