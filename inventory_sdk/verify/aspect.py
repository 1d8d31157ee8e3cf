"""``@inventory.verifies(…)``: the innermost aspect of a call. The lines are read before the function runs, and held against what it did
before its transaction is committed (``session=``) and when it has returned. A function that raises is not verified: whoever catches
its error rolls back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from inventory_sdk import context
from inventory_sdk.errors import InvalidOperation, QuantityMismatch
from inventory_sdk.metrics import Happened, Metrics
from inventory_sdk.selectors import Pick, Selector, compile_lines, compile_selector, compile_text
from inventory_sdk.sessions import parts_of
from inventory_sdk.verify.changes import MOVED, Change, Found, Key, found_in, recording
from inventory_sdk.verify.check import Rule, asked, mismatches
from inventory_sdk.verify.tables import Watched, WatchedTables
from inventory_sdk.weave import Call, Order, Proceed, Site

log = logging.getLogger("inventory_sdk.verify")

Changes = Literal["recorded", "returned"] | Callable[[Any], Iterable[Change]] | WatchedTables
Mode = Literal["enforce", "observe"]


class Room(Protocol):
    """What the aspect asks its Inventory for."""

    @property
    def _metrics(self) -> Metrics: ...
    def _default_merchant(self) -> str | None: ...
    async def _tell(self, name: str, facts: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the decorator was told. Selectors are not compiled yet."""

    lines: Selector | None
    sku: Selector | None
    quantity: Selector | int | None
    line_merchant: Selector | None
    merchant: Selector | None
    by: int | Mapping[str, int]
    log: Literal["signed", "unsigned"] | None
    changes: Changes
    session: Selector | None
    mode: Mode


class VerifyAspect:
    """One verification on one function."""

    order = Order.VERIFY

    def __init__(self, room: Room, told: Asked) -> None:
        if told.mode not in ("enforce", "observe"):
            raise TypeError(f"verifies: mode={told.mode!r} must be 'enforce' or 'observe'")
        if told.log not in ("signed", "unsigned", None):
            raise TypeError(f"verifies: log={told.log!r} must be 'signed', 'unsigned' or None (there is no change log)")
        self._room = room
        self._told = told
        self._tables: Watched | None = None
        has_log = True
        changes = told.changes
        if isinstance(changes, WatchedTables):
            if not isinstance(told.by, Mapping) or told.session is None:
                raise TypeError("verifies: WatchedTables needs session= and by={column: units per unit of a line}")
            self._tables = Watched(changes, told.by)
            has_log = self._tables.log is not None
        elif isinstance(told.by, Mapping):
            raise TypeError("verifies: by= is a mapping of columns with changes=WatchedTables(…) only")
        elif changes != "recorded" and told.session is not None:
            raise TypeError("verifies: what the function returns is not known before its session commits; record_change(…) is")
        elif changes not in ("recorded", "returned") and not callable(changes):
            raise TypeError(f"verifies: changes={changes!r} must be 'recorded', 'returned', a function of the result or WatchedTables(…)")
        by = told.by if isinstance(told.by, Mapping) else {MOVED: told.by}
        if not by or any(type(factor) is not int for factor in by.values()) or not any(by.values()):
            raise TypeError(f"verifies: by={told.by!r} must say, in whole numbers, what one unit of a line does")
        self._rule = Rule(by, told.log if has_log else None)

    def compile(self, site: Site, proceed: Proceed) -> Proceed:
        told = self._told
        lines = compile_lines(site, lines=told.lines, sku=told.sku, quantity=told.quantity, line_merchant=told.line_merchant)
        if lines is None:
            raise TypeError(f"{site.label}: say what must move: lines=, or sku= and quantity=")
        merchant = None if told.merchant is None else compile_text(site, "merchant", told.merchant, required=False)
        session = None if told.session is None else compile_selector(site, "session", told.session)

        def case_of(call: Call) -> _Case:
            values = call.values()
            whose = None if merchant is None else merchant(values)
            whose = whose or context.merchant.get() or self._room._default_merchant() or ""
            return _Case(self._room, self._rule, told.mode, site.label, whose, asked(lines(values), whose))

        if session is None:
            return self._reported(proceed, case_of)
        return self._watched(proceed, case_of, session)

    def _reported(self, proceed: Proceed, case_of: Callable[[Call], _Case]) -> Proceed:
        """The function says what it changed; the verdict falls when it has returned."""
        changes = self._told.changes
        returned = changes if callable(changes) else (lambda result: result) if changes == "returned" else None

        async def run(call: Call) -> Any:
            async with case_of(call) as case:
                with recording() as record:
                    result = await proceed(call)
                    case.judge(found_in(record.changes if returned is None else returned(result), case.merchant))
            return result

        return run

    def _watched(self, proceed: Proceed, case_of: Callable[[Call], _Case], session: Pick) -> Proceed:
        """A session's transaction must not be committed before the verdict."""
        tables = self._tables

        async def run(call: Call) -> Any:
            from inventory_sdk.verify.watch import Gate, Watch

            given = session(call.values())
            sync, asynchronous = parts_of(given)
            if asynchronous is None:
                raise InvalidOperation("session", given, "of a verified function must be an AsyncSession")
            gate: Gate
            async with case_of(call) as case:
                with recording() as record:
                    if tables is None:
                        gate = Gate(sync, lambda found: case.judge(found_in(record.changes, case.merchant)))
                    else:
                        gate = Watch(sync, case.judge, tables, case.merchant, case.units)
                    try:
                        await asynchronous.run_sync(lambda _: gate.open())
                        result = await proceed(call)
                        await asynchronous.run_sync(lambda _: gate.verify())
                    finally:
                        gate.close()
            return result

        return run


class _Case:
    """One call before the rule. At the end of its block the handlers hear of a mismatch, unless the call was cancelled."""

    def __init__(self, room: Room, rule: Rule, mode: Mode, label: str, merchant: str, units: dict[Key, int]) -> None:
        self.merchant = merchant
        self._room = room
        self._rule = rule
        self._mode = mode
        self._label = label
        self.units = units
        self._wrong: QuantityMismatch | None = None

    def judge(self, found: Found) -> None:
        """Count what does not match, once per call; ``QuantityMismatch`` unless it is only observed."""
        wrong = mismatches(self._rule, self.units, found)
        if not wrong:
            return
        error = QuantityMismatch(wrong)
        if self._wrong is None:
            self._wrong = error
            self._room._metrics.record(Happened("mismatch", {"function": self._label, "reason": self._mode}))
            log.error("%s did not move what it was asked to (%s): %s", self._label, self._mode, error)
        if self._mode == "enforce":
            raise error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._wrong is None or (kind is not None and not issubclass(kind, Exception)):
            return
        facts = {"function": self._label, "mode": self._mode, "merchant": self.merchant, "mismatches": self._wrong.mismatches}
        try:
            await self._room._tell("mismatch", facts)
        except Exception:  # what a handler raises changes nothing: the verdict stands
            log.exception('a handler of on("mismatch") failed')
