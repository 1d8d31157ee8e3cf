"""Stock fields come from ledger rows only: coalesced, bounded, and forgetful of nonsense."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from inventory_sdk import errors
from inventory_sdk.model import Line, OpeningBalance, key_of
from inventory_sdk.stock import loading
from inventory_sdk.stock.entering import open_balances
from tests.stock_kit import MERCHANT, SERVERS, Shop, lines, on_client, shop_on, until


@pytest.fixture(params=SERVERS)
async def shop(request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Shop]:
    async with shop_on(request.param, namespace, {"a": 10}) as shop:
        yield shop


class Clock:
    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The loader's clock, which stands still."""
    clock = Clock()
    monkeypatch.setattr(loading, "time", clock)
    return clock


async def test_no_operation_creates_a_stock_field(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=1), operation_id="r1")
    before = await shop.snapshot()
    for act in (
        shop.stock.deduct(lines(zzz=1)),
        shop.stock.reserve(lines(a=1, zzz=1)),
        shop.stock.adjust([Line("zzz", -1)]),
        shop.stock.deduct([Line("a", 1, "m2")]),
        shop.stock.level("zzz"),
        shop.stock.levels(["a", "zzz"]),
    ):
        with pytest.raises(errors.UnknownStock) as caught:
            await act
        assert (caught.value.merchant, caught.value.sku) in ((MERCHANT, "zzz"), ("m2", "a"))
    assert await shop.snapshot() == before


async def test_an_unknown_sku_is_named_before_a_short_one(shop: Shop) -> None:
    with pytest.raises(errors.UnknownStock):
        await shop.stock.deduct(lines(a=100, zzz=1))


async def test_a_row_that_the_ledger_has_is_loaded_when_first_needed(shop: Shop) -> None:
    shop.ledger.rows[key_of(MERCHANT, "cold")] = [7, 2]
    receipt = await shop.stock.deduct(lines(cold=3, a=1), operation_id="o1")
    assert [line.remaining for line in receipt.lines] == [9, 4]
    assert await shop.counters("cold") == (4, 2)
    assert shop.ledger.reads == [(key_of(MERCHANT, "cold"),)]


async def test_a_level_loads_too_and_reads_do_not_write_otherwise(shop: Shop) -> None:
    shop.ledger.stocked(cold=7)
    assert await shop.counters("cold") == (7, 0)
    before = await shop.snapshot()
    assert await shop.counters("cold") == (7, 0)
    await shop.stock.status("o1")
    await shop.stock.reservation("r1")
    assert await shop.snapshot() == before


async def test_a_load_never_overwrites_what_is_there(shop: Shop) -> None:
    shop.ledger.rows[key_of(MERCHANT, "a")] = [99, 0]
    await shop.stock.deduct(lines(a=4))
    await shop.engine.loader.load(shop.engine.partitions[0], [key_of(MERCHANT, "a")])
    assert await shop.counters("a") == (6, 0)


async def test_two_processes_loading_the_same_row_load_it_once(shop: Shop) -> None:
    shop.ledger.stocked(cold=5)
    shop.ledger.gate = asyncio.Event()
    async with on_client(shop.client, shop.settings.namespace, ledger=shop.ledger) as other:
        takes = [asyncio.create_task(one.stock.deduct(lines(cold=2), operation_id=f"o{n}")) for n, one in enumerate((shop, other))]
        await until(lambda: len(shop.ledger.reads) == 2)
        shop.ledger.gate.set()
        await asyncio.gather(*takes)
    assert await shop.counters("cold") == (1, 0)


async def test_a_load_that_a_credit_is_pending_for_does_not_count_it_twice(shop: Shop) -> None:
    await shop.stock.restock(lines(new=5), operation_id="po")
    assert await shop.counters("new") == (5, 0)


