"""What one call was asked to move, held against what was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from inventory_sdk.model import Line
from inventory_sdk.quantities import differences
from inventory_sdk.verify.changes import Found, Key


@dataclass(frozen=True, slots=True)
class Rule:
    """``by``: what one unit of a line does to each counter. ``log``: how its change-log row counts; None: there is no change log."""

    by: Mapping[str, int]
    log: Literal["signed", "unsigned"] | None

    @property
    def logged(self) -> int:
        """What one unit of a line says in the change log: what the first counter does, with its sign or without."""
        first = next(iter(self.by.values()))
        return abs(first) if self.log == "unsigned" else first


def asked(lines: Iterable[Line], merchant: str) -> dict[Key, int]:
    """Units per line, the same SKU twice summed."""
    units: dict[Key, int] = {}
    for line in lines:
        key = (line.merchant or merchant, line.sku)
        units[key] = units.get(key, 0) + line.quantity
    return units


def mismatches(rule: Rule, units: Mapping[Key, int], found: Found) -> list[tuple[str, int, int]]:
    """(what, expected, found) of every line and counter, and every change-log row, that is not as asked; empty: exact."""
    expected = {(key, counter): quantity * factor for key, quantity in units.items() for counter, factor in rule.by.items()}
    wrong = [
        (f"merchant {merchant!r}, sku {sku!r}, {counter}", wanted, is_now)
        for ((merchant, sku), counter), wanted, is_now in differences(expected, found.moved)
    ]
    if rule.log is not None:
        rows = {key: quantity * rule.logged for key, quantity in units.items()}
        wrong += [
            (f"merchant {merchant!r}, sku {sku!r}, change log", wanted, is_now)
            for (merchant, sku), wanted, is_now in differences(rows, found.logged)
        ]
    return wrong + found.wrong
