"""The ledger as the other rooms see it: data in, data out, no SQL. ``ledger/sql.py`` keeps it on SQLAlchemy Core.

Locks are always taken in this order: the partition's epoch-0 row, its open epoch's row, stock rows sorted by (merchant, sku).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from inventory_sdk.errors import InventoryError, Overloaded
from inventory_sdk.model import JournalEntry, Movement, Position

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

    from inventory_sdk.ledger.pages import Pages

WritesStock = Callable[[Sequence[Movement], "AsyncSession"], Awaitable[None]]

REPARTITIONED: Final = "repartitioned"
"""Setting: how many times partitions were told apart in another way, the last epoch before, and when (Unix milliseconds)."""
NEVER: Final = "0 0 0"


class EpochClosed(InventoryError):
    """The epoch is not open for this: another process has raised it."""


class WatermarkMoved(InventoryError):
    """Another worker has applied these entries; read the watermark again."""


class ForkFound(InventoryError):
    """An entry with another nonce stands at a position that the ledger has applied."""


class WritesStockFailed(InventoryError):
    """The service's ``writes_stock`` raised; the transaction was rolled back. The cause is ``__cause__``."""


class LedgerUnavailable(Overloaded):
    """The database could not do it now: ``reason`` is a fixed word (``disconnected``, ``deadlock``, ``serialization``,
    ``lock_timeout``, ``locked``, ``disk_full``, …), ``__cause__`` what the driver said. A transaction whose commit was under way
    may stand; every method is safe to repeat."""

    def __init__(self, reason: str, error: BaseException) -> None:
        super().__init__(f"the ledger's database can't do this now ({reason}: {str(error).partition(chr(10))[0]})", retry_after=1.0)
        self.reason = reason


class StockArriving(InventoryError):
    """This stock is on its way to Redis: nothing enters until it has arrived there."""


@dataclass(frozen=True, slots=True)
class PartitionRow:
    """The newest epoch of a partition. ``state``: ``open`` (takes are applied), ``rebuilding``; ``applied`` is its watermark."""

    partition: int
    epoch: int
    state: str
    applied: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """An operation that the ledger did not apply. ``reason``: ``duplicate`` (its claim or reservation is known),
    ``insufficient`` (drift), ``closed`` (it ends, undoes or returns a refused or closed one)."""

    position: Position
    index: int
    kind: str
    key: str
    reason: str
    lines: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """What one ``apply`` did."""

    sequence: int
    operations: int
    refusals: tuple[Refusal, ...]
    redelivered: int
    tasks: int


@dataclass(frozen=True, slots=True)
class Void:
    """A pending void: applied in Redis under id ``\\x1fvoid\\x1f<epoch>-<sequence>-<index>``. ``deltas`` is flat
    [field, available delta, reserved delta, …], the exact inverse of what the refused entry did in Redis.
    ``freeze``: drift was found, so these SKUs freeze; a duplicate does not freeze."""

    position: Position
    index: int
    key: str
    kind: str
    reference: str
    deltas: tuple[Any, ...]
    freeze: bool


