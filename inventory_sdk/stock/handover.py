"""Stock changes hands: from the database to Redis (adopt) and back (withdraw), with sales going on.

To Redis: the ledger flips first (nobody sells), then Redis gets holds, results and at last the balances, with which it sells; then
the ledger notes that it arrived. To the database: Redis is marked first (nobody sells), the ledger applies all that Redis did, and
flips; then the holds leave Redis. Every step may be done again, by anyone: a process that died is followed by the next call.

Both work on stock fields. A merchant is all of its fields, and those that are new from now on.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.errors import DurabilityNotReached, InvalidOperation, InventoryError, StockFrozen
from inventory_sdk.ledger.protocol import AdmissionRow, Arrivals, EpochClosed, ReservationRow
from inventory_sdk.model import Position
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.records import PIN_OVERDUE_MS, RS, tombstone, write_reservation, write_result
from inventory_sdk.stock.wire import NotExecuted, ReplyLost

if TYPE_CHECKING:
    from inventory_sdk.stock.engine import Engine

CHUNK: Final = 500
ROUNDS: Final = 100
"""Watermarks that a withdrawal waits for while credits and voids keep coming."""
KEYS: Final = ("meta", "available", "reserved", "frozen", "admission", "reservations", "expiry", "results:0", "results:1")

Settled = Callable[[Position], Awaitable[None]]


class Overtaken(InventoryError):
    """Another process has adopted or withdrawn this stock meanwhile; what it decided stands."""

    def __init__(self, merchant: str) -> None:
        super().__init__(
            f"merchant {merchant!r} was adopted or withdrawn by another process meanwhile; ask for it again if you still want it"
        )


# To Redis ------------------------------------------------------------------------------------------------------------------------


async def adopt(engine: Engine, partition: Partition, merchant: str, fields: Sequence[str] | None = None) -> int:
    """Give stock to Redis; how many fields came. ``fields`` None: all of the merchant. ``StockFrozen`` while the partition is
    being recovered, ``InvalidOperation`` while a hold joins it with stock that stays."""
    await partition.known()
    epoch = partition.epoch
    try:
        flipped = await engine.ledger.arrive(partition.number, int(epoch), fields, merchant)
        if flipped.kept:
            await _steps(partition, epoch, "unmark", [(row.field, row.fence) for row in flipped.kept], merchant)
        fences = {row.field: row.fence for row in flipped.rows}
        if fences:
            await _load(engine, partition, epoch, fences, merchant, fields is None)
            await engine.ledger.arrived(partition.number, fences)
    except EpochClosed as error:
        partition.forget()
        raise StockFrozen(str(error), retry_after=0.5) from error
    engine.direct.note([*fences, *(row.field for row in flipped.kept)], merchant if fields is None else None, False)
    return len(fences)


async def _load(engine: Engine, partition: Partition, epoch: str, fences: Mapping[str, int], merchant: str, whole: bool) -> None:
    async with engine.ledger.arriving(partition.number, int(epoch), list(fences), whole) as reading:
        balances = [row for row in await reading.balances() if row.field in fences]
        turns = await _turns(partition, [row.field for row in balances])
        coming = [row for row in balances if turns.get(row.field, -1) < 2 * fences[row.field]]
        if coming:
            # A withdrawal that is late with its last step finds this turn and leaves our holds alone.
            await _steps(partition, epoch, "mark", [(row.field, fences[row.field] - 1) for row in coming], merchant)
            # Single SKUs may arrive in sets that overlap, all of a merchant's in one.
            guard = [part for row in (coming[:1] if whole else coming) for part in (row.field, fences[row.field])]
            been = {row.field for row in coming if whole or row.field in turns}
            await _holds(partition, epoch, reading, {row.field for row in coming}, been, guard, merchant)
            if len(coming) == len(balances):
                await _results(engine, partition, epoch, reading, guard, merchant)
            await _steps(
                partition, epoch, "admit", [(row.field, fences[row.field], row.available, row.reserved) for row in coming], merchant
            )


async def _turns(partition: Partition, fields: Sequence[str]) -> dict[str, int]:
    """Each field's last turn, see admit.lua."""
    client: Any = partition.wire.client
    found: dict[str, int] = {}
    for at in range(0, len(fields), CHUNK):
        part = fields[at : at + CHUNK]
        values = await client.hmget(partition.key("admission"), part)
        found.update({name: int(value) for name, value in zip(part, values, strict=True) if value is not None})
    return found


