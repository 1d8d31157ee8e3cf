"""Build the wheel and use it as a stranger would: every file is in it, it imports bare, each extra alone is enough and is named
where it is missing, the demo runs.

One environment holds everything. An installation with one extra is a folder of links to the distributions that this extra asks for,
and Python with that folder alone on its path: as exact as an environment of its own, and made in no time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import HeaderParser
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "inventory_sdk"
SDIST = ("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "Makefile", "compose.yaml",
         "pyproject.toml", "mkdocs.yml", "tests/conftest.py", "docs/index.md", "examples/woven.py", "benchmarks/hot_sku.py")  # fmt: skip

MAKE = "from inventory_sdk import Inventory\nInventory('redis://127.0.0.1/', {}, metrics=[])"
OPEN = """import asyncio
from inventory_sdk.ledger.protocol import LedgerUnavailable
from inventory_sdk.ledger.sql import SqlLedger

try:
    asyncio.run(SqlLedger('{}').start())
except LedgerUnavailable:
    pass  # the driver is there, a server isn't
"""
SELL = """import asyncio
from inventory_sdk import Inventory, Line

async def main():
    async with Inventory('memory://') as inventory:
        await inventory.stock.restock([Line('a', 1)], operation_id='delivery')
        await inventory.stock.deduct([Line('a', 1)], operation_id='o1')
        await inventory.settled()
        assert await inventory.ledger.verify() == []

asyncio.run(main())"""
COMMAND = "import sys\nfrom inventory_sdk.cli import main\nsys.argv[1:] = ['{}']\nmain()"
WATCH = "from inventory_sdk import *\nfrom sqlalchemy import *\nWatchedTables(Table('t', MetaData(), Column('sku', String)), 'sku')"

TRANSPORT = """import asyncio
from inventory_sdk.gray.links import GrayLinks
from inventory_sdk.metrics import NoMetrics

links = GrayLinks(lambda: 'm1', None, NoMetrics(), None)
asyncio.run(links.transport('checkout', stable='http://127.0.0.1:1', candidate='http://127.0.0.1:2').aclose())"""
SINK = "from inventory_sdk.reconcile.sinks.elasticsearch import ElasticsearchSink\nElasticsearchSink('http://127.0.0.1:1')"
PAGES = """from inventory_sdk.web import admin_app
from inventory_sdk.errors import InvalidOperation

try:
    admin_app(None, auth=None)
except InvalidOperation:
    pass  # the pages are there, and closed to nobody in particular"""

WORKS: dict[str, tuple[str, ...]] = {
    "": ("from inventory_sdk import *", COMMAND.format("--version")),
    "sqlalchemy": (WATCH, "import inventory_sdk.ledger.sql"),
    "postgresql": (OPEN.format("postgresql+asyncpg://127.0.0.1:1/shop"),),
    "mysql": (OPEN.format("mysql+asyncmy://127.0.0.1:1/shop"),),
    "sqlite": (OPEN.format("sqlite+aiosqlite:///stock.db"),),
    "embedded": (SELL,),
    "cli": (COMMAND.format("--help"),),
    "otel": (
        "from inventory_sdk.metrics.opentelemetry import OpenTelemetryMetrics\nOpenTelemetryMetrics()",
        "from inventory_sdk import tracing\ntracing.enable()",
    ),
    "httpx": (TRANSPORT,),
    "elasticsearch": (SINK,),
    "admin": (PAGES,),
}
"""What must work with this extra alone."""

NAMED: tuple[tuple[str, str, str], ...] = (
    # installed, what is tried, the extra that the error must name
    ("", COMMAND.format("demo"), "cli"),
    ("", "from inventory_sdk import Inventory\nInventory('memory://')", "embedded"),
    ("", MAKE.format("database='sqlite+aiosqlite://'"), "sqlite"),
    ("sqlalchemy", OPEN.format("postgresql+asyncpg://127.0.0.1/shop"), "postgresql"),
    ("sqlalchemy", OPEN.format("mysql+asyncmy://127.0.0.1/shop"), "mysql"),
    ("sqlalchemy", OPEN.format("sqlite+aiosqlite:///stock.db"), "sqlite"),
    ("", "from inventory_sdk import tracing\ntracing.enable()", "otel"),
    ("", TRANSPORT, "httpx"),
    ("", SINK, "elasticsearch"),
    ("", PAGES, "admin"),
)


