"""What the management pages ask of the ledger: data in, data out, no SQL. ``ledger/browse.py`` answers it for the SQL ledger.

Lists come in pages. A page begins where the last one ended, at a key and not at a number of rows, so the thousandth page costs what
the first one does, and rows that arrive meanwhile neither repeat nor hide any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from inventory_sdk.ledger.protocol import OperationRow, ReservationRow, StockRow, Task
from inventory_sdk.model import Position

T = TypeVar("T")
C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Page(Generic[T, C]):
    """``rows``, and where the next page begins; None at the end."""

    rows: Sequence[T]
    next: C | None


class Moment(NamedTuple):
    """Where an operation stands in the order of time; those of one millisecond by their place in the journal."""

    at_ms: int
    partition: int
    epoch: int
    sequence: int
    place: int
    """The operation's index in its entry."""


class Counters(NamedTuple):
    """The five numbers of a stock row, or what was added to them."""

    available: int
    reserved: int
    sold: int
    supplied: int
    written_off: int


@dataclass(frozen=True, slots=True)
class ChangeRow:
    """One line of an applied operation: what it did to its SKU. ``version`` counts the SKU's changes from 1 on. ``kind``,
    ``operation_id`` and ``at_ms`` are the operation's; empty and 0 where it is not read with them."""

    merchant: str
    sku: str
    version: int
    position: Position
    index: int
    line: int
    quantity: int
    delta: Counters
    before: Counters
    after: Counters
    kind: str = ""
    operation_id: str = ""
    at_ms: int = 0


@dataclass(frozen=True, slots=True)
class EntryRow:
    """One journal entry as the ledger passed it; an empty ``nonce``: it was lost."""

    nonce: str
    at_ms: int
    operations: int


@dataclass(frozen=True, slots=True)
class CreditLine:
    """Stock that entered through SQL, on its way to Redis: ``pending`` until Redis has journaled it, then ``made``."""

    merchant: str
    sku: str
    quantity: int
    epoch: int
    state: str


@dataclass(frozen=True, slots=True)
class VoidRow:
    """What takes a refused operation back out of Redis; ``deltas`` is flat: field, available, reserved, …"""

    kind: str
    deltas: Sequence[object]
    freeze: bool
    state: str


@dataclass(frozen=True, slots=True)
class TaskRow:
    """A later-function of one operation. ``state``: ``pending``, ``done``, ``dead``; ``due_ms``: when it is tried (again)."""

    task: Task
    state: str
    due_ms: int
    error: str


@dataclass(frozen=True, slots=True)
class Life:
    """All that the ledger has of one operation. ``reason``: why it was made, or why it was refused. ``claims``: its id is taken by
    it. ``passed``: the newest watermark of its epoch. ``relatives``: what refers to it or to its reservation, oldest first."""

    operation: OperationRow
    reason: str
    claims: bool
    entry: EntryRow | None
    passed: int
    changes: Sequence[ChangeRow]
    reservation: ReservationRow | None
    credits: Sequence[CreditLine]
    void: VoidRow | None
    tasks: Sequence[TaskRow]
    relatives: Sequence[OperationRow]


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One act of a person. ``outcome``: ``begun`` (and no more is known), ``done``, or ``failed: …`` in words."""

    number: int
    actor: str
    kind: str
    merchant: str
    sku: str
    operation_id: str
    outcome: str
    details: Mapping[str, object]
    at_ms: int


class Pages(Protocol):
    """Every method is one short reading, or one short transaction. ``LedgerUnavailable`` when the database can't do it now."""

    async def merchants(self, limit: int = 100, after: str = "") -> list[str]:
        """Merchants that have stock, in order of their bytes."""
        ...

    async def products(
        self, *, merchant: str | None = None, prefix: str = "", limit: int = 50, after: tuple[str, str] | None = None
    ) -> Page[StockRow, tuple[str, str]]:
        """Stock rows whose SKU begins with ``prefix``; the cursor is (merchant, sku)."""
        ...

    async def operations(
        self, *, merchant: str | None = None, order: str | None = None, limit: int = 50, before: Moment | None = None
    ) -> Page[OperationRow, Moment]:
        """Of a merchant, of an order, or of both; newest first. ``ValueError`` for neither: nothing leads to all of them."""
        ...

    async def named(self, name: str, merchant: str | None = None) -> list[OperationRow]:
        """Operations whose id, or whose reservation's name, this is, refused ones behind the one that has the id; without a merchant: of
        the first 1000 merchants."""
        ...

    async def life(self, position: Position, index: int) -> Life | None:
        """Everything about one operation."""
        ...

    async def changes(self, merchant: str, sku: str, *, limit: int = 50, before: int | None = None) -> Page[ChangeRow, int]:
        """What moved one SKU, newest first; the cursor is a version."""
        ...

    async def dead_tasks(self, *, limit: int = 50, before: int | None = None) -> Page[TaskRow, int]:
        """Later-functions that have failed for good, the newest first."""
        ...

    async def waiting_tasks(self, most: int = 1000) -> tuple[int, int]:
        """How many later-functions are (pending, dead); counted up to ``most`` each."""
        ...

    async def retry_task(self, number: int) -> bool:
        """A dead later-function is due again, with all its tries; False where it is not dead (any more)."""
        ...

    async def audit(self, *, limit: int = 50, before: int | None = None) -> Page[AuditRow, int]:
        """What people did, newest first; the cursor is a number."""
        ...

    async def begin_act(
        self, actor: str, kind: str, *, merchant: str = "", sku: str = "", operation_id: str = "", details: Mapping[str, object]
    ) -> int:
        """Write down who is about to do what; the row's number. Committed before anything is done, so that no act is without one."""
        ...

    async def end_act(self, number: int, outcome: str) -> None:
        """Write down what became of it."""
        ...
