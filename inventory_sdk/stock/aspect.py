"""What a stock decorator does when the function is called.

``run="now"``. reserve, deduct and a negative adjust move *before* the function, which then runs with the stock in hand; all
other kinds move *after* it returned (their arguments are read and checked before). A deduct is a reserve, the function, a
confirm. If the function raises, the take is undone, which frees its operation id:

- only by the call that really took. A repeat of an operation gets the first receipt (``receipt.replayed``) and runs the
  function too; if that raises, the first call's stock stays where it is;
- a repeat whose function returned sends ``keep``: from then on the first call can't undo. Where the undo was first, the repeat
  takes anew, and raises ``ReservationClosed`` if the stock is gone by then;
- the undo runs in a task of its own, so that a caller who is cancelled twice can't skip it, and is repeated if it fails;
- once the function has returned, what is left to do (confirm, extend, keep, an *after* movement) is done even if the caller is
  cancelled meanwhile. It has an operation id by then, so doing it again has no second effect.

A hold without a ttl of its own lives ``hold_ttl`` seconds until the function returned. ``session=`` leaves the end to a database
transaction (``SessionTake``).

``run="later"``. The function is not called. Its arguments travel with the movement; the worker calls it (``stock/later.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from inventory_sdk import context
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import Kind, Line, Receipt, check_text, check_ttl
from inventory_sdk.selectors import Pick, Selector, compile_lines, compile_selector, compile_text
from inventory_sdk.sessions import parts_of
from inventory_sdk.stock.later import Entry, Upgrade, make_entry
from inventory_sdk.stock.session import bind
from inventory_sdk.stock.take import Raises, Room, SessionTake, Take, Translating
from inventory_sdk.weave import Call, Order, Proceed, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """What one decorator was told. Selectors are not compiled yet."""

    kind: Kind
    run: Literal["now", "later"]
    merchant: Selector | None = None
    operation_id: Selector | None = None
    order: Selector | None = None
    reservation: Selector | None = None
    of: Selector | None = None
    reason: Selector | None = None
    lines: Selector | None = None
    sku: Selector | None = None
    quantity: Selector | int | None = None
    line_merchant: Selector | None = None
    ttl: float | Selector | None = None
    durability: str | None = None
    session: Selector | None = None
    raises: Raises | None = None
    result: Callable[[Receipt], Any] | None = None
    name: str | None = None
    version: int = 1
    upgrade: Mapping[int, Upgrade] | None = None


class StockAspect:
    """One decorator on one function. ``lines`` and ``merchant`` of a call are here for aspects that go by SKU (hotspots)."""

    order = Order.STOCK

    def __init__(self, room: Room, act: Act) -> None:
        self.act = act
        self.entry: Entry | None = None
        self.lines: Pick | None = None
        self.merchant: Pick | None = None
        self._room = room

    def compile(self, site: Site, proceed: Proceed) -> Proceed:
        act = self.act
        ask = Asking(site, act, self._room)
        self.lines, self.merchant = ask.lines, ask.merchant
        if act.run == "later":
            if self.entry is None:
                self.entry = make_entry(site, act.name, act.version, act.upgrade)
            return _later(self._room, act, ask, self.entry)
        if act.kind is Kind.ADJUST:
            return _adjust(site, self._room, act, ask, proceed)
        if act.kind in (Kind.RESERVE, Kind.DEDUCT):
            return _before(site, self._room, act, ask, proceed)
        if Receipt in site.injected.values():
            raise TypeError(f"{site.label}: {act.kind} moves after the function returned, so there is no Receipt to inject")
        return _after(self._room, act, ask, proceed)


class Asking:
    """From a call's arguments to the keywords of ``StockActs.submit``."""

    def __init__(self, site: Site, act: Act, room: Room) -> None:
        self._room = room
        self._kind = act.kind
        self._label = site.label
        self.merchant = None if act.merchant is None else compile_text(site, "merchant", act.merchant, required=False)
        self._picks: list[tuple[str, Pick]] = []
        self._constants: dict[str, Any] = {} if act.durability is None else {"durability": act.durability}
        for field, selector, required in (
            ("operation_id", act.operation_id, True),
            ("order", act.order, False),
            ("reservation", act.reservation, True),
            ("of", act.of, True),
        ):
            if selector is not None:
                self._picks.append((field, compile_text(site, field, selector, required=required)))
        if act.reason is not None:
            self._picks.append(("reason", compile_selector(site, "reason", act.reason)))
        self.lines = compile_lines(site, lines=act.lines, sku=act.sku, quantity=act.quantity, line_merchant=act.line_merchant)
        if self.lines is not None:
            self._picks.append(("lines", self.lines))
        elif act.kind not in (Kind.CONFIRM, Kind.RELEASE):
            raise TypeError(f"{site.label}: say which stock: lines=, or sku= and quantity=")
        if isinstance(act.ttl, int | float):
            self._constants["ttl"] = check_ttl(act.ttl)
        elif act.ttl is not None:
            self._picks.append(("ttl", compile_selector(site, "ttl", act.ttl)))
        elif act.kind is Kind.RESERVE and act.operation_id is None:
            raise TypeError(f"{site.label}: a hold without ttl= is open until it is closed, so it needs operation_id=")

    def __call__(self, call: Call) -> dict[str, Any]:
        """The keywords; ``InvalidOperation`` for arguments that name nothing."""
        values = call.values()
        merchant = None if self.merchant is None else self.merchant(values)
        if merchant is None:
            merchant = context.merchant.get() or self._room._default_merchant()
            if merchant is None:
                why = f"name one: merchant= of {self._label}, the request's, or Inventory(merchant=…)"
                raise InvalidOperation("merchant", None, why)
        asked = {"merchant": merchant, **self._constants}
        for field, pick in self._picks:
            asked[field] = pick(values)
        return asked

    def checked(self, call: Call) -> dict[str, Any]:
        """Like a call, with everything refused here that the stock room would refuse: for what moves after the function."""
        asked = self(call)
        for field in ("merchant", "operation_id", "order", "reservation", "of"):
            if asked.get(field) is not None:
                check_text(field, asked[field])
        lines: Sequence[Line] | None = asked.get("lines")
        if lines is not None:
            if not lines:
                raise InvalidOperation("lines", lines, "must have at least one line")
            negative = self._kind is Kind.ADJUST and lines[0].quantity < 0
            for line in lines:
                if (line.quantity < 0) is not negative:
                    why = "must have the sign of the other lines" if self._kind is Kind.ADJUST else "must be positive"
                    raise InvalidOperation("quantity", line.quantity, f"{why} (sku {line.sku!r})")
        return asked


