"""The middleware under uvicorn with FastAPI, Starlette, Litestar and Quart: the same requests, the same answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import fastapi
import httpx
import litestar
import litestar.middleware
import litestar.response
import pytest
import quart
import starlette.applications
import starlette.responses
import starlette.routing
import uvicorn

from inventory_sdk import Inventory, InventoryError, InventoryMiddleware, Lane, Line, context
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.web.problem import problem
from tests.stock_kit import until

Handler = Callable[[], Awaitable[Any]]
seen: ContextVar[str] = ContextVar("seen", default="nothing")
LANES = {
    "core": Lane(max_concurrency=2, max_queue=0, timeout=20.0),
    "batch": Lane(max_concurrency=1, max_queue=0, timeout=20.0),
    "quick": Lane(timeout=0.3),
    "sync": Lane(timeout=20.0),
}


class Service:
    """What every framework serves."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.stopped = 0

    async def show(self) -> Any:
        before = seen.get()
        seen.set("this request")
        remaining = context.remaining()
        usage = self.inventory.lanes.usage()
        running = {name: each.running for name, each in usage.items() if each.running}
        return {"lane": context.lane.get(), "merchant": context.merchant.get(), "remaining": remaining, "running": running, "seen": before}

    async def take(self) -> Any:
        receipt = await self.inventory.stock.deduct([Line("a", 1)])
        return {"id": receipt.operation_id, "replayed": receipt.replayed, "left": receipt.lines[0].remaining}

    async def twice(self) -> Any:
        await self.take()
        return await self.take()

    async def short(self) -> Any:
        await self.inventory.stock.deduct([Line("a", 1000)])

    async def hold(self) -> Any:
        self.entered.set()
        await self.go.wait()
        return "held"

    async def slow(self) -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            self.stopped += 1

    async def careful(self) -> Any:
        async with self.inventory.lanes.enter("sync"):
            await self.slow()

    async def nested(self) -> Any:
        async with self.inventory.lanes.enter("sync"):
            return "in"

    async def chunks(self) -> AsyncIterator[bytes]:
        for number in range(8):
            yield b"%d" % number
            await asyncio.sleep(0.06)

    @property
    def routes(self) -> dict[str, Handler]:
        return {name: getattr(self, name) for name in ("show", "take", "twice", "short", "hold", "slow", "careful", "nested")}


Options = dict[str, Any]


def starlette_app(service: Service, options: Options) -> Any:
    def endpoint(handler: Handler) -> Any:
        async def answer(request: Any) -> Any:
            return starlette.responses.JSONResponse(await handler())

        return answer

    async def stream(request: Any) -> Any:
        return starlette.responses.StreamingResponse(service.chunks())

    async def echo(websocket: Any) -> None:
        await websocket.accept()
        await websocket.close()

    routes: list[Any] = [
        starlette.routing.Route(f"/{part}/{name}", endpoint(handler), methods=["POST"])
        for name, handler in service.routes.items()
        for part in ("shop", "imports")
    ]
    routes += [starlette.routing.Route("/shop/stream", stream), starlette.routing.WebSocketRoute("/shop/ws", echo)]
    app = starlette.applications.Starlette(routes=routes)
    app.add_middleware(InventoryMiddleware, **options)
    return app


def fastapi_app(service: Service, options: Options) -> Any:
    app = fastapi.FastAPI()
    for name, handler in service.routes.items():
        for part in ("shop", "imports"):
            app.post(f"/{part}/{name}")(handler)

    @app.get("/shop/stream")
    async def stream() -> Any:
        return starlette.responses.StreamingResponse(service.chunks())

    app.add_middleware(InventoryMiddleware, **options)
    return app