async def _holds(
    partition: Partition, epoch: str, reading: Arrivals, fields: set[str], been: set[str], guard: list[Any], merchant: str
) -> None:
    """Live holds come, and those that Redis still remembers of an earlier stay (of ``been``) and that have ended since go."""
    live = {row.key: row for row in await reading.reservations()}
    now = (await partition.hello()).now_ms
    flat: list[Any] = []
    async for key in _remembered(partition, been):
        if key not in live:
            flat += (key, "", 0)
    for row in live.values():
        if not _open(row) <= fields:
            continue  # it came with other stock of its, which sells already: Redis knows better
        flat += (row.key, write_reservation(row), now + PIN_OVERDUE_MS if row.pinned else row.expires_at)
    await _chunks(partition, epoch, "holds", flat, 3, guard, merchant)


def _open(row: ReservationRow) -> set[str]:
    return {row.lines[at] for at in range(0, len(row.lines), 5) if row.lines[at + 2]}


async def _remembered(partition: Partition, fields: set[str]) -> AsyncIterator[str]:
    """Keys of holds in Redis that have any of these fields."""
    if not fields:
        return
    client: Any = partition.wire.client
    async for key, record in client.hscan_iter(partition.key("reservations"), count=1000):
        if not fields.isdisjoint(record.decode().split(RS)[5::2]):
            yield key.decode()


async def _results(engine: Engine, partition: Partition, epoch: str, reading: Arrivals, guard: list[Any], merchant: str) -> None:
    """What was done at the database is answered from Redis, and what was undone or refused there is not any more."""
    since = (await partition.hello()).now_ms - int(engine.settings.results_window * 2000)
    async for page in reading.forgotten(CHUNK, since):
        flat = [part for row in page for part in (row.key, f"{row.position.epoch}-{row.position.sequence}")]
        await _chunks(partition, epoch, "forget", flat, 2, guard, merchant)
    async for page in reading.results(CHUNK, since):
        await _chunks(partition, epoch, "results", [part for row in page for part in (row.key, write_result(row))], 2, guard, merchant)
    closed = [part for key in await reading.tombstones(since) for part in (f"{key}\x1f", tombstone("0-0"))]
    await _chunks(partition, epoch, "results", closed, 2, guard, merchant)


# To the database -------------------------------------------------------------------------------------------------------------------


async def withdraw(engine: Engine, partition: Partition, merchant: str, settled: Settled, fields: Sequence[str] | None = None) -> int:
    """Give stock to the database; how many fields went. ``settled`` waits for a watermark. ``StockFrozen``, ``Overtaken``,
    ``DurabilityNotReached`` when no worker applies what Redis did (Redis goes on selling then), ``InvalidOperation`` while a hold
    joins it with stock that stays (likewise)."""
    await partition.known()
    epoch = partition.epoch
    rows = await _rows(engine, merchant, fields)
    if any(row.admission == "arriving" for row in rows):
        await adopt(engine, partition, merchant, fields)
        rows = await _rows(engine, merchant, fields)
    marked = {row.field: row.fence for row in rows if row.admission == "redis"}
    went = len(marked)
    try:
        try:
            holds = await _drain(engine, partition, epoch, marked, merchant, settled, whole=fields is None)
        except (DurabilityNotReached, InvalidOperation):
            await adopt(engine, partition, merchant, fields)
            raise
    except EpochClosed as error:
        partition.forget()
        raise StockFrozen(str(error), retry_after=0.5) from error
    engine.direct.note(marked, merchant if fields is None else None, True)
    if holds and marked:
        name, fence = next(iter(marked.items()))
        await _chunks(partition, epoch, "holds", [part for key in holds for part in (key, "", 0)], 3, [name, fence + 1], merchant)
    return went


