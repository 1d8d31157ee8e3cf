"""The auditor: a plain model of what was asked, answered, journaled and applied, in words of its own.

It sees every call and every reply, every journal entry and counter that any Redis wrote, every commit of the ledger; it shares no
rule with the SDK. ``fail`` ends the seed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.errors import InsufficientStock, InventoryError, OutcomeUnknown
from inventory_sdk.model import Receipt
from tests.model.simulator.redis import runtime

if TYPE_CHECKING:
    from tests.model.simulator.redis import Server
    from tests.model.simulator.world import World

Place = tuple[int, int, int]
"""(partition, epoch, sequence)."""

EFFECTS: Final[dict[str, tuple[int, int, int, int, int]]] = {
    # available, reserved, sold, supplied, written off
    "reserve": (-1, 1, 0, 0, 0),
    "deduct": (-1, 0, 1, 0, 0),
    "confirm": (0, -1, 1, 0, 0),
    "release": (1, -1, 0, 0, 0),
    "expire": (1, -1, 0, 0, 0),
    "reacquire": (-1, 0, 1, 0, 0),
    "adjust": (-1, 0, 0, 0, 1),
    "restock": (1, 0, 0, 1, 0),
    "take_back": (1, 0, -1, 0, 0),
}
TAKES: Final = ("reserve", "deduct", "adjust")


class Violation(AssertionError):
    """A promise was broken."""


@dataclass(eq=False)
class Attempt:
    """One call. ``key`` is None where the SDK makes the id up; ``flat``: [field, quantity, …], None where the call names no lines."""

    number: int
    kind: str
    merchant: str
    key: str | None
    flat: list[Any] | None
    level: str | None
    process: str
    started: float
    state: str = "running"
    receipt: Receipt | None = None
    error: BaseException | None = None
    ended: float = 0.0
    bad: bool = False
    """Input that must be refused."""

    def __str__(self) -> str:
        name = self.key.replace("\x1f", "/") if self.key else f"{self.merchant}/(made up)"
        return f"#{self.number} {self.kind} {name} {_shown(self.flat)} at {self.level or 'default'}"


@dataclass
class Entry:
    """One journal entry as some server wrote it."""

    place: Place
    nonce: str
    operations: list[list[Any]]
    body: str
    server: Server
    at: int
    """How long that server's log was then."""
    lost_by: str = ""
    """What befell Redis that the one which goes on does not have it: ``emptied``, ``rolled_back``, ``failed_over``."""


