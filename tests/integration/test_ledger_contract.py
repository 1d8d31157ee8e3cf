"""One suite, three databases: what every ledger must do with journal entries, SQL-first operations and epochs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import BigInteger, Column, MetaData, String, Table, func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from inventory_sdk.errors import InvalidOperation, OperationConflict, QuantityMismatch
from inventory_sdk.ledger.decide import CHANGE, Verdicts
from inventory_sdk.ledger.enter import _Entering
from inventory_sdk.ledger.protocol import (
    Entering,
    EpochClosed,
    ForkFound,
    StockRow,
    Task,
    TaskFilter,
    WatermarkMoved,
    WritesStockFailed,
)
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.model import MAX_BALANCE, JournalEntry, JournalOperation, Movement, Position, fingerprint, key_of

DATABASES = [
    pytest.param("postgresql", marks=pytest.mark.postgresql),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
    pytest.param("sqlite"),
]

M = "m"


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'stock.db'}"
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
async def empty(database: str, namespace: str) -> AsyncIterator[SqlLedger]:
    """Tables, but no epoch yet."""
    ledger = SqlLedger(database, prefix=f"{namespace}_")
    await ledger.start()
    await ledger.create_schema()
    try:
        yield ledger
    finally:
        async with ledger.engine.begin() as connection:
            await connection.run_sync(ledger.tables.metadata.drop_all)
        await ledger.close()


@pytest.fixture
async def ledger(empty: SqlLedger) -> SqlLedger:
    """Partition 0 in epoch 1, open, with 10 of sku a and 5 of b."""
    await open_epoch(empty, 0)
    await restock(empty, "po-1", ("a", 10), ("b", 5))
    return empty


async def open_epoch(ledger: SqlLedger, above: int) -> None:
    raised = await ledger.raise_epoch(0, above)
    assert raised is not None
    async with ledger.rebuilding(0, raised.epoch) as reading:
        await reading.open()


def flat(*lines: tuple[str, int], merchant: str = M) -> list[Any]:
    return [part for sku, quantity in sorted(lines) for part in (key_of(merchant, sku), quantity)]


def entering(kind: str, name: str, *lines: tuple[str, int], of: str = "", **more: Any) -> Entering:
    reference = key_of(M, of) if of else ""
    pairs = flat(*lines)
    return Entering(kind, key_of(M, name), fingerprint(kind, reference, pairs), tuple(pairs), reference=reference, **more)


async def restock(ledger: SqlLedger, name: str, *lines: tuple[str, int], epoch: int = 1) -> None:
    await ledger.enter(0, epoch, [entering("restock", name, *lines)])


def op(kind: str, name: str, *lines: tuple[str, int], to: str = "", order: str = "", expires: int = 0, **extra: Any) -> JournalOperation:
    reference = key_of(M, to) if to else ""
    pairs = flat(*lines)
    mark = fingerprint(kind, reference, pairs)
    text = json.dumps(extra) if extra else ""
    return JournalOperation(kind, key_of(M, name), mark, pairs, [0] * len(lines), order, reference, expires, text)


def undo(of: str, kind: str, position: str, *lines: tuple[str, int]) -> JournalOperation:
    return op("undo", f"\x1fundo\x1f{of}\x1f{position}", *lines, to=of, of=kind, position=position)


def entry(sequence: int, *operations: JournalOperation, epoch: int = 1, nonce: str | None = None) -> JournalEntry:
    return JournalEntry(0, epoch, sequence, nonce or f"nonce-{epoch}-{sequence}", 1_700_000_000_000 + sequence, operations)


async def row(ledger: SqlLedger, sku: str = "a") -> StockRow:
    (found,) = await ledger.stock([key_of(M, sku)])
    return found


async def counters(ledger: SqlLedger, sku: str = "a") -> tuple[int, int, int, int, int]:
    found = await row(ledger, sku)
    return (found.available, found.reserved, found.sold, found.supplied, found.written_off)


async def statuses(ledger: SqlLedger, sequence: int, epoch: int = 1) -> list[str]:
    return [found.status for found in await ledger.operations_at([Position(0, epoch, sequence)])]


async def assert_sound(ledger: SqlLedger) -> None:
    assert await ledger.verify() == []


# Schema and settings


async def test_a_created_schema_has_nothing_to_complain_about_and_a_dropped_table_is_named(empty: SqlLedger) -> None:
    assert await empty.check_schema() == []
    async with empty.engine.begin() as connection:
        await connection.run_sync(empty.tables.task.drop)
    assert await empty.check_schema() == [f"table {empty.tables.task.name} is missing: run create_schema(), or `inventory-sdk schema`"]
    await empty.create_schema()
    assert await empty.check_schema() == []


async def test_four_processes_may_create_the_schema_at_once(database: str, namespace: str) -> None:
    ledgers = [SqlLedger(database, prefix=f"{namespace}_") for _ in range(4)]
    try:
        await asyncio.gather(*(each.create_schema() for each in ledgers))
        assert await ledgers[0].check_schema() == []
    finally:
        async with ledgers[0].engine.begin() as connection:
            await connection.run_sync(ledgers[0].tables.metadata.drop_all)
        for each in ledgers:
            await each.close()


async def test_the_first_value_of_a_setting_stands(empty: SqlLedger) -> None:
    assert await empty.settle_setting("partitions", "4") == "4"
    assert await empty.settle_setting("partitions", "8") == "4"


# Epochs


async def test_a_partition_begins_with_epoch_one_and_only_one_process_opens_it(empty: SqlLedger) -> None:
    assert await empty.partition(0) is None
    raised = await asyncio.gather(*(empty.raise_epoch(0, 0) for _ in range(4)))
    won = [each for each in raised if each is not None]
    assert [(each.epoch, each.state, each.applied) for each in won] == [(1, "rebuilding", 0)]
    with pytest.raises(EpochClosed):
        await restock(empty, "po-1", ("a", 1))
    with pytest.raises(EpochClosed):
        await empty.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)))])


async def test_an_old_epoch_is_applied_until_the_rebuild_begins_and_never_after(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)))])
    raised = await ledger.raise_epoch(0, 1)
    assert raised is not None
    assert raised.epoch == 2
    with pytest.raises(EpochClosed):
        await restock(ledger, "po-2", ("a", 1), epoch=1)
    with pytest.raises(EpochClosed):
        async with ledger.balances(0, 1, [key_of(M, "a")]):
            pass
    await ledger.apply(0, 1, [entry(2, op("deduct", "o-2", ("a", 1)))])
    async with ledger.rebuilding(0, 2) as reading:
        await reading.open()
    with pytest.raises(EpochClosed):
        await ledger.apply(0, 1, [entry(3, op("deduct", "o-3", ("a", 1)))])
    await ledger.apply(0, 2, [entry(1, op("deduct", "o-3", ("a", 1)), epoch=2)])
    assert (await row(ledger)).available == 7
    await assert_sound(ledger)


async def test_a_rebuild_that_is_not_opened_leaves_the_old_epoch_as_it_was(ledger: SqlLedger) -> None:
    await ledger.raise_epoch(0, 1)
    async with ledger.rebuilding(0, 2):
        pass
    with pytest.raises(RuntimeError, match="redis went away"):
        async with ledger.rebuilding(0, 2):
            raise RuntimeError("redis went away")
    await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)))])
    newest = await ledger.partition(0)
    assert newest is not None
    assert newest.state == "rebuilding"
    assert len(await ledger.pending_credits(0, 1)) == 1
    async with ledger.rebuilding(0, 2) as reading:
        await reading.open()
    with pytest.raises(EpochClosed):
        async with ledger.rebuilding(0, 2):
            pass


async def test_a_rebuild_reads_balances_live_reservations_and_results_in_chunks(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(n, op("reserve", f"r-{n}", ("a", 1), expires=n)) for n in range(1, 6)])
    await ledger.apply(0, 1, [entry(6, op("release", "rel", ("a", 1), to="r-2"), op("deduct", "late", ("b", 1)))])
    await ledger.raise_epoch(0, 1)
    async with ledger.rebuilding(0, 2) as reading:
        balances = [list(chunk) async for chunk in reading.balances(1)]
        assert [(each.field, each.available, each.reserved) for chunk in balances for each in chunk] == [
            (key_of(M, "a"), 6, 4),
            (key_of(M, "b"), 4, 0),
        ]
        held = [each async for chunk in reading.reservations(2) for each in chunk]
        assert [(each.key, each.expires_at) for each in held] == [(key_of(M, f"r-{n}"), n) for n in (1, 3, 4, 5)]
        assert held[0].lines == (key_of(M, "a"), 1, 1, 0, 0)
        results = [each async for chunk in reading.results(2, 1_700_000_000_003) for each in chunk]
        journaled = [each for each in results if each.position.epoch == 1]
        assert [each.key for each in journaled] == [key_of(M, name) for name in ("late", "rel", "r-5", "r-4", "r-3")]
        assert [each.at_ms for each in results] == sorted((each.at_ms for each in results), reverse=True)
        await reading.open()
    assert await ledger.pending_credits(0, 1) == []


async def test_the_watermark_passes_what_is_lost_for_good_only_in_an_epoch_that_ends(ledger: SqlLedger) -> None:
    batch = [entry(1, op("deduct", "o-1", ("a", 1))), entry(3, op("deduct", "o-3", ("a", 1)))]
    with pytest.raises(ValueError, match="lost"):
        await ledger.apply(0, 1, batch, lost=[2])
    await ledger.raise_epoch(0, 1)
    with pytest.raises(WatermarkMoved):
        await ledger.apply(0, 1, batch, lost=[4])
    done = await ledger.apply(0, 1, batch, lost=[2, 4])
    assert (done.sequence, done.operations) == (4, 2)
    with pytest.raises(ForkFound):
        await ledger.apply(0, 1, [entry(2, op("deduct", "o-2", ("a", 1)))])
    assert [(each.epoch, each.state, each.applied) for each in await ledger.epochs(0)] == [(1, "draining", 4), (2, "rebuilding", 0)]
    async with ledger.rebuilding(0, 2) as reading:
        await reading.open()
    assert [each.epoch for each in await ledger.epochs(0)] == [2]
    assert (await row(ledger)).available == 8
    await assert_sound(ledger)


async def test_an_epoch_may_be_raised_above_one_that_the_ledger_does_not_know(ledger: SqlLedger) -> None:
    raised = await ledger.raise_epoch(0, 7)
    assert raised is not None
    assert raised.epoch == 8
    assert await ledger.raise_epoch(0, 7) is None


# Applying


async def test_entries_move_stock_leave_change_rows_and_advance_the_watermark(ledger: SqlLedger) -> None:
    done = await ledger.apply(
        0,
        1,
        [
            entry(1, op("deduct", "o-1", ("a", 2), ("b", 1), order="order-1"), op("reserve", "r-1", ("a", 3), expires=99)),
            entry(2, op("adjust", "c-1", ("a", 1), reason="damaged")),
        ],
    )
    assert (done.sequence, done.operations, done.refusals, done.redelivered) == (2, 3, (), 0)
    assert await counters(ledger) == (4, 3, 2, 10, 1)
    assert await counters(ledger, "b") == (4, 0, 1, 5, 0)
    newest = await ledger.partition(0)
    assert newest is not None
    assert newest.applied == 2
    first = await ledger.operation(key_of(M, "o-1"))
    assert first is not None
    assert (first.position, first.index, first.kind, first.order, first.status) == ((0, 1, 1), 0, "deduct", "order-1", "applied")
    assert first.lines == (key_of(M, "a"), 2, key_of(M, "b"), 1)
    assert first.remaining == (0, 0)
    change = ledger.tables.change
    async with ledger.engine.connect() as connection:
        chain = await connection.execute(
            select(change.c.version, change.c.available_before, change.c.available_delta, change.c.available_after)
            .where(change.c.sku == "a")
            .order_by(change.c.version)
        )
        assert [tuple(each) for each in chain] == [(1, 0, 10, 10), (2, 10, -2, 8), (3, 8, -3, 5), (4, 5, -1, 4)]
    await assert_sound(ledger)


async def test_redelivered_entries_are_counted_and_move_nothing(ledger: SqlLedger) -> None:
    one, two = entry(1, op("deduct", "o-1", ("a", 1))), entry(2, op("deduct", "o-2", ("a", 1)))
    await ledger.apply(0, 1, [one])
    done = await ledger.apply(0, 1, [one, two, two])
    assert (done.sequence, done.operations, done.redelivered) == (2, 1, 2)
    again = await ledger.apply(0, 1, [two, one])
    assert (again.sequence, again.operations, again.redelivered) == (2, 0, 2)
    assert (await row(ledger)).available == 8


async def test_entries_behind_a_gap_are_not_applied(ledger: SqlLedger) -> None:
    with pytest.raises(WatermarkMoved):
        await ledger.apply(0, 1, [entry(2, op("deduct", "o-1", ("a", 1)))])
    with pytest.raises(WatermarkMoved):
        await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1))), entry(3, op("deduct", "o-3", ("a", 1)))])
    assert (await row(ledger)).available == 10


async def test_another_nonce_at_an_applied_position_is_a_fork(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)))])
    with pytest.raises(ForkFound):
        await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)), nonce="another")])
    with pytest.raises(ForkFound):
        await ledger.apply(0, 1, [entry(2, op("deduct", "x", ("a", 1))), entry(2, op("deduct", "y", ("a", 1)), nonce="another")])
    assert (await row(ledger)).available == 9


async def test_two_workers_with_the_same_entries_move_them_once(ledger: SqlLedger, database: str) -> None:
    other = SqlLedger(database, prefix=ledger.tables.prefix)
    try:
        entries = [entry(n, *(op("deduct", f"o-{n}-{i}", ("a", 1)) for i in range(2))) for n in range(1, 4)]
        results = await asyncio.gather(
            ledger.apply(0, 1, entries), other.apply(0, 1, entries), other.apply(0, 1, entries[:1]), return_exceptions=True
        )
        assert sum(each.operations for each in results if not isinstance(each, BaseException)) == 6
        # A worker that still believes in the watermark it once read.
        with pytest.raises(WatermarkMoved):
            await other.apply(0, 1, [entry(5, op("deduct", "o-5", ("a", 1)))])
    finally:
        await other.close()
    assert (await row(ledger)).available == 4
    await assert_sound(ledger)


async def test_ids_are_compared_as_bytes(ledger: SqlLedger) -> None:
    hostile = ["x", "X", "x ", " x", "x\u00a0", "é", "e\u0301", "🧨", "🧨" * 32, "y" * 128, "'; --", "%s", "\\", '"', "ß", "ss"]
    await ledger.enter(0, 1, [entering("restock", "po-h", *((name, 5) for name in hostile))])
    await ledger.apply(0, 1, [entry(n, op("reserve", name, (name, 2), order=name)) for n, name in enumerate(hostile, 1)])
    assert await ledger.pending_voids(0, 1) == []
    for name in hostile:
        assert (await row(ledger, name)).reserved == 2
        found = await ledger.operation(key_of(M, name))
        held = await ledger.reservation(key_of(M, name))
        assert found is not None
        assert found.key == key_of(M, name)
        assert found.order == name
        assert held is not None
        assert held.lines == (key_of(M, name), 2, 2, 0, 0)
    fields = [key_of(M, name) for name in hostile]
    async with ledger.balances(0, 1, fields) as balances:
        assert set(balances) == set(fields)
    assert [each.sku for each in await ledger.all_stock(M)] == sorted([*hostile, "a", "b"])
    assert await ledger.all_stock("M") == []
    await assert_sound(ledger)


async def test_an_operation_of_512_lines_is_one_operation(ledger: SqlLedger) -> None:
    lines = [(f"sku-{n:03}-{'long' * 28}", 1) for n in range(512)]
    await restock(ledger, "po-2", *lines)
    await ledger.apply(0, 1, [entry(1, op("reserve", "r-1", *lines)), entry(2, op("confirm", "c-1", *lines, to="r-1"))])
    found = await ledger.operation(key_of(M, "c-1"))
    assert found is not None
    assert len(found.lines) == 1024
    await assert_sound(ledger)


async def test_text_that_databases_refuse_does_not_hold_the_worker(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("adjust", "c-1", ("a", 1), reason="nul \x00 and half a pair \ud83d"))])
    assert await counters(ledger) == (9, 0, 0, 10, 1)


# Refusals


async def test_a_known_id_is_a_duplicate_with_a_void_that_does_not_freeze(ledger: SqlLedger) -> None:
    take = op("deduct", "o-1", ("a", 2), ("b", 1))
    done = await ledger.apply(0, 1, [entry(1, take), entry(2, take), entry(3, op("reserve", "o-1", ("a", 1)))])
    assert [(each.position.sequence, each.reason) for each in done.refusals] == [(2, "duplicate"), (3, "duplicate")]
    again = await ledger.apply(0, 1, [entry(4, op("adjust", "o-1", ("a", 1)), op("confirm", "o-1", ("a", 1), to="nothing"))])
    assert [each.reason for each in again.refusals] == ["duplicate", "duplicate"]
    assert await counters(ledger) == (8, 0, 2, 10, 0)
    voids = await ledger.pending_voids(0, 1)
    assert [(each.position.sequence, each.index, each.freeze) for each in voids] == [
        (2, 0, False), (3, 0, False), (4, 0, False), (4, 1, False),
    ]  # fmt: skip
    assert [each.deltas for each in voids] == [
        (key_of(M, "a"), 2, 0, key_of(M, "b"), 1, 0),
        (key_of(M, "a"), 1, -1),
        (key_of(M, "a"), 1, 0),
        (key_of(M, "a"), 0, 1),
    ]
    await assert_sound(ledger)


async def test_a_repeat_that_could_not_be_covered_either_is_a_duplicate_and_no_drift(ledger: SqlLedger) -> None:
    take = op("reserve", "r-1", ("a", 10))
    await ledger.apply(0, 1, [entry(1, take)])
    done = await ledger.apply(0, 1, [entry(2, take), entry(3, op("deduct", "po-1", ("a", 1)))])
    assert [each.reason for each in done.refusals] == ["duplicate", "duplicate"]
    assert [each.freeze for each in await ledger.pending_voids(0, 1)] == [False, False]


async def test_a_take_that_the_ledger_cannot_cover_is_rejected_whole_and_what_hangs_on_it_with_it(ledger: SqlLedger) -> None:
    done = await ledger.apply(
        0,
        1,
        [
            entry(
                1,
                op("reserve", "r-1", ("a", 3), ("b", 6)),
                op("confirm", "c-1", ("a", 1), to="r-1"),
                op("expire", "\x1fexpire\x1fr-1", ("a", 2), ("b", 6), to="r-1"),
                op("deduct", "o-1", ("a", 11)),
            ),
            entry(2, undo("o-1", "deduct", "1-1", ("a", 11)), op("release", "rel", ("a", 1), to="never")),
            entry(3, op("deduct", "o-9", ("unknown", 1)), op("keep", "\x1fkeep\x1fo-9", to="o-9")),
        ],
    )
    a, b = key_of(M, "a"), key_of(M, "b")
    assert [each.reason for each in done.refusals] == [
        "insufficient", "closed", "closed", "insufficient", "closed", "closed", "insufficient", "closed",
    ]  # fmt: skip
    voids = await ledger.pending_voids(0, 1)
    assert [(each.kind, each.deltas, each.freeze) for each in voids] == [
        ("reserve", (a, 3, -3, b, 6, -6), True),
        ("confirm", (a, 0, 1), False),
        ("expire", (a, -2, 2, b, -6, 6), False),
        ("deduct", (a, 11, 0), True),
        ("undo", (a, -11, 0), False),
        ("release", (a, -1, 1), True),
        ("deduct", (key_of(M, "unknown"), 1, 0), True),
    ]
    assert await counters(ledger) == (10, 0, 0, 10, 0)
    assert await counters(ledger, "b") == (5, 0, 0, 5, 0)
    assert await statuses(ledger, 1) == ["rejected"] * 4
    assert await ledger.operation(key_of(M, "o-1")) is None
    later = await ledger.apply(0, 1, [entry(4, op("release", "rel-2", ("a", 3), to="r-1"), op("deduct", "o-1", ("a", 1)))])
    assert [each.reason for each in later.refusals] == ["closed"]
    assert [each.freeze for each in await ledger.pending_voids(0, 1)][-1] is False
    assert (await row(ledger)).sold == 1
    await assert_sound(ledger)


async def test_a_void_is_made_once_and_a_second_one_is_taken_back(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("reserve", "r-1", ("a", 11)))])
    make = op("void", "\x1fvoid\x1f1-1-0", position="1-1-0")
    await ledger.apply(0, 1, [entry(2, make)])
    assert await ledger.pending_voids(0, 1) == []
    done = await ledger.apply(0, 1, [entry(3, make)])
    assert [each.reason for each in done.refusals] == ["duplicate"]
    (back,) = await ledger.pending_voids(0, 1)
    assert (back.position.sequence, back.deltas, back.freeze) == (3, (key_of(M, "a"), -11, 11), False)
    await assert_sound(ledger)


async def test_voids_of_an_older_epoch_end_with_the_rebuild(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 11)))])
    assert len(await ledger.pending_voids(0, 1)) == 1
    await open_epoch(ledger, 1)
    assert await ledger.pending_voids(0, 1) == []


# Reservations


async def test_reserve_and_confirm_in_one_batch(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("reserve", "r-1", ("a", 3), order="42"), op("confirm", "c-1", ("a", 3), to="r-1"))])
    held = await ledger.reservation(key_of(M, "r-1"))
    assert held is not None
    assert (held.state, held.order, held.position, held.lines) == ("confirmed", "42", (0, 1, 1), (key_of(M, "a"), 3, 0, 3, 0))
    assert await counters(ledger) == (7, 0, 3, 10, 0)
    await assert_sound(ledger)


async def test_a_reservation_is_closed_in_parts_and_not_beyond_what_is_open(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("reserve", "r-1", ("a", 5), ("b", 2)))])
    await ledger.apply(0, 1, [entry(2, op("confirm", "c-1", ("a", 2), to="r-1"), op("release", "l-1", ("b", 2), to="r-1"))])
    held = await ledger.reservation(key_of(M, "r-1"))
    assert held is not None
    assert held.state == "held"
    assert held.lines == (key_of(M, "a"), 5, 3, 2, 0, key_of(M, "b"), 2, 0, 0, 2)
    done = await ledger.apply(0, 1, [entry(3, op("confirm", "c-2", ("a", 4), to="r-1"))])
    assert [each.reason for each in done.refusals] == ["closed"]
    await ledger.apply(0, 1, [entry(4, op("expire", "\x1fexpire\x1fr-1", ("a", 3), to="r-1"))])
    held = await ledger.reservation(key_of(M, "r-1"))
    assert held is not None
    assert held.state == "expired"
    assert await counters(ledger) == (8, 0, 2, 10, 0)
    await assert_sound(ledger)


async def test_an_expired_reservation_takes_its_stock_again(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("reserve", "r-1", ("a", 4)), op("expire", "\x1fe", ("a", 4), to="r-1"))])
    await ledger.apply(0, 1, [entry(2, op("reacquire", "c-1", ("a", 4), to="r-1"))])
    held = await ledger.reservation(key_of(M, "r-1"))
    assert held is not None
    assert (held.state, held.lines) == ("confirmed", (key_of(M, "a"), 4, 0, 4, 0))
    done = await ledger.apply(0, 1, [entry(3, op("reacquire", "c-2", ("a", 1), to="r-1"))])
    assert [each.reason for each in done.refusals] == ["closed"]
    assert await counters(ledger) == (6, 0, 4, 10, 0)
    await assert_sound(ledger)


async def test_a_tombstone_makes_the_late_reserve_a_duplicate(ledger: SqlLedger) -> None:
    bury = op("tombstone", "\x1ftombstone\x1fr-1", to="r-1")
    await ledger.apply(0, 1, [entry(1, bury), entry(2, op("reserve", "r-1", ("a", 1)), bury)])
    held = await ledger.reservation(key_of(M, "r-1"))
    assert held is not None
    assert (held.state, held.lines) == ("released", ())
    assert await statuses(ledger, 2) == ["duplicate", "applied"]
    assert (await row(ledger)).reserved == 0
    await assert_sound(ledger)


async def test_extend_pin_and_resume_change_the_reservation_and_move_nothing(ledger: SqlLedger) -> None:
    key = key_of(M, "r-1")
    await ledger.apply(0, 1, [entry(1, op("reserve", "r-1", ("a", 1), expires=100), op("extend", "\x1fx", to="r-1", expires=200))])
    held = await ledger.reservation(key)
    assert held is not None
    assert (held.expires_at, held.pinned) == (200, False)
    await ledger.apply(0, 1, [entry(2, op("pin", "\x1fp", to="r-1"))])
    held = await ledger.reservation(key)
    assert held is not None
    assert held.pinned
    await ledger.apply(0, 1, [entry(3, op("resume", "\x1fr", to="r-1", expires=300))])
    held = await ledger.reservation(key)
    assert held is not None
    assert (held.expires_at, held.pinned) == (300, False)
    done = await ledger.apply(0, 1, [entry(4, op("extend", "\x1fy", to="nobody", expires=1))])
    assert [each.reason for each in done.refusals] == ["closed"]
    assert await ledger.pending_voids(0, 1) == []


async def test_a_hold_that_is_open_for_too_long_is_reported_once(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(n, op("reserve", f"r-{n}", ("a", 1))) for n in (1, 2, 3)])
    await ledger.apply(0, 1, [entry(4, op("release", "l", ("a", 1), to="r-1"))])
    before = 1_700_000_000_000 + 3
    assert [each.key for each in await ledger.take_stale(0, before, 10)] == [key_of(M, "r-2")]
    assert await ledger.take_stale(0, before, 10) == []
    assert [each.key for each in await ledger.take_stale(0, before + 1, 10)] == [key_of(M, "r-3")]


# Undo


@pytest.mark.parametrize("kind", ["reserve", "deduct", "adjust"])
async def test_an_undone_take_frees_its_id_within_one_batch_and_across_batches(ledger: SqlLedger, kind: str) -> None:
    take = op(kind, "o-1", ("a", 2), ("b", 1))
    lines = (("a", 2), ("b", 1))
    before = await counters(ledger)
    await ledger.apply(0, 1, [entry(1, take), entry(2, undo("o-1", kind, "1-1", *lines)), entry(3, take)])
    assert await statuses(ledger, 1) == ["undone"]
    assert await statuses(ledger, 3) == ["applied"]
    # The first one's undo again names a take that does not stand any more.
    done = await ledger.apply(0, 1, [entry(4, undo("o-1", kind, "1-1", *lines))])
    assert [each.reason for each in done.refusals] == ["closed"]
    batch = [entry(5, undo("o-1", kind, "1-3", *lines)), entry(6, take), entry(7, undo("o-1", kind, "1-6", *lines))]
    done = await ledger.apply(0, 1, batch)
    assert done.refusals == ()
    assert await counters(ledger) == before
    assert await ledger.operation(key_of(M, "o-1")) is None
    assert await ledger.reservation(key_of(M, "o-1")) is None
    await ledger.apply(0, 1, [entry(8, take)])
    assert await ledger.operation(key_of(M, "o-1")) is not None
    await assert_sound(ledger)


async def test_a_hold_that_is_closed_in_part_cannot_be_undone(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("reserve", "r-1", ("a", 3)), op("confirm", "c-1", ("a", 1), to="r-1"))])
    done = await ledger.apply(0, 1, [entry(2, undo("r-1", "reserve", "1-1", ("a", 3)))])
    assert [each.reason for each in done.refusals] == ["closed"]
    (void,) = await ledger.pending_voids(0, 1)
    assert (void.deltas, void.freeze) == ((key_of(M, "a"), -3, 3), True)
    await assert_sound(ledger)


async def test_the_undo_of_a_refused_duplicate_leaves_the_first_take_alone(ledger: SqlLedger) -> None:
    take = op("deduct", "o-1", ("a", 2))
    await ledger.apply(0, 1, [entry(1, take), entry(2, take), entry(3, undo("o-1", "deduct", "1-2", ("a", 2)))])
    assert await statuses(ledger, 1) == ["applied"]
    assert await statuses(ledger, 3) == ["rejected"]
    assert [(each.deltas[1], each.freeze) for each in await ledger.pending_voids(0, 1)] == [(2, False), (-2, False)]
    assert (await row(ledger)).sold == 2


async def test_keep_marks_the_take(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1))), entry(2, op("keep", "\x1fk\x1fo-1", to="o-1"))])
    await ledger.apply(0, 1, [entry(3, op("deduct", "o-2", ("a", 1)))])
    await ledger.apply(0, 1, [entry(4, op("keep", "\x1fk\x1fo-2", to="o-2"))])
    for name in ("o-1", "o-2"):
        found = await ledger.operation(key_of(M, name))
        assert found is not None
        assert found.kept


# SQL-first operations


async def test_a_restock_commits_with_a_credit_that_the_journal_makes(ledger: SqlLedger) -> None:
    (done,) = await ledger.enter(0, 1, [entering("restock", "po-2", ("a", 7), ("c", 2), order="inbound")])
    assert (done.position, done.remaining, done.replayed) == ((0, 0, 2), (17, 2), False)
    assert done.credit is not None
    assert done.credit.lines == (key_of(M, "a"), 7, key_of(M, "c"), 2)
    assert [each.position.sequence for each in await ledger.pending_credits(0, 1)] == [1, 2]
    async with ledger.balances(0, 1, [key_of(M, "a"), key_of(M, "none")]) as balances:
        assert {field: (each.available, each.reserved) for field, each in balances.items()} == {key_of(M, "a"): (0, 0)}
    make = op("credit", "\x1fcredit\x1f0-2", ("a", 7), ("c", 2), position="0-2")
    await ledger.apply(0, 1, [entry(1, make)])
    assert [each.position.sequence for each in await ledger.pending_credits(0, 1)] == [1]
    async with ledger.balances(0, 1, [key_of(M, "a")]) as balances:
        assert balances[key_of(M, "a")].available == 7
    (again,) = await ledger.enter(0, 1, [entering("restock", "po-2", ("a", 7), ("c", 2))])
    assert (again.position, again.remaining, again.credit, again.replayed) == (done.position, done.remaining, None, True)
    twice = await ledger.apply(0, 1, [entry(2, make)])
    assert [each.reason for each in twice.refusals] == ["duplicate"]
    (void,) = await ledger.pending_voids(0, 1)
    assert void.deltas == (key_of(M, "a"), -7, 0, key_of(M, "c"), -2, 0)
    await assert_sound(ledger)


async def test_a_repeated_restock_is_answered_with_its_pending_credit_and_other_content_is_a_conflict(ledger: SqlLedger) -> None:
    first = entering("restock", "po-2", ("a", 7))
    one, two = await ledger.enter(0, 1, [first, first])
    assert (one.replayed, two.replayed, one.position) == (False, True, two.position)
    (again,) = await ledger.enter(0, 1, [first])
    assert again.replayed
    assert again.credit == one.credit
    with pytest.raises(OperationConflict):
        await ledger.enter(0, 1, [entering("restock", "po-2", ("a", 8))])
    with pytest.raises(OperationConflict):
        await ledger.enter(0, 1, [entering("restock", "po-3", ("a", 1)), entering("restock", "po-3", ("a", 2))])
    assert (await row(ledger)).supplied == 17
    await assert_sound(ledger)


async def test_concurrent_restocks_of_one_id_supply_once(ledger: SqlLedger) -> None:
    first = entering("restock", "po-2", ("a", 1), ("new", 1))
    done = await asyncio.gather(*(ledger.enter(0, 1, [first]) for _ in range(5)))
    assert sorted(each.replayed for (each,) in done) == [False, True, True, True, True]
    assert (await row(ledger, "new")).supplied == 1
    await assert_sound(ledger)


async def test_restocks_takes_and_loads_at_once_keep_the_books(ledger: SqlLedger, database: str) -> None:
    worker = SqlLedger(database, prefix=ledger.tables.prefix)

    async def work() -> None:
        for n in range(1, 16):
            await worker.apply(0, 1, [entry(n, op("deduct", f"o-{n}", ("a", 1), ("b", 1)))])

    async def supply(name: str) -> None:
        for n in range(10):
            await restock(ledger, f"{name}-{n}", ("b", 2), ("a", 2))

    async def load() -> None:
        for _ in range(10):
            async with ledger.balances(0, 1, [key_of(M, "b"), key_of(M, "a")]):
                await asyncio.sleep(0)

    try:
        await asyncio.gather(work(), supply("x"), supply("y"), load())
    finally:
        await worker.close()
    found = await row(ledger)
    assert found.supplied == 50
    assert found.sold + len(await ledger.pending_voids(0, 1)) == 15
    await assert_sound(ledger)


async def test_a_sale_can_be_returned_up_to_what_it_sold(ledger: SqlLedger) -> None:
    await ledger.apply(
        0,
        1,
        [
            entry(1, op("deduct", "o-1", ("a", 3), ("b", 1))),
            entry(2, op("reserve", "r-1", ("a", 4)), op("confirm", "c-1", ("a", 2), to="r-1")),
        ],
    )
    (done,) = await ledger.enter(0, 1, [entering("take_back", "t-1", ("a", 2), of="o-1")])
    assert done.credit is not None
    assert done.credit.lines == (key_of(M, "a"), 2)
    with pytest.raises(InvalidOperation, match="lines"):
        await ledger.enter(0, 1, [entering("take_back", "t-2", ("a", 2), of="o-1")])
    one = entering("take_back", "t-3", ("a", 1), of="o-1")
    with pytest.raises(InvalidOperation, match="lines"):
        await ledger.enter(0, 1, [one, entering("take_back", "t-4", ("a", 1), of="o-1")])
    await ledger.enter(0, 1, [one])
    (again,) = await ledger.enter(0, 1, [one])
    assert again.replayed
    with pytest.raises(InvalidOperation, match="lines"):
        await ledger.enter(0, 1, [entering("take_back", "t-5", ("a", 3), of="r-1")])
    await ledger.enter(0, 1, [entering("take_back", "t-5", ("a", 2), of="r-1")])
    with pytest.raises(InvalidOperation, match="of"):
        await ledger.enter(0, 1, [entering("take_back", "t-6", ("a", 1), of="nothing")])
    assert await counters(ledger) == (8, 2, 0, 10, 0)
    refused = await ledger.apply(0, 1, [entry(3, undo("o-1", "deduct", "1-1", ("a", 3), ("b", 1)))])
    assert [each.reason for each in refused.refusals] == ["closed"]
    await assert_sound(ledger)


async def test_opening_balances_are_entered_once_with_their_reservations(ledger: SqlLedger) -> None:
    held = ((key_of(M, "n"), "order-9", 2), (key_of(M, "n"), "order-8", 1), (key_of(M, "a"), "order-7", 1))
    (done,) = await ledger.enter(0, 1, [entering("open", "\x1fopen\x1f1", ("a", 99), ("n", 4), ("z", 0), reservations=held)])
    assert (done.remaining, done.credit) == ((10, 4, 0), None)
    assert await counters(ledger, "n") == (4, 3, 0, 7, 0)
    assert await counters(ledger) == (10, 0, 0, 10, 0)
    nine = await ledger.reservation(key_of(M, "order-9"))
    assert nine is not None
    assert (nine.state, nine.position, nine.expires_at, nine.lines) == ("held", (0, 0, 2), 0, (key_of(M, "n"), 2, 2, 0, 0))
    assert await ledger.reservation(key_of(M, "order-7")) is None
    more = ((key_of(M, "p"), "order-9", 1),)
    await ledger.enter(0, 1, [entering("open", "\x1fopen\x1f2", ("p", 1), reservations=more)])
    await ledger.apply(0, 1, [entry(1, op("confirm", "c-1", ("n", 2), ("p", 1), to="order-9"))])
    nine = await ledger.reservation(key_of(M, "order-9"))
    assert nine is not None
    assert nine.state == "confirmed"
    await ledger.enter(0, 1, [entering("open", "\x1fopen\x1f3", ("n", 50))])
    assert (await row(ledger, "n")).available == 4
    await assert_sound(ledger)


@pytest.mark.parametrize(
    ("kind", "lines", "field"),
    [
        ("restock", (("a", 0),), "quantity"),
        ("adjust", (("a", -1),), "quantity"),
        ("restock", (("a", MAX_BALANCE),), "quantity"),
        ("deduct", (("a", 1),), "kind"),
    ],
)
async def test_what_must_not_enter_is_refused_by_field_and_moves_nothing(
    ledger: SqlLedger, kind: str, lines: Sequence[tuple[str, int]], field: str
) -> None:
    with pytest.raises(InvalidOperation) as refused:
        await ledger.enter(0, 1, [entering("restock", "fine", ("a", 1)), entering(kind, "bad", *lines)])
    assert refused.value.field == field
    assert await counters(ledger) == (10, 0, 0, 10, 0)
    assert await ledger.operation(key_of(M, "fine")) is None


async def test_a_positive_adjust_supplies(ledger: SqlLedger) -> None:
    await ledger.enter(0, 1, [entering("adjust", "found", ("a", 3), reason="count")])
    assert await counters(ledger) == (13, 0, 0, 13, 0)
    await assert_sound(ledger)


async def test_a_journaled_repeat_of_a_restock_id_is_voided(ledger: SqlLedger) -> None:
    done = await ledger.apply(0, 1, [entry(1, op("deduct", "po-1", ("a", 1)))])
    assert [each.reason for each in done.refusals] == ["duplicate"]


# writes_stock


@pytest.fixture
async def own(ledger: SqlLedger) -> AsyncIterator[Table]:
    """A table of the service's own."""
    key = Column("id", BigInteger, primary_key=True, autoincrement=False)
    table = Table(f"{ledger.tables.prefix}own", MetaData(), key, Column("sku", String(40)), Column("sold", BigInteger))
    async with ledger.engine.begin() as connection:
        await connection.run_sync(table.create)
    yield table
    async with ledger.engine.begin() as connection:
        await connection.run_sync(table.drop)


