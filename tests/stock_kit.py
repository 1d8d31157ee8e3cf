"""A shop for the stock tests: Engine and Stock on fakeredis or a real Redis, a ledger in plain Python that applies the journal, a
proxy that loses replies and holds requests, and a Redis server of one's own."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import fakeredis
import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from inventory_sdk.errors import OperationConflict
from inventory_sdk.ledger.protocol import (
    Balance,
    Credit,
    DirectAct,
    DirectAnswer,
    Entered,
    Entering,
    EpochClosed,
    OperationRow,
    ReservationRow,
    StockRow,
    Void,
    WritesStock,
)
from inventory_sdk.metrics.events import BatchSent, Event
from inventory_sdk.model import LEDGER_DELTAS, SEPARATOR, JournalEntry, JournalOperation, Line, Position, key_of
from inventory_sdk.redis_urls import cluster_client
from inventory_sdk.stock.batch import Publish
from inventory_sdk.stock.engine import Engine, StockSettings
from inventory_sdk.stock.journal import decode
from inventory_sdk.stock.partition import KEY_NAMES
from inventory_sdk.stock.stock import Stock
from inventory_sdk.stock.wire import script
from tests import cluster_kit
from tests.conftest import service_url

MERCHANT: Final = "m1"
SERVERS: Final = ["fakeredis", pytest.param("redis", marks=pytest.mark.redis)]
AND_CLUSTER: Final = [*SERVERS, pytest.param("cluster", marks=pytest.mark.cluster)]
"""For the tests that every way to reach Redis must pass; on a cluster each costs a tenth of a second more."""
FAILOVER_AT: Final = 30
"""So many shops of the contract tests are opened on the cluster before one of its replicas takes over."""


def lines(**quantities: int) -> list[Line]:
    """``lines(a=2, b=1)``."""
    return [Line(sku, quantity) for sku, quantity in quantities.items()]


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Return as soon as it holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


@dataclass
class Recorded:
    """A metrics sink. ``on_batch`` runs synchronously with every batch that was answered."""

    events: list[Event] = field(default_factory=list)
    on_batch: Callable[[BatchSent], None] | None = None

    def record(self, event: Event) -> None:
        self.events.append(event)
        if self.on_batch is not None and isinstance(event, BatchSent):
            self.on_batch(event)

    def batches(self) -> list[BatchSent]:
        return [event for event in self.events if isinstance(event, BatchSent)]


class FakeLedger:
    """Rows are [available, reserved]; ``pending`` credits are part of available, and not of what a load may bring."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}
        self.pending: dict[str, Credit] = {}
        self.entered: dict[str, tuple[str, Entered]] = {}
        self.operations: dict[str, OperationRow] = {}
        self.holds: dict[str, ReservationRow] = {}
        self.reads: list[tuple[str, ...]] = []
        self.entries = 0
        self.reading = 0
        self.most_reading = 0
        self.gate: asyncio.Event | None = None
        self.failure: Exception | None = None
        self.open_epochs: dict[int, int] = {}
        self._sequence = 0

    def stocked(self, merchant: str = MERCHANT, **available: int) -> None:
        """Rows that stand in the ledger and not yet in Redis."""
        for sku, quantity in available.items():
            self.rows[key_of(merchant, sku)] = [quantity, 0]

    @asynccontextmanager
    async def balances(self, partition: int, epoch: int, fields: Sequence[str]) -> AsyncIterator[Mapping[str, Balance]]:
        self.reads.append(tuple(fields))
        self.reading += 1
        self.most_reading = max(self.most_reading, self.reading)
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.failure is not None:
                raise self.failure
            if self.open_epochs.get(partition, epoch) != epoch:
                raise EpochClosed(f"epoch {epoch} is closed")
            yield {name: Balance(name, self.rows[name][0] - self._owed(name), self.rows[name][1]) for name in fields if name in self.rows}
        finally:
            self.reading -= 1

    def _owed(self, name: str) -> int:
        return sum(
            credit.lines[i + 1] for credit in self.pending.values() for i in range(0, len(credit.lines), 2) if credit.lines[i] == name
        )

    async def enter(self, partition: int, epoch: int, operations: Sequence[Entering], writes: Sequence[WritesStock] = ()) -> list[Entered]:
        self.entries += 1
        if self.open_epochs.get(partition, epoch) != epoch:
            raise EpochClosed(f"epoch {epoch} is closed")
        return [self._enter(partition, epoch, operation) for operation in operations]

    def _enter(self, partition: int, epoch: int, operation: Entering) -> Entered:
        known = self.entered.get(operation.key)
        if known is not None:
            if known[0] != operation.fingerprint:
                raise OperationConflict(operation.key.partition(SEPARATOR)[2])
            return replace(known[1], replayed=True)
        if operation.key in self.operations:
            raise OperationConflict(operation.key.partition(SEPARATOR)[2])
        self._sequence += 1
        position = Position(partition, 0, self._sequence)
        credit = Credit(position, epoch, operation.key, operation.lines) if operation.kind != "open" else None
        if credit is not None:
            self.pending[operation.key] = credit
        remaining = []
        for name, quantity in zip(operation.lines[::2], operation.lines[1::2], strict=True):
            self.rows.setdefault(name, [0, 0])[0] += quantity
            remaining.append(self.rows[name][0])
        entered = Entered(position, tuple(remaining), credit, False)
        self.entered[operation.key] = (operation.fingerprint, entered)
        return entered

    async def act(self, partition: int, act: DirectAct, writes: Sequence[WritesStock] = ()) -> DirectAnswer:
        """All stock of this ledger is sold in Redis."""
        return DirectAnswer("elsewhere")

    async def operation(self, key: str) -> OperationRow | None:
        return self.operations.get(key)

    async def reservation(self, key: str) -> ReservationRow | None:
        return self.holds.get(key)

    async def places(self, fields: Sequence[str], merchant: str | None = None) -> dict[str, str]:
        return {name: "redis" for name in (*fields, "") if name in self.rows or not name}

    async def live_holds(self, partition: int, fields: Sequence[str]) -> list[ReservationRow]:
        return []

    async def stock(self, fields: Sequence[str]) -> list[StockRow]:
        found = [(name.split(SEPARATOR), self.rows[name]) for name in fields if name in self.rows]
        return [StockRow(merchant, sku, available, reserved, 0, 0, 0, 0) for (merchant, sku), (available, reserved) in found]

    async def pending_voids(self, partition: int, epoch: int) -> list[Void]:
        return []

    # What a worker would do ------------------------------------------------------------------------------------------------

    def apply(self, entries: Sequence[JournalEntry]) -> None:
        """The journal's entries, in order, into rows, operations and reservations."""
        for entry in entries:
            for index, operation in enumerate(entry.operations):
                self._apply(entry, index, operation)

    def _apply(self, entry: JournalEntry, index: int, operation: JournalOperation) -> None:
        kind, flat = operation.kind, operation.lines
        moved = list(zip(flat[::2], flat[1::2], strict=True))
        position = Position(entry.partition, entry.epoch, entry.sequence)
        if kind == "credit":
            self.pending.pop(operation.reference, None)
            return
        if kind == "undo":
            of = json.loads(operation.extra)["of"]
            deltas = LEDGER_DELTAS[of].negated()
            del self.operations[operation.reference]
            if of == "reserve":
                del self.holds[operation.reference]
        else:
            deltas = LEDGER_DELTAS.get(kind)  # type: ignore[assignment]
        if deltas is not None:
            for name, quantity in moved:
                self.rows[name][0] += deltas.available * quantity
                self.rows[name][1] += deltas.reserved * quantity
        if kind == "reserve":
            flat_hold = tuple(value for name, quantity in moved for value in (name, quantity, quantity, 0, 0))
            self.holds[operation.key] = ReservationRow(
                operation.key, "held", operation.fingerprint, position, operation.order, operation.expires_at, False, flat_hold
            )
        elif kind in ("confirm", "release", "expire", "reacquire"):
            self._close(kind, operation.reference, dict(moved))
        elif kind in ("extend", "resume"):
            self.holds[operation.reference] = replace(self.holds[operation.reference], expires_at=operation.expires_at, pinned=False)
        elif kind == "tombstone":
            self.holds[operation.reference] = ReservationRow(operation.reference, "released", "", position, "", 0, False, ())
        if kind in ("reserve", "deduct", "adjust", "confirm", "release", "reacquire"):
            self.operations[operation.key] = OperationRow(
                position, index, operation.key, kind, operation.fingerprint, operation.order, operation.reference,
                tuple(flat), tuple(operation.remaining), "applied", False, entry.at_ms,
            )  # fmt: skip

    def extend(self, milliseconds: int) -> None:
        for key, hold in self.holds.items():
            if hold.state == "held" and hold.expires_at and not hold.pinned:
                self.holds[key] = replace(hold, expires_at=hold.expires_at + milliseconds)

    async def results(
        self, partition: int, since_ms: int, before: tuple[int, int, int] | None, size: int
    ) -> tuple[list[OperationRow], tuple[int, int, int] | None]:
        def place(row: OperationRow) -> tuple[int, int, int]:
            return row.at_ms, row.position.epoch, row.position.sequence

        rows = [row for row in self.operations.values() if row.at_ms >= since_ms and (before is None or place(row) < before)]
        rows.sort(key=place, reverse=True)
        found = [row for row in rows if place(row) >= place(rows[:size][-1])]
        return found, place(found[-1]) if len(found) < len(rows) else None

    def _close(self, kind: str, key: str, moved: dict[str, int]) -> None:
        hold = self.holds[key]
        flat = list(hold.lines)
        for at in range(0, len(flat), 5):
            quantity = moved.get(flat[at], 0)
            if kind != "reacquire":
                flat[at + 2] -= quantity
            flat[at + (4 if kind in ("release", "expire") else 3)] += quantity
        ended = not any(flat[2::5])
        state = {"confirm": "confirmed", "reacquire": "confirmed", "release": "released", "expire": "expired"}[kind]
        self.holds[key] = replace(hold, lines=tuple(flat), state=state if ended else "held")


