"""``run="later"``: the caller moves stock and goes on, the worker calls the function."""

from __future__ import annotations

import datetime
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
from aspect_fakes import FakeStock, Shop
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from inventory_sdk.errors import InsufficientStock, InvalidOperation
from inventory_sdk.model import Receipt
from inventory_sdk.stock.later import TaskUnreadable
from inventory_sdk.weave import injected

RECEIPT = Receipt("o1", "deduct", "m1", None, (), (), "redis")
CALLS: list[Any] = []


class Item(BaseModel):
    sku: str
    qty: int
    price: Decimal = Decimal("1.10")


@dataclass
class Address:
    street: str
    since: datetime.date


@dataclass(frozen=True)
class Stored:
    name: str
    version: int
    arguments: str


@pytest.fixture
def stock() -> FakeStock:
    return FakeStock(a=5)


@pytest.fixture
def shop(stock: FakeStock) -> Shop:
    CALLS.clear()
    return Shop(stock)


@pytest.fixture
async def session() -> AsyncIterator[AsyncSession]:
    async with AsyncSession() as session:
        yield session


def stored(stock: FakeStock) -> Stored:
    """The task of the last call, as it comes back from the ledger."""
    task = stock.asked[-1][1]["task"]
    return Stored(task["name"], task["version"], json.dumps(task["arguments"]))


OPTIONS: dict[str, Any] = {"run": "later", "operation_id": "order_id", "sku": lambda: "a", "quantity": 1}


async def test_the_caller_gets_the_receipt_and_the_worker_calls_with_the_same_arguments(
    shop: Shop, stock: FakeStock, session: AsyncSession
) -> None:
    @shop.deducts(**OPTIONS, name="book")
    async def book(
        order_id: str,
        items: list[Item],
        to: Address | None = None,
        *,
        tags: frozenset[str] = frozenset(),
        own: AsyncSession = injected(),
        sync: Session = injected(),
        receipt: Receipt = injected(),
    ) -> None:
        CALLS.append((order_id, items, to, tags, own, sync, receipt))

    arguments = ("o1", [Item(sku="a", qty=1, price=Decimal("2.50"))], Address("x", datetime.date(2020, 1, 2)))
    receipt = await book(*arguments, tags=frozenset({"gift"}))
    assert (receipt.operation_id, stock.available["a"], CALLS) == ("o1", 4, [])
    await shop._registry.run(stored(stock), session, RECEIPT)
    assert [(*arguments, frozenset({"gift"}), session, session.sync_session, RECEIPT)] == CALLS


async def test_result_makes_what_the_caller_gets(shop: Shop) -> None:
    @shop.deducts(**OPTIONS, name="book", result=lambda receipt: receipt.operation_id.upper())
    async def book(order_id: str) -> None: ...

    assert await book("o1") == "O1"


async def test_a_refusal_stores_nothing_and_is_translated(shop: Shop, stock: FakeStock) -> None:
    @shop.deducts(run="later", name="book", sku=lambda: "a", quantity=9, raises={InsufficientStock: KeyError})
    async def book(order_id: str) -> None: ...

    with pytest.raises(KeyError):
        await book("o1")


@pytest.mark.parametrize("bad", [{"order_id": 3}, {"order_id": "o1", "count": "many"}, {"order_id": "o1", "share": float("nan")}])
async def test_arguments_that_could_not_be_read_back_are_refused_before_stock_moves(
    shop: Shop, stock: FakeStock, bad: dict[str, Any]
) -> None:
    @shop.deducts(run="later", name="book", sku=lambda: "a", quantity=1)
    async def book(order_id: str, count: int = 1, share: float = 0.5) -> None: ...

    with pytest.raises(InvalidOperation, match="can't be kept"):
        await book(**bad)
    assert stock.log == []


async def test_what_the_worker_gives_can_not_be_passed(shop: Shop, session: AsyncSession) -> None:
    @shop.deducts(**OPTIONS, name="book")
    async def book(order_id: str, own: AsyncSession = injected()) -> None: ...

    with pytest.raises(TypeError, match="'own' is given by the worker"):
        await book("o1", own=session)


