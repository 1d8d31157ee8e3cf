"""Stock enters through the ledger: one SQL transaction, then an idempotent credit raises the Redis counter."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_random_exponential

from inventory_sdk.errors import InvalidOperation, InventoryError, OperationConflict, OutcomeUnknown, StockFrozen, UnknownStock
from inventory_sdk.ledger.protocol import Credit, Entered, Entering, EpochClosed, LedgerUnavailable
from inventory_sdk.metrics.events import Retried
from inventory_sdk.model import OpeningBalance, Position, fingerprint, key_of, split_key
from inventory_sdk.stock import reading
from inventory_sdk.stock.answers import refused
from inventory_sdk.stock.batch import DONE, DONE_LINES, GIVE_UP, REPLAY
from inventory_sdk.stock.engine import Engine
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.records import read_result
from inventory_sdk.stock.upkeep import credit_operation

ENTERED: Final = "entered"
"""What Redis remembers instead of a fingerprint for an id that entered through the ledger."""


@dataclass(frozen=True, slots=True)
class Done:
    """``remaining``: available in Redis right after the credit (in the ledger after the transaction, for a replay)."""

    position: Position
    remaining: Sequence[int]
    replayed: bool


async def enter(
    engine: Engine,
    partition: Partition,
    kind: str,
    key: str,
    flat: list[Any],
    order: str,
    reference: str,
    extra: dict[str, Any],
    settled: Callable[[Position], Awaitable[None]],
) -> Done:
    """Commit, then credit. ``OutcomeUnknown`` when the commit stands but its credit could not be made now: the worker will."""
    record = (await reading.read(engine, partition, operations=[key])).results[0]
    if record is not None and read_result(record).fingerprint != ENTERED:
        raise OperationConflict(split_key(key)[1])
    entering = Entering(
        kind=str(kind),
        key=key,
        fingerprint=fingerprint(kind, reference, ["+", *flat]),
        lines=tuple(flat),
        order=order,
        reference=reference,
        reason=str(extra.get("reason", "")),
        extra=json.dumps(extra, separators=(",", ":")) if extra else "",
    )
    await engine.loader.opened(partition, flat[::2])
    waited = False
    for _ in range(5):
        await partition.known()
        try:
            entered = await _commit(engine, partition, entering)
        except EpochClosed:
            partition.forget()
            continue
        except InvalidOperation as error:
            # The sale it gives back may be journaled and not applied yet.
            if not reference or waited or error.field not in ("of", "lines"):
                raise
            waited = True
            hello = await partition.hello()
            await settled(Position(partition.number, int(partition.epoch), hello.sequence))
            continue
        break
    else:
        raise StockFrozen(f"partition {partition.number} is being recovered", retry_after=0.5)
    engine.loader.arrived(flat[::2])
    if entered.credit is None:
        return Done(entered.position, entered.remaining, entered.replayed)
    try:
        answer = await _credited(engine, partition, entered.credit, flat[::2])
    except InventoryError as error:  # whatever kept the credit away, the transaction stands
        raise OutcomeUnknown(split_key(key)[1], f"it is in the ledger, its credit is pending: {error}") from error
    if answer[0] == REPLAY:
        return Done(entered.position, read_result(answer[1]).remaining, entered.replayed)
    if answer[0] == DONE_LINES:
        return Done(entered.position, answer[1], entered.replayed)
    if answer[0] != DONE:
        raise refused(answer)
    return Done(entered.position, answer[1:], entered.replayed)


async def _commit(engine: Engine, partition: Partition, entering: Entering) -> Entered:
    """The transaction, again where the database could not: its id is known there if the lost one had committed."""

    def count(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        engine.metrics.record(Retried("enter", getattr(error, "reason", "")))

    again = AsyncRetrying(
        retry=retry_if_exception_type(LedgerUnavailable),
        wait=wait_random_exponential(0.05, 1.0),
        stop=stop_after_delay(GIVE_UP),
        before_sleep=count,
        reraise=True,
    )
    try:
        entered: list[Entered] = await again(engine.ledger.enter, partition.number, int(partition.epoch), [entering], engine.writes_stock)
    except LedgerUnavailable as error:
        raise OutcomeUnknown(split_key(entering.key)[1], str(error)) from error
    return entered[0]


async def _credited(engine: Engine, partition: Partition, credit: Credit, fields: Sequence[str]) -> list[Any]:
    try:
        return (await engine.send(partition, credit_operation(credit)))[0]
    except UnknownStock:
        # A load that was under way looked before our transaction had committed; the next one finds the rows.
        engine.loader.arrived(fields)
        return (await engine.send(partition, credit_operation(credit)))[0]


ReadsStock = Callable[[str, Sequence[str]], Awaitable[Sequence[OpeningBalance]]]


async def open_balances(engine: Engine, partition: Partition, fields: Sequence[str], read: ReadsStock) -> None:
    """Opening balances of the service for SKUs that the ledger does not have yet, one operation per SKU.

    No credit: the field is not in Redis, and the load that follows brings the whole balance."""
    by_merchant: dict[str, list[str]] = {}
    for field in fields:
        merchant, sku = split_key(field)
        by_merchant.setdefault(merchant, []).append(sku)
    operations: list[Entering] = []
    for merchant, skus in by_merchant.items():
        asked = set(skus)
        for balance in await read(merchant, skus):
            if balance.sku not in asked:
                raise InvalidOperation("sku", balance.sku, "reads_stock answered a SKU that was not asked for")
            field = key_of(merchant, balance.sku)
            held = tuple((field, name, quantity) for name, quantity in balance.reservations)
            operations.append(
                Entering(
                    kind="open",
                    key=key_of(merchant, f"\x1fopen\x1f{balance.sku}"),
                    fingerprint="open",
                    lines=(field, balance.available),
                    reservations=held,
                )
            )
    if not operations:
        return
    await partition.known()
    try:
        await engine.ledger.enter(partition.number, int(partition.epoch), operations)
    except EpochClosed as error:
        partition.forget()
        raise StockFrozen(str(error), retry_after=0.5) from error
