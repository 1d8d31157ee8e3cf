"""Data as the SDK would hand it to your functions, for unit tests without any inventory: receipts, movements, levels."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Final

from inventory_sdk.model import LEDGER_DELTAS, Kind, Movement, Position, Receipt, ReceiptLine, StockLevel

MERCHANT: Final = "default"

_numbers = itertools.count(1)


def unique(prefix: str = "op") -> str:
    """A name that this process has not made before: an operation id, an order."""
    return f"{prefix}-{next(_numbers)}"


def receipt(
    lines: Mapping[str, int],
    *,
    kind: str = Kind.RESERVE,
    operation_id: str | None = None,
    merchant: str = MERCHANT,
    order: str | None = None,
    remaining: int = 0,
    replayed: bool = False,
) -> Receipt:
    """What a stock call answers for ``{sku: quantity}``; each line had ``remaining`` left."""
    name = unique() if operation_id is None else operation_id
    answered = tuple(ReceiptLine(merchant, sku, quantity, remaining) for sku, quantity in sorted(lines.items()))
    return Receipt(name, kind, merchant, order, answered, (Position(0, 1, next(_numbers)),), "redis", replayed)


def movement(
    sku: str,
    quantity: int,
    *,
    kind: str = Kind.DEDUCT,
    merchant: str = MERCHANT,
    operation_id: str | None = None,
    order: str | None = None,
    reservation: str | None = None,
    reason: str | None = None,
) -> Movement:
    """What ``writes_stock`` gets for one line of ``kind``; its deltas are those that the ledger makes of it."""
    per_unit = LEDGER_DELTAS[kind]
    return Movement(
        merchant=merchant,
        sku=sku,
        kind=kind,
        quantity=quantity,
        available=per_unit.available * quantity,
        reserved=per_unit.reserved * quantity,
        sold=per_unit.sold * quantity,
        operation_id=unique() if operation_id is None else operation_id,
        order=order,
        reservation=reservation,
        position=Position(0, 1, next(_numbers)),
        index=0,
        reason=reason,
    )


def level(available: int, reserved: int = 0) -> StockLevel:
    """What ``stock.level`` answers."""
    return StockLevel(available, reserved, 1, next(_numbers))
