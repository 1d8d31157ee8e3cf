"""Entries that came after their epoch was closed: which of them the ledger knows, and rows for what can't be done any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqlalchemy import select, update

from inventory_sdk.ledger.apply import ENTRY
from inventory_sdk.ledger.decide import OPERATION, REJECTED
from inventory_sdk.ledger.store import Store, clean, dumps
from inventory_sdk.model import JournalEntry, Position, split_key

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


async def nonces(connection: AsyncConnection, store: Store, positions: Sequence[Position]) -> dict[Position, str]:
    """See ``Ledger.nonces``."""
    columns = ("partition", "epoch", "seq", "nonce")
    asked = {tuple(position) for position in positions}
    found = await store.bulk.select(connection, store.tables.entry, columns, ("partition", "epoch", "seq"), asked)
    return {Position(partition, epoch, seq): nonce for partition, epoch, seq, nonce in found}


async def reject(connection: AsyncConnection, store: Store, entry: JournalEntry, refused: Sequence[tuple[int, str]]) -> None:
    """See ``Ledger.reject``; the caller commits. Its own position may be another entry's by now, so the rows get one of the
    ledger's own; the reason tells where they came from."""
    table = store.tables.partition
    mine = [table.c.partition == entry.partition, table.c.epoch == 0]
    seq = int((await connection.execute(select(table.c.applied).where(*mine).with_for_update())).scalar_one()) + 1
    came = f"came after its epoch was closed, as {entry.epoch}-{entry.sequence}"
    values = []
    for index, reason in refused:
        operation = entry.operations[index]
        merchant, operation_id = split_key(operation.key)
        values.append([
            entry.partition, 0, seq, index, merchant, operation_id, None, operation.kind, operation.order or None,
            operation.reference or None, operation.fingerprint, len(operation.lines) // 2,
            dumps([operation.lines, operation.remaining]), REJECTED, False, entry.at_ms, clean(f"{reason}; {came}"),
        ])  # fmt: skip
    await store.bulk.insert(connection, store.tables.entry, ENTRY, [(entry.partition, 0, seq, entry.nonce, entry.at_ms, len(values))])
    await store.bulk.insert(connection, store.tables.operation, OPERATION, values)
    await connection.execute(update(table).where(*mine).values(applied=seq))