class FakeRebuilding:
    """What ``Ledger.rebuilding`` gives a rebuild; ``opened`` when the ledger's side was committed."""

    def __init__(self, ledger: FakeLedger) -> None:
        self._ledger = ledger
        self.opened = False

    async def balances(self, size: int) -> AsyncIterator[Sequence[Balance]]:
        rows = [Balance(name, *numbers) for name, numbers in sorted(self._ledger.rows.items())]
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    async def reservations(self, size: int) -> AsyncIterator[Sequence[ReservationRow]]:
        rows = [row for row in self._ledger.holds.values() if row.state == "held"]
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    async def extend(self, milliseconds: int) -> None:
        self._ledger.extend(milliseconds)

    async def results(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        rows = [row for row in self._ledger.operations.values() if row.at_ms >= since_ms]
        rows.sort(key=lambda row: row.position, reverse=True)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]

    async def open(self) -> None:
        self.opened = True


@dataclass
class Shop:
    """One process on one stock."""

    client: Redis
    settings: StockSettings
    ledger: FakeLedger
    metrics: Recorded
    engine: Engine
    stock: Stock
    refusals: list[tuple[int, str]]

    def key(self, name: str, partition: int = 0) -> str:
        return self.engine.partitions[partition].key(name)

    async def open(self, epoch: int = 1) -> None:
        """Freeze and rebuild every partition under this epoch, from the ledger."""
        for partition in range(self.settings.partitions):
            await self.engine.upkeep.freeze(partition, epoch)
            await self.engine.upkeep.rebuild(partition, epoch, FakeRebuilding(self.ledger))

    async def snapshot(self, *, without: Sequence[str] = ()) -> dict[str, Any]:
        """All that Redis holds of this stock, by key."""
        client: Any = self.client
        found: dict[str, Any] = {}
        for partition in self.engine.partitions:
            for name in KEY_NAMES:
                if name in without:
                    continue
                key = partition.key(name)
                kind = await client.type(key)
                if kind == b"hash":
                    found[key] = await client.hgetall(key)
                elif kind == b"zset":
                    found[key] = await client.zrange(key, 0, -1, withscores=True)
                elif kind == b"stream":
                    found[key] = await client.xrange(key)
                elif kind != b"none":
                    found[key] = await client.get(key)
        return found

    async def journal(self, epoch: int = 1, partition: int = 0) -> list[JournalEntry]:
        rows = await self.engine.upkeep.read_journal(partition, epoch, 0, None, 100_000)
        return [decode(partition, epoch, sequence, body) for sequence, body in rows]

    async def run(self, *operations: list[Any], lane: str = "raw") -> list[list[Any]]:
        """The script's answers to these operations, sent as one batch in this order."""
        batcher = self.engine.batcher(self.engine.partitions[0], lane)
        batcher.alone = False
        answers = await asyncio.gather(*(batcher.submit(operation) for operation in operations))
        assert len({answered.position for _, answered in answers}) == 1, "they did not go as one batch"
        return [answer for answer, _ in answers]

    async def counters(self, sku: str, merchant: str = MERCHANT) -> tuple[int, int]:
        """(available, reserved)."""
        level = await self.stock.level(sku, merchant=merchant)
        return level.available, level.reserved

    async def make_due(self, reservation: str, merchant: str = MERCHANT) -> str:
        """Its time has come, by the ZSET's word."""
        key = key_of(merchant, reservation)
        assert await self.client.zadd(self.key("expiry"), {key: 1}, xx=True, ch=True) == 1
        return key

    async def expire(self, *reservations: str) -> None:
        """Time comes for these, and the worker expires them."""
        keys = [await self.make_due(name) for name in reservations]
        expired = await self.engine.upkeep.expire(0, keys)
        assert list(expired.keys) == keys

    async def wipe(self) -> None:
        for partition in self.engine.partitions:
            await self.client.delete(*(partition.key(name) for name in (*KEY_NAMES, "worker")))