@dataclass(frozen=True, slots=True)
class Credit:
    """A pending credit of one SQL-first operation; ``lines`` is flat [field, quantity, …]."""

    position: Position
    epoch: int
    key: str
    lines: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Entering:
    """An operation that enters through SQL: restock, take_back, positive adjust, open. ``lines`` is flat, summed, sorted.
    ``reservations`` (open only): (field, reservation id, quantity)."""

    kind: str
    key: str
    fingerprint: str
    lines: tuple[Any, ...]
    order: str = ""
    reference: str = ""
    reason: str = ""
    extra: str = ""
    reservations: tuple[tuple[str, str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Entered:
    """``remaining``: ledger available per line after it. ``credit`` is None once it was made (or closed by a rebuild)."""

    position: Position
    remaining: tuple[int, ...]
    credit: Credit | None
    replayed: bool


@dataclass(frozen=True, slots=True)
class OperationRow:
    """One operation as the ledger has it. ``status``: ``applied``, ``rejected``, ``duplicate``, ``undone``."""

    position: Position
    index: int
    key: str
    kind: str
    fingerprint: str
    order: str
    reference: str
    lines: tuple[Any, ...]
    remaining: tuple[int, ...]
    status: str
    kept: bool
    at_ms: int
    parts: tuple[Any, ...] = ()
    """What it did in other partitions, as decided here: (partition, position of the part or "", flat lines, remaining), …"""


@dataclass(frozen=True, slots=True)
class ReservationRow:
    """A reservation as the ledger has it. ``lines`` is flat in fives: field, original, open, confirmed, released.
    ``state``: held, confirmed, released, expired. ``expires_at`` in ms of Redis time, 0: until closed. ``pinned``: it ends
    when its decider speaks. ``foreign``: its lines in other partitions, flat in sixes: field, partition, then as in ``lines``."""

    key: str
    state: str
    fingerprint: str
    position: Position
    order: str
    expires_at: int
    pinned: bool
    lines: tuple[Any, ...]
    foreign: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Balance:
    """A stock row for loading: ``available`` less what pending credits of this epoch will add. ``admission``: who sells it,
    ``redis``, ``database``, or ``arriving`` while it goes from there to Redis."""

    field: str
    available: int
    reserved: int
    admission: str = "redis"


@dataclass(frozen=True, slots=True)
class DirectAct:
    """One act on stock that the ledger itself sells: the batch script's operation, by name. ``lines`` is flat, summed, sorted;
    empty for a whole close. ``mark`` is the position of the take that is undone or kept, ``flag`` as in the script."""

    kind: str
    key: str
    fingerprint: str
    lines: tuple[Any, ...]
    order: str
    reference: str
    ttl_ms: int
    extra: str
    mark: str
    flag: str


@dataclass(frozen=True, slots=True)
class DirectAnswer:
    """What became of it. ``code``: ``done``; ``replay`` (``row`` or ``hold`` is the first), ``conflict``, ``short`` (``details``:
    field, asked, available, …), ``unknown`` (fields without a row), ``elsewhere`` (Redis sells it), ``arriving``, ``mixed``
    (fields that Redis sells, beside others), ``closed`` (state), ``not_found``, ``not_open`` (field, asked, open, …),
    ``pinned``, ``too_late`` (can't be undone or kept any more), ``not_due``."""

    code: str
    position: Position | None = None
    lines: tuple[Any, ...] = ()
    remaining: tuple[int, ...] = ()
    order: str = ""
    details: tuple[Any, ...] = ()
    row: OperationRow | None = None
    hold: ReservationRow | None = None


@dataclass(frozen=True, slots=True)
class AdmissionRow:
    """Who sells one SKU, and how often that has changed (``fence``)."""

    field: str
    admission: str
    fence: int


@dataclass(frozen=True, slots=True)
class Leaving:
    """What a flip to the database came to: ``done`` (``holds`` are the keys of those that it took over), or why not yet:
    ``behind`` (the watermark), ``pending`` (credits or voids are not in the ledger yet), ``unmarked`` (``rows`` that Redis may
    still sell), or why not: ``overtaken`` (another process has changed it since), ``mixed`` (``holds`` that Redis runs also have
    stock that stays there)."""

    outcome: str
    rows: tuple[AdmissionRow, ...] = ()
    holds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arriving:
    """``rows`` are on their way to Redis; ``kept`` were Redis' already: their new fences end a withdrawal that had begun."""

    rows: tuple[AdmissionRow, ...]
    kept: tuple[AdmissionRow, ...]


class Arrivals(Protocol):
    """A reading of arriving stock, its rows held, for Redis: nobody sells it meanwhile."""

    async def balances(self) -> list[Balance]: ...
    async def reservations(self) -> list[ReservationRow]:
        """Live ones with any line of it."""
        ...

    async def tombstones(self, since_ms: int) -> list[str]:
        """Keys of its merchants that were closed before anything was held under them."""
        ...

    def results(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        """Applied operations of its merchants (of its fields, and since these were in Redis last, where it is not whole) that never
        were in Redis (epoch 0), at or after ``since_ms``."""
        ...

    def forgotten(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        """Refused and undone ones whose id is free."""
        ...


@dataclass(frozen=True, slots=True)
class StockRow:
    """One stock row: supplied = available + reserved + sold + written_off."""

    merchant: str
    sku: str
    available: int
    reserved: int
    sold: int
    supplied: int
    written_off: int
    version: int


@dataclass(frozen=True, slots=True)
class Task:
    """One ``run="later"`` call. ``arguments`` is the codec's JSON; ``group`` orders it (the order, else the operation)."""

    number: int
    name: str
    version: int
    arguments: str
    group: str
    operation_id: str
    merchant: str
    attempts: int
    receipt: str


@dataclass(frozen=True, slots=True)
class TaskRun:
    """What became of a task. ``error``: what its function raised, nothing of it is kept; None: done. ``elsewhere``: seconds of its
    call that were not spent in statements to the ledger's database."""

    task: Task
    error: Exception | None
    elsewhere: float


class TasksSpoilt(InventoryError):
    """A later-function ended the transaction that it shared: what others did in it can't be kept, or can't be told apart."""


class TaskStuck(Exception):
    """For ``call`` to raise: the function goes on whatever one does, so the connection is taken from under it."""


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks a worker may run: those with one of the ``routes`` (``""``: without one), and all of the merchants in ``also``; none of
    those in ``but_not``."""

    routes: tuple[str, ...]
    also: tuple[str, ...] = ()
    but_not: tuple[str, ...] = ()


class Rebuilding(Protocol):
    """A consistent reading of one partition, under its lock, for a rebuild of Redis. Pending credits and voids of earlier
    epochs are closed by it. All sequences are in chunks of at most ``size``."""

    def balances(self, size: int) -> AsyncIterator[Sequence[Balance]]: ...
    def reservations(self, size: int) -> AsyncIterator[Sequence[ReservationRow]]:
        """Live ones (any line open)."""
        ...

    async def extend(self, milliseconds: int) -> None:
        """Give every running hold (not pinned, with an end) this much more time, in the ledger's rows."""
        ...

    def results(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        """Applied operations with a claim, and tombstones, at or after ``since_ms``, newest first."""
        ...

    async def open(self) -> None:
        """Set the epoch's state to open and commit."""
        ...


class Ledger(Protocol):
    """The SQL truth. Every method is one transaction unless it says otherwise; all may raise the driver's errors."""

    @property
    def pages(self) -> Pages:
        """What people look for: searches in pages, an operation's life, later-functions that failed, the audit."""
        ...

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def create_schema(self) -> None: ...
    async def check_schema(self) -> list[str]:
        """What is missing or wrong, in words; empty when all is well."""
        ...

    async def settle_setting(self, name: str, value: str) -> str:
        """The stored value; stores ``value`` if there was none."""
        ...

    async def partition(self, partition: int) -> PartitionRow | None:
        """The newest epoch's row, None before the first start. Its ``applied`` is the watermark."""
        ...

    async def raise_epoch(self, partition: int, above: int, unless_open: bool = False) -> PartitionRow | None:
        """Close epoch ``above`` (0: none yet) for SQL-first entering and open a new one, ``above + 1``, in state ``rebuilding``;
        None when another process won (a higher epoch exists; with ``unless_open`` also when the newest is open by now). A rebuild
        under way is waited for. ``above`` may be ahead of a ledger that went back: the newest epochs that it has forgotten can be
        applied to. The old epoch's row stays open for ``apply`` until ``rebuilding`` ends it, unless it was never opened."""
        ...

    def rebuilding(self, partition: int, epoch: int) -> AbstractAsyncContextManager[Rebuilding]:
        """Lock the partition's row of this epoch, close all older epochs for applying, and read; rolled back unless opened."""
        ...

    async def epochs(self, partition: int) -> list[PartitionRow]:
        """The newest epoch and every older one that still accepts ``apply``, oldest first; empty before the first start."""
        ...

    async def apply(
        self,
        partition: int,
        epoch: int,
        entries: Sequence[JournalEntry],
        writes: Sequence[WritesStock] = (),
        lost: Sequence[int] = (),
    ) -> Applied:
        """One transaction for consecutive entries that begin right after the watermark (older ones are counted as
        redelivered and checked for forks). ``EpochClosed``, ``WatermarkMoved``, ``ForkFound``, ``WritesStockFailed``.

        ``lost`` (recovery only, never in the newest epoch: ``ValueError``) names sequences that are gone for good; together
        with ``entries`` they are consecutive. The watermark passes them, nothing moves for them."""
        ...

    async def enter(self, partition: int, epoch: int, operations: Sequence[Entering], writes: Sequence[WritesStock] = ()) -> list[Entered]:
        """SQL-first operations with their pending credits, all or none; ``writes`` get what moved, opening balances excepted
        (they come from the service's own tables). ``EpochClosed`` unless ``epoch`` is the open one; a known id with
        another fingerprint is ``OperationConflict``; returning more than was sold is ``InvalidOperation``."""
        ...

    async def enter_parts(
        self, parts: Sequence[tuple[int, int, Sequence[Entering]]], writes: Sequence[WritesStock] = ()
    ) -> list[list[Entered]]:
        """``enter`` for several partitions, (partition, epoch, operations) each, in one transaction: all or none. Partitions are
        locked in ascending order, whatever order they come in."""
        ...

    def balances(self, partition: int, epoch: int, fields: Sequence[str]) -> AbstractAsyncContextManager[Mapping[str, Balance]]:
        """The rows that exist, held FOR SHARE (with the open epoch) until the block ends: what a load writes to Redis."""
        ...

    async def act(self, partition: int, act: DirectAct, writes: Sequence[WritesStock] = ()) -> DirectAnswer:
        """One act on stock that the ledger sells, under row locks, with all that ``apply`` does for a journaled one; its
        position is of epoch 0. Only ``done`` has moved anything. Times are the database's."""
        ...

    async def live_holds(self, partition: int, fields: Sequence[str]) -> list[ReservationRow]:
        """Live reservations that have any of these fields open, sorted."""
        ...

    async def due_holds(self, partition: int, limit: int, pinned_before_ms: int) -> list[ReservationRow]:
        """Live holds that the ledger runs and whose time has come by its own clock, with those that were pinned more than
        ``pinned_before_ms`` ago; oldest first."""
        ...

    async def places(self, fields: Sequence[str], merchant: str | None = None) -> dict[str, str]:
        """Who sells these fields; those without a row are left out. Under ``""``: who sells what is new at ``merchant``."""
        ...

    async def admission(self, merchant: str, fields: Sequence[str] | None = None) -> list[AdmissionRow]:
        """Every SKU of a merchant, sorted; only these where ``fields`` are given (of any merchant)."""
        ...

    async def joined(self, partition: int, fields: Sequence[str]) -> list[str]:
        """These fields and all that live holds join with them, directly or through others: what can only change hands together.
        ``InvalidOperation`` where that is more than a handover should carry."""
        ...

    async def arrive(self, partition: int, epoch: int, fields: Sequence[str] | None, merchant: str) -> Arriving:
        """Take stock from the direct sellers: from now on nobody sells it, until ``arrived``. ``fields`` None: all of the merchant,
        new SKUs too. ``EpochClosed``; ``InvalidOperation`` while a hold joins it with stock that stays."""
        ...

    def arriving(self, partition: int, epoch: int, fields: Sequence[str], whole: bool = True) -> AbstractAsyncContextManager[Arrivals]:
        """The rows that are (still) arriving, held until the block ends. ``whole``: they are all that their merchants have, and the
        reading answers for the merchants; else for these fields. ``EpochClosed``."""
        ...

    async def arrived(self, partition: int, fences: Mapping[str, int]) -> int:
        """Redis sells these (field → the fence it arrived under); how many rows this call has changed."""
        ...

    async def leave(
        self, partition: int, epoch: int, marked: Mapping[str, int], applied: int, merchant: str, whole: bool = True
    ) -> Leaving:
        """Give stock to the direct sellers once the ledger has applied all that Redis did (``applied``), under the fences that
        Redis was marked with. ``whole``: all of the merchant, new SKUs too. ``EpochClosed``."""
        ...

    async def stock(self, fields: Sequence[str]) -> list[StockRow]: ...
    async def all_stock(self, merchant: str | None = None) -> list[StockRow]: ...
    async def operation(self, key: str) -> OperationRow | None:
        """By claim."""
        ...

    async def operations_at(self, positions: Sequence[Position]) -> list[OperationRow]: ...
    async def nonces(self, positions: Sequence[Position]) -> dict[Position, str]:
        """The nonces of those entries that the ledger has passed; empty for one that was lost."""
        ...

    async def results(
        self, partition: int, since_ms: int, before: tuple[int, int, int] | None, size: int
    ) -> tuple[list[OperationRow], tuple[int, int, int] | None]:
        """A page of about ``size`` applied operations with a claim, newest first, of the entries from ``since_ms`` on and before
        (at_ms, epoch, sequence); and where the next page begins, None at the end."""
        ...

    async def reject(self, entry: JournalEntry, refused: Sequence[tuple[int, str]]) -> None:
        """Rows for operations (index, reason) of an entry that came after its epoch was closed and that the current epoch
        refused: status ``rejected``, at a position of epoch 0, nothing moves."""
        ...

    async def reservation(self, key: str) -> ReservationRow | None: ...
    async def take_stale(self, partition: int, before_ms: int, limit: int) -> list[ReservationRow]:
        """Live reservations opened before ``before_ms`` that were not reported yet; marks them as reported."""
        ...

    async def pending_credits(self, partition: int, epoch: int) -> list[Credit]: ...
    async def pending_voids(self, partition: int, epoch: int) -> list[Void]: ...

    async def decide(self, key: str, verdict: Literal["committed", "aborted"], connection: AsyncConnection | None = None) -> str:
        """Write the verdict on a pinned hold unless one stands; the verdict that stands."""
        ...

    async def due_tasks(self, limit: int, serves: TaskFilter | None = None) -> list[Task]:
        """Pending tasks whose time has come, at most one (the oldest) per group; ``serves``: of those only, though the others still
        hold up their group."""
        ...

    async def run_tasks(
        self,
        tasks: Sequence[Task],
        call: Callable[[Task, AsyncSession], Awaitable[None]],
        more: Callable[[], bool] = ...,
        most: int = ...,
    ) -> list[TaskRun]:
        """In one transaction, one after another: ``most`` of the tasks that nobody else has are marked done, and ``call`` runs each in a
        savepoint. ``more`` is asked before each but the first; False ends the transaction there. The answer has those that were run.

        What ``call`` raises undoes that task alone and is in the answer; where one task is given it is raised, and so is a database's
        fault, such as a deadlock. ``TasksSpoilt`` where one can't be undone alone. After an error run them one by one: nothing that
        was committed runs again."""
        ...

    async def fail_task(self, task: Task, error: str, retry_in: float | None) -> None:
        """Note the failure; None: dead letter."""
        ...

    async def dead_tasks(self, limit: int = 100) -> list[tuple[Task, str]]: ...
    async def verify(self) -> list[str]:
        """Promise 6, checked over all rows: supplied adds up, change chains are unbroken, reservations match their lines.
        What is broken, in words; empty when all is well."""
        ...
