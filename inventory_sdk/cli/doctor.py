"""``inventory-sdk doctor``: look at a deployment; one line per thing, OK or what to change."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import urlsplit, urlunsplit

import typer

from inventory_sdk.cli.options import DatabaseUrl, Namespace, QueueUrl, RedisUrl, TablePrefix, refuse, run
from inventory_sdk.cli.topology import is_many, servers_at

if TYPE_CHECKING:
    from redis.asyncio import Redis

LEVELS: Final = ("redis", "replica", "aof", "queue", "database")
PATIENCE: Final = 10.0
"""Seconds that one look may take."""
OLDEST_REDIS: Final = (7, 0)
"""Scripts read the clock and then write, which older ones refuse by default."""
SHOWN: Final = 3
CLOCK_APART: Final = 5.0
"""Seconds between Redis' clock and ours that people would notice in ``expires_at``."""


@dataclass(frozen=True, slots=True)
class Finding:
    """``advice`` says what to change; empty: all is well. ``state`` says what was found."""

    subject: str
    state: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What is to be looked at; ``durability`` is the level that it must be able to keep."""

    redis: str
    queue: str | None
    database: str
    namespace: str
    partitions: int
    durability: str | None
    prefix: str = "inventory_"
    replicas: int = 1

    @property
    def default_durability(self) -> str:
        return self.durability or ("queue" if self.queue else "redis")


def doctor(
    redis: RedisUrl = None,
    queue: QueueUrl = None,
    database: DatabaseUrl = None,
    namespace: Namespace = "inventory",
    partitions: Annotated[int, typer.Option(min=1, envvar="INVENTORY_PARTITIONS")] = 1,
    durability: Annotated[str | None, typer.Option(help=f"A level it must keep: {', '.join(LEVELS)}")] = None,
    prefix: TablePrefix = "inventory_",
    replicas: Annotated[int, typer.Option(min=1, help="Copies that durability replica waits for")] = 1,
    drill: Annotated[bool, typer.Option("--drill", help="Sell on a throw-away namespace, break things, count to the unit.")] = False,
) -> None:
    """Check every connection and every setting that would break a promise. Exit code 1 when something must change.

    --drill then breaks one thing after another, in a namespace, queue and tables of its own that are removed afterwards: nothing of
    yours is touched, but the servers have some load for half a minute.
    """
    if durability is not None and durability not in LEVELS:
        raise refuse(f"--durability={durability!r}: must be one of {', '.join(LEVELS)}")
    if redis is None:
        raise refuse("no Redis: give --redis or set INVENTORY_REDIS_URL")
    if database is None:
        raise refuse("no database: give --database or set INVENTORY_DATABASE_URL")
    deployment = Deployment(redis, queue, database, namespace, partitions, durability, prefix, replicas)
    run(drilled(deployment) if drill else report(deployment))


async def drilled(deployment: Deployment) -> bool:
    """``report``, then every drill, each with its story; True when every promise held (what to change is said, but is no failure
    of the drill)."""
    from inventory_sdk.testing.drill import run as drills

    await report(deployment)
    held = True
    with quiet():
        async for finding in drills(deployment.redis, deployment.queue, deployment.database):
            held = held and not finding.wrong
            took = f" ({finding.seconds:.1f} s)" if finding.seconds else ""
            typer.echo(f"{'BROKEN' if finding.wrong else 'HELD':<8}{finding.subject}: {finding.wrong or finding.story}{took}")
    typer.echo("every promise held, to the unit" if held else "a promise was broken: keep this output, and stop selling on these servers")
    return held


@contextmanager
def quiet() -> Iterator[None]:
    """What is broken on purpose need not be logged."""
    log = logging.getLogger("inventory_sdk")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(before)


async def report(deployment: Deployment) -> bool:
    """Print every finding as it comes; True when nothing must change."""
    well = True
    async for finding in examine(deployment):
        well = well and not finding.advice
        text = f"{finding.state}; {finding.advice}" if finding.advice else finding.state
        typer.echo(f"{'CHANGE' if finding.advice else 'OK':<8}{finding.subject}: {text}")
    return well


async def examine(deployment: Deployment) -> AsyncIterator[Finding]:
    """All findings. What can't be reached is a finding, and the others are still looked at."""
    facts: dict[str, Any] = {}
    for look, subject in ((look_at_redis, "redis"), (look_at_database, "database"), (look_at_queue, "queue")):
        findings: list[Finding] = []
        try:
            async with asyncio.timeout(PATIENCE):
                await look(deployment, facts, findings.append)
        except Exception as error:  # noqa: BLE001  (whatever it is, it is what the user must hear, and the next look goes on)
            said = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
            if isinstance(error, TimeoutError):
                reason = f"no answer within {PATIENCE:g} s"
            findings.append(Finding(subject, f"can't be used at {shown(url_of(deployment, subject))}", reason))
        for finding in findings:
            yield finding
    if deployment.durability is not None:
        yield keeps(deployment, facts)


