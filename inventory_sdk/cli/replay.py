"""Replay an orders file through the whole path, and hold the result against a recount of the file. No output here."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from inventory_sdk.cli.orders import Act
from inventory_sdk.cli.patience import patiently
from inventory_sdk.cli.recount import Recount
from inventory_sdk.model import Line, Receipt, key_of, split_key
from inventory_sdk.testing.proof import Expected

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

AT_ONCE: Final = 64


@dataclass(slots=True)
class Replayed:
    """``acts`` by kind; ``known`` is how many of them an earlier run had made already; ``seconds`` without the proof."""

    acts: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    known: int = 0
    seconds: float = 0.0


async def replay(inventory: Inventory, acts: Sequence[Act], advance: Callable[[int], None], at_once: int = AT_ONCE) -> Replayed:
    """Make every act, up to ``at_once`` together, started in the file's order. A sale waits for its merchant's opening stock and
    a return for its sale. Safe to run again after a run that was killed: ids are the file's own, so each act counts once."""
    outcome = Replayed()
    made: dict[tuple[str, str], asyncio.Task[Receipt]] = {}
    opening: dict[str, list[asyncio.Task[Receipt]]] = {}
    room = asyncio.Semaphore(at_once)
    began = time.perf_counter()

    async def make(act: Act, after: Sequence[asyncio.Task[Receipt]]) -> Receipt:
        try:
            for earlier in after:
                await asyncio.shield(earlier)
            receipt = await patiently(lambda: call(inventory, act))
        finally:
            room.release()
        outcome.acts[act.kind] += 1
        outcome.lines += len(act.lines)
        outcome.known += receipt.replayed
        advance(sum(outcome.acts.values()))
        return receipt

    async with asyncio.TaskGroup() as group:
        for act in acts:
            await room.acquire()
            after = list(opening.get(act.merchant, ())) if act.order else []
            if act.of is not None:
                after.append(made[act.merchant, act.of])
            task = group.create_task(make(act, after), name=f"{act.kind} {act.operation_id}")
            made[act.merchant, act.operation_id] = task
            if not act.order:
                opening.setdefault(act.merchant, []).append(task)
    outcome.seconds = time.perf_counter() - began
    return outcome


async def call(inventory: Inventory, act: Act) -> Receipt:
    """The one SDK call that an act stands for."""
    stock = inventory.stock
    order = act.order or None
    if act.kind == "deduct":
        return await stock.deduct(act.lines, merchant=act.merchant, operation_id=act.operation_id, order=order)
    if act.kind == "restock":
        return await stock.restock(act.lines, merchant=act.merchant, operation_id=act.operation_id, order=order)
    if act.kind == "adjust":
        lost = [Line(line.sku, -line.quantity) for line in act.lines]
        return await stock.adjust(lost, merchant=act.merchant, operation_id=act.operation_id, order=order, reason="in the orders file")
    assert act.of is not None
    return await stock.take_back(act.lines, of=act.of, merchant=act.merchant, operation_id=act.operation_id, order=order)


def expected(counted: Recount) -> dict[str, Expected]:
    """What the recount says of each SKU. The opening stock is all that the file sells and writes off, so what is available at
    the end is exactly what came back; what came back against a sale is no longer sold."""
    return {
        key_of(merchant, sku): Expected(available=count.returned, reserved=0, written_off=count.written_off)
        for (merchant, sku), count in counted.units.items()
    }


async def missing_or_doubled(inventory: Inventory, acts: Sequence[Act], counted: Recount) -> list[str]:
    """Every invoice of the recount against the operations that the ledger has: each line exactly once. In words; empty when
    all is well."""
    differences: list[str] = []
    moved: dict[tuple[str, str], Counter[str]] = {}
    for act in acts:
        row = await inventory.ledger.operation(key_of(act.merchant, act.operation_id))
        if row is None or row.status != "applied":
            differences.append(f"{act.merchant}: {act.operation_id} is {'not in the ledger' if row is None else row.status}")
            continue
        if act.order:
            units = moved.setdefault((act.merchant, act.order), Counter())
            for name, quantity in zip(row.lines[::2], row.lines[1::2], strict=True):
                units[split_key(name)[1]] += abs(quantity)
    for invoice, counted_units in counted.invoices.items():
        found = dict(moved.get(invoice, {}))
        if found != counted_units:
            differences.append(f"{invoice[0]}: invoice {invoice[1]} moves {counted_units} in the file, {found} in the ledger")
    return differences
