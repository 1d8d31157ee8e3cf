"""Takes: all lines or none, one id one effect, never more than there is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from inventory_sdk import errors
from inventory_sdk.model import Line, Receipt, ReceiptLine, Shortage, partition_of
from tests.stock_kit import AND_CLUSTER, MERCHANT, Shop, lines, on_client, shop_on, until


@pytest.fixture(params=AND_CLUSTER)
async def shop(request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Shop]:
    async with shop_on(request.param, namespace, {"a": 10, "b": 5, "last": 1}) as shop:
        yield shop


async def take(shop: Shop, how: str, wanted: list[Line], **options: Any) -> Receipt:
    if how == "adjust":
        return await shop.stock.adjust([replace(line, quantity=-line.quantity) for line in wanted], **options)
    return await getattr(shop.stock, how)(wanted, **options)


TAKES = pytest.mark.parametrize("how", ["deduct", "reserve", "adjust"])


@TAKES
async def test_one_short_line_stops_all_lines_and_every_short_line_is_named(shop: Shop, how: str) -> None:
    before = await shop.snapshot()
    with pytest.raises(errors.InsufficientStock) as caught:
        await take(shop, how, lines(a=3, b=6, last=2), operation_id="o1")
    assert caught.value.shortages == (Shortage(MERCHANT, "b", 6, 5), Shortage(MERCHANT, "last", 2, 1))
    assert (caught.value.sku, caught.value.requested, caught.value.available) == ("b", 6, 5)
    assert await shop.snapshot() == before


@TAKES
async def test_exactly_what_is_there_can_be_taken(shop: Shop, how: str) -> None:
    receipt = await take(shop, how, lines(a=10, b=5))
    sign = -1 if how == "adjust" else 1
    assert receipt.lines == (ReceiptLine(MERCHANT, "a", 10 * sign, 0), ReceiptLine(MERCHANT, "b", 5 * sign, 0))
    held = how == "reserve"
    assert await shop.counters("a") == (0, 10 if held else 0)
    assert await shop.counters("b") == (0, 5 if held else 0)


@TAKES
async def test_the_same_sku_twice_in_one_call_is_summed_before_it_is_checked(shop: Shop, how: str) -> None:
    with pytest.raises(errors.InsufficientStock) as caught:
        await take(shop, how, [Line("b", 3), Line("a", 1), Line("b", 3)])
    assert caught.value.shortages == (Shortage(MERCHANT, "b", 6, 5),)
    receipt = await take(shop, how, [Line("b", 2), Line("a", 1), Line("b", 3)])
    assert [(line.sku, abs(line.quantity), line.remaining) for line in receipt.lines] == [("a", 1, 9), ("b", 5, 0)]


@TAKES
async def test_the_calls_merchant_named_in_a_line_is_the_same_sku(shop: Shop, how: str) -> None:
    with pytest.raises(errors.InsufficientStock):
        await take(shop, how, [Line("b", 3), Line("b", 3, MERCHANT)])
    assert await shop.counters("b") == (5, 0)


@TAKES
async def test_lines_of_several_merchants_move_together_or_not_at_all(shop: Shop, how: str) -> None:
    shop.ledger.stocked("m2", a=4)
    with pytest.raises(errors.InsufficientStock) as caught:
        await take(shop, how, [Line("a", 1), Line("a", 5, "m2")])
    assert caught.value.shortages == (Shortage("m2", "a", 5, 4),)
    assert await shop.counters("a") == (10, 0)
    receipt = await take(shop, how, [Line("a", 1), Line("a", 4, "m2")])
    assert [(line.merchant, line.sku, line.remaining) for line in receipt.lines] == [("m1", "a", 9), ("m2", "a", 0)]
    assert receipt.merchant == MERCHANT
    assert (await shop.counters("a", "m2"))[0] == 0


@TAKES
async def test_a_call_takes_in_one_partition_what_stands_in_one(namespace: str, how: str) -> None:
    shops = [f"s{n}" for n in range(20)]
    here = next(name for name in shops if partition_of(name, 4) == partition_of(MERCHANT, 4))
    async with shop_on("fakeredis", namespace, {"a": 10}, partitions=4) as shop:
        shop.ledger.stocked(here, a=10)
        receipt = await take(shop, how, [Line("a", 1), Line("a", 1, here)])
        assert {line.merchant for line in receipt.lines} == {MERCHANT, here}
        assert len(receipt.positions) == 1
        await until(lambda: len(shop.metrics.batches()) == 2)  # the first found its stock not loaded


async def test_merchants_of_another_partition_take_there(namespace: str) -> None:
    there = next(f"s{n}" for n in range(20) if partition_of(f"s{n}", 4) != partition_of(MERCHANT, 4))
    async with shop_on("fakeredis", namespace, {"a": 10}, partitions=4) as shop:
        shop.ledger.stocked(there, a=10)
        mine, other = await asyncio.gather(shop.stock.deduct(lines(a=1)), shop.stock.deduct(lines(a=2), merchant=there))
        assert mine.positions[0].partition == partition_of(MERCHANT, 4)
        assert other.positions[0].partition == partition_of(there, 4)
        assert (other.lines[0].merchant, other.lines[0].remaining) == (there, 8)


@TAKES
async def test_512_lines_are_one_operation_and_513_are_too_many(shop: Shop, how: str) -> None:
    shop.ledger.stocked(**{f"s{n:03}": 1 for n in range(513)})
    many = [Line(f"s{n:03}", 1) for n in range(513)]
    with pytest.raises(errors.InvalidOperation) as caught:
        await take(shop, how, many)
    assert (caught.value.field, caught.value.value) == ("lines", 513)
    receipt = await take(shop, how, many[:512])
    assert len(receipt.lines) == 512
    assert {line.remaining for line in receipt.lines} == {0}


@TAKES
async def test_513_lines_of_512_skus_are_512_lines(shop: Shop, how: str) -> None:
    shop.ledger.stocked(**{f"s{n:03}": 2 for n in range(512)})
    receipt = await take(shop, how, [*(Line(f"s{n:03}", 1) for n in range(512)), Line("s000", 1)])
    assert len(receipt.lines) == 512
    assert abs(receipt.lines[0].quantity) == 2


async def test_512_lines_with_the_longest_names_fit_a_script(shop: Shop) -> None:
    merchant = "ü" * 64
    skus = [f"{'é' * 62}{n:04}" for n in range(512)]
    shop.ledger.stocked(merchant, **dict.fromkeys(skus, 1))
    receipt = await shop.stock.reserve([Line(sku, 1) for sku in skus], merchant=merchant, operation_id="ö" * 64, ttl=60)
    assert [line.sku for line in receipt.lines] == sorted(skus)
    await shop.stock.release("ö" * 64, merchant=merchant)
    assert await shop.counters(skus[7], merchant) == (1, 0)


@TAKES
async def test_a_repeat_in_another_order_of_lines_answers_the_first_receipt(shop: Shop, how: str) -> None:
    first = await take(shop, how, [Line("a", 2), Line("b", 1)], operation_id="o1", order="77")
    again = await take(shop, how, [Line("b", 1), Line("a", 1), Line("a", 1, MERCHANT)], operation_id="o1")
    assert again == replace(first, replayed=True)
    assert not first.replayed
    assert (await shop.counters("a"))[0] == 8


@TAKES
async def test_retry_after_success_on_the_last_unit_answers_the_first_receipt(shop: Shop, how: str) -> None:
    first = await take(shop, how, lines(last=1), operation_id="o1")
    with pytest.raises(errors.InsufficientStock):
        await take(shop, how, lines(last=1), operation_id="o2")
    assert await take(shop, how, lines(last=1), operation_id="o1") == replace(first, replayed=True)
    assert (await shop.counters("last"))[0] == 0


@TAKES
@pytest.mark.parametrize("other", [lines(a=3), lines(b=2), lines(a=2, b=1), [Line("a", 2, "m2")]])
async def test_the_same_id_with_other_content_is_a_conflict_and_moves_nothing(shop: Shop, how: str, other: list[Line]) -> None:
    shop.ledger.stocked("m2", a=10)
    await take(shop, how, lines(a=2), operation_id="o1")
    before = await shop.snapshot()
    with pytest.raises(errors.OperationConflict) as caught:
        await take(shop, how, other, operation_id="o1")
    assert caught.value.operation_id == "o1"
    assert await shop.snapshot() == before


@pytest.mark.parametrize(("how", "other"), list(permutations(["deduct", "reserve", "adjust"], 2)))
async def test_the_same_id_for_another_kind_is_a_conflict(shop: Shop, how: str, other: str) -> None:
    await take(shop, how, lines(a=2), operation_id="o1")
    before = await shop.snapshot()
    with pytest.raises(errors.OperationConflict):
        await take(shop, other, lines(a=2), operation_id="o1")
    assert await shop.snapshot() == before


@TAKES
async def test_an_id_that_entered_through_the_ledger_can_not_take_and_the_other_way_round(shop: Shop, how: str) -> None:
    await shop.stock.restock(lines(a=2), operation_id="po-1")
    with pytest.raises(errors.OperationConflict):
        await take(shop, how, lines(a=2), operation_id="po-1")
    await take(shop, how, lines(a=2), operation_id="o1")
    entries = shop.ledger.entries
    with pytest.raises(errors.OperationConflict):
        await shop.stock.restock(lines(a=2), operation_id="o1")
    assert shop.ledger.entries == entries
    assert (await shop.counters("a"))[0] == 10


async def test_the_same_id_at_another_merchant_is_another_operation(shop: Shop) -> None:
    shop.ledger.stocked("m2", a=4)
    await shop.stock.deduct(lines(a=2), operation_id="o1")
    other = await shop.stock.deduct(lines(a=1), operation_id="o1", merchant="m2")
    assert not other.replayed
    assert (await shop.counters("a"))[0] == 8


@TAKES
async def test_a_refusal_is_not_remembered(shop: Shop, how: str) -> None:
    with pytest.raises(errors.InsufficientStock):
        await take(shop, how, lines(last=2), operation_id="o1")
    assert await shop.stock.status("o1") is None
    await shop.stock.restock(lines(last=1), operation_id="po-1")
    assert not (await take(shop, how, lines(last=2), operation_id="o1")).replayed


@TAKES
async def test_the_same_id_twice_in_one_batch_moves_once(shop: Shop, how: str) -> None:
    first, second = await asyncio.gather(take(shop, how, lines(a=2), operation_id="o1"), take(shop, how, lines(a=2), operation_id="o1"))
    assert len(shop.metrics.batches()) == 1
    assert (first.replayed, second) == (False, replace(first, replayed=True))
    assert (await shop.counters("a"))[0] == 8


@TAKES
async def test_the_same_id_with_other_content_in_one_batch_is_a_conflict(shop: Shop, how: str) -> None:
    first, second = await asyncio.gather(
        take(shop, how, lines(a=2), operation_id="o1"), take(shop, how, lines(a=3), operation_id="o1"), return_exceptions=True
    )
    assert isinstance(first, Receipt)
    assert isinstance(second, errors.OperationConflict)
    assert (await shop.counters("a"))[0] == 8


async def test_operations_of_a_batch_see_what_the_earlier_ones_left(shop: Shop) -> None:
    answers = await asyncio.gather(
        shop.stock.reserve(lines(b=3), operation_id="r1"),
        shop.stock.deduct(lines(b=3), operation_id="too many"),
        shop.stock.release("r1", lines=lines(b=1), operation_id="back"),
        shop.stock.deduct(lines(b=3), operation_id="d1"),
        shop.stock.confirm("r1"),
        return_exceptions=True,
    )
    assert len(shop.metrics.batches()) == 1
    assert isinstance(answers[1], errors.InsufficientStock)
    assert answers[1].available == 2
    assert [getattr(answer, "kind", None) for answer in answers] == ["reserve", None, "release", "deduct", "confirm"]
    assert await shop.counters("b") == (0, 0)


async def test_256_tasks_with_repeats_racing_for_few_units_never_sell_more(shop: Shop) -> None:
    async def buy(n: int) -> Receipt | None:
        try:
            return await shop.stock.deduct(lines(a=1), operation_id=f"o{n}")
        except errors.InsufficientStock:
            return None

    first = await asyncio.gather(*(buy(n) for n in range(256) for _ in range(3)))
    again = await asyncio.gather(*(buy(n) for n in reversed(range(256))))
    fresh = [receipt for receipt in first if receipt and not receipt.replayed]
    sold = {receipt.operation_id for receipt in fresh}
    assert len(fresh) == len(sold) == 10
    assert sorted(receipt.lines[0].remaining for receipt in fresh) == list(range(10))
    assert {receipt.operation_id for receipt in first if receipt} == sold == {receipt.operation_id for receipt in again if receipt}
    assert await shop.counters("a") == (0, 0)


async def test_two_processes_racing_for_the_same_ids_never_sell_twice(shop: Shop) -> None:
    async with on_client(shop.client, shop.settings.namespace, ledger=shop.ledger) as other:
        pairs = await asyncio.gather(
            *(
                asyncio.gather(shop.stock.deduct(lines(a=1), operation_id=f"o{n}"), other.stock.deduct(lines(a=1), operation_id=f"o{n}"))
                for n in range(10)
            )
        )
    for mine, theirs in pairs:
        assert mine.replayed != theirs.replayed
        assert mine.positions == theirs.positions
    assert await shop.counters("a") == (0, 0)


async def test_balances_and_quantities_at_their_limits_stay_exact(shop: Shop) -> None:
    shop.ledger.stocked(huge=10**13)
    first = await shop.stock.deduct(lines(huge=10**9 - 1), operation_id="o1")
    assert first.lines[0].remaining == 10**13 - 10**9 + 1
    assert await shop.stock.deduct(lines(huge=10**9 - 1), operation_id="o1") == replace(first, replayed=True)
    await shop.stock.reserve(lines(huge=10**9), operation_id="r1")
    assert await shop.counters("huge") == (10**13 - 2 * 10**9 + 1, 10**9)
    assert (await shop.stock.status("o1")) == replace(first, replayed=True)


async def test_names_in_any_script_come_back_as_they_were_given(shop: Shop) -> None:
    sku, merchant, name, order = "茶 \"'\\/{}<&>", "магазин 1", "ord:{x}:😀", "№ 7, \\u001e"
    shop.ledger.stocked(merchant, **{sku: 3})
    first = await shop.stock.reserve([Line(sku, 2)], merchant=merchant, operation_id=name, order=order)
    assert first.lines == (ReceiptLine(merchant, sku, 2, 1),)
    assert (await shop.stock.status(name, merchant=merchant)) == replace(first, replayed=True)
    held = await shop.stock.reservation(name, merchant=merchant)
    assert held is not None
    assert (held.reservation, held.merchant, held.order, held.held) == (name, merchant, order, (Line(sku, 2, merchant),))
    assert (await shop.journal())[-1].operations[0].order == order


async def test_a_repeat_of_a_restock_raises_the_counter_once(shop: Shop) -> None:
    first, second = await asyncio.gather(
        shop.stock.restock(lines(a=2, b=1), operation_id="po-1"), shop.stock.restock(lines(a=2, b=1), operation_id="po-1")
    )
    assert [line.remaining for line in first.lines] == [12, 6]
    assert second == replace(first, replayed=True)
    assert (await shop.counters("a"))[0] == 12
    with pytest.raises(errors.OperationConflict):
        await shop.stock.restock(lines(a=3, b=1), operation_id="po-1")
    assert (await shop.counters("a"))[0] == 12


async def test_a_new_sku_can_be_restocked_and_sold_at_once(shop: Shop) -> None:
    await shop.stock.restock(lines(new=2), operation_id="po-1")
    assert (await shop.stock.deduct(lines(new=2))).lines[0].remaining == 0


async def test_the_first_receipt_of_every_kind_and_its_repeat_and_its_status_agree(shop: Shop) -> None:
    stock = shop.stock
    await stock.reserve(lines(a=4, b=2), operation_id="r1", order="77")
    acts: dict[str, Any] = {
        "d1": lambda: stock.deduct(lines(a=1), operation_id="d1", order="77"),
        "w1": lambda: stock.adjust([Line("a", -1)], operation_id="w1", order="77", reason="damaged"),
        "c1": lambda: stock.confirm("r1", lines=lines(a=1), operation_id="c1"),
        "b1": lambda: stock.release("r1", lines=lines(a=1), operation_id="b1"),
        "c2": lambda: stock.confirm("r1", operation_id="c2"),
    }
    for name, act in acts.items():
        first = await act()
        assert not first.replayed
        assert await act() == replace(first, replayed=True)
        assert await stock.status(name) == replace(first, replayed=True)
