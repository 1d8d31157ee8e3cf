"""``inventory-sdk admin`` as an operator meets it: a process of its own on real servers, a password, a page, a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from inventory_sdk import Line
from inventory_sdk.cli.app import app
from tests.conftest import service_url
from tests.servers_kit import free_ports
from tests.web.desk import PASSWORD, Servers, until

pytestmark = [pytest.mark.redis, pytest.mark.postgresql]

COMMAND = [sys.executable, "-c", "from inventory_sdk.cli import main; main()", "admin", "shop:inventory", "--users", "people"]
SHOP = """
from inventory_sdk import Inventory

inventory = Inventory({redis!r}, database={database!r}, namespace={namespace!r}, table_prefix={prefix!r}, merchant="m1")
"""


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    """With a shop that has sold something."""
    made = Servers(service_url("redis"), service_url("postgresql"), f"t{uuid.uuid4().hex[:12]}")
    async with made.inventory() as inventory:
        await inventory.create_schema()
        async with inventory.worker():
            await inventory.stock.restock([Line("phone-15", 500)], operation_id="po-7")
            await inventory.stock.deduct([Line("phone-15", 3)], operation_id="order-42", order="order-42")

            async def applied() -> bool:
                return bool(await inventory.ledger.pages.named("order-42", "m1"))

            await until(applied)
    yield made
    await made.sweep()


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The process, once it says that it listens (or has ended)."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([*COMMAND, *options], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "Uvicorn running on" in line:
                break
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_the_command_serves_the_pages_to_those_who_sign_in_and_leaves_on_sigterm(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        SHOP.format(redis=servers.redis, database=servers.database, namespace=servers.namespace, prefix=f"{servers.namespace}_")
    )
    line = CliRunner().invoke(app, ["admin-user", "olga", "--role", "operator", "--password", PASSWORD]).output
    (tmp_path / "people").write_text(line)
    (port,) = free_ports(1)
    with serving(tmp_path, "--port", str(port)) as process:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as browser:
            answer = await browser.get("/search?q=order-42")
            assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in?next=%2Fsearch%3Fq%3Dorder-42")
            form = {"name": "olga", "next": "/search?q=order-42"}
            assert (await browser.post("/sign-in", data={**form, "password": "not her password"})).status_code == 401
            answer = await browser.post("/sign-in", data={**form, "password": PASSWORD}, follow_redirects=True)
            assert answer.status_code == 200
            assert "phone-15" in answer.text
            assert "1 of 1" in (await browser.get("/")).text
            assert 'name="token"' in (await browser.get("/audit")).text
            assert (await browser.get("/static/htmx.min.js")).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert "olga has signed in" in log
    assert "a sign-in to the management pages failed: 'olga' from 127.0.0.1" in log
    assert PASSWORD not in log
    assert "Traceback" not in log
    assert process.returncode in (0, -signal.SIGTERM)  # uvicorn raises the signal again once it has shut down


async def test_the_command_serves_while_the_database_is_away(tmp_path: Path) -> None:
    nowhere = f"postgresql+asyncpg://postgres@127.0.0.1:{free_ports(1)[0]}/test"
    (tmp_path / "shop.py").write_text(SHOP.format(redis=service_url("redis"), database=nowhere, namespace="nowhere", prefix="nowhere_"))
    line = CliRunner().invoke(app, ["admin-user", "victor", "--password", PASSWORD]).output
    (tmp_path / "people").write_text(line)
    (port,) = free_ports(1)
    with serving(tmp_path, "--port", str(port)) as process:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as browser:
            answer = await browser.post("/sign-in", data={"name": "victor", "password": PASSWORD}, follow_redirects=True)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
    assert answer.status_code == 200
    assert "The inventory can’t start" in answer.text
    assert "Connect call failed" in answer.text
    assert "could not be written to the audit" in log
