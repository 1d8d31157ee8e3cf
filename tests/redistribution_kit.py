"""Coalesced functions for the tests, and calculations that another process can import."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from inventory_sdk import Inventory, Recalculation, RedistributionPolicy, injected
from inventory_sdk.metrics import NoMetrics

UNSLOWED = RedistributionPolicy(cpu=1.0, lag=10.0)
"""The tests' machine is busy: the governor must not have a say where a test is not about it."""


def inventory_of(redis: Any = "memory://", **options: Any) -> Inventory:
    return Inventory(redis, **{"metrics": [NoMetrics()], "redistribution": UNSLOWED, **options})


class Runs:
    """Runs that go on until they are told to end; ``story`` has what began, ``answers`` what each is to return or raise."""

    def __init__(self) -> None:
        self.story: list[Any] = []
        self.began = asyncio.Event()
        self.end = asyncio.Event()
        self.now = 0
        self.most = 0
        self.fails: Exception | None = None

    async def run(self, what: Any) -> int:
        self.story.append(what)
        self.now += 1
        self.most = max(self.most, self.now)
        self.began.set()
        try:
            await self.end.wait()
            if self.fails is not None:
                raise self.fails
            return len(self.story)
        finally:
            self.now -= 1


far = inventory_of()
"""Whose functions run in processes."""


@far.coalesce(key="shop", debounce=0, executor="process", timeout=30, name="far-add")
async def add(shop: str, numbers: list[int], run: Recalculation = injected()) -> dict[str, int]:
    return {"sum": sum(numbers), "pid": os.getpid(), "fence": run.fence}


def autogroup() -> str | None:
    """The group of this process' session, where Linux has such groups: its name, and how weak it is."""
    group = Path("/proc/self/autogroup")
    return group.read_text() if group.exists() else None


@far.coalesce(key="shop", debounce=0, executor="process", timeout=30, name="far-weakness")
async def weakness(shop: str) -> dict[str, Any]:
    return {"pid": os.getpid(), "session": os.getsid(0), "nice": os.nice(0), "group": autogroup()}


@far.coalesce(key="shop", debounce=0, executor="process", timeout=0.3, name="far-forever")
async def forever(shop: str) -> None:
    while True:
        time.time()


class Odd(Exception):
    """An error that can be pickled and not be read back."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)


@far.coalesce(key="shop", debounce=0, executor="process", timeout=30, name="far-failing")
async def failing(shop: str) -> None:
    if shop == "dies":
        os._exit(7)
    if shop == "odd":
        raise Odd("a", "b")
    raise ValueError(f"no shop {shop}")
