"""The records that scripts keep in Redis, read and written from Python: results and reservations (see lua/batch.lua)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from inventory_sdk.ledger.protocol import OperationRow, ReservationRow
from inventory_sdk.model import Kind, Line, Reservation, fingerprint, split_key
from inventory_sdk.stock.parts import Instance, marked, plain, read_instances

RS: Final = "\x1e"
PIN_OVERDUE_MS: Final = 60_000
"""A pinned hold that nobody ended by then is resolved by whoever finds it, by asking its decider."""
STATES: Final = {"h": "held", "p": "held", "c": "confirmed", "r": "released", "x": "expired"}
_LETTERS: Final = {"held": "h", "confirmed": "c", "released": "r", "expired": "x"}


@dataclass(frozen=True, slots=True)
class Result:
    """What is remembered of an accepted operation. ``lines`` only where the call gave none (full confirms and releases).
    ``parts``: what it decided on in other partitions."""

    fingerprint: str
    epoch: int
    sequence: int
    kept: bool
    remaining: tuple[int, ...]
    order: str
    lines: tuple[Any, ...]
    parts: tuple[Instance, ...] = ()


def read_result(text: str) -> Result:
    """A result record."""
    parts = text.split(RS)
    epoch, _, sequence = parts[1].partition("-")
    numbers, _, marks = parts[3].partition("|")
    remaining = tuple(int(number) for number in numbers.split(",")) if numbers else ()
    flat: list[Any] = list(parts[5:])
    flat[1::2] = [int(float(quantity)) for quantity in flat[1::2]]
    order = parts[4] if len(parts) > 4 else ""
    return Result(parts[0], int(epoch), int(sequence), parts[2] == "k", remaining, order, tuple(flat), read_instances(marks))


def write_result(row: OperationRow) -> str:
    """The record of an applied operation, for a rebuild. One that entered through the ledger only has its id taken."""
    entered = not row.position.epoch and (
        row.kind in (Kind.RESTOCK, Kind.TAKE_BACK) or (row.kind == Kind.ADJUST and row.fingerprint != fingerprint(row.kind, "", row.lines))
    )
    lines, remaining, marks = row.lines, row.remaining, ""
    if row.parts:
        lines, remaining = _all_lines(row)
        marks = "|" + " ".join(f"{part[0]}:{part[1]}" for part in row.parts if part[1])
    text = RS.join(
        (
            "entered" if entered else row.fingerprint,
            f"{row.position.epoch}-{row.position.sequence}",
            "k" if row.kept else "",
            ",".join(map(str, remaining)) + marks,
        )
    )
    lines = lines if row.kind in ("confirm", "release", "reacquire") else ()
    if lines:
        return text + RS + row.order + RS + RS.join(map(str, lines))
    return text + RS + row.order if row.order else text


def write_memory(row: OperationRow) -> tuple[str, ...]:
    """Under which key an applied operation is remembered, and how. A tombstone is remembered as the closed reservation that it is, a
    claim under the id that it took; and besides itself a release of a hold that went with a named loss as that closed reservation: what
    is released under this id is nothing that could be taken again."""
    closed = f"{row.reference}\x1f", tombstone(f"{row.position.epoch}-{row.position.sequence}")
    if row.kind == Kind.TOMBSTONE:
        return closed
    if row.kind == Kind.CLAIM:
        return row.reference, write_result(row)
    if row.kind == Kind.RELEASE and not row.lines and not row.parts:
        return (*closed, row.key, write_result(row))
    return row.key, write_result(row)


def tombstone(position: str) -> str:
    """The record of a reservation that was closed before anything was held under it."""
    return RS.join(("r", position, "", "0", ""))


def _all_lines(row: OperationRow) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Lines at home and elsewhere, marked, and what remained of them, sorted by field as the call had them."""
    rows = [(field, field, *rest) for field, *rest in zip(row.lines[::2], row.lines[1::2], row.remaining, strict=True)]
    for partition, _, flat, left in row.parts:
        fields = [marked(field, partition) for field in flat[::2]]
        rows += zip(flat[::2], fields, flat[1::2], left or [0] * len(fields), strict=True)
    rows.sort()
    return tuple([x for _, field, quantity, _ in rows for x in (field, quantity)]), tuple([each[3] for each in rows])


def read_reservation(key: str, text: str) -> Reservation:
    """A reservation record as the public sees it."""
    parts = text.split(RS)
    merchant, name = split_key(key)
    held: list[Line] = []
    confirmed: list[Line] = []
    released: list[Line] = []
    for field, numbers in zip(parts[5::2], parts[6::2], strict=True):
        original, done, back, expired = ([int(n) for n in numbers.split("/")] + [0, 0, 0])[:4]
        line_merchant, sku = split_key(plain(field)[0])
        for into, quantity in (
            (held, original - done - back - expired),
            (confirmed, done),
            (released, back + expired),
        ):
            if quantity:
                into.append(Line(sku, quantity, line_merchant))
    due = int(parts[3])
    return Reservation(
        reservation=name,
        merchant=merchant,
        state=STATES[parts[0]],
        held=tuple(held),
        confirmed=tuple(confirmed),
        released=tuple(released),
        expires_at=due / 1000 if due and held and parts[0] == "h" else None,
        order=parts[4] or None,
    )


def write_reservation(row: ReservationRow) -> str:
    """The record of a reservation that the ledger has, for a rebuild."""
    state = "p" if row.pinned and row.state == "held" else _LETTERS[row.state]
    parts = [state, f"{row.position.epoch}-{row.position.sequence}", row.fingerprint, str(row.expires_at), row.order]
    lines = [tuple(row.lines[i : i + 5]) for i in range(0, len(row.lines), 5)]
    for i in range(0, len(row.foreign), 6):
        field, partition, *amounts = row.foreign[i : i + 6]
        lines.append((marked(field, partition), *amounts))
    lines.sort(key=lambda line: plain(line[0])[0])
    for field, original, open_, confirmed, _ in lines:
        parts.append(field)
        gone = original - open_ - confirmed
        expired = gone if row.state == "expired" else 0
        back = gone - expired
        parts.append(str(original) if open_ == original else f"{original}/{confirmed}/{back}/{expired}")
    return RS.join(parts)