async def count(ledger: SqlLedger, table: Table) -> int:
    async with ledger.engine.connect() as connection:
        return int((await connection.execute(select(func.count()).select_from(table))).scalar_one())


async def test_writes_stock_sees_every_movement_and_commits_with_the_batch(ledger: SqlLedger, own: Table) -> None:
    seen: list[Movement] = []

    async def write(moves: Sequence[Movement], session: AsyncSession) -> None:
        seen.extend(moves)
        await session.execute(insert(own), [{"id": n, "sku": move.sku, "sold": move.sold} for n, move in enumerate(moves)])
        await session.commit()

    await ledger.apply(
        0,
        1,
        [
            entry(
                1,
                op("reserve", "r-1", ("a", 4), ("b", 1), order="42"),
                op("confirm", "c-1", ("a", 1), to="r-1"),
                op("deduct", "o-1", ("a", 1), reason="till"),
                op("deduct", "o-2", ("a", 99)),
                op("deduct", "o-1", ("a", 1)),
                op("keep", "\x1fk", to="o-1"),
            ),
            entry(2, undo("o-1", "deduct", "1-1", ("a", 1)), op("expire", "\x1fe", ("a", 3), ("b", 1), to="r-1")),
        ],
        [write],
    )
    assert [(m.kind, m.sku, m.available, m.reserved, m.sold, m.order, m.reservation) for m in seen] == [
        ("reserve", "a", -4, 4, 0, "42", "r-1"),
        ("reserve", "b", -1, 1, 0, "42", "r-1"),
        ("confirm", "a", 0, -1, 1, "42", "r-1"),
        ("deduct", "a", -1, 0, 1, None, None),
        ("undo", "a", 1, 0, -1, None, None),
        ("expire", "a", 3, -3, 0, "42", "r-1"),
        ("expire", "b", 1, -1, 0, "42", "r-1"),
    ]
    assert (seen[3].reason, seen[3].position, seen[3].index, seen[3].quantity) == ("till", (0, 1, 1), 2, 1)
    assert sum(move.available for move in seen if move.sku == "a") == (await row(ledger)).available - 10
    assert await count(ledger, own) == 7