def _before(site: Site, room: Room, act: Act, ask: Asking, proceed: Proceed) -> Proceed:
    deduct = act.kind is Kind.DEDUCT
    kind = Kind.RESERVE if deduct else act.kind
    translating = Translating(act.raises)
    pick_session = None if act.session is None else compile_selector(site, "session", act.session)

    async def run(call: Call) -> Any:
        acts = room._stock_acts()
        bound = None
        with translating:
            asked = ask(call)
            ttl = asked.get("ttl")
            if kind is Kind.RESERVE and ttl is None:
                if not deduct and "operation_id" not in asked:
                    raise InvalidOperation("ttl", None, "a hold without an end needs operation_id=")
                asked["ttl"] = room.hold_ttl
            parts = None if pick_session is None else parts_of(pick_session(call.values()))
            receipt = await acts.submit(kind, **asked)
        take = Take(room, kind, asked, receipt, deduct=deduct, ttl=ttl)
        try:
            if parts is not None:
                bound = bind(*parts, SessionTake(take, translating), room._afterwards.insist)
            call.give(Receipt, receipt)
            result = await proceed(call)
        except BaseException as error:
            if not receipt.replayed and (bound is None or bound.drop()):
                await _give_back(room, take, error)
            elif bound is not None:
                bound.drop()
            raise
        if bound is None:
            await _through(room, take.finish, translating)
        else:
            bound.join()
        return result

    return run


def _adjust(site: Site, room: Room, act: Act, ask: Asking, proceed: Proceed) -> Proceed:
    if any(kind is Receipt and name not in site.optional for name, kind in site.injected.items()):
        raise TypeError(f"{site.label}: a positive adjust has no receipt before the function; write 'Receipt | None'")
    before, after = _before(site, room, act, ask, proceed), _after(room, act, ask, proceed)

    async def adjust(call: Call) -> Any:
        with Translating(act.raises):
            negative = ask.checked(call)["lines"][0].quantity < 0
        if negative:
            return await before(call)
        call.give(Receipt, None)
        return await after(call)

    return adjust


def _after(room: Room, act: Act, ask: Asking, proceed: Proceed) -> Proceed:
    kind, translating = act.kind, Translating(act.raises)

    async def run(call: Call) -> Any:
        with translating:
            asked = ask.checked(call)
        # Done again after a cancellation, it must have one effect. A whole confirm or release has an id derived from its hold.
        if "operation_id" not in asked and ("reservation" not in asked or "lines" in asked):
            named = context.operation.get()
            asked["operation_id"] = uuid4().hex if named is None else named.spend(asked["merchant"])

        async def move() -> None:
            await room._stock_acts().submit(kind, **asked)

        result = await proceed(call)
        await _through(room, move, translating)
        return result

    return run


def _later(room: Room, act: Act, ask: Asking, entry: Entry) -> Proceed:
    kind, translating, result, codec = act.kind, Translating(act.raises), act.result, entry.codec

    async def run(call: Call) -> Any:
        with translating:
            asked = ask(call)
            task: dict[str, Any] = {"name": entry.name, "version": entry.version, "arguments": codec.encode(call)}
            route = room._task_route(asked["merchant"])
            if route:
                task["route"] = route
            carried = context.packed()
            if carried is not None:
                task["gray"] = carried
            receipt = await room._stock_acts().submit(kind, **asked, task=task)
        return receipt if result is None else result(receipt)

    return run


async def _through(room: Room, work: Callable[[], Coroutine[Any, Any, None]], translating: Translating) -> None:
    """Do what is left after the function returned; a cancelled caller leaves it to a task."""
    with translating:
        try:
            await work()
        except asyncio.CancelledError:
            room._afterwards.insist(work, "rest of a cancelled call")
            raise


async def _give_back(room: Room, take: Take, error: BaseException) -> None:
    """Undo, and wait for the first try; if that fails the error says so."""
    try:
        first = room._afterwards.insist(take.undo, f"undo of {take.receipt.operation_id}")
    except RuntimeError as closing:  # The loop is gone: a coroutine that is closed from outside can't start anything.
        error.add_note(f"the stock of operation {take.receipt.operation_id!r} could not be given back: {closing}")
        return
    if isinstance(error, GeneratorExit | KeyboardInterrupt | SystemExit):
        return
    failed = await asyncio.shield(first)
    if failed is not None:
        error.add_note(f"giving back the stock of operation {take.receipt.operation_id!r} failed and is tried again: {failed!r}")
