"""How an act of the stock API becomes one batch operation, and its answer a receipt; what the aspects use besides."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, Literal
from uuid import uuid4

from inventory_sdk import context
from inventory_sdk.errors import (
    InsufficientStock,
    InvalidOperation,
    OperationConflict,
    ReservationClosed,
    ReservationNotFound,
    UnknownStock,
)
from inventory_sdk.ledger.protocol import OperationRow
from inventory_sdk.model import (
    MAX_LINES,
    MAX_QUANTITY,
    Kind,
    Line,
    Position,
    Receipt,
    check_text,
    check_ttl,
    fingerprint,
    key_of,
    split_key,
    summed,
)
from inventory_sdk.stock import claims, entering, entering_parts, reading, spanning
from inventory_sdk.stock.answers import closed, error, receipt, refused
from inventory_sdk.stock.batch import ASK_LEDGER, AWAY, DONE, DONE_LINES, NOT_FOUND, NOT_LOADED, REPLAY, TOO_LATE, Answer, Answered
from inventory_sdk.stock.engine import Engine
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.parts import Spread, merged, spans, spread
from inventory_sdk.stock.records import PIN_OVERDUE_MS, read_result
from inventory_sdk.stock.waits import FLAGS

LEVELS: Final = ("redis", "replica", "aof", "queue", "database")

_REFUSALS: Final = (InsufficientStock, InvalidOperation, OperationConflict, ReservationClosed, ReservationNotFound, UnknownStock)
"""After these an act has certainly moved nothing, and will not."""

Reach = Callable[[Engine, Position, str, str, Answered | None], Awaitable[OperationRow | None]]
"""Waits until the operation of this key at this position is as durable as the level says. The batch is the one that answered; a
replay's position is not its own. None where no batch was asked.
Answers the row of the first operation of this id where the ledger found that one stands already."""
Keeps = Callable[[Engine, str], Awaitable[None]]
"""Asked at the first use of a level, before anything moves: ``InvalidOperation`` where it can't be kept here."""