def url_of(deployment: Deployment, subject: str) -> str:
    return {"redis": deployment.redis, "database": deployment.database, "queue": deployment.queue or ""}[subject]


def shown(url: str) -> str:
    """The URL without its password."""
    parts = urlsplit(url)
    if "password" in parts.query:
        parts = parts._replace(query="***")
    if parts.password is None:
        return urlunsplit(parts)
    user, _, rest = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:***@{rest}"))


Note = Callable[[Finding], None]
Look = Callable[[Deployment, dict[str, Any], Note], Awaitable[None]]


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Redis]:
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    client = Redis.from_url(
        url, socket_timeout=PATIENCE, socket_connect_timeout=PATIENCE, retry=Retry(NoBackoff(), 0), decode_responses=True
    )
    try:
        yield client
    finally:
        await client.aclose()


async def look_at_redis(deployment: Deployment, facts: dict[str, Any], note: Note) -> None:
    if is_many(deployment.redis):

        def say(subject: str, state: str, advice: str) -> None:
            note(Finding(subject, state, advice))

        place = deployment.redis, deployment.namespace, deployment.partitions, deployment.default_durability
        async with servers_at(*place, say) as servers:
            for name, client in servers.masters:
                await look_at_server(deployment, client, name, facts, note)
            await look_at_workers(deployment, servers.keyed, facts, note)
        return
    async with client_of(deployment.redis) as client:
        await look_at_server(deployment, client, shown(deployment.redis), facts, note)
        await look_at_workers(deployment, client, facts, note)


async def look_at_server(deployment: Deployment, client: Redis, name: str, facts: dict[str, Any], note: Note) -> None:
    from redis.exceptions import ResponseError

    info: dict[str, Any] = await client.info()
    version = str(info.get("redis_version", "0"))
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers <= facts.get("redis_numbers", numbers):  # of several servers the oldest decides what can be kept
        facts["redis_version"], facts["redis_numbers"] = version, numbers
    old = "" if numbers >= OLDEST_REDIS else f"upgrade to Redis {'.'.join(map(str, OLDEST_REDIS))} or newer"
    note(Finding("redis", f"{version} at {name}", old))

    policy = str(info.get("maxmemory_policy", "unknown"))
    evicts = "" if policy == "noeviction" else "set maxmemory-policy noeviction: any other lets Redis drop counters and holds"
    note(Finding("redis eviction", policy, evicts))

    aof = bool(info.get("aof_enabled"))
    facts["aof"] = aof and facts.get("aof", True)
    links = [info.get(f"slave{number}") for number in range(int(info.get("connected_slaves", 0)))]
    replicas = sum(isinstance(link, dict) and link.get("state") == "online" for link in links)
    facts["replicas"] = min(replicas, facts.get("replicas", replicas))
    try:
        snapshots = str((await client.config_get("save")).get("save", ""))
    except ResponseError:  # managed services hide CONFIG; whether a snapshot was ever written still tells something
        snapshots = "snapshots" if info.get("rdb_last_save_time") and not info.get("rdb_changes_since_last_save") else ""
    note(persistence(deployment, aof, snapshots))

    seconds, micros = await client.time()
    apart = abs(time.time() - (int(seconds) + int(micros) / 1e6))
    clock = "" if apart <= CLOCK_APART else "synchronise the clocks: holds expire by Redis' clock"
    note(Finding("clock", f"Redis is {apart:.1f} s from this machine", clock))