async def test_100_callers_share_one_ledger_read(shop: Shop) -> None:
    shop.ledger.stocked(cold=60)
    answers = await asyncio.gather(*(shop.stock.deduct(lines(cold=1)) for _ in range(100)), return_exceptions=True)
    assert len(shop.ledger.reads) == 1
    assert sum(isinstance(answer, errors.InsufficientStock) for answer in answers) == 40


async def test_a_cancelled_caller_does_not_end_the_load_for_the_others(shop: Shop) -> None:
    shop.ledger.stocked(cold=60)
    shop.ledger.gate = asyncio.Event()
    first = asyncio.create_task(shop.stock.deduct(lines(cold=1)))
    await until(lambda: shop.ledger.reads)
    others = [asyncio.create_task(shop.stock.deduct(lines(cold=1))) for _ in range(5)]
    await until(lambda: sum(batch.operations for batch in shop.metrics.batches()) == 6)
    first.cancel()
    await asyncio.wait([first])
    assert first.cancelled()
    shop.ledger.gate.set()
    await asyncio.gather(*others)
    assert len(shop.ledger.reads) == 1
    assert await shop.counters("cold") == (55, 0)


async def test_at_most_eight_loads_run_at_once(shop: Shop) -> None:
    shop.ledger.stocked(**{f"s{n}": 1 for n in range(40)})
    shop.ledger.gate = asyncio.Event()
    takes = [asyncio.create_task(shop.stock.deduct([Line(f"s{n}", 1)])) for n in range(40)]
    await until(lambda: shop.ledger.reading == loading.AT_ONCE)
    shop.ledger.gate.set()
    await asyncio.gather(*takes)
    assert loading.AT_ONCE == shop.ledger.most_reading == 8


async def test_many_lines_are_loaded_in_bounded_reads(shop: Shop) -> None:
    shop.ledger.stocked(**{f"s{n}": 1 for n in range(512)})
    await shop.stock.deduct([Line(f"s{n}", 1) for n in range(512)])
    assert sorted(len(read) for read in shop.ledger.reads) == [256, 256]


