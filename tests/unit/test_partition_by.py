"""``partition_by="sku"``: stock stands where its SKU says, what an id means is decided where the id says, whatever its lines are."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from inventory_sdk import Inventory, Line
from inventory_sdk.errors import (
    InsufficientStock,
    InvalidOperation,
    InventoryError,
    OperationConflict,
    ReservationClosed,
    ReservationNotFound,
)
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.model import Layout, OpeningBalance, key_of
from inventory_sdk.stock.journal import decode
from inventory_sdk.stock.parts import part_key
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.recovery import rebuild
from tests.spanning_kit import HOME, Death, World, world_of

PARTITIONS = 4
LAYOUT = Layout(PARTITIONS, "sku")
SKUS = [next(f"sku-{n}" for n in range(99) if LAYOUT.of(key_of(HOME, f"sku-{n}")) == place) for place in range(PARTITIONS)]
"""One SKU per partition."""


def name_at(partition: int, start: str) -> str:
    """An operation id that is decided in this partition."""
    return next(f"{start}{n}" for n in range(99) if LAYOUT.home(key_of(HOME, f"{start}{n}")) == partition)


def lines(*partitions: int, quantity: int = 1) -> list[Line]:
    return [Line(SKUS[each], quantity) for each in partitions]


@pytest.fixture
async def world(tmp_path: Path, namespace: str) -> AsyncIterator[World]:
    async with world_of(tmp_path, namespace, partitions=PARTITIONS, partition_by="sku") as made:
        await made.process().stock.restock([Line(sku, 10) for sku in SKUS], operation_id="opening")
        await made.apply()
        yield made


async def left(world: World) -> list[int]:
    for process in world.processes:
        await process.quiet()
    found = await world.check()
    return [found[f"{HOME}/{sku}"] for sku in SKUS]


# The rule -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "crc"),
    [("m1\x1fsku-7", 0x4AA0CBED), ("acme\x1fred/42", 0x872CF465), ("händler\x1fгрн-1", 0xAA5F9636), ("m1\x1forder-42", 0x365AD7C2)],
)
def test_a_partition_is_the_crc32_of_merchant_separator_and_name(field: str, crc: int) -> None:
    assert zlib.crc32(field.encode()) == crc
    for partitions in (1, 4, 7, 64):
        assert Layout(partitions, "sku").of(field) == crc % partitions
        assert Layout(partitions, "sku").home(field) == crc % partitions


def test_what_is_derived_from_an_id_is_at_home_with_it() -> None:
    home = LAYOUT.home("m1\x1forder-42")
    for derived in ("\x1fconfirm", "\x1fpart\x1f3", "\x1fclaim", "\x1f0\x1fpart\x1f1", "\x1fabort\x1f2\x1f1-9"):
        assert LAYOUT.home(f"m1\x1forder-42{derived}") == home
    assert LAYOUT.hold("m1\x1forder-42") == home
    assert LAYOUT.hold("m1\x1forder-42\x1fpart\x1f3") == 3
    assert Layout(4).hold("m1\x1forder-42\x1fpart\x1f3") == 3


def test_by_merchant_nothing_but_the_merchant_counts() -> None:
    layout = Layout(16)
    wanted = zlib.crc32(b"m1") % 16
    assert {layout.of("m1\x1fa"), layout.of("m1\x1fb"), layout.home("m1\x1fo1"), layout.home("m1\x1fo2\x1fundo")} == {wanted}
    assert layout.id_at("m1", "start", 3) == "start"


@pytest.mark.parametrize("partitions", [2, 3, 4, 64, 1000, 4096])
def test_an_id_is_found_for_any_partition(partitions: int) -> None:
    layout = Layout(partitions, "sku")
    for partition in {0, 1, partitions // 2, partitions - 1}:
        found = layout.id_at("m1", "c0ffee", partition)
        assert layout.home(f"m1\x1f{found}") == partition
        assert found.startswith("c0ffee-")
        assert len(found) < 40


@pytest.mark.parametrize("value", ["SKU", "order", "", None, 1])
def test_another_way_to_tell_partitions_apart_is_refused(value: Any) -> None:
    with pytest.raises(InvalidOperation, match="partition_by"):
        Layout(4, value)
    with pytest.raises(InvalidOperation, match="partition_by"):
        Inventory("memory://", partition_by=value)


# Takes --------------------------------------------------------------------------------------------------------------------------


async def test_stock_stands_in_its_own_partition_and_an_id_is_decided_in_its(world: World) -> None:
    process = world.process()
    for place, sku in enumerate(SKUS):
        there = await process.client.hkeys(process.engine.partitions[place].key("available"))
        assert there == [key_of(HOME, sku).encode()]
    sale = await process.stock.deduct(lines(2), operation_id=name_at(1, "o"))
    assert [position.partition for position in sale.positions] == [1, 2]
    near = await process.stock.deduct(lines(2), operation_id=name_at(2, "o"))
    assert [position.partition for position in near.positions] == [2]
    cart = await process.stock.reserve(lines(0, 1, 3), operation_id=name_at(1, "r"))
    assert [position.partition for position in cart.positions] == [1, 0, 3]
    assert await left(world) == [9, 9, 8, 9]
    assert [(await world.row(HOME, sku)).sold for sku in SKUS] == [0, 0, 2, 0]


@pytest.mark.parametrize("place", range(PARTITIONS))
async def test_a_made_up_id_is_at_home_where_the_stock_is(world: World, place: int) -> None:
    stock = world.process().stock
    held = await stock.reserve(lines(place))
    sold = await stock.deduct(lines(place))
    restocked = await stock.restock(lines(place))
    closed = await stock.confirm(held.operation_id, lines=lines(place))
    for receipt in (held, sold, closed):
        assert [position.partition for position in receipt.positions] == [place]
    assert [position.partition for position in restocked.positions] == [place]
    assert len((await stock.deduct(lines(*range(PARTITIONS)))).positions) == PARTITIONS, "home is one of its own"


async def test_levels_are_read_where_each_sku_is(world: World) -> None:
    stock = world.process().stock
    await stock.deduct(lines(3, quantity=4))
    found = await stock.levels([SKUS[3], SKUS[0], SKUS[2]], merchant=HOME)
    assert list(found) == [SKUS[3], SKUS[0], SKUS[2]]
    assert [level.available for level in found.values()] == [6, 10, 10]
    assert await stock.levels([], merchant=HOME) == {}


@pytest.mark.parametrize("first", [(1,), (2,), (1, 2), (0, 3)])
@pytest.mark.parametrize("how", ["reserve", "deduct"])
async def test_a_repeat_meets_its_first_wherever_its_lines_are_and_other_lines_are_a_conflict(
    world: World, how: str, first: tuple[int, ...]
) -> None:
    name = name_at(1, "o")
    receipt = await getattr(world.process().stock, how)(lines(*first), operation_id=name)
    stock = world.process().stock
    for other in (lines(0), lines(1), lines(2), lines(1, 3), lines(*first, quantity=2), lines(0, quantity=99), [Line("unknown", 1)]):
        if {line.sku: line.quantity for line in other} != {line.sku: line.quantity for line in lines(*first)}:
            with pytest.raises(OperationConflict):
                await getattr(stock, how)(other, operation_id=name)
    again = await getattr(stock, how)(lines(*first), operation_id=name)
    assert again.replayed
    assert (again.lines, again.positions) == (receipt.lines, receipt.positions)
    assert await left(world) == [9 if place in first else 10 for place in range(PARTITIONS)]


@pytest.mark.parametrize("place", range(PARTITIONS))
async def test_the_release_of_an_unknown_reservation_keeps_a_late_reserve_of_any_sku_away(world: World, place: int) -> None:
    name = name_at(3, "late")
    with pytest.raises(ReservationNotFound):
        await world.process().stock.release(name)
    with pytest.raises(ReservationClosed):
        await world.process().stock.reserve(lines(place), operation_id=name)
    assert await left(world) == [10] * PARTITIONS
    assert not await world.open_parts()


# Ids of what closes -----------------------------------------------------------------------------------------------------------------


async def test_an_id_that_closed_one_reservation_closes_no_other_and_is_not_sold_under(world: World) -> None:
    stock = world.process().stock
    one, two = name_at(0, "r"), name_at(3, "r")
    await stock.reserve(lines(0, 1, quantity=3), operation_id=one)
    await stock.reserve(lines(2, quantity=3), operation_id=two)
    ship = name_at(2, "ship")
    done = await stock.confirm(one, lines=lines(1), operation_id=ship)
    other = world.process().stock
    wrongs: list[Callable[[], Any]] = [
        lambda: other.confirm(two, lines=lines(2), operation_id=ship),
        lambda: other.release(one, lines=lines(1), operation_id=ship),
        lambda: other.confirm(one, lines=lines(1, quantity=2), operation_id=ship),
        lambda: other.deduct(lines(2), operation_id=ship),
        lambda: other.reserve(lines(0), operation_id=ship),
    ]
    for wrong in wrongs:
        with pytest.raises(OperationConflict):
            await wrong()
    again = await other.confirm(one, lines=lines(1), operation_id=ship)
    assert again.replayed
    assert (again.kind, again.lines) == (done.kind, done.lines)
    known = await other.status(ship)
    assert known is not None
    assert (known.kind, [line.sku for line in known.lines]) == ("confirm", [SKUS[1]])
    await world.apply()
    assert (await other.status(ship)) is not None
    assert await left(world) == [7, 7, 7, 10]
    assert [(await world.row(HOME, sku)).sold for sku in SKUS] == [0, 1, 0, 0]


async def test_an_id_under_which_something_was_sold_closes_nothing(world: World) -> None:
    stock = world.process().stock
    held, used = name_at(0, "r"), name_at(1, "o")
    await stock.reserve(lines(0, quantity=2), operation_id=held)
    await stock.deduct(lines(2), operation_id=used)
    for whole in (None, lines(0)):
        with pytest.raises(OperationConflict):
            await stock.confirm(held, lines=whole, operation_id=used)
    assert (await stock.reservation(held)).held == (Line(SKUS[0], 2, HOME),)  # type: ignore[union-attr]
    assert await left(world) == [8, 10, 9, 10]


async def test_a_refused_act_gives_its_id_back(world: World) -> None:
    stock = world.process().stock
    held, name = name_at(0, "r"), name_at(1, "c")
    await stock.reserve(lines(0), operation_id=held)
    with pytest.raises(InvalidOperation):
        await stock.confirm(held, lines=lines(0, quantity=5), operation_id=name)
    with pytest.raises(ReservationNotFound):
        await stock.confirm(name_at(0, "nobody"), lines=lines(0), operation_id=name)
    with pytest.raises(ReservationNotFound):
        await stock.release(name_at(0, "none"), operation_id=name)
    assert not (await stock.confirm(held, lines=lines(0), operation_id=name)).replayed
    with pytest.raises(ReservationClosed):
        await stock.release(held, operation_id=name_at(2, "c"))
    assert not (await stock.deduct(lines(3), operation_id=name_at(2, "c"))).replayed
    assert await left(world) == [9, 10, 10, 9]


async def test_an_id_stays_taken_where_somebody_has_joined_in(world: World) -> None:
    """The first of two is refused and gives the id back, when the second has done under it what the first could not."""
    slow, quick = world.process(), world.process()
    held, name = name_at(0, "r"), name_at(1, "c")
    refused, go = asyncio.Event(), asyncio.Event()

    def gate(script: str, arguments: Sequence[Any]) -> Any:
        if script == "batch" and b'"undo"' in arguments[6]:
            refused.set()
            return go.wait()
        return None

    slow.on_call = gate
    task = asyncio.create_task(slow.stock.confirm(held, lines=lines(0), operation_id=name))
    async with asyncio.timeout(20):
        await refused.wait()
    await quick.stock.reserve(lines(0), operation_id=held)
    assert not (await quick.stock.confirm(held, lines=lines(0), operation_id=name)).replayed
    go.set()
    with pytest.raises(ReservationNotFound):
        await task
    with pytest.raises(OperationConflict):
        await quick.stock.deduct(lines(3), operation_id=name)
    assert await left(world) == [9, 10, 10, 10]


async def test_a_process_that_dies_between_claim_and_act_leaves_the_id_to_that_act(world: World) -> None:
    held, name = name_at(0, "r"), name_at(1, "c")
    await world.process().stock.reserve(lines(0), operation_id=held)
    dying = world.process()
    for partition in dying.engine.partitions:
        await partition.known()
    dying.death = Death(1, "after")
    assert await dying.killed_in(dying.stock.confirm(held, lines=lines(0), operation_id=name))
    stock = world.process().stock
    assert await stock.status(name) is None
    with pytest.raises(OperationConflict):
        await stock.deduct(lines(3), operation_id=name)
    assert not (await stock.confirm(held, lines=lines(0), operation_id=name)).replayed
    assert await left(world) == [9, 10, 10, 10]


@pytest.mark.parametrize("freed", [False, True])
async def test_a_rebuilt_home_remembers_which_ids_were_taken_and_which_were_given_back(world: World, freed: bool) -> None:
    process = world.process()
    held, name = name_at(0, "r"), name_at(1, "c")
    await process.stock.reserve(lines(0, quantity=2), operation_id=held)
    if freed:
        with pytest.raises(InvalidOperation):
            await process.stock.confirm(held, lines=lines(0, quantity=5), operation_id=name)
    else:
        await process.stock.confirm(held, lines=lines(0), operation_id=name)
    await process.quiet()
    await world.apply()
    raised = await world.ledger.raise_epoch(1, 1)
    assert raised is not None
    await rebuild(process.engine.upkeep, world.ledger, MemoryQueue(), raised)
    stock = world.process().stock
    if freed:
        assert not (await stock.deduct(lines(3), operation_id=name)).replayed
    else:
        with pytest.raises(OperationConflict):
            await stock.deduct(lines(3), operation_id=name)
        assert (await stock.confirm(held, lines=lines(0), operation_id=name)).replayed
        assert (await stock.status(name)) is not None
    await left(world)


async def test_a_claim_that_came_late_is_made_again_unless_the_id_was_used_meanwhile(world: World) -> None:
    process = world.process()
    held, name = name_at(0, "r"), name_at(1, "c")
    await process.stock.reserve(lines(0, quantity=2), operation_id=held)
    await process.stock.confirm(held, lines=lines(0), operation_id=name)
    rows = await process.engine.upkeep.read_journal(1, 1, 0, None, 100)
    (claim,) = [each for sequence, body in rows for each in decode(1, 1, sequence, body).operations if each.kind == "claim"]
    upkeep, client = process.engine.upkeep, process.client
    assert await upkeep.resubmit(1, 1, claim, 0) == ""
    for window in ("results:0", "results:1"):
        await client.delete(process.engine.partitions[1].key(window))
    await process.stock.deduct(lines(1), operation_id=name)
    assert await upkeep.resubmit(1, 1, claim, 0) == "conflict"


# What enters -----------------------------------------------------------------------------------------------------------------------


async def test_an_id_that_stock_came_in_under_sells_nothing_also_where_home_got_none(world: World) -> None:
    stock = world.process().stock
    name = name_at(1, "po")
    first = await stock.restock(lines(0, 2), operation_id=name)
    assert [position.partition for position in first.positions] == [1, 0, 2]
    for taking in (lines(0), lines(1), lines(3)):
        with pytest.raises(OperationConflict):
            await world.process().stock.deduct(taking, operation_id=name)
    again = await world.process().stock.restock(lines(0, 2), operation_id=name)
    assert again.replayed
    with pytest.raises(OperationConflict):
        await stock.restock(lines(0, 3), operation_id=name)
    sold = name_at(2, "o")
    await stock.deduct(lines(3), operation_id=sold)
    with pytest.raises(OperationConflict):
        await stock.restock(lines(0), operation_id=sold)
    assert await left(world) == [11, 10, 11, 9]
    known = await stock.status(name)
    assert known is not None
    assert (known.kind, len(known.lines)) == ("restock", 2)


@pytest.mark.parametrize("sold_in", [(2,), (1,), (0, 1, 2)])
async def test_what_was_sold_comes_back_from_where_it_stands(world: World, sold_in: tuple[int, ...]) -> None:
    stock = world.process().stock
    sale = name_at(1, "o")
    await stock.deduct(lines(*sold_in, quantity=2), operation_id=sale)
    for place in sold_in:
        back = await stock.take_back(lines(place), of=sale, operation_id=name_at(3, f"b{place}-"))
        assert [(line.sku, line.remaining) for line in back.lines] == [(SKUS[place], 9)]
        with pytest.raises(InvalidOperation, match="can still come back"):
            await stock.take_back(lines(place, quantity=2), of=sale)
    with pytest.raises(InvalidOperation, match=r"not a sale|can still come back"):
        await stock.take_back(lines(3), of=sale)
    assert await left(world) == [9 if place in sold_in else 10 for place in range(PARTITIONS)]


# What it does not do -------------------------------------------------------------------------------------------------------------------


async def test_a_handover_to_the_database_is_refused_with_its_reason(world: World) -> None:
    stock = world.process().stock
    for handover in (stock.adopt, stock.withdraw):
        with pytest.raises(InvalidOperation, match="partition_by='sku'"):
            await handover(HOME)
    for admission in ("database", "auto"):
        with pytest.raises(InvalidOperation, match="admission"):
            Inventory("memory://", partition_by="sku", admission=admission)


async def test_live_reservations_of_the_service_are_not_taken_over() -> None:
    inventory = Inventory("memory://", merchant=HOME, partitions=PARTITIONS, partition_by="sku", metrics=[NoMetrics()])

    @inventory.reads_stock
    async def read(merchant: str, skus: Sequence[str], session: Any) -> list[OpeningBalance]:
        return [OpeningBalance(sku, 5, [("cart-1", 2)] if sku == "held" else []) for sku in skus]

    async with inventory:
        assert (await inventory.stock.deduct([Line("free", 1)], operation_id="o1")).lines[0].remaining == 4
        with pytest.raises(InvalidOperation, match="reservations"):
            await inventory.stock.deduct([Line("held", 1)], operation_id="o2")


@pytest.mark.parametrize(
    ("mine", "name", "stored", "given"),
    [
        ({"partitions": 4}, "partition_by", "sku", "merchant"),
        ({"partitions": 2, "partition_by": "sku"}, "partitions", "4", "2"),
    ],
)
async def test_a_process_with_another_layout_refuses_to_start_and_says_what_to_do(
    tmp_path: Path, mine: dict[str, Any], name: str, stored: str, given: str
) -> None:
    database = f"sqlite+aiosqlite:///{tmp_path / 'ledger.db'}"
    async with Inventory("memory://", database=database, partitions=4, partition_by="sku", metrics=[NoMetrics()]) as first:
        await first.stock.restock([Line("a", 1)], operation_id="po")
    other = Inventory("memory://", database=database, metrics=[NoMetrics()], **mine)
    with pytest.raises(InventoryError) as refusal:
        await other.start()
    for word in (f"{name}={given!r}", repr(stored), f"set {name}={stored!r}", "inventory-sdk repartition"):
        assert word in str(refusal.value)


def test_the_environment_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVENTORY_REDIS_URL", "memory://")
    monkeypatch.setenv("INVENTORY_PARTITIONS", "4")
    monkeypatch.setenv("INVENTORY_PARTITION_BY", "sku")
    assert Inventory.from_env()._settings.partition_by == "sku"


async def test_a_shortage_elsewhere_is_named_and_nothing_stays_behind(world: World) -> None:
    stock = world.process().stock
    name = name_at(1, "o")
    with pytest.raises(InsufficientStock) as refusal:
        await stock.deduct(lines(0, 1, 2, quantity=11), operation_id=name)
    assert {(each.sku, each.available) for each in refusal.value.shortages} == {(SKUS[each], 10) for each in (0, 1, 2)}
    assert not await world.open_parts()
    assert part_key(key_of(HOME, name), 0) not in {key for _, key in await world.open_parts()}
    assert await left(world) == [10] * PARTITIONS
