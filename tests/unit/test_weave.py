from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import sys
import types
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI

from inventory_sdk.model import Receipt
from inventory_sdk.weave import Call, Order, Proceed, Site, injected, owner_of, site_of, weave, weave_in_place

RECEIPT = Receipt("o", "reserve", "m", None, (), (), "redis")


class Tracing:
    """Notes that it ran, and gives a receipt."""

    def __init__(self, order: Order = Order.STOCK, trace: list[str] | None = None) -> None:
        self.order = order
        self.trace: list[str] = [] if trace is None else trace

    def compile(self, site: Site, proceed: Proceed) -> Proceed:
        async def run(call: Call) -> Any:
            self.trace.append(self.order.name)
            call.give(Receipt, RECEIPT)
            return await proceed(call)

        return run


def traced(function: Any) -> Any:
    return weave(function, Tracing())


@traced
async def place(order_id: str, count: int = 1, *, note: str = "", receipt: Receipt = injected()) -> Any:
    """Places."""
    return order_id, count, note, receipt


class Service:
    @traced
    async def method(self, name: str, receipt: Receipt = injected()) -> Any:
        return self, name, receipt

    @traced
    @classmethod
    async def above(cls, name: str, receipt: Receipt = injected()) -> Any:
        return cls, name, receipt

    @classmethod
    @traced
    async def below(cls, name: str, receipt: Receipt = injected()) -> Any:
        return cls, name, receipt

    @traced
    @staticmethod
    async def static_above(name: str, receipt: Receipt = injected()) -> Any:
        return None, name, receipt

    @staticmethod
    @traced
    async def static_below(name: str, receipt: Receipt = injected()) -> Any:
        return None, name, receipt


class Heir(Service):
    pass


async def test_a_function_takes_its_arguments_by_position_and_keyword_and_keeps_its_defaults() -> None:
    assert await place("a") == ("a", 1, "", RECEIPT)
    assert await place("a", 2, note="n") == ("a", 2, "n", RECEIPT)
    assert await place(order_id="a", count=3) == ("a", 3, "", RECEIPT)


@pytest.mark.parametrize("name", ["method", "above", "below", "static_above", "static_below"])
async def test_every_kind_of_method_gets_its_receiver_and_the_injected_receipt(name: str) -> None:
    heir = Heir()
    receiver = {"method": heir, "above": Heir, "below": Heir}.get(name)
    assert await getattr(heir, name)("x") == (receiver, "x", RECEIPT)
    if name != "method":
        assert await getattr(Heir, name)(name="x") == (receiver, "x", RECEIPT)


async def test_a_method_called_through_its_class_gets_the_instance_that_was_passed() -> None:
    service = Service()
    assert await Service.method(service, "x") == (service, "x", RECEIPT)


async def test_a_bound_method_can_be_woven() -> None:
    class Plain:
        async def method(self, name: str, receipt: Receipt = injected()) -> Any:
            return self, name, receipt

    plain = Plain()
    woven = weave(plain.method, Tracing())
    assert await woven("x") == (plain, "x", RECEIPT)
    assert str(inspect.signature(woven)) == "(name: 'str') -> 'Any'"


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (place, ["order_id", "count", "note"]),
        (Service.method, ["self", "name"]),
        (Service().method, ["name"]),
        (Service.above, ["name"]),
        (Service().below, ["name"]),
        (Service.static_above, ["name"]),
    ],
)
def test_injected_parameters_are_not_in_the_signature_and_the_function_still_looks_async(function: Any, names: list[str]) -> None:
    assert list(inspect.signature(function).parameters) == names
    assert inspect.iscoroutinefunction(function)


async def test_a_passed_receipt_is_not_replaced() -> None:
    other = Receipt("mine", "reserve", "m", None, (), (), "redis")
    assert (await place("a", receipt=other))[3] is other


