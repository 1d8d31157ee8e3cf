"""``@inventory.gray``: callers unchanged, one side per request, and never two sellers of one stock."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gray_kit import until, watch_of

from inventory_sdk import Inventory, Line, Receipt, context, injected
from inventory_sdk.context import Side
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.metrics.events import GrayRouted

WHO: dict[str, Any] = {"who": "eva", "why": "test"}


@pytest.fixture
def inventory() -> Inventory:
    return Inventory("memory://", metrics=[NoMetrics()], merchant=None)


@pytest.fixture
async def started(inventory: Inventory) -> AsyncIterator[Inventory]:
    async with inventory:
        await inventory.gray_links.set("fast", allow=["new"], **WHO)
        yield inventory


async def fast(order: str, merchant: str = "old") -> str:
    return f"fast {order}"


def woven(inventory: Inventory, candidate: Any = fast, **options: Any) -> Any:
    @inventory.gray("fast", candidate=candidate, merchant="merchant", **options)
    async def slow(order: str, merchant: str = "old") -> str:
        """Says it."""
        return f"slow {order}"

    return slow


async def test_a_merchant_on_the_candidate_gets_the_candidate_and_nobody_else(inventory: Inventory, started: Inventory) -> None:
    slow = woven(inventory)
    assert await slow("o1") == await slow("o1", "old") == "slow o1"
    assert await slow("o1", "new") == await slow(order="o1", merchant="new") == "fast o1"
    assert (slow.__name__, slow.__doc__, str(inspect.signature(slow))) == (
        "slow",
        "Says it.",
        "(order: 'str', merchant: 'str' = 'old') -> 'str'",
    )


async def test_the_merchant_is_the_requests_where_none_is_selected(inventory: Inventory, started: Inventory) -> None:
    @inventory.gray("fast", candidate=fast)
    async def slow(order: str, merchant: str = "old") -> str:
        return f"slow {order}"

    assert await slow("o1") == "slow o1"
    token = context.merchant.set("new")
    assert await slow("o1") == "fast o1"
    context.merchant.reset(token)


def test_the_first_example_of_the_guide_runs() -> None:
    guide = Path(__file__).parents[2] / "docs/how-to/gray-links.md"
    program = guide.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    exec(compile(program, str(guide), "exec"), {"__name__": "__main__"})


class Service:
    inventory = Inventory("memory://", metrics=[NoMetrics()], merchant=None)

    def __init__(self, name: str = "s") -> None:
        self.name = name

    @inventory.gray("fast", candidate="quick_hold", merchant="m")
    async def hold(self, m: str) -> str:
        return f"{self.name} hold"

    async def quick_hold(self, m: str) -> str:
        return f"{self.name} quick"

    @classmethod
    @inventory.gray("fast", candidate="quick_make", merchant="m")
    async def make(cls, m: str) -> str:
        return f"{cls.__name__} make"

    @classmethod
    async def quick_make(cls, m: str) -> str:
        return f"{cls.__name__} quick"

    @inventory.gray("fast", candidate="quick_make", merchant="m")
    @classmethod
    async def make_2(cls, m: str) -> str:
        return f"{cls.__name__} make"

    @staticmethod
    @inventory.gray("fast", candidate="quick_count", merchant="m")
    async def count(m: str) -> str:
        return "count"

    @inventory.gray("fast", candidate="quick_count", merchant="m")
    @staticmethod
    async def count_2(m: str) -> str:
        return "count"

    @staticmethod
    async def quick_count(m: str) -> str:
        return "quick count"


class Special(Service):
    async def quick_hold(self, m: str) -> str:
        return f"{self.name} special"


async def test_methods_of_every_kind_have_their_candidates_by_name() -> None:
    async with Service.inventory as inventory:
        await inventory.gray_links.set("fast", allow=["new"], **WHO)
        service = Service("x")
        assert [await service.hold("old"), await service.hold("new"), await Service.hold(service, "new")] == [
            "x hold",
            "x quick",
            "x quick",
        ]
        assert await Special("y").hold("new") == "y special"
        for make in (Service.make, Service.make_2):
            assert [await make("old"), await make("new")] == ["Service make", "Service quick"]
        assert await Special.make("new") == "Special quick"
        for count in (Service.count, Service.count_2, service.count, service.count_2):
            assert [await count("old"), await count("new")] == ["count", "quick count"]


async def test_a_function_can_stand_in_for_a_method() -> None:
    inventory = Inventory("memory://", metrics=[NoMetrics()], merchant="new")

    async def quick(service: Any, m: int) -> str:
        return f"{service.name} {m}"

    class Shop:
        name = "shop"

        @inventory.gray("fast", candidate=quick)
        async def hold(self, m: int) -> str:
            return "slow"

    async with inventory:
        await inventory.gray_links.set("fast", percentage=100, **WHO)
        assert await Shop().hold(3) == "shop 3"


async def other_name(number: str, merchant: str = "old") -> str:
    return number


async def other_default(order: str, merchant: str = "new") -> str:
    return order


async def more(order: str, merchant: str = "old", extra: int = 1) -> str:
    return order


def sync(order: str, merchant: str = "old") -> str:
    return order


@pytest.mark.parametrize("candidate", [other_name, other_default, more, sync, "quick"])
async def test_a_candidate_that_cannot_be_called_alike_is_refused_at_start(inventory: Inventory, candidate: Any) -> None:
    woven(inventory, candidate)
    with pytest.raises(TypeError, match="slow"):
        await inventory.start()


async def test_a_candidate_that_comes_after_the_start_is_checked_at_its_first_call(inventory: Inventory, started: Inventory) -> None:
    slow = woven(inventory, more)
    with pytest.raises(TypeError, match="extra"):
        await slow("o1")


def test_what_is_no_candidate_at_all_is_refused_at_decoration(inventory: Inventory) -> None:
    with pytest.raises(TypeError, match="candidate"):
        inventory.gray("fast", candidate=7)(fast)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="shop"):
        inventory.gray("fast", candidate=fast, merchant="shop")(other_name)
    with pytest.raises(ValueError, match="link"):
        inventory.gray("Fast!", candidate=fast)(other_name)


STOCK: dict[str, Any] = {"run": "now", "operation_id": "order", "merchant": "merchant", "sku": "sku", "quantity": 1}


async def test_a_plain_candidate_runs_inside_the_stable_functions_stock_aspect(inventory: Inventory) -> None:
    async def buy_fast(order: str, merchant: str, sku: str = "a", receipt: Receipt = injected()) -> str:
        return f"fast {receipt.operation_id} {receipt.lines[0].remaining}"

    for decorate in (
        lambda f: inventory.gray("fast", candidate=buy_fast)(inventory.deducts(**STOCK)(f)),
        lambda f: inventory.deducts(**STOCK)(inventory.gray("fast", candidate=buy_fast)(f)),
    ):

        @decorate
        async def buy(order: str, merchant: str, sku: str = "a", receipt: Receipt = injected()) -> str:
            return f"slow {receipt.operation_id} {receipt.lines[0].remaining}"

    async with inventory:
        await inventory.gray_links.set("fast", allow=["new"], **WHO)
        for merchant in ("old", "new"):
            await inventory.stock.restock([Line("a", 5)], merchant=merchant, operation_id="r")
        assert await buy("o1", "old") == "slow o1 4"
        assert await buy("o1", "new") == "fast o1 4"
        assert (await inventory.stock.level("a", merchant="new")).available == 4


def stock_pair(inventory: Inventory, stable: dict[str, Any] | None, candidate: dict[str, Any] | None) -> None:
    async def buy_fast(order: str, merchant: str, sku: str = "a") -> None: ...

    async def buy(order: str, merchant: str, sku: str = "a") -> None: ...

    other = buy_fast if candidate is None else inventory.deducts(**candidate)(buy_fast)
    mine = buy if stable is None else inventory.deducts(**stable)(buy)
    inventory.gray("fast", candidate=other, merchant=None)(mine)


@pytest.mark.parametrize(
    ("stable", "candidate", "named"),
    [
        (STOCK, {**STOCK, "quantity": 2}, "quantity=2 instead of 1"),
        (STOCK, {**STOCK, "sku": lambda: "b"}, "sku"),
        (STOCK, {**STOCK, "run": "later", "name": "buy"}, "must be plain"),
        ({**STOCK, "run": "later", "name": "buy"}, {**STOCK, "run": "later", "name": "buy-2"}, "must be plain"),
        (None, STOCK, "two sellers"),
    ],
)
async def test_a_candidate_that_does_something_else_to_stock_is_refused_at_start(
    inventory: Inventory, stable: dict[str, Any] | None, candidate: dict[str, Any], named: str
) -> None:
    stock_pair(inventory, stable, candidate)
    with pytest.raises(TypeError, match=named):
        await inventory.start()


async def test_a_candidate_with_another_kind_of_act_or_with_a_lane_only_is_refused(inventory: Inventory) -> None:
    async def buy_fast(order: str, merchant: str, sku: str = "a") -> None: ...

    async def buy(order: str, merchant: str, sku: str = "a") -> None: ...

    inventory.gray("fast", candidate=inventory.restocks(**STOCK)(buy_fast))(inventory.deducts(**STOCK)(buy))
    with pytest.raises(TypeError, match="kind"):
        await inventory.start()
    again = Inventory("memory://", metrics=[NoMetrics()])
    again.gray("fast", candidate=again.lane("core")(buy_fast))(again.deducts(**STOCK)(buy))
    with pytest.raises(TypeError, match="leave it plain"):
        await again.start()


async def test_a_candidate_with_the_same_stock_aspect_and_a_lane_of_its_own_is_called_as_a_whole() -> None:
    inventory = Inventory("memory://", metrics=[NoMetrics()])
    seen: list[str] = []

    @inventory.lane("batch")
    @inventory.deducts(**STOCK)
    async def buy_fast(order: str, merchant: str, sku: str = "a") -> None:
        seen.append(context.lane.get())

    @inventory.gray("fast", candidate=buy_fast)
    @inventory.deducts(**STOCK)
    async def buy(order: str, merchant: str, sku: str = "a") -> None:
        seen.append(context.lane.get())

    async with inventory:
        await inventory.gray_links.set("fast", allow=["new"], **WHO)
        for merchant in ("old", "new"):
            await inventory.stock.restock([Line("a", 5)], merchant=merchant, operation_id="r")
            await buy("o1", merchant)
            assert (await inventory.stock.level("a", merchant=merchant)).available == 4
    assert seen == [context.DEFAULT_LANE, "batch"]


async def test_within_a_request_a_link_answers_a_merchant_once_but_a_kill_is_heard(inventory: Inventory, started: Inventory) -> None:
    links = inventory.gray_links
    slow = woven(inventory)
    context.sides.set({})
    assert await slow("o1", "new") == "fast o1"
    await links.set("fast", allow=[], **WHO)
    assert await slow("o1", "new") == "fast o1"
    assert links.explain("fast", "new").variant == "stable"
    await links.kill("fast", **WHO)
    assert await slow("o1", "new") == "slow o1"
    assert links.baggage() == f"inventory-gray.fast=stable:{links.known('fast').version}:new"
    await links.restore("fast", **WHO)
    assert await slow("o1", "new") == "slow o1"


@pytest.mark.parametrize("stop", [{"killed": True}, {"deny": ["m1"]}, {"taken_back": ["m1"]}])
async def test_a_kill_beats_what_was_decided_where_the_request_came_from(
    inventory: Inventory, started: Inventory, stop: dict[str, Any]
) -> None:
    links = inventory.gray_links
    context.sides.set({("fast", "m1"): Side("candidate", 1)})
    assert links.decide("fast", "m1") == ("candidate", 1, "carried")
    await links.set("fast", **stop, **WHO)
    assert links.decide("fast", "m1").variant == "stable"


async def test_a_decision_made_by_newer_rules_stands_over_older_ones_even_a_kill(inventory: Inventory, started: Inventory) -> None:
    links = inventory.gray_links
    await links.kill("fast", **WHO)
    context.sides.set({("fast", "m1"): Side("candidate", 9), ("fast", "m2"): Side("candidate", 1)})
    assert links.decide("fast", "m1") == ("candidate", 9, "carried")
    assert links.decide("fast", "m2").reason == "killed"


async def test_every_call_is_counted_on_its_side_once_and_a_cancelled_one_is_not(inventory: Inventory, started: Inventory) -> None:
    events: list[Any] = []
    watch = watch_of(inventory.gray_links)
    gate = asyncio.Event()

    async def fails(order: str, merchant: str = "old") -> str:
        if order == "wait":
            await gate.wait()
        raise KeyError(order)

    slow = woven(inventory, fails)
    await slow("o1")
    for _ in range(2):
        with pytest.raises(KeyError):
            await slow("o1", "new")
    task = asyncio.ensure_future(slow("wait", "new"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    class Sink:
        def record(self, event: Any) -> None:
            events.append(event)

    object.__setattr__(watch.ground, "metrics", Sink())
    await watch.flush()
    routed = {(each.variant, each.calls, each.errors) for each in events if isinstance(each, GrayRouted)}
    assert routed == {("stable", 1, 0), ("candidate", 2, 2)}
    assert context.sides.get() is None


async def test_attributes_decide_where_the_rules_ask_for_them(inventory: Inventory) -> None:
    @inventory.gray_links.attributes
    def attributes(merchant: str) -> dict[str, Any]:
        if merchant == "broken":
            raise KeyError(merchant)
        return {"region": "eu", "level": 3} if merchant == "m1" else {}

    with pytest.raises(TypeError, match="already"):
        inventory.gray_links.attributes(attributes)
    async with inventory:
        await inventory.gray_links.set("fast", percentage=100, where={"region": ["eu"], "level": ["3"]}, **WHO)
        assert [inventory.gray_links.decide("fast", each).variant for each in ("m1", "m2", "broken")] == ["candidate", "stable", "stable"]


async def test_a_later_function_runs_on_the_side_of_its_caller_unless_it_was_killed_since(inventory: Inventory) -> None:
    ran: list[str] = []
    carried: list[Any] = []

    async def book_fast(order: str, merchant: str, sku: str = "a") -> None:
        ran.append(f"fast {order}")
        carried.append((context.merchant.get(), dict(context.sides.get() or {})))

    @inventory.deducts(**{**STOCK, "run": "later"}, name="book")
    @inventory.gray("fast", candidate=book_fast)
    async def book(order: str, merchant: str, sku: str = "a") -> None:
        ran.append(f"slow {order}")

    links = inventory.gray_links
    async with inventory:
        await links.set("fast", allow=["new"], **WHO)
        for merchant in ("old", "new"):
            await inventory.stock.restock([Line("a", 5)], merchant=merchant, operation_id="r")
            token = context.merchant.set(merchant)
            await book(f"{merchant}-1", merchant)
            context.merchant.reset(token)
        await until(lambda: len(ran) == 2)
        assert set(ran) == {"slow old-1", "fast new-1"}
        assert carried == [("new", {("fast", "new"): Side("candidate", 1)})]
        # decided under rules that are changed, and then killed, before the worker comes to it
        context.sides.set({("fast", "new"): Side("candidate", 1)})
        await links.set("fast", allow=[], **WHO)
        await book("new-2", "new")
        await until(lambda: len(ran) == 3)
        assert ran[2] == "fast new-2"
        await links.kill("fast", **WHO)
        context.sides.set({("fast", "new"): Side("candidate", 1)})
        await book("new-3", "new")
        await until(lambda: len(ran) == 4)
        assert ran[3] == "slow new-3"


class LateService:
    inventory = Inventory("memory://", metrics=[NoMetrics()], merchant="new")
    ran: tuple[str, ...] = ()

    @inventory.gray("fast", candidate="quick")
    @inventory.deducts(run="later", name="late-book", operation_id="order", sku=lambda: "a", quantity=1)
    async def book(self, order: str) -> None:
        type(self).ran += (f"slow {order}",)

    async def quick(self, order: str) -> None:
        type(self).ran += (f"quick {order}",)


@LateService.inventory.provides(LateService)
def make_service(session: Any) -> LateService:
    return LateService()


async def test_a_later_method_has_its_candidate_too() -> None:
    async with LateService.inventory as inventory:
        await inventory.gray_links.set("fast", percentage=100, **WHO)
        await inventory.stock.restock([Line("a", 5)], operation_id="r")
        await LateService().book("o1")
        await until(lambda: LateService.ran)
    assert LateService.ran == ("quick o1",)


async def test_the_merchant_of_a_later_function_is_its_stock_decorators(inventory: Inventory) -> None:
    with pytest.raises(TypeError, match="stock decorator"):

        @inventory.gray("fast", candidate=fast, merchant="merchant")
        @inventory.deducts(**{**STOCK, "run": "later", "sku": lambda: "a"}, name="book")
        async def slow(order: str, merchant: str = "old") -> None: ...


async def test_replaced_parts_have_rules_of_their_own(inventory: Inventory, started: Inventory) -> None:
    slow = woven(inventory)
    assert await slow("o1", "new") == "fast o1"
    async with inventory.replaced():
        assert await slow("o1", "new") == "slow o1"
    assert await slow("o1", "new") == "fast o1"
