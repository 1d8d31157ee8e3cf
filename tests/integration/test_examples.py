"""The examples are run as their readers run them: each in a process of its own, from its own folder."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
import pytest
from redis import Redis
from sqlalchemy.engine import make_url

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"

ON_SERVERS = '''
"""The same tests on real servers, each in a schema of its own."""

import os
import uuid

import asyncpg
import pytest
from redis.asyncio import Redis
from sqlalchemy.engine import make_url


@pytest.fixture
async def database():
    url = make_url(os.environ["SHOP_DATABASE_URL"])
    connection = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    schema = f"s{uuid.uuid4().hex[:12]}"
    await connection.execute(f"CREATE SCHEMA {schema}")
    await connection.execute(f"ALTER DATABASE {url.database} SET search_path = {schema}")
    await connection.close()
    return os.environ["SHOP_DATABASE_URL"]


@pytest.fixture
async def redis():
    client = Redis.from_url(os.environ["SHOP_REDIS_URL"])
    yield client
    async for key in client.scan_iter(match="{" + os.environ["SHOP_NAMESPACE"] + ":*"):
        await client.delete(key)
    await client.aclose()
'''


def run(folder: Path, *arguments: str, **environment: str) -> str:
    """What it prints; the test fails with it if the process does."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{folder.name}: {' '.join(arguments)} ended with {done.returncode}\n{done.stdout}"
    return done.stdout


def test_the_shop_works_before(tmp_path: Path) -> None:
    assert "17 passed" in run(EXAMPLES / "shop_before", "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/shop")


def test_the_shop_works_after(tmp_path: Path) -> None:
    assert "24 passed" in run(EXAMPLES / "shop_after", "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/shop")


def test_the_tests_of_the_shop_are_the_same_before_and_after() -> None:
    for name in ("tests/test_shop.py", "shop/models.py", "shop/errors.py", "shop/database.py", "load.py"):
        assert (EXAMPLES / "shop_before" / name).read_bytes() == (EXAMPLES / "shop_after" / name).read_bytes()


