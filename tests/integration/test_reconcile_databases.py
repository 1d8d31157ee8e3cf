"""One scenario, three databases: found, kept, corrected, undone, remembered; and what a snapshot sees."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis
from sqlalchemy import update

from inventory_sdk import Inventory, Line, Movement, OpeningBalance
from inventory_sdk.ledger.accounts import NewRow
from inventory_sdk.ledger.register import OverLimit
from inventory_sdk.model import key_of
from inventory_sdk.reconcile.model import Reconcile
from tests.integration.test_ledger_contract import DATABASES

A = key_of("default", "a")
HOSTILE = ["Ünïcode", "trailing ", "CASE", "case", "'; --", "x" * 128]


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'stock.db'}"
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
async def inventory(database: str, namespace: str) -> AsyncIterator[Inventory]:
    made = Inventory(
        FakeAsyncRedis(),
        database=database,
        namespace=namespace,
        table_prefix=f"{namespace}_",
        metrics=[],
        reconcile=Reconcile(every=None, whole_every=None),
    )
    own: dict[str, int] = {}

    @made.reads_stock
    async def read(merchant: str, skus: Sequence[str], session: Any) -> Iterable[OpeningBalance]:
        return [OpeningBalance(sku, own[sku]) for sku in skus if sku in own]

    @made.writes_stock
    async def write(moves: Sequence[Movement], session: Any) -> None:
        for move in moves:
            own[move.sku] = own.get(move.sku, 0) + move.available

    made.own = own  # type: ignore[attr-defined]
    async with made:
        await made.create_schema()
        try:
            async with made.worker() as worker:
                await worker.ready()
                await made.stock.restock([Line(sku, 10) for sku in ("a", "b", *HOSTILE)], operation_id="po")
                yield made
        finally:
            ledger: Any = made.ledger
            async with ledger.engine.begin() as connection:
                await connection.run_sync(ledger.tables.metadata.drop_all)


async def by_hand(inventory: Inventory, sku: str, units: int) -> None:
    running = inventory._running()
    client: Any = running.client
    await client.hincrby(running.engine.partitions[0].key("available"), key_of("default", sku), units)


async def test_found_kept_corrected_undone_and_found_again(inventory: Inventory) -> None:
    look, stock = inventory.reconciler, inventory.stock
    await stock.reserve([Line("a", 2)], operation_id="r", ttl=60, order="o")
    await stock.deduct([Line("b", 1)], operation_id="d")
    done = await look.run()
    assert (done.clean, done.skus, done.service, done.holds) == (True, 8, 8, 1)
    for number, sku in enumerate(HOSTILE, 1):
        await by_hand(inventory, sku, number)
    await by_hand(inventory, "a", 3)
    inventory.own["b"] -= 2  # type: ignore[attr-defined]
    found = {(each.what, each.sku): each for each in (await look.run()).open}
    assert {key: (each.cause, each.available) for key, each in found.items()} == {
        ("stock", "a"): ("manual_redis", 3),
        ("service", "b"): ("service_table", -2),
        **{("stock", sku): ("manual_redis", number) for number, sku in enumerate(HOSTILE, 1)},
    }
    assert [each.number for each in await look.discrepancies(order="o")] == [found["stock", "a"].number]
    assert [each.sku for each in await look.discrepancies(sku="case")] == ["case"]
    for each in found.values():
        assert (await look.correct(each.number, reason="three databases", who="kim")).state == "corrected"
    assert (await look.run()).clean
    assert inventory.own["b"] == 9  # type: ignore[attr-defined]
    await look.undo(found["stock", "a"].number, reason="no", who="lee")
    again = (await look.run(sku="a")).open
    assert [(each.sku, each.available) for each in again] == [("a", 3)]
    assert [each.kind for each in await look.audit()] == ["undo", *["correct"] * 8]
    assert await inventory.ledger.verify() == []


async def test_what_was_touched_and_what_refusals_and_credits_move_is_known_to_each_database(inventory: Inventory) -> None:
    look, stock = inventory.reconciler, inventory.stock
    await inventory.settled()
    await look.run(touched=True)
    await stock.deduct([Line("a", 1)], operation_id="d")
    await stock.restock([Line("b", 1)], operation_id="po-2")
    await inventory.settled()
    assert (await look.run(touched=True)).skus == 2
    ledger: Any = inventory.ledger
    rows = ledger.tables.stock
    async with ledger.engine.begin() as connection:
        await connection.execute(update(rows).where(rows.c.sku == "CASE").values(available=0, sold=10))
    before = (await inventory._running().engine.partitions[0].hello()).sequence
    await stock.deduct([Line("CASE", 4)], operation_id="refused")
    await stock.restock([Line("a", 1)], operation_id="po-3")
    await inventory.settled()
    async with ledger.engine.begin() as connection:
        await connection.execute(update(rows).where(rows.c.sku == "CASE").values(available=10, sold=0))
    assert (await look.run(touched=True)).clean
    async with ledger.comparing.snapshot() as shot:
        row = await shot.partition(0)
        moved = await shot.moved(0, 1, before, row.applied)
        sums = {name: sum(each.available for each in moves) for name, moves in moved.items()}
    assert sums[A] == 1  # the credit
    assert sums[key_of("default", "CASE")] in (0, -4)  # refused, and its void if that was applied already
    assert [each.key for each in await ledger.comparing.refused(0, 1)] == [key_of("default", "refused")]


async def test_a_snapshot_sees_one_moment_whatever_is_committed_meanwhile(inventory: Inventory) -> None:
    await inventory.settled()
    ledger: Any = inventory.ledger
    async with ledger.comparing.snapshot() as shot:
        before = (await shot.partition(0)).applied
        await inventory.stock.deduct([Line("a", 1)], operation_id="d")
        await inventory.settled()
        assert (await ledger.partition(0)).applied > before
        assert (await shot.partition(0)).applied == before
        assert (await shot.accounts(0, 1, [A]))[A].available == 10
    assert (await ledger.stock([A]))[0].available == 9


async def test_a_hole_below_the_watermark_is_found_wherever_it_is(inventory: Inventory) -> None:
    for number in range(8):
        await inventory.stock.deduct([Line("a", 1)], operation_id=f"d{number}")
    await inventory.settled()
    ledger: Any = inventory.ledger
    last = (await ledger.partition(0)).applied
    assert await ledger.comparing.gaps(0, 1, 10) == []
    entry = ledger.tables.entry
    async with ledger.engine.begin() as connection:
        for seq in (1, 4, 5, last):
            await connection.execute(entry.delete().where(entry.c.epoch == 1, entry.c.seq == seq))
    # What is applied while it counts must not make up for what is missing.
    later = [{"partition": 0, "epoch": 1, "seq": last + n, "nonce": "n", "at_ms": 1, "operations": 1} for n in range(1, 9)]
    async with ledger.engine.begin() as connection:
        await connection.execute(entry.insert(), later)
    assert await ledger.comparing.gaps(0, 1, 10) == [(1, 1), (4, 5), (last, last)]


async def test_one_subject_has_one_row_however_many_find_it_at_once(inventory: Inventory) -> None:
    ledger: Any = inventory.ledger
    rows = [NewRow("m", f"s{number}", "manual_redis", f"stock\x1fm\x1fs{number}", {"n": 1}) for number in range(20)]
    first = await ledger.register.keep(rows)
    again = await ledger.register.keep([*rows, NewRow("m", "more", "rejected", "stock\x1fm\x1fmore")])
    assert [new for _, new in first] == [True] * 20
    assert [(row.number, new) for row, new in again[:20]] == [(row.number, False) for row, _ in first]
    assert await ledger.register.counted() == {"manual_redis": 20, "rejected": 1}
    assert [row.state for row in await ledger.register.gone([row.number for row, _ in first])] == ["gone"] * 20
    assert await ledger.register.counted() == {"rejected": 1}
    at_once = await asyncio.gather(*(ledger.register.keep(rows) for _ in range(6)))
    assert [sum(new for _, new in each) for each in zip(*at_once, strict=True)] == [1] * 20
    assert len({row.number for each in at_once for row, _ in each}) == 20


async def test_of_two_corrections_at_once_one_is_within_the_limit(inventory: Inventory) -> None:
    register: Any = inventory.ledger.register  # type: ignore[attr-defined]
    rows = [NewRow("m", f"s{number}", "manual_redis", f"stock\x1fm\x1fs{number}") for number in range(6)]
    numbers = [row.number for row, _ in await register.keep(rows, lambda row: [("mine", {"n": row.number})])]

    async def begin(number: int) -> Any:
        audit = {"kind": "correct", "actor": "kim", "operation_id": f"o-{number}", "details": {}, "units": 4}
        letters = [("mine", {"n": -number})]
        return await register.turn(number, ["open"], "correcting", {}, audit, limit=(9, 0), letters=lambda _: letters)

    outcomes = await asyncio.gather(*map(begin, numbers), return_exceptions=True)
    assert sorted(type(each).__name__ for each in outcomes) == ["OverLimit"] * 4 + ["Row"] * 2
    assert {each.units for each in outcomes if isinstance(each, OverLimit)} == {12}
    assert await register.spent("m", 0) == 8
    begun = [number for number, each in zip(numbers, outcomes, strict=True) if not isinstance(each, OverLimit)]
    acts = await register.acts()
    assert acts.under_way == {("m", f"s{numbers.index(number)}") for number in begun}
    # What was refused is not told: the letter went with its transaction.
    told = [letter["n"] for _, _, letter in await register.letters("mine", 20)]
    assert (told[:6], sorted(told[6:])) == (numbers, sorted(-number for number in begun))
    await register.turn(
        begun[0], ["correcting"], "open", {}, {"kind": "refused", "actor": "", "operation_id": f"o-{begun[0]}", "details": {}}
    )
    assert await register.spent("m", 0) == 4


async def test_letters_wait_in_order_until_they_are_delivered(inventory: Inventory) -> None:
    ledger: Any = inventory.ledger
    await ledger.register.post("mine", [{"n": number} for number in range(5)])
    await ledger.register.post("other", [{"n": 9}])
    letters = await ledger.register.letters("mine", 3)
    assert [letter["n"] for _, _, letter in letters] == [0, 1, 2]
    await ledger.register.delivered([number for number, _, _ in letters])
    assert [letter["n"] for _, _, letter in await ledger.register.letters("mine", 10)] == [3, 4]
