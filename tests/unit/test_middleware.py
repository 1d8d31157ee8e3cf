"""The middleware by itself: what passes untouched, who is believed, whose errors are answered, and the inventory's life."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from inventory_sdk import (
    DeadlineExceeded,
    HotspotLimited,
    InvalidOperation,
    Inventory,
    InventoryError,
    InventoryMiddleware,
    Lane,
    NotStarted,
    OutcomeUnknown,
    Overloaded,
    context,
)
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.web.problem import problem
from tests.unit.test_errors import SAMPLES


@pytest.fixture
def inventory() -> Inventory:
    return Inventory("memory://", metrics=[NoMetrics()], lanes={"core": Lane(), "batch": Lane()})


def scope_of(path: str = "/", headers: dict[str, str] | None = None, kind: str = "http", client: Any = ("10.1.2.3", 9)) -> dict[str, Any]:
    raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    return {"type": kind, "path": path, "headers": raw, "client": client, "method": "POST"}


async def nothing() -> Any:
    raise AssertionError("nobody asked for a message")


async def call(middleware: Any, scope: dict[str, Any]) -> list[Any]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await middleware(scope, nothing, send)
    return sent


class Showing:
    """An app that notes where it runs."""

    def __init__(self) -> None:
        self.lane = self.merchant = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.lane, self.merchant = context.lane.get(), context.merchant.get() or ""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_what_is_not_http_passes_with_the_very_same_objects(inventory: Inventory, kind: str) -> None:
    passed: list[Any] = []

    async def app(*arguments: Any) -> None:
        passed.extend(arguments)

    arguments = (scope_of(kind=kind), nothing, nothing)
    await InventoryMiddleware(app, inventory=inventory, lane="core")(*arguments)
    assert [id(each) for each in passed] == [id(each) for each in arguments]


async def test_messages_pass_as_they_are(inventory: Inventory) -> None:
    messages = [{"type": "http.response.start", "status": 200}, {"type": "http.response.body"}, {"type": "http.response.zerocopysend"}]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert receive is nothing
        for message in messages:
            await send(message)

    sent = await call(InventoryMiddleware(app, inventory=inventory, lane="core"), scope_of())
    assert all(one is other for one, other in zip(sent, messages, strict=True))


@pytest.mark.parametrize(
    ("path", "lane"),
    [("/", "default"), ("/shop", "core"), ("/shop/a", "core"), ("/shopping", "default"), ("/shop/imports/7", "batch")],
)
async def test_the_longest_prefix_of_whole_segments_names_the_lane(inventory: Inventory, path: str, lane: str) -> None:
    app = Showing()
    await call(InventoryMiddleware(app, inventory=inventory, lane={"/shop/": "core", "/shop/imports": "batch"}), scope_of(path))
    assert app.lane == lane


async def test_a_function_or_a_header_may_choose_the_lane(inventory: Inventory) -> None:
    app = Showing()
    middleware = InventoryMiddleware(
        app, inventory=inventory, lane=lambda scope: "core" if scope["method"] == "POST" else None, lane_header="X-Lane"
    )
    await call(middleware, scope_of())
    assert app.lane == "core"
    await call(middleware, scope_of(headers={"X-Lane": "batch"}))
    assert app.lane == "batch"
    (start, _) = await call(middleware, scope_of(headers={"X-Lane": "fast"}))
    assert start["status"] == 422


async def test_headers_that_are_not_configured_or_come_from_strangers_are_not_read(inventory: Inventory) -> None:
    app = Showing()
    told = scope_of(headers={"X-Merchant": "m7", "Idempotency-Key": "\x01"})
    await call(InventoryMiddleware(app, inventory=inventory), told)
    assert app.merchant == ""
    middleware = InventoryMiddleware(app, inventory=inventory, merchant_header="X-Merchant", trusted=["10.1.0.0/16", "::1/128"])
    for client in (("10.2.0.1", 9), None, ("unix:", 0), ("::2", 9)):
        await call(middleware, told | {"client": client})
        assert app.merchant == ""
    for client in (("10.1.2.3", 9), ("::1", 9)):
        await call(middleware, told | {"client": client})
        assert app.merchant == "m7"
    assert context.merchant.get() is None


async def test_a_header_that_comes_twice_is_refused(inventory: Inventory) -> None:
    scope = scope_of(headers={"X-Merchant": "m7"})
    scope["headers"] *= 2
    (start, _) = await call(InventoryMiddleware(Showing(), inventory=inventory, merchant_header="X-Merchant"), scope)
    assert start["status"] == 422


async def test_a_deadline_longer_than_allowed_is_cut(inventory: Inventory) -> None:
    left: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        left.append(context.remaining())

    middleware = InventoryMiddleware(app, inventory=inventory, deadline_header="X-Deadline", max_deadline=2.0)
    await call(middleware, scope_of(headers={"X-Deadline": "999999"}))
    assert 1 < left[0] <= 2
    (start, _) = await call(middleware, scope_of(headers={"X-Deadline": "0"}))
    assert (start["status"], len(left)) == (504, 1)


STATUSES = {
    "InvalidOperation": 422,
    "InsufficientStock": 409,
    "UnknownStock": 422,
    "OperationConflict": 409,
    "ReservationNotFound": 404,
    "ReservationClosed": 409,
    "ReservationExpired": 410,
    "QuantityMismatch": 409,
    "OutcomeUnknown": 503,
    "Overloaded": 503,
    "LaneFull": 503,
    "LaneNotServed": 421,
    "HotspotLimited": 429,
    "JournalFull": 503,
    "StockFrozen": 503,
    "DeadlineExceeded": 504,
    "DurabilityNotReached": 504,
    "NotStarted": 503,
    "RecalculationFailed": 500,
    "RecalculationCutOff": 504,
}


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
async def test_every_error_has_its_status_and_says_when_to_come_back(inventory: Inventory, error: InventoryError) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    start, body = await call(InventoryMiddleware(app, inventory=inventory), scope_of())
    headers = dict(start["headers"])
    assert start["status"] == STATUSES[type(error).__name__]
    assert headers[b"content-type"] == b"application/problem+json"
    assert int(headers[b"content-length"]) == len(body["body"])
    assert (b"retry-after" in headers) == isinstance(error, Overloaded | OutcomeUnknown | NotStarted | type(SAMPLES[-2]))


def test_an_error_of_ours_below_a_public_one_is_answered_as_that_one() -> None:
    from inventory_sdk.stock.wire import NotExecuted

    answer = problem(NotExecuted("Redis can't be reached: 10.0.0.7:6379"))
    assert answer is not None
    assert answer.status == 503
    assert b"overloaded" in answer.body
    assert b"10.0.0.7" not in answer.body  # nobody outside needs to know our servers
    assert problem(HotspotLimited("sku a is hot", 0.2)).headers[2] == (b"retry-after", b"1")  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [InventoryError("a background task died"), ValueError("a bug")])
async def test_errors_that_are_no_answer_pass(inventory: Inventory, error: Exception) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise error

    with pytest.raises(type(error)):
        await call(InventoryMiddleware(app, inventory=inventory, lane="core"), scope_of())


async def test_an_error_after_the_response_has_begun_passes(inventory: Inventory) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise DeadlineExceeded("of something that it called")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    with pytest.raises(DeadlineExceeded):
        await InventoryMiddleware(app, inventory=inventory)(scope_of(), nothing, send)
    assert len(sent) == 1


async def test_wrapped_around_the_framework_it_says_once_that_it_stands_too_far_out(
    inventory: Inventory, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuses(request: Request) -> PlainTextResponse:
        raise InvalidOperation("quantity", 0, "must not be zero")

    app = InventoryMiddleware(Starlette(routes=[Route("/", refuses, methods=["POST"])]), inventory=inventory)
    scope = scope_of() | {"query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http", "server": ("x", 80)}
    with caplog.at_level(logging.WARNING, logger="inventory_sdk.web"):
        for _ in range(2):
            with pytest.raises(InvalidOperation):
                await call(app, dict(scope))
    (record,) = [each for each in caplog.records if each.name == "inventory_sdk.web"]
    assert "app.add_middleware" in record.getMessage()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lane": "cor"}, "there are core, batch"),
        ({"lane": {"/": "cor"}}, "there are core, batch"),
        ({"lane": {"shop": "core"}}, "begins with a slash"),
        ({"serve": {"cor"}}, "there are core, batch"),
        ({"serve": "core"}, "must be a set"),
        ({"trusted": ["10.0.0.1/8"]}, "must be a network"),
        ({"merchant_header": "X Merchant"}, "must be the name of a header"),
        ({"max_deadline": 0}, "more than 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_at_the_start(inventory: Inventory, options: Any, why: str) -> None:
    with pytest.raises(InvalidOperation, match=why):
        InventoryMiddleware(Showing(), inventory=inventory, **options)


class Life:
    """Stands in for an inventory."""

    def __init__(self, trace: list[str], fails: str = "") -> None:
        self.trace = trace
        self.fails = fails
        self.lanes: dict[str, Lane] = {}

    async def start(self) -> None:
        self.trace.append("start")
        if self.fails == "start":
            raise ConnectionError("no Redis")

    async def close(self) -> None:
        self.trace.append("close")
        if self.fails == "close":
            raise ConnectionError("lost Redis")


async def live(app: Any, life: Life) -> None:
    """What a server does, noted in the trace."""
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        life.trace.append(message["type"].removeprefix("lifespan."))

    inventory: Any = life
    await InventoryMiddleware(app, inventory=inventory, lifespan=True)({"type": "lifespan"}, receive, send)


def living_app(trace: list[str], fails: bool = False) -> Starlette:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        trace.append("app starts")
        if fails:
            raise ValueError("the app's own")
        yield
        trace.append("app ends")

    return Starlette(lifespan=lifespan)


async def test_the_inventory_starts_before_the_app_and_closes_after_it() -> None:
    trace: list[str] = []
    await live(living_app(trace), Life(trace))
    assert trace == ["start", "app starts", "startup.complete", "app ends", "close", "shutdown.complete"]


async def test_an_app_without_a_lifespan_is_served_one() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"

    trace: list[str] = []
    await live(app, Life(trace))
    assert trace == ["start", "startup.complete", "close", "shutdown.complete"]


async def test_an_inventory_that_can_not_start_keeps_the_app_from_starting() -> None:
    trace: list[str] = []
    await live(living_app(trace), Life(trace, "start"))
    assert trace == ["start", "startup.failed"]


async def test_an_inventory_that_can_not_close_is_told_to_the_server() -> None:
    trace: list[str] = []
    await live(living_app(trace), Life(trace, "close"))
    assert trace[-2:] == ["close", "shutdown.failed"]


async def test_an_app_that_can_not_start_leaves_no_inventory_open() -> None:
    trace: list[str] = []
    with pytest.raises(ValueError, match="the app's own"):
        await live(living_app(trace, fails=True), Life(trace))
    assert trace == ["start", "app starts", "startup.failed", "close"]
