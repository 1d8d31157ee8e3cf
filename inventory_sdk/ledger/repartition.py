"""Stock is told apart in another way: the ledger's half of ``inventory-sdk repartition``.

One transaction moves stock rows and live reservations to the partitions of the new layout. A reservation that spans is written as
home and parts of the new layout would have it; its parts bear the position ``0-<generation>``. What was done before stays where it is
in the books. ``memory`` says which of it a partition remembers: what is at home there now.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, func, insert, select, update

from inventory_sdk.errors import InventoryError
from inventory_sdk.ledger import rows
from inventory_sdk.ledger.decide import CONFIRMED, HELD, RELEASED, Hold
from inventory_sdk.ledger.protocol import NEVER, REPARTITIONED, OperationRow
from inventory_sdk.ledger.rows import of_call
from inventory_sdk.ledger.store import CLOSED, PENDING, REDIS, Store, dumps
from inventory_sdk.model import PART, Kind, Layout, Position, fingerprint, key_of, split_key

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

CHUNK: Final = 500
_CLOSING: Final = frozenset({Kind.CONFIRM, Kind.RELEASE, Kind.REACQUIRE})
SETTINGS: Final = ("partitions", "partition_by")
BEFORE: Final = "partitions_before"
"""Setting: how many there were, until what is left of them is removed."""
UNFINISHED: Final = "unfinished"
"""Behind a setting's value while a change is under way: no process has that value, so none starts."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What a layout began with. ``epoch``: the last one of the layout before; 0: it is the first. ``before``: how many partitions that
    had, while something of it is still to be removed. ``begun``: a change of this layout has begun, and moved nothing yet."""

    layout: Layout
    generation: int = 0
    epoch: int = 0
    before: int = 0
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    """What goes to another partition."""

    skus: int
    reservations: int


class NotReady(InventoryError):
    """Something of the old layout has not ended; nothing was moved."""


async def current(connection: AsyncConnection, store: Store) -> Moved | None:
    """The layout that the ledger has; None before the first start."""
    table = store.tables.setting
    rows_of = await connection.execute(select(table.c.name, table.c.value))
    found: dict[str, str] = {row[0]: str(row[1]) for row in rows_of}
    if not found.keys() >= set(SETTINGS):
        return None
    generation, epoch, _ = map(int, found.get(REPARTITIONED, NEVER).split())
    partitions, _, begun = found["partitions"].partition(" ")
    layout = Layout(int(partitions), found["partition_by"].partition(" ")[0])
    return Moved(layout, generation, epoch, int(found.get(BEFORE) or 0), bool(begun))


async def settle(connection: AsyncConnection, store: Store, values: dict[str, str]) -> None:
    """Write these settings."""
    table = store.tables.setting
    for name, value in values.items():
        await store.insert_if_absent(connection, table, {"name": name, "value": value})
        await connection.execute(update(table).where(table.c.name == name).values(value=value))


async def unready(connection: AsyncConnection, store: Store) -> list[str]:
    """What of the old layout has not ended yet, in words that say what to do."""
    tables, found = store.tables, []
    for table, what in ((tables.credit, "credits"), (tables.void, "voids")):
        pending = select(func.count()).select_from(table).where(table.c.state == PENDING)
        if count := (await connection.execute(pending)).scalar_one():
            found.append(f"{count} {what} are pending: let the workers make them")
    stock = tables.stock
    away = select(func.count()).select_from(stock).where(stock.c.admission != REDIS)
    if count := (await connection.execute(away)).scalar_one():
        found.append(f"{count} SKUs are sold by the database, or are about to be: stock.adopt() them")
    held = tables.reservation
    pinned = select(held.c.key).where(held.c.state == HELD, held.c.pinned.is_(True))
    keys = list((await connection.execute(pinned)).scalars())
    waiting = [split_key(key)[1] for key in keys if PART not in key]
    if waiting:
        found.append(f"reservations {waiting[:5]} wait for a transaction to end: let the workers settle them (a minute)")
    return found


async def move(connection: AsyncConnection, store: Store, old: Moved, new: Layout, epoch: int) -> Counts:
    """All of the ledger's half; the caller commits. ``epoch``: the last one of the old layout. ``NotReady``."""
    generation = old.generation + 1
    tables = store.tables
    partition = tables.partition
    await connection.execute(select(partition.c.applied).order_by(partition.c.partition, partition.c.epoch).with_for_update())
    if words := await unready(connection, store):
        raise NotReady("; ".join(words))
    skus = await _stock(connection, store, new)
    admission = tables.admission
    for (merchant,) in list(await connection.execute(select(admission.c.merchant))):
        place = new.of(key_of(merchant, ""))
        await connection.execute(update(admission).where(admission.c.merchant == merchant).values(partition=place))
    held = tables.reservation
    keys = list((await connection.execute(select(held.c.key).where(held.c.state == HELD).order_by(held.c.key))).scalars())
    calls: dict[str, list[str]] = {}
    for key in keys:
        calls.setdefault(key.partition(PART)[0], []).append(key)
    names = list(calls)
    for at in range(0, len(names), CHUNK):
        part = names[at : at + CHUNK]
        holds = await rows.holds(connection, store, [key for name in part for key in calls[name]])
        for name in part:
            await _reservation(connection, store, name, [holds[key] for key in calls[name]], new, generation)
    await connection.execute(update(partition).where(partition.c.partition >= new.partitions, partition.c.epoch > 0).values(state=CLOSED))
    when = f"{generation} {epoch} {time.time_ns() // 1_000_000}"
    done = {"partitions": str(new.partitions), "partition_by": new.by, REPARTITIONED: when, BEFORE: str(old.layout.partitions)}
    await settle(connection, store, done)
    return Counts(skus, len(names))


