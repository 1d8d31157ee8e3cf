"""Runners are killed in the middle of runs, and a neighbour takes all the CPU: no trigger is lost.

INVENTORY_TEST_KILLS says how many runners are killed."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from inventory_sdk import Inventory, RedistributionPolicy
from inventory_sdk.metrics import NoMetrics
from tests.redistribution_process import make

KILLS = int(os.environ.get("INVENTORY_TEST_KILLS", "6"))
RUNNERS = 2
SHOPS = [f"shop-{number}" for number in range(12)]


@pytest.fixture
async def client(redis_url: str, namespace: str) -> AsyncIterator[Any]:
    client = Redis.from_url(redis_url, decode_responses=True)
    yield client
    async for key in client.scan_iter(match=f"*{namespace}*"):
        await client.delete(key)
    await client.aclose()


class Runner:
    """A process, and the line that says that it is in the middle of a run."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, *arguments: str) -> Runner:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.redistribution_process", *arguments, stdout=asyncio.subprocess.PIPE
        )
        return cls(process)

    async def in_the_middle(self) -> None:
        assert self.process.stdout is not None
        while (line := await self.process.stdout.readline()) and not line.startswith(b"began"):
            pass
        assert line, "the runner ended by itself"

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


@pytest.mark.redis
async def test_runners_are_killed_and_every_keys_last_trigger_is_followed_by_a_run(redis_url: str, namespace: str, client: Any) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}, {KILLS} kills")  # noqa: T201  # replays a failure
    dice = random.Random(seed)
    inventory, recalculate = make(redis_url, namespace)
    inventory.redistribution.runs_here = False
    last: dict[str, float] = {}
    asking = True

    @inventory.trigger("moved", runs=recalculate)  # type: ignore[arg-type]
    async def moved(shop: str) -> None: ...

    async with inventory:
        desk = next(iter(inventory.redistribution._now().desks.values()))

        async def ask() -> None:
            while asking:
                shop = dice.choice(SHOPS)
                last[shop] = time.monotonic()
                await moved(shop)
                await asyncio.sleep(dice.choice([0.0, 0.001, 0.02]))

        runners = [await Runner.start(redis_url, namespace) for _ in range(RUNNERS)]
        caller = asyncio.create_task(ask())
        try:
            for number in range(KILLS):
                victim = runners[number % RUNNERS]
                await victim.in_the_middle()
                await asyncio.sleep(dice.uniform(0, 0.1))
                await victim.kill()
                runners[number % RUNNERS] = await Runner.start(redis_url, namespace)
            asking = False
            await caller
            await asyncio.wait_for(asyncio.shield(_all_ended(client, namespace, last)), 60)
            assert last
            assert set(last) <= set(SHOPS)
            assert await desk.board.peek(1) == ([], None)  # nothing is left behind
        finally:
            asking = False
            caller.cancel()
            for runner in runners:
                await runner.kill()


async def _all_ended(client: Any, namespace: str, last: dict[str, float]) -> None:
    while True:
        ended: dict[str, float] = {}
        for line in await client.lrange(f"{namespace}:ended", 0, -1):
            shop, began = line.rsplit(" ", 1)
            ended[shop] = max(ended.get(shop, 0.0), float(began))
        missing = {shop: asked for shop, asked in last.items() if ended.get(shop, 0.0) < asked}
        if not missing:
            return
        await asyncio.sleep(0.05)


@pytest.mark.redis
async def test_beside_a_neighbour_that_takes_all_cpu_redistribution_slows_and_catches_up(
    redis_url: str, namespace: str, client: Any
) -> None:
    inventory = Inventory(
        redis_url,
        database="sqlite+aiosqlite://",
        namespace=namespace,
        metrics=[NoMetrics()],
        redistribution=RedistributionPolicy(cpu=0.5, lag=10.0, slows=("batch", "core")),
    )
    done: dict[str, int] = {}

    @inventory.coalesce(key="shop", debounce=0.02, max_wait=0.1)
    async def recalculate(shop: str, number: int) -> None:
        done[shop] = number

    @inventory.trigger("moved", runs=recalculate)
    async def moved(shop: str, number: int) -> None: ...

    neighbours = [await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass") for _ in range(os.cpu_count() or 1)]
    try:
        async with inventory:
            governor = inventory.redistribution.governor
            number = 0
            async with asyncio.timeout(60):
                while governor.share > 0.5:
                    number += 1
                    await asyncio.gather(*(moved(shop, number) for shop in SHOPS))
                    await asyncio.sleep(0.02)
                assert inventory.lanes.usage()["core"].running == 0
                assert governor.state().shares["core"] == 1.0  # what comes last is not slowed before the others are at the floor
                for neighbour in neighbours:
                    neighbour.kill()
                while done != dict.fromkeys(SHOPS, number):
                    await asyncio.sleep(0.02)
    finally:
        for neighbour in neighbours:
            if neighbour.returncode is None:
                neighbour.kill()
            await neighbour.wait()
