"""What the callers of one seed do: which call comes next, with which ids and lines. Pure choices, no I/O."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from inventory_sdk.model import Line, Receipt, partition_of

LEVELS = (None, None, "redis", "redis", "queue", "queue", "database")
COPIES = ("replica", "replica", "aof")


@dataclass(frozen=True)
class Call:
    """One call of the public API. ``flat``: the summed lines by field, None where it names none. ``bad``: must be refused."""

    kind: str
    merchant: str
    name: str | None
    arguments: dict[str, Any]
    flat: list[Any] | None
    level: str | None = None
    bad: bool = False
    receipt: Receipt | None = None
    """Of undo and keep."""
    then: Call | None = None
    """What somebody does as soon as it is answered."""
    rests: bool = False
    """Whether it sells what was given back just now."""


@dataclass
class Scenario:
    """Shops, their stock, and what was done so far."""

    random: random.Random
    partitions: int
    spanning: float = 0.0
    """How often a line is of a shop in another partition."""
    copies: bool = False
    """Whether levels ``replica`` and ``aof`` are asked for."""
    scarce: bool = False
    """Whether there is little of everything."""
    soon: list[Call] = field(default_factory=list)
    """Calls that others make at once, behind the last one."""
    merchants: dict[int, list[str]] = field(default_factory=dict)
    """Partition → shops."""
    supply: dict[str, dict[str, int]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    holds: list[tuple[str, str, list[Any]]] = field(default_factory=list)
    """(merchant, reservation, flat lines)."""
    sales: list[tuple[str, str, list[Any]]] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    number: int = 0

    def __post_init__(self) -> None:
        chance = self.random
        names = (f"shop{n}" for n in range(1000))
        for partition in range(self.partitions):
            shops: list[str] = []
            wanted = chance.randint(1, 2)
            while len(shops) < wanted:
                name = next(names)
                if partition_of(name, self.partitions) == partition:
                    shops.append(name)
            self.merchants[partition] = shops
            for shop in shops:
                units = (2, 3) if self.scarce else (3, 8, 20, 60)
                self.supply[shop] = {sku: chance.choice(units) for sku in ("red", "green", "blue/ü")[: chance.randint(1, 3)]}

    def next(self) -> Call:
        """The next call, whoever makes it."""
        makers: list[tuple[int, Callable[[], Call | None]]] = [
            (22, lambda: self._take("reserve")),
            (18, lambda: self._take("deduct")),
            (3, lambda: self._take("adjust")),
            (12, lambda: self._close("confirm")),
            (10, lambda: self._close("release")),
            (4, self._extend),
            (3, lambda: self._enter("restock")),
            (3, self._arrival),
            (3, self._give_back),
            (2, lambda: self._enter("adjust")),
            (4, self._take_back),
            (4, self._undo),
            (2, self._keep),
            (12, self._again),
            (3, self._conflict),
            (2, self._bad),
            (4, self._question),
        ]
        weights = [weight for weight, _ in makers]
        while True:
            (make,) = self.random.choices([maker for _, maker in makers], weights)
            call = make()
            if call is not None:
                self.calls.append(call)
                return call

    def accepted(self, call: Call, receipt: Receipt) -> None:
        """Remember what later calls can refer to."""
        flat = [value for line in receipt.lines for value in (f"{line.merchant}\x1f{line.sku}", abs(line.quantity))]
        if call.kind == "reserve":
            self.holds.append((call.merchant, receipt.operation_id, flat))
        if call.kind == "deduct" and not self._for_undo(receipt):
            self.sales.append((call.merchant, receipt.operation_id, flat))
        if call.kind == "confirm" and "reservation" in call.arguments:
            self.sales.append((call.merchant, call.arguments["reservation"], flat))
        if (
            call.kind in ("reserve", "deduct", "adjust")
            and receipt.positions[0].epoch
            and (call.kind != "deduct" or self._for_undo(receipt))
        ):
            self.receipts.append(receipt)

    def _for_undo(self, receipt: Receipt) -> bool:
        """Half of the sales are for undoing and half for returns: nobody undoes a call of which something was returned."""
        return sum(receipt.operation_id.encode()) % 2 == 0

    def _shop(self) -> str:
        return self.random.choice(self.random.choice(list(self.merchants.values())))

    def _lines(self, merchant: str, sign: int = 1) -> tuple[list[Line], list[Any]]:
        chance = self.random
        neighbours = self.merchants[partition_of(merchant, self.partitions)]
        lines: list[Line] = []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            shop = merchant if chance.random() < 0.85 else chance.choice(neighbours)
            if self.spanning and chance.random() < self.spanning:
                shop = chance.choice(chance.choice(list(self.merchants.values())))
            sku = chance.choice(list(self.supply[shop]))
            lines.append(Line(sku, chance.choice((1, 1, 2, 3)) * sign, None if shop == merchant and chance.random() < 0.9 else shop))
        return lines, flat_of(lines, merchant)

    def _name(self) -> str:
        self.number += 1
        return f"op-{self.number}"

    def _level(self) -> str | None:
        return self.random.choice(LEVELS + COPIES if self.copies else LEVELS)

    def _take(self, kind: str) -> Call:
        merchant = self._shop()
        lines, flat = self._lines(merchant, -1 if kind == "adjust" else 1)
        name = self._name() if self.random.random() < 0.8 else None
        arguments: dict[str, Any] = {"lines": lines}
        if kind == "reserve":
            arguments["ttl"] = self.random.choice((0.5, 2.0, 5.0, 600.0, None if name else 600.0))
        if self.random.random() < 0.3:
            arguments["order"] = f"order-{self.number}"
        if kind == "adjust":
            arguments["reason"] = "counted"
        if kind == "reserve" and name is not None and self.random.random() < 0.3:
            # Others may name it before its answer is there, or at all.
            self.holds.append((merchant, name, flat))
        return Call(kind, merchant, name, arguments, flat, self._level())

    def _close(self, kind: str) -> Call | None:
        if self.random.random() < 0.05:
            merchant, hold, flat = self._shop(), f"unknown-{self._name()}", []
        elif self.holds:
            merchant, hold, flat = self.random.choice(self.holds[-8:])
        else:
            return None
        arguments: dict[str, Any] = {"reservation": hold}
        name: str | None = None
        shown: list[Any] | None = None
        if flat and self.random.random() < 0.35:
            at = self.random.randrange(0, len(flat), 2)
            merchant_of, sku = flat[at].split("\x1f")
            quantity = self.random.randint(1, flat[at + 1])
            arguments["lines"] = [Line(sku, quantity, merchant_of)]
            shown = [flat[at], quantity]
            name = self._name() if self.random.random() < 0.7 else None
        elif kind == "confirm" and self.random.random() < 0.3:
            arguments["reacquire"] = True
        if name is None and shown is None:
            return Call(kind, merchant, f"{hold}\x1f{kind}", arguments, shown, self._level())
        return Call(kind, merchant, name, arguments, shown, self._level())

    def _extend(self) -> Call | None:
        if not self.holds:
            return None
        merchant, hold, _ = self.random.choice(self.holds[-8:])
        return Call("extend", merchant, None, {"reservation": hold, "ttl": self.random.choice((1.0, 10.0, None))}, None)

    def _enter(self, kind: str) -> Call:
        merchant = self._shop()
        lines, flat = self._lines(merchant)
        return Call(kind, merchant, self._name() if self.random.random() < 0.8 else None, {"lines": lines}, flat, None)

    def _arrival(self) -> Call:
        """A SKU that nobody had, and others who want it at once: it is loaded into Redis while it is sold."""
        merchant = self._shop()
        sku = f"new-{self._name()}"
        units = self.random.randint(2, 6)
        self.supply[merchant][sku] = units
        for _ in range(self.random.randint(1, 4)):
            quantity = self.random.randint(1, 2)
            wanted = [Line(sku, quantity)]
            call = Call("deduct", merchant, self._name(), {"lines": wanted}, flat_of(wanted, merchant), self._level())
            self.soon.append(call)
            self.calls.append(call)
        lines = [Line(sku, units)]
        return Call("restock", merchant, self._name(), {"lines": lines}, flat_of(lines, merchant))

    def _give_back(self) -> Call:
        """A SKU that one buyer holds whole and gives back where only Redis knows it; at once its units are sold for good."""
        merchant, hold = self._shop(), self._name()
        sku = f"back-{hold}"
        units = self.supply[merchant][sku] = self.random.randint(1, 4)
        lines = [Line(sku, units)]
        flat = flat_of(lines, merchant)
        sale = Call("deduct", merchant, self._name(), {"lines": lines}, flat, "queue", rests=True)
        release = Call("release", merchant, f"{hold}\x1frelease", {"reservation": hold}, None, "redis", then=sale)
        reserve = Call("reserve", merchant, hold, {"lines": lines, "ttl": 600.0}, flat, "redis", then=release)
        return Call("restock", merchant, self._name(), {"lines": lines}, flat, then=reserve)

    def _take_back(self) -> Call | None:
        if not self.sales:
            return None
        merchant, name, flat = self.random.choice(self.sales[-8:])
        at = self.random.randrange(0, len(flat), 2)
        shop, sku = flat[at].split("\x1f")
        quantity = self.random.randint(1, flat[at + 1])
        return Call("take_back", merchant, self._name(), {"lines": [Line(sku, quantity, shop)], "of": name}, [flat[at], quantity])

    def _undo(self) -> Call | None:
        if not self.receipts:
            return None
        receipt = self.random.choice(self.receipts[-6:])
        return Call("undo", receipt.merchant, receipt.operation_id, {}, None, receipt=receipt)

    def _keep(self) -> Call | None:
        if not self.receipts:
            return None
        receipt = self.random.choice(self.receipts[-6:])
        return Call("keep", receipt.merchant, receipt.operation_id, {}, None, receipt=receipt)

    def _again(self) -> Call | None:
        repeatable = [call for call in self.calls[-25:] if call.name is not None and call.kind not in ("undo", "keep", "question")]
        return self.random.choice(repeatable) if repeatable else None

    def _conflict(self) -> Call | None:
        known = [call for call in self.calls[-25:] if call.name and call.kind in ("reserve", "deduct") and not call.bad]
        if not known:
            return None
        first = self.random.choice(known)
        lines, flat = self._lines(first.merchant)
        kind = self.random.choice(("reserve", "deduct"))
        return Call(kind, first.merchant, first.name, {"lines": lines}, flat, self._level())

    def _bad(self) -> Call:
        merchant = self._shop()
        lines, flat = self._lines(merchant)
        wrong: list[tuple[str | None, list[Line], dict[str, Any]]] = [
            ("", lines, {}),
            ("x" * 129, lines, {}),
            ("a\x1fb", lines, {}),
            (None, [], {}),
            (None, [Line("red", -1)], {}),
            (None, [Line("red", 10**9), Line("red", 1)], {}),
            (None, [Line("no such sku", 1)], {}),
            (None, lines, {"durability": "rock"}),
        ]
        name, lines, more = self.random.choice(wrong)
        return Call("deduct", merchant, name, {"lines": lines, **more}, flat, None, bad=True)

    def _question(self) -> Call:
        merchant = self._shop()
        what = self.random.choice(("level", "reservation", "status", "settled"))
        hold = self.random.choice(self.holds)[1] if self.holds else "nothing"
        sku = self.random.choice(list(self.supply[merchant]))
        return Call("question", merchant, None, {"what": what, "sku": sku, "name": hold}, None)


def flat_of(lines: list[Line], merchant: str) -> list[Any]:
    """Summed by field, sorted, positive."""
    totals: dict[str, int] = {}
    for line in lines:
        field_name = f"{line.merchant or merchant}\x1f{line.sku}"
        totals[field_name] = totals.get(field_name, 0) + abs(line.quantity)
    return [value for name in sorted(totals) for value in (name, totals[name])]