def run(*command: str | Path, cwd: Path, code: int = 0, path: Path | None = None) -> str:
    """Standard output and error of the command, run away from the sources; stops the check on any other exit code."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    words = [str(part) for part in command]
    done = subprocess.run(  # noqa: S603  (our own commands)
        words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != code:
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}, expected {code}\n{done.stdout}")
    return done.stdout


def environment(place: Path, requirement: str) -> Path:
    """The bin directory of a fresh environment that holds ``requirement``."""
    run(sys.executable, "-m", "venv", place, cwd=place.parent)
    run(place / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", requirement, cwd=place.parent)
    return place / "bin"


def missing(wheel: Path) -> list[str]:
    """Files of the package that git would keep and the wheel lacks."""
    packed = set(zipfile.ZipFile(wheel).namelist())
    ours = (path for path in (ROOT / PACKAGE).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(name for path in ours if (name := path.relative_to(ROOT).as_posix()) not in packed)


def extras_of(wheel: Path) -> list[str]:
    """The extras that the wheel's metadata declares."""
    with zipfile.ZipFile(wheel) as packed:
        (metadata,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(packed.read(metadata).decode()).get_all("Provides-Extra") or []


def missing_from_source(sdist: Path) -> list[str]:
    """What a packager or a contributor would look for in the sdist in vain."""
    with tarfile.open(sdist) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    return [name for name in SDIST if name not in names]


def linked(farm: Path, site: Path, extra: str) -> Path:
    """A folder with links to all that ``inventory_sdk[extra]`` asks for, from an environment that holds it among others."""
    waiting: list[tuple[str, str]] = [(PACKAGE, extra)]
    asked: set[tuple[str, str]] = set()
    chosen: dict[str, Distribution] = {}
    while waiting:
        name, one = waiting.pop()
        name = canonicalize_name(name)
        if (name, one) in asked:
            continue
        asked.add((name, one))
        found = chosen.setdefault(name, next(iter(Distribution.discover(name=name, path=[str(site)]))))
        for text in found.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": one}):
                waiting += [(needed.name, each) for each in ("", *needed.extras)]
    farm.mkdir()
    for found in chosen.values():
        for top in {path.parts[0] for path in found.files or ()} - {"..", "__pycache__"}:
            if not (farm / top).exists():
                (farm / top).symlink_to(str(found.locate_file(top)))
    return farm


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="inventory-wheel-") as name:
        place = Path(name)
        run(sys.executable, "-m", "build", "--outdir", place / "dist", ROOT, cwd=place)
        (wheel,), (sdist,) = (place / "dist").glob("*.whl"), (place / "dist").glob("*.tar.gz")
        if lacking := missing(wheel):
            sys.exit(f"{wheel.name} lacks {', '.join(lacking)}")
        if lacking := missing_from_source(sdist):
            sys.exit(f"{sdist.name} lacks {', '.join(lacking)}")
        print(f"{wheel.name}: every file of {PACKAGE}/ is in it; {sdist.name}: documents, tests and examples too")

        extras = extras_of(wheel)
        if unknown := set(extras) ^ set(filter(None, WORKS)):
            sys.exit(f"say in WORKS of {Path(__file__).name} what must work with these extras alone: {', '.join(sorted(unknown))}")
        full = environment(place / "full", f"{wheel}[{','.join(extras)}]")
        (site,) = (place / "full/lib").glob("python*/site-packages")
        farms = {extra: linked(place / f"only-{extra}", site, extra) for extra in WORKS}
        for extra, programs in WORKS.items():
            for program in programs:
                run(full / "python", "-S", "-W", "error", "-c", program, cwd=place, path=farms[extra])
        print(f"works with nothing but the extra: {', '.join(filter(None, WORKS))}; and without any")
        for installed, program, wanted in NAMED:
            said = run(full / "python", "-S", "-c", program, cwd=place, path=farms[installed], code=1)
            if f"[{wanted}]" not in said:
                sys.exit(f"with {installed or 'no extra'}, this does not name [{wanted}]:\n{program}\n{said}")
        print("without its extra, what needs one names it")
        print(run(full / "inventory-sdk", "demo", "--buyers", "500", "--units", "50", cwd=place))
        print("the demo ran")


if __name__ == "__main__":
    main()
