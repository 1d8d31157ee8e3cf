"""Questions to Redis, and to the ledger where Redis has forgotten."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import RedisClusterException, RedisError

from inventory_sdk.errors import InvalidOperation, InventoryError, QuantityMismatch, StockFrozen, UnknownStock
from inventory_sdk.model import SEPARATOR, Kind, Position, Reservation, StockLevel, fingerprint, key_of, split_key
from inventory_sdk.stock import handover
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.records import read_reservation, read_result, write_reservation
from inventory_sdk.stock.wire import NotExecuted, ReplyLost

if TYPE_CHECKING:
    from inventory_sdk.stock.engine import Engine


SCANNED: Final = 500


@dataclass(frozen=True, slots=True)
class Reading:
    """One consistent reading; lists run along what was asked, None where there is nothing."""

    epoch: int
    sequence: int
    available: list[int | None]
    reserved: list[int | None]
    frozen: list[bool]
    leaving: list[bool]
    results: list[str | None]
    reservations: list[str | None]


@dataclass(frozen=True, slots=True)
class FrozenStock:
    """A SKU that sells nothing until ``stock.reopen`` has compared it. ``by``: where the journal has what took the refused operation
    back out of Redis."""

    merchant: str
    sku: str
    by: Position


async def read(
    engine: Engine,
    partition: Partition,
    fields: Sequence[str] = (),
    operations: Sequence[str] = (),
    reservations: Sequence[str] = (),
) -> Reading:
    """Ask Redis in one script; ``StockFrozen`` while the partition is not open, ``Overloaded`` while Redis does not answer."""
    keys = [partition.key(name) for name in ("meta", "available", "reserved", "frozen", "results:0", "results:1", "reservations")]
    asked = json.dumps([list(fields), list(operations), list(reservations)])
    try:
        epoch, sequence, state, answer = await partition.wire.run("read", keys, [asked])
    except ReplyLost as error:
        raise NotExecuted(str(error)) from error
    if not epoch or state != b"open":
        raise partition.frozen(state.decode() or "empty")
    available, reserved, frozen, results, holds = json.loads(answer)

    def numbers(values: Any) -> list[int | None]:
        return [int(value) if value else None for value in values or []]

    def texts(values: Any) -> list[str | None]:
        return [value or None for value in values or []]

    return Reading(
        int(epoch),
        int(sequence),
        numbers(available),
        numbers(reserved),
        [bool(value) for value in frozen or []],
        [str(value or "").startswith("w") for value in frozen or []],
        texts(results),
        texts(holds),
    )


async def levels(engine: Engine, merchant: str, skus: Sequence[str]) -> dict[str, StockLevel]:
    """Levels of several SKUs, loaded first where Redis does not have them; of those that the ledger sells, from there. One reading of
    each partition."""
    there: dict[int, list[str]] = {}
    for sku in skus:
        there.setdefault(engine.layout.of(key_of(merchant, sku)), []).append(sku)
    readings = await asyncio.gather(*[_levels(engine, engine.partitions[number], merchant, mine) for number, mine in there.items()])
    found = {sku: level for each in readings for sku, level in each.items()}
    return {sku: found[sku] for sku in skus}


async def _levels(engine: Engine, partition: Partition, merchant: str, skus: Sequence[str]) -> dict[str, StockLevel]:
    fields = [key_of(merchant, sku) for sku in skus]
    if engine.direct.busy and engine.direct.expects_any(fields, merchant) and (ours := await _direct_levels(engine, fields, merchant)):
        return ours
    absent = fields
    for _ in range(5):
        found = await read(engine, partition, fields)
        absent = [field for field, value in zip(fields, found.available, strict=True) if value is None]
        left = [field for field, leaving in zip(fields, found.leaving, strict=True) if leaving]
        there = await engine.ledger.places(left) if left else {}
        if not absent and "database" not in there.values():
            return {
                sku: StockLevel(available or 0, reserved or 0, found.epoch, found.sequence)
                for sku, available, reserved in zip(skus, found.available, found.reserved, strict=True)
            }
        direct = await engine.loader.load(partition, absent) if absent else []
        direct += [field for field, place in there.items() if place == "database"]
        if direct:
            engine.direct.note(direct, merchant, True)
            if ours := await _direct_levels(engine, fields, merchant):
                return ours
            if not engine.direct.auto:
                raise InvalidOperation("skus", skus, "some are sold by the database and others by Redis: ask for them one by one")
            return await _both(engine, partition, merchant, fields)
    raise UnknownStock(merchant, split_key(absent[0])[1])


async def _both(engine: Engine, partition: Partition, merchant: str, fields: Sequence[str]) -> dict[str, StockLevel]:
    """SKU by SKU some are here and some are there: two readings."""
    places = await engine.ledger.places(fields)
    answer: dict[str, StockLevel] = {}
    for where in ("database", "redis"):
        mine = [field for field in fields if (places.get(field, "redis") == "database") is (where == "database")]
        engine.direct.note(mine, None, where == "database")
        if mine:
            answer |= await _levels(engine, partition, merchant, [split_key(field)[1] for field in mine])
    return answer


async def _direct_levels(engine: Engine, fields: Sequence[str], merchant: str) -> dict[str, StockLevel] | None:
    """From the ledger, which sells all of these; None if it does not. Epoch 0 is its own."""
    if set((await engine.ledger.places(fields)).values()) != {"database"}:
        return None
    found = {row.sku: StockLevel(row.available, row.reserved, 0, row.version) for row in await engine.ledger.stock(fields)}
    for field in fields:
        if split_key(field)[1] not in found:
            raise UnknownStock(merchant, split_key(field)[1])
    return found


async def reservation(engine: Engine, key: str) -> Reservation | None:
    """A hold as Redis has it; as the ledger has it where that runs it, or Redis has forgotten it."""
    partition = engine.home(key)
    direct = engine.direct
    if direct.busy and direct.expects_any((), split_key(key)[0]):
        row = await engine.ledger.reservation(key)
        if row is not None and await direct.sells(row.lines[::5], split_key(key)[0]):
            return read_reservation(key, write_reservation(row))
    record = (await read(engine, partition, reservations=[key])).reservations[0]
    if record is not None:
        return read_reservation(key, record)
    row = await engine.ledger.reservation(key)
    return read_reservation(key, write_reservation(row)) if row is not None else None


async def status(
    engine: Engine, key: str, at: str = ""
) -> tuple[str, Position, str | None, Sequence[Any], Sequence[int], Sequence[Any]] | None:
    """(kind, position, order, flat lines, remaining, parts in other partitions) of an operation, wherever it is still known; a
    write-off's quantities are negative. ``at``: the reservation that it closes, where its id is only claimed at home."""
    partition = engine.home(at or key)
    direct = engine.direct.busy and engine.direct.expects_any((), split_key(key)[0])
    record = None if direct else (await read(engine, partition, operations=[key])).results[0]
    if record is not None:
        result = read_result(record)
        if SEPARATOR in result.order and not at:
            return await status(engine, key, result.order)  # a claim: what it closes says where it was done
        found = await engine.journaled(partition, key, result.epoch, result.sequence) if result.epoch else None
        if found is not None and found.kind != Kind.CREDIT:
            position = Position(partition.number, result.epoch, result.sequence)
            parts = json.loads(found.extra).get("parts", ()) if '"parts":' in found.extra else ()
            flat = found.lines if parts else _signed(found.kind, found.fingerprint, found.lines)
            return found.kind, position, found.order or None, flat, found.remaining, parts
    row = await engine.ledger.operation(key)
    if row is None:
        return None
    flat = row.lines if row.parts else _signed(row.kind, row.fingerprint, row.lines)
    return row.kind, row.position, row.order or None, flat, row.remaining, row.parts


