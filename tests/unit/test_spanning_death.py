"""The process of a call over several partitions dies at each of its script calls; afterwards all of it happened, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest

from inventory_sdk import Line, Receipt
from inventory_sdk.stock.stock import Stock
from tests.conftest import sample
from tests.spanning_kit import Death, World, cart, shops, world_of

PARTITIONS = 4
FIRST, SECOND, THIRD = shops(PARTITIONS)
CARTS = {"home and another": [FIRST, SECOND], "others only": [SECOND, THIRD]}


async def act(stock: Stock, how: str, lines: list[Line], name: str) -> Receipt:
    if how == "adjust":
        return await stock.adjust([Line(line.sku, -line.quantity, line.merchant) for line in lines], operation_id=name, reason="broken")
    kinds: dict[str, Any] = {"reserve": stock.reserve, "deduct": stock.deduct}
    receipt: Receipt = await kinds[how](lines, operation_id=name)
    return receipt


def outcome(before: dict[str, int], after: dict[str, int], merchants: list[str]) -> int:
    """1: every line was taken once; 0: none was; anything else is a failure."""
    moved = {name.partition("/")[0]: units - after[name] for name, units in before.items()}
    taken = {moved[merchant] for merchant in merchants}
    assert len(taken) == 1, f"half a call: {moved}"
    assert all(not units for merchant, units in moved.items() if merchant not in merchants)
    return taken.pop()


async def every_death(world: World, how: str, merchants: list[str], when: Literal["before", "after"], prepare: Any = None) -> set[int]:
    """Die at the first script call, at the second, …, until the call survives; the outcomes that were seen."""
    seen: set[int] = set()
    for at in sample(range(1, 60)):
        name = f"o{at}"
        if prepare is not None:
            await prepare(name)
        before = await world.check()
        dying = world.process()
        for partition in dying.engine.partitions:
            await partition.known()
        dying.death = Death(at, when)
        call = act(dying.stock, how, cart(*merchants), name) if prepare is None else close(dying.stock, how, name)
        died = await dying.killed_in(call)
        await world.resolve()
        after = await world.check()
        pinned = await world.open_parts()
        if prepare is None:
            done = outcome(before, after, merchants)
            seen.add(done)
            fresh = world.process()
            known = await fresh.stock.status(name)
            assert (known is not None) == bool(done)
            if how != "reserve":
                assert not pinned, "pinned for ever"
            # The id is as good as new, or has its first effect: one effect in any case.
            again = await act(fresh.stock, how, cart(*merchants), name)
            assert again.replayed == bool(done)
            assert [(line.merchant, line.quantity) for line in again.lines] == [
                (merchant, -1 if how == "adjust" else 1) for merchant in sorted(merchants)
            ]
            await fresh.quiet()
            await world.resolve()
            assert outcome(before, await world.check(), merchants) == 1
            if how == "reserve":
                await fresh.stock.release(name)
                await fresh.quiet()
        else:
            seen.add(await closed(world, how, name, merchants))
        if not died:
            return seen
    raise AssertionError("the call never ended")


async def close(stock: Stock, how: str, name: str) -> Receipt:
    receipt: Receipt = await getattr(stock, how)(name)
    return receipt


async def closed(world: World, how: str, name: str, merchants: list[str]) -> int:
    """1: all of it was closed, 0: nothing; then it is closed by a repeat."""
    fresh = world.process()
    for _ in range(2):
        held = await fresh.stock.reservation(name)
        assert held is not None
        open_there = {line.merchant for line in held.held}
        parts = [key for _, key in await world.open_parts() if f"\x1f{name}\x1f" in key]
        if held.state == "held":
            assert open_there == set(merchants)
            assert len(parts) == len(world.positions(name, *merchants)) - 1
            await close(fresh.stock, how, name)
            await fresh.quiet()
            continue
        assert held.state == {"confirm": "confirmed", "release": "released"}[how]
        assert not held.held
        assert not parts, "home has closed it, its parts have not followed"
        await close(fresh.stock, how, name)
        return 1
    raise AssertionError("it can't be closed")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("merchants", CARTS.values(), ids=list(CARTS))
@pytest.mark.parametrize("how", ["deduct", "reserve", "adjust"])
async def test_a_coordinator_that_dies_at_any_step_leaves_all_or_nothing(
    tmp_path: Path, namespace: str, how: str, merchants: list[str], when: Literal["before", "after"]
) -> None:
    async with world_of(tmp_path, namespace, partitions=PARTITIONS, stocked=dict.fromkeys([FIRST, SECOND, THIRD], 100)) as world:
        assert await every_death(world, how, merchants, when) == {0, 1}


@pytest.mark.parametrize(("how", "when"), [("deduct", "after"), ("reserve", "before")])
async def test_a_coordinator_of_one_sku_that_dies_at_any_step_leaves_it_or_takes_it(
    tmp_path: Path, namespace: str, how: str, when: Literal["before", "after"]
) -> None:
    async with world_of(tmp_path, namespace, partitions=PARTITIONS, partition_by="sku", stocked={SECOND: 100, THIRD: 100}) as world:
        assert 1 in await every_death(world, how, [SECOND], when)  # an id may be at home where its SKU is: then there is no half-way


@pytest.mark.parametrize(
    ("how", "when", "partition_by"),
    [
        ("confirm", "before", "merchant"),
        ("confirm", "after", "merchant"),
        ("release", "before", "merchant"),
        ("release", "after", "merchant"),
        ("confirm", "after", "sku"),
        ("release", "before", "sku"),
    ],
)
async def test_whoever_dies_closing_leaves_it_closed_everywhere_or_nowhere(
    tmp_path: Path, namespace: str, how: str, when: Literal["before", "after"], partition_by: str
) -> None:
    merchants = [FIRST, SECOND, THIRD]
    async with world_of(
        tmp_path, namespace, partitions=PARTITIONS, partition_by=partition_by, stocked=dict.fromkeys(merchants, 100)
    ) as world:
        maker = world.process()

        async def hold(name: str) -> None:
            await maker.stock.reserve(cart(*merchants), operation_id=name)
            await maker.quiet()

        await every_death(world, how, merchants, when, hold)
        rows = [await world.row(merchant) for merchant in merchants]
        assert len({(row.available, row.reserved, row.sold) for row in rows}) == 1
        assert rows[0].reserved == 0
