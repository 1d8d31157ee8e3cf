"""The data of the house: small, frozen, checked at the door. No I/O lives here.

Control characters are refused in everything a user names, so ``\\x1f`` separates the parts of a key:
``merchant\\x1fsku`` is a stock field, ``merchant\\x1foperation_id`` an operation or reservation key.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

from inventory_sdk.errors import InvalidOperation

SEPARATOR: Final = "\x1f"
PART: Final = "\x1fpart\x1f"
"""Between the key of a call over several partitions and the number of the one that a part of it stands in."""
MAX_QUANTITY: Final = 10**9
MAX_BALANCE: Final = 10**13
"""Largest balance of one SKU: cjson prints 14 significant digits, and a sum must stay exact."""
MAX_ID_BYTES: Final = 128
MAX_LINES: Final = 512
MAX_TTL: Final = 366 * 24 * 3600
MAX_LANE_WAIT: Final = 3600
"""Longest ``max_wait`` of a lane: nobody waits in line for ever."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Kind(StrEnum):
    """What an operation does. The first seven are the public ones; the others end holds or mend counters."""

    RESERVE = "reserve"
    DEDUCT = "deduct"
    CONFIRM = "confirm"
    RELEASE = "release"
    RESTOCK = "restock"
    TAKE_BACK = "take_back"
    ADJUST = "adjust"

    OPEN = "open"
    """Opening balance, read through ``reads_stock``."""
    EXTEND = "extend"
    EXPIRE = "expire"
    REACQUIRE = "reacquire"
    """Confirm of an expired reservation that took its stock again."""
    TOMBSTONE = "tombstone"
    """Release of an unknown reservation: closes the name, so that a late reserve takes nothing."""
    UNDO = "undo"
    KEEP = "keep"
    CLAIM = "claim"
    """Takes an id at its home for an act that is done elsewhere: in the partition of the reservation that it closes."""
    PIN = "pin"
    RESUME = "resume"
    CREDIT = "credit"
    VOID = "void"
    CORRECT = "correct"


class Deltas(NamedTuple):
    """What one unit of a kind does to a ledger row."""

    available: int = 0
    reserved: int = 0
    sold: int = 0
    supplied: int = 0
    written_off: int = 0

    def negated(self) -> Deltas:
        """The exact inverse: what an undo does."""
        return Deltas(*(-delta for delta in self))


NO_DELTAS: Final = Deltas()

LEDGER_DELTAS: Final[dict[str, Deltas]] = {
    Kind.RESERVE: Deltas(available=-1, reserved=+1),
    Kind.DEDUCT: Deltas(available=-1, sold=+1),
    Kind.CONFIRM: Deltas(reserved=-1, sold=+1),
    Kind.RELEASE: Deltas(available=+1, reserved=-1),
    Kind.EXPIRE: Deltas(available=+1, reserved=-1),
    Kind.REACQUIRE: Deltas(available=-1, sold=+1),
    Kind.ADJUST: Deltas(available=-1, written_off=+1),
    Kind.RESTOCK: Deltas(available=+1, supplied=+1),
    Kind.OPEN: Deltas(available=+1, supplied=+1),
    Kind.TAKE_BACK: Deltas(available=+1, sold=-1),
}
"""Ledger deltas per unit. ``adjust`` here is the journaled, negative one (its journal quantity is the positive amount taken);
a positive adjust supplies like a restock. Kinds that are not listed move nothing in the ledger."""


def check_text(field: str, value: object) -> str:
    """The value, if it may name something: 1 to 128 bytes of UTF-8 without control characters; else ``InvalidOperation``."""
    if type(value) is not str and not isinstance(value, str):
        raise InvalidOperation(field, value, "must be a string")
    if not value:
        raise InvalidOperation(field, value, "must not be empty")
    if len(value) <= MAX_ID_BYTES and value.isascii() and value.isprintable():
        return value
    if _CONTROL.search(value):
        raise InvalidOperation(field, value, "must not contain control characters")
    if len(value.encode()) > MAX_ID_BYTES:
        raise InvalidOperation(field, value, f"must be at most {MAX_ID_BYTES} bytes of UTF-8")
    return value


