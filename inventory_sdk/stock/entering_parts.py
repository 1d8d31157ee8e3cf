"""What enters through the ledger over several partitions: one SQL transaction for all, then one credit per partition."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from inventory_sdk.errors import InvalidOperation, InventoryError, OperationConflict, OutcomeUnknown, StockFrozen
from inventory_sdk.ledger.protocol import Entered, Entering, EpochClosed
from inventory_sdk.model import Position, Receipt, fingerprint, split_key
from inventory_sdk.stock import reading
from inventory_sdk.stock.claims import claim
from inventory_sdk.stock.entering import ENTERED, Committing, Done, credited, journaled
from inventory_sdk.stock.parts import Spread, merged, part_key, sale_in
from inventory_sdk.stock.records import read_result
from inventory_sdk.stock.spanning import bring_up, receipt_of

if TYPE_CHECKING:
    from inventory_sdk.stock.engine import Engine
    from inventory_sdk.stock.partition import Partition


async def before(engine: Engine, kind: str, key: str, flat: list[Any], apart: Spread | None, reference: str) -> Receipt | None:
    """The first receipt of what entered when stock was told apart in another way. Its parts have other names than they would have now,
    so they would not be met. ``OperationConflict``."""
    row = await engine.ledger.operation(key)
    now = {number: lines[::2] for number, lines in apart.parts.items()} if apart is not None else {}
    if row is None or {part[0]: list(part[2][::2]) for part in row.parts} == now:
        return None
    merchant, name = split_key(key)
    if row.fingerprint != fingerprint(kind, reference, ["+", *flat]):
        raise OperationConflict(name)
    lines, left = merged(row.lines, row.remaining, row.parts)
    return receipt_of(name, str(kind), merchant, row.order, lines, left, (row.position,), "database", True)


async def enter(
    engine: Engine,
    kind: str,
    key: str,
    flat: list[Any],
    apart: Spread,
    order: str,
    reference: str,
    extra: dict[str, Any],
    settled: Callable[[Position], Awaitable[None]],
) -> Receipt:
    """Restock, return or a positive adjust of several partitions, all lines or none.

    Home has a row under the call's own id even without lines of its own, so that a repeat and ``status()`` find it.
    ``OutcomeUnknown`` when the commit stands but a credit could not be made now: the worker will.
    """
    merchant, name = split_key(key)
    home = engine.home(key)
    record = (await reading.read(engine, home, operations=[key])).results[0]
    if record is not None and read_result(record).fingerprint != ENTERED:
        raise OperationConflict(name)
    mark = fingerprint(kind, reference, ["+", *flat])
    listed = [[number, "", lines, []] for number, lines in apart.parts.items()]

    def entering(there: str, of: str, lines: list[Any], more: dict[str, Any]) -> Entering:
        text = json.dumps(more, separators=(",", ":")) if more else ""
        return Entering(str(kind), there, mark, tuple(lines), order, of, str(extra.get("reason", "")), text)

    reason = {"reason": extra["reason"]} if "reason" in extra else {}
    # A home without lines of its own gives nothing back there: it names the sale as such.
    of = sale_in(reference, home.number, engine.layout) if apart.own else reference
    operations = {home.number: entering(key, of, apart.own, {**extra, "parts": listed})}
    for number, lines in apart.parts.items():
        operations[number] = entering(part_key(key, number), sale_in(reference, number, engine.layout), lines, reason)
    for number, operation in operations.items():
        if operation.lines:
            await engine.loader.opened(engine.partitions[number], operation.lines[::2])
    entered = await _commit(engine, operations, reference, settled)
    try:
        if engine.layout.apart and not apart.own:
            # No credit of its own takes the id there.
            await claim(engine, key, ENTERED)
    except OperationConflict:
        pass  # a take had the same id at the same time: the ledger, which has ours, finds and voids it
    except InventoryError as error:
        raise OutcomeUnknown(name, f"it is in the ledger, its credits are pending: {error}") from error
    done = await asyncio.gather(
        *[_credit(engine, engine.partitions[number], entered[number], operations[number].lines) for number in operations],
        return_exceptions=True,
    )
    left: dict[str, int] = {}
    for number, each in zip(operations, done, strict=True):
        if isinstance(each, InventoryError):  # whatever kept the credit away, the transaction stands
            raise OutcomeUnknown(name, f"it is in the ledger, a credit is pending: {each}") from each
        if isinstance(each, BaseException):
            raise each
        left.update(zip(operations[number].lines[::2], each.remaining, strict=True))
    positions = tuple(entered[number].position for number in operations)
    remaining = [left[field] for field in flat[::2]]
    return receipt_of(name, str(kind), merchant, order, flat, remaining, positions, "database", entered[home.number].replayed)


async def _commit(
    engine: Engine, operations: dict[int, Entering], reference: str, settled: Callable[[Position], Awaitable[None]]
) -> dict[int, Entered]:
    waited = False
    with Committing(engine, next(iter(operations.values())).key) as committing:
        for _ in range(5):
            group: list[tuple[int, int, Sequence[Entering]]] = []
            for number, operation in operations.items():
                partition = engine.partitions[number]
                await partition.known()
                group.append((number, int(partition.epoch), [operation]))
            try:
                found = await committing.run(partial(engine.ledger.enter_parts, group))
                return {number: each[0] for (number, _, _), each in zip(group, found, strict=True)}
            except EpochClosed:
                for number in operations:
                    engine.partitions[number].forget()
            except InvalidOperation as error:
                # The sale that it gives back may be journaled and not applied yet, or its parts may not have followed.
                if not reference or waited or error.field not in ("of", "lines"):
                    raise
                waited = True
                await bring_up(engine, reference)
                for number in operations:
                    await settled(await journaled(engine.partitions[number]))
        raise StockFrozen("a partition of this call is being recovered", retry_after=0.5)


async def _credit(engine: Engine, partition: Partition, entered: Entered, lines: Sequence[Any]) -> Done:
    engine.loader.arrived(lines[::2])
    if entered.credit is None:
        return Done(entered.position, entered.remaining, entered.replayed)
    return await credited(engine, partition, entered, entered.credit, lines[::2])
