"""The script's answers as the public sees them: receipts and errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from inventory_sdk.errors import (
    InsufficientStock,
    InvalidOperation,
    InventoryError,
    JournalFull,
    OperationConflict,
    ReservationClosed,
    ReservationExpired,
    StockFrozen,
)
from inventory_sdk.model import Kind, Position, Receipt, ReceiptLine, Shortage, new_receipt, split_key
from inventory_sdk.stock.batch import CLOSED, CONFLICT, FROZEN, JOURNAL_FULL, NOT_OPEN, SHORT
from inventory_sdk.stock.parts import plain

_STATES: Final = {"h": "held", "p": "held", "c": "confirmed", "r": "released", "x": "expired"}


def receipt(
    name: str,
    kind: str,
    merchant: str,
    order: str | None,
    flat: Sequence[Any],
    remaining: Sequence[int],
    position: Position,
    level: str,
    replayed: bool,
    sign: int = 1,
) -> Receipt:
    """``flat`` is [field, quantity, …] with positive quantities; ``sign`` -1 shows them negative (a write-off)."""
    if len(flat) == 2:
        line_merchant, _, sku = flat[0].partition("\x1f")
        line = tuple.__new__(ReceiptLine, (line_merchant, sku, flat[1] * sign, remaining[0]))
        return new_receipt(name, kind, merchant, order, (line,), position, level, replayed)
    lines = tuple(
        [
            ReceiptLine(*split_key(field), quantity * sign, left)
            for field, quantity, left in zip(flat[::2], flat[1::2], remaining, strict=True)
        ]
    )
    return new_receipt(name, kind, merchant, order, lines, position, level, replayed)


def refused(answer: list[Any]) -> InventoryError:
    """An answer that should not come for this kind of operation: a defect, said loudly."""
    return InventoryError(f"unexpected answer from the batch script: {answer}")


def public_kind(kind: str) -> str:
    """The kind a user knows it by."""
    return Kind.CONFIRM if kind == Kind.REACQUIRE else kind


def closed(reservation: str, state: str) -> ReservationClosed:
    """``state`` as a letter or a word."""
    return ReservationExpired(reservation) if state in ("x", "expired") else ReservationClosed(reservation, _STATES.get(state, state))


def error(answer: list[Any], name: str, reservation: str) -> Exception:
    """The public error behind a refusal of the batch script."""
    code = answer[0]
    if code == SHORT:
        shortages = []
        for field, asked, there in zip(answer[1::3], answer[2::3], answer[3::3], strict=True):
            shortages.append(Shortage(*split_key(field), int(asked), int(there)))
        return InsufficientStock(shortages)
    if code == CONFLICT:
        return OperationConflict(name)
    if code == CLOSED:
        return closed(reservation, answer[1])
    if code == JOURNAL_FULL:
        return JournalFull("the journal is at its cap: the ledger is behind", retry_after=1.0)
    if code == FROZEN:
        merchant, sku = split_key(answer[1])
        return StockFrozen(f"sku {sku!r} of merchant {merchant!r} is frozen until stock.reopen() has compared it", retry_after=30.0)
    if code == NOT_OPEN:
        merchant, sku = split_key(plain(answer[1])[0])
        return InvalidOperation("quantity", int(answer[2]), f"reservation {reservation!r} has {int(answer[3])} of sku {sku!r} open")
    return refused(answer)
