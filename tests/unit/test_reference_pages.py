"""The reference pages say what the code says: arguments, fields, environment, events, series."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

from inventory_sdk import Detection, Inventory, Lane
from inventory_sdk.cli.app import app
from inventory_sdk.gray.rules import Guard
from inventory_sdk.ledger.schema import tables
from inventory_sdk.metrics.series import all_series
from inventory_sdk.reconcile import Reconcile
from inventory_sdk.redistribute.policy import RedistributionPolicy
from inventory_sdk.stock.decorators import EVENTS
from tests.unit.test_documents import ROOT

CONFIGURATION = (ROOT / "docs/reference/configuration.md").read_text()
EVENT_PAGE = (ROOT / "docs/reference/events.md").read_text()


def rows(page: str, heading: str, number: int = 0) -> list[list[str]]:
    """The cells of a section's table."""
    section = re.split(r"\n##+ ", re.split(rf"\n##+ {re.escape(heading)}\n", page, maxsplit=1)[1], maxsplit=1)[0]
    found = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)[number]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found.splitlines()[2:]]


def code(cell: str) -> str:
    """What the cell begins with, in backticks."""
    found = re.match(r"`([^`]*)`", cell)
    assert found is not None, cell
    return found[1]


def test_every_argument_of_an_inventory_stands_in_the_reference() -> None:
    wanted = []
    for name, parameter in inspect.signature(Inventory).parameters.items():
        wanted.append((name, "required" if parameter.default is parameter.empty else parameter.default))
    said = rows(CONFIGURATION, "Arguments")
    assert [(code(name), default if default == "required" else ast.literal_eval(code(default))) for name, default, _ in said] == wanted


@pytest.mark.parametrize("kind", [Lane, Detection, RedistributionPolicy, Reconcile, Guard])
def test_every_field_of_what_arguments_take_stands_in_the_reference(kind: Any) -> None:
    made = kind()
    wanted = [(field.name, getattr(made, field.name)) for field in dataclasses.fields(kind)]
    assert [(code(name), ast.literal_eval(code(default))) for name, default, _ in rows(CONFIGURATION, kind.__name__)] == wanted


def test_the_variables_of_from_env_stand_in_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(Inventory.from_env)))
    pairs = [
        (each.elts[1].value, each.elts[0].value)
        for each in ast.walk(body)
        if isinstance(each, ast.Tuple) and len(each.elts) == 2 and all(isinstance(part, ast.Constant) for part in each.elts)
    ]
    assert len(pairs) > 5
    assert [(code(variable), code(argument)) for variable, argument in rows(CONFIGURATION, "Environment")] == pairs


