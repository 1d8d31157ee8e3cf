"""The public face: the names users' code relies on are there, documented, and take what the guide says they take."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest

import inventory_sdk
from inventory_sdk import errors, testing
from inventory_sdk.stock.decorators import EVENTS

NAMES = {
    "Change",
    "Inventory",
    "InventoryMiddleware",
    "Lane",
    "Line",
    "Movement",
    "OpeningBalance",
    "Recalculation",
    "Receipt",
    "RedistributionPolicy",
    "Reservation",
    "StockLevel",
    "WatchedTables",
    "injected",
    "record_change",
}
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.InventoryError)}

STOCK = {
    "reserve": {"lines", "merchant", "operation_id", "order", "ttl", "durability"},
    "deduct": {"lines", "merchant", "operation_id", "order", "durability"},
    "confirm": {"reservation", "lines", "operation_id", "merchant", "reacquire", "durability"},
    "release": {"reservation", "lines", "operation_id", "merchant", "durability"},
    "extend": {"reservation", "ttl", "merchant"},
    "restock": {"lines", "merchant", "operation_id"},
    "take_back": {"lines", "of", "merchant", "operation_id"},
    "adjust": {"lines", "merchant", "operation_id", "reason"},
    "level": {"sku", "merchant"},
    "levels": {"merchant"},
    "reservation": {"reservation", "merchant"},
    "status": {"operation_id", "merchant"},
}
DECORATORS = ("reserves", "deducts", "confirms", "releases", "restocks", "takes_back", "adjusts")
HOOKS = ("writes_stock", "reads_stock", "on", "provides", "weave", "lane", "verifies", "gray", "trigger", "coalesce", "hotspot")


def parameters(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


def test_all_lists_exactly_what_the_face_exports() -> None:
    exported = {
        name
        for name, value in vars(inventory_sdk).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert set(inventory_sdk.__all__) - {"__version__"} == exported
    assert len(inventory_sdk.__all__) == len(set(inventory_sdk.__all__))


def test_the_promised_names_and_every_error_are_there() -> None:
    assert set(inventory_sdk.__all__) >= NAMES | ERRORS


@pytest.mark.parametrize("name", sorted(NAMES | ERRORS))
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert (inspect.getdoc(getattr(inventory_sdk, name)) or "").strip()


def test_the_constructor_takes_what_the_guide_says() -> None:
    promised = {"queue", "database", "merchant", "namespace", "partitions", "durability", "metrics", "admission"}
    assert promised <= parameters(inventory_sdk.Inventory.__init__)


@pytest.mark.parametrize(
    "name", ["from_env", "start", "close", "__aenter__", "__aexit__", "create_schema", "settled", "worker", "replaced"]
)
def test_an_inventory_has_its_methods(name: str) -> None:
    assert callable(getattr(inventory_sdk.Inventory, name))


@pytest.mark.parametrize("name", [*DECORATORS, *HOOKS])
def test_an_inventory_has_its_decorators(name: str) -> None:
    function = getattr(inventory_sdk.Inventory, name)
    assert callable(function)
    assert (inspect.getdoc(function) or "").strip()


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_call_takes_what_the_guide_says(name: str) -> None:
    stock = inventory_sdk.Inventory("memory://").stock
    assert STOCK[name] <= parameters(getattr(stock, name))


def test_the_version_is_one_that_packaging_can_read() -> None:
    numbers = inventory_sdk.__version__.split(".")
    assert len(numbers) == 3
    assert all(number.isdigit() for number in numbers)


SNAPSHOT = Path(__file__).with_name("public_api.txt")


def signature(name: str, value: Any) -> str:
    if isinstance(value, property):
        return f"{name}: property"
    try:
        shown = ", ".join(str(each.replace(annotation=each.empty)) for each in inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return name
    return f"{name}({shown})"


def members(owner: Any) -> list[str]:
    found = {name for name in dir(owner) if not name.startswith("_")}
    return [signature(f"{owner.__name__}.{name}", getattr(owner, name)) for name in sorted(found)]


def public_api() -> str:
    """One line per name that users may write."""
    lines: list[str] = []
    for name in sorted(inventory_sdk.__all__):
        value = getattr(inventory_sdk, name)
        if name != "__version__":
            lines.append(name if isinstance(value, type) and issubclass(value, BaseException) else signature(name, value))
    made = inventory_sdk.Inventory("memory://", metrics=[])
    parts = sorted(f"Inventory.{name}: part" for name in vars(made) if not name.startswith("_"))
    for owner in (inventory_sdk.Inventory, type(made.stock)):
        lines += members(owner)
    lines += parts
    lines += [f"inventory_sdk.testing.{name}" for name in sorted(testing.__all__)]
    lines += [f"on({name!r})" for name in EVENTS]
    return "\n".join(lines) + "\n"


def test_a_change_of_the_public_api_is_seen() -> None:
    """If you meant it: ``INVENTORY_UPDATE_PUBLIC_API=1 pytest tests/unit/test_public_names.py``, and say so in the changelog."""
    if os.environ.get("INVENTORY_UPDATE_PUBLIC_API"):
        SNAPSHOT.write_text(public_api())
    assert public_api().splitlines() == SNAPSHOT.read_text().splitlines()
