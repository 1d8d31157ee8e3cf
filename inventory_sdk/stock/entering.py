"""Stock enters through the ledger: one SQL transaction, then an idempotent credit raises the Redis counter."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_random_exponential

from inventory_sdk.errors import InvalidOperation, InventoryError, OperationConflict, OutcomeUnknown, StockFrozen, UnknownStock
from inventory_sdk.ledger.protocol import Credit, Entered, Entering, EpochClosed, LedgerUnavailable, StockArriving, WritesStock
from inventory_sdk.metrics.events import Retried
from inventory_sdk.model import OpeningBalance, Position, fingerprint, key_of, split_key
from inventory_sdk.stock import reading
from inventory_sdk.stock.answers import refused
from inventory_sdk.stock.batch import DONE, DONE_LINES, GIVE_UP, OVER, REPLAY
from inventory_sdk.stock.engine import Engine
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.parts import call_of, sale_in
from inventory_sdk.stock.records import read_result
from inventory_sdk.stock.spanning import bring_up
from inventory_sdk.stock.upkeep import credit_operation
from inventory_sdk.stock.wire import NotExecuted, ReplyLost

T = TypeVar("T")

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
    entering = Entering(
        kind=str(kind),
        key=key,
        fingerprint=fingerprint(kind, reference, ["+", *flat]),
        lines=tuple(flat),
        order=order,
        reference=sale_in(reference, partition.number, engine.layout),
        reason=str(extra.get("reason", "")),
        extra=json.dumps(extra, separators=(",", ":")) if extra else "",
    )
    await engine.loader.opened(partition, flat[::2])
    if engine.direct.busy and engine.direct.expects_any(flat[::2], split_key(key)[0]):
        ours = await _directly(engine, partition, entering)
        if ours is not None:
            return Done(ours.position, ours.remaining, ours.replayed)
    record = (await reading.read(engine, partition, operations=[key])).results[0]
    if record is not None and read_result(record).fingerprint != ENTERED:
        raise OperationConflict(split_key(key)[1])
    entered = await _entered(engine, partition, entering, settled)
    engine.loader.arrived(flat[::2])
    if entered.credit is None:
        if not entered.replayed:
            engine.direct.note(flat[::2], split_key(key)[0], True)
        return Done(entered.position, entered.remaining, entered.replayed)
    try:
        return await credited(engine, partition, entered, entered.credit, flat[::2])
    except InventoryError as error:  # whatever kept the credit away, the transaction stands
        raise OutcomeUnknown(split_key(key)[1], f"it is in the ledger, its credit is pending: {error}") from error


async def _entered(engine: Engine, partition: Partition, entering: Entering, settled: Callable[[Position], Awaitable[None]]) -> Entered:
    waited = False
    with Committing(engine, entering.key) as committing:
        for _ in range(5):
            await partition.known()
            try:
                (entered,) = await committing.run(partial(engine.ledger.enter, partition.number, int(partition.epoch), [entering]))
                return entered
            except EpochClosed:
                partition.forget()
            except InvalidOperation as error:
                # The sale it gives back may be journaled and not applied yet, or its parts may not have followed.
                if not entering.reference or waited or error.field not in ("of", "lines"):
                    raise
                waited = True
                await bring_up(engine, call_of(entering.reference) or entering.reference)
                await settled(await journaled(partition))
        raise StockFrozen(f"partition {partition.number} is being recovered", retry_after=0.5)


async def journaled(partition: Partition) -> Position:
    """Where its journal stands; ``StockFrozen`` while it is not open."""
    try:
        hello = await partition.hello()
    except ReplyLost as error:
        raise NotExecuted(str(error)) from error
    if hello.epoch is None or not partition.epoch:
        raise partition.frozen(hello.state or "empty")
    return Position(partition.number, hello.epoch, hello.sequence)


async def credited(engine: Engine, partition: Partition, entered: Entered, credit: Credit, fields: Sequence[str]) -> Done:
    """The credit of what has entered, made once."""
    answer = await _credited(engine, partition, credit, fields)
    if len(credit.lines) < 2 * len(fields) and answer[0] in (DONE, DONE_LINES, REPLAY):
        # Some of it is the ledger's to sell: what remains there it says itself.
        return Done(entered.position, entered.remaining, entered.replayed)
    if answer[0] == OVER:
        # Redis was rebuilt since, from rows that include it.
        return Done(entered.position, entered.remaining, entered.replayed)
    if answer[0] == REPLAY:
        return Done(entered.position, read_result(answer[1]).remaining, entered.replayed)
    if answer[0] == DONE_LINES:
        return Done(entered.position, answer[1], entered.replayed)
    if answer[0] != DONE:
        raise refused(answer)
    return Done(entered.position, answer[1:], entered.replayed)


class Committing:
    """The transactions of one call: tried again where the database could not. Once the reply to one was lost it may stand, and from
    then on no failure says that nothing moved: ``OutcomeUnknown``. What the ledger itself refuses it has judged with that in view."""

    def __init__(self, engine: Engine, key: str) -> None:
        self._engine = engine
        self._name = split_key(key)[1]
        self._lost = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        judged = isinstance(error, OperationConflict | InvalidOperation | OutcomeUnknown)
        if self._lost and isinstance(error, InventoryError) and not judged:
            raise OutcomeUnknown(self._name, str(error)) from error

    async def run(self, transaction: Callable[[Sequence[WritesStock]], Awaitable[T]]) -> T:
        """What the transaction answers; ``StockFrozen`` while its stock is on its way to Redis."""
        again = AsyncRetrying(
            retry=retry_if_exception_type(LedgerUnavailable),
            wait=wait_random_exponential(0.05, 1.0),
            stop=stop_after_delay(GIVE_UP),
            before_sleep=self._count,
            reraise=True,
        )
        try:
            return await again(transaction, self._engine.writes_stock)
        except LedgerUnavailable:
            self._lost = True
            raise
        except StockArriving as error:
            raise StockFrozen(str(error), retry_after=0.1) from error

    def _count(self, state: RetryCallState) -> None:
        self._lost = True
        error = state.outcome.exception() if state.outcome is not None else None
        self._engine.metrics.record(Retried("enter", getattr(error, "reason", "")))


async def _directly(engine: Engine, partition: Partition, entering: Entering) -> Entered | None:
    """Without Redis, for stock that the ledger sells; None when Redis sells any of it."""
    fields, merchant = entering.lines[::2], split_key(entering.key)[0]
    try:
        with Committing(engine, entering.key) as committing:
            (entered,) = await committing.run(partial(engine.ledger.enter, partition.number, 0, [entering]))
    except EpochClosed:
        engine.direct.note(fields, merchant, False)
        return None
    engine.loader.arrived(fields)
    engine.direct.note(fields, merchant, True)
    return entered


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
            if balance.reservations and engine.layout.apart:
                why = f"can't be handed over with partition_by='sku' (sku {balance.sku!r}): its homes are other partitions"
                raise InvalidOperation("reservations", [name for name, _ in balance.reservations], why)
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
    if engine.direct.busy:
        try:
            await engine.ledger.enter(partition.number, 0, operations)
            return
        except EpochClosed:
            engine.direct.note((), split_key(fields[0])[0], False)
    await partition.known()
    try:
        await engine.ledger.enter(partition.number, int(partition.epoch), operations)
    except EpochClosed as error:
        partition.forget()
        raise StockFrozen(str(error), retry_after=0.5) from error