async def _astray(shop: Shop) -> None:
    """What this shop knows of the cluster is wrong from now on."""
    cluster = cluster_kit.cluster()
    for partition in shop.engine.partitions:
        await partition.hello()
    cluster.opened += 1
    if cluster.opened == FAILOVER_AT:
        cluster.fail_over(cluster.owner(shop.key("meta")))
    for partition in shop.engine.partitions:
        cluster.move_empty(partition.key("meta"))
        partition.forget()


async def reached(*_: Any) -> None:
    """No durability beyond Redis in these tests."""
    return


def plain_client(url: str, **options: Any) -> Redis:
    """A client of its own that retries nothing."""
    return Redis.from_url(url, **{"retry": Retry(NoBackoff(), 0), "protocol": 2, **options})


_clusters: Final[WeakKeyDictionary[Any, Any]] = WeakKeyDictionary()
"""The cluster's client behind a shop's plain commands: a second process is made from that one."""


@asynccontextmanager
async def on_client(
    client: Redis,
    namespace: str,
    *,
    ledger: FakeLedger | None = None,
    merchant: str | None = MERCHANT,
    publish: Publish | None = None,
    opener: Any = None,
    **settings: Any,
) -> AsyncIterator[Shop]:
    """Engine and Stock on this client, which stays the caller's."""
    metrics, refusals = Recorded(), list[tuple[int, str]]()
    ledger = ledger or FakeLedger()
    chosen = StockSettings(namespace=namespace, **settings)
    client = _clusters.get(client, client)
    engine = Engine(client, ledger, chosen, metrics, publish, opener, lambda *why: refusals.append(why))  # type: ignore[arg-type]
    if engine.wire.client is not client:
        _clusters[engine.wire.client] = client
    stock = Stock(lambda: engine, merchant=merchant, durability=lambda: "redis", reach=reached)
    try:
        yield Shop(engine.wire.client, chosen, ledger, metrics, engine, stock, refusals)
    finally:
        await engine.close()