async def test_a_writes_stock_that_raises_leaves_nothing_of_the_batch_even_after_its_own_commit(ledger: SqlLedger, own: Table) -> None:
    async def write(moves: Sequence[Movement], session: AsyncSession) -> None:
        await session.execute(insert(own).values(id=1, sku="a", sold=1))
        await session.commit()
        raise LookupError("no such product")

    with pytest.raises(WritesStockFailed) as failed:
        await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)))], [write])
    assert isinstance(failed.value.__cause__, LookupError)
    assert await count(ledger, own) == 0
    assert (await row(ledger)).available == 10
    newest = await ledger.partition(0)
    assert newest is not None
    assert newest.applied == 0
    await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)))])
    await assert_sound(ledger)


async def test_writes_stock_is_called_for_what_enters_through_sql(ledger: SqlLedger) -> None:
    seen: list[Movement] = []

    async def write(moves: Sequence[Movement], session: AsyncSession) -> None:
        seen.extend(moves)

    await ledger.enter(0, 1, [entering("restock", "po-2", ("a", 3), order="x")], [write])
    assert [(m.kind, m.available, m.order, m.position) for m in seen] == [("restock", 3, "x", (0, 0, 2))]


async def test_writes_stock_that_ends_the_ledgers_transaction_is_named_and_the_books_stay_whole(ledger: SqlLedger) -> None:
    async def write(moves: Sequence[Movement], session: AsyncSession) -> None:
        await (await session.connection()).commit()

    with pytest.raises(Exception, match="transaction"):
        await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)))], [write])
    await assert_sound(ledger)
    newest = await ledger.partition(0)
    assert newest is not None
    assert (await row(ledger)).available == 10 - newest.applied


