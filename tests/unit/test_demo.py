"""The demo, embedded: the sale's books add up whatever the crowd does, and the proof is able to fail."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inventory_sdk import Inventory
from inventory_sdk.cli.app import app
from inventory_sdk.cli.demo import MERCHANT, SKUS, Behaviour, FlashSale, Tally, buyers, flash_sale
from inventory_sdk.cli.orders import plan, read_orders
from inventory_sdk.cli.recount import recount
from inventory_sdk.cli.replay import expected, missing_or_doubled, replay
from inventory_sdk.model import Line, key_of
from inventory_sdk.testing.proof import Expected, prove

ORDERS = """invoice,at,sku,quantity,unit_price,customer,country
1,2011-12-04 10:10:00,a,5,1.5,c1,United Kingdom
1,2011-12-04 10:10:00,a,2,1.5,c1,United Kingdom
1,2011-12-04 10:10:00,b,1,1.5,c1,United Kingdom
2,2011-12-04 10:11:00,a,3,1.5,c2,EIRE
C3,2011-12-04 10:12:00,a,-4,1.5,c1,United Kingdom
4,2011-12-04 10:13:00,b,-6,0.0,,United Kingdom
C5,2011-12-04 10:14:00,b,-2,1.5,c9,EIRE
"""


@pytest.fixture
async def inventory() -> AsyncIterator[Inventory]:
    async with Inventory("memory://", metrics=()) as started:
        yield started


@pytest.fixture
def orders(tmp_path: Path) -> Path:
    path = tmp_path / "orders.csv"
    path.write_text(ORDERS)
    return path


def ignore(_: object) -> None:
    """Nobody watches."""


def test_the_same_seed_brings_the_same_crowd_with_every_behaviour_in_it() -> None:
    crowd = list(buyers(FlashSale(buyers=500, seed=7)))
    assert crowd == list(buyers(FlashSale(buyers=500, seed=7)))
    assert crowd != list(buyers(FlashSale(buyers=500, seed=8)))
    assert {buyer.behaviour for buyer in crowd} == set(Behaviour)
    assert {buyer.sku for buyer in crowd} == set(SKUS)


async def test_a_flash_sale_sells_all_it_may_and_not_one_unit_more(inventory: Inventory) -> None:
    sale = FlashSale(buyers=400, units=10, hold=0.05)
    tally = await flash_sale(inventory, sale, ignore)
    assert tally.contradictions == []
    assert tally.done == sale.buyers
    assert 0 < tally.sold["console"] <= 10
    assert tally.refused > 0
    assert tally.duplicates > 0
    assert tally.cancelled > 0
    counted = {
        key_of(MERCHANT, sku): Expected(available=10 - tally.sold[sku], reserved=0, sold=tally.sold[sku], written_off=0) for sku in SKUS
    }
    proof = await prove(inventory, counted)
    assert proof.differences == ()
    assert proof.sold == tally.sold.total()


async def test_holds_that_nobody_paid_for_expire_and_are_told_so(inventory: Inventory) -> None:
    tally = await flash_sale(inventory, FlashSale(buyers=60, units=1000, hold=0.05), ignore)
    assert tally.contradictions == []
    assert tally.expired > 0


async def test_the_proof_names_the_sku_and_the_accounts_that_differ(inventory: Inventory) -> None:
    await inventory.stock.restock([Line("a", 5)], merchant="m1", operation_id="in-1")
    proof = await prove(inventory, {key_of("m1", "a"): Expected(available=4)})
    assert proof.differences == ("m1/a: available: Redis 5, ledger 5, counted 4",)


async def test_the_proof_names_a_sku_that_is_not_there(inventory: Inventory) -> None:
    proof = await prove(inventory, {key_of("m1", "ghost"): Expected()})
    assert proof.differences == ("m1/ghost: unknown to the ledger",)


async def test_a_replay_leaves_redis_ledger_and_recount_equal(inventory: Inventory, orders: Path) -> None:
    acts = plan(read_orders(orders))
    outcome = await replay(inventory, acts, ignore)
    counted = recount(orders)
    assert outcome.acts.total() == len(acts)
    assert outcome.known == 0
    assert (await prove(inventory, expected(counted))).differences == ()
    assert await missing_or_doubled(inventory, acts, counted) == []


async def test_a_replay_that_is_started_again_moves_nothing_twice(inventory: Inventory, orders: Path) -> None:
    acts = plan(read_orders(orders))
    await replay(inventory, acts[:4], ignore, at_once=1)
    outcome = await replay(inventory, acts, ignore)
    assert outcome.known == 4
    counted = recount(orders)
    assert (await prove(inventory, expected(counted))).differences == ()
    assert await missing_or_doubled(inventory, acts, counted) == []


async def test_a_unit_too_many_and_an_invoice_too_few_are_found(inventory: Inventory, orders: Path) -> None:
    acts = plan(read_orders(orders))
    await replay(inventory, [act for act in acts if act.order != "2"], ignore)
    await inventory.stock.restock([Line("a", 1)], merchant="United Kingdom", operation_id="by-hand")
    counted = recount(orders)
    differences = (await prove(inventory, expected(counted))).differences
    assert "United Kingdom/a: available: Redis 5, ledger 5, counted 4" in differences
    assert "EIRE/a: available: Redis 3, ledger 3, counted 0" in differences
    assert "EIRE: 2/0 is not in the ledger" in await missing_or_doubled(inventory, acts, counted)


@pytest.mark.parametrize("arguments", [["--buyers", "200", "--units", "5"], ["--orders", "ORDERS"]])
def test_the_command_ends_with_the_proof(arguments: list[str], orders: Path) -> None:
    told = CliRunner().invoke(app, ["demo", *(str(orders) if word == "ORDERS" else word for word in arguments)])
    assert told.exit_code == 0, told.output
    assert "What happened" in told.output
    assert "PROVEN" in told.output


def test_the_command_fails_where_the_accounts_differ(orders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def miscounted(path: Path) -> object:
        counted = recount(path)
        counted.units["EIRE", "a"].returned += 1
        return counted

    monkeypatch.setattr("inventory_sdk.cli.recount.recount", miscounted)
    told = CliRunner().invoke(app, ["demo", "--orders", str(orders)])
    assert told.exit_code == 1
    assert "NOT EQUAL" in told.output
    assert "EIRE/a" in told.output


def test_percentiles_of_a_sale() -> None:
    tally = dataclasses.replace(Tally(), latencies=[number / 1000 for number in range(100, 0, -1)], seconds=2.0)
    assert tally.rate == 50
    assert tally.percentile(0.5) == 0.051
    assert tally.percentile(0.99) == 0.1
    assert Tally().percentile(0.99) == 0.0
