"""The pytest plugin as its users run it: in a pytest of its own, under each of the runners of async tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SHOP = """
from inventory_sdk import Inventory, Receipt, injected

inventory = Inventory("redis://127.0.0.1:1/0", database="postgresql+asyncpg://nowhere/shop", metrics=[])


@inventory.reserves(run="now", operation_id="order", sku="ticket", quantity=1, ttl=900)
async def book(order: str, ticket: str, receipt: Receipt = injected()) -> int:
    return receipt.lines[0].remaining
"""

TESTS = """
import asyncio

import pytest

from inventory_sdk import Inventory, Line
from inventory_sdk.testing import advance, assert_consistent

{fixture}
async def stocked(embedded_inventory: Inventory):
    await embedded_inventory.stock.restock([Line("mug", 5)], operation_id="delivery")
    yield embedded_inventory
    await assert_consistent(embedded_inventory)


{mark}
async def test_the_fixture_and_the_test_share_a_loop(stocked: Inventory) -> None:
    receipts = await asyncio.gather(*[stocked.stock.deduct([Line("mug", 1)], operation_id=f"o{{n}}") for n in range(5)])
    assert sorted(receipt.lines[0].remaining for receipt in receipts) == [0, 1, 2, 3, 4]


{mark}
async def test_each_test_begins_with_its_own_stock(stocked: Inventory) -> None:
    assert (await stocked.stock.level("mug")).available == 5
    await stocked.stock.reserve([Line("mug", 2)], operation_id="order-1", ttl=900)
    await advance(stocked, 901)
    assert (await stocked.stock.level("mug")).available == 5


{mark}
@pytest.mark.inventory({which}stock={{"default": {{"seat": 3}}}})
async def test_the_services_own_object_is_replaced(embedded_inventory: Inventory) -> None:
    import shop

    assert embedded_inventory is shop.inventory
    assert await shop.book("o1", "seat") == 2
    await assert_consistent(shop.inventory)


class TestMethods:
    {mark}
    async def test_of_a_class(self, stocked: Inventory) -> None:
        assert (await stocked.stock.level("mug")).available == 5
"""

ANYIO_BACKEND = """
@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param

"""


def outcome(folder: Path, tests: str, ini: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output of pytest on ``tests``, warnings being errors."""
    (folder / "shop.py").write_text(SHOP)
    (folder / "test_it.py").write_text(tests)
    (folder / "pytest.ini").write_text(f"[pytest]\npythonpath = .\nfilterwarnings = error\n{ini}")
    # Plugins of this environment that have nothing to do with it only cost their imports.
    apart = [word for name in ("hypothesispytest", "faker", "xdist", "cacheprovider") for word in ("-p", f"no:{name}")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--strict-markers", "--strict-config", *apart, "-rs", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout


FUNCTION = "asyncio_default_fixture_loop_scope = function\n"
SESSION = """asyncio_default_fixture_loop_scope = session
asyncio_default_test_loop_scope = session
inventory = shop:inventory
"""


@pytest.mark.parametrize(
    ("fixture", "mark", "ini", "arguments"),
    [
        ("@pytest.fixture", "", f"asyncio_mode = auto\n{FUNCTION}", ()),
        ("@pytest.fixture", "", f"asyncio_mode = auto\n{SESSION}", ()),
        ("@pytest_asyncio.fixture", "@pytest.mark.asyncio", f"asyncio_mode = strict\n{FUNCTION}", ()),
        (
            '@pytest_asyncio.fixture(loop_scope="module")',
            '@pytest.mark.asyncio(loop_scope="module")',
            f"asyncio_mode = strict\n{FUNCTION}",
            (),
        ),
        ("@pytest.fixture", "@pytest.mark.anyio", "", ("-p", "no:asyncio")),
        ("@pytest.fixture", "@pytest.mark.anyio", f"asyncio_mode = strict\n{FUNCTION}", ()),
    ],
    ids=["auto", "auto, one loop", "strict", "strict, a loop per module", "anyio", "anyio beside pytest-asyncio"],
)
def test_the_fixture_works_under(tmp_path: Path, fixture: str, mark: str, ini: str, arguments: tuple[str, ...]) -> None:
    anyio = "anyio" in mark
    above = "import pytest_asyncio\n" if "pytest_asyncio" in fixture else ANYIO_BACKEND if anyio else ""
    which = "" if "shop:inventory" in ini else '"shop:inventory", '
    code, said = outcome(tmp_path, TESTS.format(fixture=above + fixture, mark=mark, which=which), ini, *arguments)
    assert code == 0, said
    assert ("4 passed, 4 skipped" if anyio else "4 passed in") in said, said
    assert not anyio or "runs on asyncio, not on trio" in said


WRONG = """
import pytest

@pytest.mark.inventory("shop")
async def test_a_name(embedded_inventory): ...

@pytest.mark.inventory("shop:book")
async def test_a_thing(embedded_inventory): ...

@pytest.mark.inventory(stok={})
async def test_a_keyword(embedded_inventory): ...
"""


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, WRONG, f"asyncio_mode = auto\n{FUNCTION}")
    assert (code, "3 errors" in said) == (1, True), said
    for named in ("name it as 'package.module:inventory'", "not an Inventory", "it takes which inventory, and stock="):
        assert named in said


def test_without_a_runner_of_async_tests_the_fixture_says_what_it_needs(tmp_path: Path) -> None:
    code, said = outcome(tmp_path, "def test_it(embedded_inventory): ...", "", "-p", "no:asyncio")
    assert code == 1
    assert "needs pytest-asyncio, or anyio" in said
