"""Closed-loop load: a number of callers, each of which calls again as soon as it was answered."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

Call = Callable[[], Awaitable[Any]]

WARM_UP: Final = 1.0
"""Seconds before the clock runs: connections, caches, and the worker's first batches."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the callers saw. ``seconds`` runs until the last of them was answered; latencies in milliseconds, of all calls."""

    operations: int
    seconds: float
    p50: float
    p99: float

    @property
    def tps(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds

    def figures(self) -> dict[str, float]:
        """For the JSON object."""
        return {"tps": round(self.tps), "p50_ms": round(self.p50, 3), "p99_ms": round(self.p99, 3)}


async def put(call: Call, callers: int, seconds: float) -> Load:
    """Load with ``callers`` for ``seconds``; the first error of any call is raised. Calls under way at the end are counted."""
    latencies = array("d")
    note = latencies.append
    clock = time.perf_counter

    async def caller() -> None:
        began = clock()
        while began < deadline:
            await call()
            now = clock()
            note(now - began)
            began = now

    started = clock()
    deadline = started + seconds
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    elapsed = clock() - started
    ordered = sorted(latencies)
    count = len(ordered)
    return Load(count, elapsed, ordered[count // 2] * 1000, ordered[min(count - 1, count * 99 // 100)] * 1000)


def report(what: str, load: Load, note: str = "") -> None:
    """One line for people, as soon as it is known."""
    print(f"{what:<44} {load.tps:>9,.0f}/s   p50 {load.p50:>9.2f} ms   p99 {load.p99:>9.2f} ms   {note}".rstrip(), flush=True)


def finish(result: dict[str, Any], wrong: list[str]) -> None:
    """The JSON object as the last line; exit code 1 when the books don't agree, since then the figures mean nothing."""
    result["wrong"] = wrong
    for each in wrong:
        print(f"WRONG: {each}", file=sys.stderr)
    print(json.dumps(result), flush=True)
    if wrong:
        raise SystemExit(1)