@dataclass
class Auditor:
    """One seed's."""

    world: World
    attempts: list[Attempt] = field(default_factory=list)
    entries: dict[Place, list[Entry]] = field(default_factory=dict)
    counters: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    lost: set[Place] = field(default_factory=set)
    rejected: set[str] = field(default_factory=set)
    """Keys that ``on("rejected")`` has named."""
    undone: Counter[str] = field(default_factory=Counter)
    branches: list[float] = field(default_factory=list)
    confirmed: dict[Place, set[str]] = field(default_factory=dict)
    firsts: dict[tuple[str, Place, str], Receipt] = field(default_factory=dict)
    """By key, place and nonce: both sides of a fork may have the same act there."""
    tolerated: Counter[str] = field(default_factory=Counter)
    violation: str | None = None

    def fail(self, why: str) -> None:
        """The seed is over."""
        self.world.trace("VIOLATION", why)
        self.violation = self.violation or why
        raise Violation(why)

    def check(self) -> None:
        """A violation found in some task ends the whole seed."""
        if self.violation is not None:
            raise Violation(self.violation)

    def must(self, holds: object, why: str) -> None:
        if not holds:
            self.fail(why)

    # What the doubles tell -------------------------------------------------------------------------------------------------------

    def counted(self, server: Server, name: str, value: int) -> None:
        """A Redis wrote this available counter."""
        self.counters.setdefault(name, []).append((self.world.loop.time(), value))

    def journaled(self, server: Server, partition: int, name: str, body: str) -> None:
        """A Redis wrote a journal entry."""
        raw = json.loads(body)
        epoch, _, sequence = name.partition("-")
        place = (partition, int(epoch), int(sequence))
        lost_by = "failed_over" if server is not self.world.redis else ""
        entry = Entry(place, raw["n"], raw["ops"], body, server, server.length(), lost_by)
        self.entries.setdefault(place, []).append(entry)
        for operation in raw["ops"]:
            # Later operations of the same batch see these, though they are never written one by one.
            step = 3 if operation[0] == "void" else 2
            for name_of, left in zip(_lines(operation)[::step], operation[4] or (), strict=False):
                self.counted(server, name_of, left)
        self.world.trace("journal", f"{partition}/{name}", server.name, "; ".join(_told(op) for op in raw["ops"]))

    def branched(self, old: Server, new: Server, why: str) -> None:
        """``new`` goes on with what was kept of ``old``."""
        self.branches.append(self.world.loop.time())
        have: set[tuple[int, str, str]] = set()
        keys = runtime().lua.eval(b"function(s) local o = {} for k in pairs(s.keys) do o[#o+1] = k end return o end")(new.state)
        for key in runtime().plain(keys):
            if key.endswith(b":journal"):
                partition = int(key.decode().partition("}")[0].rpartition(":")[2])
                _, rows, _, _ = runtime().out[b"command"](new.state, 0, 0, b"", b"", b"XRANGE", key, b"-", b"+")
                for name, flat in runtime().plain(rows):
                    have.add((partition, name.decode(), json.loads(flat[1])["n"]))
        for (partition, epoch, sequence), entries in self.entries.items():
            for entry in entries:
                # Trimmed entries are applied; nothing is trimmed within ten minutes.
                if (partition, f"{epoch}-{sequence}", entry.nonce) not in have:
                    entry.lost_by = entry.lost_by or why

    def acknowledged(self, message: Any) -> None:
        """The broker forgets a message: the ledger must know it, or its position."""
        place = (message.partition, message.epoch, message.sequence)
        if place not in self.world.database.tables.entries:
            self.unacknowledged_loss.append(place)

    unacknowledged_loss: list[Place] = field(default_factory=list)

    def announced(self, messages: Sequence[Any]) -> None:
        """Only what is committed is told on."""
        for message in messages:
            place = (message.partition, message.epoch, message.sequence)
            self.must(place in self.world.database.tables.entries, f"{place} was announced before it was committed")

    def applied(self, partition: int, epoch: int, sequences: Sequence[int], gone: Sequence[int]) -> None:
        """The ledger committed a run of entries."""
        self.world.trace("applied", f"{partition}/{epoch}", list(sequences), f"lost {list(gone)}" if gone else "")
        self.lost.update((partition, epoch, sequence) for sequence in gone)
        for sequence in sequences:
            nonce = self.world.database.tables.entries[partition, epoch, sequence][0]
            written = {entry.nonce for entry in self.entries.get((partition, epoch, sequence), ())}
            self.must(nonce in written, f"the ledger applied {partition}/{epoch}-{sequence}, which no Redis has written")

    def entered(self, rows: Sequence[list[Any]]) -> None:
        """The ledger committed what entered through it."""
        self.world.trace("entered", [f"{row[7]} {row[4]}/{row[5]}" for row in rows])

    def opened(self, partition: int, epoch: int) -> None:
        """The ledger opened an epoch."""
        self.world.trace("opened", f"partition {partition} at epoch {epoch}")

    async def told(self, name: str, facts: Mapping[str, Any]) -> None:
        """An event for ``@inventory.on``."""
        self.events[name] += 1
        if name == "rejected":
            self.rejected.add(f"{facts['merchant']}\x1f{facts['operation_id']}")
        self.world.trace("event", name, {key: value for key, value in facts.items() if key != "body"})

    # Replies -----------------------------------------------------------------------------------------------------------------------

    def asks(self, attempt: Attempt) -> Attempt:
        """A call begins."""
        self.attempts.append(attempt)
        self.world.trace("ask", attempt, "by", attempt.process)
        return attempt

    def answered(self, attempt: Attempt, receipt: Receipt) -> None:
        """A call returned."""
        attempt.state, attempt.receipt, attempt.ended = "done", receipt, self.world.loop.time()
        replayed = "replayed" if receipt.replayed else ""
        self.world.trace("answer", attempt, receipt.positions, [line.remaining for line in receipt.lines], receipt.durability, replayed)
        self.must(not attempt.bad, f"{attempt} is not valid and was accepted")
        flat = [value for line in receipt.lines for value in (f"{line.merchant}\x1f{line.sku}", abs(line.quantity))]
        key = f"{receipt.merchant}\x1f{receipt.operation_id}"
        self.must(receipt.merchant == attempt.merchant, f"{attempt}: the receipt is of merchant {receipt.merchant}")
        self.must(attempt.key is None or attempt.key == key, f"{attempt}: the receipt is of {key!r}")
        self.must(attempt.flat is None or attempt.flat == flat, f"{attempt}: the receipt moved {_shown(flat)}")
        self.must(receipt.kind == attempt.kind, f"{attempt}: the receipt is of a {receipt.kind}")
        place: Place = tuple(receipt.positions[0])  # type: ignore[assignment]
        if place[1] > 0:
            self._check_place(attempt, receipt, key, flat, place)
            # A close is decided at home; where its parts followed is behind that.
            for each in receipt.positions if receipt.kind in TAKES else receipt.positions[:1]:
                self._check_level(attempt, receipt, tuple(each))  # type: ignore[arg-type]
        elif place not in self.world.database.tables.entries:
            self.fail(f"{attempt}: the ledger has nothing at {place}")

    def _check_place(self, attempt: Attempt, receipt: Receipt, key: str, flat: list[Any], place: Place) -> None:
        found, nonce = None, ""
        for entry in self.entries.get(place, ()):
            for operation in entry.operations:
                whole, remaining = merged(operation)
                # A release of what went with a named loss has moved nothing in the end, and a repeat says so.
                moved_nothing = not flat and attempt.kind == "release" and receipt.replayed and self.lost
                if operation[1] == key and (whole == flat or moved_nothing):
                    found, nonce = operation, entry.nonce
                    # What a close left in other partitions is known only when its parts have followed.
                    apart = operation[0] not in TAKES and parts_of(operation)
                    if apart or remaining == [line.remaining for line in receipt.lines]:
                        break
            else:
                continue
            break
        else:
            self.must(found, f"{attempt}: no Redis has journaled it at {place}")
            self.must(
                receipt.replayed,
                f"{attempt}: remaining {[line.remaining for line in receipt.lines]}, the journal says {found and found[4]}",
            )
        first = self.firsts.setdefault((key, place, nonce), receipt)
        same = [line.remaining for line in first.lines] == [line.remaining for line in receipt.lines]
        # What a close leaves in other partitions is told as it is when they follow, and not remembered.
        same = same or (receipt.kind not in TAKES and found is not None and bool(parts_of(found)))
        self.must(same or not receipt.replayed, f"{attempt}: the replay's receipt is not the first: {receipt} after {first}")
        if not receipt.replayed:
            self._check_once(attempt, key, place)

    def _check_once(self, attempt: Attempt, key: str, place: Place) -> None:
        """Another acceptance of the same id needs the first one undone, or lost with its Redis."""
        for other in self.attempts:
            if other is attempt or other.receipt is None or other.receipt.replayed or other.receipt.kind != attempt.kind:
                continue
            if f"{other.receipt.merchant}\x1f{other.receipt.operation_id}" != key:
                continue
            before: Place = tuple(other.receipt.positions[0])  # type: ignore[assignment]
            gone = self.undone[key] or self.is_forgotten(before) or self.is_forgotten(place)
            # Beyond the results window the ledger finds the repeat, and voids it.
            gone = gone or (self.world.forgets and attempt.ended - other.ended > self.world.forgets)
            self.must(gone, f"{attempt} was accepted at {place}, though {other} was at {before}")

    def is_forgotten(self, place: Place) -> bool:
        """Some server's entry of this position is not in the Redis that went on."""
        return any(entry.lost_by for entry in self.entries.get(place, ()))

    def _check_level(self, attempt: Attempt, receipt: Receipt, place: Place) -> None:
        tables = self.world.database.tables
        known = place in tables.entries
        if receipt.durability == "queue":
            safe = known or place in self.world.broker.ever_confirmed
            self.must(safe, f"{attempt} was acknowledged at queue, and neither queue nor ledger have {place}")
        elif receipt.durability in ("replica", "aof") and not known:
            which = "copied" if receipt.durability == "replica" else "synced"
            for entry in self.entries.get(place, ()):
                # What another server has taken over, its own copies have.
                has = entry.lost_by or entry.server is not self.world.redis or getattr(entry.server, which) >= entry.at
                self.must(has, f"{attempt} was acknowledged at {receipt.durability}, and {place} is not {which} yet")
        elif receipt.durability == "database":
            self.must(known, f"{attempt} was acknowledged at database, and the ledger does not have {place}")

    def refused(self, attempt: Attempt, error: BaseException) -> None:
        """A call raised."""
        attempt.error, attempt.ended = error, self.world.loop.time()
        attempt.state = "refused" if isinstance(error, InventoryError) and not isinstance(error, OutcomeUnknown) else "unknown"
        if type(error).__name__ in ("DurabilityNotReached", "ReplyLost"):
            attempt.state = "unknown"
        self.world.trace("refuse", attempt, f"{type(error).__name__}: {error}")
        self.must(isinstance(error, InventoryError), f"{attempt} raised an error that is none of the SDK's: {error!r}")
        if isinstance(error, InsufficientStock):
            self._check_shortage(attempt, error)

    def _check_shortage(self, attempt: Attempt, error: InsufficientStock) -> None:
        asked = dict(zip((attempt.flat or [])[::2], (attempt.flat or [])[1::2], strict=True))
        for short in error.shortages:
            name = f"{short.merchant}\x1f{short.sku}"
            if asked:
                self.must(asked.get(name) == short.requested, f"{attempt}: the shortage asks for {short.requested} of {name!r}")
            self.must(short.available < short.requested, f"{attempt}: {short.available} are enough for {short.requested}")
            if attempt.level == "database" or self.branches:
                continue
            seen = self.counters.get(name, [])
            values = {value for at, value in seen if attempt.started <= at <= attempt.ended}
            earlier = [value for at, value in seen if at < attempt.started]
            values.update(earlier[-1:])
            self.must(short.available in values, f"{attempt}: told of {short.available} of {name!r}, Redis had {sorted(values)} meanwhile")

    def cancelled(self, attempt: Attempt) -> None:
        """Its caller went away."""
        attempt.state, attempt.ended = "cancelled", self.world.loop.time()
        self.world.trace("cancelled", attempt)


