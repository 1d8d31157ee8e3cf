"""``inventory-sdk repartition``: what was held, sold and returned under one layout goes on under the other, also when it was killed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from typer.testing import CliRunner

from inventory_sdk import Inventory, Line, Receipt, Reservation
from inventory_sdk.cli.app import app
from inventory_sdk.errors import InvalidOperation, InventoryError, OperationConflict, ReservationClosed, ReservationNotFound, StockFrozen
from inventory_sdk.ledger.repartition import NotReady
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.model import Layout, key_of
from inventory_sdk.servers import Servers
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.recovery import rebuild
from inventory_sdk.sync.repartition import Plan, Repartition, engine_for
from tests.spanning_kit import HOME, Process, World, world_of

SKUS = ["a", "b", "c", "d", "e"]
SHOPS = [HOME, "s1", "s2"]
ORDERS = 3
LAYOUTS = [Layout(4), Layout(4, "sku"), Layout(3, "sku"), Layout(1), Layout(7)]


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


class Killed(Exception):
    """The process that repartitions."""


def killer(step: str) -> Any:
    async def at(reached: str) -> None:
        if reached == step:
            raise Killed

    return at


def layout_of(world: World) -> Layout:
    return Layout(world.settings.partitions, world.settings.partition_by)


async def change(world: World, new: Layout, step: Any = None) -> Repartition:
    """The command, in a process of its own."""
    from inventory_sdk.sync.repartition import _silent

    old = await world.ledger.layout()
    assert old is not None
    process = world.process()
    engine = engine_for(process.client, world.ledger, world.settings.namespace, old, new)
    await process.engine.close()
    process.engine = engine
    return Repartition(engine, world.ledger, MemoryQueue(), new, step or _silent)


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
        if kind != "restock" and kind != "take_back":
            with pytest.raises((OperationConflict, ReservationClosed)):
                await stock.deduct([Line("a", 41)], operation_id=name)
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


@pytest.fixture
async def world(tmp_path: Path, namespace: str, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    layout: Layout = getattr(request, "param", LAYOUTS[0])
    async with world_of(tmp_path, namespace, partitions=layout.partitions, partition_by=layout.by) as made:
        await made.ledger.settle({"partitions": str(layout.partitions), "partition_by": layout.by})
        yield made


@pytest.mark.parametrize(
    ("world", "new"),
    [(LAYOUTS[0], LAYOUTS[1]), (LAYOUTS[1], LAYOUTS[0]), (LAYOUTS[1], LAYOUTS[2]), (LAYOUTS[3], LAYOUTS[1]), (LAYOUTS[1], LAYOUTS[3]),
     (LAYOUTS[0], LAYOUTS[4])],
    indirect=["world"], ids=str,
)  # fmt: skip
async def test_everything_goes_on_under_the_new_layout(world: World, new: Layout) -> None:
    done = await trade(world.process())
    old = layout_of(world)
    await stop(world)
    counts = await (await change(world, new)).run()
    assert counts is not None
    assert counts.reservations == len(done.held)
    await stop(world)
    again(world, new)
    client: Any = world.process().client
    left = {key.decode().partition("}")[0].rpartition(":")[2] for key in await client.keys("{*")}
    assert left == {str(number) for number in range(new.partitions)}, (old, new)
    await proven(world, done)


async def test_it_can_be_changed_again_and_back_and_what_was_rebuilt_remembers(world: World) -> None:
    done = await trade(world.process())
    for new in (LAYOUTS[1], LAYOUTS[2], LAYOUTS[0]):
        await stop(world)
        assert await (await change(world, new)).run() is not None
        assert await (await change(world, new)).run() is None, "nothing is left to do"
        await stop(world)
        again(world, new)
    process = world.process()
    for number in range(LAYOUTS[0].partitions):
        row = await world.ledger.partition(number)
        assert row is not None
        raised = await world.ledger.raise_epoch(number, row.epoch)
        assert raised is not None
        await rebuild(process.engine.upkeep, world.ledger, MemoryQueue(), raised)
    await stop(world)
    await proven(world, done)


STEPS = ["begin", *[f"freeze {number}" for number in range(4)], "turn", "rebuild", "remove", "end"]


@pytest.mark.parametrize("step", STEPS)
async def test_killed_at_any_step_it_is_run_again(world: World, step: str) -> None:
    new = LAYOUTS[2]
    done = await trade(world.process())
    await stop(world)
    with pytest.raises(Killed):
        await (await change(world, new, killer(step))).run()
    await stop(world)
    if step != "begin":
        found = await world.ledger.layout()
        assert found is not None
        assert (found.begun, bool(found.before)) == ((True, False) if step.startswith(("freeze", "turn")) else (False, True))
    await (await change(world, new)).run()
    await stop(world)
    again(world, new)
    await proven(world, done)


async def test_killed_in_the_middle_of_a_rebuild_or_before_it_was_opened_it_is_run_again(world: World) -> None:
    new = LAYOUTS[1]
    done = await trade(world.process())
    await stop(world)
    for chunk in ("reservations", "open"):
        command = await change(world, new)
        run, met = command._engine.wire.run, asyncio.Event()

        async def wire(name: str, keys: Any, arguments: Any, *behind: Any, run: Any = run, met: Any = met, chunk: str = chunk) -> Any:
            if name == "rebuild" and arguments[2] == chunk:
                met.set()
                await asyncio.Event().wait()
            return await run(name, keys, arguments, *behind)

        command._engine.wire.run = wire  # type: ignore[method-assign, assignment]
        task = asyncio.create_task(command.run())
        await met.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await stop(world)
    await (await change(world, new)).run()
    await stop(world)
    again(world, new)
    await proven(world, done)


async def plan_of(world: World, new: Layout) -> Plan:
    command = await change(world, new)
    return await command.plan()


async def test_it_refuses_while_somebody_lives_or_something_is_unfinished_and_changes_nothing(world: World) -> None:
    process = world.process()
    await process.stock.restock([Line(sku, 9) for sku in SKUS], operation_id="po")
    await world.apply()
    new = LAYOUTS[1]
    assert (await plan_of(world, new)).obstacles == ()
    await process.engine.upkeep.heartbeat(2, "w1")
    assert "a worker of partition 2 is alive" in (await plan_of(world, new)).obstacles[0]
    await process.client.delete(process.engine.partitions[2].key("worker"))
    await process.stock.deduct([Line("a", 1)], operation_id="o1")
    with pytest.raises(NotReady, match="1 journal entries are not applied"):
        await (await change(world, new)).run()
    await world.apply()
    held = await process.stock.reserve([Line("a", 1)], operation_id="pinned")
    await process.stock.pin(held, confirm=True)
    await world.apply()
    with pytest.raises(NotReady, match="'pinned'"):
        await (await change(world, new)).run()
    found = await world.ledger.layout()
    assert found is not None
    assert (found.layout, found.begun, found.generation) == (LAYOUTS[0], False, 0)
    assert (await process.stock.level("a")).available == 7


async def test_who_sold_between_the_look_and_the_freeze_is_found_and_the_old_layout_stands(world: World) -> None:
    seller = world.process()
    await seller.stock.restock([Line("a", 9)], operation_id="po")
    await world.apply()

    async def sold(step: str) -> None:
        if step == "begin":
            await seller.stock.deduct([Line("a", 1)], operation_id="o1")

    with pytest.raises(NotReady, match="sold from meanwhile"):
        await (await change(world, LAYOUTS[1], sold)).run()
    found = await world.ledger.layout()
    assert found is not None
    assert (found.layout, found.begun) == (LAYOUTS[0], False)
    (row,) = await world.ledger.stock([key_of(HOME, "a")])
    assert row.available == 9


async def test_a_process_of_the_old_layout_sells_nothing_and_loads_nothing(world: World) -> None:
    old = world.process()
    await old.stock.restock([Line(sku, 9) for sku in SKUS], operation_id="po")
    await world.apply()
    await old.quiet()
    new = LAYOUTS[1]
    await (await change(world, new)).run()
    for sku in SKUS:
        with pytest.raises(StockFrozen, match="4 by sku now"):
            await old.stock.deduct([Line(sku, 1)])
        field = key_of(HOME, sku)
        wrong = next(number for number in range(4) if number != new.of(field))
        row = await world.ledger.partition(wrong)
        assert row is not None
        async with world.ledger.balances(wrong, row.epoch, [field]) as rows:
            assert rows == {}, "another partition sells it"
    with pytest.raises(StockFrozen, match="start it anew"):
        await old.engine.upkeep.journal_state(0)
    again(world, new)
    fresh = world.process()
    assert (await fresh.stock.level("a")).available == 9


async def test_a_ledger_without_stock_has_nothing_to_change(tmp_path: Path, namespace: str) -> None:
    async with world_of(tmp_path, namespace, partitions=1) as world:
        assert await world.ledger.layout() is None
        process = world.process()
        command = Repartition(process.engine, world.ledger, MemoryQueue(), Layout(2))
        with pytest.raises(InventoryError, match="no stock yet"):
            await command.plan()


def test_the_command_looks_first_and_does_it_with_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database, namespace = f"sqlite+aiosqlite:///{tmp_path / 'ledger.db'}", "laid"
    redis = fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer())

    def inventory(**layout: Any) -> Inventory:
        return Inventory(redis, database=database, namespace=namespace, metrics=[NoMetrics()], **layout)

    async def sell() -> None:
        async with inventory(partitions=2) as shop:
            await shop.create_schema()
            async with shop.worker():
                await shop.stock.restock([Line(sku, 5) for sku in SKUS], operation_id="po")
                await shop.stock.reserve([Line("a", 2), Line("b", 1)], operation_id="r1", ttl=None)
                await shop.settled()
            await redis.delete(*[f"{{{namespace}:{number}}}:worker" for number in range(2)])

    async def go_on() -> None:
        async with inventory(partitions=4, partition_by="sku") as shop, shop.worker():
            async with asyncio.timeout(30):
                for number in range(4):
                    while await shop._ready().engine.upkeep.worker_seen(number) is None:
                        await asyncio.sleep(0.02)
            assert (await shop.stock.reserve([Line("a", 2), Line("b", 1)], operation_id="r1", ttl=None)).replayed
            assert (await shop.stock.restock([Line(sku, 5) for sku in SKUS], operation_id="po")).replayed
            await shop.stock.confirm("r1")
            await shop.settled()
            await shop._ready().engine.drain()
            await shop.settled()
            assert {row.sku: row.sold for row in await shop.ledger.all_stock() if row.sold} == {"a": 2, "b": 1}
            assert await shop.ledger.verify() == []
        with pytest.raises(InventoryError, match="repartition"):
            await inventory(partitions=2).start()

    real = Servers.make_client
    monkeypatch.setattr(Servers, "make_client", lambda self: real(replace(self, redis=redis)))
    command = ["repartition", "--redis", "redis://x", "--database", database, "--namespace", namespace, "--partitions"]
    runner = CliRunner()
    missing = runner.invoke(app, [*command, "4"])
    assert missing.exit_code == 1
    asyncio.run(sell())
    look = runner.invoke(app, [*command, "4", "--partition-by", "sku"])
    assert (look.exit_code, "with --yes it is done" in look.output) == (0, True), look.output
    assert "2 by merchant to 4 by sku" in look.output
    done = runner.invoke(app, [*command, "4", "--partition-by", "sku", "--yes"])
    assert (done.exit_code, "1 live reservations" in done.output) == (0, True), done.output
    again = runner.invoke(app, [*command, "4"])
    assert (again.exit_code, "as they are" in again.output) == (0, True), again.output
    asyncio.run(go_on())
