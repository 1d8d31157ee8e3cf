"""The guides' programs run: each framework's service, the moves of a migration and of a rollout, the manifests for Kubernetes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.unit.test_documents import ROOT, blocks

HOW_TO = ROOT / "docs/how-to"
FRAMEWORKS = ["FastAPI", "Starlette", "Litestar", "Quart"]


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, within its lifespan."""
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
    life = asyncio.ensure_future(app(scope, told.get, said.put))

    async def through(step: str) -> None:
        await told.put({"type": f"lifespan.{step}"})
        answer = asyncio.ensure_future(said.get())
        await asyncio.wait({answer, life}, return_when=asyncio.FIRST_COMPLETED)
        assert answer.done(), f"the lifespan ended at {step}"
        assert answer.result()["type"] == f"lifespan.{step}.complete", answer.result()

    await through("startup")
    try:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop", follow_redirects=True) as client:
            yield client
    finally:
        await through("shutdown")
        await life


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_the_service_sells_in_each_framework(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = HOW_TO / "frameworks.md"
    service, *apps = blocks(page)
    assert len(apps) == len(FRAMEWORKS)
    monkeypatch.setenv("INVENTORY_REDIS_URL", "memory://")
    shop = ModuleType("shop")  # where the frameworks look annotations up
    monkeypatch.setitem(sys.modules, "shop", shop)
    names = vars(shop)
    for program in (service, apps[FRAMEWORKS.index(framework)]):
        exec(compile(program, str(page), "exec", dont_inherit=True), names)
    async with served(names["app"]) as client:
        for _ in range(2):  # a repeat moves nothing
            assert (await client.put("/deliveries/d-1", json=[{"sku": "mug", "quantity": 3}])).json() == {"delivery": "d-1"}
        for _ in range(2):
            assert (await client.put("/orders/o-1", json=[{"sku": "mug", "quantity": 2}])).json() == {"order": "o-1"}
        short = await client.put("/orders/o-2", json=[{"sku": "mug", "quantity": 2}])
        assert (short.status_code, short.headers["content-type"]) == (409, "application/problem+json")
        assert short.json()["shortages"] == [{"merchant": "default", "sku": "mug", "requested": 2, "available": 1}]
        metrics = await client.get("/metrics")
        assert 'inventory_operations_accepted_total{kind="reserve"}' in metrics.text
        await names["inventory"].settled()
        assert await names["inventory"].ledger.verify() == []