@pytest.mark.redis
@pytest.mark.postgresql
def test_the_shop_works_after_on_real_servers(tmp_path: Path, redis_url: str, postgresql_url: str, namespace: str) -> None:
    shop = tmp_path / "shop_after"
    shutil.copytree(EXAMPLES / "shop_after", shop, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    servers = shop / "tests" / "servers"
    servers.mkdir()
    for name in ("__init__.py", "test_shop.py", "test_inventory.py"):
        (shop / "tests" / name).rename(servers / name)
    (shop / "tests" / "__init__.py").touch()
    (servers / "conftest.py").write_text(ON_SERVERS)
    with shop_database(postgresql_url, namespace) as url:
        ours = {"SHOP_DATABASE_URL": url, "SHOP_REDIS_URL": redis_url, "SHOP_NAMESPACE": namespace}
        assert "24 passed" in run(shop, "-m", "pytest", "-p", "no:cacheprovider", **ours)


@contextmanager
def shop_database(server: str, name: str) -> Iterator[str]:
    """The URL of a new database. One for all tests of the shop: dropping a database makes PostgreSQL write a checkpoint."""
    url = make_url(server)

    async def execute(statement: str) -> None:
        connection = await asyncpg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
        await connection.execute(statement)
        await connection.close()

    asyncio.run(execute(f"CREATE DATABASE {name}"))
    try:
        yield url.set(database=name).render_as_string(hide_password=False)
    finally:
        asyncio.run(execute(f"DROP DATABASE {name} WITH (FORCE)"))


RUSH = ("load.py", "--buyers", "120", "--units", "30")
SOLD_OUT = ["120 buyers, 32 at once, for 30 mugs: 30 got one, 90 were refused, 0 failed", "exact"]


def test_a_rush_on_the_shop_sells_every_mug_once() -> None:
    said = run(EXAMPLES / "shop_after", "-W", "error", *RUSH).splitlines()
    assert [said[0], said[-1]] == SOLD_OUT


@pytest.mark.redis
@pytest.mark.postgresql
def test_a_rush_on_real_servers_sells_every_mug_once_before_and_after(redis_url: str, postgresql_url: str, namespace: str) -> None:
    with shop_database(postgresql_url, namespace) as url:
        ours = {"SHOP_DATABASE_URL": url, "SHOP_REDIS_URL": redis_url, "SHOP_NAMESPACE": namespace}
        try:
            for shop in ("shop_before", "shop_after"):
                said = run(EXAMPLES / shop, "-W", "error", *RUSH, **ours).splitlines()
                assert [said[0], said[-1]] == SOLD_OUT, shop
        finally:
            with Redis.from_url(redis_url) as client:
                for key in client.scan_iter(match="{" + namespace + ":*"):
                    client.delete(key)


def test_a_service_of_classes_packs_unpacks_and_writes_its_letters() -> None:
    said = run(EXAMPLES, "-W", "error", "warehouse.py").splitlines()
    assert said[:5] == [
        "p1 holds 1 lamp, 1 rug",
        "p2 holds 1 lamp",
        "p2 unpacked",
        "confirm of 2 lines",
        "north: p1 is on its way, says the one made by the worker",
    ]
    assert sorted(said[5:]) == sorted(
        [
            *("north: restock 2 lamp", "north: restock 1 rug"),
            *("north: reserve 1 lamp", "north: reserve 1 rug", "north: reserve 1 lamp"),
            *("north: release 1 lamp", "north: confirm 1 lamp", "north: confirm 1 rug"),
        ]
    )


def test_plain_asyncio_sells_what_is_there_and_no_more() -> None:
    said = run(EXAMPLES, "-W", "error", "plain_asyncio.py").splitlines()
    assert said == [
        "o1: 4 × concert, 6 left",
        "o1: 4 × concert, 6 left (again)",
        "o1: paid",
        "rush: 6 of 100 got one",
        said[-1],
    ]
    assert said[-1].startswith("books: in order StockLevel(available=0, reserved=6,")


def test_woven_code_takes_stock_without_being_edited() -> None:
    assert run(EXAMPLES, "-W", "error", "woven.py").splitlines() == [
        "order 1 accepted",
        "card declined, 1 book left",
        "order 3 refused: merchant 'default', sku 'book': 2 asked, 1 available",
        "orders: [1]",
    ]


def test_a_function_that_loses_a_line_is_refused() -> None:
    cap = "merchant 'default', sku 'cap'"
    assert run(EXAMPLES, "-W", "error", "verified.py").splitlines() == [
        "picked: {'mug': 2, 'tee': 1}",
        "told of: Warehouse.pick",
        f"refused: {cap}, available: expected -1, found 0; {cap}, reserved: expected 1, found 0; {cap}, change log: expected -1, found 0",
        "mugs: 3",
        "shelf: {'mug': 3, 'tee': 2}",
    ]


def test_plain_asyncio_is_tested_with_everything_replaced() -> None:
    files = ("test_plain_asyncio.py", "test_fixture.py", "test_factories.py")
    assert "8 passed" in run(EXAMPLES, "-m", "pytest", "-p", "no:cacheprovider", *files)


@pytest.mark.parametrize("page", ["fastapi.md", "testing.md", "verify.md"])
def test_the_python_on_the_page_stands_in_the_examples(page: str) -> None:
    code = [unindented(source.read_text()) for source in sorted(EXAMPLES.rglob("*.py"))]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "how-to" / page).read_text(), re.DOTALL)
    assert len(blocks) > 2
    for block in blocks:
        assert any(unindented(block) in text for text in code), f"{page} shows what no example has:\n{block}"


def unindented(code: str) -> str:
    """A page shows a method without the indentation of its class."""
    return "".join(f"{line.strip()}\n" for line in code.splitlines())