def test_name_doc_and_pickling_stay() -> None:
    assert (place.__name__, place.__qualname__, place.__doc__, place.__module__) == ("place", "place", "Places.", __name__)
    assert pickle.loads(pickle.dumps(place)) is place
    assert pickle.loads(pickle.dumps(Service.above)).__qualname__ == "Service.above"
    assert copy.deepcopy(place) is place


async def test_stacked_aspects_run_in_the_fixed_order_behind_one_wrapper() -> None:
    trace: list[str] = []

    async def function() -> None:
        trace.append("function")

    woven: Any = function
    for order in (Order.VERIFY, Order.LANE, Order.STOCK, Order.HOTSPOT, Order.GRAY):
        woven = weave(woven, Tracing(order, trace))
    await woven()
    assert trace == ["LANE", "GRAY", "HOTSPOT", "STOCK", "VERIFY", "function"]
    assert woven.__wrapped__ is function


async def test_stacking_over_a_woven_classmethod_and_staticmethod_weaves_the_function_inside() -> None:
    trace: list[str] = []

    class Stacked:
        @lambda function: weave(function, Tracing(Order.LANE, trace))
        @classmethod
        @lambda function: weave(function, Tracing(Order.STOCK, trace))
        async def run(cls) -> Any:
            return cls

    assert await Stacked.run() is Stacked
    assert trace == ["LANE", "STOCK"]


async def test_weaving_again_leaves_the_first_woven_function_as_it_was() -> None:
    trace: list[str] = []
    first = weave(place.__wrapped__, Tracing(Order.STOCK, trace))
    weave(first, Tracing(Order.LANE, trace))
    await first("a")
    assert trace == ["STOCK"]


def test_two_aspects_of_one_order_are_refused() -> None:
    with pytest.raises(TypeError, match=r"test_weave:place has two stock aspects"):
        weave(place, Tracing())


def test_a_sync_function_is_refused_at_decoration() -> None:
    def sync() -> None: ...

    with pytest.raises(TypeError, match=r"sync is not an async function"):
        weave(sync, Tracing())


def test_an_async_generator_is_refused_at_decoration() -> None:
    async def generate() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(TypeError, match="async generator"):
        weave(generate, Tracing())


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (place, r"place\(\) missing 1 required positional argument: 'order_id'"),
        (lambda: place("a", nope=1), r"place\(\) got an unexpected keyword argument 'nope'"),
        (lambda: place("a", 1, 2), r"place\(\) takes from 1 to 2 positional arguments but 3"),
        (lambda: Service().method(), r"Service.method\(\) missing 1 required positional argument: 'name'"),
    ],
)
async def test_a_wrong_call_is_refused_in_pythons_words(call: Any, why: str) -> None:
    with pytest.raises(TypeError, match=why):
        await call()


def test_positional_only_keyword_only_and_starred_parameters_bind_like_the_function() -> None:
    async def function(a: int, /, b: int = 2, *rest: int, c: int, d: int = 4, **more: int) -> None: ...

    site = site_of(weave(function, Tracing()))
    assert site is not None
    assert site.bind(1, c=3) == (1, 2, (), 3, 4, {})
    assert site.bind(1, 5, 6, 7, c=3, e=8) == (1, 5, (6, 7), 3, 4, {"e": 8})


def test_an_injected_parameter_needs_an_annotation_that_can_be_resolved() -> None:
    async def bare(receipt=injected()) -> None: ...  # type: ignore[no-untyped-def]

    async def unknown(receipt: Nowhere = injected()) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    async def positional(receipt: Receipt = injected(), /) -> None: ...

    with pytest.raises(TypeError, match="'receipt' needs an annotation"):
        weave(bare, Tracing())
    with pytest.raises(TypeError, match="'Nowhere' of 'receipt' can't be resolved"):
        weave(unknown, Tracing())
    with pytest.raises(TypeError, match="must not be positional-only"):
        weave(positional, Tracing())


async def test_what_nothing_injects_is_named_at_the_call() -> None:
    async def function(clock: int = injected()) -> None: ...

    with pytest.raises(TypeError, match="nothing injects 'clock'"):
        await weave(function, Tracing())()