def check_ttl(ttl: object) -> float | None:
    """Seconds a hold lives, or None: held until it is closed."""
    if ttl is None:
        return None
    if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= MAX_TTL:
        raise InvalidOperation("ttl", ttl, f"must be seconds, more than 0 and at most {MAX_TTL}, or None")
    return ttl


@dataclass(frozen=True, slots=True)
class Line:
    """``quantity`` units of ``sku``; ``merchant`` names another shop than the call's."""

    sku: str
    quantity: int
    merchant: str | None = None

    def __post_init__(self) -> None:
        check_text("sku", self.sku)
        quantity = self.quantity
        if type(quantity) is not int:
            raise InvalidOperation("quantity", quantity, f"must be a whole number (sku {self.sku!r})")
        if quantity == 0 or not -MAX_QUANTITY <= quantity <= MAX_QUANTITY:
            raise InvalidOperation("quantity", quantity, f"must not be zero, nor larger than {MAX_QUANTITY} (sku {self.sku!r})")
        if self.merchant is not None:
            check_text("merchant", self.merchant)


@dataclass(frozen=True, slots=True)
class Shortage:
    """One line that could not be covered."""

    merchant: str
    sku: str
    requested: int
    available: int


class Position(NamedTuple):
    """Where an operation stands in the journal. Epoch 0 is the ledger's own: movements that entered through SQL."""

    partition: int
    epoch: int
    sequence: int


class ReceiptLine(NamedTuple):
    """One line of a receipt; ``remaining`` is what was available right after it, as the first receipt saw it."""

    merchant: str
    sku: str
    quantity: int
    remaining: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was accepted. Lines are summed per merchant and SKU and sorted. ``replayed``: an earlier call had moved it."""

    operation_id: str
    kind: str
    merchant: str
    order: str | None
    lines: tuple[ReceiptLine, ...]
    positions: tuple[Position, ...]
    durability: str
    replayed: bool = False


class _Draft:
    """Fills a receipt's slots at a third of the cost of a frozen ``__init__`` (one per call of a flash sale), then becomes one."""

    __slots__ = ("durability", "kind", "lines", "merchant", "operation_id", "order", "positions", "replayed")