def litestar_app(service: Service, options: Options) -> Any:
    def route(path: str, handler: Handler) -> Any:
        async def answer() -> Any:
            return await handler()

        return litestar.post(path, status_code=200)(answer)

    @litestar.get("/shop/stream")
    async def stream() -> litestar.response.Stream:
        return litestar.response.Stream(service.chunks())

    def answered(request: Any, error: Exception) -> Any:
        assert isinstance(error, InventoryError)
        found = problem(error)
        assert found is not None
        headers = {name.decode(): value.decode() for name, value in found.headers}
        return litestar.Response(found.body, status_code=found.status, headers=headers, media_type=headers.pop("content-type"))

    routes = [route(f"/{part}/{name}", handler) for name, handler in service.routes.items() for part in ("shop", "imports")]
    return litestar.Litestar(
        [*routes, stream],
        middleware=[litestar.middleware.DefineMiddleware(InventoryMiddleware, **options)],
        exception_handlers={InventoryError: answered},
        openapi_config=None,
    )


def quart_app(service: Service, options: Options) -> Any:
    app = quart.Quart("shop")

    def add(path: str, name: str, handler: Handler) -> None:
        async def answer() -> Any:
            return quart.jsonify(await handler())

        app.add_url_rule(path, name, answer, methods=["POST"])

    for name, handler in service.routes.items():
        for part in ("shop", "imports"):
            add(f"/{part}/{name}", f"{part}_{name}", handler)

    @app.get("/shop/stream")
    async def stream() -> Any:
        return service.chunks()

    @app.errorhandler(InventoryError)
    async def answered(error: InventoryError) -> Any:
        found = problem(error)
        assert found is not None
        return found.body, found.status, {name.decode(): value.decode() for name, value in found.headers}

    app.asgi_app = InventoryMiddleware(app.asgi_app, **options)
    return app


APPS = {"starlette": starlette_app, "fastapi": fastapi_app, "litestar": litestar_app, "quart": quart_app}


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        task = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            assert not task.done(), "the server did not start"
            await asyncio.sleep(0.005)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=20) as client:
                yield client
        finally:
            server.should_exit = True
            await task


@asynccontextmanager
async def shop(kind: str, **options: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Service]]:
    inventory = Inventory("memory://", lanes=LANES, metrics=[NoMetrics()])
    service = Service(inventory)
    everything = {
        "inventory": inventory,
        "lane": {"/": "core", "/imports": "batch", "/shop/slow": "quick", "/shop/stream": "quick"},
        "merchant_header": "X-Merchant",
        "deadline_header": "X-Deadline",
        "idempotency_header": "Idempotency-Key",
        "lifespan": True,
    }
    app = APPS[kind](service, everything | options)
    # In Litestar middleware stands behind the router and sees no lifespan, so there the test starts the inventory.
    async with inventory if kind == "litestar" else served_by_the_app(), served(app) as client:
        await inventory.stock.restock([Line("a", 10)], operation_id="opening")
        await inventory.stock.restock([Line("a", 10)], merchant="m7", operation_id="opening")
        yield client, service


@asynccontextmanager
async def served_by_the_app() -> AsyncIterator[None]:
    yield


everywhere = pytest.mark.parametrize("kind", APPS)


@everywhere
async def test_a_request_has_its_lane_merchant_and_deadline_and_its_own_context(kind: str) -> None:
    async with shop(kind) as (client, _):
        plain = (await client.post("/shop/show")).json()
        assert (plain["lane"], plain["merchant"], plain["running"], plain["seen"]) == ("core", None, {"core": 1}, "nothing")
        assert 5 < plain["remaining"] <= 20
        told = (await client.post("/imports/show", headers={"X-Merchant": "m7", "X-Deadline": "5"})).json()
        assert (told["lane"], told["merchant"], told["running"], told["seen"]) == ("batch", "m7", {"batch": 1}, "nothing")
        assert 0 < told["remaining"] <= 5


@everywhere
async def test_an_idempotency_key_makes_a_repeated_request_one_operation(kind: str) -> None:
    async with shop(kind) as (client, service):
        headers = {"Idempotency-Key": '"order-42"'}
        first = (await client.post("/shop/take", headers=headers)).json()
        again = (await client.post("/shop/take", headers=headers)).json()
        assert first == {"id": "order-42", "replayed": False, "left": 9}
        assert again == {"id": "order-42", "replayed": True, "left": 9}
        other = (await client.post("/shop/take", headers=headers | {"X-Merchant": "m7"})).json()
        assert other == {"id": "order-42", "replayed": False, "left": 9}
        second = await client.post("/shop/twice", headers={"Idempotency-Key": "order-43"})
        assert second.status_code == 422
        assert "names one act" in second.json()["detail"]
        assert (await service.inventory.stock.level("a")).available == 8


