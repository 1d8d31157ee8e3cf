"""The house itself: what a newcomer types works as written, and the documents say what is there."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from tests.conftest import SERVICES

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_opens_with_the_two_commands() -> None:
    first = fenced(ROOT / "README.md", "sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_the_first_five_minutes_of_the_readme_run() -> None:
    (program, *_) = fenced(ROOT / "README.md", "python")
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_python_block_of_the_documents_parses(page: Path) -> None:
    for block in fenced(page, "python"):
        compile(block, str(page), "exec", flags=0x2000)  # PyCF_ALLOW_TOP_LEVEL_AWAIT


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_make_target_and_extra_that_a_document_names_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = page.read_text()
    commands = re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)
    assert set(commands) <= targets
    named = {extra for extras in re.findall(r"inventory_sdk\[([a-z,]+)\]", text) for extra in extras.split(",")}
    assert named <= set(PROJECT["optional-dependencies"])


def test_what_is_imported_is_declared() -> None:
    """Under other names than their modules, or brought by another, are those named here; pytest's own are there when the plugin is."""
    named = {
        "multipart": "python-multipart",
        "opentelemetry": "opentelemetry-api",
        "aiormq": "aio-pika",
        "pydantic_core": "pydantic",
        "elastic_transport": "elasticsearch",
    }
    wanted = [*PROJECT["dependencies"], *(each for extra in PROJECT["optional-dependencies"].values() for each in extra)]
    declared = {re.split(r"[^A-Za-z0-9_.-]", each)[0].lower() for each in wanted}
    found: dict[str, str] = {}
    for path in (ROOT / "inventory_sdk").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found |= {name.partition(".")[0]: path.name for name in names}
    ours = {name: where for name, where in found.items() if name not in sys.stdlib_module_names and name != "inventory_sdk"}
    missing = {
        name: where
        for name, where in ours.items()
        if named.get(name, name.replace("_", "-")) not in declared and name not in {"pytest", "pytest_asyncio"}
    }
    assert missing == {}


def test_the_servers_of_the_compose_file_stand_where_the_tests_look() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    ports = {port for service in services.values() for port in service["ports"]}
    for name in SERVICES:
        place = urlsplit(SERVICES[name][1])
        assert f"{place.hostname}:{place.port}:{place.port}" in ports, name
    assert all("healthcheck" in service for service in services.values())


def test_every_test_that_the_features_page_names_exists() -> None:
    named = re.findall(r"`(tests/[^`]+)`", (ROOT / "docs/features.md").read_text())
    assert named
    for name in named:
        assert list(ROOT.glob(name)), f"{name} holds nothing: there is no such file"


def test_every_ignored_lint_rule_has_its_reason_beside_it() -> None:
    lint = (ROOT / "pyproject.toml").read_text().partition("[tool.ruff.lint]")[2]
    ignored = re.findall(r"^(ignore = \[.*?^\]|\"[^\"]+\" = \[.*?\]$)", lint, re.MULTILINE | re.DOTALL)
    assert len(ignored) > 1
    for block in ignored:
        for line in block.splitlines():
            if re.search(r'"[A-Z]+[0-9]*"', line):
                assert "#" in line, line