async def test_a_failing_ledger_reaches_every_waiter_and_is_asked_again_later(shop: Shop) -> None:
    shop.ledger.stocked(cold=60)
    shop.ledger.failure = ConnectionError("the database is away")
    answers = await asyncio.gather(*(shop.stock.deduct(lines(cold=1)) for _ in range(5)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ConnectionError] * 5
    shop.ledger.failure = None
    await shop.stock.deduct(lines(cold=1))
    assert await shop.counters("cold") == (59, 0)


async def test_what_is_in_redis_sells_while_the_ledger_is_away(shop: Shop) -> None:
    shop.ledger.failure = ConnectionError("the database is away")
    await shop.stock.deduct(lines(a=1))
    assert shop.ledger.reads == []


async def test_an_unknown_sku_is_remembered_for_a_second(shop: Shop, clock: Clock) -> None:
    for _ in range(5):
        with pytest.raises(errors.UnknownStock):
            await shop.stock.deduct(lines(zzz=1))
    assert len(shop.ledger.reads) == 1
    sent = len(shop.metrics.batches())
    shop.ledger.stocked(zzz=5)
    clock.now += 0.9
    with pytest.raises(errors.UnknownStock):
        await shop.stock.deduct(lines(zzz=1))
    assert len(shop.metrics.batches()) == sent, "it did not even go to Redis"
    clock.now += 0.2
    assert (await shop.stock.deduct(lines(zzz=1))).lines[0].remaining == 4
    assert len(shop.ledger.reads) == 2


async def test_a_restock_of_an_unknown_sku_can_be_sold_at_once_where_it_was_made(shop: Shop, clock: Clock) -> None:
    with pytest.raises(errors.UnknownStock):
        await shop.stock.deduct(lines(zzz=1))
    await shop.stock.restock(lines(zzz=3), operation_id="po")
    assert (await shop.stock.deduct(lines(zzz=1))).lines[0].remaining == 2


async def test_a_flood_of_invented_skus_costs_one_ledger_read_each_and_no_field(shop: Shop, clock: Clock) -> None:
    before = await shop.snapshot()
    for _ in range(2):
        answers = await asyncio.gather(*(shop.stock.deduct([Line(f"x{n}", 1)]) for n in range(1000)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {errors.UnknownStock}
    assert len(shop.ledger.reads) == 1000
    assert await shop.snapshot() == before
    assert shop.engine.loader._under_way == {}


async def test_a_flood_beyond_what_is_remembered_stays_bounded_and_reads_once_per_call(
    shop: Shop, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "MOST_UNKNOWN", 300)
    for start in range(0, 1000, 100):
        calls = (shop.stock.deduct([Line(f"y{start + n}", 1)]) for n in range(100))
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(answer) for answer in answers} == {errors.UnknownStock}
        assert len(shop.engine.loader._unknown) <= 300
    assert len(shop.ledger.reads) == 1000


async def test_one_call_with_many_invented_skus_costs_two_reads(shop: Shop) -> None:
    for _ in range(3):
        with pytest.raises(errors.UnknownStock):
            await shop.stock.deduct([Line(f"x{n}", 1) for n in range(512)])
    assert len(shop.ledger.reads) == 2


async def test_a_load_under_an_epoch_that_ended_is_done_again_under_the_next(shop: Shop) -> None:
    shop.ledger.stocked(cold=5)
    shop.ledger.gate = asyncio.Event()
    take = asyncio.create_task(shop.stock.deduct(lines(cold=1)))
    await until(lambda: shop.ledger.reads)
    async with on_client(shop.client, shop.settings.namespace, ledger=shop.ledger) as worker:
        del shop.ledger.rows[key_of(MERCHANT, "cold")]  # not in what the rebuild reads
        await worker.open(epoch=2)
    shop.ledger.stocked(cold=3)
    shop.ledger.gate.set()
    assert (await take).lines[0].remaining == 2
    assert (await take).positions[0].epoch == 2


async def test_a_load_of_an_epoch_that_the_ledger_has_closed_freezes_its_callers(shop: Shop) -> None:
    shop.ledger.stocked(cold=5)
    shop.ledger.open_epochs[0] = 2
    with pytest.raises(errors.StockFrozen):
        await shop.stock.deduct(lines(cold=1))
    assert await shop.client.hexists(shop.key("available"), key_of(MERCHANT, "cold")) is False


# Opening balances ------------------------------------------------------------------------------------------------------------


async def test_opening_balances_are_read_once_and_become_rows_of_the_ledger(namespace: str) -> None:
    asked: list[tuple[str, tuple[str, ...]]] = []

    async def read(merchant: str, skus: list[str]) -> list[OpeningBalance]:
        asked.append((merchant, tuple(skus)))
        return [OpeningBalance(sku, 7) for sku in skus if sku.startswith("real")]

    async def opener(engine: object, partition: object, fields: list[str]) -> None:
        await open_balances(engine, partition, fields, read)  # type: ignore[arg-type]

    async with shop_on("fakeredis", namespace, opener=opener) as shop:
        answers = await asyncio.gather(*(shop.stock.deduct(lines(real=1)) for _ in range(10)), return_exceptions=True)
        assert sum(isinstance(answer, errors.InsufficientStock) for answer in answers) == 3
        assert asked == [(MERCHANT, ("real",))]
        assert await shop.counters("real") == (0, 0)
        assert shop.ledger.rows[key_of(MERCHANT, "real")] == [7, 0]
        with pytest.raises(errors.UnknownStock):
            await shop.stock.deduct(lines(real2=1, fake=1))
        with pytest.raises(errors.InvalidOperation):
            await open_balances(
                shop.engine, shop.engine.partitions[0], [key_of(MERCHANT, "x")], lambda *_: _answer(OpeningBalance("other", 1))
            )


async def _answer(*balances: OpeningBalance) -> list[OpeningBalance]:
    return list(balances)
