"""Bad input costs nothing: an error that names field and value, nothing moved, not one command sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from inventory_sdk import errors
from inventory_sdk.model import Line
from tests.stock_kit import SERVERS, Shop, lines, on_client, shop_on

Act = Callable[[Shop], Awaitable[Any]]
BAD_NAMES = [
    "",
    "\x00",
    "a\x1fb",
    "a\x1eb",
    "a\nb",
    "\x7f",
    "\x85",
    "\ud800",
    "x" * 129,
    "ü" * 65,
    "😀" * 33,
    7,
    None,
    b"bytes",
    True,
    1.5,
    ["a"],
]
BAD_QUANTITIES = [
    0,
    True,
    False,
    1.0,
    1.5,
    float("nan"),
    float("inf"),
    "1",
    None,
    Decimal(1),
    Fraction(1),
    10**9 + 1,
    -(10**9) - 1,
    2**64,
    b"1",
]


def shown(value: object) -> str:
    """A test id that is short and the same in every run."""
    return f"{type(value).__name__} {ascii(value)[:24]}" if not hasattr(value, "__next__") else "iterator"


@pytest.fixture(params=SERVERS)
async def shop(request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Shop]:
    async with shop_on(request.param, namespace, {"a": 10, "b": 5}) as shop:
        await shop.stock.reserve(lines(a=2, b=2), operation_id="held")
        yield shop


@pytest.fixture
async def silent(namespace: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shop]:
    """A shop that can't send anything, nor ask its ledger."""
    async with shop_on("fakeredis", namespace, {"a": 10}) as shop:

        async def forbidden(*arguments: Any, **_: Any) -> Any:
            raise AssertionError(f"asked for {arguments}")

        with monkeypatch.context() as patch:
            patch.setattr(shop.engine.wire, "run", forbidden)
            patch.setattr(shop.ledger, "enter", forbidden)
            patch.setattr(shop.ledger, "operation", forbidden)
            patch.setattr(shop.ledger, "reservation", forbidden)
            yield shop


async def refused(act: Awaitable[Any], field: str) -> errors.InvalidOperation:
    with pytest.raises(errors.InvalidOperation) as caught:
        await act
    assert isinstance(caught.value, ValueError)
    assert caught.value.field == field
    assert field in str(caught.value)
    return caught.value


@pytest.mark.parametrize("quantity", BAD_QUANTITIES, ids=shown)
def test_a_line_refuses_what_is_no_quantity(quantity: Any) -> None:
    with pytest.raises(errors.InvalidOperation) as caught:
        Line("a", quantity)
    assert caught.value.field == "quantity"
    assert caught.value.value is quantity


@pytest.mark.parametrize("name", BAD_NAMES, ids=shown)
def test_a_line_refuses_what_is_no_name(name: Any) -> None:
    with pytest.raises(errors.InvalidOperation) as caught:
        Line(name, 1)
    assert caught.value.field == "sku"
    if name is not None:
        with pytest.raises(errors.InvalidOperation) as caught:
            Line("a", 1, name)
        assert caught.value.field == "merchant"


