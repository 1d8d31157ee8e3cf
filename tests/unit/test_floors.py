"""The house has floors (design §9) and imports only go down. Read from the sources with ast: imports inside functions and
under TYPE_CHECKING count as well, since what a room knows of is what it depends on."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "inventory_sdk"
ROOT = Path(__file__).resolve().parents[2] / PACKAGE

FLOORS: tuple[tuple[str, ...], ...] = (
    ("cli", "web", "testing"),
    ("",),  # the public face, inventory_sdk/__init__.py
    ("web.middleware",),  # part of the face
    ("inventory",),
    ("traffic", "gray", "hotspot", "verify", "redistribute", "reconcile", "alerts", "stock.aspect"),
    ("beside",),
    ("sync",),
    ("stock", "ledger"),
    ("selectors", "sessions"),
    ("weave", "metrics"),
    ("context", "tracing"),
    ("model", "errors"),
)
"""Top to bottom. A room is a module or a package; the longest match wins, so ``stock.aspect`` stands above ``stock``."""

PART_OF = {
    "ending": "beside",
    "running": "inventory",  # its half that belongs to one event loop
    "servers": "inventory",
    "redis_urls": "inventory",
    "quantities": "model",  # the rule that the ledger's batches and the service's functions are verified by
    "stock.decorators": "stock.aspect",
    "stock.later": "stock.aspect",  # run="later"
    "stock.session": "stock.aspect",  # session=
    "web.problem": "web.middleware",
    "web.lifespan": "web.middleware",
}
"""Modules that belong to another room than their folder says."""

DOORS = {
    ("cli", "testing"),  # doctor --drill breaks things with the faults that users' tests have
    ("cli", "web"),  # the command admin serves the pages
    ("stock", "ledger.protocol"),  # loading reads the truth, through its protocol only
    ("redistribute", "stock.later"),  # a run's arguments travel as those of run="later" do: one codec
    ("model", "errors"),
    ("errors", "model"),  # for annotations only
}
"""Rooms on one floor don't know each other, but for these."""

OUTSIDE = {
    "typer": ("cli",),
    "rich": ("cli",),
    "fakeredis": ("inventory", "testing", "stock", "cli"),
    "sqlalchemy": (
        *("ledger", "sync", "inventory", "reconcile", "gray", "testing", "web"),
        *("stock.aspect", "verify", "sessions", "weave", "cli"),
    ),
    "aio_pika": ("sync",),
    "tenacity": ("sync", "stock"),
    "limits": ("hotspot",),
    "prometheus_client": ("metrics", "cli", "web", "inventory"),
    "opentelemetry": ("metrics", "tracing"),
    "pytest": ("testing",),
    "pytest_asyncio": ("testing",),
    "httpx": ("gray",),
    "starlette": ("web",),
    "jinja2": ("web",),
    "uvicorn": ("cli",),
}
"""Which rooms may know an outside library at all: the others get it behind a protocol."""

SUBROOMS = {
    "sync.queues": ("sync.backoff", "stock.journal", "model", "errors", "context", "metrics", "tracing"),
    "stock.journal": ("model", "errors"),
    "ledger.protocol": ("model", "errors", "ledger.pages"),
    "ledger.pages": ("model", "ledger.protocol"),  # its half for people; each is the other's type
    "metrics.events": (),
}
"""A room within a room, and all it may know of the house: a queue is one file that needs neither worker nor ledger."""


