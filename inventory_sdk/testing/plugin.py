"""The pytest plugin: ``embedded_inventory``, an inventory without any server, started in the event loop of the test.

Works under pytest-asyncio, strict and auto, and under anyio's plugin: whoever runs the test runs the fixture. Which inventory it is
says the ini option ``inventory`` or the marker: ``@pytest.mark.inventory("shop.stock:inventory", stock={"m1": {"mug": 3}})``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

SCOPES: Final = ("function", "class", "module", "package", "session")
"""Event loops that pytest-asyncio has for a test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The ini option."""
    parser.addini("inventory", "module:name of the Inventory that embedded_inventory stands in for", default="")


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line(
        "markers", 'inventory(which=None, *, stock=None): of embedded_inventory: an Inventory or its "module:name", and what it has'
    )


@pytest.fixture
def embedded_inventory(request: pytest.FixtureRequest) -> Inventory:
    """An Inventory on fakeredis and SQLite with a worker inside, for this test: the one that the marker or the ini option names, its
    decorators included, or a new one. Its stock is what the marker says."""
    inventory: Inventory = request.getfixturevalue(_runner_of(request))
    return inventory


@asynccontextmanager
async def _started(request: pytest.FixtureRequest) -> AsyncIterator[Inventory]:
    marker = request.node.get_closest_marker("inventory")
    given = marker.kwargs if marker is not None else {}
    if unknown := set(given) - {"stock"}:
        raise pytest.UsageError(f"@pytest.mark.inventory({', '.join(sorted(unknown))}=…): it takes which inventory, and stock=")
    which = marker.args[0] if marker is not None and marker.args else request.config.getini("inventory")
    async with _chosen(which).replaced(stock=given.get("stock")) as inventory:
        yield inventory


def _chosen(which: Any) -> Inventory:
    from inventory_sdk.inventory import Inventory

    if isinstance(which, Inventory):
        return which
    if not which:
        return Inventory("memory://", metrics=[])
    module, colon, trail = str(which).partition(":")
    if not (colon and module and trail):
        raise pytest.UsageError(f"inventory={which!r}: name it as 'package.module:inventory'")
    found: Any = import_module(module)
    for name in trail.split("."):
        found = getattr(found, name)
    if not isinstance(found, Inventory):
        raise pytest.UsageError(f"inventory={which!r} is a {type(found).__name__}, not an Inventory")
    return found


def _runner_of(request: pytest.FixtureRequest) -> str:
    """The fixture that runs in the loop of this test. ``UsageError`` where nobody runs async tests."""
    config, marker = request.config, request.node.get_closest_marker("asyncio")
    asyncio = config.pluginmanager.hasplugin("asyncio")
    if asyncio and (marker is not None or _mode(config) == "auto" or "anyio_backend" not in request.fixturenames):
        named = marker.kwargs.get("loop_scope") if marker is not None else None
        return f"_inventory_in_{named or config.getini('asyncio_default_test_loop_scope') or 'function'}_loop"
    if "anyio_backend" in request.fixturenames:
        backend = request.getfixturevalue("anyio_backend")
        name = backend if isinstance(backend, str) else backend[0]
        if name != "asyncio":
            pytest.skip(f"inventory_sdk runs on asyncio, not on {name}: give anyio_backend the value 'asyncio'")
        return "_inventory_in_anyio"
    raise pytest.UsageError("embedded_inventory needs pytest-asyncio, or anyio's plugin and @pytest.mark.anyio")


def _mode(config: pytest.Config) -> str:
    return str(config.getoption("asyncio_mode", None) or config.getini("asyncio_mode"))


def _fixture() -> Any:
    # pytest-asyncio notes the loop on the function, so each fixture needs one of its own.
    async def started(request: pytest.FixtureRequest) -> AsyncIterator[Inventory]:
        async with _started(request) as inventory:
            yield inventory

    return started


_inventory_in_anyio = pytest.fixture(_fixture())

try:
    import pytest_asyncio
except ImportError:
    pass
else:
    for _scope in SCOPES:
        globals()[f"_inventory_in_{_scope}_loop"] = pytest_asyncio.fixture(_fixture(), loop_scope=_scope)
