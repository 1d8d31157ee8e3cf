"""Gray links over processes: a kill reaches all of them, a request stays on one side through two services and the worker, and
nobody goes by older rules after knowing newer ones."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from inventory_sdk import Inventory, Line
from inventory_sdk.errors import InventoryError
from inventory_sdk.gray.store import RulesUnavailable
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.redis_urls import close_client
from tests.gray_kit import Places, Record, forget, links, until, watch_of
from tests.servers_kit import free_ports, redis_server

ROOT = Path(__file__).resolve().parents[2]
ASLEEP = float(os.environ.get("INVENTORY_TEST_GRAY_SLEEP", "1"))
"""Seconds that a process is stopped; a full run takes 60."""
CHAOS = int(os.environ.get("INVENTORY_TEST_GRAY_CHAOS", "25"))
"""Changes made while Redis comes and goes."""
WHO: dict[str, Any] = {"who": "eva", "why": "try"}


@pytest.fixture
async def places(redis_url: str, namespace: str) -> AsyncIterator[Places]:
    made = Places(redis_url)
    yield made
    await forget(made, namespace)


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    child = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGCONT)
        child.kill()
        child.communicate()


async def line(child: subprocess.Popen[str]) -> list[str]:
    assert child.stdout is not None
    async with asyncio.timeout(60):
        found = await asyncio.to_thread(child.stdout.readline)
    assert found, "the process ended"
    return found.split()


@pytest.mark.redis
async def test_a_kill_reaches_eight_processes_and_is_honoured_against_what_requests_carry(
    places: Places, namespace: str, redis_url: str
) -> None:
    async with links(places, namespace) as here:
        await here.set("checkout", percentage=100, **WHO)
        with ExitStack() as stack:
            children = [stack.enter_context(process("tests.gray_process", redis_url, namespace, "checkout")) for _ in range(8)]
            assert await asyncio.gather(*map(line, children)) == [["ready"]] * 8
            began = time.monotonic()
            await here.kill("checkout", who="eva", why="errors")
            told = await asyncio.gather(*map(line, children))
            assert [(version, reason, carried) for version, reason, carried, _ in told] == [("2", "killed", "stable")] * 8
            slowest = max(float(at) - began for *_, at in told)
            sys.stdout.write(f"the kill reached the slowest of 8 processes after {slowest * 1e3:.1f} ms\n")  # pytest -rP shows it


@pytest.mark.redis
async def test_a_process_that_slept_wakes_up_to_the_newest_rules_and_never_to_older_ones(
    places: Places, namespace: str, redis_url: str
) -> None:
    async with links(places, namespace) as here:
        await here.set("checkout", percentage=100, **WHO)
        with process("tests.gray_process", redis_url, namespace, "checkout") as child:
            assert await line(child) == ["ready"]
            child.send_signal(signal.SIGSTOP)
            for percentage in range(1, 20):
                await here.set("checkout", percentage=percentage, **WHO)
            killed = await here.kill("checkout", **WHO)
            await asyncio.sleep(ASLEEP)  # what is waited for is the time itself
            child.send_signal(signal.SIGCONT)
            versions = [1]
            while versions[-1] != killed.version:
                version, reason, carried, _ = await line(child)
                versions.append(int(version))
            assert versions == sorted(versions)
            assert (reason, carried) == ("killed", "stable")


async def test_while_redis_comes_and_goes_nobody_goes_back_to_older_rules(namespace: str) -> None:
    seed = int(os.environ.get("INVENTORY_TEST_GRAY_SEED", random.randrange(2**32)))
    sys.stdout.write(f"INVENTORY_TEST_GRAY_SEED={seed}\n")
    dice = random.Random(seed)
    with redis_server() as server:
        places = Places(server.url)
        metrics = Record()
        async with links(places, namespace, metrics) as a, links(places, namespace) as b, links(places, namespace) as c:
            everybody = [a, b, c]
            seen = [0, 0, 0]
            acknowledged = 0

            def look() -> None:
                for index, each in enumerate(everybody):
                    version = each.known("checkout").version
                    assert version >= seen[index], f"seed {seed}: process {index} went from {seen[index]} back to {version}"
                    seen[index] = version

            for step in range(CHAOS):
                fault = dice.choice(["none", "none", "cut", "hang", "empty", "replay"])
                if fault == "cut":
                    server.kill()
                elif fault == "hang":
                    server.signal(signal.SIGSTOP)
                elif fault == "empty":
                    await forget(places, namespace)
                elif fault == "replay":
                    for each in everybody:
                        await watch_of(dice.choice(everybody))._pushed(each.known("checkout").text().encode() if seen[0] else b"")
                try:
                    async with asyncio.timeout(0.5):
                        made = await dice.choice(everybody).set("checkout", percentage=dice.randrange(101), who="eva", why=f"step {step}")
                        acknowledged = max(acknowledged, made.version)
                except (RulesUnavailable, TimeoutError, InventoryError):
                    assert fault in ("cut", "hang"), f"seed {seed}"
                look()
                if fault == "cut":
                    server.start()
                elif fault == "hang":
                    server.signal(signal.SIGCONT)
                await asyncio.sleep(dice.random() * 0.05)
                look()
            for each in everybody:
                watch_of(each).hint()
            await until(lambda: look() or len({each.known("checkout").text() for each in everybody}) == 1, 60)
            assert a.known("checkout").version >= acknowledged, f"seed {seed}"
            final = await a.set("checkout", killed=True, who="eva", why="the end")
            await until(lambda: look() or all(each.known("checkout") == final for each in everybody), 60)
            assert all(each.decide("checkout", "m1").reason == "killed" for each in everybody)


@pytest.fixture
def environment(swept: str, redis_url: str, amqp_url: str, postgresql_url: str) -> dict[str, str]:
    return {"GRAY_REDIS": redis_url, "GRAY_QUEUE": amqp_url, "GRAY_DATABASE": postgresql_url, "GRAY_NAMESPACE": swept}


async def answers(client: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                await client.get(f"{url}/openapi.json")
            except httpx.TransportError:
                await asyncio.sleep(0.05)
            else:
                return


@pytest.mark.redis
@pytest.mark.amqp
@pytest.mark.postgresql
async def test_two_services_and_the_worker_are_on_one_side_of_the_link(environment: dict[str, str], swept: str) -> None:
    inventory = Inventory(
        environment["GRAY_REDIS"],
        queue=environment["GRAY_QUEUE"],
        database=environment["GRAY_DATABASE"],
        namespace=swept,
        table_prefix=f"{swept}_",
        metrics=[NoMetrics()],
    )
    places = Places(environment["GRAY_REDIS"])
    async with inventory, links(places, f"{swept}back") as back_rules:
        await inventory.create_schema()
        gray = inventory.gray_links
        await gray.set("pricing", allow=["new"], **WHO)
        await back_rules.set("pricing", percentage=0, **WHO)  # left to itself, the second service would say stable
        for merchant in ("old", "new"):
            await inventory.stock.restock([Line("a", 9)], merchant=merchant, operation_id="r")
        ports = free_ports(2)
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        with ExitStack() as stack:
            for name, port in zip(("front", "back"), ports, strict=True):
                arguments = ("uvicorn", f"tests.gray_services:{name}", "--port", str(port), "--log-level", "warning")
                stack.enter_context(process(*arguments, **environment))
            code = ("inventory_sdk.cli.app", "worker", "tests.gray_services:inventory")
            stack.enter_context(process("tests.gray_worker", *code[1:], **environment))
            client_of_redis = places.client()
            async with httpx.AsyncClient(timeout=30) as client:
                await asyncio.gather(*(answers(client, url) for url in urls))

                async def order(name: str, merchant: str) -> dict[str, str]:
                    answer = await client.post(f"{urls[0]}/orders/{name}", params={"back": urls[1]}, headers={"X-Merchant": merchant})
                    assert answer.status_code == 200, answer.text
                    found: dict[str, str] = answer.json()
                    return found

                async def booked() -> dict[str, str]:
                    rows = [row.decode().split() for row in await client_of_redis.lrange(f"{swept}:ran", 0, -1)]
                    return dict(rows)

                async def worker_ran(*names: str) -> list[str]:
                    async with asyncio.timeout(60):
                        while not set(names) <= set(found := await booked()):
                            await asyncio.sleep(0.02)
                    return [found[name] for name in names]

                assert await order("o-1", "old") == {"front": "stable", "back": "stable"}
                assert await order("o-2", "new") == {"front": "candidate", "back": "candidate"}
                assert await worker_ran("o-1", "o-2") == ["stable", "candidate"]
                # a kill at the second service alone beats what the request carries
                await back_rules.kill("pricing", **WHO)
                async with asyncio.timeout(20):
                    while (answer := await order(f"k-{time.monotonic_ns()}", "new"))["back"] != "stable":
                        await asyncio.sleep(0.01)
                assert answer["front"] == "candidate"
                # and one at the first reaches all of them
                await back_rules.restore("pricing", **WHO)
                await gray.kill("pricing", **WHO)
                async with asyncio.timeout(20):
                    while (await order(f"l-{time.monotonic_ns()}", "new"))["front"] != "stable":
                        await asyncio.sleep(0.01)
                assert await order("o-3", "new") == {"front": "stable", "back": "stable"}
                assert await worker_ran("o-3") == ["stable"]
            await close_client(client_of_redis)


@pytest.mark.redis
async def test_candidate_merchants_later_functions_run_in_the_candidate_group_of_workers(
    redis_url: str, places: Places, namespace: str, tmp_path: Path
) -> None:
    database = f"sqlite+aiosqlite:///{tmp_path / 'stock.db'}"
    inventory = Inventory(redis_url, database=database, namespace=namespace, metrics=[NoMetrics()], merchant=None)
    gray = inventory.gray_links
    with pytest.raises(ValueError, match="split_workers"):
        gray.serves("candidate")
    gray.split_workers("pricing")
    with pytest.raises(ValueError, match="variant"):
        gray.serves("best")
    ran: list[str] = []

    @inventory.deducts(run="later", name="book", merchant="merchant", operation_id="order", sku=lambda: "a", quantity=1)
    async def book(order: str, merchant: str) -> None:
        ran.append(order)

    async with inventory:
        await inventory.create_schema()
        await gray.set("pricing", allow=["new", "newer"], **WHO)
        for merchant in ("old", "new", "newer"):
            await inventory.stock.restock([Line("a", 9)], merchant=merchant, operation_id="r")
            await book(f"{merchant}-1", merchant)
        async with inventory.worker(variant="candidate", name="c"):
            await until(lambda: set(ran) == {"new-1", "newer-1"})
            async with inventory.worker(variant="stable", name="s"):
                await until(lambda: set(ran) == {"new-1", "newer-1", "old-1"})
        # taken back, or killed: the stable group serves what was sent to the candidate's
        for merchant in ("old", "new", "newer"):
            await book(f"{merchant}-2", merchant)
        await gray.set("pricing", allow=["newer"], deny=["new"], **WHO)
        async with inventory.worker(variant="stable", name="s"):
            await until(lambda: {"old-2", "new-2"} <= set(ran))
            assert "newer-2" not in ran
            await gray.kill("pricing", **WHO)
            await until(lambda: "newer-2" in ran)
    assert sorted(ran) == sorted(set(ran))