async def _stock(connection: AsyncConnection, store: Store, new: Layout) -> int:
    table = store.tables.stock
    found = await connection.execute(select(table.c.merchant, table.c.sku, table.c.partition).order_by(table.c.merchant, table.c.sku))
    moving = [(merchant, sku, place) for merchant, sku, was in found if (place := new.of(key_of(merchant, sku))) != was]
    for at in range(0, len(moving), CHUNK):
        await store.bulk.update(connection, table, ("merchant", "sku"), ("partition",), moving[at : at + CHUNK])
    return len(moving)


async def _reservation(connection: AsyncConnection, store: Store, call: str, holds: Sequence[Hold], new: Layout, generation: int) -> None:
    """One live reservation: home and parts as the new layout has them, with what was closed of each line."""
    name = split_key(call)[1]
    by_key = {hold.key: hold for hold in holds}
    home = by_key.pop(call, None)
    if home is None:
        raise NotReady(f"parts of {name!r} have not followed their call: let the workers run until they have")
    open_there: dict[str, list[int]] = {}
    for part in by_key.values():
        if part.expires_at:
            raise NotReady(f"parts of {name!r} have not followed their call: let the workers run until they have")
        open_there |= part.lines
    lines = {field: list(counts) for field, counts in home.lines.items()}
    for field, (_, *counts) in home.foreign.items():
        if counts[1] and open_there.get(field) != counts:
            raise NotReady(f"parts of {name!r} have not followed their call: let the workers run until they have")
        lines[field] = counts
    own = {field: counts for field, counts in lines.items() if new.of(field) == new.home(call)}
    there: dict[int, dict[str, list[int]]] = {}
    for field in sorted(lines.keys() - own.keys()):
        there.setdefault(new.of(field), {})[field] = lines[field]
    await _decision(connection, store, call, own, there, generation)
    header, line = store.tables.reservation, store.tables.reservation_line
    old = list((await connection.execute(select(header.c.key).where(of_call(header.c.key, call)))).scalars())
    old.remove(call)
    for key in old:
        await connection.execute(delete(header).where(header.c.key == key))
    for key in (call, *old):
        await connection.execute(delete(line).where(line.c.key == key))
    elsewhere = {field: [number, *counts] for number, mine in there.items() for field, counts in mine.items()}
    await connection.execute(
        update(header).where(header.c.key == call).values(partition=new.home(call), elsewhere=dumps(elsewhere) if elsewhere else None)
    )
    await _lines(connection, store, call, own)
    for number, mine in there.items():
        key = f"{call}{PART}{number}"
        flat = [value for field, counts in mine.items() for value in (field, counts[0])]
        closed = CONFIRMED if any(counts[2] for counts in mine.values()) else RELEASED
        live = any(counts[1] for counts in mine.values())
        await connection.execute(
            insert(header).values(
                key=key, partition=number, epoch=0, seq=generation, state=HELD if live else closed,
                fingerprint=fingerprint(Kind.RESERVE, f"part of {Kind.RESERVE.value}", flat), order_id=home.order or None,
                expires_at=0, pinned=live, opened_ms=home.opened_ms, reported=True, elsewhere=None,
            )
        )  # fmt: skip
        await _lines(connection, store, key, mine)