def test_the_owner_of_a_method_is_known_also_below_classmethod() -> None:
    for name in ("method", "above", "below"):
        site = site_of(Service.__dict__[name])
        assert site is not None
        assert owner_of(site) is Service
    for name in ("static_above", "static_below"):
        site = site_of(Service.__dict__[name])
        assert site is not None
        assert site.receiver is None


async def from_cart(name: str, receipt: Receipt = injected()) -> str:
    return name


async def test_fastapi_sees_neither_injected_parameters_nor_a_sync_function() -> None:
    app = FastAPI()
    service = Service()

    @app.get("/{name}")
    async def get(placed: Any = Depends(place), method: Any = Depends(service.method)) -> list[str]:
        return [placed[0], method[1]]

    app.get("/direct/{name}")(traced(from_cart))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        assert (await client.get("/bob", params={"order_id": "o1"})).json() == ["o1", "bob"]
        assert (await client.get("/direct/ann")).json() == "ann"
        shown = (await client.get("/openapi.json")).text
    assert "receipt" not in shown


@pytest.fixture
def shop() -> Iterator[types.ModuleType]:
    module = types.ModuleType("a_shop_nobody_edits")
    code = """
async def pay(amount): return amount
class Base:
    async def hold(self, sku): return self, sku
    @staticmethod
    async def free(sku): return sku
class Child(Base): pass
"""
    exec(code, module.__dict__)
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


async def test_weaving_by_path_wraps_in_place_and_can_be_undone(shop: types.ModuleType) -> None:
    before = dict(vars(shop.Base)), shop.pay
    trace: list[str] = []
    undo = [
        weave_in_place(f"{shop.__name__}:{path}", lambda function: weave(function, Tracing(trace=trace)))
        for path in ("pay", "Base.hold", "Base.free")
    ]
    base = shop.Base()
    assert (await shop.pay(3), await base.hold("a"), await shop.Base.free("b")) == (3, (base, "a"), "b")
    assert len(trace) == 3
    for each in undo:
        each()
    assert (dict(vars(shop.Base)), shop.pay) == before


async def test_weaving_an_inherited_method_by_path_leaves_the_parent_alone(shop: types.ModuleType) -> None:
    trace: list[str] = []
    undo = weave_in_place(f"{shop.__name__}:Child.hold", lambda function: weave(function, Tracing(trace=trace)))
    await shop.Base().hold("a")
    assert trace == []
    await shop.Child().hold("a")
    assert trace == ["STOCK"]
    undo()
    assert "hold" not in vars(shop.Child)


async def test_several_decorators_by_path_stand_in_the_order_they_are_named(shop: types.ModuleType) -> None:
    trace: list[str] = []
    weave_in_place(
        f"{shop.__name__}:pay",
        lambda function: weave(function, Tracing(Order.LANE, trace)),
        lambda function: weave(function, Tracing(Order.STOCK, trace)),
    )
    await shop.pay(1)
    assert trace == ["LANE", "STOCK"]


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("a_shop_nobody_edits", TypeError),
        ("a_shop_nobody_edits:", TypeError),
        ("a_shop_nobody_edits:refund", AttributeError),
        ("no_such_module:pay", ModuleNotFoundError),
    ],
)
def test_a_path_to_nothing_is_refused(shop: types.ModuleType, path: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        weave_in_place(path, traced)


async def test_concurrent_calls_do_not_share_what_is_injected() -> None:
    class Numbering:
        order = Order.STOCK

        def compile(self, site: Site, proceed: Proceed) -> Proceed:
            async def run(call: Call) -> Any:
                call.give(int, call.values()[0])
                await asyncio.sleep(0)
                return await proceed(call)

            return run

    async def function(number: int, same: int = injected()) -> bool:
        return number == same

    woven = weave(function, Numbering())
    assert all(await asyncio.gather(*[woven(number) for number in range(20)]))