def _lines(operation: list[Any]) -> list[Any]:
    return list(operation[3] or ())


def parts_of(operation: list[Any]) -> list[list[Any]]:
    """Of an operation that spans partitions: [partition, position of the part, its lines, what was left], …"""
    extra = operation[8] if len(operation) > 8 else None
    if not extra:
        return []
    return list((json.loads(extra) if isinstance(extra, str) else extra).get("parts") or ())


def merged(operation: list[Any]) -> tuple[list[Any], list[int]]:
    """All lines of an operation, those of its parts included, by field; and what was left of each."""
    rows = []
    for lines, left in ((_lines(operation), operation[4] or ()), *((part[2] or (), part[3] or ()) for part in parts_of(operation))):
        known = [*left, *[0] * (len(lines) // 2 - len(left))]
        rows += list(zip(lines[::2], lines[1::2], known, strict=True))
    rows.sort()
    return [value for name, quantity, _ in rows for value in (name, quantity)], [left for _, _, left in rows]


def _shown(flat: list[Any] | None) -> str:
    if flat is None:
        return "(all)"
    return ",".join(f"{name.replace(chr(31), '/')}×{quantity}" for name, quantity in zip(flat[::2], flat[1::2], strict=True))


def _told(operation: list[Any]) -> str:
    lines = _lines(operation)
    shown = _shown(lines) if operation[0] != "void" else str(lines).replace("\x1f", "/")
    return f"{operation[0]} {str(operation[1]).replace(chr(31), '/')} {shown}"
