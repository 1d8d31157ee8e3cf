"""Every error the SDK raises. One tree, so that ``except InventoryError`` catches all of it.

    InventoryError
    ├── InvalidOperation (also a ValueError)     bad input; nothing moved
    ├── InsufficientStock                        not enough available; nothing moved
    ├── UnknownStock                             no such SKU at this merchant
    ├── OperationConflict                        the id was used before with other content
    ├── ReservationNotFound                      no such reservation
    ├── ReservationClosed                        confirmed or released already
    │   └── ReservationExpired                   its time ran out
    ├── QuantityMismatch                         a line did not move by what was asked
    ├── OutcomeUnknown                           the reply was lost; safe to repeat with the same id
    ├── Overloaded (retry_after)                 refused at the door; nothing moved
    │   ├── LaneFull
    │   ├── HotspotLimited
    │   └── JournalFull
    │       └── StockFrozen
    ├── LaneNotServed                            this process does not serve that lane; nothing moved
    ├── DeadlineExceeded                         the time given to the call ran out
    ├── RecalculationFailed                      the run that a caller waited for raised
    │   └── RecalculationCutOff                  it did not end within its timeout
    ├── DurabilityNotReached                     it stands, but not as safely as asked
    └── NotStarted                               use before ``start()`` / ``async with``

A message names the field and its value, or the id to ask about or to repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inventory_sdk.model import Shortage


def _revived(kind: type[InventoryError], arguments: tuple[Any, ...], fields: dict[str, Any]) -> InventoryError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(fields)
    return error


class InventoryError(Exception):
    """Something in inventory_sdk refused or failed."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own way calls __init__ with the message alone: task queues and process pools would lose our errors.
        return _revived, (type(self), self.args, self.__dict__.copy())


class InvalidOperation(InventoryError, ValueError):
    """The input is not a valid operation; nothing moved. ``field`` and ``value`` say what to change."""

    def __init__(self, field: str, value: object, why: str) -> None:
        shown = repr(value)
        if len(shown) > 200:
            shown = shown[:197] + "..."
        super().__init__(f"{field}={shown}: {why}")
        self.field = field
        self.value = value
        self.why = why


class InsufficientStock(InventoryError):
    """Not enough is available; nothing moved. ``shortages`` names every short line of the call."""

    def __init__(self, shortages: Sequence[Shortage]) -> None:
        self.shortages = tuple(shortages)
        first = self.shortages[0]
        self.sku: str = first.sku
        self.merchant: str = first.merchant
        self.requested: int = first.requested
        self.available: int = first.available
        more = f" (and {len(self.shortages) - 1} more lines)" if len(self.shortages) > 1 else ""
        super().__init__(f"merchant {first.merchant!r}, sku {first.sku!r}: {first.requested} asked, {first.available} available{more}")


class UnknownStock(InventoryError):
    """The ledger has no stock row for this SKU; restock it, or give opening balances with ``reads_stock``."""

    def __init__(self, merchant: str, sku: str) -> None:
        super().__init__(f"merchant {merchant!r} has no sku {sku!r}: restock it first, or provide @inventory.reads_stock")
        self.merchant = merchant
        self.sku = sku


class OperationConflict(InventoryError):
    """This operation id was used before with other content; use a new id for a new act."""

    def __init__(self, operation_id: str, why: str = "was used before with other content") -> None:
        super().__init__(f"operation_id={operation_id!r} {why}; a new act needs a new id")
        self.operation_id = operation_id


class ReservationNotFound(InventoryError):
    """No reservation of this name is known, in Redis or in the ledger."""

    def __init__(self, reservation: str, merchant: str) -> None:
        super().__init__(f"merchant {merchant!r} has no reservation {reservation!r}")
        self.reservation = reservation
        self.merchant = merchant


class ReservationClosed(InventoryError):
    """The reservation has ended: ``state`` is ``confirmed``, ``released`` or ``expired``."""

    def __init__(self, reservation: str, state: str) -> None:
        super().__init__(f"reservation {reservation!r} is {state}")
        self.reservation = reservation
        self.state = state


class ReservationExpired(ReservationClosed):
    """The reservation's time ran out and its stock went back; ``confirm(…, reacquire=True)`` takes it again if it is there."""

    def __init__(self, reservation: str, state: str = "expired") -> None:
        super().__init__(reservation, state)