@asynccontextmanager
async def shop_on(server: str, namespace: str, stocked: Mapping[str, int] | None = None, **options: Any) -> AsyncIterator[Shop]:
    """An open shop on ``"fakeredis"``, ``"redis"``, ``"cluster"`` or a URL, with these SKUs in its ledger; Redis is left as it was
    found. On the cluster the slots have moved since the shop's map was read, and replicas take over in the middle of the run."""
    client: Any
    if server == "fakeredis":
        client = fakeredis.FakeAsyncRedis(protocol=2)
    elif server == "cluster":
        client = cluster_client(cluster_kit.cluster().url, 2.0)
    else:
        client = plain_client(service_url("redis") if server == "redis" else server)
    try:
        async with on_client(client, namespace, **options) as shop:
            shop.ledger.stocked(**(stocked or {}))
            if server == "cluster":
                await _astray(shop)
            await shop.open()
            try:
                yield shop
            finally:
                await shop.wipe()
    finally:
        await client.aclose()


# Servers that misbehave --------------------------------------------------------------------------------------------------------


@dataclass
class Fault:
    """What befalls a call of one script. ``lost``: executed, its reply never arrives. ``held``: it waits for ``go`` before Redis
    sees it. ``stranded``: the same, and its caller's connection breaks at once. ``swallowed``: Redis never sees it. ``times``: how
    many calls; None: all."""

    script: str
    what: Literal["lost", "held", "stranded", "swallowed"]
    times: int | None = 1
    happened: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """Redis has answered."""
    replies: list[bytes] = field(default_factory=list)
    count: int = 0