async def _lines(connection: AsyncConnection, store: Store, key: str, lines: dict[str, list[int]]) -> None:
    columns = ("key", "merchant", "sku", "original", "open", "confirmed", "released")
    await store.bulk.insert(
        connection, store.tables.reservation_line, columns, [(key, *split_key(field), *counts) for field, counts in sorted(lines.items())]
    )


async def _decision(
    connection: AsyncConnection, store: Store, call: str, own: dict[str, list[int]], there: dict[int, dict[str, list[int]]], generation: int
) -> None:
    """The operation that took it names its lines and parts in the new layout; its change rows, and their number, are as they were."""
    row = await rows.operation(connection, store, call)
    if row is None:
        if there:
            raise NotReady(f"reservation {split_key(call)[1]!r} came from reads_stock and would stand in several partitions: close it")
        return
    left = dict(zip(row.lines[::2], row.remaining, strict=True))
    for _, _, flat, remaining in row.parts:
        left.update(zip(flat[::2], remaining or [0] * (len(flat) // 2), strict=True))

    def flat_of(lines: dict[str, list[int]]) -> list[Any]:
        return [value for field in sorted(lines) for value in (field, lines[field][0])]

    parts = [[number, f"0-{generation}", flat_of(mine), [left.get(field, 0) for field in sorted(mine)]] for number, mine in there.items()]
    receipt = [flat_of(own), [left.get(field, 0) for field in sorted(own)], *([parts] if parts else [])]
    table = store.tables.operation
    await connection.execute(update(table).where(table.c.claim == call).values(receipt=dumps(receipt)))


def remembered(row: OperationRow, partition: int, moved: Moved) -> OperationRow | None:
    """An operation as this partition remembers it, where it was done under another layout; None: it is another one's."""
    home = moved.layout.home
    if PART in row.key:
        return None
    if row.kind in _CLOSING and home(row.reference) != partition:
        # Done at the home of the reservation; at its own the id is claimed for it.
        row = replace(row, kind=Kind.CLAIM.value, order=row.reference, reference=row.key, lines=(), remaining=(), parts=())
    if home(row.reference if row.kind in _CLOSING or row.kind == Kind.TOMBSTONE else row.key) != partition:
        return None
    if any(mark != f"0-{moved.generation}" for _, mark, *_ in row.parts):
        # Its parts are told by partitions that are not there any more; nothing of it is open.
        pairs = dict(zip(row.lines[::2], zip(row.lines[1::2], row.remaining, strict=True), strict=True))
        for _, _, flat, left in row.parts:
            pairs.update(zip(flat[::2], zip(flat[1::2], left or [0] * (len(flat) // 2), strict=True), strict=True))
        lines = tuple(value for field in sorted(pairs) for value in (field, pairs[field][0]))
        row = replace(row, lines=lines, remaining=tuple(pairs[field][1] for field in sorted(pairs)), parts=())
    # It is in the ledger for good: nobody waits for its journal, and it can't be undone any more.
    position = row.position if not row.position.epoch else Position(partition, 0, 0)
    return replace(row, position=position, kept=True)