async def _rows(engine: Engine, merchant: str, fields: Sequence[str] | None) -> list[AdmissionRow]:
    return await engine.ledger.admission(merchant, fields)


async def _drain(
    engine: Engine, partition: Partition, epoch: str, marked: dict[str, int], merchant: str, settled: Settled, whole: bool
) -> Sequence[str]:
    """Until the ledger has flipped; keys of the holds that it took over. ``marked`` grows by what is born meanwhile."""
    ledger, number = engine.ledger, partition.number
    sequence = await _steps(partition, epoch, "mark", list(marked.items()), merchant)
    for _ in range(ROUNDS):
        if sequence:
            await settled(Position(number, int(epoch), sequence))
        left = await ledger.leave(number, int(epoch), marked, sequence, merchant, whole)
        if left.outcome == "done":
            return left.holds
        if left.outcome == "overtaken":
            raise Overtaken(merchant)
        if left.outcome == "mixed":
            names = ", ".join(repr(key.partition("\x1f")[2]) for key in left.holds[:5])
            raise InvalidOperation("merchant", merchant, f"reservations {names} also hold stock that Redis keeps; close them first")
        if left.outcome == "unmarked":
            new = {row.field: row.fence for row in left.rows}
            await _steps(partition, epoch, "mark", list(new.items()), merchant)
            marked |= new
        if left.outcome == "pending":
            # The worker makes them too; whoever is first has made them.
            for void in await ledger.pending_voids(number, int(epoch)):
                await engine.upkeep.void(number, int(epoch), void)
            for credit in await ledger.pending_credits(number, int(epoch)):
                await engine.upkeep.credit(number, int(epoch), credit)
        sequence = (await partition.hello()).sequence
    raise StockFrozen(f"the stock of merchant {merchant!r} does not come to rest: credits or voids keep coming", retry_after=1.0)


# Steps in Redis -----------------------------------------------------------------------------------------------------------------------


async def _steps(partition: Partition, epoch: str, what: str, rows: Sequence[tuple[Any, ...]], merchant: str) -> int:
    """Rows are (field, fence, …); the journal's sequence after the last one."""
    flat = [value for row in rows for value in row]
    return await _chunks(partition, epoch, what, flat, len(rows[0]) if rows else 2, [], merchant)


async def _chunks(partition: Partition, epoch: str, what: str, flat: Sequence[Any], width: int, guard: list[Any], merchant: str) -> int:
    sequence = 0
    for at in range(0, len(flat), CHUNK * width):
        status, found = await run_step(partition, epoch, what, list(flat[at : at + CHUNK * width]), guard)
        if status < 0:
            raise Overtaken(merchant)
        if not status:
            raise EpochClosed(f"partition {partition.number}: epoch {epoch} is over, or Redis was too slow")
        sequence = int(found)
    return sequence


async def run_step(partition: Partition, epoch: str, what: str, part: list[Any], guard: list[Any]) -> tuple[int, bytes]:
    """One call of admit.lua, again where its answer was lost: every step may be repeated."""
    keys = [partition.key(name) for name in KEYS]
    for last in (False, True):
        sent = time.monotonic()
        arguments = [epoch, str(partition.not_after()), what, json.dumps(part), json.dumps(guard)]
        try:
            status, found = await partition.wire.run("admit", keys, arguments)
            return int(status), found
        except ReplyLost as error:
            await partition.outlive(sent)
            if last:
                raise NotExecuted(str(error)) from error
        except NotExecuted:
            if last:
                raise
        await partition.hello()
    raise AssertionError("unreachable")