def test_the_variables_of_the_command_line_stand_in_the_reference() -> None:
    root: Any = typer.main.get_command(app)
    found = set()

    def look(name: str, command: Any) -> None:
        for each in getattr(command, "commands", {}).items():
            look(*each)
        for parameter in command.params:
            for variable in [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or []:
                own = "" if variable in shared else f"{name} "
                found.add((variable, f"{own}{parameter.opts[0]}"))

    shared = {code(variable) for variable, _ in rows(CONFIGURATION, "Environment")}
    look("", root)
    assert {(code(variable), code(option)) for variable, option in rows(CONFIGURATION, "Environment", 1)} == found


def constants() -> dict[str, set[Any]]:
    """Module constants of the package by name."""
    found: dict[str, set[Any]] = {}
    for path in (ROOT / "inventory_sdk").rglob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value is not None:
                try:
                    value = eval(compile(ast.Expression(statement.value), str(path), "eval"), {"__builtins__": {}})
                except Exception:  # noqa: BLE001 - not a number that can be written down
                    continue
                if isinstance(value, int | float):
                    found.setdefault(statement.target.id, set()).add(value)
                    found.setdefault(f"{path.stem}.{statement.target.id}", set()).add(value)
    return found


def test_the_fixed_numbers_are_those_of_the_code() -> None:
    known = constants()
    said = [pair for _, value in rows(CONFIGURATION, "Fixed on purpose") for pair in re.findall(r"([\d⁹]+)[^`,]*\(`([\w.]+)`\)", value)]
    assert len(said) == len(re.findall(r"`[A-Za-z.]*[A-Z_]{4,}`", CONFIGURATION.split("## Fixed on purpose")[1]))
    for text, name in said:
        number = 10**9 if text == "10⁹" else int(text)
        unit = {"KEEP_APPLIED_MS": 1000, "MAX_TTL": 86_400}.get(name, 1)
        assert number * unit in known[name], f"{name} is {known[name]}, the page says {text}"


# Events and series ---------------------------------------------------------------------------------------------------------------------


def told() -> Iterator[tuple[str, set[str], bool]]:
    """Every place that tells an event with facts written there: its name, their keys, and whether there may be more."""
    for path in (ROOT / "inventory_sdk").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or len(call.args) != 2 or not isinstance(call.args[0], ast.Constant):
                continue
            name, facts = call.args[0].value, call.args[1]
            called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in EVENTS and called in ("tell", "_tell") and isinstance(facts, ast.Dict):
                keys = {key.value for key in facts.keys if isinstance(key, ast.Constant)}
                yield name, keys, None in facts.keys


def test_every_event_stands_in_the_reference_with_its_facts() -> None:
    said = {code(name): set(re.findall(r"`(\w+)`", facts.split(". ")[0])) for name, _, facts in rows(EVENT_PAGE, "Events")}
    assert list(said) == list(EVENTS)
    found = list(told())
    assert len({name for name, _, _ in found}) > 12
    for name, keys, more in found:
        assert keys <= said[name] if more else keys == said[name], f"{name}: the code tells {sorted(keys)}, the page {sorted(said[name])}"


def test_every_series_stands_in_the_reference_with_its_labels() -> None:
    said = [(code(name), kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows(EVENT_PAGE, "Series")]
    suffix = {"counter": "_total", "gauge": "", "histogram": ""}
    assert said == [(f"inventory_{each.name}{suffix[each.kind]}", each.kind, each.labels) for each in all_series()]


def test_every_word_that_is_counted_stands_in_the_reference() -> None:
    """The values of ``inventory_events_total{name}`` and ``inventory_retries_total{what}``."""
    found: dict[str, set[str]] = {"happened": set(), "retried": set()}
    for path in (ROOT / "inventory_sdk").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant):
                called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
                if called.lower() in found and isinstance(call.args[0].value, str):
                    found[called.lower()].add(call.args[0].value)
    events, retries = EVENT_PAGE.split("\nTwo label sets")[1].split("**`inventory_retries_total{what}`**")
    assert found["happened"] - set(re.findall(r"`(\w+)`", events)) - set(EVENTS) == set()
    assert set(re.findall(r"`(\w+)`", retries)) == found["retried"]


def test_a_series_that_a_page_names_exists() -> None:
    """Also in queries and alerts; tables of the ledger look alike, and so does the package."""
    known = {table.name for table in tables().all()} | {"inventory_sdk", "inventory_"}
    for each in all_series():
        known |= {f"inventory_{each.name}{end}" for end in ("", "_total", "_bucket", "_count", "_sum")}
    pages = sorted((ROOT / "docs").rglob("*.md"))
    named = [(page.name, name) for page in pages for name in set(re.findall(r"\binventory_[a-z_]+\b", page.read_text()))]
    assert [pair for pair in named if pair[1] not in known] == []


# Capacity ------------------------------------------------------------------------------------------------------------------------------


def test_the_paper_nodes_follow_from_the_measured_constants() -> None:
    page = (ROOT / "docs/explanation/capacity.md").read_text()
    cells = [row for number in (0, 1) for row in rows(page, "Constants", number)]
    constant = {code(name): float(re.findall(r"[\d,.]+", value)[0].replace(",", "")) for name, value, _ in cells}

    def cost(part: str, batch: float) -> float:
        return constant[f"{part}_op"] + constant[f"{part}_batch"] / batch

    for number, part in enumerate(("c", "s", "w")):  # 60 % of a core, to two digits
        for cell, batch in zip(rows(page, "CPU")[number][1:], (1, 128), strict=True):
            assert float(cell.removesuffix("/s").replace(",", "")) == pytest.approx(600_000 / cost(part, batch), rel=0.1)

    for row in rows(page, "On paper"):
        nodes, rate, callers, redis, worker, cells_, of_cell, written, megabytes, results, connections = (
            float(cell.replace(",", "")) for cell in row
        )

        def near(value: float) -> Any:  # as it is rounded there
            return pytest.approx(value, abs=0.51 if value >= 10 else 0.051)

        assert rate == nodes * 200
        for said, part in ((callers, "c"), (redis, "s"), (worker, "w")):
            assert said == near(rate * cost(part, 1) / 1e6)
        assert cells_ == math.ceil(rate * cost("w", 1) / 600_000)
        assert of_cell == near(rate / cells_)
        assert written == near(3 * rate / cells_)
        assert megabytes == near(rate / cells_ * constant["bytes"] / 1e6)
        remembered = min(2 * 86_400 * rate / 10, 40e6 * cells_)
        assert results == near(remembered * constant["m_result"] / 1e9)
        assert connections == nodes * 4
