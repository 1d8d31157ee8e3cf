"""Counts to the unit: what the callers wrote down against what the ledger has, and the ledger against Redis."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from inventory_sdk import Inventory
from inventory_sdk.ledger.schema import COUNTERS, Tables
from inventory_sdk.model import LEDGER_DELTAS, key_of, split_key
from inventory_sdk.stock.partition import Partition

Place = tuple[int, int, int]
ENTERS: Final = ("restock",)
"""Kinds that the ledger has before they are acknowledged, whatever the level."""


@dataclass
class Asked:
    """One operation as its caller wrote it down. ``said``: every answer, in order."""

    key: str
    kind: str
    lines: dict[str, int]
    level: str
    of: str | None
    said: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    at: list[Place] = field(default_factory=list)

    @property
    def stands(self) -> bool:
        """It was told so, at its level."""
        return "acked" in self.said

    @property
    def refused(self) -> bool:
        """It was told for sure that nothing moved."""
        return bool(self.said) and set(self.said) == {"refused"}


@dataclass(frozen=True)
class Row:
    """One operation as the ledger has it."""

    place: Place
    key: str
    kind: str
    status: str
    lines: dict[str, int]
    reference: str | None


@dataclass
class Books:
    """The ledger's rows, read in one transaction."""

    rows: dict[str, list[Row]]
    stock: dict[str, dict[str, int]]
    held: set[str]
    lost: set[Place]
    ends: dict[tuple[int, int], int]
    """(partition, epoch) of each closed epoch → its last sequence."""
    pending: int

    def applied(self, key: str) -> list[Row]:
        return [row for row in self.rows.get(key, ()) if row.status == "applied"]

    def is_lost(self, place: Place) -> bool:
        """The ledger names it: as a missing sequence, or by the end of its epoch."""
        partition, epoch, sequence = place
        return place in self.lost or sequence > self.ends.get((partition, epoch), sequence)


@dataclass(frozen=True)
class Report:
    """``wrong`` in words; ``counts`` of what was there to be wrong."""

    wrong: list[str]
    counts: Counter[str]

    def __str__(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))


def read_callers(paths: Iterable[Path]) -> dict[str, Asked]:
    """Merchant and id → what was asked and said. A last line without its end was being written when its process was killed."""
    asked: dict[str, Asked] = {}
    for path in paths:
        names: dict[str, str] = {}
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            told = json.loads(line)
            if told["said"] == "asked":
                key = names[told["id"]] = key_of(told["merchant"], told["id"])
                assert key not in asked, f"{key!r} was asked by two callers"
                asked[key] = Asked(key, told["kind"], told["lines"], told["level"], told.get("of"))
                continue
            each = asked[names[told["id"]]]
            each.said.append(told["said"])
            if "error" in told:
                each.errors.append(told["error"])
            if told["said"] == "acked":
                each.at = [(place[0], place[1], place[2]) for place in told["at"]]
    return asked


async def read_books(connection: AsyncConnection, tables: Tables) -> Books:
    """All that the audit needs of the ledger."""
    table = tables.operation.c
    rows: dict[str, list[Row]] = {}
    query = select(
        table.partition, table.epoch, table.seq, table.merchant, table.operation_id, table.kind, table.status, table.receipt,
        table.reference,
    )  # fmt: skip
    for partition, epoch, seq, merchant, operation_id, kind, status, receipt, reference in await connection.execute(query):
        flat = json.loads(receipt)[0]
        lines = {split_key(name)[1]: quantity for name, quantity in zip(flat[::2], flat[1::2], strict=True)}
        row = Row((partition, epoch, seq), key_of(merchant, operation_id), kind, status, lines, reference)
        rows.setdefault(row.key, []).append(row)
    found = await connection.execute(select(tables.stock))
    stock = {key_of(row.merchant, row.sku): {name: int(getattr(row, name)) for name in COUNTERS} for row in found}
    header = tables.reservation.c
    held = {key for (key,) in await connection.execute(select(header.key).where(header.state == "held"))}
    entry = tables.entry.c
    named = await connection.execute(select(entry.partition, entry.epoch, entry.seq).where(entry.epoch > 0, entry.nonce == ""))
    lost = {(partition, epoch, seq) for partition, epoch, seq in named}
    epochs = tables.partition.c
    ended = await connection.execute(select(epochs.partition, epochs.epoch, epochs.applied).where(epochs.state == "closed"))
    ends = {(partition, epoch): applied for partition, epoch, applied in ended}
    pending = 0
    for owed in (tables.void, tables.credit):
        pending += len((await connection.execute(select(owed.c.seq).where(owed.c.state == "pending"))).all())
    return Books(rows, stock, held, lost, ends, pending)


