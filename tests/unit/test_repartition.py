"""``inventory-sdk repartition``: what was held, sold and returned under one layout goes on under the other, also when it was killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from typer.testing import CliRunner

from inventory_sdk import Inventory, Line
from inventory_sdk.cli.app import app
from inventory_sdk.errors import InventoryError, StockFrozen
from inventory_sdk.ledger.repartition import NotReady
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.model import Layout, key_of
from inventory_sdk.servers import Servers
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.recovery import rebuild
from inventory_sdk.sync.repartition import Plan, Repartition
from tests.conftest import sample
from tests.repartition_kit import SKUS, again, change, layout_of, proven, stop, trade
from tests.spanning_kit import HOME, World, world_of

LAYOUTS = [Layout(4), Layout(4, "sku"), Layout(3, "sku"), Layout(1), Layout(7)]


class Killed(Exception):
    """The process that repartitions."""


def killer(step: str) -> Any:
    async def at(reached: str) -> None:
        if reached == step:
            raise Killed

    return at


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


STEPS = ["begin", "freeze 0", "freeze 3", "turn", "rebuild", "remove", "end"]


@pytest.mark.parametrize("step", sample(STEPS))
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
