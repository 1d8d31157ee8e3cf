"""The guides' programs run: each framework's service, the moves of a migration and of a rollout, the manifests for Kubernetes."""

from __future__ import annotations

import asyncio
import inspect
import re
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import typer.main
import yaml
from sqlalchemy import insert

from inventory_sdk import Inventory, Line
from inventory_sdk.cli.app import app
from inventory_sdk.sync.queues.amqp_connection import CLOSE_SECONDS
from inventory_sdk.sync.worker import DRAIN
from tests.unit.test_documents import ROOT, blocks, run

HOW_TO = ROOT / "docs/how-to"
FRAMEWORKS = ["FastAPI", "Starlette", "Litestar", "Quart"]


@asynccontextmanager
async def served(application: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the application, within its lifespan."""
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": {}}
    life = asyncio.ensure_future(application(scope, told.get, said.put))

    async def through(step: str) -> None:
        await told.put({"type": f"lifespan.{step}"})
        answer = asyncio.ensure_future(said.get())
        await asyncio.wait({answer, life}, return_when=asyncio.FIRST_COMPLETED)
        assert answer.done(), f"the lifespan ended at {step}"
        assert answer.result()["type"] == f"lifespan.{step}.complete", answer.result()

    await through("startup")
    try:
        transport = httpx.ASGITransport(application)
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


async def test_the_service_of_the_readme_sells(monkeypatch: pytest.MonkeyPatch) -> None:
    _, service = blocks(ROOT / "README.md")
    monkeypatch.setenv("INVENTORY_REDIS_URL", "memory://")
    names: dict[str, Any] = {"__name__": "shop"}
    exec(compile(service, "README.md", "exec", dont_inherit=True), names)
    async with served(names["app"]) as client:
        assert (await client.put("/deliveries/d-1", json=[{"product_id": "mug", "qty": 3}])).status_code == 200
        assert (await client.put("/orders/o-1", json=[{"product_id": "mug", "qty": 2}])).json() == {"order": "o-1"}
        assert (await client.put("/orders/o-2", json=[{"product_id": "mug", "qty": 2}])).status_code == 409
        assert "inventory_operations_accepted" in (await client.get("/metrics")).text


def manifests() -> list[dict[str, Any]]:
    text = (HOW_TO / "kubernetes.md").read_text()
    return [each for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) for each in yaml.safe_load_all(block)]


def containers() -> list[dict[str, Any]]:
    return [each for one in manifests() if "template" in one.get("spec", {}) for each in one["spec"]["template"]["spec"]["containers"]]


@pytest.mark.parametrize("command", [each["command"] for each in containers()], ids=" ".join)
def test_a_manifests_command_is_understood(command: list[str]) -> None:
    program, name, *arguments = command
    assert program == "inventory-sdk"
    found = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    found.make_context(name, arguments)  # raises for an option that there is not
    with pytest.raises(Exception, match="No such option"):
        found.make_context(name, [*arguments, "--no-such-option"])


def test_the_commands_on_the_page_are_understood() -> None:
    root = typer.main.get_command(app)
    text = (HOW_TO / "kubernetes.md").read_text()
    said = re.findall(r"inventory-sdk ((?:schema|doctor|reconcile)(?: [^`\n]*)?)(?:`|$)", text, re.MULTILINE)
    assert len(said) > 3
    for each in said:
        name, *arguments = shlex.split(each)
        root.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


def test_the_manifests_agree_with_the_code_and_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    by_kind = {each["kind"]: each for each in manifests()}
    secret = by_kind["Secret"]["stringData"]
    for each in containers():
        assert each["envFrom"] == [{"secretRef": {"name": by_kind["Secret"]["metadata"]["name"]}}]
    read = set(re.findall(r'"(INVENTORY_[A-Z_]+)"\)', inspect.getsource(Inventory.from_env)))
    assert set(secret) <= read
    for name, value in secret.items():
        monkeypatch.setenv(name, value)
    made = Inventory.from_env(metrics=[])
    assert (made._settings.namespace, made._settings.partitions) == ("shop", 4)

    deployment = by_kind["Deployment"]["spec"]
    pod = deployment["template"]
    (worker,) = pod["spec"]["containers"]
    (port,) = worker["ports"]
    opened = re.search(r"start_http_server\((\d+)\)", blocks(HOW_TO / "kubernetes.md")[0])
    assert opened is not None
    assert port["containerPort"] == int(opened[1]) == int(pod["metadata"]["annotations"]["prometheus.io/port"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert worker[probe]["httpGet"] == {"path": "/metrics", "port": port["name"]}
    assert by_kind["PodMonitor"]["spec"]["podMetricsEndpoints"] == [{"port": port["name"]}]
    labels = pod["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget", "PodMonitor"):
        assert by_kind[kind]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    # What the worker may take for itself, and then for closing its connections.
    assert pod["spec"]["terminationGracePeriodSeconds"] > DRAIN + 1 + 2 * CLOSE_SECONDS + 5


async def test_the_workers_module_of_the_page_opens_its_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = ModuleType("shop.stock")
    vars(stock)["inventory"] = Inventory("memory://", metrics=[])
    monkeypatch.setitem(sys.modules, "shop", ModuleType("shop"))
    monkeypatch.setitem(sys.modules, "shop.stock", stock)
    opened: list[int] = []
    monkeypatch.setattr("prometheus_client.start_http_server", opened.append)
    (program,) = blocks(HOW_TO / "kubernetes.md")
    names: dict[str, Any] = {}
    exec(compile(program, "kubernetes.md", "exec", dont_inherit=True), names)
    assert opened == [9100]
    assert names["inventory"] is vars(stock)["inventory"]


async def test_a_stock_table_is_migrated_and_back(tmp_path: Path) -> None:
    page = HOW_TO / "migrate.md"
    first, *rest = blocks(page)
    names: dict[str, Any] = {"REDIS": "memory://", "DATABASE": f"sqlite+aiosqlite:///{tmp_path}/shop.db"}
    await run(first, page, names)
    try:
        async with names["engine"].begin() as connection:
            await connection.run_sync(names["tables"].create_all)
            opening = [("mug", 8, 3), ("tee", 2, 0)]
            rows = [{"merchant": "m1", "sku": sku, "available": left, "reserved": held} for sku, left, held in opening]
            await connection.execute(insert(names["stock"]), rows)
            await connection.execute(insert(names["holds"]).values(order_id="hold-7", sku="mug", merchant="m1", quantity=3))
        await run("\n".join(rest), page, names)
    finally:
        for made in ("shadow", "inventory"):
            if made in names and len(names[made]._here):
                await names[made].close()
        await names["engine"].dispose()


async def test_stock_follows_the_links_of_the_plan() -> None:
    page = HOW_TO / "roll-out.md"
    declared, first, code, kill = blocks(page)

    class Item:
        product_id, qty = "mug", 1

    def embedded(redis: str, **options: Any) -> Inventory:
        Inventory(redis, metrics=[], **options)
        return Inventory("memory://", metrics=[], admission=options["admission"], merchant=options["merchant"])

    names: dict[str, Any] = {"Inventory": embedded, "CartItem": Item}
    await run(declared, page, names)
    inventory: Inventory = names["inventory"]

    async def places() -> dict[str, set[str]]:
        return {name: {row.admission for row in await inventory.ledger.admission(name)} for name in ("m1", "m2")}

    async def become(wanted: dict[str, set[str]]) -> None:
        async with asyncio.timeout(20):
            while await places() != wanted:
                await asyncio.sleep(0.02)

    async with inventory:
        for merchant in ("m1", "m2"):
            await inventory.stock.restock([Line("mug", 5)], merchant=merchant, operation_id="delivery")
        await become({"m1": {"database"}, "m2": {"database"}})
        await run(first, page, names)
        await become({"m1": {"redis"}, "m2": {"database"}})
        await run(code, page, names)
        await names["place_order"]("o-1", [Item()], "m1")
        await run(kill, page, names)
        await become({"m1": {"database"}, "m2": {"database"}})
        assert (await inventory.stock.level("mug", merchant="m1")).available == 4
        assert await inventory.ledger.verify() == []