# Faults


class Crash(BaseException):
    """Not an Exception: nothing in the ledger may catch it."""


async def test_a_crash_in_the_middle_leaves_nothing(ledger: SqlLedger) -> None:
    async def crash(moves: Sequence[Movement], session: AsyncSession) -> None:
        raise Crash

    batch = [entry(1, op("reserve", "r-1", ("a", 1), task={"name": "t"})), entry(2, op("deduct", "o-1", ("a", 99)))]
    with pytest.raises(Crash):
        await ledger.apply(0, 1, batch, [crash])
    assert await statuses(ledger, 1) == []
    assert await ledger.reservation(key_of(M, "r-1")) is None
    assert await ledger.pending_voids(0, 1) == []
    assert await ledger.due_tasks(10) == []
    assert (await row(ledger)).version == 1
    await assert_sound(ledger)


async def test_a_cancelled_apply_leaves_nothing_and_the_ledger_goes_on(ledger: SqlLedger) -> None:
    inside = asyncio.Event()

    async def hang(moves: Sequence[Movement], session: AsyncSession) -> None:
        inside.set()
        await asyncio.Event().wait()

    batch = [entry(1, op("deduct", "o-1", ("a", 1)))]
    task = asyncio.create_task(ledger.apply(0, 1, batch, [hang]))
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await row(ledger)).available == 10
    # Cancelled at every step of the way, wherever it was awaiting the database.
    for turns in range(0, 60, 3):
        task = asyncio.create_task(ledger.apply(0, 1, batch))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() or task.exception() is None
    await ledger.apply(0, 1, batch)
    assert (await row(ledger)).available == 9
    await assert_sound(ledger)