class Acts:
    """The acts behind the stock API. Times are in seconds."""

    def __init__(
        self,
        engine: Callable[[], Engine],
        *,
        merchant: str | None,
        durability: Callable[[], str],
        reach: Reach,
        keeps: Keeps | None = None,
        max_lines: int = MAX_LINES,
    ) -> None:
        self._engine = engine
        self._default_merchant = check_text("merchant", merchant) if merchant is not None else None
        self._default_durability = durability
        self._reach = reach
        self._keeps = keeps
        self._max_lines = max_lines

    async def submit(
        self,
        kind: str,
        *,
        merchant: str | None = None,
        operation_id: str | None = None,
        lines: Sequence[Line] | None = None,
        reservation: str | None = None,
        order: str | None = None,
        ttl: float | None = None,
        of: str | None = None,
        reason: str | None = None,
        durability: str | None = None,
        task: dict[str, Any] | None = None,
    ) -> Receipt:
        """Any public kind by name; the public methods are this with fewer arguments."""
        if kind in (Kind.CONFIRM, Kind.RELEASE):
            if reservation is None:
                raise InvalidOperation("reservation", None, f"{kind} needs the reservation it closes")
            return await self._close(Kind(kind), reservation, lines, operation_id, merchant, durability, task, "")
        if reason is not None:
            _check_reason(reason)
        if kind in (Kind.RESERVE, Kind.DEDUCT) or (kind == Kind.ADJUST and _sign(lines) < 0):
            return await self._take(Kind(kind).value, lines, merchant, operation_id, order, ttl, durability, _extra(reason, task))
        home = self._merchant(merchant)
        if order is not None:
            check_text("order", order)
        flat = self._flat(lines, home, +1)
        if operation_id is None:
            operation_id = _named(home) or self._made_up(home, flat[0])
        key = key_of(home, check_text("operation_id", operation_id))
        if kind == Kind.ADJUST:
            return await self._enter(Kind.ADJUST, home, key, flat, order or "", "", _extra_of(reason, task))
        if kind not in (Kind.RESTOCK, Kind.TAKE_BACK):
            raise InvalidOperation("kind", kind, "is not a public operation")
        reference = ""
        if kind == Kind.TAKE_BACK:
            reference = key_of(home, check_text("of", of))
        return await self._enter(Kind(kind), home, key, flat, order or "", reference, _extra_of(reason, task))

    async def undo(self, receipt: Receipt, *, decider: bool = False) -> bool:
        """Give back a take that is still fully held and not kept, and free its id; False if it was no longer so.

        ``decider``: spoken by whoever pinned the hold."""
        if receipt.positions[1:]:
            key = key_of(receipt.merchant, receipt.operation_id)
            apart = self._spread(key, [x for each in receipt.lines for x in (key_of(each[0], each[1]), abs(each[2]))])
            assert apart is not None
            return await spanning.undo(self._engine(), receipt, apart.lines, decider=decider)
        key = key_of(receipt.merchant, receipt.operation_id)
        flat = [value for line in receipt.lines for value in (key_of(line.merchant, line.sku), abs(line.quantity))]
        position = receipt.positions[0]
        return await self._undo(receipt.kind, key, flat, position, decider)

    async def keep(self, receipt: Receipt) -> bool:
        """From now on the take can't be undone; False if it was undone already."""
        key = key_of(receipt.merchant, receipt.operation_id)
        position = receipt.positions[0]
        mark = f"{position.epoch}-{position.sequence}"
        one = key_of(receipt.lines[0].merchant, receipt.lines[0].sku) if receipt.lines else ""
        operation: list[Any] = ["keep", f"{key}\x1fkeep", "", [], "", key, 0, "", mark, one]
        answer, _ = await self._engine().send(self._engine().home(key), operation)
        if answer[0] not in (DONE, DONE_LINES, REPLAY, TOO_LATE):
            raise refused(answer)
        if receipt.positions[1:] and answer[0] != TOO_LATE:
            engine = self._engine()
            engine.in_background(spanning.follow(engine, key), f"following of {receipt.operation_id}")
        return bool(answer[0] != TOO_LATE)

    async def pin(self, receipt: Receipt, *, resume: float | None = None, confirm: bool = False) -> bool:
        """The hold has no running ttl from now on and ends when its decider speaks; False if it is no longer held.

        What a commit means is kept with it, for whoever resolves an overdue pin: ``confirm`` sells, else the hold goes on for
        ``resume`` seconds (None: until it is closed).
        """
        end_ms = 1 if confirm else 0 if resume is None else max(2, int(resume * 1000))
        try:
            await self._change(Kind.PIN, receipt.operation_id, receipt.merchant, end_ms, str(PIN_OVERDUE_MS))
        except (ReservationClosed, ReservationNotFound):
            return False
        return True

    async def resume(self, receipt: Receipt, ttl: float | None) -> bool:
        """Unpin: the ttl runs from now; False if it is no longer held."""
        try:
            await self._change(Kind.RESUME, receipt.operation_id, receipt.merchant, ttl_ms(ttl))
        except (ReservationClosed, ReservationNotFound):
            return False
        return True

    async def settle_pinned(self, receipt: Receipt, kind: Literal["confirm", "release"]) -> Receipt:
        """Close a pinned hold as its decider."""
        return await self._close(Kind(kind), receipt.operation_id, None, None, receipt.merchant, None, None, "d")

    async def _keep_level(self, engine: Engine, level: str) -> None:
        async with engine.asking:  # many callers come at once; one asks
            if level not in engine.kept and self._keeps is not None:
                await self._keeps(engine, level)
            engine.kept.add(level)

    def _merchant(self, merchant: str | None) -> str:
        if merchant is not None:
            return check_text("merchant", merchant)
        merchant = context.merchant.get() or self._default_merchant  # both were checked when they were set
        if merchant is None:
            raise InvalidOperation("merchant", None, "name one in the call, the request, or Inventory(merchant=…)")
        return merchant

    def _made_up(self, merchant: str, field: str) -> str:
        """An id that nobody has given, at home where the stock stands: then a call needs no second partition for it."""
        layout = self._engine().layout
        return layout.id_at(merchant, uuid4().hex, layout.of(field))

    def _flat(self, lines: Sequence[Line] | None, merchant: str, sign: int, bulk: bool = False) -> list[Any]:
        """Summed and sorted [field, quantity, …], quantities positive; ``bulk``: any number of lines."""
        if type(lines) is not list and type(lines) is not tuple:
            raise InvalidOperation("lines", lines, "must be a list or tuple of Line objects")
        if not lines:
            raise InvalidOperation("lines", lines, "must have at least one line")
        if len(lines) == 1:
            line = lines[0]
            if type(line) is Line and line.merchant is None and line.quantity * sign > 0:
                return [f"{merchant}\x1f{line.sku}", line.quantity * sign]
        for line in lines:
            if not isinstance(line, Line):
                raise InvalidOperation("lines", line, "must be Line objects")
            if line.quantity * sign <= 0:
                raise InvalidOperation("quantity", line.quantity, f"must be {'positive' if sign > 0 else 'negative'} (sku {line.sku!r})")
        flat = summed(lines, merchant)
        if not bulk and len(flat) > self._max_lines * 2:
            raise InvalidOperation("lines", len(flat) // 2, f"at most {self._max_lines} lines in one operation")
        if sign < 0:
            flat[1::2] = [-quantity for quantity in flat[1::2]]
        for quantity in flat[1::2]:
            if quantity > MAX_QUANTITY:
                raise InvalidOperation("quantity", quantity, f"lines of one SKU must not sum to more than {MAX_QUANTITY}")
        return flat

    def _spread(self, key: str, flat: list[Any]) -> Spread | None:
        """The lines by partition, None when all are at the home of ``key``."""
        layout = self._engine().layout
        return spread(flat, layout.home(key), layout)

    async def _take(
        self,
        kind: str,
        lines: Sequence[Line] | None,
        merchant: str | None,
        operation_id: str | None,
        order: str | None,
        ttl: float | None,
        durability: str | None,
        extra: str,
    ) -> Receipt:
        merchant = self._merchant(merchant)
        if order is not None:
            check_text("order", order)
        if operation_id is None:
            operation_id = _named(merchant)
        made_up = operation_id is None
        signed = -1 if kind == Kind.ADJUST else 1
        flat = self._flat(lines, merchant, signed)
        name = self._made_up(merchant, flat[0]) if operation_id is None else check_text("operation_id", operation_id)
        level = self._default_durability() if durability is None else _check_level(durability)
        engine = self._engine()
        if level not in engine.kept:
            await self._keep_level(engine, level)
        key = f"{merchant}\x1f{name}"
        partition = engine.home(key)
        if engine.count is not None:
            engine.count(flat[::2])
        if engine.loader.has_unknown:
            engine.loader.check_known(flat[::2])
        hold_ms = 0
        if kind == Kind.RESERVE:
            check_ttl(ttl)
            hold_ms = ttl_ms(ttl)
            if ttl is None and made_up:
                raise InvalidOperation("ttl", None, "a hold without an end needs an operation_id of your own")
        if engine.settings.partitions > 1 and (engine.layout.apart or len(flat) > 2 or not flat[0].startswith(f"{merchant}\x1f")):
            apart = self._spread(key, flat)
            if apart is not None:
                undoable = kind == Kind.ADJUST or (made_up and kind == Kind.DEDUCT)
                taking = spanning.Taking(kind, key, flat, apart, order or "", hold_ms, extra, level, made_up, undoable)
                return await spanning.take(engine, self._reach, taking)
        operation = [kind, key, fingerprint(kind, "", flat), flat, order or "", "", hold_ms, extra, "", FLAGS.get(level, "")]
        orphaned = partial(self._give_back, engine, partition, kind, key, flat) if made_up else None
        found = None
        if engine.direct.busy and engine.direct.expects(operation):
            found = await engine.act(partition, operation, orphaned)
        if found is None:
            batcher = engine.batcher(partition, context.lane.get())
            found = await (batcher.submit(operation) if orphaned is None else batcher.ask(operation, orphaned))
        answer, batch = found
        code = answer[0]
        if code in (NOT_LOADED, AWAY):
            answer, batch = await engine.send_again(partition, operation, found, orphaned)
            code = answer[0]
        if code <= DONE:
            position = batch.position
            if not position.epoch:
                level = "database"
            if level != "redis":
                try:
                    first = await self._reach(engine, position, level, key, batch)
                except asyncio.CancelledError:
                    if orphaned is not None:
                        orphaned((answer, batch))
                    raise
                if first is not None:
                    return _first_receipt(first, kind, level, fingerprint(kind, "", flat))
            remaining: Sequence[int] = answer[1] if code == DONE_LINES else answer[1:]
            return receipt(name, kind, merchant, order, flat, remaining, position, level, False, signed)
        if code == ASK_LEDGER:
            await self._still_holds(engine, key, name)
            code = REPLAY
        if code == REPLAY:
            record = read_result(answer[1])
            position = Position(partition.number, record.epoch, record.sequence)
            if not record.epoch or not batch.position.epoch:
                level = "database"
            remaining = record.remaining
            if not remaining:
                known = await reading.status(engine, key)
                remaining = known[4] if known else [0] * (len(flat) // 2)
            if level != "redis":
                first = await self._reach(engine, position, level, key, batch)
                if first is not None:
                    return _first_receipt(first, kind, level, fingerprint(kind, "", flat))
            return receipt(name, kind, merchant, record.order or None, flat, remaining, position, level, True, signed)
        raise error(answer, name, name)

    async def _still_holds(self, engine: Engine, key: str, name: str) -> None:
        """Raises if the reservation was given back; a held or confirmed one answers its receipt."""
        row = await engine.ledger.reservation(key)
        if row is not None and row.state in ("released", "expired"):
            raise closed(name, row.state)

    def _give_back(self, engine: Engine, partition: Partition, kind: str, key: str, flat: list[Any], answer: Answer) -> None:
        """A take with a made-up id whose caller went away: nobody can ask for it, so it is undone."""
        (code, *_), batch = answer
        if code <= DONE:
            position = batch.position
            engine.in_background(self._undo(kind, key, flat, position), f"undo of {split_key(key)[1]}")

    async def _undo(self, kind: str, key: str, flat: list[Any], position: Position, decider: bool = False) -> bool:
        engine = self._engine()
        mark = f"{position.epoch}-{position.sequence}"
        extra = json.dumps({"of": kind, "position": mark})
        operation = ["undo", f"{key}\x1fundo", fingerprint(kind, "", flat), flat, "", key, int(decider), extra, mark, kind]
        answer, _ = await engine.send(engine.partitions[position.partition], operation)
        if answer[0] not in (DONE, DONE_LINES, TOO_LATE):
            raise refused(answer)
        return bool(answer[0] != TOO_LATE)

    async def _close(
        self,
        kind: Kind,
        reservation: str,
        lines: Sequence[Line] | None,
        operation_id: str | None,
        merchant: str | None,
        durability: str | None,
        task: dict[str, Any] | None,
        flag: str,
    ) -> Receipt:
        check_text("reservation", reservation)
        level = self._default_durability() if durability is None else _check_level(durability)
        home = self._merchant(merchant)
        if flag == "r" and lines is not None:
            raise InvalidOperation("lines", lines, "reacquire=True takes the whole reservation again")
        engine = self._engine()
        hold = key_of(home, reservation)
        partition = engine.home(hold)
        if operation_id is not None:
            name = check_text("operation_id", operation_id)
        elif lines is None:
            name = f"{reservation}\x1f{kind.value}"
        else:
            name = _named(home) or engine.layout.id_at(home, uuid4().hex, partition.number)
        flat = self._flat(lines, home, +1) if lines is not None else []
        apart = self._spread(hold, flat)
        key = key_of(home, name)
        if level not in engine.kept:
            await self._keep_level(engine, level)
        flag += FLAGS.get(level, "")
        mark = fingerprint(kind, hold, flat)
        if engine.home(key) is partition:
            return await self._close_at_home(kind, key, hold, mark, flat, apart, level, task, flag, lines is None)
        taken = await claims.claim(engine, key, mark, hold)
        try:
            return await self._close_at_home(kind, key, hold, mark, flat, apart, level, task, flag, lines is None)
        except _REFUSALS:
            if taken is not None:
                await claims.free(engine, taken)
            raise

    async def _close_at_home(
        self,
        kind: Kind,
        key: str,
        hold: str,
        mark: str,
        flat: list[Any],
        apart: Spread | None,
        level: str,
        task: dict[str, Any] | None,
        flag: str,
        whole: bool,
    ) -> Receipt:
        """Where the reservation is decided."""
        engine = self._engine()
        partition = engine.home(hold)
        (home, name), reservation = split_key(key), split_key(hold)[1]

        def operation(flags: str) -> list[Any]:
            # A batch keeps the list it was given: every try has its own.
            return [kind.value, key, mark, list(apart.lines if apart else flat), "", hold, 0, _extra(None, task), "", flags]

        answer, batch = await engine.send(partition, operation(flag))
        if answer[0] == NOT_FOUND:
            known = await self._closed_in_ledger(key, mark, hold)
            if known is not None:
                all_lines, left = merged(known.lines, known.remaining, known.parts) if known.parts else (known.lines, known.remaining)
                return receipt(name, kind.value, home, known.order or None, all_lines, left, known.position, level, True)
            if kind != Kind.RELEASE or not whole:
                raise ReservationNotFound(reservation, home)
            answer, batch = await engine.send(partition, operation(flag + "t"))
            if answer[0] <= DONE and not answer[2]:
                if engine.direct.auto and batch.position.epoch:
                    # A reserve that comes late may come to the database.
                    await self._reach(engine, batch.position, "settled", key, None)
                raise ReservationNotFound(reservation, home)
        if answer[0] <= DONE:
            position = batch.position
            if not position.epoch:
                level = "database"
            if level != "redis":
                await self._reach(engine, position, level, key, batch)
            _, remaining, moved, order = answer
            if spans(moved):
                moved, remaining, there = await spanning.closed_parts(engine, hold, moved, remaining, batch.confirmed)
                positions = (position, *there)
                return spanning.receipt_of(name, kind.value, home, order, moved, remaining, positions, level, False)
            return receipt(name, kind.value, home, order or None, moved, remaining, position, level, False)
        if answer[0] == REPLAY:
            record = read_result(answer[1])
            position = Position(partition.number, record.epoch, record.sequence)
            if not record.epoch or not batch.position.epoch:
                level = "database"
            if level != "redis":
                await self._reach(engine, position, level, key, batch)
            first = record.lines or (apart.lines if apart else flat)
            if spans(first):
                first, remaining, _ = await spanning.closed_parts(engine, hold, first, record.remaining, None)
                return receipt(name, kind.value, home, record.order or None, first, remaining, position, level, True)
            return receipt(name, kind.value, home, record.order or None, first, record.remaining, position, level, True)
        raise error(answer, name, reservation)

    async def _closed_in_ledger(self, key: str, mark: str, hold: str) -> OperationRow | None:
        """The act itself, if the ledger has it; else the error that the ledger's reservation asks for; None: it does not know."""
        engine = self._engine()
        row = await engine.ledger.operation(key)
        if row is not None:
            if row.fingerprint != mark:
                raise OperationConflict(split_key(key)[1])
            return row
        found = await engine.ledger.reservation(hold)
        if found is not None and found.state != "held":
            raise closed(split_key(hold)[1], found.state)
        return None

    async def _change(self, kind: Kind, reservation: str, merchant: str, end_ms: int, mark: str = "") -> None:
        check_text("reservation", reservation)
        key = key_of(merchant, reservation)
        engine = self._engine()
        operation: list[Any] = [kind.value, f"{merchant}\x1f{uuid4().hex}", "", [], "", key, end_ms, "", mark, ""]
        answer, _ = await engine.send(engine.home(key), operation)
        if answer[0] == NOT_FOUND:
            found = await engine.ledger.reservation(key)
            if found is not None and found.state != "held":
                raise closed(reservation, found.state)
            raise ReservationNotFound(reservation, merchant)
        if answer[0] > DONE:
            raise error(answer, reservation, reservation)

    async def _enter(
        self, kind: Kind, merchant: str, key: str, flat: list[Any], order: str, reference: str, extra: dict[str, Any]
    ) -> Receipt:
        engine = self._engine()
        partition = engine.home(key)

        async def settled(position: Position) -> None:
            await self._reach(engine, position, "settled", "", None)

        apart = self._spread(key, flat)
        if engine.relaid and (first := await entering_parts.before(engine, kind, key, flat, apart, reference)) is not None:
            return first
        if apart is not None:
            return await entering_parts.enter(engine, kind, key, flat, apart, order, reference, extra, settled)
        done = await entering.enter(engine, partition, kind, key, flat, order, reference, extra, settled)
        name = split_key(key)[1]
        return receipt(name, kind.value, merchant, order or None, flat, done.remaining, done.position, "database", done.replayed)


def _named(home: str) -> str | None:
    """The id that the request brought for an act that names none itself."""
    named = context.operation.get()
    return None if named is None else named.spend(home)


def _first_receipt(row: OperationRow, kind: str, level: str, mark: str) -> Receipt:
    merchant, name = split_key(row.key)
    if row.fingerprint != mark:
        raise OperationConflict(name)  # Redis had forgotten the first one
    sign = -1 if kind == Kind.ADJUST else 1
    return receipt(name, kind, merchant, row.order or None, row.lines, row.remaining, row.position, level, True, sign)


def ttl_ms(ttl: float | None) -> int:
    """Seconds as the scripts take them: 0 is no end."""
    return 0 if ttl is None else max(1, int(ttl * 1000))


def _sign(lines: Sequence[Line] | None) -> int:
    if not isinstance(lines, list | tuple) or not lines:
        raise InvalidOperation("lines", lines, "must be a list of at least one Line")
    for line in lines:
        if not isinstance(line, Line):
            raise InvalidOperation("lines", line, "must be Line objects")
    return 1 if lines[0].quantity > 0 else -1


def _check_reason(reason: str) -> None:
    if not isinstance(reason, str) or not 0 < len(reason) <= 500:
        raise InvalidOperation("reason", reason, "must be a text of 1 to 500 characters")


def _extra_of(reason: str | None, task: dict[str, Any] | None) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if reason is not None:
        extra["reason"] = reason
    if task is not None:
        extra["task"] = task
    return extra


def _extra(reason: str | None, task: dict[str, Any] | None) -> str:
    extra = _extra_of(reason, task)
    return json.dumps(extra, separators=(",", ":")) if extra else ""


def _check_level(durability: str) -> str:
    if durability not in LEVELS:
        raise InvalidOperation("durability", durability, f"must be one of {', '.join(LEVELS)}")
    return durability
