"""``@inventory.verifies``: what a function reports itself, how it is told of, and what is refused at decoration."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, String, Table
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from inventory_sdk import Change, InvalidOperation, Inventory, Line, QuantityMismatch, WatchedTables, record_change
from inventory_sdk.ledger.apply import verify_changes
from inventory_sdk.ledger.decide import CHANGE, Stock
from inventory_sdk.metrics import Happened
from inventory_sdk.quantities import differences

LINES = {"a": 1, "b": 2}
FAULTS: list[tuple[str, list[tuple[str, int, int | None]], str]] = [
    ("wrong", [("a", -1, -1), ("b", -3, -3)], "sku 'b', moved: expected -2, found -3"),
    ("missing", [("a", -1, -1)], "sku 'b', moved: expected -2, found 0"),
    ("doubled", [("a", -1, -1), ("b", -2, -2), ("b", -2, -2)], "sku 'b', moved: expected -2, found -4"),
    ("extra", [("a", -1, -1), ("b", -2, -2), ("c", -1, -1)], "sku 'c', moved: expected 0, found -1"),
    ("wrong row", [("a", -1, -1), ("b", -2, -1)], "sku 'b', change log: expected -2, found -1"),
    ("no row", [("a", -1, -1), ("b", -2, None)], "sku 'b', change log: expected -2, found 0"),
]


class Heard:
    """A metrics sink."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def record(self, event: Any) -> None:
        self.events.append(event)

    @property
    def mismatches(self) -> list[Mapping[str, str]]:
        return [event.labels for event in self.events if isinstance(event, Happened) and event.name == "mismatch"]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def inventory(heard: Heard) -> Inventory:
    """Never started: verification needs no stock."""
    return Inventory("memory://", metrics=[heard])


def test_the_rule_names_every_difference_those_expected_first() -> None:
    assert differences({"a": 1, "b": 2}, {"c": 3, "b": 2, "d": 0}) == [("a", 1, 0), ("c", 0, 3)]
    assert differences({}, {}) == []


@pytest.mark.parametrize(("fault", "changes", "said"), FAULTS, ids=[fault for fault, *_ in FAULTS])
@pytest.mark.parametrize("way", ["recorded", "returned", "picked"])
async def test_what_is_not_exact_is_refused(inventory: Inventory, fault: str, changes: Any, said: str, way: str) -> None:
    ways: dict[str, Any] = {"recorded": "recorded", "returned": "returned", "picked": iter}

    @inventory.verifies(lines="lines", changes=ways[way])
    async def take(lines: Mapping[str, int], changes: Any) -> list[Change]:
        if way == "recorded":
            for sku, moved, logged in changes:
                record_change(sku, moved=moved)
                if logged is not None:
                    record_change(sku, logged=logged)
            return []
        return [Change(sku, moved, logged) for sku, moved, logged in changes]

    with pytest.raises(QuantityMismatch, match=said):
        await take(LINES, changes)
    exact = [("a", -1, -1), ("b", -2, -2)]
    assert len(await take(LINES, exact)) == (0 if way == "recorded" else 2)
    assert await take(LINES, [("b", -1, -1), *exact[:1], ("b", -1, -1)]) is not None


async def test_a_failure_that_was_swallowed_is_refused(inventory: Inventory) -> None:
    @inventory.verifies(lines="lines")
    async def take(lines: Mapping[str, int]) -> None:
        for sku, units in lines.items():
            try:
                if sku == "b":
                    raise LookupError(sku)
                record_change(sku, moved=-units, logged=-units)
            except LookupError:
                continue

    with pytest.raises(QuantityMismatch, match="sku 'b'"):
        await take(LINES)


async def test_lines_are_read_before_the_function_can_change_them(inventory: Inventory) -> None:
    @inventory.verifies(lines="lines")
    async def take(lines: dict[str, int]) -> None:
        record_change("a", moved=-1, logged=-1)
        del lines["b"]

    with pytest.raises(QuantityMismatch, match="sku 'b'"):
        await take(dict(LINES))


async def test_the_same_sku_twice_is_summed_and_other_merchants_are_told_apart(inventory: Inventory) -> None:
    @inventory.verifies(lines="lines", merchant="shop", by=1, log="unsigned")
    async def receive(shop: str, lines: Sequence[Line], there: int) -> None:
        record_change("a", moved=5, logged=5)
        record_change("a", moved=there, logged=there, merchant="m2")

    await receive("m1", [Line("a", 2), Line("a", 3), Line("a", 7, "m2")], 7)
    with pytest.raises(QuantityMismatch, match=r"merchant 'm2', sku 'a', moved: expected 7, found 6"):
        await receive("m1", [Line("a", 2), Line("a", 3), Line("a", 7, "m2")], 6)


