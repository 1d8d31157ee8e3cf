"""A real cluster: sales go on while slots move, a replica is promoted and a master is killed; then everything is counted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import RedisCluster
from redis.crc import key_slot

from inventory_sdk import Inventory, Line
from inventory_sdk.cli.doctor import Deployment, Finding, examine
from inventory_sdk.errors import InvalidOperation, Overloaded
from inventory_sdk.metrics.events import Retried
from inventory_sdk.stock.routed import PlainCommands
from tests.cluster_kit import Cluster, cluster
from tests.selling_kit import PARTITIONS, Sellers, counted, merchants, only_tails_are_missing, shop
from tests.stock_kit import Recorded, until

pytestmark = pytest.mark.cluster


async def test_sales_go_on_while_a_slot_moves_and_a_replica_takes_over(tmp_path: Path, namespace: str) -> None:
    own: Cluster = cluster()
    metrics = Recorded()
    tags = [f"{{{namespace}:{partition}}}:meta" for partition in range(PARTITIONS)]
    async with shop(own.url, tmp_path, namespace, metrics) as inventory, Sellers(inventory).selling() as sellers:
        await until(lambda: all(sellers.sold(partition) > 20 for partition in range(PARTITIONS)), 20)

        await asyncio.to_thread(own.move, tags[0])
        await until(lambda: len(sellers.epochs(0)) == 2, 30)

        await asyncio.to_thread(own.fail_over, own.owner(tags[1]))
        await until(lambda: len(sellers.epochs(1)) >= 2, 30)
        before = len(sellers.receipts)
        await until(lambda: len(sellers.receipts) > before + 100, 20)
        sellers.stopping = True
        await asyncio.sleep(0)
        # Nothing was lost: keys move synchronously, and a replica that is asked to take over is caught up first.
        done = dict(sellers.receipts)
        assert await counted(inventory, done) == []
    assert sellers.refusals["StockFrozen"] > 0
    assert any(isinstance(event, Retried) and event.reason == "moved" for event in metrics.events)


async def test_of_a_killed_master_only_what_it_had_not_replicated_is_missing(tmp_path: Path, namespace: str) -> None:
    own = cluster()
    tag = f"{{{namespace}:2}}:meta"
    try:
        async with shop(own.url, tmp_path, namespace, Recorded()) as inventory, Sellers(inventory).selling() as sellers:
            await until(lambda: sellers.sold(2) > 20, 20)
            await asyncio.to_thread(own.kill, own.owner(tag))
            await until(lambda: len(sellers.epochs(2)) >= 2, 40)
            sellers.stopping = True
            await asyncio.sleep(0)
            done = dict(sellers.receipts)
            missing = await counted(inventory, done)
            only_tails_are_missing(done, missing)
            assert {done[key].positions[0][:2] for key in missing} <= {(2, 1)}
    finally:
        await asyncio.to_thread(own.whole)


async def test_while_a_slot_moves_its_journal_can_be_read_and_a_new_key_goes_to_the_new_owner(tmp_path: Path, namespace: str) -> None:
    own = cluster()
    async with shop(own.url, tmp_path, namespace, metrics := Recorded()) as inventory:
        view = inventory._running().engine.partitions[0]
        commands = view.wire.client
        assert isinstance(commands, PlainCommands)
        await inventory.stock.deduct([Line("a", 1)], merchant=merchants()[0])
        slot = key_slot(view.key("meta").encode())
        target = next(port for port in own.masters() if port != own.owner(view.key("meta")))
        source = own.begin_move(view.key("meta"), target)
        own.move_keys(slot, source, target, view.key("journal"))
        assert len(await commands.xrange(view.key("journal"))) == 2
        await commands.set(view.key("new"), "x")
        assert await commands.get(view.key("new")) == b"x"
        async with commands.pipeline(transaction=False) as pipeline:
            pipeline.xadd(view.key("applied2"), {"i": "1"})
            pipeline.xadd(view.key("applied2"), {"i": "2"})
            assert len(await pipeline.execute()) == 2
        assert [event.reason for event in metrics.events if isinstance(event, Retried)].count("ask") >= 4
        # Half a partition is not taken for a whole one: nobody recovers it now, the call waits and is told when to come again.
        with pytest.raises(Overloaded) as caught:
            await view.hello()
        assert caught.value.retry_after > 0
        while own.move_keys(slot, source, target):
            pass
        own.end_move(slot, source, target)
        async with asyncio.timeout(20):
            while (await view.hello()).state != "open" or (await view.hello()).epoch == 1:
                await asyncio.sleep(0.05)
        await inventory.stock.deduct([Line("a", 1)], merchant=merchants()[0])
        assert await counted(inventory, {}) == []


async def test_one_redirection_teaches_the_whole_map(tmp_path: Path, namespace: str) -> None:
    own = cluster()
    async with shop(own.url, tmp_path, namespace, metrics := Recorded()) as inventory:
        client = inventory._running().engine.wire.client
        names = [f"{{{namespace}:x}}:{n}" for n in range(5)]
        await client.get(names[0])
        own.move_empty(names[0])
        before = len(metrics.events)
        for name in names:
            await client.get(name)
        moved = [event for event in metrics.events[before:] if isinstance(event, Retried) and event.reason == "moved"]
        assert len(moved) == 1


async def test_a_ready_client_of_a_cluster_serves_as_its_url_does(tmp_path: Path, namespace: str) -> None:
    host, _, port = cluster().url.removeprefix("redis+cluster://").split(",")[0].partition(":")
    given = RedisCluster(host=host, port=int(port))
    async with shop(given, tmp_path, namespace, Recorded()) as inventory:
        receipts = [await inventory.stock.deduct([Line("a", 1)], merchant=merchant) for merchant in merchants()]
        assert {receipt.positions[0].partition for receipt in receipts} == set(range(PARTITIONS))
    await given.aclose()


@pytest.mark.parametrize("url", ["redis+cluster://h:1/3", "redis+cluster://h:x/", "redis+sentinel://h:1/", "redis+sentinel://,/s"])
def test_a_url_that_names_no_servers_is_refused_with_the_reason(url: str) -> None:
    with pytest.raises(InvalidOperation) as caught:
        Inventory(url, database="sqlite+aiosqlite://", metrics=[])
    assert caught.value.field == "redis"


async def found_by_doctor(url: str, folder: Path, namespace: str) -> dict[str, Finding]:
    deployment = Deployment(url, None, f"sqlite+aiosqlite:///{folder}/stock.db", namespace, PARTITIONS, None)
    return {finding.subject: finding async for finding in examine(deployment)}


async def test_doctor_says_who_has_each_partition_and_names_a_slot_that_is_half_moved(tmp_path: Path, namespace: str) -> None:
    own = cluster()
    async with shop(own.url, tmp_path, namespace, Recorded()):
        found = await found_by_doctor(own.url, tmp_path, namespace)
        assert found["cluster"].state.startswith("3 masters, 3 replicas")
        assert found["cluster"].advice == ""
        for partition in range(PARTITIONS):
            owner = own.owner(f"{{{namespace}:{partition}}}:meta")
            assert found[f"partition {partition}"] == Finding(f"partition {partition}", f"at 127.0.0.1:{owner}, 1 replicas")
        assert found["worker"].advice == ""
    slot = key_slot(f"{{{namespace}:0}}".encode())
    key = f"{{{namespace}:0}}:meta"
    own.begin_move(key, next(port for port in own.masters() if port != own.owner(key)))
    try:
        assert "half moved" in (await found_by_doctor(own.url, tmp_path, namespace))["cluster"].advice
    finally:
        for port in own.masters():
            own.say(port, "CLUSTER", "SETSLOT", slot, "STABLE")
