"""Undo and keep, and what becomes of an operation whose caller went away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from inventory_sdk import errors
from inventory_sdk.model import LEDGER_DELTAS, Line, Receipt, key_of
from tests.stock_kit import MERCHANT, SERVERS, Shop, lines, shop_on, until


@pytest.fixture(params=SERVERS)
async def shop(request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Shop]:
    async with shop_on(request.param, namespace, {"a": 10, "b": 5}) as shop:
        yield shop


TAKES = pytest.mark.parametrize("how", ["deduct", "reserve", "adjust"])


async def take(shop: Shop, how: str, quantity: int = 4, **options: Any) -> Receipt:
    wanted = [Line("a", -quantity), Line("b", -1)] if how == "adjust" else lines(a=quantity, b=1)
    return await getattr(shop.stock, how)(wanted, **options)


async def levels(shop: Shop) -> tuple[tuple[int, int], tuple[int, int]]:
    return await shop.counters("a"), await shop.counters("b")


UNTOUCHED = ((10, 0), (5, 0))


@TAKES
async def test_an_undo_gives_back_exactly_that_take_and_frees_its_id(shop: Shop, how: str) -> None:
    receipt = await take(shop, how, operation_id="o1")
    assert await shop.stock.undo(receipt)
    assert await levels(shop) == UNTOUCHED
    assert await shop.stock.status("o1") is None
    assert await shop.stock.reservation("o1") is None
    assert await shop.client.zcard(shop.key("expiry")) == 0
    again = await take(shop, how, quantity=3, operation_id="o1")
    assert not again.replayed
    assert (await shop.counters("a"))[0] == 7


@TAKES
async def test_an_undo_is_journaled_as_the_inverse_of_its_take(shop: Shop, how: str) -> None:
    receipt = await take(shop, how, operation_id="o1", order="77")
    await shop.stock.undo(receipt)
    entry = (await shop.journal())[-1].operations[0]
    assert (entry.kind, entry.reference, entry.remaining) == ("undo", key_of(MERCHANT, "o1"), [10, 5])
    assert entry.lines == [key_of(MERCHANT, "a"), 4, key_of(MERCHANT, "b"), 1]
    position = receipt.positions[0]
    assert entry.extra == f'{{"of": "{how}", "position": "{position.epoch}-{position.sequence}"}}'
    assert LEDGER_DELTAS[how].negated().available == 1


@TAKES
async def test_a_second_undo_says_no_and_moves_nothing(shop: Shop, how: str) -> None:
    receipt = await take(shop, how, operation_id="o1")
    answers = await asyncio.gather(shop.stock.undo(receipt), shop.stock.undo(receipt))
    assert answers == [True, False]
    before = await shop.snapshot()
    assert not await shop.stock.undo(receipt)
    assert await shop.snapshot() == before


@TAKES
async def test_the_receipt_of_a_replay_undoes_the_same_take(shop: Shop, how: str) -> None:
    await take(shop, how, operation_id="o1")
    assert await shop.stock.undo(await take(shop, how, operation_id="o1"))
    assert await levels(shop) == UNTOUCHED


@TAKES
async def test_the_old_receipt_does_not_undo_a_take_that_was_made_again(shop: Shop, how: str) -> None:
    old = await take(shop, how, operation_id="o1")
    await shop.stock.undo(old)
    new = await take(shop, how, operation_id="o1")
    before = await shop.snapshot()
    assert not await shop.stock.undo(old)
    assert not await shop.stock.keep(old)
    assert await shop.snapshot() == before
    assert await shop.stock.undo(new)


@TAKES
async def test_a_kept_take_can_not_be_undone(shop: Shop, how: str) -> None:
    receipt = await take(shop, how, operation_id="o1")
    assert await shop.stock.keep(receipt)
    assert await shop.stock.keep(receipt)
    before = await shop.snapshot()
    assert not await shop.stock.undo(receipt)
    assert await shop.snapshot() == before
    assert [entry.operations[0].kind for entry in await shop.journal()] == [how, "keep"]
    assert (await take(shop, how, operation_id="o1")) == replace(receipt, replayed=True)


@TAKES
async def test_an_undone_take_can_not_be_kept(shop: Shop, how: str) -> None:
    receipt = await take(shop, how, operation_id="o1")
    await shop.stock.undo(receipt)
    before = await shop.snapshot()
    assert not await shop.stock.keep(receipt)
    assert await shop.snapshot() == before


@TAKES
async def test_undo_and_keep_in_one_batch_are_decided_by_the_first(shop: Shop, how: str) -> None:
    receipt = await take(shop, how, operation_id="o1")
    assert await asyncio.gather(shop.stock.keep(receipt), shop.stock.undo(receipt)) == [True, False]
    other = await take(shop, how, quantity=1, operation_id="o2")
    assert await asyncio.gather(shop.stock.undo(other), shop.stock.keep(other)) == [True, False]


async def test_a_kept_hold_can_still_be_confirmed_and_released(shop: Shop) -> None:
    for name, how in (("r1", shop.stock.confirm), ("r2", shop.stock.release)):
        receipt = await take(shop, "reserve", operation_id=name)
        await shop.stock.keep(receipt)
        await how(name)
    assert await levels(shop) == ((6, 0), (4, 0))


@pytest.mark.parametrize("how", ["confirm", "release"])
@pytest.mark.parametrize("part", [True, False])
async def test_a_hold_of_which_a_part_is_closed_can_not_be_undone(shop: Shop, how: str, part: bool) -> None:
    receipt = await take(shop, "reserve", operation_id="r1")
    await getattr(shop.stock, how)("r1", lines=lines(a=1) if part else None)
    before = await shop.snapshot()
    assert not await shop.stock.undo(receipt)
    assert await shop.snapshot() == before


async def test_an_expired_hold_can_not_be_undone(shop: Shop) -> None:
    receipt = await take(shop, "reserve", operation_id="r1")
    await shop.expire("r1")
    before = await shop.snapshot()
    assert not await shop.stock.undo(receipt)
    assert await shop.snapshot() == before


async def test_receipts_of_what_is_no_take_undo_nothing(shop: Shop) -> None:
    await take(shop, "reserve", operation_id="r1")
    others = [
        await shop.stock.restock(lines(a=1), operation_id="po"),
        await shop.stock.adjust(lines(a=1), operation_id="count"),
        await shop.stock.confirm("r1", lines=lines(a=1), operation_id="c1"),
        await shop.stock.release("r1", lines=lines(a=1), operation_id="b1"),
    ]
    before = await shop.snapshot()
    for receipt in others:
        assert not await shop.stock.undo(receipt)
    assert await shop.snapshot() == before


async def test_a_receipt_with_other_lines_or_kind_undoes_nothing(shop: Shop) -> None:
    receipt = await take(shop, "deduct", operation_id="o1")
    held = await take(shop, "reserve", operation_id="r1", quantity=2)
    before = await shop.snapshot()
    for forged in (
        replace(receipt, lines=receipt.lines[:1]),
        replace(receipt, lines=tuple(line._replace(quantity=9) for line in receipt.lines)),
        replace(receipt, kind="reserve"),
        replace(held, kind="deduct"),
        replace(receipt, positions=held.positions),
    ):
        assert not await shop.stock.undo(forged)
    assert await shop.snapshot() == before


# Callers that go away --------------------------------------------------------------------------------------------------------


async def leave_before_it_is_sent(shop: Shop, act: Any) -> None:
    task = asyncio.create_task(act)
    asyncio.get_running_loop().call_soon(task.cancel)  # runs behind the task's first step, before the batch's
    with pytest.raises(asyncio.CancelledError):
        await task


class Gate:
    """Holds every call to Redis of this shop; ``sent`` tells that one is there."""

    def __init__(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent, self.open = asyncio.Event(), asyncio.Event()
        self._run = shop.engine.wire.run
        monkeypatch.setattr(shop.engine.wire, "run", self._held)

    async def _held(self, name: str, *arguments: Any) -> Any:
        if name == "batch":
            reply = await self._run(name, *arguments)
            self.sent.set()
            await self.open.wait()
            return reply
        return await self._run(name, *arguments)


@TAKES
async def test_a_caller_who_leaves_before_it_was_sent_moves_nothing(shop: Shop, how: str) -> None:
    before = await shop.snapshot()
    await leave_before_it_is_sent(shop, take(shop, how))
    await leave_before_it_is_sent(shop, take(shop, how, operation_id="o1"))
    await shop.engine.close()
    assert await shop.snapshot() == before


@TAKES
async def test_one_who_leaves_takes_nobody_along(shop: Shop, how: str) -> None:
    leaving = asyncio.create_task(take(shop, how, operation_id="leaving"))
    staying = asyncio.create_task(take(shop, how, operation_id="staying"))
    asyncio.get_running_loop().call_soon(leaving.cancel)
    assert not (await staying).replayed
    assert leaving.cancelled()
    assert (await shop.counters("a"))[0] == 6
    assert await shop.stock.status("leaving") is None


@TAKES
async def test_a_take_with_a_made_up_id_is_undone_when_its_caller_left_after_it_was_sent(
    shop: Shop, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(shop, monkeypatch)
    task = asyncio.create_task(take(shop, how))
    await gate.sent.wait()
    assert (await shop.client.hget(shop.key("available"), key_of(MERCHANT, "a"))) == b"6"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open.set()
    await shop.engine.close()
    assert await levels(shop) == UNTOUCHED
    assert [entry.operations[0].kind for entry in await shop.journal()] == [how, "undo"]


@TAKES
async def test_a_take_with_its_own_id_stands_when_its_caller_left_after_it_was_sent(
    shop: Shop, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(shop, monkeypatch)
    task = asyncio.create_task(take(shop, how, operation_id="o1"))
    await gate.sent.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open.set()
    await shop.engine.close()
    found = await shop.stock.status("o1")
    assert found is not None
    assert await take(shop, how, operation_id="o1") == found
    assert (await shop.counters("a"))[0] == 6


@TAKES
async def test_a_take_with_a_made_up_id_is_undone_when_its_caller_is_cancelled_in_the_moment_of_the_answer(shop: Shop, how: str) -> None:
    await take(shop, how, operation_id="warm", quantity=1)
    task = asyncio.create_task(take(shop, how))
    # Metrics hear of a batch right after its answers were set, and before any caller has run.
    shop.metrics.on_batch = lambda sent: task.cancel() and None
    with pytest.raises(asyncio.CancelledError):
        await task
    shop.metrics.on_batch = None
    await shop.engine.close()
    assert (await shop.counters("a"))[0] == 9


async def test_a_take_that_waited_for_its_load_moves_nothing_when_its_caller_left(shop: Shop) -> None:
    shop.ledger.stocked(cold=5)
    shop.ledger.gate = asyncio.Event()
    task = asyncio.create_task(shop.stock.deduct(lines(cold=1)))
    await until(lambda: shop.ledger.reads)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    shop.ledger.gate.set()
    await shop.engine.close()
    assert await shop.counters("cold") == (5, 0)
    assert await shop.journal() == []


async def test_a_confirm_stands_when_its_caller_left_after_it_was_sent(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    await take(shop, "reserve", operation_id="r1")
    gate = Gate(shop, monkeypatch)
    task = asyncio.create_task(shop.stock.confirm("r1"))
    await gate.sent.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.open.set()
    assert (await shop.stock.confirm("r1")).replayed


async def test_closing_waits_for_what_is_under_way_and_leaves_no_task(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = asyncio.all_tasks()
    gate = Gate(shop, monkeypatch)
    task = asyncio.create_task(take(shop, "deduct"))
    await gate.sent.wait()
    closing = asyncio.create_task(shop.engine.close())
    task.cancel()
    gate.open.set()
    await closing
    await asyncio.wait([task])
    assert asyncio.all_tasks() == mine
    assert await levels(shop) == UNTOUCHED


async def test_an_undo_that_fails_in_the_background_is_told(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(shop, monkeypatch)
    task = asyncio.create_task(take(shop, "deduct"))
    await gate.sent.wait()
    task.cancel()
    await asyncio.wait([task])
    meta = shop.key("meta")
    await shop.client.hset(meta, "state", "frozen")
    gate.open.set()
    await shop.engine.close()
    assert "background_failed" in [getattr(event, "name", None) for event in shop.metrics.events]
    with pytest.raises(errors.StockFrozen):
        await shop.stock.level("a")