async def test_a_stock_row_that_somebody_else_changed_is_noticed(ledger: SqlLedger) -> None:
    stock = ledger.tables.stock
    async with ledger.engine.begin() as connection:
        await connection.execute(update(stock).where(stock.c.sku == "a").values(available=11, supplied=11))
    assert any("sku 'a'" in words for words in await ledger.verify())


@pytest.mark.parametrize(
    ("table", "values"),
    [
        ("change", {"available_before": 3}),
        ("change", {"version": 7}),
        ("change", {"quantity": 4}),
        ("operation", {"status": "rejected"}),
        ("reservation", {"state": "released"}),
        ("reservation_line", {"open": 0, "released": 2}),
        ("partition", {"applied": 9}),
    ],
)
async def test_verify_names_what_was_tampered_with(ledger: SqlLedger, table: str, values: dict[str, Any]) -> None:
    await ledger.apply(0, 1, [entry(1, op("reserve", "r-1", ("a", 2)))])
    await assert_sound(ledger)
    chosen = getattr(ledger.tables, table)
    statement = update(chosen).values(**values)
    if table in ("change", "operation", "partition"):
        statement = statement.where(chosen.c.epoch == 1)
    async with ledger.engine.begin() as connection:
        await connection.execute(statement)
    assert await ledger.verify() != []


