"""A plain recount of an orders file: reads it by itself, adds up, and knows nothing of the SDK or of the replay.

This is the third account in the proof, so it shares no code with the other two on purpose.
"""

from __future__ import annotations

import csv
import gzip
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Count:
    """Units of one SKU at one merchant."""

    sold: int = 0
    returned: int = 0
    written_off: int = 0


@dataclass(frozen=True, slots=True)
class Recount:
    """``units`` per (merchant, sku); ``invoices``: per (merchant, invoice), the units per SKU that it moves."""

    lines: int
    units: dict[tuple[str, str], Count]
    invoices: dict[tuple[str, str], dict[str, int]]


def recount(path: Path) -> Recount:
    """Add up the file."""
    units: dict[tuple[str, str], Count] = {}
    invoices: dict[tuple[str, str], dict[str, int]] = {}
    lines = 0
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            quantity = int(row["quantity"])
            if quantity == 0:
                continue
            lines += 1
            count = units.setdefault((row["country"], row["sku"]), Count())
            if row["invoice"][0] == "C":
                count.returned += -quantity
            elif quantity > 0:
                count.sold += quantity
            else:
                count.written_off += -quantity
            moved = invoices.setdefault((row["country"], row["invoice"]), {})
            moved[row["sku"]] = moved.get(row["sku"], 0) + (-quantity if row["invoice"][0] == "C" else abs(quantity))
    return Recount(lines, units, invoices)