async def test_counted_lines_may_go_both_ways(inventory: Inventory) -> None:
    @inventory.verifies(lines="lines", by=1)
    async def count(lines: Sequence[Line]) -> None:
        for line in lines:
            record_change(line.sku, moved=line.quantity, logged=line.quantity)

    await count([Line("a", -2), Line("b", 3)])


async def test_a_service_without_a_change_log_says_so(inventory: Inventory) -> None:
    @inventory.verifies(sku="sku", quantity=1, log=None)
    async def take(sku: str, moved: int) -> None:
        record_change(sku, moved=moved)

    await take("a", -1)
    with pytest.raises(QuantityMismatch):
        await take("a", -2)


async def test_what_gathered_tasks_record_counts_and_what_comes_too_late_is_an_error(inventory: Inventory) -> None:
    late = asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def write(sku: str, units: int) -> None:
        record_change(sku, moved=-units, logged=-units)

    async def write_late() -> None:
        await late.wait()
        record_change("a", moved=-1)

    @inventory.verifies(lines="lines")
    async def take(lines: Mapping[str, int]) -> None:
        await asyncio.gather(*[write(sku, units) for sku, units in lines.items()])
        tasks.append(asyncio.create_task(write_late()))

    await take(LINES)
    late.set()
    with pytest.raises(InvalidOperation, match="comes too late"):
        await tasks[0]


async def test_a_verified_call_within_one_counts_there_only_if_it_ended_well(inventory: Inventory) -> None:
    @inventory.verifies(sku="sku", quantity=1)
    async def one(sku: str, fails: bool = False) -> None:
        record_change(sku, moved=-1, logged=-1)
        if fails:
            raise LookupError(sku)

    @inventory.verifies(lines="lines")
    async def all_of(lines: Mapping[str, int]) -> None:
        for sku in lines:
            try:
                await one(sku, fails=sku == "b")
            except LookupError:
                await one(sku)

    await all_of({"a": 1, "b": 1})


async def test_without_a_verified_call_around_it_recording_does_nothing() -> None:
    record_change("a", moved=-1)
    with pytest.raises(InvalidOperation, match=r"moved=1\.5"):
        record_change("a", moved=1.5)  # type: ignore[arg-type]
    with pytest.raises(InvalidOperation, match="moved=, logged= or both"):
        record_change("a")


async def test_a_function_that_raises_keeps_its_own_error(inventory: Inventory, heard: Heard) -> None:
    @inventory.verifies(lines="lines")
    async def take(lines: Mapping[str, int]) -> None:
        raise LookupError("its own")

    with pytest.raises(LookupError, match="its own"):
        await take(LINES)
    assert heard.mismatches == []


@pytest.mark.parametrize("mode", ["enforce", "observe"])
async def test_each_mismatch_is_counted_and_told_once(inventory: Inventory, heard: Heard, mode: Any) -> None:
    told: list[Mapping[str, Any]] = []

    @inventory.on("mismatch")
    async def note(facts: Mapping[str, Any]) -> None:
        told.append(facts)
        raise RuntimeError("the handler's own trouble")

    @inventory.verifies(lines="lines", mode=mode)
    async def take(lines: Mapping[str, int]) -> str:
        return "done"

    if mode == "enforce":
        with pytest.raises(QuantityMismatch):
            await take({"a": 1})
    else:
        assert await take({"a": 1}) == "done"
    assert [labels["reason"] for labels in heard.mismatches] == [mode]
    assert [facts["mismatches"] for facts in told] == [
        (("merchant 'default', sku 'a', moved", -1, 0), ("merchant 'default', sku 'a', change log", -1, 0))
    ]
    assert told[0]["function"].endswith("take")


async def test_a_cancelled_call_is_cancelled_and_not_judged(inventory: Inventory, heard: Heard) -> None:
    begun = asyncio.Event()

    @inventory.verifies(lines="lines")
    async def take(lines: Mapping[str, int]) -> None:
        begun.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(take(LINES))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert heard.mismatches == []


async def test_a_recorded_function_that_commits_itself_is_refused_before_the_commit(inventory: Inventory, tmp_path: Any) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    table = Table("stock", MetaData(), Column("sku", String, primary_key=True), Column("units", Integer))
    async with engine.begin() as connection:
        await connection.run_sync(table.metadata.create_all)

    @inventory.verifies(lines="lines", by=1, session="session")
    async def receive(session: AsyncSession, lines: Mapping[str, int], moved: int) -> None:
        async with session.begin():
            await session.execute(table.insert().values(sku="a", units=moved))
            record_change("a", moved=moved, logged=moved)

    async with AsyncSession(engine) as session:
        with pytest.raises(QuantityMismatch):
            await receive(session, {"a": 1}, 2)
        await receive(session, {"a": 3}, 3)
        assert (await session.execute(table.select())).all() == [("a", 3)]
    with pytest.raises(InvalidOperation, match="must be an AsyncSession"), Session(engine.sync_engine) as sync:
        await receive(sync, {"a": 1}, 1)  # type: ignore[arg-type]
    await engine.dispose()