def modules() -> dict[str, Path]:
    """Dotted name below the package (``""`` is the face) → file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(module: str, source: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that ``source`` imports, wherever it stands."""
    here = [PACKAGE, *filter(None, module.split("."))]
    base = here if is_package else here[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join([*base[: len(base) - node.level + 1], *([node.module] if node.module else [])]) if node.level else node.module
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.") if room else name == ""


def place_of(module: str) -> tuple[int, str]:
    """(floor counted from the top, room); LookupError for a room that has no floor."""
    here = next((room for part, room in PART_OF.items() if within(module, part)), module)
    rooms = [(len(room), floor, room) for floor, names in enumerate(FLOORS) for room in names if within(here, room)]
    if not rooms:
        raise LookupError(f"{module or 'the face'} stands on no floor: give its room one in {Path(__file__).name}")
    _, floor, room = max(rooms)
    return floor, room


def inside(name: str, known: set[str]) -> str:
    """The module of the house behind an imported name: ``model.Line`` is ``model``, ``Inventory`` is the face."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def offences(module: str, source: str, known: set[str], is_package: bool = False) -> list[str]:
    floor, room = place_of(module)
    found = []
    for line, name in imported(module, source, is_package):
        top = name.partition(".")[0]
        if top != PACKAGE:
            if top in OUTSIDE and room not in OUTSIDE[top]:
                found.append(f"line {line}: {room or 'the face'} must not know {top}")
            continue
        target = inside(name.removeprefix(PACKAGE).lstrip("."), known)
        target_floor, target_room = place_of(target)
        for subroom, allowed in SUBROOMS.items():
            if within(module, subroom) and not within(target, subroom) and not any(within(target, each) for each in allowed):
                found.append(f"line {line}: {subroom} may only know {', '.join(allowed) or 'nothing'}; it imports {target or 'the face'}")
        if target_room == room:
            continue
        if target_floor < floor:
            found.append(f"line {line}: {module or 'the face'} imports {target or 'the face'}, which stands above it")
        elif target_floor == floor and not any(room == a and within(target, b) for a, b in DOORS):
            found.append(f"line {line}: {module} imports {target}, its neighbour on the same floor")
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_only_go_down(module: str) -> None:
    path = modules()[module]
    assert offences(module, path.read_text(), set(modules()), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("stock.batch", "from inventory_sdk.inventory import Inventory", "above"),
        ("stock.batch", "def late():\n    from inventory_sdk import Receipt", "above"),
        ("stock.batch", "from .. import inventory", "above"),
        ("model", "import inventory_sdk.context", "above"),
        ("stock.batch", "from inventory_sdk.stock.aspect import reserves", "above"),
        ("gray.links", "from inventory_sdk.hotspot import window", "neighbour"),
        ("stock.batch", "from inventory_sdk.ledger.sql import SqlLedger", "neighbour"),
        ("ledger.sql", "from inventory_sdk.stock.journal import decode", "neighbour"),
        ("sync.queues.amqp", "from inventory_sdk.sync.worker import Worker", "may only know"),
        ("stock.batch", "import aio_pika", "must not know"),
        ("model", "if TYPE_CHECKING:\n    from sqlalchemy.ext.asyncio import AsyncSession", "must not know"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_found(module: str, source: str, why: str) -> None:
    known = {"", "inventory", "model", "context", "stock.aspect", "hotspot", "ledger.sql", "stock.journal", "sync.worker"}
    (offence,) = offences(module, source, known)
    assert why in offence


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("inventory", "from inventory_sdk.sync.worker import Worker"),
        ("stock.batch", "from inventory_sdk.ledger.protocol import Ledger"),
        ("stock.batch", "from .journal import decode"),
        ("sync.queues.amqp", "import aio_pika\nfrom inventory_sdk.sync.queues.protocol import Message"),
    ],
)
def test_an_import_that_goes_down_is_allowed(module: str, source: str) -> None:
    known = set(modules()) | {"sync.worker"}
    assert offences(module, source, known) == []


def test_a_room_without_a_floor_is_named() -> None:
    with pytest.raises(LookupError, match=r"helpers\.text stands on no floor"):
        place_of("helpers.text")


def test_the_face_only_re_exports() -> None:
    for node in ast.parse((ROOT / "__init__.py").read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and all(
            isinstance(target, ast.Name) and target.id in {"__all__", "__version__"} for target in node.targets
        )
        assert docstring or names or isinstance(node, ast.Import | ast.ImportFrom), f"line {node.lineno}: {ast.unparse(node)}"


def test_importing_the_package_loads_no_optional_dependency() -> None:
    code = "import sys, inventory_sdk; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"sqlalchemy", "fakeredis", "lupa", "aiosqlite", "asyncpg", "asyncmy", "typer", "rich", "pytest", "httpx"} & set(loaded)
