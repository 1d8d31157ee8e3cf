"""``inventory-sdk worker`` and ``doctor`` as an operator meets them: a process of its own, real servers, signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from inventory_sdk import Inventory, Line

pytestmark = [pytest.mark.redis, pytest.mark.amqp, pytest.mark.postgresql]

COMMAND = [sys.executable, "-c", "from inventory_sdk.cli import main; main()"]

SHOP = """
from inventory_sdk import Inventory

inventory = Inventory({redis!r}, queue={queue!r}, database={database!r}, namespace={namespace!r}, table_prefix={prefix!r})
"""


@pytest.fixture
def inventory(swept: str, redis_url: str, amqp_url: str, postgresql_url: str) -> Inventory:
    return Inventory(redis_url, queue=amqp_url, database=postgresql_url, namespace=swept, table_prefix=f"{swept}_", metrics=())


@pytest.fixture
def worker(tmp_path: Path, swept: str, redis_url: str, amqp_url: str, postgresql_url: str) -> Iterator[subprocess.Popen[str]]:
    """A worker process on ``shop:inventory``, which lies in its working directory."""
    (tmp_path / "shop.py").write_text(
        SHOP.format(redis=redis_url, queue=amqp_url, database=postgresql_url, namespace=swept, prefix=f"{swept}_")
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([*COMMAND, "worker", "shop:inventory"], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def until_running(worker: subprocess.Popen[str]) -> None:
    assert worker.stderr is not None
    for line in worker.stderr:
        if "is running" in line:
            return
    pytest.fail("the worker ended before it ran")


async def test_a_worker_process_applies_what_others_sell_and_leaves_on_sigterm(
    inventory: Inventory, request: pytest.FixtureRequest
) -> None:
    async with inventory:
        await inventory.create_schema()
        worker = request.getfixturevalue("worker")  # only now: it finds a schema
        until_running(worker)
        await inventory.stock.restock([Line("a", 10)], operation_id="in-1")
        receipt = await inventory.stock.deduct([Line("a", 3)], operation_id="order-1", durability="database")
        assert receipt.durability == "database"
        (row,) = await inventory.ledger.stock(["default\x1fa"])
        assert (row.available, row.sold) == (7, 3)
        worker.send_signal(signal.SIGTERM)
        _, log = worker.communicate(timeout=30)
    assert worker.returncode == 0, log
    assert "worker has ended" in log


async def test_doctor_finds_nothing_to_change_where_a_worker_runs(
    inventory: Inventory, request: pytest.FixtureRequest, swept: str, redis_url: str, amqp_url: str, postgresql_url: str
) -> None:
    async with inventory:
        await inventory.create_schema()
        until_running(request.getfixturevalue("worker"))
        await inventory.stock.restock([Line("a", 10)], operation_id="in-1")
        await inventory.stock.deduct([Line("a", 1)], durability="database")
        place = ["--redis", redis_url, "--queue", amqp_url, "--database", postgresql_url, "--namespace", swept, "--prefix", f"{swept}_"]
        done = await asyncio.to_thread(
            subprocess.run, [*COMMAND, "doctor", *place, "--durability", "database"], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CHANGE" not in done.stdout
    assert "OK      durability database: can be kept" in done.stdout


def test_doctor_says_what_to_change_where_nothing_is_set_up(swept: str, redis_url: str, amqp_url: str, postgresql_url: str) -> None:
    place = ["--redis", redis_url, "--queue", amqp_url, "--database", postgresql_url, "--namespace", swept, "--prefix", f"{swept}_"]
    done = subprocess.run([*COMMAND, "doctor", *place, "--durability", "database"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    for named in ("CHANGE  worker", "CHANGE  schema", "CHANGE  durability database: can't be kept; no worker"):
        assert named in done.stdout
    assert amqp_url not in done.stdout  # it carries a password