TABLE = Table("stock", MetaData(), Column("sku", String), Column("units", Integer))
LOG = Table("changes", MetaData(), Column("sku", String), Column("units", Integer))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "say what must move"),
        ({"lines": "no_such"}, "no_such"),
        ({"lines": "lines", "mode": "watch"}, "mode='watch'"),
        ({"lines": "lines", "log": "loud"}, "log='loud'"),
        ({"lines": "lines", "by": 0}, "by=0"),
        ({"lines": "lines", "by": {"units": -1}}, "with changes=WatchedTables"),
        ({"lines": "lines", "changes": "guessed"}, "changes='guessed'"),
        ({"lines": "lines", "changes": "returned", "session": "session"}, "not known before its session commits"),
        ({"lines": "lines", "changes": WatchedTables(TABLE, "sku"), "session": "session"}, "needs session= and by="),
        ({"lines": "lines", "changes": WatchedTables(TABLE, "sku"), "by": {"units": -1}}, "needs session= and by="),
        ({"changes": WatchedTables(TABLE, "key"), "session": "session", "by": {"units": -1}}, "sku='key'"),
        ({"changes": WatchedTables(TABLE, "sku"), "session": "session", "by": {"held": -1}}, "by='held'"),
        ({"changes": WatchedTables(object, "sku"), "session": "session", "by": {"units": -1}}, "neither a mapped class"),
        ({"changes": WatchedTables(TABLE, "sku", log=LOG), "session": "session", "by": {"units": -1}}, "log_quantity="),
        (
            {"changes": WatchedTables(TABLE, "sku", log=LOG, log_before="units"), "session": "session", "by": {"units": -1}},
            "log_quantity=",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_at_decoration(inventory: Inventory, options: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):

        @inventory.verifies(**options)
        async def take(lines: Mapping[str, int], session: Any) -> None: ...


def test_one_function_is_verified_once_and_by_one_wrapper(inventory: Inventory) -> None:
    class Service:
        @inventory.lane("core")
        @inventory.verifies(lines="lines")
        @classmethod
        async def take(cls, lines: Mapping[str, int]) -> str:
            for sku, units in lines.items():
                record_change(sku, moved=-units, logged=-units)
            return cls.__name__

    assert asyncio.run(Service.take({"a": 1})) == "Service"
    assert list(inspect.signature(Service.take).parameters) == ["lines"]
    with pytest.raises(TypeError, match="two verify aspects"):
        inventory.verifies(lines="lines")(inventory.verifies(lines="lines")(plain))
    with pytest.raises(TypeError, match="async"):
        inventory.verifies(lines="lines")(lambda lines: None)  # type: ignore[type-var]


async def plain(lines: Mapping[str, int]) -> None: ...


# The ledger's own batches are held against the same rule.


def change(sku: str, version: int, available: int) -> tuple[Any, ...]:
    values = dict.fromkeys(CHANGE, 0) | {"merchant": "m1", "sku": sku, "version": version, "available_delta": available}
    return tuple(values[name] for name in CHANGE)


def stock_row(sku: str, moved: int, times: int) -> Stock:
    row = Stock("m1", sku, (10, 0, 0, 10, 0), 5)
    row.available += moved
    row.version += times
    return row


def test_a_batch_whose_change_rows_say_what_its_stock_rows_moved_is_exact() -> None:
    rows = {"a": stock_row("a", -3, 2), "b": stock_row("b", 0, 0)}
    verify_changes([change("a", 6, -1), change("a", 7, -2)], rows)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([change("a", 6, -1)], "available: expected -1, found -3; .*version: expected 1, found 2"),
        ([change("a", 6, -1), change("a", 7, -3)], "available: expected -4, found -3"),
        ([change("a", 6, -1), change("a", 7, -2), change("a", 8, 0)], "version: expected 3, found 2"),
        ([change("a", 6, -1), change("a", 7, -2), change("c", 1, -1)], "sku 'c', available: expected -1, found 0"),
        ([], "expected 0, found -3"),
    ],
)
def test_a_batch_with_a_wrong_missing_or_extra_change_row_is_refused(changes: list[Any], said: str) -> None:
    with pytest.raises(QuantityMismatch, match=said):
        verify_changes(changes, {"a": stock_row("a", -3, 2)})