def new_receipt(
    operation_id: str,
    kind: str,
    merchant: str,
    order: str | None,
    lines: tuple[ReceiptLine, ...],
    position: Position,
    durability: str,
    replayed: bool,
) -> Receipt:
    """A receipt of one position."""
    draft: Any = _Draft()
    draft.operation_id = operation_id
    draft.kind = kind
    draft.merchant = merchant
    draft.order = order
    draft.lines = lines
    draft.positions = (position,)
    draft.durability = durability
    draft.replayed = replayed
    draft.__class__ = Receipt
    return draft  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class StockLevel:
    """What Redis says now. ``sequence`` is the last journal entry that this reading includes."""

    available: int
    reserved: int
    epoch: int
    sequence: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A hold and what became of it; ``state`` is ``held``, ``confirmed``, ``released`` or ``expired``.

    ``expires_at`` is in Unix seconds by Redis' clock, None: until closed.
    """

    reservation: str
    merchant: str
    state: str
    held: tuple[Line, ...]
    confirmed: tuple[Line, ...]
    released: tuple[Line, ...]
    expires_at: float | None
    order: str | None = None


@dataclass(frozen=True, slots=True)
class Movement:
    """One line of an applied operation, as ``writes_stock`` gets it; the deltas are signed units."""

    merchant: str
    sku: str
    kind: str
    quantity: int
    available: int
    reserved: int
    sold: int
    operation_id: str
    order: str | None
    reservation: str | None
    position: Position
    index: int
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class OpeningBalance:
    """What the service's own table says of one SKU, for ``reads_stock``.

    ``reservations`` lists live holds of the service, (reservation id, quantity); they are part of neither number but their own.
    """

    sku: str
    available: int
    reservations: Sequence[tuple[str, int]] = ()

    def __post_init__(self) -> None:
        check_text("sku", self.sku)
        if type(self.available) is not int or not 0 <= self.available <= MAX_BALANCE:
            raise InvalidOperation("available", self.available, f"must be a whole number from 0 to {MAX_BALANCE} (sku {self.sku!r})")


@dataclass(frozen=True, slots=True)
class Lane:
    """A class of calls with its own concurrency, queue and time, per process and event loop. Times are in seconds.

    At most ``max_concurrency`` calls run at once, at most ``max_queue`` wait in line for at most ``max_wait``. A call has
    ``timeout`` plus ``timeout_per_line`` for each of its lines, waiting included; infinity: no limit. ``borrows_from``: lanes
    whose idle slots it may use when its own are taken; they don't borrow back. ``connections``: how many script calls of this
    lane may be under way in Redis at once; None: one per partition. ``InvalidOperation`` for anything else.
    """

    max_concurrency: int = 64
    max_queue: int = 256
    max_wait: float = 0.05
    timeout: float = 0.5
    timeout_per_line: float = 0.0
    borrows_from: tuple[str, ...] = ()
    connections: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_concurrency", 1), ("max_queue", 0), ("connections", 1)):
            number = getattr(self, name)
            if not (type(number) is int and number >= least) and not (name == "connections" and number is None):
                raise InvalidOperation(name, number, f"must be a whole number, at least {least}")
        _check_seconds("max_wait", self.max_wait, 0 <= _number(self.max_wait) <= MAX_LANE_WAIT, f"from 0 to {MAX_LANE_WAIT}")
        timeout = _number(self.timeout)
        _check_seconds(
            "timeout", self.timeout, 0 < timeout <= MAX_TTL or timeout == math.inf, f"more than 0, at most {MAX_TTL} or infinite"
        )
        _check_seconds("timeout_per_line", self.timeout_per_line, 0 <= _number(self.timeout_per_line) <= MAX_TTL, f"from 0 to {MAX_TTL}")
        if isinstance(self.borrows_from, str) or not all(isinstance(name, str) for name in self.borrows_from):
            raise InvalidOperation("borrows_from", self.borrows_from, "must be a tuple of the names of lanes")
        object.__setattr__(self, "borrows_from", tuple(self.borrows_from))


@dataclass(frozen=True, slots=True)
class Detection:
    """How hot keys are found. Times are in seconds.

    A key's rate is that of all processes over the last ``window``. It is hot from its threshold on, and cool again when it has been
    below ``cool`` (a part of its threshold) for ``stay``, and hot for as long. ``promote``: calls per second at which
    ``admission="auto"`` moves a SKU to Redis. ``InvalidOperation`` for anything else.
    """

    window: float = 0.6
    stay: float = 10.0
    cool: float = 0.5
    promote: str = "100/second"

    def __post_init__(self) -> None:
        _check_seconds("window", self.window, 0.4 <= _number(self.window) <= 60, "from 0.4 to 60")
        _check_seconds("stay", self.stay, 0 < _number(self.stay) <= MAX_TTL, f"more than 0, at most {MAX_TTL}")
        if not 0 < _number(self.cool) < 1:
            raise InvalidOperation("cool", self.cool, "must be a part of the threshold, between 0 and 1")


def _number(value: object) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _check_seconds(field: str, value: object, fits: bool, what: str) -> None:
    if not fits:
        raise InvalidOperation(field, value, f"must be seconds, {what}")


class JournalOperation(NamedTuple):
    """One operation of a journal entry, as the batch script wrote it (see docs/reference/journal.md).

    ``lines`` is flat: field, quantity, field, quantity, …; ``remaining`` has one number per line.
    """

    kind: str
    key: str
    fingerprint: str
    lines: list[Any]
    remaining: list[int]
    order: str
    reference: str
    expires_at: int
    extra: str

    @property
    def merchant(self) -> str:
        """The merchant of the call."""
        return self.key.partition(SEPARATOR)[0]

    @property
    def operation_id(self) -> str:
        """The id of the act; derived ones contain ``\\x1f``."""
        return self.key.partition(SEPARATOR)[2]


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One script call's accepted operations. ``at_ms`` is Redis' time; ``nonce`` is unique per script call."""

    partition: int
    epoch: int
    sequence: int
    nonce: str
    at_ms: int
    operations: tuple[JournalOperation, ...]


def key_of(merchant: str, name: str) -> str:
    """``merchant\\x1fname``: a stock field where name is a SKU, an operation or reservation key where it is an id."""
    return f"{merchant}{SEPARATOR}{name}"