@pytest.mark.parametrize("name", BAD_NAMES, ids=shown)
async def test_every_name_of_every_act_is_checked_before_anything_is_sent(silent: Shop, name: Any) -> None:
    stock, some, cut = silent.stock, lines(a=1), [Line("a", -1)]
    for act, field in [
        (lambda v: stock.take_back(some, of=v), "of"),
        (stock.confirm, "reservation"),
        (stock.release, "reservation"),
        (lambda v: stock.extend(v, ttl=1), "reservation"),
        (stock.reservation, "reservation"),
        (stock.status, "operation_id"),
        (stock.level, "sku"),
        (lambda v: stock.levels(["a", v]), "sku"),
        (stock.reopen, "sku"),
        (lambda v: stock.restock_many(some, operation_id=v), "operation_id"),
    ]:
        assert (await refused(act(name), field)).value is name
    if name is None:  # where a name may be left out
        return
    for field in ("operation_id", "order", "merchant"):
        for take in (stock.deduct, stock.reserve):
            assert (await refused(take(some, **{field: name}), field)).value is name
        for count in (some, cut):
            assert (await refused(stock.adjust(count, **{field: name}), field)).value is name
        assert (await refused(stock.restock(some, **{field: name}), field)).value is name
        assert (await refused(stock.take_back(some, of="o1", **{field: name}), field)).value is name
    for field in ("operation_id", "merchant"):
        assert (await refused(stock.confirm("r", **{field: name}), field)).value is name
        assert (await refused(stock.release("r", lines=some, **{field: name}), field)).value is name
    assert (await refused(stock.extend("r", ttl=1, merchant=name), "merchant")).value is name
    assert (await refused(stock.level("a", merchant=name), "merchant")).value is name
    assert (await refused(stock.reservation("r", merchant=name), "merchant")).value is name
    assert (await refused(stock.status("r", merchant=name), "merchant")).value is name


@pytest.mark.parametrize(
    "bad", [None, [], (), "a", ["a"], [("a", 1)], [None], [Line("a", 1), "b"], Line("a", 1), {"a": 1}, {Line("a", 1)}, 7,
     iter([Line("a", 1)])],
    ids=shown,
)  # fmt: skip
async def test_lines_that_are_none_are_refused_before_anything_is_sent(silent: Shop, bad: Any) -> None:
    stock = silent.stock
    for act in (stock.deduct, stock.reserve, stock.adjust, stock.restock, lambda v: stock.take_back(v, of="o1")):
        await refused(act(bad), "lines")
    if bad is not None:
        await refused(stock.confirm("r", lines=bad), "lines")
        await refused(stock.release("r", lines=bad), "lines")


async def test_quantities_of_the_wrong_sign_are_refused_before_anything_is_sent(silent: Shop) -> None:
    stock = silent.stock
    for bad in ([Line("a", -1)], [Line("a", 2), Line("b", -1)], [Line("a", 2), Line("a", -1)], [Line("a", -1, "m2")]):
        for act in (stock.deduct, stock.reserve, stock.restock, lambda v: stock.take_back(v, of="o1")):
            assert (await refused(act(bad), "quantity")).value == -1
        assert (await refused(stock.confirm("r", lines=bad), "quantity")).value == -1
        assert (await refused(stock.release("r", lines=bad), "quantity")).value == -1
    assert (await refused(stock.adjust([Line("a", -2), Line("b", 1)]), "quantity")).value == 1
    assert (await refused(stock.adjust([Line("a", 2), Line("b", -1)]), "quantity")).value == -1


async def test_lines_of_one_sku_that_sum_to_too_much_are_refused(silent: Shop) -> None:
    stock, much = silent.stock, [Line("a", 10**9), Line("a", 1)]
    for act in (stock.deduct, stock.reserve, stock.restock, stock.adjust, lambda v: stock.take_back(v, of="o1")):
        assert (await refused(act(much), "quantity")).value == 10**9 + 1
    assert (await refused(stock.adjust([Line("a", -(10**9)), Line("a", -1)]), "quantity")).value == 10**9 + 1


@pytest.mark.parametrize("order", [name for name in BAD_NAMES if name is not None], ids=shown)
async def test_a_bulk_restock_checks_its_order(silent: Shop, order: Any) -> None:
    await refused(silent.stock.restock_many(lines(a=1), operation_id="p", order=order), "order")


@pytest.mark.parametrize(
    ("bad", "value"), [([Line("a", -1)], -1), ([Line("a", 2), Line("a", -1)], -1), ([Line("a", 10**9), Line("a", 1)], 10**9 + 1)]
)
async def test_a_bulk_restock_refuses_what_a_restock_refuses(silent: Shop, bad: list[Line], value: int) -> None:
    assert (await refused(silent.stock.restock_many(bad, operation_id="po"), "quantity")).value == value


