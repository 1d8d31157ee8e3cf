"""A take over several partitions: its parts are prepared, home decides once, the parts follow (docs/explanation/spanning.md).

The work goes on in a task of its own, so that it never stops between two steps because its caller went away; a caller who left
is noticed before the decision (then everything is given up) and after it (a take with a made-up id is undone, another stands).
A process that dies leaves parts behind that are pinned and overdue soon: whoever finds them resolves them (``deciding.py``).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.errors import (
    DurabilityNotReached,
    InsufficientStock,
    InvalidOperation,
    InventoryError,
    OperationConflict,
    Overloaded,
    UnknownStock,
)
from inventory_sdk.ledger.protocol import OperationRow
from inventory_sdk.metrics.events import Retried
from inventory_sdk.model import Kind, Position, Receipt, ReceiptLine, Shortage, fingerprint, split_key
from inventory_sdk.stock import deciding, reading
from inventory_sdk.stock.answers import closed, error, public_kind, refused
from inventory_sdk.stock.batch import ASK_LEDGER, CLOSED, CONFLICT, DONE, DONE_LINES, GIVEN_UP, REPLAY, SHORT, TOO_LATE, Answer, Answered
from inventory_sdk.stock.deciding import PART_OVERDUE_MS, Part
from inventory_sdk.stock.parts import MEANING, Instance, Spread, merged, part_key, plain, unmarked
from inventory_sdk.stock.records import read_result
from inventory_sdk.stock.waits import FLAGS

if TYPE_CHECKING:
    from inventory_sdk.stock.engine import Engine

log = logging.getLogger("inventory_sdk.stock")

ATTEMPTS: Final = 4
"""Preparations of one call before it ends in ``Overloaded``: each was given up by somebody who found it overdue."""

Reach = Callable[["Engine", Position, str, str, Answered | None], Awaitable[OperationRow | None]]


@dataclass(frozen=True, slots=True)
class Taking:
    """One call, checked and spread. ``flat`` are all its lines, plain; ``undoable``: an undo may follow (a made-up id, or a function
    that runs with the stock in hand)."""

    kind: str
    key: str
    flat: list[Any]
    spread: Spread
    order: str
    hold_ms: int
    extra: str
    level: str
    made_up: bool
    undoable: bool

    @property
    def sign(self) -> int:
        return -1 if self.kind == Kind.ADJUST else 1


@dataclass(slots=True)
class _Prepared:
    part: Part
    remaining: Sequence[int]
    fresh: bool


@dataclass(frozen=True, slots=True)
class _Decided:
    """``batch`` is that of the decision, None for a replay."""

    receipt: Receipt
    batch: Answered | None


class _Left(InventoryError):
    """The caller went away; nobody hears this."""


async def take(engine: Engine, reach: Reach, taking: Taking) -> Receipt:
    """Reserve, deduct or write off over several partitions: all lines or none."""
    work = _Work(engine, reach, taking)
    name = split_key(taking.key)[1]
    task = engine.in_background(work.outcome(), f"parts of {name}")
    try:
        outcome: _Decided | Exception = await asyncio.shield(task)
    except asyncio.CancelledError:
        work.left = True
        if task.done() and not task.cancelled():
            work.leave(task.result())
        raise
    if isinstance(outcome, Exception):
        raise outcome
    if outcome.batch is not None:
        engine.in_background(finish(engine, taking, outcome.batch), f"following of {name}")
    return outcome.receipt


async def finish(engine: Engine, taking: Taking, batch: Answered) -> None:
    """After the caller was answered: the decision can't be undone any more (unless a function still runs), the parts follow."""
    try:
        if batch.confirmed is not None:
            await batch.confirmed  # a part must not outlive its decision
        if taking.kind == Kind.ADJUST and taking.undoable:
            return
        if taking.kind == Kind.DEDUCT and taking.undoable and not await _keep(engine, taking.key, batch.position):
            return
    except Exception as fault:  # noqa: BLE001 - the worker behind us follows as well, and after it whoever finds the parts overdue
        engine.metrics.record(Retried("follow", type(fault).__name__))
        return
    await follow(engine, taking.key)


async def follow(engine: Engine, key: str) -> None:
    """Let the parts follow home's decision, now if possible; else the worker and the parts' own clocks see to it."""
    try:
        await deciding.follow_call(engine, key, patient=False)
    except Exception as fault:  # noqa: BLE001 - see above
        engine.metrics.record(Retried("follow", type(fault).__name__))
        log.warning("the parts of %r did not follow now: %r", split_key(key)[1], fault)