def split_key(key: str) -> tuple[str, str]:
    """The inverse of ``key_of``."""
    merchant, _, name = key.partition(SEPARATOR)
    return merchant, name


def summed(lines: Iterable[Line], merchant: str) -> list[Any]:
    """Flat [field, quantity, …], one pair per merchant and SKU, sorted: the canonical form that scripts and fingerprints use."""
    totals: dict[str, int] = {}
    for line in lines:
        field = f"{line.merchant or merchant}{SEPARATOR}{line.sku}"
        totals[field] = totals.get(field, 0) + line.quantity
    flat: list[Any] = []
    for field in sorted(totals):
        flat.append(field)
        flat.append(totals[field])
    return flat


_SHORT: Final[dict[str, str]] = {Kind.RESERVE: "r", Kind.DEDUCT: "d", Kind.ADJUST: "a"}


def fingerprint(kind: str, reference: str, flat: Sequence[Any]) -> str:
    """Stands for kind, reservation or ``of``, and the sorted summed lines; not for ttl, durability or reason.

    A short text of one line stands for itself (``d2 m1␟sku-7``, ␟ is ``\\x1f``); anything longer is 16 hex digits over it.
    """
    if len(flat) == 2 and not reference and kind in _SHORT:
        mark = f"{_SHORT[kind]}{flat[1]} {flat[0]}"
        if len(mark) <= 24:
            return mark
    text = f"{kind}\x1e{reference}\x1e" + "\x1e".join(map(str, flat))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


PARTITION_BY: Final = ("merchant", "sku")
_TRIES: Final = 64


def partition_of(name: str, partitions: int) -> int:
    """crc32 of the name's UTF-8, modulo the number of partitions: the same in every process and language."""
    return zlib.crc32(name.encode()) % partitions if partitions > 1 else 0


@dataclass(frozen=True, slots=True)
class Layout:
    """Where stock and operations live: ``partitions`` of them, told apart ``by`` merchant, or by SKU for one giant merchant.

    ``InvalidOperation`` for any other ``by``. The rule is in docs/explanation/spanning.md; every process on one stock keeps the same.
    """

    partitions: int = 1
    by: str = "merchant"

    def __post_init__(self) -> None:
        if self.by not in PARTITION_BY:
            raise InvalidOperation("partition_by", self.by, f"must be one of {', '.join(PARTITION_BY)}")

    def __str__(self) -> str:
        return f"{self.partitions} by {self.by}"

    @property
    def apart(self) -> bool:
        """Whether one merchant's stock stands in several partitions."""
        return self.partitions > 1 and self.by == "sku"

    def of(self, field: str) -> int:
        """The partition of a stock field: of its merchant, or by SKU of all of it, ``merchant\\x1fsku``."""
        return partition_of(field if self.by == "sku" else field.partition(SEPARATOR)[0], self.partitions)

    def home(self, key: str) -> int:
        """The partition in which an operation or a reservation is decided, whatever its lines: of its merchant, or by SKU of
        ``merchant\\x1fid``. A derived id (``id\\x1f…``) has the home of the one that it comes from."""
        if self.by != "sku":
            return partition_of(key.partition(SEPARATOR)[0], self.partitions)
        merchant, _, name = key.partition(SEPARATOR)
        return partition_of(f"{merchant}{SEPARATOR}{name.partition(SEPARATOR)[0]}", self.partitions)

    def hold(self, key: str) -> int:
        """The partition of a reservation's record: its home, or the one that the key of a part names."""
        call, part, number = key.rpartition(PART)
        return int(number) if part and call else self.home(key)

    def id_at(self, merchant: str, start: str, partition: int) -> str:
        """An id that begins with ``start`` and is at home in ``partition``, so that a call with all of its lines there needs no other;
        ``start`` itself where the id does not matter, or (in theory) none was found."""
        if not self.apart:
            return start
        begun = zlib.crc32(f"{merchant}{SEPARATOR}{start}-".encode())
        for number in range(_TRIES * self.partitions):
            if zlib.crc32(b"%x" % number, begun) % self.partitions == partition:
                return f"{start}-{number:x}"
        return start
