"""Hotspots where Redis is a cluster, and where it goes away and comes back."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inventory_sdk import Detection, HotspotLimited, Inventory
from inventory_sdk.metrics import HotspotsUsed, Retried
from tests.cluster_kit import cluster
from tests.servers_kit import redis_server
from tests.stock_kit import Recorded


def shop(url: str, folder: Path, namespace: str, metrics: Recorded) -> tuple[Inventory, Callable[[str], Any]]:
    inventory = Inventory(
        url,
        database=f"sqlite+aiosqlite:///{folder}/stock.db",
        namespace=namespace,
        metrics=[metrics],
        detection=Detection(stay=60.0),
        redis_timeout=1.0,
    )

    @inventory.hotspot(threshold="20/second", limit="100/second", max_wait=0.2, keys="key")
    async def look(key: str) -> None: ...

    return inventory, look


async def crowd(look: Callable[[str], Any], until: Callable[[], bool]) -> int:
    """Ten callers of one key until it is so; how many calls went."""
    went = 0

    async def caller() -> None:
        nonlocal went
        while not until():
            try:
                await look("flash")
                went += 1
                await asyncio.sleep(0.002)
            except HotspotLimited as limited:
                await asyncio.sleep(limited.retry_after)

    async with asyncio.timeout(40):
        await asyncio.gather(*(caller() for _ in range(10)))
    return went


def hot(inventory: Inventory) -> Callable[[], bool]:
    return lambda: any(key.hot_since for key in inventory.hotspots.top())


def for_a_while(seconds: float) -> Callable[[], bool]:
    end = asyncio.get_running_loop().time() + seconds
    return lambda: asyncio.get_running_loop().time() > end


@pytest.mark.cluster
async def test_on_a_cluster_heat_is_found_and_the_rate_is_shared(tmp_path: Path, namespace: str) -> None:
    metrics = Recorded()
    inventory, look = shop(cluster().url, tmp_path, namespace, metrics)
    async with inventory:
        await crowd(look, hot(inventory))
        went = await crowd(look, for_a_while(2.0))
    used = [event for event in metrics.events if isinstance(event, HotspotsUsed)]
    assert sum(event.leases.get("granted", 0) for event in used) > 0
    assert not any(event.leases.get("away") for event in used)
    assert went <= 3.5 * 100
    assert not [event for event in metrics.events if isinstance(event, Retried) and event.what in ("hotspots", "heat", "hotspot_lease")]


async def test_while_redis_is_away_the_pace_is_kept_alone_and_afterwards_together_again(tmp_path: Path, namespace: str) -> None:
    metrics = Recorded()
    with redis_server() as server:
        inventory, look = shop(server.url, tmp_path, namespace, metrics)
        async with inventory:
            await crowd(look, hot(inventory))
            await crowd(look, for_a_while(1.5))
            server.signal(signal.SIGSTOP)
            try:
                await crowd(look, inventory.hotspots.away)
                went = await crowd(look, for_a_while(2.0))
                assert 20 <= went <= 2 * 100 * 1.5  # neither nobody nor everybody
                assert hot(inventory)()
            finally:
                server.signal(signal.SIGCONT)
            await crowd(look, lambda: not inventory.hotspots.away())
            assert hot(inventory)()
    assert {event.what for event in metrics.events if isinstance(event, Retried)} >= {"hotspots", "hotspot_lease"}
    assert any(event.leases.get("away") for event in metrics.events if isinstance(event, HotspotsUsed))