async def bring_up(engine: Engine, call: str) -> None:
    """Somebody gives back what this call has sold: from now on it can't be undone, and its parts follow, now if possible."""
    try:
        decided, certain = await deciding.decision(engine, call, patient=False)
        if decided is None or not certain or not decided.instances:
            return
        if not decided.kept and decided.lines is None and not await deciding.keep(engine, call, decided.instances[0]):
            return
    except Exception as fault:  # noqa: BLE001 - see above
        engine.metrics.record(Retried("follow", type(fault).__name__))
        return
    await follow(engine, call)


async def _keep(engine: Engine, key: str, position: Position) -> bool:
    mark = f"{position.epoch}-{position.sequence}"
    operation: list[Any] = ["keep", f"{key}\x1fkeep", "", [], "", key, 0, "", mark, ""]
    answer, _ = await engine.send(engine.partitions[position.partition], operation)
    return bool(answer[0] != TOO_LATE)


async def closed_parts(
    engine: Engine, hold: str, moved: Sequence[Any], remaining: Sequence[int], confirmed: Awaitable[Any] | None
) -> tuple[list[Any], list[int], list[Position]]:
    """Home has closed lines of a reservation: its parts follow. Answers the lines, plain, what each partition has available now,
    and where the parts followed; a part that can't follow now does so behind the worker."""
    left = list(remaining) or [0] * (len(moved) // 2)
    positions: list[Position] = []
    foreign: dict[int, list[int]] = {}
    for at, each in enumerate(moved[::2]):
        number = plain(each)[1]
        if number is not None:
            foreign.setdefault(number, []).append(at)
    try:
        if confirmed is not None:
            await confirmed
        positions = await deciding.follow_call(engine, hold, patient=False)
        for number, places in foreign.items():
            found = await reading.read(engine, engine.partitions[number], [plain(moved[at * 2])[0] for at in places])
            for at, available in zip(places, found.available, strict=True):
                left[at] = available or 0
    except Exception as fault:  # noqa: BLE001 - home has decided: the worker follows, and after it whoever finds the parts overdue
        engine.metrics.record(Retried("follow", type(fault).__name__))
    return unmarked(moved), left, positions


@dataclass(slots=True)
class _Work:
    engine: Engine
    reach: Reach
    taking: Taking
    left: bool = False
    prepared: list[_Prepared] = field(default_factory=list)

    async def outcome(self) -> _Decided | Exception:
        try:
            decided = await self._attempts()
        except Exception as fault:  # noqa: BLE001 - raised in the caller's task; one who left does not want it
            return fault
        if self.left:
            self.leave(decided)
        return decided

    def leave(self, outcome: _Decided | Exception) -> None:
        """The caller went away and this is what became of its call."""
        if isinstance(outcome, Exception) or outcome.batch is None:
            return
        taking, engine = self.taking, self.engine
        name = split_key(taking.key)[1]
        if taking.made_up:
            engine.in_background(undo(engine, outcome.receipt, taking.spread.lines), f"undo of {name}")
        else:
            engine.in_background(finish(engine, taking, outcome.batch), f"following of {name}")

    async def _attempts(self) -> _Decided:
        for _ in range(ATTEMPTS):
            decided = await self._attempt()
            if decided is not None:
                return decided
        raise Overloaded(f"operation {self._name!r}: its parts are given up faster than it can decide", retry_after=1.0)

    @property
    def _name(self) -> str:
        return split_key(self.taking.key)[1]

    # Preparing -----------------------------------------------------------------------------------------------------------

    async def _attempt(self) -> _Decided | None:
        """One try; None: a part of it had been given up, so it begins anew."""
        self.prepared = []
        if self.engine.relaid_lately and (first := await self._before()) is not None:
            return first  # it may have had other parts, which no preparation would meet
        parts = list(self.taking.spread.parts.items())
        answers = await asyncio.gather(*[self._prepare(number, flat) for number, flat in parts], return_exceptions=True)
        failed: list[tuple[int, list[Any] | BaseException]] = []
        batches: list[Answered | None] = []
        for (number, flat), answer in zip(parts, answers, strict=True):
            ready = None if isinstance(answer, BaseException) else self._ready(number, flat, answer)
            if ready is not None:
                self.prepared.append(ready)
                batches.append(answer[1] if ready.fresh and not isinstance(answer, BaseException) else None)
            else:
                failed.append((number, answer if isinstance(answer, BaseException) else answer[0]))
        if failed:
            return await self._not_prepared([answer for _, answer in failed])
        try:
            repeated = await self._secure(batches)
        except DurabilityNotReached as fault:
            self._give_up_aside()
            raise Overloaded(f"operation {self._name!r} took nothing: its parts are not as safe as asked ({fault})", 1.0) from fault
        except Exception:
            self._give_up_aside()
            raise
        if repeated:
            return await self._repeated()
        if self.left:
            await self._give_up()
            raise _Left("the caller went away before the decision")
        return await self._decide()

    async def _prepare(self, number: int, flat: list[Any]) -> Answer:
        taking = self.taking
        operation: list[Any] = [
            "reserve", part_key(taking.key, number), deciding.part_fingerprint(taking.kind, flat), flat, taking.order, "",
            MEANING[taking.kind], '{"pinned":true}', str(PART_OVERDUE_MS), "p" + FLAGS.get(taking.level, ""),
        ]  # fmt: skip
        return await self.engine.send(self.engine.partitions[number], operation)

    def _ready(self, number: int, flat: list[Any], answer: Answer) -> _Prepared | None:
        (code, *rest), batch = answer
        if code <= DONE:
            mark, fresh = f"{batch.position.epoch}-{batch.position.sequence}", True
            remaining: Sequence[int] = rest[0] if code == DONE_LINES else rest
        elif code in (REPLAY, ASK_LEDGER):
            record = read_result(rest[0])
            mark, fresh = f"{record.epoch}-{record.sequence}", False
            remaining = record.remaining or [0] * (len(flat) // 2)
        else:
            return None
        lines = {flat[at]: (flat[at + 1], flat[at + 1]) for at in range(0, len(flat), 2)}
        kind, key = self.taking.kind, part_key(self.taking.key, number)
        part = Part(Instance(number, mark), key, MEANING[kind], deciding.part_fingerprint(kind, flat), lines)
        return _Prepared(part, remaining, fresh)

    async def _secure(self, batches: list[Answered | None]) -> bool:
        """The parts reach the call's level; True where the ledger found that they have been taken before."""
        if self.taking.level == "redis":
            return False
        waits = [
            self.reach(self.engine, each.part.instance.position, self.taking.level, each.part.key, batch)
            for each, batch in zip(self.prepared, batches, strict=True)
        ]
        found = await asyncio.gather(*waits, return_exceptions=True)
        for each in found:
            if isinstance(each, BaseException):
                raise each
        return any(each is not None for each in found)

    async def _not_prepared(self, failed: list[list[Any] | BaseException]) -> _Decided | None:
        """A part was refused. An earlier call may have decided all the same; else what was prepared is given up."""
        unsure = [each for each in failed if isinstance(each, BaseException) and not isinstance(each, UnknownStock)]
        if unsure:
            self._give_up_aside()
            raise unsure[0]
        repeated = await self._before()
        await self._give_up()
        if repeated is not None:
            return repeated
        for each in failed:
            if isinstance(each, BaseException):
                raise each
            if each[0] == CLOSED:
                raise closed(self._name, each[1])
            if each[0] == CONFLICT:
                raise OperationConflict(self._name)
        short = [each for each in failed if isinstance(each, list) and each[0] == SHORT]
        if short:
            raise await self._shortages(short)
        first = failed[0]
        assert isinstance(first, list)
        raise error(first, self._name, self._name)

    async def _shortages(self, answers: list[list[Any]]) -> InsufficientStock:
        """All that is known to be short, home's lines included."""
        found: list[Shortage] = []
        for answer in answers:
            for name, asked, there in zip(answer[1::3], answer[2::3], answer[3::3], strict=True):
                found.append(Shortage(*split_key(name), int(asked), int(there)))
        own = self.taking.spread.own
        if own:
            home = self.engine.home(self.taking.key)
            levels = await reading.read(self.engine, home, own[::2])
            for name, asked, available in zip(own[::2], own[1::2], levels.available, strict=True):
                if available is not None and available < asked:
                    found.append(Shortage(*split_key(name), asked, available))
        return InsufficientStock(sorted(found, key=lambda each: (each.merchant, each.sku)))

    # Deciding ------------------------------------------------------------------------------------------------------------

    async def _decide(self) -> _Decided | None:
        taking, engine = self.taking, self.engine
        home = engine.home(taking.key)
        there: dict[str, int] = {}
        listed = []
        for each in self.prepared:
            flat = each.part.flat
            listed.append([each.part.instance.partition, each.part.instance.mark, flat, list(each.remaining)])
            there.update(zip(flat[::2], each.remaining, strict=True))
        said = {**(json.loads(taking.extra) if taking.extra else {}), "parts": listed}
        for_good = not taking.undoable and taking.kind != Kind.RESERVE
        if for_good:
            said["kept"] = True  # so that a rebuild knows it too
        extra = json.dumps(said, separators=(",", ":"))
        mark = fingerprint(taking.kind, "", taking.flat)
        operation: list[Any] = [
            taking.kind, taking.key, mark, taking.spread.lines, taking.order, "", taking.hold_ms, extra, "",
            ("k" if for_good else "") + FLAGS.get(taking.level, ""),
            [[each.part.instance.partition, each.part.instance.mark] for each in self.prepared],
            [there.get(name, 0) for name in taking.flat[::2]],
        ]  # fmt: skip
        try:
            answer, batch = await engine.send(home, operation)
        except (InvalidOperation, UnknownStock):
            await self._give_up()
            raise
        except Overloaded:
            self._give_up_aside()  # home did not execute it, and may not answer now
            raise
        code = answer[0]
        if code <= DONE:
            return await self._done(answer[1], batch)
        if code in (REPLAY, ASK_LEDGER):
            return await self._replayed(answer)
        if code == GIVEN_UP:
            named = await deciding.give_up(engine, taking.key, [each.part for each in self.prepared])
            return await self._before() if named else None
        if await self._give_up() and (repeated := await self._before()) is not None:
            return repeated  # the same call from elsewhere has decided on our parts meanwhile
        raise error(answer, self._name, self._name)

    async def _done(self, remaining: Sequence[int], batch: Answered) -> _Decided:
        taking = self.taking
        positions = (batch.position, *(each.part.instance.position for each in self.prepared))
        if taking.level != "redis":
            # Where the ledger refuses it (drift), the parts find no decision once its void is made, and are given up.
            first = await self.reach(self.engine, batch.position, taking.level, taking.key, batch)
            if first is not None:
                return _Decided(self._from_row(first), None)
        receipt = self._receipt(taking.flat, remaining, positions, taking.order, replayed=False)
        return _Decided(receipt, batch)

    async def _replayed(self, answer: list[Any]) -> _Decided:
        """Home has decided on this id before; preparations of ours that it does not name are given up."""
        taking, engine = self.taking, self.engine
        if answer[0] == ASK_LEDGER:
            row = await engine.ledger.reservation(taking.key)
            if row is not None and row.state in ("released", "expired"):
                await self._give_up()
                raise closed(self._name, row.state)
        record = read_result(answer[1])
        named = record.parts
        remaining: Sequence[int] = record.remaining
        if not named or len(remaining) != len(taking.flat) // 2:
            row_of = await engine.ledger.operation(taking.key)
            if row_of is not None and row_of.parts:
                named = tuple(Instance(part[0], part[1]) for part in row_of.parts if part[1])
                remaining = merged(row_of.lines, row_of.remaining, row_of.parts)[1]
        if named:
            await self._give_up(named)
        if len(remaining) != len(taking.flat) // 2:
            remaining = [0] * (len(taking.flat) // 2)
        home = Position(engine.home(taking.key).number, record.epoch, record.sequence)
        positions = (home, *(each.position for each in named))
        if taking.level != "redis":
            first = await self.reach(engine, home, taking.level, taking.key, None)
            if first is not None:
                return _Decided(self._from_row(first), None)
        return _Decided(self._receipt(taking.flat, remaining, positions, record.order, replayed=True), None)

    async def _before(self) -> _Decided | None:
        """The decision of an earlier call under this id, if Redis knows one; what it became of is raised."""
        taking, engine = self.taking, self.engine
        home = engine.home(taking.key)
        mark = fingerprint(taking.kind, "", taking.flat)
        found = await reading.read(engine, home, operations=[taking.key], reservations=[taking.key])
        record, hold = found.results[0], found.reservations[0]
        state = hold[0] if hold is not None else ""
        if record is None and not state:
            return None
        if record is not None and read_result(record).fingerprint != mark:
            await self._give_up()
            raise OperationConflict(self._name)
        if state in ("r", "x"):
            await self._give_up()
            raise closed(self._name, state)
        if record is None:
            return await self._repeated()
        unsure = taking.kind == Kind.RESERVE and not state  # after a rebuild only the ledger knows how it ended
        return await self._replayed([ASK_LEDGER if unsure else REPLAY, record])

    async def _repeated(self) -> _Decided:
        """The ledger has this call from before Redis' memory: its first receipt."""
        row = await self.engine.ledger.operation(self.taking.key)
        await self._give_up()
        if row is None:
            raise refused([REPLAY])
        first = _Decided(self._from_row(row), None)
        held = await self.engine.ledger.reservation(self.taking.key)
        if held is not None and held.state in ("released", "expired"):
            raise closed(self._name, held.state)
        return first

    # Receipts ------------------------------------------------------------------------------------------------------------

    def _receipt(
        self, flat: Sequence[Any], remaining: Sequence[int], positions: tuple[Position, ...], order: str, *, replayed: bool
    ) -> Receipt:
        taking = self.taking
        merchant, name = split_key(taking.key)
        return receipt_of(name, taking.kind, merchant, order, flat, remaining, positions, taking.level, replayed, taking.sign)

    def _from_row(self, row: OperationRow) -> Receipt:
        if row.fingerprint != fingerprint(self.taking.kind, "", self.taking.flat):
            raise OperationConflict(self._name)  # Redis had forgotten the first one
        flat, remaining = merged(row.lines, row.remaining, row.parts)
        positions = (row.position, *(Instance(part[0], part[1]).position for part in row.parts if part[1]))
        return self._receipt(flat, remaining, positions, row.order, replayed=True)

    # Giving up -----------------------------------------------------------------------------------------------------------

    async def _give_up(self, named: Sequence[Instance] = ()) -> list[Instance]:
        """What this call itself has prepared, and home did not name. A preparation that it only joined is its maker's to end.
        Those that home has decided on meanwhile stand, and are answered."""
        parts = [each.part for each in self.prepared if each.fresh and each.part.instance not in named]
        return await deciding.give_up(self.engine, self.taking.key, parts) if parts else []

    def _give_up_aside(self) -> None:
        """The same while home may be away: the caller does not wait for it."""
        parts = [each.part for each in self.prepared if each.fresh]

        async def aside() -> None:
            try:
                await deciding.give_up(self.engine, self.taking.key, parts)
            except Exception as fault:  # noqa: BLE001 - they are overdue soon, and resolved then
                self.engine.metrics.record(Retried("give_up", type(fault).__name__))

        if parts:
            self.engine.in_background(aside(), f"giving up of {self._name}")


def receipt_of(
    name: str,
    kind: str,
    merchant: str,
    order: str | None,
    flat: Sequence[Any],
    remaining: Sequence[int],
    positions: tuple[Position, ...],
    level: str,
    replayed: bool,
    sign: int = 1,
) -> Receipt:
    """A receipt of several positions; ``flat`` has plain fields."""
    rows = zip(flat[::2], flat[1::2], remaining, strict=True)
    lines = tuple([ReceiptLine(*split_key(each), quantity * sign, left) for each, quantity, left in rows])
    return Receipt(name, public_kind(kind), merchant, order or None, lines, positions, level, replayed)


async def undo(engine: Engine, receipt: Receipt, lines: list[Any], *, decider: bool = False) -> bool:
    """Give a take over several partitions back and free its id: home first, then its parts; False if it was too late.
    ``lines``: as home has them, foreign fields marked."""
    key = f"{receipt.merchant}\x1f{receipt.operation_id}"
    home = receipt.positions[0]
    mark = f"{home.epoch}-{home.sequence}"
    plain_lines = [value for line in receipt.lines for value in (f"{line.merchant}\x1f{line.sku}", abs(line.quantity))]
    there = {position.partition: f"{position.epoch}-{position.sequence}" for position in receipt.positions[1:]}
    flats: dict[int, list[Any]] = {number: [] for number in there}
    for each, quantity in zip(lines[::2], lines[1::2], strict=True):
        name, number = plain(each)
        if number is not None:
            flats[number] += (name, quantity)
    listed = [[number, there[number], flat, []] for number, flat in flats.items()]
    extra = json.dumps({"of": receipt.kind, "position": mark, "parts": listed}, separators=(",", ":"))
    operation: list[Any] = [
        "undo", f"{key}\x1fundo", fingerprint(receipt.kind, "", plain_lines), lines, "", key, int(decider), extra, mark, receipt.kind, [],
    ]  # fmt: skip
    answer, _ = await engine.send(engine.partitions[home.partition], operation)
    if answer[0] not in (DONE, DONE_LINES, TOO_LATE):
        raise refused(answer)
    if answer[0] == TOO_LATE:
        return False
    parts = []
    try:
        for position in receipt.positions[1:]:
            part = await deciding.look(engine, engine.partitions[position.partition], part_key(key, position.partition))
            if part is not None and part.instance.position == position:
                parts.append(part)
        if parts:
            await deciding.give_up(engine, key, parts)
    except Exception as fault:  # noqa: BLE001 - home has undone it: the worker behind it follows, and after it the parts' own clocks
        engine.metrics.record(Retried("give_up", type(fault).__name__))
    return True
