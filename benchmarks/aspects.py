"""What our aspects cost per call, beside what one would pick for each of them: ``python -m benchmarks.aspects``.

One caller, nothing to wait for, a function that does nothing: what is left is the price of the wrapping. All are measured in turns
in one run, and the middle turn counts. The peers come with ``pip install --group bench``; one that is missing is named and skipped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry

from inventory_sdk import Inventory, Lane, tracing
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.metrics.prometheus import PrometheusMetrics

Function = Callable[[int], Awaitable[int]]
MANY = 10**9
ALL = "lane, hotspot and metrics (all)"
KEYS = [f"sku-{number}" for number in range(100)]
LANES = {"core": Lane(max_concurrency=64, timeout=0.5)}


async def bare(number: int) -> int:
    """The function itself."""
    return number


def ours(quiet: Inventory, counted: Inventory) -> dict[str, Function]:
    """Our aspects, on inventories that are started: what finds hot keys looks at its counts meanwhile.

    The lane has slots, a line, a prediction, a deadline; the hotspot counts its key, which is cold; metrics are what they report."""

    def cold(inventory: Inventory) -> Callable[[Any], Any]:
        return inventory.hotspot(threshold="1000000/second", limit="1000000/second", keys=lambda number: KEYS[number % len(KEYS)])

    return {
        "lane": quiet.lane("core")(bare),
        "hotspot (cold key)": cold(quiet)(bare),
        "lane and metrics": counted.lane("core")(bare),
        ALL: counted.lane("core")(cold(counted)(bare)),
    }


def hyx_bulkhead() -> Function:
    from hyx.bulkhead import bulkhead

    @bulkhead(max_concurrency=64, max_capacity=320)
    async def call(number: int) -> int:
        return number

    return call


def hyx_timeout() -> Function:
    from hyx.timeout import timeout

    @timeout(0.5)
    async def call(number: int) -> int:
        return number

    return call


def aiolimiter() -> Function:
    from aiolimiter import AsyncLimiter

    limiter = AsyncLimiter(MANY, 1)

    async def call(number: int) -> int:
        async with limiter:
            return number

    return call


def throttled() -> Function:
    from throttled.asyncio import MemoryStore, RateLimiterType, Throttled, rate_limiter

    throttle = Throttled(
        key="k", using=RateLimiterType.GCRA.value, quota=rate_limiter.per_sec(1_000_000, burst=1_000_000), store=MemoryStore()
    )

    async def call(number: int) -> int:
        result = await throttle.limit()
        assert not result.limited
        return number

    return call


def pyrate() -> Function:
    from pyrate_limiter import Duration, InMemoryBucket, Limiter, Rate

    limiter = Limiter(InMemoryBucket([Rate(MANY, Duration.SECOND)]))

    async def call(number: int) -> int:
        await limiter.try_acquire_async("k")
        return number

    return call


def cashews() -> Function:
    from cashews import Cache

    cache = Cache()
    cache.setup("mem://")

    @cache.rate_limit(limit=MANY, period=10)
    async def call(number: int) -> int:
        return number

    return call


def prometheus() -> Function:
    from prometheus_client import Counter

    counter = Counter("calls", "Calls.", ["lane"], registry=CollectorRegistry()).labels("core")

    async def call(number: int) -> int:
        counter.inc()
        return number

    return call


PEERS: dict[str, Callable[[], Function]] = {
    "hyx bulkhead": hyx_bulkhead,
    "hyx timeout": hyx_timeout,
    "aiolimiter": aiolimiter,
    "throttled-py GCRA": throttled,
    "pyrate-limiter": pyrate,
    "cashews rate_limit": cashews,
    "prometheus counter": prometheus,
}
SAME_FEATURES = ("hyx bulkhead", "hyx timeout", "throttled-py GCRA", "prometheus counter")
"""What does, one by one, what our lane, our hotspot and their metrics do. The GCRA is the cheapest of the peers' limits by key."""


def trace(how: str) -> None:
    """Spans are made and go nowhere: what is left is what making them costs."""
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

    provider = TracerProvider(sampler=ALWAYS_ON if how == "recorded" else ALWAYS_OFF)
    provider.add_span_processor(SpanProcessor())
    tracing.enable(provider)


async def seconds_of(function: Function, calls: int) -> float:
    """For so many calls."""
    started = time.perf_counter()
    for number in range(calls):
        await function(number)
    return time.perf_counter() - started


async def main(calls: int, turns: int) -> None:
    """All of it; the last line is the JSON object."""
    quiet = Inventory("memory://", lanes=LANES, metrics=[NoMetrics()])
    counted = Inventory("memory://", lanes=LANES, metrics=[PrometheusMetrics(CollectorRegistry())])
    async with quiet, counted:
        await measure({"bare": bare, **ours(quiet, counted)}, calls, turns)


async def measure(functions: dict[str, Function], calls: int, turns: int) -> None:
    """These and the peers, in turns."""
    missing: dict[str, str] = {}
    for name, make in PEERS.items():
        try:
            function = make()
            await seconds_of(function, 100)
            functions[name] = function
        except Exception as error:  # noqa: BLE001  # a peer of another version: said so below, and in the JSON object
            missing[name] = repr(error)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            taken[name].append(await seconds_of(function, calls))
    micros: dict[str, float] = {name: sorted(times)[turns // 2] / calls * 1e6 for name, times in taken.items()}
    cost = {name: round(micros[name] - micros["bare"], 3) for name in functions if name != "bare"}
    for name, each in cost.items():
        print(f"{name:<32} {each:>8.2f} µs", flush=True)
    for name, why in missing.items():
        print(f"{name:<32} not measured: {why}", flush=True)
    result: dict[str, Any] = {
        "benchmark": "aspects",
        "calls": calls,
        "bare_us": round(micros["bare"], 3),
        "costs_us": cost,
        "ours_all_us": cost[ALL],
        "peers_sum_us": round(sum(cost[name] for name in SAME_FEATURES), 3) if not set(SAME_FEATURES) & set(missing) else None,
        "peers_summed": list(SAME_FEATURES),
        "missing": missing,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000, help="calls per turn (default %(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="turns of each (default %(default)s)")
    parser.add_argument("--tracing", choices=["off", "unsampled", "recorded"], default="off", help="of our aspects (default %(default)s)")
    given = parser.parse_args()
    if given.tracing != "off":
        trace(given.tracing)
    asyncio.run(main(given.calls, given.turns))