async def test_a_row_that_did_not_move_as_asked_rolls_the_batch_back(ledger: SqlLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    bulk = type(ledger._store.bulk)
    add = bulk.add

    async def misplace(self: Any, connection: Any, table: Any, keys: Any, columns: Any, rows: Any, names: Any) -> Any:
        # One unit less sold, one more available: every CHECK of the table still holds.
        wrong = [(*row[:2], row[2] + 1, row[3], row[4] - 1, *row[5:]) for row in rows]
        return await add(self, connection, table, keys, columns, wrong, names)

    monkeypatch.setattr(bulk, "add", misplace)
    with pytest.raises(QuantityMismatch):
        await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 2)))])
    monkeypatch.undo()
    assert await counters(ledger) == (10, 0, 0, 10, 0)
    await assert_sound(ledger)


@pytest.mark.parametrize("fault", ["lost", "doubled", "wrong"])
async def test_a_batch_whose_change_rows_are_not_its_movements_is_refused_whole(
    ledger: SqlLedger, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    move, change = Verdicts._move, _Entering._change

    def spoil(rows: list[tuple[Any, ...]]) -> None:
        last = rows.pop()
        at = CHANGE.index("available_delta")
        rows += {"lost": [], "doubled": [last, last], "wrong": [(*last[:at], last[at] + 1, *last[at + 1 :])]}[fault]

    def spoilt(verdicts: Verdicts, *arguments: Any) -> bool:
        moved = move(verdicts, *arguments)
        spoil(verdicts.changes)
        return moved

    def spoilt_entering(work: _Entering, *arguments: Any) -> None:
        change(work, *arguments)
        spoil(work.changes)

    monkeypatch.setattr(Verdicts, "_move", spoilt)
    monkeypatch.setattr(_Entering, "_change", spoilt_entering)
    with pytest.raises(QuantityMismatch, match="sku 'a'"):
        await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 2)))])
    with pytest.raises(QuantityMismatch, match="sku 'a'"):
        await restock(ledger, "po-2", ("a", 1))
    monkeypatch.undo()
    assert await counters(ledger) == (10, 0, 0, 10, 0)
    await assert_sound(ledger)
    await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 2)))])
    assert (await row(ledger)).available == 8