def _signed(kind: str, mark: str, flat: Sequence[Any]) -> Sequence[Any]:
    if kind != Kind.ADJUST or mark != fingerprint(Kind.ADJUST, "", flat):
        return flat
    return [-part if at % 2 else part for at, part in enumerate(flat)]


async def reopen(engine: Engine, partition: Partition, field: str, settled: Callable[[Position], Awaitable[None]]) -> None:
    """Compare one frozen SKU (nothing takes from it meanwhile) and unfreeze it; ``QuantityMismatch`` says by how much they differ."""
    merchant, sku = split_key(field)
    for _ in range(20):
        before = await read(engine, partition, [field])
        if before.available[0] is None:
            raise UnknownStock(merchant, sku)
        await settled(Position(partition.number, before.epoch, before.sequence))
        for void in await engine.ledger.pending_voids(partition.number, before.epoch):
            await engine.upkeep.void(partition.number, before.epoch, void)
        rows = await engine.ledger.stock([field])
        after = await read(engine, partition, [field])
        if (after.available, after.reserved) != (before.available, before.reserved) or not rows:
            await asyncio.sleep(0.02)
            continue
        (row,) = rows
        found = (after.available[0] or 0, after.reserved[0] or 0)
        if found != (row.available, row.reserved):
            raise QuantityMismatch(
                [
                    (f"available of {sku!r} in Redis", row.available, found[0]),
                    (f"reserved of {sku!r} in Redis", row.reserved, found[1]),
                ]
            )
        status, _ = await handover.run_step(partition, str(after.epoch), "reopen", [field], [])
        if status > 0:
            return
        raise StockFrozen(f"sku {sku!r} of merchant {merchant!r} is changing hands, or its partition is", retry_after=0.5)
    raise InventoryError(f"sku {sku!r} of merchant {merchant!r} moves too much to be compared now; try again")


async def frozen(engine: Engine, limit: int) -> list[FrozenStock]:
    """SKUs that a refusal of the ledger froze, at most ``limit``, sorted; ``Overloaded`` while Redis does not answer."""
    found: list[FrozenStock] = []
    for partition in engine.partitions:
        cursor = 0
        while len(found) < limit:
            try:
                cursor, marks = await partition.wire.client.hscan(partition.key("frozen"), cursor, count=SCANNED)
            except (RedisError, RedisClusterException, OSError) as error:
                raise NotExecuted(f"frozen SKUs can't be read: {error}") from error
            for field, mark in marks.items():
                # A SKU that changes hands has "w<fence>" here, and behind that what stood there.
                epoch, dash, sequence = mark.decode().rpartition(" ")[2].partition("-")
                if dash:
                    found.append(FrozenStock(*split_key(field.decode()), Position(partition.number, int(epoch), int(sequence))))
            if not cursor:
                break
    return sorted(found, key=lambda each: (each.merchant, each.sku))[:limit]