async def test_a_bulk_restock_refuses_what_is_no_line(silent: Shop) -> None:
    for bad in (["a"], [None], [("a", 1)], [{"sku": "a"}]):
        await refused(silent.stock.restock_many(bad, operation_id="po"), "lines")  # type: ignore[arg-type]


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), 366 * 24 * 3600 + 1, True, "60", Decimal(60)], ids=shown)
async def test_a_ttl_that_is_no_time_is_refused_before_anything_is_sent(silent: Shop, ttl: Any) -> None:
    await refused(silent.stock.reserve(lines(a=1), ttl=ttl), "ttl")
    await refused(silent.stock.reserve(lines(a=1), ttl=ttl, operation_id="o1"), "ttl")
    await refused(silent.stock.extend("r", ttl=ttl), "ttl")


async def test_a_hold_without_an_end_needs_an_id_of_the_callers_own(silent: Shop) -> None:
    await refused(silent.stock.reserve(lines(a=1), ttl=None), "ttl")


@pytest.mark.parametrize("level", ["", "disk", "REDIS", 1, True, ["redis"]], ids=shown)
async def test_an_unknown_durability_is_refused_before_anything_is_sent(silent: Shop, level: Any) -> None:
    stock = silent.stock
    await refused(stock.deduct(lines(a=1), durability=level), "durability")
    await refused(stock.reserve(lines(a=1), durability=level), "durability")
    await refused(stock.adjust([Line("a", -1)], durability=level), "durability")
    await refused(stock.confirm("r", durability=level), "durability")
    await refused(stock.release("r", durability=level), "durability")


@pytest.mark.parametrize("reason", ["", "x" * 501, 7, b"damaged", ["damaged"]], ids=shown)
async def test_a_reason_that_is_no_text_is_refused_before_anything_is_sent(silent: Shop, reason: Any) -> None:
    await refused(silent.stock.adjust([Line("a", -1)], reason=reason), "reason")
    await refused(silent.stock.restock(lines(a=1), reason=reason), "reason")


async def test_a_call_without_any_merchant_says_so(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {"a": 1}) as shop, on_client(shop.client, namespace, merchant=None) as nameless:
        assert "name one" in str(await refused(nameless.stock.deduct(lines(a=1)), "merchant"))


async def test_kinds_that_are_not_public_are_refused(silent: Shop) -> None:
    for kind in ("void", "credit", "undo", "expire", "open", "correct", "nonsense", ""):
        await refused(silent.stock.submit(kind, lines=lines(a=1)), "kind")
    for kind in ("confirm", "release"):
        await refused(silent.stock.submit(kind), "reservation")


async def test_reacquiring_a_part_is_refused_before_anything_is_sent(silent: Shop) -> None:
    await refused(silent.stock.confirm("r", lines=lines(a=1), reacquire=True), "lines")


@pytest.mark.parametrize("how", ["confirm", "release"])
@pytest.mark.parametrize("wanted", [lines(a=3), lines(a=1, b=3), lines(z=1), [Line("a", 1, "m2")]], ids=shown)
async def test_closing_more_than_is_open_is_refused_and_nothing_moves(shop: Shop, how: str, wanted: list[Line]) -> None:
    before = await shop.snapshot()
    caught = await refused(getattr(shop.stock, how)("held", lines=wanted, operation_id="x"), "quantity")
    assert "held" in str(caught)
    assert await shop.snapshot() == before


async def test_a_refused_call_leaves_no_trace_in_redis(shop: Shop) -> None:
    before = await shop.snapshot()
    for act in (
        shop.stock.deduct([Line("a", -1)]),
        shop.stock.deduct(lines(a=1), operation_id="a\x1fb"),
        shop.stock.reserve(lines(a=1), ttl=0),
        shop.stock.confirm("held", lines=[]),
    ):
        with pytest.raises(errors.InvalidOperation):
            await act
    assert await shop.snapshot() == before


async def test_a_very_long_value_is_shortened_in_the_message(silent: Shop) -> None:
    caught = await refused(silent.stock.status("x" * 10_000), "operation_id")
    assert len(str(caught)) < 400