class Proxy:
    """Stands before Redis on loopback and reads requests; one command at a time per connection, as our scripts are sent."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 6379)
        self._path = parts.path
        self._faults: list[Fault] = []
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""
        self.calls: list[str] = []

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"redis://127.0.0.1:{port}{self._path}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        for fault in self._faults:
            fault.go.set()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def refuse(self) -> None:
        """Nobody gets in any more; connections that are open go on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def cut(self) -> None:
        """End all connections."""
        for task in self._tasks:
            task.cancel()

    def fault(self, script: str, what: Literal["lost", "held", "stranded", "swallowed"], times: int | None = 1) -> Fault:
        """The next call of this script (the next ``times``) meets this."""
        fault = Fault(script, what, times)
        self._faults.append(fault)
        return fault

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with suppress(asyncio.CancelledError, OSError, asyncio.IncompleteReadError):
            await self._serve(reader, writer)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_redis, to_redis = await asyncio.open_connection(*self._target)
        try:
            while True:
                raw, arguments = await _command(reader)
                fault = self._match(arguments)
                if fault is not None:
                    fault.happened.set()
                    if fault.what == "swallowed":
                        return
                    if fault.what == "stranded":
                        writer.close()
                    if fault.what in ("held", "stranded"):
                        await fault.go.wait()
                to_redis.write(raw)
                reply = await _reply(from_redis)
                if fault is not None:
                    fault.replies.append(reply)
                    fault.done.set()
                    if fault.what in ("lost", "stranded"):
                        return
                writer.write(reply)
        finally:
            to_redis.close()

    def _match(self, arguments: list[bytes]) -> Fault | None:
        names = ("batch", "hello", "read", "load", "freeze", "rebuild", "tidy", "suspect")
        digests = {script(name).digest.encode(): name for name in names}
        name = digests.get(arguments[1], "") if arguments[0].upper() == b"EVALSHA" else arguments[0].decode().upper()
        self.calls.append(name)
        for fault in self._faults:
            if fault.script == name and (fault.times is None or fault.count < fault.times):
                fault.count += 1
                return fault
        return None


async def _command(reader: asyncio.StreamReader) -> tuple[bytes, list[bytes]]:
    raw = await reader.readuntil(b"\r\n")
    arguments = []
    for _ in range(int(raw[1:])):
        head = await reader.readuntil(b"\r\n")
        body = await reader.readexactly(int(head[1:]) + 2)
        raw += head + body
        arguments.append(body[:-2])
    return raw, arguments


async def _reply(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n")
    kind, size = head[:1], head[1:-2]
    if kind in b"$=" and size != b"-1":
        return head + await reader.readexactly(int(size) + 2)
    if kind in b"*~>%" and size != b"-1":
        parts = [await _reply(reader) for _ in range(int(size) * (2 if kind == b"%" else 1))]
        return head + b"".join(parts)
    return head


@contextmanager
def own_redis(*options: str) -> Iterator[str]:
    """The URL of a Redis server of one's own, without persistence; skips where the program is not installed."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("no redis-server program")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder, *options]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            for line in server.stdout:
                if "Ready to accept connections" in line:
                    break
            else:
                raise RuntimeError("redis-server did not start")
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.kill()
            server.communicate()
