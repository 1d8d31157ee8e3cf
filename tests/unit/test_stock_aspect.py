"""What the decorators do when the function is called: before, after, on a replay, on an error, on a cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aspect_fakes import FakeStock, Shop

from inventory_sdk import context
from inventory_sdk.errors import (
    InsufficientStock,
    InvalidOperation,
    InventoryError,
    OutcomeUnknown,
    ReservationClosed,
    ReservationExpired,
)
from inventory_sdk.model import Line, Receipt
from inventory_sdk.stock import take
from inventory_sdk.weave import injected

ITEMS = [("a", 2)]


class OutOfStock(Exception):
    pass


@pytest.fixture
def stock() -> FakeStock:
    return FakeStock(a=5, b=3)


@pytest.fixture
def shop(stock: FakeStock) -> Shop:
    return Shop(stock)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(take, "FIRST_PAUSE", 0.0)


def placing(shop: Shop, body: Callable[[Receipt], Awaitable[Any]] | None = None, **options: Any) -> Callable[..., Any]:
    settings: dict[str, Any] = {"operation_id": "order_id", "lines": "items", "ttl": 900, **options}

    @shop.reserves(run="now", **settings)
    async def place(order_id: str, items: Any, receipt: Receipt = injected()) -> Any:
        return receipt if body is None else await body(receipt)

    return place


async def fail(receipt: Receipt) -> None:
    raise RuntimeError("no")


async def test_reserve_holds_the_lines_before_the_function_and_gives_it_the_receipt(shop: Shop, stock: FakeStock) -> None:
    async def look(receipt: Receipt) -> Any:
        return receipt.operation_id, stock.available["a"], stock.ttls

    assert await placing(shop, look)("o1", ITEMS) == ("o1", 3, {"o1": 900})
    assert stock.log == ["reserve"]


async def test_what_is_asked_goes_to_the_stock_room(shop: Shop, stock: FakeStock) -> None:
    place = placing(shop, merchant=lambda: "m2", order="{order_id}!", durability="queue")
    await place("o1", ITEMS)
    assert stock.asked == [
        (
            "reserve",
            {
                "merchant": "m2", "durability": "queue", "ttl": 900, "operation_id": "o1", "order": "o1!", "lines": [Line("a", 2)],
            },
        )
    ]  # fmt: skip


async def test_a_function_that_raises_gives_the_stock_back_and_frees_the_id(shop: Shop, stock: FakeStock) -> None:
    with pytest.raises(RuntimeError, match="no"):
        await placing(shop, fail)("o1", ITEMS)
    assert stock.available["a"] == 5
    assert (await placing(shop)("o1", ITEMS)).replayed is False


async def test_a_refusal_keeps_the_function_from_running(shop: Shop, stock: FakeStock) -> None:
    ran = []

    async def note(receipt: Receipt) -> None:
        ran.append(receipt)

    with pytest.raises(InsufficientStock):
        await placing(shop, note)("o1", [("a", 6)])
    assert ran == []


async def test_a_cancelled_function_gives_the_stock_back(shop: Shop, stock: FakeStock) -> None:
    started = asyncio.Event()

    async def wait(receipt: Receipt) -> None:
        started.set()
        await asyncio.Event().wait()

    call = asyncio.create_task(placing(shop, wait)("o1", ITEMS))
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert stock.available["a"] == 5


async def test_a_second_cancellation_does_not_stop_the_undo(shop: Shop, stock: FakeStock) -> None:
    gate = stock.gate("undo")
    call = asyncio.create_task(placing(shop, fail)("o1", ITEMS))
    await stock.reached["undo"].wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert stock.available["a"] == 3
    gate.set()
    await shop.drained()
    assert stock.available["a"] == 5


async def test_an_undo_that_fails_is_noted_on_the_error_and_tried_again(shop: Shop, stock: FakeStock) -> None:
    stock.failures["undo"] = [OutcomeUnknown("o1", "lost"), OutcomeUnknown("o1", "lost")]
    with pytest.raises(RuntimeError) as caught:
        await placing(shop, fail)("o1", ITEMS)
    assert "tried again" in caught.value.__notes__[0]
    await shop.drained()
    assert (stock.available["a"], stock.log.count("undo")) == (5, 3)


async def test_an_undo_that_fails_for_good_is_logged(shop: Shop, stock: FakeStock, caplog: pytest.LogCaptureFixture) -> None:
    stock.failures["undo"] = [InvalidOperation("x", 1, "never")]
    with caplog.at_level(logging.ERROR), pytest.raises(RuntimeError):
        await placing(shop, fail)("o1", ITEMS)
    await shop.drained()
    await asyncio.sleep(0)
    assert "undo of o1 failed for good" in caplog.text


async def test_a_coroutine_that_is_closed_from_outside_starts_its_undo(shop: Shop, stock: FakeStock) -> None:
    async def wait(receipt: Receipt) -> None:
        await asyncio.sleep(0)

    call = placing(shop, wait)("o1", ITEMS)
    call.send(None)
    call.close()
    await shop.drained()
    assert stock.available["a"] == 5


async def test_a_replay_sees_so_and_its_error_undoes_nothing(shop: Shop, stock: FakeStock) -> None:
    await placing(shop)("o1", ITEMS)
    assert (await placing(shop)("o1", ITEMS)).replayed is True
    with pytest.raises(RuntimeError):
        await placing(shop, fail)("o1", ITEMS)
    assert stock.available["a"] == 3
    assert "undo" not in stock.log


async def test_a_replay_that_returned_keeps_the_stock_from_the_first_calls_undo(shop: Shop, stock: FakeStock) -> None:
    go = asyncio.Event()
    started = asyncio.Event()

    async def fail_later(receipt: Receipt) -> None:
        started.set()
        await go.wait()
        raise RuntimeError

    first = asyncio.create_task(placing(shop, fail_later)("o1", ITEMS))
    await started.wait()
    await placing(shop)("o1", ITEMS)
    go.set()
    with pytest.raises(RuntimeError):
        await first
    assert stock.log == ["reserve", "reserve", "keep", "undo"]
    assert (stock.available["a"], list(stock.holds)) == (3, ["o1"])


async def undone_in_between(shop: Shop, stock: FakeStock, meanwhile: Callable[[], None]) -> Any:
    """A replay whose function returns after the first call has undone."""
    go, started, undo_now = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def fail_when_told(receipt: Receipt) -> None:
        started.set()
        await undo_now.wait()
        raise RuntimeError

    async def return_when_told(receipt: Receipt) -> Receipt:
        undo_now.set()
        await go.wait()
        return receipt

    first = asyncio.create_task(placing(shop, fail_when_told)("o1", ITEMS))
    await started.wait()
    second = asyncio.create_task(placing(shop, return_when_told)("o1", ITEMS))
    with pytest.raises(RuntimeError):
        await first
    meanwhile()
    go.set()
    return await second


async def test_a_replay_that_comes_after_the_undo_takes_anew(shop: Shop, stock: FakeStock) -> None:
    await undone_in_between(shop, stock, lambda: None)
    assert stock.log == ["reserve", "reserve", "undo", "keep", "reserve"]
    assert (stock.available["a"], list(stock.holds)) == (3, ["o1"])


async def test_a_replay_that_comes_after_the_undo_and_finds_the_stock_gone_is_closed(shop: Shop, stock: FakeStock) -> None:
    with pytest.raises(ReservationClosed) as caught:
        await undone_in_between(shop, stock, lambda: stock.available.update(a=0))
    assert isinstance(caught.value.__cause__, InsufficientStock)


async def test_a_hold_without_ttl_has_one_while_the_function_runs_and_none_afterwards(shop: Shop, stock: FakeStock) -> None:
    async def look(receipt: Receipt) -> Any:
        return dict(stock.ttls)

    assert await placing(shop, look, ttl=None)("o1", ITEMS) == {"o1": 60.5}
    assert stock.ttls == {"o1": None}


async def test_the_ttl_may_be_selected(shop: Shop, stock: FakeStock) -> None:
    await placing(shop, ttl=lambda order_id: {"o1": 5, "o2": None}[order_id])("o1", ITEMS)
    await placing(shop, ttl=lambda order_id: {"o1": 5, "o2": None}[order_id])("o2", ITEMS)
    assert stock.ttls == {"o1": 5, "o2": None}


async def test_a_hold_without_ttl_needs_an_id_of_the_callers(shop: Shop, stock: FakeStock) -> None:
    with pytest.raises(TypeError, match="needs operation_id="):
        placing(shop, ttl=None, operation_id=None)
    with pytest.raises(InvalidOperation, match="ttl=None"):
        await placing(shop, ttl=lambda: None, operation_id=None)("o1", ITEMS)
    assert stock.available["a"] == 5


async def test_a_function_may_confirm_its_own_hold(shop: Shop, stock: FakeStock) -> None:
    async def confirm(receipt: Receipt) -> str:
        await stock.confirm(receipt.operation_id)
        return "sold"

    assert await placing(shop, confirm, ttl=None)("o1", ITEMS) == "sold"


async def test_a_hold_that_ran_out_while_the_function_ran_is_an_error(shop: Shop, stock: FakeStock) -> None:
    async def too_slow(receipt: Receipt) -> None:
        stock.expire("o1")

    with pytest.raises(ReservationClosed):
        await placing(shop, too_slow, ttl=None)("o1", ITEMS)


def selling(shop: Shop, body: Callable[[Receipt], Awaitable[Any]] | None = None, **options: Any) -> Callable[..., Any]:
    @shop.deducts(run="now", operation_id="order_id", sku="sku", quantity="count", **options)
    async def sell(order_id: str | None, sku: str, count: int = 1, receipt: Receipt = injected()) -> Any:
        return receipt if body is None else await body(receipt)

    return sell


async def test_deduct_is_reserve_function_confirm(shop: Shop, stock: FakeStock) -> None:
    async def look(receipt: Receipt) -> Any:
        return list(stock.holds), stock.ttls["o1"], list(stock.log)

    assert await selling(shop, look, durability="queue")("o1", "a", 2) == (["o1"], 60.5, ["reserve"])
    assert (stock.log, stock.states, stock.available["a"]) == (["reserve", "confirm"], {"o1": "confirmed"}, 3)


async def test_a_repeated_deduct_answers_without_selling_twice(shop: Shop, stock: FakeStock) -> None:
    await selling(shop)("o1", "a", 2)
    assert (await selling(shop)("o1", "a", 2)).replayed is True
    assert stock.available["a"] == 3


async def test_a_deduct_whose_hold_ran_out_is_taken_again_once_the_function_has_returned(shop: Shop, stock: FakeStock) -> None:
    async def too_slow(receipt: Receipt) -> None:
        stock.expire("o1")

    await selling(shop, too_slow)("o1", "a", 2)
    assert (stock.available["a"], stock.states["o1"]) == (3, "confirmed")


async def test_a_call_cancelled_in_its_confirm_is_confirmed_all_the_same(shop: Shop, stock: FakeStock) -> None:
    gate = stock.gate("confirm")
    call = asyncio.create_task(selling(shop)("o1", "a", 2))
    await stock.reached["confirm"].wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gate.set()
    await shop.drained()
    assert stock.states == {"o1": "confirmed"}


async def test_an_id_that_was_named_must_be_there(shop: Shop, stock: FakeStock) -> None:
    with pytest.raises(InvalidOperation, match="operation_id=None"):
        await selling(shop)(None, "a")
    assert stock.log == []


@pytest.mark.parametrize(
    ("decorator", "options", "kind"),
    [
        ("confirms", {"reservation": "order"}, "confirm"),
        ("releases", {"reservation": "order"}, "release"),
        ("restocks", {"sku": "sku", "quantity": 2, "operation_id": "order"}, "restock"),
        ("takes_back", {"sku": "sku", "quantity": 2, "operation_id": "order", "of": "{order}-sale"}, "take_back"),
        ("adjusts", {"sku": "sku", "quantity": 2, "operation_id": "order", "reason": lambda: "found"}, "adjust"),
    ],
)
async def test_all_other_kinds_move_after_the_function_returned(
    shop: Shop, stock: FakeStock, decorator: str, options: dict[str, Any], kind: str
) -> None:
    await stock.submit("reserve", operation_id="o1", lines=[Line("b", 1)], ttl=1)
    stock.log.clear()

    @getattr(shop, decorator)(run="now", **options)
    async def act(order: str, sku: str = "a") -> list[str]:
        return list(stock.log)

    @getattr(shop, decorator)(run="now", **options)
    async def refuse(order: str, sku: str = "a") -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await refuse("o1")
    assert stock.log == []
    assert await act("o1") == []
    assert stock.log == [kind]


async def test_what_moves_after_the_function_is_checked_before_it(shop: Shop, stock: FakeStock) -> None:
    ran = []

    @shop.restocks(run="now", lines="items", operation_id="delivery")
    async def receive(delivery: str, items: Any) -> None:
        ran.append(delivery)

    for delivery, items in [("", ITEMS), ("d", []), ("d", [("a", -1)]), ("d", [("a", 0)]), ("x" * 200, ITEMS)]:
        with pytest.raises(InvalidOperation):
            await receive(delivery, items)
    assert (ran, stock.log) == ([], [])


async def test_a_call_cancelled_in_a_movement_after_the_function_moves_once(shop: Shop, stock: FakeStock) -> None:
    gate = stock.gate("restock")

    @shop.restocks(run="now", lines="items")
    async def receive(items: Any) -> None: ...

    call = asyncio.create_task(receive(ITEMS))
    await stock.reached["restock"].wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gate.set()
    await shop.drained()
    (_, first), (_, again) = stock.asked
    assert first["operation_id"] == again["operation_id"]
    assert stock.available["a"] == 7


async def test_a_whole_confirm_leaves_its_id_to_the_stock_room_and_a_part_gets_one(shop: Shop, stock: FakeStock) -> None:
    await stock.submit("reserve", operation_id="o1", lines=[Line("b", 2)], ttl=1)

    @shop.confirms(run="now", reservation="order", lines="parts")
    async def ship(order: str, parts: Any) -> None: ...

    @shop.confirms(run="now", reservation="order")
    async def ship_all(order: str) -> None: ...

    await ship("o1", [("b", 1)])
    await stock.submit("reserve", operation_id="o2", lines=[Line("b", 1)], ttl=1)
    await ship_all("o2")
    assert "operation_id" in stock.asked[1][1]
    assert "operation_id" not in stock.asked[-1][1]


def adjusting(shop: Shop, body: Callable[[Receipt | None], None]) -> Callable[..., Any]:
    @shop.adjusts(run="now", operation_id="count_id", lines="items", reason="why")
    async def count(count_id: str, items: Any, why: str = "counted", receipt: Receipt | None = injected()) -> None:
        body(receipt)

    return count


async def test_a_negative_adjust_moves_before_the_function_and_a_positive_one_after_it(shop: Shop, stock: FakeStock) -> None:
    seen: list[Any] = []

    def look(receipt: Receipt | None) -> None:
        seen.append((receipt and receipt.operation_id, stock.available["a"]))

    await adjusting(shop, look)("c1", [("a", -2)])
    await adjusting(shop, look)("c2", [("a", 4)])
    assert seen == [("c1", 3), (None, 3)]
    assert stock.available["a"] == 7


async def test_a_negative_adjust_is_undone_when_the_function_raises(shop: Shop, stock: FakeStock) -> None:
    def refuse(receipt: Receipt | None) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await adjusting(shop, refuse)("c1", [("a", -2)])
    assert stock.available["a"] == 5


async def test_an_adjust_of_both_signs_is_refused_before_anything_moves(shop: Shop, stock: FakeStock) -> None:
    with pytest.raises(InvalidOperation, match="sign of the other lines"):
        await adjusting(shop, lambda _: None)("c1", [("a", -2), ("b", 1)])
    assert stock.log == []


async def test_the_merchant_is_the_selected_then_the_requests_then_the_inventorys(shop: Shop, stock: FakeStock) -> None:
    @shop.reserves(run="now", lines="items", merchant="by", ttl=1)
    async def place(items: Any, by: str | None = None) -> None: ...

    await place(ITEMS)
    token = context.merchant.set("request")
    try:
        await place([("a", 1)])
        await place([("a", 1)], by="call")
    finally:
        context.merchant.reset(token)
    assert [asked["merchant"] for _, asked in stock.asked] == ["m1", "request", "call"]


async def test_no_merchant_anywhere_is_refused(stock: FakeStock) -> None:
    with pytest.raises(InvalidOperation, match="merchant=None") as caught:
        await placing(Shop(stock, merchant=None))("o1", ITEMS)
    assert caught.value.field == "merchant"
    assert stock.log == []


async def test_the_stock_room_is_asked_for_at_each_call(shop: Shop, stock: FakeStock) -> None:
    place = placing(shop)
    shop.stock = FakeStock(a=1)
    with pytest.raises(InsufficientStock):
        await place("o1", ITEMS)


async def test_raises_translates_our_errors_and_keeps_ours_as_the_cause(shop: Shop) -> None:
    with pytest.raises(OutOfStock, match=r"6 asked, 5 available") as caught:
        await placing(shop, raises={InsufficientStock: OutOfStock})("o1", [("a", 6)])
    assert isinstance(caught.value.__cause__, InsufficientStock)

    def make(error: InsufficientStock) -> Exception:
        return OutOfStock(error.sku, error.available)

    with pytest.raises(OutOfStock) as caught:
        await placing(shop, raises={InventoryError: KeyError, InsufficientStock: make})("o1", [("a", 6)])
    assert caught.value.args == ("a", 5)


async def test_raises_leaves_what_it_does_not_name_and_what_the_function_raises(shop: Shop) -> None:
    with pytest.raises(InsufficientStock):
        await placing(shop, raises={ReservationClosed: OutOfStock})("o1", [("a", 6)])

    async def own(receipt: Receipt) -> None:
        raise ReservationExpired("other")

    with pytest.raises(ReservationExpired):
        await placing(shop, own, raises={ReservationClosed: OutOfStock})("o1", ITEMS)


async def test_raises_also_translates_what_comes_after_the_function(shop: Shop, stock: FakeStock) -> None:
    async def too_slow(receipt: Receipt) -> None:
        stock.expire("o1")

    with pytest.raises(OutOfStock):
        await placing(shop, too_slow, ttl=None, raises={ReservationClosed: OutOfStock})("o1", ITEMS)


async def test_a_method_reserves_for_its_own_shop(shop: Shop, stock: FakeStock) -> None:
    class Service:
        def __init__(self, merchant: str) -> None:
            self.merchant = merchant

        @shop.reserves(run="now", merchant="self.merchant", lines="items", ttl=5)
        async def hold(self, items: Any, *, receipt: Receipt = injected()) -> tuple[Any, str]:
            return self, receipt.merchant

    service = Service("m7")
    assert await service.hold(ITEMS) == (service, "m7")
