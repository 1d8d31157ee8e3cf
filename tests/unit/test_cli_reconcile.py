"""The command reconcile: what it says, what it does, and how it ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeServer
from typer.testing import CliRunner

from inventory_sdk import Inventory, Line
from inventory_sdk.cli.app import app
from inventory_sdk.model import key_of
from inventory_sdk.reconcile.model import Reconcile

runner = CliRunner()
TARGET = "a_shop_to_compare:inventory"


def ran(*arguments: str, code: int = 0) -> str:
    done = runner.invoke(app, ["reconcile", TARGET, *arguments], env={"COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == code, done.output
    return done.output


class Place:
    """A module with an Inventory on a fakeredis and a SQLite that outlive each command."""

    def __init__(self, folder: Path) -> None:
        self.server = FakeServer()
        self.inventory = Inventory(
            FakeAsyncRedis(server=self.server),
            database=f"sqlite+aiosqlite:///{folder}/stock.db",
            metrics=[],
            reconcile=Reconcile(every=None, whole_every=None, confirm_above=5),
        )

    def does(self, *by_hand: tuple[str, int]) -> None:
        """Stock it, once, and change Redis by hand."""

        async def work() -> None:
            async with self.inventory:
                await self.inventory.create_schema()
                async with self.inventory.worker() as worker:
                    await worker.ready()
                    await self.inventory.stock.restock([Line("a", 10), Line("<b>", 10)], operation_id="po")
                    await self.inventory.settled()
                running = self.inventory._running()
                client: Any = running.client
                for sku, units in by_hand:
                    await client.hincrby(running.engine.partitions[0].key("available"), key_of("default", sku), units)

        asyncio.run(work())

    def applies(self) -> None:
        """A worker passes by, as one that runs all the time would."""

        async def work() -> None:
            async with self.inventory, self.inventory.worker() as worker:
                await worker.ready()
                await self.inventory.settled()

        asyncio.run(work())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path)
    module = type(sys)("a_shop_to_compare")
    module.inventory = made.inventory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_shop_to_compare", module)
    return made


def test_two_sides_that_agree_are_equal_and_exit_code_0(place: Place) -> None:
    place.does()
    told = ran()
    assert "compared 2 SKUs in Redis" in told
    assert "comparing: 2/2" in told
    assert "EQUAL" in told
    assert "NOT EQUAL" not in told


def test_a_drift_is_listed_shown_corrected_and_undone(place: Place) -> None:
    place.does(("a", 3), ("<b>", -1))
    told = ran(code=1)
    assert 'manual_redis: stock merchant "default", sku "a", +3 available, +0 reserved' in told
    assert 'sku "<b>", -1 available' in told
    assert "NOT EQUAL  2 discrepancies" in told
    numbers = {line.split('sku "')[1].split('"')[0]: line.split()[0] for line in told.splitlines() if 'sku "' in line}
    shown = ran("--correct", numbers["a"])
    assert "WOULD   journal a correct of 'a' in Redis: -3 available" in shown
    assert "nothing was done" in shown
    assert "is corrected" in ran("--correct", numbers["a"], "--reason", "counted")
    place.applies()
    told = ran(code=1)
    assert 'sku "<b>"' in told
    assert 'sku "a"' not in told
    assert "EQUAL" in ran("--sku", "a")
    assert "is undone" in ran("--undo", numbers["a"], "--reason", "wrong")
    place.applies()
    assert 'sku "a", +3' in ran("--merchant", "default", code=1)


def test_a_large_correction_asks_for_more_than_a_reason(place: Place) -> None:
    place.does(("a", 6))
    number = next(line.split()[0] for line in ran(code=1).splitlines() if 'sku "a"' in line)
    assert "--confirm 6 is needed" in ran("--correct", number)
    assert "confirm them by their number" in ran("--correct", number, "--reason", "counted", code=1)
    place.does(("a", 5))
    assert "moves 11 units by now" in ran("--correct", number, "--reason", "counted", "--confirm", "6", code=1)
    assert "is corrected" in ran("--correct", number, "--reason", "counted", "--confirm", "11", "--who", "kim")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--correct", "1", "--undo", "2"), "exclude"),
        (("--undo", "1"), "--reason"),
        (("--reason", "because"), "--correct or --undo"),
        (("--correct", "1", "--sku", "a"), "leave the scope out"),
        (("--correct", "99"), "is not the number of any discrepancy"),
        (("--correct", "99", "--reason", "x"), "is not the number of any discrepancy"),
        (("--undo", "99", "--reason", "x"), "is not the number of any discrepancy"),
        (("--touched", "--sku", "a"), "scope of its own"),
    ],
)
def test_what_can_not_be_done_is_said_and_exit_code_1(place: Place, arguments: tuple[str, ...], named: str) -> None:
    place.does()
    assert named in ran(*arguments, code=1)