class QuantityMismatch(InventoryError):
    """A line did not move by exactly what was asked; the whole operation was refused."""

    def __init__(self, mismatches: Sequence[tuple[str, int, int]]) -> None:
        self.mismatches = tuple(mismatches)
        shown = "; ".join(f"{line}: expected {expected}, found {found}" for line, expected, found in self.mismatches[:5])
        super().__init__(shown)


class OutcomeUnknown(InventoryError):
    """The reply was lost. The operation may or may not stand; repeating it with the same ``operation_id`` is safe."""

    def __init__(self, operation_id: str, why: str) -> None:
        super().__init__(f"operation {operation_id!r}: {why}; repeat it with the same operation_id, or ask status()")
        self.operation_id = operation_id


class Overloaded(InventoryError):
    """Refused at the door, nothing moved; come back after ``retry_after`` seconds."""

    def __init__(self, why: str, retry_after: float = 1.0) -> None:
        super().__init__(f"{why}; retry after {retry_after:g} s")
        self.retry_after = retry_after


class LaneFull(Overloaded):
    """The lane's queue is full, or its predicted wait is longer than allowed."""


class HotspotLimited(Overloaded):
    """The SKU is hot and its pace is used up."""


class JournalFull(Overloaded):
    """The journal is at its cap because the ledger is behind; takes wait until the worker has caught up."""


class StockFrozen(JournalFull):
    """The partition (or this SKU) is being recovered; it comes back by itself, or after ``stock.reopen()`` for one SKU."""


class LaneNotServed(InventoryError):
    """This process serves other lanes only; ``served`` names them, ``pointer`` is where this one is served, if that is known."""

    def __init__(self, lane: str, served: Sequence[str], pointer: str | None = None) -> None:
        where = f"; it is served at {pointer}" if pointer is not None else ""
        super().__init__(f"lane {lane!r} is not served here, only {', '.join(map(repr, served)) or 'none'} is{where}")
        self.lane = lane
        self.served = tuple(served)
        self.pointer = pointer


class DeadlineExceeded(InventoryError):
    """The time that the caller, or its lane, gave to this call ran out. What it had sent under an id of its own may stand: ask
    ``status()``, or repeat it with the same id."""


class RecalculationFailed(InventoryError):
    """A run of a coalesced function failed. ``kind`` is the type of its error; ``__cause__`` is it where it ran in this process."""

    def __init__(self, function: str, key: str, kind: str, why: str) -> None:
        super().__init__(f"{function}, key={key!r}: {kind}: {why}" if why else f"{function}, key={key!r}: {kind}")
        self.function = function
        self.key = key
        self.kind = kind
        self.why = why


class RecalculationCutOff(RecalculationFailed):
    """A run of a coalesced function did not end within its ``timeout``; it was cancelled, or its process killed."""


class DurabilityNotReached(InventoryError):
    """The operation stands, but the level asked for was not reached in time. Repeating it with the same ``operation_id`` is safe:
    it has no second effect and earns its level again.

    ``operation_id`` is None where no single operation was meant (``settled()``). ``wanted`` and ``applied`` are positions
    (partition, epoch, sequence) or None; ``worker_seen`` is how many seconds ago a worker gave a sign of life, None if never.
    """

    def __init__(
        self, level: str, wanted: Any, applied: Any, worker_seen: float | None, why: str = "", operation_id: str | None = None
    ) -> None:
        parts = [f"durability {level!r} not reached: wanted {wanted}"]
        if level == "database":
            seen = "no worker has given a sign of life" if worker_seen is None else f"worker seen {worker_seen:.1f} s ago"
            parts[0] += f", applied {applied}, {seen}"
        if why:
            parts.append(why)
        if operation_id is not None:
            parts.append(f"operation {operation_id!r} was done and stands; repeat it with the same operation_id to earn the level")
        super().__init__("; ".join(parts))
        self.level = level
        self.wanted = wanted
        self.applied = applied
        self.worker_seen = worker_seen
        self.why = why
        self.operation_id = operation_id


class NotStarted(InventoryError):
    """Use ``async with inventory:`` or ``await inventory.start()`` first."""

    def __init__(self, what: str = "inventory") -> None:
        super().__init__(f"{what} is not started: use 'async with inventory:' or 'await inventory.start()'")