def decorated(function: Callable[..., Any], **options: Any) -> Callable[[], Any]:
    settings = {"run": "later", "name": "book", "sku": lambda: "a", "quantity": 1, **options}
    return lambda: Shop(FakeStock()).deducts(**settings)(function)


class NoSchema:
    pass


async def unannotated(order_id) -> None: ...  # type: ignore[no-untyped-def]
async def anything(order_id: Any) -> None: ...
async def unknown_type(order_id: NoSchema) -> None: ...
async def function_argument(order_id: Callable[[], None]) -> None: ...
async def unresolved(order_id: Nowhere) -> None: ...  # type: ignore[name-defined]  # noqa: F821
async def starred(*order_ids: str) -> None: ...
async def with_session(order_id: str, session: AsyncSession) -> None: ...
async def returning(order_id: str) -> int:
    return 1


async def injecting(order_id: str, clock: int = injected()) -> None: ...
async def good(order_id: str) -> None: ...


@pytest.mark.parametrize(
    ("function", "options", "why"),
    [
        (unannotated, {}, "'order_id' needs an annotation"),
        (anything, {}, "'order_id' needs an annotation"),
        (unknown_type, {}, "'order_id' is .*NoSchema.* can't be kept as JSON"),
        (function_argument, {}, "'order_id' is .*Callable.* can't be kept as JSON"),
        (unresolved, {}, "'Nowhere' of 'order_id' can't be resolved"),
        (starred, {}, r"\*order_ids.* can't be kept for later"),
        (with_session, {}, "'session' is a session"),
        (returning, {}, "returns None"),
        (injecting, {}, "'clock' is <class 'int'>"),
        (good, {"name": None}, "missing the keyword argument 'name'"),
        (good, {"name": 3}, "needs name="),
        (good, {"version": 0}, "version=0"),
        (good, {"version": True}, "version=True"),
        (good, {"version": 2, "upgrade": {2: dict}}, "upgrade="),
        (good, {"version": 2, "upgrade": {1: None}}, "upgrade="),
        (good, {"result": good}, "result is a function of the receipt"),
        (good, {"session": "order_id"}, "unexpected keyword argument 'session'"),
    ],
)
def test_a_function_that_can_not_run_later_is_refused_at_decoration(function: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(TypeError, match=why):
        decorated(function, **options)()


def test_a_name_belongs_to_one_function(shop: Shop) -> None:
    book = shop.deducts(**OPTIONS, name="book")
    book(good)
    book(good)
    with pytest.raises(TypeError, match=r"name='book' of .*other is taken by .*good"):

        @book
        async def other(order_id: str) -> None: ...


async def test_older_versions_are_upgraded_step_by_step(shop: Shop, session: AsyncSession) -> None:
    def rename(arguments: dict[str, Any]) -> dict[str, Any]:
        return {"order_id": arguments["order"]}

    def add(arguments: dict[str, Any]) -> dict[str, Any]:
        return {**arguments, "count": 1}

    @shop.deducts(**OPTIONS, name="book", version=3, upgrade={1: rename, 2: add})
    async def book(order_id: str, count: int) -> None:
        CALLS.append((order_id, count))

    for version, arguments in [(1, {"order": "a"}), (2, {"order_id": "b"}), (3, {"order_id": "c", "count": 7})]:
        await shop._registry.run(Stored("book", version, json.dumps(arguments)), session, RECEIPT)
    assert CALLS == [("a", 1), ("b", 1), ("c", 7)]


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (Stored("boook", 2, "{}"), "no function is registered as 'boook'"),
        (Stored("book", 3, "{}"), "stored as version 3, this process knows 2"),
        (Stored("book", 1, "{}"), "upgrade= has no function for 1"),
        (Stored("book", 2, "{"), "not JSON"),
        (Stored("book", 2, "{}"), "missing order_id"),
        (Stored("book", 2, '{"order_id": "a", "count": 1}'), "unknown count"),
        (Stored("book", 2, '{"order_id": 3}'), "the stored 'order_id' doesn't fit"),
    ],
)
async def test_a_task_that_can_not_be_read_says_why(shop: Shop, session: AsyncSession, task: Stored, why: str) -> None:
    @shop.deducts(**OPTIONS, name="book", version=2)
    async def book(order_id: str) -> None: ...

    with pytest.raises(TaskUnreadable, match=why):
        await shop._registry.run(task, session, RECEIPT)


