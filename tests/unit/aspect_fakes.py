"""A shop with the stock decorators on a stock room in memory, which holds the promises the aspects build on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from inventory_sdk.errors import (
    InsufficientStock,
    InvalidOperation,
    ReservationClosed,
    ReservationExpired,
    ReservationNotFound,
)
from inventory_sdk.model import Kind, Line, Position, Receipt, ReceiptLine, Shortage
from inventory_sdk.stock.decorators import StockDecorators


class FakeStock:
    """One merchant's SKU counters, holds and results. ``log`` has what was asked, in order; ``gates`` stop a call by name."""

    def __init__(self, **available: int) -> None:
        self.available = available
        self.holds: dict[str, Receipt] = {}
        self.ttls: dict[str, float | None] = {}
        self.results: dict[str, Receipt] = {}
        self.states: dict[str, str] = {}
        self.pinned: set[str] = set()
        self.kept: set[str] = set()
        self.log: list[str] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.reached: dict[str, asyncio.Event] = {}
        self.failures: dict[str, list[BaseException]] = {}
        self._sequence = 0

    async def _pass(self, name: str) -> None:
        self.log.append(name)
        if name in self.reached:
            self.reached[name].set()
        if name in self.gates:
            await self.gates[name].wait()
        if self.failures.get(name):
            raise self.failures[name].pop(0)

    def gate(self, name: str) -> asyncio.Event:
        """Calls of this name wait for the event; ``reached[name]`` is set when one is there."""
        self.gates[name], self.reached[name] = asyncio.Event(), asyncio.Event()
        return self.gates[name]

    async def submit(self, kind: str, **asked: Any) -> Receipt:
        kind = str(kind)
        self.asked.append((kind, asked))
        await self._pass(kind)
        if kind in (Kind.CONFIRM, Kind.RELEASE):
            return self._close(kind, asked["reservation"], asked.get("operation_id"))
        lines: Sequence[Line] = asked["lines"]
        if not lines:
            raise InvalidOperation("lines", lines, "must have at least one line")
        name = asked.get("operation_id") or f"made-up-{len(self.asked)}"
        if name in self.results:
            state = self.states.get(name, "held")
            if state in ("released", "expired"):
                raise ReservationExpired(name) if state == "expired" else ReservationClosed(name, state)
            return replace(self.results[name], replayed=True)
        sign = {Kind.RESERVE: -1, Kind.DEDUCT: -1}.get(Kind(kind), 1)
        for line in lines:
            if self.available[line.sku] + sign * line.quantity < 0:
                raise InsufficientStock([Shortage("m1", line.sku, line.quantity, self.available[line.sku])])
        receipt = self._receipt(name, kind, asked.get("merchant") or "m1", asked.get("order"), lines, sign)
        if kind == Kind.RESERVE:
            self.holds[name] = receipt
            self.ttls[name] = asked["ttl"]
        return receipt

    def _receipt(self, name: str, kind: str, merchant: str, order: str | None, lines: Sequence[Line], sign: int) -> Receipt:
        self._sequence += 1
        moved = []
        for line in lines:
            self.available[line.sku] += sign * line.quantity
            moved.append(ReceiptLine(merchant, line.sku, line.quantity, self.available[line.sku]))
        receipt = Receipt(name, kind, merchant, order, tuple(moved), (Position(0, 1, self._sequence),), "redis")
        self.results[name] = receipt
        self.states.pop(name, None)
        self.kept.discard(name)
        return receipt

    def _close(self, kind: str, reservation: str, operation_id: str | None, as_decider: bool = False) -> Receipt:
        name = operation_id or f"{reservation}\x1f{kind}"
        if name in self.results:
            return replace(self.results[name], replayed=True)
        if reservation not in self.holds:
            if reservation not in self.states:
                raise ReservationNotFound(reservation, "m1")
            state = self.states[reservation]
            raise ReservationExpired(reservation) if state == "expired" else ReservationClosed(reservation, state)
        if reservation in self.pinned and not as_decider:
            raise AssertionError(f"{reservation} is pinned: only its decider may close it")
        held = self.holds.pop(reservation)
        self.pinned.discard(reservation)
        self.states[reservation] = "confirmed" if kind == Kind.CONFIRM else "released"
        lines = [Line(line.sku, line.quantity) for line in held.lines]
        return self._receipt(name, kind, held.merchant, None, lines, 0 if kind == Kind.CONFIRM else 1)

    async def confirm(self, reservation: str, *, merchant: str | None = None, durability: Any = None, reacquire: bool = False) -> Receipt:
        await self._pass("confirm")
        if reacquire and self.states.get(reservation) == "expired":
            held = self.results[reservation]
            self.available = {
                sku: left - sum(line.quantity for line in held.lines if line.sku == sku) for sku, left in self.available.items()
            }
            self.holds[reservation] = held
        return self._close("confirm", reservation, None)

    async def settle_pinned(self, receipt: Receipt, kind: Literal["confirm", "release"]) -> Receipt:
        await self._pass(f"settle {kind}")
        return self._close(kind, receipt.operation_id, None, as_decider=True)

    async def undo(self, receipt: Receipt, *, decider: bool = False) -> bool:
        await self._pass("undo")
        name = receipt.operation_id
        known = self.results.get(name)
        if known is None or known.positions != receipt.positions or name in self.kept:
            return False
        if receipt.kind == Kind.RESERVE and self.holds.pop(name, None) is None:
            return False
        self.pinned.discard(name)
        del self.results[name]
        for line in receipt.lines:
            self.available[line.sku] += line.quantity if receipt.kind == Kind.RESERVE else -line.quantity
        return True

    async def keep(self, receipt: Receipt) -> bool:
        await self._pass("keep")
        known = self.results.get(receipt.operation_id)
        if known is None or known.positions != receipt.positions:
            return False
        self.kept.add(receipt.operation_id)
        return True

    async def extend(self, reservation: str, *, ttl: float | None, merchant: str | None = None) -> None:
        await self._pass("extend")
        if reservation not in self.holds:
            raise ReservationClosed(reservation, self.states.get(reservation, "expired"))
        self.ttls[reservation] = ttl

    async def pin(self, receipt: Receipt, *, resume: float | None = None, confirm: bool = False) -> bool:
        await self._pass("pin")
        if receipt.operation_id not in self.holds:
            return False
        self.pinned.add(receipt.operation_id)
        return True

    async def resume(self, receipt: Receipt, ttl: float | None) -> bool:
        await self._pass("resume")
        if receipt.operation_id not in self.holds:
            return False
        self.pinned.discard(receipt.operation_id)
        self.ttls[receipt.operation_id] = ttl
        return True

    def expire(self, reservation: str) -> None:
        for line in self.holds.pop(reservation).lines:
            self.available[line.sku] += line.quantity
        self.states[reservation] = "expired"


class Shop(StockDecorators):
    """An Inventory as far as the decorators see it."""

    def __init__(self, stock: FakeStock, ledger: Any = None, merchant: str | None = "m1") -> None:
        super().__init__()
        self.stock = stock
        self.ledger = ledger
        self.merchant = merchant

    def _stock_acts(self) -> FakeStock:
        return self.stock

    def _ledger(self) -> Any:
        return self.ledger

    def _default_merchant(self) -> str | None:
        return self.merchant

    async def drained(self) -> None:
        await self._afterwards.drain()