@everywhere
async def test_a_refusal_is_answered_as_problem_details(kind: str) -> None:
    async with shop(kind) as (client, _):
        answer = await client.post("/shop/short")
        assert answer.status_code == 409
        assert answer.headers["content-type"].startswith("application/problem+json")
        body = answer.json()
        assert (body["type"], body["title"], body["status"]) == ("urn:inventory-sdk:problem:insufficient-stock", "Insufficient stock", 409)
        assert body["shortages"] == [{"merchant": "default", "sku": "a", "requested": 1000, "available": 10}]
        assert "1000 asked, 10 available" in body["detail"]


@everywhere
async def test_a_full_lane_answers_503_and_leaves_the_others_alone(kind: str) -> None:
    async with shop(kind) as (client, service):
        held = asyncio.create_task(client.post("/imports/hold"))
        await service.entered.wait()
        full = await client.post("/imports/show")
        assert full.status_code == 503
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["retry_after"] > 0
        assert (await client.post("/shop/show")).status_code == 200
        service.go.set()
        assert (await held).status_code == 200
        assert (await client.post("/imports/show")).status_code == 200


@everywhere
async def test_a_request_that_takes_too_long_is_ended_and_answered_504(kind: str) -> None:
    async with shop(kind) as (client, service):
        answer = await client.post("/shop/slow", headers={"X-Deadline": "0.05"})
        assert answer.status_code == 504
        answer = await client.post("/shop/slow")
        assert answer.status_code == 504
        # Quart runs handlers in tasks of their own, which go on when the request is cancelled: the how-to says so.
        assert service.stopped == (0 if kind == "quart" else 2)
        assert service.inventory.lanes.usage()["quick"].running == 0


@everywhere
async def test_a_lane_inside_keeps_the_requests_deadline_in_whatever_task_it_runs(kind: str) -> None:
    async with shop(kind) as (client, service):
        answer = await client.post("/shop/careful", headers={"X-Deadline": "0.05"})
        assert answer.status_code == 504
        await until(lambda: service.stopped == 1)
        assert service.inventory.lanes.usage()["sync"].running == 0


@everywhere
async def test_a_stream_goes_on_after_the_lanes_timeout(kind: str) -> None:
    async with shop(kind) as (client, service):
        answer = await client.get("/shop/stream")  # 0.48 s, in a lane with 0.3
        assert (answer.status_code, answer.content) == (200, b"01234567")
        assert service.inventory.lanes.usage()["quick"].running == 0


@everywhere
async def test_lanes_that_this_deployment_does_not_serve_are_refused_with_a_pointer(kind: str) -> None:
    async with shop(kind, serve={"core"}, elsewhere={"batch": "https://batch.example"}) as (client, _):
        assert (await client.post("/shop/show")).status_code == 200
        refused = await client.post("/imports/show")
        assert refused.status_code == 421
        body = refused.json()
        assert (body["lane"], body["served"], body["pointer"]) == ("batch", ["core"], "https://batch.example")
        within = await client.post("/shop/nested")
        assert (within.status_code, within.json()["lane"]) == (421, "sync")


@pytest.mark.parametrize(
    ("headers", "field"),
    [
        ({"X-Deadline": "soon"}, "x-deadline"),
        ({"X-Deadline": "-1"}, "x-deadline"),
        ({"X-Deadline": "1e9"}, "x-deadline"),
        ({"X-Deadline": "nan"}, "x-deadline"),
        ({"X-Merchant": "m" * 129}, "x-merchant"),
        ({"X-Merchant": "m\x80"}, "x-merchant"),
        ({"Idempotency-Key": '""'}, "idempotency-key"),
    ],
)
async def test_a_header_that_makes_no_sense_is_named(headers: dict[str, str], field: str) -> None:
    async with shop("starlette") as (client, _):
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        answer = await client.post("/shop/show", headers=raw)
        assert (answer.status_code, answer.json()["field"]) == (422, field)