def audit(asked: Mapping[str, Asked], books: Books, loses: Sequence[str] = ()) -> Report:
    """``loses``: the levels whose acknowledged operations may be lost by what was done, as long as the ledger names them."""
    wrong: list[str] = []
    counts: Counter[str] = Counter()
    for each in asked.values():
        wrong += _judge(each, asked, books, loses, counts)
    for key, rows in books.rows.items():
        merchant, operation_id = split_key(key)
        ours = "\x1f" in operation_id or operation_id.startswith("opening")
        if key not in asked and not ours:
            wrong.append(f"{merchant} {operation_id}: {rows[0].kind} at {rows[0].place} is in the ledger and nobody asked for it")
    counts["lost"] = len(books.lost)
    return Report(wrong + list(_sums(books)), counts)


def _judge(each: Asked, asked: Mapping[str, Asked], books: Books, loses: Sequence[str], counts: Counter[str]) -> Iterator[str]:
    name = f"{each.kind} {each.key!r} at {each.level!r}, told {each.said} {each.errors[-1:]}"
    applied = books.applied(each.key)
    counts[f"{each.kind}s asked"] += 1
    counts["killed before an answer"] += not each.said
    counts["outcome unknown"] += "unknown" in each.said
    counts["below its level"] += "weaker" in each.said
    if "raw" in each.said:
        yield f"{name}: an error from outside the SDK's tree"
    if len(applied) > 1:
        yield f"{name}: {len(applied)} times in the ledger: {applied}"
    if applied and applied[0].lines != each.lines:
        yield f"{name}: asked {each.lines}, the ledger moved {applied[0].lines}"
    if applied and each.refused:
        yield f"{name}: refused, and yet in the ledger at {applied[0].place}"
    if each.stands:
        counts[f"{each.kind}s acknowledged"] += 1
    if applied or not (each.stands or "weaker" in each.said):
        return
    may_go = each.kind not in ENTERS and (each.level in loses or (not each.stands and bool(loses)))
    if may_go and all(books.is_lost(place) for place in each.at):
        counts["acknowledged and named lost"] += 1
        return
    if each.of is not None and each.kind == "release" and loses:
        take = asked[key_of(split_key(each.key)[0], each.of)]
        if not books.applied(take.key):
            counts["releases of what was lost"] += 1
            return
    yield f"{name}, position {each.at}: it is not in the ledger ({books.rows.get(each.key)})"


def _sums(books: Books) -> Iterator[str]:
    """supplied = available + reserved + sold + written off, added up anew from the operations."""
    sums: dict[str, Counter[str]] = {field: Counter() for field in books.stock}
    for rows in books.rows.values():
        for row in rows:
            deltas = LEDGER_DELTAS.get(row.kind)  # type: ignore[call-overload]
            if deltas is None or row.status != "applied":
                continue
            merchant = split_key(row.key)[0]
            for sku, quantity in row.lines.items():
                for counter in COUNTERS:
                    sums[key_of(merchant, sku)][counter] += getattr(deltas, counter) * quantity
    for stock_field, counters in books.stock.items():
        added = {counter: sums[stock_field][counter] for counter in COUNTERS}
        if added != counters:
            yield f"stock {stock_field!r} is {counters}, its operations add up to {added}"
        if counters["supplied"] != counters["available"] + counters["reserved"] + counters["sold"] + counters["written_off"]:
            yield f"stock {stock_field!r} does not add up: {counters}"


async def against_redis(inventory: Inventory, partitions: Sequence[Partition], books: Books) -> list[str]:
    """Redis = ledger: counters and holds. Only after everything has settled."""
    wrong: list[str] = []
    for stock_field, counters in books.stock.items():
        merchant, sku = split_key(stock_field)
        level = await inventory.stock.level(sku, merchant=merchant)
        if (level.available, level.reserved) != (counters["available"], counters["reserved"]):
            wrong.append(f"{stock_field!r}: Redis has {level.available}+{level.reserved}, the ledger {counters}")
    held: set[str] = set()
    for partition in partitions:
        client: Any = partition.wire.client
        held |= {key.decode() for key in await client.hkeys(partition.key("reservations"))}
    if held != books.held:
        wrong.append(f"holds only in Redis: {sorted(held - books.held)[:5]}, only in the ledger: {sorted(books.held - held)[:5]}")
    return wrong
