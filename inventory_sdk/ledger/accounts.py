"""What a comparison reads from the ledger, as data: no SQL lives here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from inventory_sdk.errors import InventoryError


@dataclass(frozen=True, slots=True)
class Place:
    """One stock row by name: who sells it, and how often that has changed (``fence``)."""

    field: str
    admission: str
    fence: int


@dataclass(frozen=True, slots=True)
class Account:
    """One stock row with what Redis does not have of it yet. ``available`` and ``reserved`` are what Redis must have at the watermark:
    the row's own, without pending credits, and with refused entries that are not voided yet. ``row`` is the row itself (available,
    reserved, sold, supplied, written off); ``left`` what its last change left, None where there is no such change."""

    field: str
    admission: str
    fence: int
    version: int
    available: int
    reserved: int
    row: tuple[int, int, int, int, int]
    left: tuple[int, int, int, int, int] | None

    @property
    def sound(self) -> bool:
        """The row is what its last change left, and adds up."""
        available, reserved, sold, supplied, written_off = self.row
        added_up = supplied == available + reserved + sold + written_off and min(self.row) >= 0
        return added_up and (self.left == self.row if self.version or self.left is not None else not any(self.row))


@dataclass(frozen=True, slots=True)
class Moved:
    """What one journal entry did to one field in Redis."""

    sequence: int
    available: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Past:
    """One line of the ledger's history of a SKU, newest first. ``status`` is its operation's; ``key`` is where Redis remembers it."""

    version: int
    epoch: int
    sequence: int
    kind: str
    key: str
    status: str
    at_ms: int
    available: int
    reserved: int


@dataclass(frozen=True, slots=True)
class Refused:
    """An entry that the ledger refused, with what its void adds to Redis: flat [field, available, reserved, …]. ``voided``: the
    ledger has the void's own entry."""

    epoch: int
    sequence: int
    index: int
    key: str
    kind: str
    deltas: tuple[Any, ...]
    state: str
    voided: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A discrepancy as it is kept. ``subject`` names what disagrees, and is None once that has ended."""

    number: int
    merchant: str
    sku: str | None
    kind: str
    subject: str | None
    state: str
    details: dict[str, Any]
    created_ms: int
    resolved_ms: int | None


@dataclass(frozen=True, slots=True)
class NewRow:
    """A discrepancy to be kept."""

    merchant: str
    sku: str | None
    kind: str
    subject: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One act of a person (or of the SDK, where ``actor`` is empty), as it is kept."""

    number: int
    merchant: str
    sku: str | None
    kind: str
    actor: str
    operation_id: str | None
    details: dict[str, Any]
    created_ms: int


class AnotherState(InventoryError):
    """The discrepancy is not in the state that this act begins from."""


class OverLimit(InventoryError):
    """So many units would have been moved, with what corrections of this merchant have moved since the day began."""

    def __init__(self, units: int) -> None:
        super().__init__(f"corrections would move {units} units")
        self.units = units
