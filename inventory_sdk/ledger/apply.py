"""Journal entries into the ledger: one transaction, all of them or nothing.

The order matters. The epoch's row is locked first, so one worker applies at a time and a rebuild can wait for it. Everything is
read before anything is decided, everything is decided before anything is written, and what was written is compared with what was
asked. The watermark moves before ``writes_stock`` is called: should the service's function end our transaction by force, what it
commits is a whole batch and not a half.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk.errors import InventoryError, QuantityMismatch
from inventory_sdk.ledger import rows
from inventory_sdk.ledger.decide import (
    CHANGE,
    CLAIMING,
    OPERATION,
    TASK,
    UNDOABLE,
    UNDONE,
    Hold,
    Known,
    Stock,
    Verdicts,
    abort_keys,
    parse_json,
    parse_position,
    parts_of,
)
from inventory_sdk.ledger.protocol import Applied, EpochClosed, ForkFound, WatermarkMoved, WritesStock, WritesStockFailed
from inventory_sdk.ledger.schema import COUNTERS
from inventory_sdk.ledger.store import CLOSED, DRAINING, MADE, OPEN, PENDING, Store, dumps
from inventory_sdk.model import LEDGER_DELTAS, JournalEntry, Kind, Movement, split_key
from inventory_sdk.quantities import differences

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

ENTRY: Final = ("partition", "epoch", "seq", "nonce", "at_ms", "operations")
VOID: Final = ("partition", "epoch", "seq", "index", "key", "kind", "reference", "deltas", "freeze", "state")
HEADER: Final = (
    "key", "partition", "epoch", "seq", "state", "fingerprint", "order_id", "expires_at", "pinned", "opened_ms", "reported",
    "elsewhere",
)  # fmt: skip
LINE: Final = ("key", "merchant", "sku", "original", "open", "confirmed", "released")
POSITION: Final = ("partition", "epoch", "seq", "index")

MovesStock = Callable[["AsyncConnection", Store, dict[str, Stock]], Awaitable[None]]

_COUNTED: Final = (*COUNTERS, "version")
_DELTAS: Final = itemgetter(*map(CHANGE.index, ("merchant", "sku", *(f"{name}_delta" for name in COUNTERS))))

_MOVING: Final = frozenset(LEDGER_DELTAS) | {Kind.UNDO}
_REFERRING: Final = frozenset({
    Kind.CONFIRM, Kind.RELEASE, Kind.EXPIRE, Kind.REACQUIRE, Kind.UNDO, Kind.KEEP, Kind.TOMBSTONE, Kind.EXTEND, Kind.PIN,
    Kind.RESUME,
})  # fmt: skip


async def apply(
    connection: AsyncConnection,
    store: Store,
    partition: int,
    epoch: int,
    entries: Sequence[JournalEntry],
    writes: Sequence[WritesStock],
    lost: Sequence[int] = (),
    careful: bool = False,
) -> Applied:
    """See ``Ledger.apply``; the caller commits.

    A repeated id is rare and looking for one costs as much as writing the row, so at first the unique constraints are trusted to
    find it: on ``IntegrityError`` the caller rolls back and comes again with ``careful``.
    """
    state, applied = await _lock(connection, store, partition, epoch)
    if lost and state != DRAINING:
        raise ValueError(f"partition {partition}: epoch {epoch} is {state}, nothing of it is lost for good")
    fresh, gone, redelivered = await _sift(connection, store, partition, epoch, entries, lost, applied)
    if not fresh and not gone:
        return Applied(applied, 0, (), redelivered, 0)
    lost_from = await _lost_from(connection, store, partition, epoch, gone) if state == DRAINING else None
    verdicts = await _judge(connection, store, partition, epoch, fresh, bool(writes), careful, lost_from)
    if verdicts.refusals and not careful:
        # A refused row claims nothing, so no constraint tells whether it was a repeat.
        verdicts = await _judge(connection, store, partition, epoch, fresh, bool(writes), True, lost_from)
    last = applied + len(fresh) + len(gone)
    # A lost entry has a row too, with no nonce: one that turns up later is a fork, and never mistaken for a redelivery.
    await store.bulk.insert(connection, store.tables.entry, ENTRY, [(partition, epoch, seq, "", 0, 0) for seq in gone])
    await write_rows(connection, store, fresh, verdicts)
    table = store.tables.partition
    moved = await connection.execute(
        update(table)
        .where(table.c.partition == partition, table.c.epoch == epoch, table.c.applied == applied, table.c.state != CLOSED)
        .values(applied=last)
    )
    if moved.rowcount != 1:
        raise WatermarkMoved(f"partition {partition}, epoch {epoch}: the watermark is not {applied} any more")
    if verdicts.movements:
        await call_writes(connection, writes, verdicts.movements)
    return Applied(last, len(verdicts.operations), tuple(verdicts.refusals), redelivered, len(verdicts.tasks))


async def _lock(connection: AsyncConnection, store: Store, partition: int, epoch: int) -> tuple[str, int]:
    table = store.tables.partition
    query = select(table.c.state, table.c.applied).where(table.c.partition == partition, table.c.epoch == epoch).with_for_update()
    if store.dialect == "postgresql":
        # A plan made while the tables were small would scan them for ever after; planning each statement costs 0.1 ms a batch.
        query = query.add_columns(func.set_config("plan_cache_mode", "force_custom_plan", True))
    row = (await connection.execute(query)).first()
    if epoch <= 0 or row is None or row[0] not in (OPEN, DRAINING):
        raise EpochClosed(f"partition {partition}: epoch {epoch} is {row[0] if row else 'unknown'}, nothing is applied in it")
    return str(row[0]), int(row[1])


async def _sift(
    connection: AsyncConnection,
    store: Store,
    partition: int,
    epoch: int,
    entries: Sequence[JournalEntry],
    lost: Sequence[int],
    applied: int,
) -> tuple[list[JournalEntry], list[int], int]:
    """Entries behind the watermark, lost sequences behind it, and how many entries were there before."""
    new: dict[int, JournalEntry] = {}
    old: list[JournalEntry] = []
    for entry in entries:
        if (entry.partition, entry.epoch) != (partition, epoch):
            where = f"{entry.partition}/{entry.epoch}-{entry.sequence}"
            raise ValueError(f"entry {where} is not of partition {partition}, epoch {epoch}")
        if entry.sequence <= applied or entry.sequence in new:
            old.append(entry)
        else:
            new[entry.sequence] = entry
    gone = sorted({sequence for sequence in lost if sequence > applied})
    if both := new.keys() & set(gone):
        raise ValueError(f"partition {partition}: {sorted(both)} of epoch {epoch} are here and lost at once")
    for expected, sequence in enumerate(sorted([*new, *gone]), applied + 1):
        if sequence != expected:
            raise WatermarkMoved(f"partition {partition}: {epoch}-{expected} comes next, not {epoch}-{sequence}")
    nonces = {sequence: entry.nonce for sequence, entry in new.items()}
    asked = {(partition, epoch, entry.sequence) for entry in old if entry.sequence <= applied}
    keys = ("partition", "epoch", "seq")
    nonces.update(await store.bulk.select(connection, store.tables.entry, ("seq", "nonce"), keys, asked))
    for entry in old:
        if nonces.get(entry.sequence) != entry.nonce:
            raise _fork(entry)
    return [new[sequence] for sequence in sorted(new)], gone, len(old)


def _fork(entry: JournalEntry) -> ForkFound:
    where = f"{entry.partition}/{entry.epoch}-{entry.sequence}"
    return ForkFound(f"journal entry {where}: nonce {entry.nonce!r} is not the one that the ledger has applied there")


async def _lost_from(connection: AsyncConnection, store: Store, partition: int, epoch: int, gone: Sequence[int]) -> int | None:
    """The first lost sequence of the epoch, those of this batch included."""
    entry = store.tables.entry
    query = select(func.min(entry.c.seq)).where(entry.c.partition == partition, entry.c.epoch == epoch, entry.c.nonce == "")
    first = (await connection.execute(query)).scalar()
    return min((seq for seq in (first, *gone[:1]) if seq is not None), default=None)


async def _judge(
    connection: AsyncConnection,
    store: Store,
    partition: int,
    epoch: int,
    fresh: Sequence[JournalEntry],
    movements: bool,
    careful: bool,
    lost_from: int | None,
) -> Verdicts:
    known = await _learn(connection, store, partition, epoch, fresh, careful)
    known.lost_from = lost_from
    verdicts = Verdicts(partition, known, movements)
    for entry in fresh:
        verdicts.walk(entry)
    return verdicts


async def _learn(
    connection: AsyncConnection, store: Store, partition: int, epoch: int, fresh: Sequence[JournalEntry], careful: bool
) -> Known:
    """Read all that the decisions need, a statement per table; ``careful``: also whether new ids are known already."""
    claims: set[str] = set()
    reservations: set[str] = set()
    fields: set[str] = set()
    references: set[str] = set()
    deducts: set[str] = set()
    made: set[int] = set()
    voids: set[tuple[int, int, int]] = set()
    for entry in fresh:
        for operation in entry.operations:
            kind = operation.kind
            if careful and kind in CLAIMING:
                claims.add(operation.key)
            if kind in _MOVING:
                fields.update(operation.lines[::2])
                if kind in UNDOABLE and operation.extra and (parts := parts_of(parse_json(operation.extra, operation.key))):
                    reservations.update(abort_keys(operation.key, parts))
            if kind == Kind.RESERVE:
                if careful:
                    reservations.add(operation.key)
            elif kind in _REFERRING:
                references.add(operation.reference)
                if kind == Kind.UNDO or kind == Kind.KEEP:
                    claims.add(operation.reference)
                    deducts.add(operation.reference)
            elif kind == Kind.CREDIT:
                made.add(parse_position(operation, parse_json(operation.extra, operation.key), 2)[1])
            elif kind == Kind.VOID:
                at = parse_position(operation, parse_json(operation.extra, operation.key), 3)
                voids.add((at[0], at[1], at[2]))
    known = Known(claims=await rows.claims(connection, store, claims))
    known.holds = await rows.holds(connection, store, reservations | references)
    if references:
        known.refused = await _refused_takes(connection, store, references)
    if deducts:
        known.returned = await returned(connection, store, deducts)
    if made:
        pending = await rows.pending_credits(connection, store, partition, epoch, made)
        known.credits = {credit.position.sequence for credit in pending}
    if voids:
        asked = {(partition, *at) for at in voids}
        columns = ("epoch", "seq", "index", "deltas", "state")
        for e, seq, index, deltas, state in await store.bulk.select(connection, store.tables.void, columns, POSITION, asked):
            known.voids[e, seq, index] = json.loads(deltas)
            if state != PENDING:
                known.voids_made.add((e, seq, index))
    known.stock = await rows.stock(connection, store, fields, "update")
    return known


async def _refused_takes(connection: AsyncConnection, store: Store, references: set[str]) -> set[str]:
    found = await store.bulk.select(connection, store.tables.void, ("key",), ("key",), [(key,) for key in references])
    return {key for (key,) in found}


async def returned(connection: AsyncConnection, store: Store, keys: set[str]) -> set[str]:
    """The takes of which something came back."""
    table = store.tables.operation
    found = await store.bulk.select(connection, table, ("reference", "kind", "status"), ("reference",), [(key,) for key in keys])
    return {reference for reference, kind, status in found if kind == Kind.TAKE_BACK and status == "applied"}


async def write_rows(
    connection: AsyncConnection, store: Store, fresh: Sequence[JournalEntry], verdicts: Verdicts, move: MovesStock | None = None
) -> None:
    """All that the verdicts have collected; ``move`` writes the stock rows in another way than ``move_stock``."""
    bulk, tables, partition = store.bulk, store.tables, verdicts.partition
    # Undone takes first: they give up claims that the new rows may take.
    undone = [(partition, *at, UNDONE, None) for at in verdicts.undone]
    await bulk.update(connection, tables.operation, POSITION, ("status", "claim"), undone)
    gone = set(verdicts.undone)
    kept = sorted({(partition, *at, True) for at in verdicts.kept if at not in gone})
    await bulk.update(connection, tables.operation, POSITION, ("kept",), kept)
    entries = [(entry.partition, entry.epoch, entry.sequence, entry.nonce, entry.at_ms, len(entry.operations)) for entry in fresh]
    await bulk.insert(connection, tables.entry, ENTRY, entries)
    await bulk.insert(connection, tables.operation, OPERATION, verdicts.operations)
    verify_changes(verdicts.changes, verdicts.known.stock)
    await bulk.insert(connection, tables.change, CHANGE, verdicts.changes)
    await (move or move_stock)(connection, store, verdicts.known.stock)
    await write_holds(connection, store, verdicts.known.holds.values(), verdicts.deleted)
    await bulk.insert(connection, tables.void, VOID, verdicts.voids)
    if verdicts.credits:
        credit = tables.credit
        chosen = [credit.c.partition == partition, credit.c.seq.in_(verdicts.credits), credit.c.state == PENDING]
        await connection.execute(update(credit).where(*chosen).values(state=MADE))
    await bulk.update(connection, tables.void, POSITION, ("state",), [(partition, *at, MADE) for at in verdicts.voided])
    await bulk.insert(connection, tables.task, TASK, verdicts.tasks)


def verify_changes(changes: Sequence[tuple[Any, ...]], stock: Mapping[str, Stock]) -> None:
    """Every stock row moves by exactly what its change rows say, one version each, and no other does; or ``QuantityMismatch``."""
    logged: dict[tuple[str, str], list[int]] = {}
    for merchant, sku, available, reserved, sold, supplied, written_off in map(_DELTAS, changes):
        sums = logged.get((merchant, sku))
        if sums is None:
            sums = logged[merchant, sku] = [0] * 6
        sums[0] += available
        sums[1] += reserved
        sums[2] += sold
        sums[3] += supplied
        sums[4] += written_off
        sums[5] += 1
    asked = {key: tuple(sums) for key, sums in logged.items()}
    moved = {
        (row.merchant, row.sku): tuple(after - before for after, before in zip(row.after(), row.before, strict=True))
        for row in stock.values()
        if row.version != row.before[5]
    }
    _refuse(asked, moved)


async def move_stock(connection: AsyncConnection, store: Store, stock: dict[str, Stock]) -> None:
    """One update per SKU by the sum of its deltas; then what stands there must be what was decided, or ``QuantityMismatch``."""
    moved = [row for row in stock.values() if row.version != row.before[5]]
    if not moved:
        return
    keys = ("merchant", "sku")
    added = [(row.merchant, row.sku, *[after - before for after, before in zip(row.after(), row.before, strict=True)]) for row in moved]
    table = store.tables.stock
    found = await store.bulk.add(connection, table, keys, _COUNTED, added, keys + _COUNTED)
    standing = {(merchant, sku): tuple(counters) for merchant, sku, *counters in found}
    _refuse({(row.merchant, row.sku): row.after() for row in moved}, standing)


def _refuse(asked: Mapping[tuple[str, str], tuple[int, ...]], found: Mapping[tuple[str, str], tuple[int, ...]]) -> None:
    if asked == found:
        return
    wrong = differences(_named(asked), _named(found))
    if wrong:
        raise QuantityMismatch(wrong)


def _named(rows: Mapping[tuple[str, str], tuple[int, ...]]) -> dict[str, int]:
    return {
        f"merchant {merchant!r}, sku {sku!r}, {name}": units
        for (merchant, sku), counters in rows.items()
        for name, units in zip(_COUNTED, counters, strict=True)
    }


async def write_holds(connection: AsyncConnection, store: Store, holds: Iterable[Hold], deleted: Sequence[Hold]) -> None:
    """New reservations, and what changed on known ones."""
    bulk, header, line = store.bulk, store.tables.reservation, store.tables.reservation_line
    # By line, so that a line that is not there is noticed.
    await bulk.delete(
        connection, line, ("key", "merchant", "sku"), [(hold.key, *split_key(field)) for hold in deleted for field in hold.lines]
    )
    await bulk.delete(connection, header, ("key",), [(hold.key,) for hold in deleted])
    new: list[Hold] = []
    touched: list[tuple[Any, ...]] = []
    moved: list[tuple[Any, ...]] = []
    lines: list[tuple[Any, ...]] = []
    for hold in holds:
        if not hold.stored:
            new.append(hold)
            continue
        if hold.touched:
            touched.append((hold.key, hold.state, hold.fingerprint, hold.expires_at, hold.pinned, _elsewhere(hold)))
        moved += [(hold.key, *split_key(field), *hold.lines[field]) for field in hold.moved]
        lines += [(hold.key, *split_key(field), *hold.lines[field]) for field in hold.born]
    headers = [
        (
            hold.key, hold.partition, hold.epoch, hold.seq, hold.state, hold.fingerprint, hold.order or None, hold.expires_at,
            hold.pinned, hold.opened_ms, False, _elsewhere(hold),
        )
        for hold in new
    ]  # fmt: skip
    await bulk.insert(connection, header, HEADER, headers)
    lines += [(hold.key, *split_key(field), *counts) for hold in new for field, counts in hold.lines.items()]
    await bulk.insert(connection, line, LINE, lines)
    await bulk.update(connection, header, ("key",), ("state", "fingerprint", "expires_at", "pinned", "elsewhere"), touched)
    await bulk.update(connection, line, ("key", "merchant", "sku"), ("original", "open", "confirmed", "released"), moved)


def _elsewhere(hold: Hold) -> str | None:
    return dumps(hold.foreign) if hold.foreign else None


async def call_writes(connection: AsyncConnection, writes: Sequence[WritesStock], movements: Sequence[Movement]) -> None:
    """The service's own tables, in this transaction; ``WritesStockFailed`` for whatever they raise."""
    for write in writes:
        name = getattr(write, "__qualname__", repr(write))
        try:
            async with AsyncSession(bind=connection, join_transaction_mode="create_savepoint", expire_on_commit=False) as session:
                await write(movements, session)
                await session.commit()
        except Exception as error:
            raise WritesStockFailed(f"writes_stock {name} raised {error!r}") from error
        if not connection.in_transaction():
            raise InventoryError(f"writes_stock {name} ended the ledger's transaction: use the session, not its connection")