# Decisions


async def test_the_first_verdict_on_a_pinned_hold_stands(ledger: SqlLedger) -> None:
    assert await ledger.decide("k-1", "aborted") == "aborted"
    assert await ledger.decide("k-1", "committed") == "aborted"
    async with ledger.engine.begin() as connection:
        assert await ledger.decide("k-1", "committed", connection) == "aborted"
        assert await ledger.decide("k-2", "committed", connection) == "committed"
        await connection.rollback()
    assert await ledger.decide("k-2", "aborted") == "aborted"


# Tasks


def tasked(name: str, sku: str = "a", order: str = "", **arguments: Any) -> JournalOperation:
    return op("deduct", name, (sku, 1), order=order, task={"name": "ship", "version": 2, "arguments": arguments})


async def test_a_task_is_written_with_its_operation_and_a_refused_one_has_none(ledger: SqlLedger) -> None:
    done = await ledger.apply(0, 1, [entry(1, tasked("o-1", who="é"), tasked("o-1"), tasked("o-2", "none"))])
    assert done.tasks == 1
    (task,) = await ledger.due_tasks(10)
    assert (task.name, task.version, json.loads(task.arguments), task.group) == ("ship", 2, {"who": "é"}, "o-1")
    assert (task.operation_id, task.merchant, task.attempts) == ("o-1", M, 0)
    receipt = json.loads(task.receipt)
    assert (receipt["operation_id"], receipt["lines"], receipt["position"]) == ("o-1", [key_of(M, "a"), 1], [0, 1, 1])


