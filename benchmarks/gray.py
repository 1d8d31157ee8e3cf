"""What a gray decision costs, beside what one would pick for it: ``python -m benchmarks.gray``.

Every decision is for another of 50,000 merchants, so nobody answers from a memory of the last one. The peers are given their context
ready made and decide in memory; OpenFeature's in-memory flag is static, it does not even hash. All are measured in turns in one run,
in processor time of this thread, and the middle turn counts. The peers come with ``pip install --group bench``; one that is missing is
named and skipped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from inventory_sdk import Inventory, context
from inventory_sdk.metrics import NoMetrics

Decide = Callable[[Any], Any]
MERCHANTS = [f"merchant-{number}" for number in range(50_000)]
LINK = "fast"


async def nothing(merchant: str) -> None:
    """A function that does nothing."""


async def stable(merchant: str) -> None:
    """Another one."""


def growthbook() -> tuple[Decide, Sequence[Any]]:
    from growthbook import GrowthBook

    book = GrowthBook(features={LINK: {"defaultValue": False, "rules": [{"coverage": 0.1, "force": True, "hashAttribute": "id"}]}})

    def decide(attributes: Any) -> bool:
        book.set_attributes(attributes)
        return book.is_on(LINK)

    return decide, [{"id": merchant} for merchant in MERCHANTS]


def unleash() -> tuple[Decide, Sequence[Any]]:
    from UnleashClient import UnleashClient
    from UnleashClient.cache import FileCache

    parameters = {"rollout": "10", "stickiness": "userId", "groupId": LINK}
    feature = {"name": LINK, "enabled": True, "strategies": [{"name": "flexibleRollout", "parameters": parameters}]}
    cache = FileCache("benchmark", directory=tempfile.mkdtemp())
    cache.bootstrap_from_dict({"version": 1, "features": [feature]})
    client = UnleashClient(
        "http://127.0.0.1:1", "benchmark", cache=cache, disable_metrics=True, disable_registration=True, refresh_interval=3600
    )
    client.initialize_client(fetch_toggles=False)
    return lambda known: client.is_enabled(LINK, known), [{"userId": merchant} for merchant in MERCHANTS]


def openfeature() -> tuple[Decide, Sequence[Any]]:
    from openfeature import api
    from openfeature.evaluation_context import EvaluationContext
    from openfeature.provider.in_memory_provider import InMemoryFlag, InMemoryProvider

    api.set_provider(InMemoryProvider({LINK: InMemoryFlag("off", {"on": True, "off": False})}))
    client = api.get_client()
    return lambda known: client.get_boolean_value(LINK, False, known), [EvaluationContext(targeting_key=each) for each in MERCHANTS]


PEERS: dict[str, Callable[[], tuple[Decide, Sequence[Any]]]] = {
    "GrowthBook is_on": growthbook,
    "UnleashClient is_enabled": unleash,
    "OpenFeature in-memory": openfeature,
}


def seconds_of(decide: Decide, known: Sequence[Any]) -> float:
    """For one decision of each."""
    started = time.thread_time()
    for each in known:
        decide(each)
    return time.thread_time() - started


async def seconds_of_calls(function: Callable[[str], Any]) -> float:
    """For one call of each merchant."""
    started = time.thread_time()
    for each in MERCHANTS:
        await function(each)
    return time.thread_time() - started


async def main(turns: int) -> None:
    """All of it; the last line is the JSON object."""
    logging.disable(logging.WARNING)
    inventory = Inventory("memory://", metrics=[NoMetrics()])
    woven = inventory.gray(LINK, candidate=nothing, merchant="merchant")(stable)
    missing: dict[str, str] = {}
    async with inventory:
        await inventory.gray_links.set(LINK, percentage=10, who="benchmark", why="10 %")
        links = inventory.gray_links
        deciding: dict[str, tuple[Decide, Sequence[Any]]] = {"ours": (lambda merchant: links.decide(LINK, merchant), MERCHANTS)}
        for name, make in PEERS.items():
            try:
                decide, known = make()
                shares = sum(bool(decide(each)) for each in known[:10_000]) / 10_000
                if name != "OpenFeature in-memory" and not 0.08 < shares < 0.12:
                    raise RuntimeError(f"{shares:.0%} of merchants are on instead of 10 %")
                deciding[name] = decide, known
            except Exception as error:  # noqa: BLE001  # a peer of another version: said so below, and in the JSON object
                missing[name] = repr(error)
        taken: dict[str, list[float]] = {name: [] for name in (*deciding, "bare", "decorator")}
        taken["ours, decided before in the request"] = []
        for _ in range(turns):
            for name, (decide, known) in deciding.items():
                taken[name].append(seconds_of(decide, known))
            token = context.sides.set({})
            links.decide(LINK, "m1")
            taken["ours, decided before in the request"].append(seconds_of(lambda _: links.decide(LINK, "m1"), MERCHANTS))
            context.sides.reset(token)
            taken["bare"].append(await seconds_of_calls(nothing))
            taken["decorator"].append(await seconds_of_calls(woven))
    micros = {name: round(sorted(times)[turns // 2] / len(MERCHANTS) * 1e6, 3) for name, times in taken.items()}
    for name, each in micros.items():
        print(f"{name:<40} {each:>8.2f} µs", flush=True)
    for name, why in missing.items():
        print(f"{name:<40} not measured: {why}", flush=True)
    peers = {name: micros[name] for name in PEERS if name in micros}
    result = {
        "benchmark": "gray",
        "decisions": len(MERCHANTS),
        "ours_us": micros["ours"],
        "ours_again_us": micros["ours, decided before in the request"],
        "decorator_us": round(micros["decorator"] - micros["bare"], 3),
        "peers_us": peers,
        "fastest_peer_us": min(peers.values(), default=None),
        "missing": missing,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--turns", type=int, default=7, help="turns of each (default %(default)s)")
    asyncio.run(main(parser.parse_args().turns))
