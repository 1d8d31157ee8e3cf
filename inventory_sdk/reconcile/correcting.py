"""Corrections: planned and shown first, then made as deltas under ids of their own, on record before they are made.

A correction begins from a look that was made just now. A drift is a difference and not a value, so its correction is right whatever is
sold between the look and the delta.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.beside import Ground
from inventory_sdk.errors import InsufficientStock, InvalidOperation, InventoryError, StockFrozen
from inventory_sdk.ledger.accounts import AnotherState, OverLimit, Row
from inventory_sdk.ledger.protocol import WritesStock
from inventory_sdk.model import Line, Movement, Position, key_of
from inventory_sdk.reconcile.model import DAY, Cause, Correction, Discrepancy, Reconcile, What, discrepancy
from inventory_sdk.reconcile.redis_side import read_holds
from inventory_sdk.reconcile.sinks.protocol import Event
from inventory_sdk.reconcile.sinks.sql import register_of
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.records import RS
from inventory_sdk.stock.stock import Stock

if TYPE_CHECKING:
    from inventory_sdk.ledger.comparing import Comparing
    from inventory_sdk.ledger.register import Letters

MAX_REASON: Final = 500
LEAST_TTL: Final = 0.001
SKEW_MS: Final = 3_600_000
"""So far may the clocks of a process and of Redis be apart where the ledger is asked for what was journaled since an act began."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is going to be done, as it is kept on record. ``way``: ``redis``, ``write_off`` (the ledger gives up units that Redis has
    sold), ``supply`` (the ledger gets units that Redis has), ``adjust`` (both follow the service's table), ``service``, ``hold``."""

    way: str
    available: int = 0
    reserved: int = 0
    epoch: int = 0
    why_not: str = ""

    @property
    def side(self) -> str:
        """Whose numbers change."""
        return {"write_off": "ledger", "supply": "ledger", "adjust": "ledger"}.get(self.way, self.way)

    @property
    def units(self) -> int:
        """The size that limits count."""
        return max(abs(self.available), abs(self.reserved))

    def reversed(self) -> Plan:
        """What undoes it."""
        way = {"write_off": "supply", "supply": "write_off"}.get(self.way, self.way)
        return Plan(way, -self.available, -self.reserved, self.epoch)

    def steps(self, name: str) -> tuple[str, ...]:
        """In words."""
        by = f"{self.available:+d} available" + (f", {self.reserved:+d} reserved" if self.reserved else "")
        return {
            "redis": (f"journal a correct of {name} in Redis: {by}; the ledger stays as it is",),
            "write_off": (f"journal an adjust of {name} in the ledger: {by}; Redis stays as it is, it has sold them",),
            "supply": (
                f"journal a correct of {name} in Redis: {-self.available:+d} available",
                f"adjust {name}: {by}, in ledger and Redis",
            ),
            "adjust": (f"adjust {name}: {by}, in ledger and Redis",),
            "service": (f"hand writes_stock a movement of {name}: {by}; ledger and Redis stay as they are",),
            "hold": (f"set the time of reservation {name} anew, so that it ends",),
        }[self.way] if not self.why_not else ()  # fmt: skip


class Correcting:
    """Of one event loop. ``look`` compares a discrepancy's subject once more, brings its record up to date, and says whether it is
    still there. ``letters``: what the sinks are told when something happens to it."""

    def __init__(
        self,
        ground: Ground,
        settings: Reconcile,
        stock: Stock,
        writes: Sequence[WritesStock],
        look: Callable[[Discrepancy], Awaitable[bool]],
        letters: Callable[[Event], Letters],
    ) -> None:
        self._ground = ground
        self._settings = settings
        self._stock = stock
        self._writes = writes
        self._look = look
        self._letters = letters
        self._register = register_of(ground)
        self._comparing: Comparing = getattr(ground.ledger, "comparing")  # noqa: B009 - the SQL ledger's, as the register is

    async def row(self, number: int) -> Row:
        """``InvalidOperation`` for a number that nobody gave."""
        if type(number) is not int or number < 1:
            raise InvalidOperation("number", number, "must be the number of a discrepancy")
        row = await self._register.get(number)
        if row is None:
            raise InvalidOperation("number", number, "is not the number of any discrepancy")
        return row

    async def propose(self, number: int) -> Correction:
        """What ``correct`` would do now."""
        found, plan = await self._planned(await self.row(number))
        return self._shown(found, plan)

    async def _planned(self, row: Row) -> tuple[Discrepancy, Plan]:
        """The discrepancy as a look just now shows it, and what to do about it."""
        seen = False
        if row.state == "open":
            seen = await self._look(discrepancy(row))
            row = await self.row(row.number)
        found = discrepancy(row)
        if row.state == "correcting":
            return found, _kept(found)
        if row.state != "open":
            return found, Plan("redis", why_not=f"is {row.state}: there is nothing to correct")
        if not seen and found.what in (What.STOCK, What.SERVICE, What.HOLD):
            # What stands on record is of another moment; since then Redis may have been filled anew.
            return found, Plan("redis", why_not="it could not be looked at now, its stock moves or its partition is recovering: try again")
        return found, self._plan(found)

    def _plan(self, found: Discrepancy) -> Plan:
        over, held = found.available, found.reserved
        if found.what == What.SERVICE:
            if self._writes:
                return Plan("service", -over, -held)
            if held:
                return Plan("adjust", over, why_not="its reservations differ: the service must end or make them itself")
            return Plan("adjust", over)
        if found.what == What.HOLD:
            if found.cause != Cause.EXPIRY_LOST:
                return Plan(
                    "hold", why_not="its record is not in Redis any more: release it in the ledger's way, or let a rebuild bring it"
                )
            state = found.evidence.get("state")
            return Plan("hold", why_not="" if state == "h" else "it is pinned: its decider, or the worker that asks it, ends it")
        if found.what != What.STOCK:
            return Plan("redis", why_not="the ledger's own books, or a partition, are mended by a person: see the evidence")
        if found.cause == Cause.LEDGER_BOOKS:
            return Plan("redis", why_not="the ledger's row was changed past its change rows: put the row back first")
        epoch = int(found.evidence["epoch"])
        others = [part for part in found.evidence.get("parts", ()) if part[0] != Cause.MISSING_JOURNAL]
        if others:
            # What the ledger missed is the ledger's to make good, the rest is Redis'. One after the other: this first.
            return Plan("redis", -sum(part[1] for part in others), -sum(part[2] for part in others), epoch)
        if found.cause == Cause.MISSING_JOURNAL:
            if found.evidence.get("unread") and over >= 0:
                # Nobody can say what was in there. Where one of the two must be wrong, that with fewer to sell is believed.
                return Plan("redis", -over, -held, epoch)
            if held:
                return Plan("write_off", over, held, why_not="reservations are among what is missing: end them first")
            return Plan("write_off" if over < 0 else "supply", over, 0, epoch)
        return Plan("redis", -over, -held, epoch)

    def _shown(self, found: Discrepancy, plan: Plan) -> Correction:
        name = repr(found.reservation if found.what == What.HOLD else found.sku)
        confirm = plan.units > self._settings.confirm_above
        shown = (found.number, plan.side, found.merchant, found.sku, found.reservation, plan.available, plan.reserved, plan.units)
        return Correction(*shown, plan.steps(name), confirm, plan.why_not)

    async def correct(self, number: int, reason: str, who: str, confirmed: bool | int) -> Discrepancy:
        """Make it; once, however often it is asked for."""
        _check_words(reason, who)
        if not isinstance(confirmed, int) or confirmed < 0:
            raise InvalidOperation("confirmed", confirmed, "must be the units that were shown, True or False")
        row = await self.row(number)
        if row.state == "corrected":
            return discrepancy(row)
        if row.state == "correcting":
            return await self._go_on(discrepancy(row), "corrected", "open", again=True)
        found, plan = await self._planned(row)
        proposed = self._shown(found, plan)
        if proposed.why_not:
            raise InvalidOperation("number", number, f"can't be corrected: {proposed.why_not}")
        if proposed.needs_confirmation and not confirmed:
            limit = self._settings.confirm_above
            raise InvalidOperation(
                "confirmed",
                confirmed,
                f"discrepancy {number} moves {proposed.units} units, more than {limit}: confirm them by their number",
            )
        if confirmed and confirmed is not True and confirmed != proposed.units:
            raise InvalidOperation("confirmed", confirmed, f"discrepancy {number} moves {proposed.units} units by now: look at it again")
        return await self._begin(found, plan, "correct", reason, who)

    async def undo(self, number: int, reason: str, who: str) -> Discrepancy:
        """The exact inverse of a correction, as a delta of its own."""
        _check_words(reason, who)
        row = await self.row(number)
        found = discrepancy(row)
        if row.state == "undone":
            return found
        if row.state == "undoing":
            return await self._go_on(found, "undone", "corrected", again=True)
        if row.state != "corrected":
            raise InvalidOperation("number", number, f"is {row.state}: only what was corrected can be undone")
        plan = _kept(found).reversed()
        if plan.way == "hold":
            raise InvalidOperation("number", number, "gave a hold an end: release or extend the reservation instead")
        if plan.way in ("redis", "write_off", "supply") and (await self._partition(found).hello()).epoch != plan.epoch:
            raise InvalidOperation("number", number, "was corrected before Redis was filled from the ledger anew: nothing of it is left")
        return await self._begin(found, plan, "undo", reason, who)

    async def _begin(self, found: Discrepancy, plan: Plan, kind: str, reason: str, who: str) -> Discrepancy:
        begins, through, ends = ("open", "correcting", "corrected") if kind == "correct" else ("corrected", "undoing", "undone")
        now = time.time_ns() // 1_000_000
        # Of this attempt alone: one that was refused and is made later, with other numbers, is another act.
        operation_id = f"reconcile-{found.number}-{secrets.token_hex(6)}"
        correction = {
            "way": plan.way, "available": plan.available, "reserved": plan.reserved, "epoch": plan.epoch, "who": who, "reason": reason,
            "operation_id": operation_id, "at_ms": now,
        }  # fmt: skip
        facts = {"discrepancy": found.number, "what": found.what, "cause": found.cause, "units": plan.units, **correction}
        audit: dict[str, Any] = {"kind": kind, "actor": who, "operation_id": operation_id, "details": facts}
        limit: tuple[int, int] | None = None
        if kind == "correct":
            audit["units"] = plan.units
            limit = self._settings.limit(found.merchant), now - int(DAY * 1000)
        details = {"correction": correction} | ({"undoes": found.correction} if kind == "undo" else {})
        try:
            if plan.way == "service":
                # Its own tables are in the ledger's database: the movement and its record are one transaction.
                moved, told = [_movement(found, plan, operation_id, reason)], self._letters(_EVENTS[ends])
                return discrepancy(
                    await self._register.turn(found.number, [begins], ends, details, audit, self._writes, moved, limit, told)
                )
            row = await self._register.turn(found.number, [begins], through, details, audit, limit=limit)
        except OverLimit as error:
            raise InvalidOperation(
                "number",
                found.number,
                f"corrections of merchant {found.merchant!r} would move {error.units} units in 24 hours, "
                f"{self._settings.limit(found.merchant)} are allowed",
            ) from error
        return await self._go_on(discrepancy(row), ends, begins)

    async def _go_on(self, found: Discrepancy, ends: str, back: str, again: bool = False) -> Discrepancy:
        """Carry out what is on record, and note that it was. ``again``: somebody has begun it before, and may have come to any point:
        what the ledger has of it is not done once more. What it does not have can only be so recent that Redis remembers it."""
        correction = found.correction or {}
        plan, begun = _kept(found), found.state
        operation_id, reason = str(correction["operation_id"]), str(correction["reason"])
        made = await self._made(found, operation_id, int(correction["at_ms"])) if again else set[str]()
        try:
            await self._make(found, plan, operation_id, reason, made)
        except (InsufficientStock, StockFrozen) as error:
            if isinstance(error, StockFrozen) and plan.epoch and (await self._partition(found).hello()).epoch == plan.epoch:
                raise  # a part of it may stand, and its reply be lost: it is gone on with when the partition sells again
            # Nothing of it has moved, nor will; or it went with the Redis that it was made in.
            facts = {"discrepancy": found.number, "why": str(error)}
            refused = {"kind": "refused", "actor": correction["who"], "operation_id": operation_id, "details": facts}
            await self._register.turn(found.number, [begun], back, {}, refused)
            raise
        try:
            return discrepancy(await self._register.turn(found.number, [begun], ends, {}, letters=self._letters(_EVENTS[ends])))
        except AnotherState:
            row = await self.row(found.number)
            if row.state == ends:
                return discrepancy(row)  # somebody else has gone on with it at the same time
            raise

    async def _made(self, found: Discrepancy, operation_id: str, at_ms: int) -> set[str]:
        """What the ledger has of a correction, once it has all that Redis had when it was asked."""
        partition = self._partition(found)
        hello = await partition.hello()
        if hello.epoch and hello.state == "open":
            await self._ground.watermark.reached(Position(partition.number, hello.epoch, hello.sequence))
        return await self._comparing.made(found.merchant, [operation_id, _journaled(operation_id)], at_ms - SKEW_MS)

    async def _make(self, found: Discrepancy, plan: Plan, operation_id: str, reason: str, made: set[str]) -> None:
        partition = self._partition(found)
        key = key_of(found.merchant, _journaled(operation_id))
        correct = self._ground.engine.upkeep.correct
        journaled, adjusted = _journaled(operation_id) in made, operation_id in made
        if plan.way == "redis" and not journaled:
            await correct(partition.number, plan.epoch, key, (found.name, plan.available, plan.reserved), reason)
        elif plan.way == "write_off" and not journaled:
            await correct(partition.number, plan.epoch, key, (found.name, -plan.available, 0), reason, ledger=True)
        elif plan.way == "supply" and not adjusted:
            # First down and then up: between the two there is too little for sale, never too much.
            if not journaled:
                await correct(partition.number, plan.epoch, key, (found.name, -plan.available, 0), reason)
            elif (await partition.hello()).epoch != plan.epoch:
                raise StockFrozen(f"epoch {plan.epoch} of partition {partition.number} is over", retry_after=0.5)
            await self._adjust(found, plan, operation_id, reason)
        elif plan.way == "adjust" and not adjusted:
            await self._adjust(found, plan, operation_id, reason)
        elif plan.way == "hold":
            await self._set_time(found, partition)

    async def _adjust(self, found: Discrepancy, plan: Plan, operation_id: str, reason: str) -> None:
        assert found.sku is not None
        lines = [Line(found.sku, plan.available)]
        await self._stock.adjust(lines, merchant=found.merchant, operation_id=operation_id, reason=reason)

    async def _set_time(self, found: Discrepancy, partition: Partition) -> None:
        assert found.reservation is not None
        holds = await read_holds(partition, [found.name])
        (record,), (due,) = holds.records, holds.due
        if record is None or not record.startswith("h"):
            return  # it has ended meanwhile, which is all that was wanted
        ends = int(record.split(RS)[3])
        if not ends or (due is not None and due <= ends):
            return
        ttl = max((ends - holds.now_ms) / 1000, LEAST_TTL)
        await self._stock.extend(found.reservation, ttl=ttl, merchant=found.merchant)

    def _partition(self, found: Discrepancy) -> Partition:
        engine = self._ground.engine
        return engine.partitions[engine.layout.hold(found.name)] if found.what == What.HOLD else engine.place(found.name)


_EVENTS: Final[dict[str, Event]] = {"corrected": "corrected", "undone": "undone"}


def _journaled(operation_id: str) -> str:
    """The id of a correction's own journaled part, which no caller can send."""
    return f"\x1fcorrect\x1f{operation_id}"


def _kept(found: Discrepancy) -> Plan:
    correction = found.correction
    if correction is None:
        raise InventoryError(f"discrepancy {found.number} is {found.state}, and its correction is not on record")
    return Plan(correction["way"], correction["available"], correction["reserved"], correction["epoch"])


def _movement(found: Discrepancy, plan: Plan, operation_id: str, reason: str) -> Movement:
    assert found.sku is not None
    moved = (plan.units, plan.available, plan.reserved, 0)
    position = Position(0, 0, 0)  # it is in no journal: the ledger does not move
    return Movement(found.merchant, found.sku, "correct", *moved, operation_id, None, None, position, 0, reason)


def _check_words(reason: Any, who: Any) -> None:
    for name, value, most in (("reason", reason, MAX_REASON), ("who", who, 128)):
        if not isinstance(value, str) or not value.strip():
            raise InvalidOperation(name, value, "must say it in words")
        if len(value.encode("utf-8", "replace")) > most:
            raise InvalidOperation(name, value, f"must be at most {most} bytes")
