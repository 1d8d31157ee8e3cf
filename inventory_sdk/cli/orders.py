"""An orders file as a list of acts. The file has the columns invoice, at, sku, quantity, unit_price, customer, country.

The country is the merchant. What an invoice means:

- positive quantities are a sale;
- an invoice whose number begins with ``C`` is a cancellation: units come back, to the sales of the same customer and SKU
  that stand earlier in the file, newest first; what no sale in the file accounts for is restocked;
- a negative quantity without a ``C`` is an adjustment: units that were found broken or missing.

Every act has an id made from the invoice number and its place within the invoice, so that the same file gives the same acts.
"""

from __future__ import annotations

import csv
import gzip
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Literal

from inventory_sdk.model import MAX_LINES, Line

COLUMNS = ("invoice", "at", "sku", "quantity", "unit_price", "customer", "country")


class UnreadableOrders(ValueError):
    """The file is not an orders file; the message names line and column."""


@dataclass(frozen=True, slots=True)
class OrderLine:
    invoice: str
    sku: str
    quantity: int
    customer: str
    merchant: str


@dataclass(frozen=True, slots=True)
class Act:
    """One call to make. ``of``: the sale that a return belongs to. Quantities in ``lines`` are
    positive, also those that an adjustment takes away."""

    kind: Literal["restock", "deduct", "take_back", "adjust"]
    merchant: str
    operation_id: str
    order: str
    lines: tuple[Line, ...]
    of: str | None = None


def opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def read_orders(path: Path) -> Iterator[OrderLine]:
    """The file's lines, in its order; ``UnreadableOrders`` names what can't be read."""
    with opened(path) as file:
        rows = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise UnreadableOrders(f"{path}: column {', '.join(missing)} is missing; expected {', '.join(COLUMNS)}")
        for row in rows:
            for column in ("invoice", "sku", "country"):
                if not row[column]:
                    raise UnreadableOrders(f"{path}, line {rows.line_num}: {column} is empty")
            try:
                quantity = int(row["quantity"])
            except (TypeError, ValueError):
                raise UnreadableOrders(f"{path}, line {rows.line_num}: quantity={row['quantity']!r} is not a whole number") from None
            if quantity > 0 and row["invoice"].startswith("C"):
                raise UnreadableOrders(f"{path}, line {rows.line_num}: quantity={quantity} in cancellation {row['invoice']}")
            if quantity:
                yield OrderLine(row["invoice"], row["sku"], quantity, row["customer"] or "", row["country"])


def chunked(totals: Iterable[tuple[str, int]]) -> Iterator[tuple[Line, ...]]:
    """Lines in parts that one operation may have."""
    rest = iter(totals)
    while part := tuple(Line(sku, quantity) for sku, quantity in islice(rest, MAX_LINES)):
        yield part


def totals_of(lines: Iterable[OrderLine]) -> dict[str, int]:
    """Absolute units per SKU; the same SKU twice is summed."""
    totals: Counter[str] = Counter()
    for line in lines:
        totals[line.sku] += abs(line.quantity)
    return dict(totals)


def plan(lines: Iterable[OrderLine]) -> list[Act]:
    """Every act the file asks for, in its order, after the opening stock: as much of each SKU as is sold or written off
    in the whole file, so that no order of arrival can run short."""
    acts: list[Act] = []
    needed: dict[str, Counter[str]] = defaultdict(Counter)
    returnable: dict[tuple[str, str, str], list[tuple[str, int]]] = defaultdict(list)
    by_invoice: dict[tuple[str, str], list[OrderLine]] = {}
    for line in lines:  # an invoice is one act however its lines are spread over the file
        by_invoice.setdefault((line.invoice, line.merchant), []).append(line)
    for (invoice, merchant), invoiced in by_invoice.items():
        if invoice.startswith("C"):
            acts += _returned(invoice, merchant, invoiced, returnable)
            continue
        sold = totals_of(line for line in invoiced if line.quantity > 0)
        lost = totals_of(line for line in invoiced if line.quantity < 0)
        customers = {line.sku: line.customer for line in invoiced}
        for number, part in enumerate(chunked(sold.items())):
            sale = Act("deduct", merchant, f"{invoice}/{number}", invoice, part)
            acts.append(sale)
            for each in part:
                returnable[merchant, customers[each.sku], each.sku].append((sale.operation_id, each.quantity))
        acts += [Act("adjust", merchant, f"{invoice}/adjust/{number}", invoice, part) for number, part in enumerate(chunked(lost.items()))]
        needed[merchant].update(sold)
        needed[merchant].update(lost)
    opening = [
        Act("restock", merchant, f"opening/{number}", "", part)
        for merchant, totals in needed.items()
        for number, part in enumerate(chunked(sorted(totals.items())))
    ]
    return opening + acts


def _returned(
    invoice: str,
    merchant: str,
    invoiced: Iterable[OrderLine],
    returnable: dict[tuple[str, str, str], list[tuple[str, int]]],
) -> Iterator[Act]:
    back: list[tuple[str, str, int]] = []
    unaccounted: dict[str, int] = {}
    for (sku, customer), same in groupby(sorted(invoiced, key=_sku_and_customer), key=_sku_and_customer):
        units = sum(abs(line.quantity) for line in same)
        sales = returnable[merchant, customer, sku]
        while units and sales and customer:
            sale, open_units = sales.pop()
            taken = min(units, open_units)
            units -= taken
            back.append((sale, sku, taken))
            if open_units > taken:
                sales.append((sale, open_units - taken))
        if units:
            unaccounted[sku] = unaccounted.get(sku, 0) + units
    for sale, parts in groupby(sorted(back), key=lambda part: part[0]):
        totals: Counter[str] = Counter()
        for _, sku, units in parts:
            totals[sku] += units
        for number, lines in enumerate(chunked(totals.items())):
            yield Act("take_back", merchant, f"{invoice}/of/{sale}/{number}", invoice, lines, of=sale)
    for number, lines in enumerate(chunked(unaccounted.items())):
        yield Act("restock", merchant, f"{invoice}/restock/{number}", invoice, lines)


def _sku_and_customer(line: OrderLine) -> tuple[str, str]:
    return line.sku, line.customer
