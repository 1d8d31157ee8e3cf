"""What was traded under one layout of partitions, and the proof that all of it goes on under another."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from inventory_sdk import Line, Receipt, Reservation
from inventory_sdk.errors import InvalidOperation, OperationConflict, ReservationClosed, ReservationNotFound
from inventory_sdk.model import Layout
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.repartition import Repartition, engine_for
from tests.spanning_kit import HOME, Process, World

SKUS = ["a", "b", "c", "d", "e"]
SHOPS = [HOME, "s1", "s2"]
ORDERS = 2


@dataclass
class Trade:
    """What was done, with what was answered."""

    receipts: dict[str, tuple[str, dict[str, Any], Receipt]] = field(default_factory=dict)
    held: dict[str, Reservation] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)


def cart(*names: str, quantity: int = 1) -> list[Line]:
    """Lines such as "m1/a"."""
    return [Line(sku, quantity, shop) for shop, _, sku in (name.partition("/") for name in names)]


async def trade(process: Process) -> Trade:
    """Something of everything."""
    stock, done = process.stock, Trade()

    async def do(kind: str, name: str, **arguments: Any) -> None:
        if kind in ("confirm", "release"):
            given = {**arguments, "operation_id": name}
            reservation = given.pop("reservation")
            receipt = await getattr(stock, kind)(reservation, **given)
        else:
            receipt = await getattr(stock, kind)(operation_id=name, **arguments)
        done.receipts[name] = kind, arguments, receipt

    await do("restock", "po-1", lines=[Line(sku, 50, shop) for shop in SHOPS for sku in SKUS])
    for number in range(ORDERS):
        one, two, three = f"m1/{SKUS[number % 5]}", f"s1/{SKUS[(number + 1) % 5]}", f"m1/{SKUS[(number + 2) % 5]}"
        await do("deduct", f"sale-{number}", lines=cart(one))
        await do("deduct", f"cart-{number}", lines=cart(one, two, three, quantity=2))
        await do("reserve", f"held-{number}", lines=cart(one, three, quantity=3), ttl=None)
        await do("reserve", f"wide-{number}", lines=cart(one, two, "s2/e", quantity=4), ttl=900)
        await do("confirm", f"ship-{number}", reservation=f"wide-{number}", lines=cart(two))
        await do("release", f"back-{number}", reservation=f"wide-{number}", lines=cart(one, quantity=2))
        await do("reserve", f"shut-{number}", lines=cart(one, two))
        await do("confirm", f"paid-{number}", reservation=f"shut-{number}")
        await do("reserve", f"void-{number}", lines=cart(two, three))
        await do("release", f"left-{number}", reservation=f"void-{number}")
    await do("adjust", "count-1", lines=cart("m1/a", "s1/b", quantity=-1), reason="broken")
    await process.quiet()
    await process.world.apply()
    for number in range(ORDERS):
        await do("take_back", f"return-{number}", lines=cart(f"m1/{SKUS[number % 5]}"), of=f"cart-{number}")
        with pytest.raises(ReservationNotFound):
            await stock.release(f"late-{number}")
        done.gone.append(f"late-{number}")
    await process.quiet()
    await process.world.apply()
    for name in (f"{kind}-{number}" for kind in ("held", "wide") for number in range(ORDERS)):
        held = await stock.reservation(name)
        assert held is not None
        done.held[name] = held
    return done


def layout_of(world: World) -> Layout:
    return Layout(world.settings.partitions, world.settings.partition_by)


async def change(world: World, new: Layout, step: Any = None) -> Repartition:
    """The command, in a process of its own."""
    old = await world.ledger.layout()
    assert old is not None
    process = world.process()
    engine = engine_for(process.client, world.ledger, world.settings.namespace, old, new)
    await process.engine.close()
    process.engine = engine
    return Repartition(engine, world.ledger, MemoryQueue(), new, *([step] if step is not None else []))


async def stop(world: World) -> None:
    """Nobody sells any more."""
    for process in world.processes:
        await process.quiet()
        await process.stop()
        await process.engine.close()
        await process.client.aclose()
    world.processes.clear()


def again(world: World, new: Layout) -> None:
    """Whoever comes now has the new settings."""
    world.settings = replace(world.settings, partitions=new.partitions, partition_by=new.by)
    world.relaid = time.time_ns() // 1_000_000


async def proven(world: World, done: Trade) -> None:
    """All that was is still so, under every id, and goes on."""
    process = world.process()
    stock = process.stock
    before = await world.check()
    for name, held in done.held.items():
        now = await stock.reservation(name)
        assert now is not None
        assert replace(now, expires_at=None) == replace(held, expires_at=None)
    for name in done.receipts:
        with pytest.raises((OperationConflict, ReservationClosed)):  # before a repeat would make Redis remember it
            await stock.deduct([Line("a", 3)], operation_id=name)
    for name, (kind, arguments, first) in done.receipts.items():
        given = {key: value for key, value in arguments.items() if key != "reservation"}
        work = getattr(stock, kind)
        if name.startswith("void-"):
            with pytest.raises(ReservationClosed):
                await work(operation_id=name, **given)
            continue
        subject = [arguments["reservation"]] if "reservation" in arguments else []
        repeat = await work(*subject, operation_id=name, **given)
        assert repeat.replayed, name
        assert [(line.merchant, line.sku, line.quantity) for line in repeat.lines] == [
            (line.merchant, line.sku, line.quantity) for line in first.lines
        ]
        known = await stock.status(name)
        assert known is not None
        assert known.kind == kind
    for name in done.gone:
        with pytest.raises(ReservationClosed):
            await stock.reserve(cart("m1/a"), operation_id=name)
    assert await world.check() == before, "repeats have moved something"
    assert not [key for _, key in await world.open_parts() if "void" in key or "shut" in key]
    for number in range(ORDERS):
        one, two = f"m1/{SKUS[number % 5]}", f"s1/{SKUS[(number + 1) % 5]}"
        back = await stock.take_back(cart(one), of=f"cart-{number}", operation_id=f"second-{number}")
        assert not back.replayed
        with pytest.raises(InvalidOperation, match="can still come back"):
            await stock.take_back(cart(one), of=f"cart-{number}")
        await stock.take_back(cart(two), of=f"wide-{number}", operation_id=f"third-{number}")
        await stock.confirm(f"held-{number}")
        await stock.release(f"wide-{number}", lines=cart("s2/e"), operation_id=f"later-{number}")
        await stock.confirm(f"wide-{number}")
        await stock.deduct(cart(one, two, "s2/a"), operation_id=f"new-{number}")
    await process.quiet()
    await world.resolve()
    assert not await world.open_parts()
    await world.check()
    rows = {f"{row.merchant}/{row.sku}": row for row in await world.ledger.all_stock()}
    assert all(row.reserved == 0 for row in rows.values())
