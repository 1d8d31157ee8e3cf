"""What the management pages read, on three databases: searches in pages, an operation's life, later-functions that failed, the audit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, text

from inventory_sdk.ledger.pages import Counters, Moment
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.model import Position, key_of
from tests.integration import test_ledger_contract as kit
from tests.integration.test_ledger_contract import M, entry, op, tasked

database, empty, ledger = kit.database, kit.empty, kit.ledger

HOSTILE = "<script>alert(1)</script>'\"; DROP TABLE stock;--%_\\ é😀"


async def all_pages(ask: Any, cursor: str, **filters: Any) -> list[list[Any]]:
    pages, at = [], None
    while True:
        page = await ask(**filters, **{cursor: at})
        pages.append(list(page.rows))
        if page.next is None:
            return pages
        at = page.next


async def test_operations_of_a_merchant_come_newest_first_and_each_on_one_page(ledger: SqlLedger) -> None:
    entries = [entry(n, *(op("deduct", f"o-{n}-{i}", ("a", 1), order=f"order-{n % 2}") for i in range(3))) for n in (1, 2, 3)]
    await ledger.apply(0, 1, entries)
    pages = await all_pages(ledger.pages.operations, "before", merchant=M, limit=4)
    assert [len(page) for page in pages] == [4, 4, 2]
    found = [row for page in pages for row in page]
    assert sorted(found, key=lambda row: (row.at_ms, row.position, row.index), reverse=True) == found
    assert len({row.key for row in found}) == 10  # nine sales, and the restock that the fixture made
    assert {row.key for row in found} >= {key_of(M, f"o-{n}-{i}") for n in (1, 2, 3) for i in range(3)}


async def test_rows_that_arrive_meanwhile_neither_repeat_nor_hide_any(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(n, op("deduct", f"o-{n}", ("a", 1), order="x")) for n in (1, 2, 3, 4)])
    first = await ledger.pages.operations(order="x", limit=2)
    await ledger.apply(0, 1, [entry(5, op("deduct", "o-5", ("a", 1), order="x"))])
    second = await ledger.pages.operations(order="x", limit=2, before=first.next)
    assert [row.key for row in (*first.rows, *second.rows)] == [key_of(M, f"o-{n}") for n in (4, 3, 2, 1)]
    assert second.next is None


async def test_an_order_is_found_without_its_merchant_and_not_under_another(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("reserve", "r-1", ("a", 1), order="order 7/ö"), op("deduct", "o-1", ("a", 1), order="8"))])
    assert [row.key for row in (await ledger.pages.operations(order="order 7/ö")).rows] == [key_of(M, "r-1")]
    assert [row.key for row in (await ledger.pages.operations(order="order 7/ö", merchant=M)).rows] == [key_of(M, "r-1")]
    assert (await ledger.pages.operations(order="order 7/ö", merchant="other")).rows == []
    with pytest.raises(ValueError, match="of a merchant, or of an order"):
        await ledger.pages.operations()


async def test_an_id_is_found_with_and_without_its_merchant(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 1)))])
    for merchant in (M, None):
        (row,) = await ledger.pages.named("o-1", merchant)
        assert (row.key, row.position) == (key_of(M, "o-1"), Position(0, 1, 1))
    assert await ledger.pages.named("o-1", "other") == []
    assert await ledger.pages.named("é" * 1000) == []


async def test_a_refused_operation_is_found_by_its_id_too_behind_the_one_that_has_it(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 99)), op("deduct", "o-2", ("a", 98)))])
    for merchant in (M, None):
        (row,) = await ledger.pages.named("o-1", merchant)
        assert (row.key, row.status, row.position, row.index) == (key_of(M, "o-1"), "rejected", Position(0, 1, 1), 0)
    await ledger.apply(0, 1, [entry(2, op("deduct", "o-1", ("a", 1)))])
    assert [(row.status, row.position) for row in await ledger.pages.named("o-1", M)] == [
        ("applied", Position(0, 1, 2)),
        ("rejected", Position(0, 1, 1)),
    ]
    assert await ledger.pages.named("o-1", "other") == []


async def test_products_are_listed_by_merchant_or_by_the_beginning_of_their_name(ledger: SqlLedger) -> None:
    lines = [("sku-1", 1), ("sku-2", 1), ("sku-10", 1), (HOSTILE, 1), ("sku\U0010ffff", 1)]
    await kit.restock(ledger, "po-2", *lines)
    pages = await all_pages(ledger.pages.products, "after", merchant=M, limit=3)
    assert [row.sku for page in pages for row in page] == sorted([*(sku for sku, _ in lines), "a", "b"], key=str.encode)
    pages = await all_pages(ledger.pages.products, "after", prefix="sku-", limit=2)
    assert [[row.sku for row in page] for page in pages] == [["sku-1", "sku-10"], ["sku-2"]]
    assert [row.sku for row in (await ledger.pages.products(prefix="sku\U0010ffff")).rows] == ["sku\U0010ffff"]
    assert [row.sku for row in (await ledger.pages.products(prefix=HOSTILE[:20])).rows] == [HOSTILE]
    assert (await ledger.pages.products(merchant=M, prefix="sku%")).rows == []


async def test_every_merchant_is_named_once_however_many_skus_it_has(ledger: SqlLedger) -> None:
    for merchant in ("z", "m2", "ü"):
        made = kit.entering("restock", "po", ("a", 1), ("b", 1))
        lines = tuple(kit.flat(("a", 1), ("b", 1), merchant=merchant))
        await ledger.enter(0, 1, [type(made)("restock", key_of(merchant, "po"), made.fingerprint, lines)])
    assert await ledger.pages.merchants() == [M, "m2", "z", "ü"]
    assert await ledger.pages.merchants(limit=2) == [M, "m2"]
    assert await ledger.pages.merchants(limit=2, after="m2") == ["z", "ü"]


async def test_a_life_has_everything_from_receipt_to_change_rows(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("reserve", "r-1", ("a", 2), ("b", 1), order="x"))])
    await ledger.apply(0, 1, [entry(2, op("confirm", "c-1", ("a", 2), to="r-1"))])
    life = await ledger.pages.life(Position(0, 1, 1), 0)
    assert life is not None
    assert (life.operation.key, life.operation.status, life.operation.order, life.claims) == (key_of(M, "r-1"), "applied", "x", True)
    assert life.entry is not None
    assert (life.entry.nonce, life.entry.operations, life.passed) == ("nonce-1-1", 1, 2)
    assert [(row.sku, row.quantity, row.delta) for row in life.changes] == [
        ("a", 2, Counters(-2, 2, 0, 0, 0)),
        ("b", 1, Counters(-1, 1, 0, 0, 0)),
    ]
    assert life.changes[0].before == Counters(10, 0, 0, 10, 0)
    assert life.changes[0].after == Counters(8, 2, 0, 10, 0)
    assert life.reservation is not None
    assert life.reservation.lines[:5] == (key_of(M, "a"), 2, 0, 2, 0)
    assert [row.key for row in life.relatives] == [key_of(M, "c-1")]
    ending = await ledger.pages.life(Position(0, 1, 2), 0)
    assert ending is not None
    assert [row.key for row in ending.relatives] == [key_of(M, "r-1")]
    assert await ledger.pages.life(Position(0, 1, 3), 0) is None


async def test_a_life_of_what_entered_through_the_ledger_has_its_credit(ledger: SqlLedger) -> None:
    ((row,),) = await all_pages(ledger.pages.operations, "before", merchant=M)
    life = await ledger.pages.life(row.position, row.index)
    assert life is not None
    assert [(each.sku, each.quantity, each.state) for each in life.credits] == [("a", 10, "pending"), ("b", 5, "pending")]


async def test_a_life_of_a_refused_operation_has_its_void_and_no_changes(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, op("deduct", "o-1", ("a", 11)))])
    life = await ledger.pages.life(Position(0, 1, 1), 0)
    assert life is not None
    assert (life.operation.status, life.claims, life.changes) == ("rejected", False, [])
    assert life.void is not None
    assert (life.void.deltas, life.void.freeze, life.void.state) == ([key_of(M, "a"), 11, 0], True, "pending")


async def test_what_moved_a_sku_says_which_operation_did(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(n, op("deduct", f"o-{n}", ("a", 1))) for n in (1, 2, 3)])
    first = await ledger.pages.changes(M, "a", limit=3)
    assert [(row.version, row.operation_id, row.kind) for row in first.rows] == [
        (4, "o-3", "deduct"),
        (3, "o-2", "deduct"),
        (2, "o-1", "deduct"),
    ]
    last = await ledger.pages.changes(M, "a", limit=3, before=first.next)
    assert [(row.operation_id, row.after.available) for row in last.rows] == [("po-1", 10)]
    assert last.next is None


async def test_a_dead_later_function_is_listed_and_due_again_when_it_is_retried(ledger: SqlLedger) -> None:
    await ledger.apply(0, 1, [entry(1, tasked("o-1"), tasked("o-2"), tasked("o-3"))])
    tasks = await ledger.due_tasks(10)
    for task in tasks[:2]:
        await ledger.fail_task(task, f"boom {HOSTILE}", None)
    assert await ledger.pages.waiting_tasks() == (1, 2)
    assert await ledger.pages.waiting_tasks(most=1) == (1, 1)
    pages = await all_pages(ledger.pages.dead_tasks, "before", limit=1)
    assert [[row.task.operation_id for row in page] for page in pages] == [["o-2"], ["o-1"]]
    (dead,) = pages[1]
    assert (dead.state, dead.task.attempts, dead.error) == ("dead", 1, f"boom {HOSTILE}")
    assert await ledger.pages.retry_task(dead.task.number)
    assert not await ledger.pages.retry_task(dead.task.number)
    assert not await ledger.pages.retry_task(tasks[2].number)
    again = await ledger.due_tasks(10)
    assert [(task.operation_id, task.attempts) for task in again] == [("o-1", 0), ("o-3", 0)]
    life = await ledger.pages.life(Position(0, 1, 1), 0)
    assert life is not None
    assert [(row.task.name, row.state, row.error) for row in life.tasks] == [("ship", "pending", f"boom {HOSTILE}")]


async def test_an_act_is_written_down_before_it_is_done_and_its_outcome_only_once(ledger: SqlLedger) -> None:
    first = await ledger.pages.begin_act("ann", "kill", details={"link": HOSTILE, "why": "it sells twice"})
    second = await ledger.pages.begin_act("bob", "reopen", merchant=M, sku="a", details={})
    newest, oldest = (await ledger.pages.audit()).rows
    assert (newest.number, newest.actor, newest.kind, newest.merchant, newest.sku, newest.outcome) == (
        second,
        "bob",
        "reopen",
        M,
        "a",
        "begun",
    )
    assert (oldest.number, oldest.details, oldest.outcome) == (first, {"link": HOSTILE, "why": "it sells twice"}, "begun")
    await ledger.pages.end_act(first, "failed: \x00 away")
    await ledger.pages.end_act(first, "done")
    pages = await all_pages(ledger.pages.audit, "before", limit=1)
    assert [[row.outcome for row in page] for page in pages] == [["begun"], ["failed: \ufffd away"]]
    assert oldest.at_ms > 1_600_000_000_000


async def test_audit_rows_that_other_parts_wrote_are_shown_as_they_are(ledger: SqlLedger) -> None:
    values = {"merchant": M, "kind": "correct", "actor": "ann", "created_ms": 1}
    async with ledger.engine.begin() as connection:
        for details in (json.dumps({"reason": "counted"}), json.dumps([1]), "plain words"):
            await connection.execute(insert(ledger.tables.audit).values(**values, details=details))
    found = (await ledger.pages.audit()).rows
    assert [dict(row.details) for row in found] == [{"text": "plain words"}, {"text": [1]}, {"reason": "counted"}]


PAGED = {
    "of a merchant": {"merchant": M, "before": Moment(2, 0, 1, 1, 0)},
    "of an order": {"order": "x", "before": Moment(2, 0, 1, 1, 0)},
}


@pytest.mark.parametrize("filters", PAGED.values(), ids=PAGED)
async def test_a_page_of_operations_walks_an_index_and_sorts_at_most_one_millisecond(filters: dict[str, Any], tmp_path: Path) -> None:
    # On SQLite, whose plan does not depend on how many rows there are; benchmarks/pages.py measures the others.
    ledger = SqlLedger(f"sqlite+aiosqlite:///{tmp_path / 'stock.db'}")
    await ledger.create_schema()
    query = ledger.pages._listed(filters.get("merchant"), filters.get("order"), 50, filters["before"])
    shown = query.compile(ledger.engine.sync_engine, compile_kwargs={"literal_binds": True})
    async with ledger.engine.connect() as connection:
        plan = [row[3] for row in await connection.execute(text(f"EXPLAIN QUERY PLAN {shown}"))]
    await ledger.close()
    assert "USING INDEX" in plan[0]
    assert "at_ms<" in plan[0]
    assert len(plan) == 1 or re.search("FOR (LAST 4 TERMS|RIGHT PART) OF ORDER BY", plan[1])
