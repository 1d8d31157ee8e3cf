"""What ``doctor`` says of a Redis Cluster and of Sentinels: who is there, who has each partition, and what is wrong."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from redis.asyncio import Redis

Say = Callable[[str, str, str], None]
"""(subject, what was found, advice; empty: all is well)."""

FEWEST_SENTINELS: Final = 3


@dataclass(frozen=True, slots=True)
class Servers:
    """``masters``: (name, client) of every server that holds stock; ``keyed`` takes commands by their key."""

    masters: list[tuple[str, Redis]]
    keyed: Any


def is_many(url: str) -> bool:
    """Whether the URL names a cluster or Sentinels."""
    return urlsplit(url).scheme.partition("+")[2] in ("cluster", "sentinel")


@asynccontextmanager
async def servers_at(url: str, namespace: str, partitions: int, level: str, say: Say) -> AsyncIterator[Servers]:
    """Says what stands there and what is wrong with it; ``level`` is the durability that calls get by default."""
    from inventory_sdk.metrics import NoMetrics
    from inventory_sdk.redis_urls import CLUSTER_SCHEMES, check_places, close_client, cluster_client, sentinel_client
    from inventory_sdk.stock.route import ClusterRoute, Guide
    from inventory_sdk.stock.routed import PlainCommands

    check_places(url)
    if urlsplit(url).scheme in CLUSTER_SCHEMES:
        route = ClusterRoute(cluster_client(url, 2.0))
        await route.learn()
        plain = PlainCommands(Guide(route, 2.0, NoMetrics()))
        tags = [f"{{{namespace}:{number}}}" for number in range(partitions)]
        owners = [route.address(tag) for tag in tags]
        masters: list[tuple[str, Redis]] = []
        try:
            masters.extend((_name(owner), route.client(owner)) for owner in dict.fromkeys(owners) if owner is not None)
            if not masters:
                say("cluster", "nobody has the slots of the partitions", "redis-cli --cluster check, then --cluster fix")
                raise ConnectionError("no node of the cluster has a partition")
            first: Any = masters[0][1]
            cluster_lines(await first.execute_command("CLUSTER NODES"), [_name(owner) for owner in owners], say)
            yield Servers(masters, plain)
        finally:
            for _, each in masters:
                await close_client(each)
            await plain.aclose()
        return
    client = sentinel_client(url, 2.0)
    try:
        await sentinel_lines(client, level, say)
        yield Servers([("the master", client)], client)
    finally:
        await close_client(client)


def _name(address: tuple[str, int] | None) -> str:
    return f"{address[0]}:{address[1]}" if address is not None else ""


def cluster_lines(nodes: dict[str, dict[str, Any]], owners: list[str], say: Say) -> None:
    """From CLUSTER NODES as redis-py reads it, and the master of each partition."""
    named = {name.partition("@")[0]: node for name, node in nodes.items()}
    masters = {name: node for name, node in named.items() if "master" in node["flags"].split(",") and node.get("slots")}
    replicas = [node for node in named.values() if "slave" in node["flags"].split(",")]
    failing = sorted(name for name, node in named.items() if {"fail", "fail?"} & set(node["flags"].split(",")))
    moving = sum(len(node.get("migrations", ())) for node in named.values())
    advice = ""
    if failing:
        advice = f"{', '.join(failing)} does not answer: start it or take it out (redis-cli --cluster del-node)"
    elif moving:
        advice = f"{moving} slot is half moved, its partition sells nothing meanwhile: let it end, or redis-cli --cluster fix"
    say("cluster", f"{len(masters)} masters, {len(replicas)} replicas; partitions on {len(set(owners) - {''})} of them", advice)
    for number, owner in enumerate(owners):
        mine = masters.get(owner)
        alive = [one for one in replicas if mine is not None and one["master_id"] == mine["node_id"] and "fail" not in one["flags"]]
        lacks = ""
        if not owner:
            lacks = "nobody has its slot: redis-cli --cluster fix"
        elif not alive:
            lacks = "give that master a replica: nobody would follow it"
        say(f"partition {number}", f"at {owner or 'nobody'}, {len(alive)} replicas", lacks)


async def sentinel_lines(client: Any, level: str, say: Say) -> None:
    """Asks every Sentinel of the URL, and the master."""
    from redis.exceptions import RedisError

    pool = client.connection_pool
    service = pool.service_name
    states: list[dict[str, Any]] = []
    sentinels = pool.sentinel_manager.sentinels
    for sentinel in sentinels:
        try:
            state = (await sentinel.sentinel_masters()).get(service)
        except (RedisError, OSError):
            continue
        if state is not None:
            states.append(state)
    known = max((int(state["num-other-sentinels"]) + 1 for state in states), default=0)
    quorum = max((int(state["quorum"]) for state in states), default=0)
    named = sorted({f"{state['ip']}:{state['port']}" for state in states})
    replicas = max((int(state["num-slaves"]) for state in states), default=0)
    advice = ""
    if len(states) < len(sentinels):
        advice = f"{len(sentinels) - len(states)} of those in the URL do not answer for {service!r}"
    elif len(named) > 1:
        advice = "they do not agree on the master: wait for the failover to end, then look again"
    elif known < FEWEST_SENTINELS:
        advice = f"run {FEWEST_SENTINELS} at least, on machines of their own: fewer can't outvote a lost one"
    elif quorum > len(states) or quorum <= known // 2:
        advice = f"set the quorum to {known // 2 + 1}: with {quorum} a minority could call the master down, or nobody could"
    elif replicas == 0:
        advice = "give the master a replica: nobody would follow it"
    found = f"{len(states)} of {len(sentinels)} answer, {known} know each other, quorum {quorum}, {replicas} replicas"
    say("sentinel", f"{found}, {service!r} is {' or '.join(named) or 'unknown'}", advice)
    try:
        fence = int((await client.config_get("min-replicas-to-write")).get("min-replicas-to-write", 0))
    except RedisError:  # managed services hide CONFIG
        return
    cut = "set it to 1: a master that was cut off goes on accepting what its successor will not have; or use durability queue"
    say("sentinel fence", f"min-replicas-to-write {fence}", cut if fence == 0 and level in ("redis", "aof") else "")
