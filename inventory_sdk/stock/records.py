"""The records that scripts keep in Redis, read and written from Python: results and reservations (see lua/batch.lua)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from inventory_sdk.ledger.protocol import OperationRow, ReservationRow
from inventory_sdk.model import Kind, Line, Reservation, fingerprint, split_key

RS: Final = "\x1e"
PIN_OVERDUE_MS: Final = 60_000
"""A pinned hold that nobody ended by then is resolved by whoever finds it, by asking its decider."""
STATES: Final = {"h": "held", "p": "held", "c": "confirmed", "r": "released", "x": "expired"}
_LETTERS: Final = {"held": "h", "confirmed": "c", "released": "r", "expired": "x"}


@dataclass(frozen=True, slots=True)
class Result:
    """What is remembered of an accepted operation. ``lines`` only where the call gave none (full confirms and releases)."""

    fingerprint: str
    epoch: int
    sequence: int
    kept: bool
    remaining: tuple[int, ...]
    order: str
    lines: tuple[Any, ...]


def read_result(text: str) -> Result:
    """A result record."""
    parts = text.split(RS)
    epoch, _, sequence = parts[1].partition("-")
    remaining = tuple(int(number) for number in parts[3].split(",")) if parts[3] else ()
    flat: list[Any] = list(parts[5:])
    flat[1::2] = [int(float(quantity)) for quantity in flat[1::2]]
    return Result(parts[0], int(epoch), int(sequence), parts[2] == "k", remaining, parts[4] if len(parts) > 4 else "", tuple(flat))


def write_result(row: OperationRow) -> str:
    """The record of an applied operation, for a rebuild. One that entered through the ledger only has its id taken."""
    entered = not row.position.epoch and (
        row.kind in (Kind.RESTOCK, Kind.TAKE_BACK) or (row.kind == Kind.ADJUST and row.fingerprint != fingerprint(row.kind, "", row.lines))
    )
    text = RS.join(
        (
            "entered" if entered else row.fingerprint,
            f"{row.position.epoch}-{row.position.sequence}",
            "k" if row.kept else "",
            ",".join(map(str, row.remaining)),
        )
    )
    lines = row.lines if row.kind in ("confirm", "release", "reacquire") else ()
    if lines:
        return text + RS + row.order + RS + RS.join(map(str, lines))
    return text + RS + row.order if row.order else text


def read_reservation(key: str, text: str) -> Reservation:
    """A reservation record as the public sees it."""
    parts = text.split(RS)
    merchant, name = split_key(key)
    held: list[Line] = []
    confirmed: list[Line] = []
    released: list[Line] = []
    for field, numbers in zip(parts[5::2], parts[6::2], strict=True):
        original, done, back, expired = ([int(n) for n in numbers.split("/")] + [0, 0, 0])[:4]
        line_merchant, sku = split_key(field)
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
    for i in range(0, len(row.lines), 5):
        field, original, open_, confirmed, _ = row.lines[i : i + 5]
        parts.append(field)
        gone = original - open_ - confirmed
        expired = gone if row.state == "expired" else 0
        back = gone - expired
        parts.append(str(original) if open_ == original else f"{original}/{confirmed}/{back}/{expired}")
    return RS.join(parts)
