"""The examples of the documents run. A page's blocks are one program, read from top to bottom; what a page takes for granted (its cart,
its web app) stands here. Pages whose code stands in ``examples/`` run there (tests/integration/test_examples.py)."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from inventory_sdk import InsufficientStock, Inventory, InventoryError, Line
from inventory_sdk.model import Shortage

ROOT = Path(__file__).resolve().parents[2]
STANDING = ["explanation/durability.md", "how-to/adopt.md", "how-to/cluster.md", "how-to/lanes.md", "how-to/sentinel.md"]
"""Pages that name servers: each Inventory is made as written, and then one without servers is used in its place."""


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


async def run(program: str, page: Path, names: dict[str, Any]) -> None:
    """Execute with ``await`` at the top, as the documents are written."""
    code = compile(program, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, names)
    if inspect.isawaitable(result):
        await result


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.mark.parametrize("page", STANDING)
async def test_a_page_that_names_servers_runs_without_them(page: str, stack: AsyncExitStack) -> None:
    class Item:
        product_id, qty = "sku-1", 1

    async def nothing() -> None: ...

    def embedded(redis: str, **options: Any) -> Inventory:
        Inventory(redis, metrics=[], **options)
        kept = {name: value for name, value in options.items() if name in ("partitions", "admission", "lanes")}
        return Inventory("memory://", metrics=[], **kept)

    names: dict[str, Any] = {"Inventory": embedded, "Line": Line, "CartItem": Item, "Row": Item, "items": [Item()], "load_file": nothing}
    path = ROOT / "docs" / page
    found = [block.replace("from inventory_sdk import Inventory, Lane", "from inventory_sdk import Lane") for block in blocks(path)]
    assert found
    for block in found:
        made = "inventory" in names
        if not made:  # the calls that follow it need what is started here
            statements = ast.parse(block).body
            first = next(
                at for at, each in enumerate(statements, 1) if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]) == "inventory"
            )
            await run(ast.unparse(ast.Module(statements[:first], [])), path, names)
            inventory = await stack.enter_async_context(names["inventory"])
            for merchant in ("default", "m1"):
                await inventory.stock.restock([Line("sku-1", 10)], merchant=merchant, operation_id="delivery")
            block = "\n".join(ast.unparse(each) for each in statements[first:]) or "pass"
        await run(block, path, names)
        names["inventory"] = inventory  # a page may show another one, which has no servers here
    await inventory.settled()
    assert await inventory.ledger.verify() == []


def self_contained() -> list[tuple[Path, str]]:
    pages = sorted((ROOT / "docs").rglob("*.md"))  # the README has its test in test_house.py
    return [(page, block) for page in pages for block in blocks(page) if 'Inventory("memory://"' in block]


@pytest.mark.parametrize(("page", "program"), self_contained(), ids=lambda value: value.name if isinstance(value, Path) else "")
def test_a_block_that_needs_no_server_runs_as_it_stands(page: Path, program: str) -> None:
    if "asyncio.run" in program:
        exec(compile(program, str(page), "exec"), {"__name__": "__main__"})
        return
    asyncio.run(_awaited(run(program, page, {})))


async def _awaited(work: Awaitable[None]) -> None:
    await work


async def test_the_middleware_page_runs() -> None:
    import quart

    first, second = blocks(ROOT / "docs/how-to/middleware.md")
    names: dict[str, Any] = {"inventory": Inventory("memory://", metrics=[])}
    await run(first, ROOT / "docs/how-to/middleware.md", names)
    assert [each.cls.__name__ for each in names["app"].user_middleware] == ["InventoryMiddleware"]

    def response(content: bytes, *, status_code: int, headers: dict[str, str], media_type: str) -> tuple[int, str]:
        return status_code, media_type

    names |= {"app": quart.Quart("shop"), "Response": response}
    await run(second, ROOT / "docs/how-to/middleware.md", names)
    error = InsufficientStock([Shortage("m1", "sku-1", 2, 1)])
    status, kind = names["answered"](None, error)
    assert (status, kind) == (409, "application/problem+json")
    body, found, headers = await names["answer"](error)
    assert (found, headers["content-type"], b"sku-1" in body) == (status, kind, True)
    with pytest.raises(InventoryError, match="ours"):
        await names["answer"](InventoryError("nobody's fault but ours"))
