"""The faults, one function each: what it does to the stand, for how long, to whom. ``Step`` draws decide, so a seed replays them."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

from inventory_sdk import Line
from tests.faults.proxy import Proxy
from tests.faults.stand import MERCHANTS, Stand, Step
from tests.servers_kit import PostgresServer, RedisServer, promote

Fault = Callable[[Stand, Step], Awaitable[None]]
T = TypeVar("T")

SHORT, LONG = 0.1, 1.2
"""Seconds: a stumble that nobody's time-out notices, and one that ends every wait for Redis."""


def pick(among: list[T], step: Step) -> T:
    return among[int(step.victim * len(among))]


async def kill_worker(here: Stand, step: Step) -> None:
    """SIGKILL, and another one starts."""
    worker = pick(here.workers, step)
    worker.kill()
    worker.start()


async def kill_caller(here: Stand, step: Step) -> None:
    """SIGKILL in the middle of its calls; another process sells on."""
    pick(here.callers, step).kill()
    if len(here.callers) < 6:
        here.add_caller(6)


async def pause_process(here: Stand, step: Step) -> None:
    """A caller or a worker hangs (a long collection of garbage, a suspended container) and goes on as if nothing had been."""
    process = pick([*here.workers, *here.callers], step)
    process.signal(signal.SIGSTOP)
    await asyncio.sleep(SHORT + step.length * LONG)
    process.signal(signal.SIGCONT)


async def cut_queue(here: Stand, step: Step) -> None:
    """Every connection to RabbitMQ breaks, confirms on their way with them."""
    queue_of(here).cut()


async def mute_queue(here: Stand, step: Step) -> None:
    """RabbitMQ takes messages and nobody hears its confirms; then the connections break."""
    await _muted(queue_of(here), step)


async def hold_queue(here: Stand, step: Step) -> None:
    """RabbitMQ hangs, as behind a memory or disk alarm, and goes on."""
    queue_of(here).hold()
    await asyncio.sleep(step.length * LONG)
    queue_of(here).resume()


async def refuse_queue(here: Stand, step: Step) -> None:
    """RabbitMQ is away and comes back."""
    await _away(queue_of(here), step)


async def cut_database(here: Stand, step: Step) -> None:
    """Every connection to PostgreSQL breaks, in the middle of whatever transaction."""
    here.database.cut()


async def mute_database(here: Stand, step: Step) -> None:
    """PostgreSQL commits and its replies are lost."""
    await _muted(here.database, step)


async def cut_redis(here: Stand, step: Step) -> None:
    """Every connection to Redis breaks."""
    here.redis.cut()


async def mute_redis(here: Stand, step: Step) -> None:
    """Redis executes and its replies are lost."""
    await _muted(here.redis, step)


async def strand_redis(here: Stand, step: Step) -> None:
    """Scripts hang in dead connections while callers go on over new ones; then they arrive after all, too late to be allowed, and
    just as there is stock again that they could take."""
    stranded = here.redis.strand()
    await asyncio.sleep(2.5 + step.length * LONG)  # until the lost replies are looked up, asked again, and refused
    more, name = [Line(sku, 50) for sku in here.skus], f"opening again at {step.at}"
    async with here.inventory:
        stock = here.inventory.stock
        await asyncio.gather(*(stock.restock(more, merchant=merchant, operation_id=name) for merchant in MERCHANTS))
        stranded.set()


def queue_of(here: Stand) -> Proxy:
    assert here.queue is not None
    return here.queue


async def _muted(proxy: Proxy, step: Step) -> None:
    proxy.mute()
    await asyncio.sleep(SHORT + step.length * LONG / 2)
    proxy.cut()


async def _away(proxy: Proxy, step: Step) -> None:
    await proxy.refuse()
    await asyncio.sleep(SHORT + step.length * LONG)
    await proxy.allow()


def crash_redis(server: RedisServer) -> Fault:
    """SIGKILL; started again from its append-only file, which has every write."""

    async def crash(here: Stand, step: Step) -> None:
        server.kill()
        await asyncio.sleep(step.length * 0.5)
        await asyncio.to_thread(server.start)

    return crash


def pause_redis(server: RedisServer) -> Fault:
    """Redis hangs for longer than any call waits, then executes what had arrived: too late, and it has to know that."""

    async def pause(here: Stand, step: Step) -> None:
        server.signal(signal.SIGSTOP)
        await asyncio.sleep(SHORT + step.length * LONG)
        server.signal(signal.SIGCONT)

    return pause


def flush_redis(server: RedisServer) -> Fault:
    """FLUSHALL: somebody's script, somebody's mistake."""

    async def flush(here: Stand, step: Step) -> None:
        with server.client() as client:
            client.flushall()

    return flush


def fail_over(primary: RedisServer, replica: RedisServer) -> Fault:
    """The replica is cut off, the primary goes on acknowledging and then dies: who is promoted is behind."""

    async def fail(here: Stand, step: Step) -> None:
        promote(replica)
        await asyncio.sleep(0.2 + step.length * 0.5)
        primary.kill()
        here.redis.target = ("127.0.0.1", replica.port)
        here.redis.cut()

    return fail


def restart_postgres(server: PostgresServer) -> Fault:
    """A planned restart, or a crash with recovery."""

    async def restart(here: Stand, step: Step) -> None:
        server.stop(signal.SIGQUIT if step.victim < 0.5 else signal.SIGINT)
        await asyncio.sleep(step.length * 0.5)
        await asyncio.to_thread(server.start)

    return restart