SHOP = Shop(FakeStock(a=100))


class Service:
    def __init__(self, session: Any) -> None:
        self.session = session

    @SHOP.deducts(**OPTIONS, name="Service.book")
    async def book(self, order_id: str) -> None:
        CALLS.append((self.session, order_id))
        if order_id == "fails":
            raise RuntimeError

    @classmethod
    @SHOP.deducts(**OPTIONS, name="Service.note")
    async def note(cls, order_id: str) -> None:
        CALLS.append((cls, order_id))

    @staticmethod
    @SHOP.deducts(**OPTIONS, name="Service.log")
    async def log(order_id: str) -> None:
        CALLS.append(order_id)


def plain(session: Any) -> Service:
    return Service(session)


async def asynchronous(session: Any) -> Service:
    return Service(session)


async def yielding(session: Any) -> AsyncIterator[Service]:
    try:
        yield Service(session)
    except RuntimeError:
        CALLS.append("failed")
        raise
    finally:
        CALLS.append("closed")


def yielding_sync(session: Any) -> Iterator[Service]:
    yield Service(session)
    CALLS.append("closed")


@asynccontextmanager
async def managed(session: Any) -> AsyncIterator[Service]:
    yield Service(session)
    CALLS.append("closed")


@pytest.fixture
def without_providers() -> Iterator[None]:
    CALLS.clear()
    SHOP._registry._providers.clear()
    yield
    SHOP._registry._providers.clear()


@pytest.mark.usefixtures("without_providers")
@pytest.mark.parametrize(
    ("make", "after"),
    [(plain, []), (asynchronous, []), (yielding, ["closed"]), (yielding_sync, ["closed"]), (managed, ["closed"])],
)
async def test_a_method_gets_its_self_from_the_provider(session: AsyncSession, make: Any, after: list[str]) -> None:
    SHOP.provides(Service)(make)
    SHOP._registry.check()
    await Service("caller").book("o-" + make.__name__)
    await SHOP._registry.run(stored(SHOP.stock), session, RECEIPT)
    assert [(session, "o-" + make.__name__), *after] == CALLS


@pytest.mark.usefixtures("without_providers")
async def test_a_provider_that_yields_sees_the_methods_error(session: AsyncSession) -> None:
    SHOP.provides(Service)(yielding)
    with pytest.raises(RuntimeError):
        await SHOP._registry.run(Stored("Service.book", 1, '{"order_id": "fails"}'), session, RECEIPT)
    assert [(session, "fails"), "failed", "closed"] == CALLS


@pytest.mark.usefixtures("without_providers")
async def test_classmethods_and_staticmethods_need_no_provider(session: AsyncSession) -> None:
    for name in ("Service.note", "Service.log"):
        await SHOP._registry.run(Stored(name, 1, '{"order_id": "x"}'), session, RECEIPT)
    assert [(Service, "x"), "x"] == CALLS


@pytest.mark.usefixtures("without_providers")
async def test_a_subclass_may_provide_unless_there_are_two(session: AsyncSession) -> None:
    class One(Service): ...

    class Two(Service): ...

    SHOP.provides(One)(One)
    SHOP._registry.check()
    await SHOP._registry.run(Stored("Service.book", 1, '{"order_id": "x"}'), session, RECEIPT)
    assert [(session, "x")] == CALLS
    SHOP.provides(Two)(Two)
    with pytest.raises(TypeError, match="several subclasses have one"):
        SHOP._registry.check()


@pytest.mark.usefixtures("without_providers")
def test_a_missing_provider_is_named_at_the_start() -> None:
    with pytest.raises(TypeError, match=r"Service.book runs later and needs a Service: add @inventory.provides\(Service\)"):
        SHOP._registry.check()


@pytest.mark.usefixtures("without_providers")
async def test_a_provider_of_something_else_is_refused(session: AsyncSession) -> None:
    SHOP.provides(Service)(lambda session: 3)
    with pytest.raises(TypeError, match="gave int"):
        await SHOP._registry.run(Stored("Service.book", 1, '{"order_id": "x"}'), session, RECEIPT)
    with pytest.raises(TypeError, match="is there already"):
        SHOP.provides(Service)(plain)