def persistence(deployment: Deployment, aof: bool, snapshots: str) -> Finding:
    """At durability ``redis`` a sale lives as long as Redis' memory; the other levels don't rest on it."""
    kept = "append-only file" if aof else f"snapshots ({snapshots})" if snapshots else "nothing on disk"
    level = deployment.default_durability
    if level in ("queue", "database") or aof:
        return Finding("redis persistence", f"{kept}, at durability {level}")
    loses = "what came after the last snapshot" if snapshots else "every sale that the ledger has not applied yet"
    return Finding(
        "redis persistence",
        f"{kept}, at durability {level}",
        f"a crash of Redis loses {loses}: set appendonly yes, or give a queue and use durability queue",
    )


async def look_at_workers(deployment: Deployment, client: Any, facts: dict[str, Any], note: Note) -> None:
    from inventory_sdk.stock.partition import Partition
    from inventory_sdk.stock.upkeep import HEARTBEAT_MS
    from inventory_sdk.stock.wire import Wire

    wire = Wire(client, PATIENCE)
    signs = [Partition(number, deployment.namespace, wire).key("worker") for number in range(deployment.partitions)]
    silent = [number for number, sign in enumerate(signs) if await client.pttl(sign) <= 0]
    facts["workers"] = not silent
    if silent:
        where = "" if deployment.partitions == 1 else f" of partition {', '.join(map(str, silent))}"
        advice = "start one: inventory-sdk worker MODULE:INVENTORY (without it nothing reaches the ledger)"
        note(Finding("worker", f"no sign of life{where} within {HEARTBEAT_MS / 1000:g} s", advice))
    else:
        note(Finding("worker", f"every partition has one ({deployment.partitions})"))


async def look_at_database(deployment: Deployment, facts: dict[str, Any], note: Note) -> None:
    from inventory_sdk.ledger.sql import SqlLedger

    ledger = SqlLedger(deployment.database, deployment.prefix)
    await ledger.start()
    try:
        wrong = await ledger.check_schema()
    finally:
        await ledger.close()
    facts["database"] = True
    note(Finding("database", f"answers at {shown(deployment.database)}"))
    for what in wrong[:SHOWN]:
        note(Finding("schema", "not as it must be", what))
    if len(wrong) > SHOWN:
        note(Finding("schema", f"{len(wrong) - SHOWN} more", "inventory-sdk schema --check lists them all"))
    if not wrong:
        note(Finding("schema", "every table is there"))


async def look_at_queue(deployment: Deployment, facts: dict[str, Any], note: Note) -> None:
    from inventory_sdk.sync.queues import from_url

    if deployment.queue is None:
        facts["confirms"] = False
        note(Finding("queue", "none; the journal in Redis is read directly"))
        return
    queue = from_url(deployment.queue, deployment.namespace, partitions=deployment.partitions)
    facts["confirms"] = queue.confirms
    await queue.start()
    try:
        wrong = await queue.check()
    finally:
        await queue.close()
    for what in wrong:
        note(Finding("queue", f"at {shown(deployment.queue)}", what))
    if not wrong:
        note(Finding("queue", f"answers at {shown(deployment.queue)}"))
    facts["queue"] = not wrong


def keeps(deployment: Deployment, facts: dict[str, Any]) -> Finding:
    """Whether the deployment can keep the level that was asked for, and if not, why."""
    level = deployment.durability
    why = ""
    if "redis_version" not in facts:
        why = "Redis does not answer"
    elif level == "replica" and facts.get("replicas", 0) < deployment.replicas:
        there = facts.get("replicas", 0)
        why = (
            f"{there} of {deployment.replicas} replicas are connected to {shown(deployment.redis)}; connect them, or use queue or database"
        )
    elif level == "aof" and facts["redis_numbers"] < (7, 2):
        why = f"Redis {facts['redis_version']} has no WAITAOF, 7.2 has; use queue or database"
    elif level == "aof" and not facts.get("aof"):
        why = "Redis keeps no append-only file; set appendonly yes, or use queue or database"
    elif level == "queue" and deployment.queue is None:
        why = "no queue is configured; give --queue or set INVENTORY_QUEUE_URL to a RabbitMQ"
    elif level == "queue" and facts.get("confirms") is False:
        why = "this queue does not confirm; give a RabbitMQ (amqp://…)"
    elif level == "queue" and not facts.get("queue"):
        why = "the queue can't be used, see above"
    elif level == "database" and not facts.get("database"):
        why = "the database can't be used, see above"
    elif level == "database" and not facts.get("workers"):
        why = "no worker applies the journal, so no call would ever be acknowledged"
    return Finding(f"durability {level}", "can't be kept" if why else "can be kept", why)
