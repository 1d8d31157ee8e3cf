"""What the decorators refuse at decoration, and the hooks they register."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from aspect_fakes import FakeStock, Shop
from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import Movement, OpeningBalance, Receipt
from inventory_sdk.stock.decorators import EVENTS
from inventory_sdk.weave import injected


async def act(order_id: str, items: Any = (), receipt: Receipt = injected()) -> None: ...
async def plain(order_id: str, items: Any = ()) -> None: ...


@pytest.fixture
def shop() -> Shop:
    return Shop(FakeStock(a=5))


@pytest.mark.parametrize(
    ("decorator", "options", "why"),
    [
        ("reserves", {}, "missing 1 required keyword-only argument: 'run'"),
        ("reserves", {"run": "soon"}, "run is 'now' or 'later'"),
        ("reserves", {"run": "now", "items": "items"}, "unexpected keyword argument 'items'"),
        ("reserves", {"run": "now", "name": "n"}, "unexpected keyword argument 'name'"),
        ("reserves", {"run": "now", "of": "order_id"}, "unexpected keyword argument 'of'"),
        ("confirms", {"run": "now", "reservation": "order_id", "session": "order_id"}, "unexpected keyword argument 'session'"),
        ("deducts", {"run": "now", "ttl": 3, "lines": "items"}, "unexpected keyword argument 'ttl'"),
        ("confirms", {"run": "now"}, "missing the keyword argument 'reservation'"),
        ("takes_back", {"run": "now", "lines": "items"}, "missing the keyword argument 'of'"),
        ("reserves", {"run": "now", "ttl": 1}, "say which stock"),
        ("restocks", {"run": "now"}, "say which stock"),
        ("reserves", {"run": "now", "lines": "items", "ttl": 1, "operation_id": "orderid"}, "no parameter 'orderid'"),
        ("reserves", {"run": "now", "lines": "items", "ttl": "seconds"}, "no parameter 'seconds'"),
        ("reserves", {"run": "now", "lines": "items", "ttl": 1, "session": "db"}, "no parameter 'db'"),
        ("restocks", {"run": "now", "lines": "items"}, "there is no Receipt to inject"),
        ("adjusts", {"run": "now", "lines": "items"}, r"write 'Receipt \| None'"),
    ],
)
def test_a_decorator_that_can_not_work_is_refused(shop: Shop, decorator: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(TypeError, match=why):
        getattr(shop, decorator)(**options)(act)


@pytest.mark.parametrize("options", [{"durability": "safe"}, {"ttl": 0}, {"ttl": True}, {"ttl": float("inf")}])
def test_a_value_that_can_not_be_is_refused_at_decoration(shop: Shop, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOperation, match=next(iter(options))):
        shop.reserves(**{"run": "now", "lines": "items", "ttl": 3, **options})(act)


def test_a_sync_function_is_refused(shop: Shop) -> None:
    def sync(order_id: str) -> None: ...

    with pytest.raises(TypeError, match="not an async function"):
        shop.reserves(run="now", sku="order_id", quantity=1, ttl=1)(sync)  # type: ignore[type-var]


def test_a_function_has_one_stock_decorator(shop: Shop) -> None:
    decorator = shop.deducts(run="now", lines="items")
    with pytest.raises(TypeError, match="two stock aspects"):
        decorator(decorator(plain))


async def test_one_decorator_may_stand_on_several_functions(shop: Shop) -> None:
    decorator = shop.deducts(run="now", sku="order_id", quantity=1)
    first, second = decorator(plain), decorator(act)
    await first("a")
    await second("a")
    assert shop.stock.available["a"] == 3


async def test_weave_decorates_by_path_and_undoes(shop: Shop) -> None:
    undo = shop.weave(f"{__name__}:plain", shop.deducts(run="now", sku="order_id", quantity=1))
    await plain("a")
    undo()
    await plain("a")
    assert shop.stock.available["a"] == 4


def test_writes_stock_and_reads_stock_are_registered_and_stay_as_they_are(shop: Shop) -> None:
    async def write(moves: Sequence[Movement], session: AsyncSession) -> None: ...

    async def read(merchant: str, skus: Sequence[str], session: AsyncSession) -> Iterable[OpeningBalance]:
        return []

    assert shop.writes_stock(write) is write
    assert shop.reads_stock(read) is read
    assert (shop._hooks.writes_stock, shop._hooks.reads_stock) == ([write], read)
    with pytest.raises(TypeError, match="already"):
        shop.reads_stock(read)


@pytest.mark.parametrize("hook", ["writes_stock", "reads_stock"])
def test_a_sync_hook_is_refused(shop: Shop, hook: str) -> None:
    with pytest.raises(TypeError, match="must be 'async def'"):
        getattr(shop, hook)(lambda *args: None)


def test_on_registers_handlers_and_lists_the_events_for_an_unknown_one(shop: Shop) -> None:
    @shop.on("expired")
    def handle(event: Any) -> None: ...

    assert shop._hooks.handlers == {"expired": [handle]}
    with pytest.raises(ValueError, match=", ".join(EVENTS)):
        shop.on("expire")
