"""Entries that came after their epoch was closed: dropped where the ledger has them, else sent once more into the open epoch."""

from __future__ import annotations

import json
from collections.abc import Sequence

from inventory_sdk.model import JournalEntry, JournalOperation, Kind, Position, split_key
from inventory_sdk.sync.parts import Parts, log


async def settle_late(parts: Parts, epoch: int, entries: Sequence[JournalEntry]) -> None:
    """Each operation under its id through ``epoch``'s ordinary script, in the order of their entries; a refusal is a rejected row
    and ``on("rejected")``. Afterwards their messages may go. An error leaves it to be done again, which does nothing twice
    (a refusal may be told twice). ``StockFrozen``, ``Overloaded`` for what passes."""
    if not entries:
        return
    positions = [Position(entry.partition, entry.epoch, entry.sequence) for entry in entries]
    nonces = await parts.ledger.nonces(positions)
    strange = {
        (position, entry.nonce): entry for position, entry in zip(positions, entries, strict=True) if nonces.get(position) != entry.nonce
    }
    undone = _undone(list(strange.values()))
    for (position, _), entry in sorted(strange.items(), key=lambda item: item[0]):
        refused: list[tuple[int, str]] = []
        for index, operation in enumerate(entry.operations):
            if (operation.key, entry.epoch, entry.sequence) in undone or (operation.kind == Kind.UNDO and _undoes(operation) in undone):
                continue
            why = await parts.stock_side.resubmit(entry.partition, epoch, operation, entry.at_ms)
            if why:
                refused.append((index, why))
        log.warning("entry %s came after its epoch was closed; sent again in epoch %d, %d refused", position, epoch, len(refused))
        parts.happened("late_entry", partition=entry.partition)
        parts.tell("late_entry", {"position": position, "epoch": epoch, "operations": len(entry.operations), "refused": len(refused)})
        if refused:
            await parts.ledger.reject(entry, refused)
        for index, why in refused:
            operation = entry.operations[index]
            merchant, operation_id = split_key(operation.key)
            parts.happened("rejected", partition=entry.partition, kind=operation.kind, reason=why)
            facts = {"merchant": merchant, "operation_id": operation_id, "kind": operation.kind, "reason": why}
            parts.tell("rejected", {**facts, "lines": tuple(operation.lines), "position": position})


def _undoes(operation: JournalOperation) -> tuple[str, int, int]:
    """(key, epoch, sequence) of the take that an undo means."""
    epoch, sequence = json.loads(operation.extra)["position"].split("-")
    return operation.reference, int(epoch), int(sequence)


def _undone(entries: Sequence[JournalEntry]) -> set[tuple[str, int, int]]:
    """Takes whose undo is late as well: neither is needed."""
    here = {(operation.key, entry.epoch, entry.sequence) for entry in entries for operation in entry.operations}
    undos = {_undoes(operation) for entry in entries for operation in entry.operations if operation.kind == Kind.UNDO}
    return undos & here