async def test_tasks_of_an_order_run_one_after_another_and_a_dead_one_lets_the_next_pass(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, tasked("o-1", order="x"), tasked("o-2", order="x"), tasked("o-3", order="y"))])
    first, third = await ledger.due_tasks(10)
    assert (first.operation_id, third.operation_id) == ("o-1", "o-3")
    await ledger.fail_task(first, "boom \x00", 3600)
    assert [each.operation_id for each in await ledger.due_tasks(10)] == ["o-3"]
    await ledger.fail_task(first, "boom again", None)
    assert [each.operation_id for each in await ledger.due_tasks(10)] == ["o-2", "o-3"]
    ((dead, error),) = await ledger.dead_tasks()
    assert (dead.operation_id, dead.attempts, error) == ("o-1", 2, "boom again")


async def test_what_is_due_is_found_behind_any_number_of_blocked_ones(ledger: SqlLedger) -> None:
    await restock(ledger, "po-2", ("a", 100))
    blocked = [tasked(f"x-{number}", order="x") for number in range(40)]
    await ledger.apply(0, 1, [entry(1, *blocked[:7], tasked("o-1"), *blocked[7:], tasked("o-2"), tasked("o-3"))])
    assert [each.operation_id for each in await ledger.due_tasks(4)] == ["x-0", "o-1", "o-2", "o-3"]
    assert [each.operation_id for each in await ledger.due_tasks(2)] == ["x-0", "o-1"]
    (head, *_) = await ledger.due_tasks(1)
    await ledger.fail_task(head, "boom", 3600)
    assert [each.operation_id for each in await ledger.due_tasks(2)] == ["o-1", "o-2"]


async def test_a_task_and_its_mark_are_one_transaction(ledger: SqlLedger, own: Table) -> None:
    await ledger.apply(0, 1, [entry(1, tasked("o-1"))])
    (task,) = await ledger.due_tasks(1)

    async def fail(task: Task, session: AsyncSession) -> None:
        await session.execute(insert(own).values(id=1, sku="a", sold=1))
        await session.commit()
        raise LookupError("later")

    async def work(task: Task, session: AsyncSession) -> None:
        await session.execute(insert(own).values(id=1, sku="a", sold=1))

    with pytest.raises(LookupError):
        await ledger.run_tasks([task], fail)
    assert await count(ledger, own) == 0
    assert [run.error for run in await ledger.run_tasks([task], work)] == [None]
    assert await ledger.run_tasks([task], work) == []
    assert await count(ledger, own) == 1
    assert await ledger.due_tasks(1) == []


async def test_a_task_that_another_worker_runs_is_skipped(ledger: SqlLedger, database: str) -> None:
    await ledger.apply(0, 1, [entry(1, tasked("o-1"))])
    (task,) = await ledger.due_tasks(1)
    other = SqlLedger(database, prefix=ledger.tables.prefix)
    ran: list[str] = []

    async def mine(task: Task, session: AsyncSession) -> None:
        ran.append("mine")
        if ledger.engine.dialect.name != "sqlite":
            assert await other.run_tasks([task], theirs) == []

    async def theirs(task: Task, session: AsyncSession) -> None:
        ran.append("theirs")

    try:
        assert await ledger.run_tasks([task], mine)
        assert await other.run_tasks([task], theirs) == []
    finally:
        await other.close()
    assert ran == ["mine"]


# Engines


async def test_an_engine_of_the_user_is_used_and_left_open(ledger: SqlLedger, database: str) -> None:
    engine = create_async_engine(database, isolation_level=None if database.startswith("sqlite") else "REPEATABLE READ")
    try:
        theirs = SqlLedger(engine, prefix=ledger.tables.prefix)
        await theirs.start()
        await theirs.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)))])
        await theirs.close()
        async with engine.connect() as connection:
            assert (await connection.execute(text("SELECT 1"))).scalar() == 1
    finally:
        await engine.dispose()
    assert (await row(ledger)).available == 9


def test_one_ledger_serves_several_event_loops(database: str, namespace: str) -> None:
    shared = SqlLedger(database, prefix=f"{namespace}_")

    async def first() -> None:
        await shared.create_schema()
        await open_epoch(shared, 0)
        await restock(shared, "po-1", ("a", 10))
        await shared.close()

    async def second() -> int:
        try:
            await shared.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)))])
            return (await row(shared)).available
        finally:
            await shared.close()

    async def clean() -> None:
        async with shared.engine.begin() as connection:
            await connection.run_sync(shared.tables.metadata.drop_all)
        await shared.close()

    try:
        asyncio.run(first())
        assert asyncio.run(second()) == 9
    finally:
        asyncio.run(clean())


async def test_a_worker_is_shown_the_tasks_of_its_route_and_the_others_still_hold_up_their_order(ledger: SqlLedger) -> None:
    def routed(name: str, route: str, order: str = "") -> JournalOperation:
        task = {"name": "ship", "gray": {"merchant": M, "sides": [["link", M, route, 3]]}, **({"route": route} if route else {})}
        return op("deduct", name, ("a", 1), order=order, task=task)

    async def shown(*routes: str, **others: tuple[str, ...]) -> list[str]:
        return [each.operation_id for each in await ledger.due_tasks(10, TaskFilter(routes, **others))]

    rows = [routed("o-1", "candidate", "x"), routed("o-2", "stable", "x"), routed("o-3", "stable", "y"), routed("o-4", "")]
    await ledger.apply(0, 1, [entry(1, *rows)])
    assert await shown("candidate") == ["o-1"]
    assert await shown("stable", "") == ["o-3", "o-4"]
    assert await shown("stable", "", also=(M,)) == ["o-1", "o-3", "o-4"]
    assert await shown("candidate", but_not=(M,)) == await shown() == []
    (first, *_) = await ledger.due_tasks(10)
    assert json.loads(first.receipt)["gray"]["sides"] == [["link", M, "candidate", 3]]
