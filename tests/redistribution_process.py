"""A process that runs what others ask for, until it is killed: for the tests that kill it.

    python -m tests.redistribution_process <redis URL> <namespace>

Prints a line ``began KEY`` when a run begins. What ended stands in the Redis list ``{namespace}:ended`` as ``KEY BEGAN``, the
(monotonic) time at which the run began; all processes of a machine have the same clock.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time

from redis.asyncio import Redis

from inventory_sdk import Inventory, RedistributionPolicy
from inventory_sdk.metrics import NoMetrics

LEASE = 1.0


def make(redis_url: str, namespace: str) -> tuple[Inventory, object]:
    """The Inventory and its coalesced function, as every process of these tests has it."""
    inventory = Inventory(
        redis_url,
        database="sqlite+aiosqlite://",
        namespace=namespace,
        metrics=[NoMetrics()],
        redistribution=RedistributionPolicy(max_concurrency=4, cpu=1.0, lag=10, lease=LEASE),
    )

    @inventory.coalesce(key="shop", debounce=0.01, max_wait=0.1, name="shops")
    async def recalculate(shop: str) -> None:
        began = time.monotonic()
        sys.stdout.write(f"began {shop}\n")
        sys.stdout.flush()
        await asyncio.sleep(random.uniform(0.02, 0.2))
        client = Redis.from_url(redis_url)
        await client.rpush(f"{namespace}:ended", f"{shop} {began}")
        await client.aclose()

    return inventory, recalculate


async def main() -> None:
    inventory, _ = make(sys.argv[1], sys.argv[2])
    async with inventory:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
