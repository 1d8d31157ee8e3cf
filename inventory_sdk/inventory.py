"""Inventory: makes the parts from URLs, starts and stops them, hands out the decorators."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self
from weakref import WeakKeyDictionary

from inventory_sdk.alerts.alerts import Alerts
from inventory_sdk.beside import Beside
from inventory_sdk.errors import InvalidOperation, InventoryError, NotStarted
from inventory_sdk.gray.aspect import GrayAspect
from inventory_sdk.gray.links import GrayLinks
from inventory_sdk.hotspot.aspect import HotspotAspect, OnReject
from inventory_sdk.hotspot.hotspots import Hotspots
from inventory_sdk.hotspot.rates import Overflow, make_rule
from inventory_sdk.ledger.protocol import Ledger, OperationRow
from inventory_sdk.metrics import Fanout, Metrics
from inventory_sdk.model import PARTITION_BY, Detection, Lane, Line, Position, Receipt, check_text
from inventory_sdk.reconcile.model import Reconcile
from inventory_sdk.reconcile.reconciler import Reconciler
from inventory_sdk.redistribute.coalesced import CoalesceAspect, Options
from inventory_sdk.redistribute.controller import Redistribution
from inventory_sdk.redistribute.policy import RedistributionPolicy
from inventory_sdk.redistribute.triggers import TriggerAspect
from inventory_sdk.running import LEDGER_TIMEOUT, Running
from inventory_sdk.selectors import Selector
from inventory_sdk.servers import servers_for
from inventory_sdk.stock.acts import LEVELS
from inventory_sdk.stock.admission import ADMISSIONS
from inventory_sdk.stock.batch import Answered
from inventory_sdk.stock.decorators import Now, StockDecorators
from inventory_sdk.stock.engine import Engine, StockSettings
from inventory_sdk.stock.stock import Durability, Stock
from inventory_sdk.sync.worker import Worker
from inventory_sdk.traffic.aspect import LaneAspect
from inventory_sdk.traffic.lanes import Lanes
from inventory_sdk.verify.aspect import Asked, Changes, Mode, VerifyAspect
from inventory_sdk.weave import site_of, weave

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster
    from sqlalchemy.ext.asyncio import AsyncEngine

MAX_PARTITIONS: Final = 4096
MAX_REPLICAS: Final = 16


class Inventory(StockDecorators):
    """The stock of one or many shops.

    ``redis``: a URL or a redis.asyncio client; ``"memory://"`` embeds everything, worker included. ``queue``: an ``amqp://`` URL;
    None: the journal in Redis is the queue. ``database``: a SQLAlchemy URL with an async driver, or an AsyncEngine. ``merchant``:
    for calls that name none; None: every call must. ``namespace``: what all Redis keys and queues begin with. ``partitions`` and
    ``partition_by`` are kept in the ledger and must be the same in every process: a merchant's stock stands in one partition, or with
    ``partition_by="sku"``, for one giant merchant, each SKU in its own. ``admission``: who sells the stock of merchants that are new to the
    ledger, ``"redis"`` or, under row locks, ``"database"``; ``stock.adopt`` and ``stock.withdraw`` change it; ``"auto"``: each SKU by the
    database until it is hot, then by Redis until it is cool, as ``detection`` says. ``durability``: for calls that name none; None:
    ``"queue"`` where one is configured, else ``"redis"``. ``replicas``: how many copies ``"replica"`` waits for. ``lanes`` by name;
    None: ``core`` and ``batch`` as a first guess. ``redistribution``: what coalesced functions may use, and what is slowed when the CPU
    runs short. ``metrics``: sinks; None: Prometheus' default registry. ``journal_cap``: entries of a partition's journal, each a batch
    of operations, at which takes are refused with ``JournalFull`` until the worker has caught up. ``gray_snapshot``: a file in which the
    last rules of the gray links are kept, for a start without Redis. ``reconcile``: when Redis, ledger and the service's tables are
    compared, where what is found is told, and how much may be corrected.

    Use it as ``async with inventory:``, nested as often as you like; connections belong to the event loop they were made in.
    """

    def __init__(
        self,
        redis: str | Redis | RedisCluster,
        *,
        queue: str | None = None,
        database: str | AsyncEngine | None = None,
        merchant: str | None = "default",
        namespace: str = "inventory",
        partitions: int = 1,
        partition_by: Literal["merchant", "sku"] = "merchant",
        admission: str = "redis",
        durability: Durability | None = None,
        replicas: int = 1,
        lanes: Mapping[str, Lane] | None = None,
        detection: Detection | None = None,
        redistribution: RedistributionPolicy | None = None,
        metrics: Sequence[Metrics] | None = None,
        table_prefix: str = "inventory_",
        redis_timeout: float = 2.0,
        results_window: float = 86_400.0,
        journal_cap: int = 1_000_000,
        gray_snapshot: str | os.PathLike[str] | None = None,
        reconcile: Reconcile | None = None,
    ) -> None:
        super().__init__()
        if type(partitions) is not int or not 1 <= partitions <= MAX_PARTITIONS:
            raise InvalidOperation("partitions", partitions, f"must be a whole number from 1 to {MAX_PARTITIONS}")
        if partition_by not in PARTITION_BY:
            raise InvalidOperation("partition_by", partition_by, f"must be one of {', '.join(PARTITION_BY)}")
        if partition_by != "merchant" and admission != "redis":
            raise InvalidOperation("admission", admission, f"with partition_by={partition_by!r} stock is admitted in Redis: 'redis'")
        if type(journal_cap) is not int or journal_cap < 2:
            raise InvalidOperation("journal_cap", journal_cap, "must be a whole number of at least 2 entries")
        check_text("namespace", namespace)
        if set(namespace) & set("{}:"):
            raise InvalidOperation("namespace", namespace, "must not contain braces or colons: they belong to the Redis keys")
        if admission not in ADMISSIONS:
            raise InvalidOperation("admission", admission, f"must be one of {', '.join(ADMISSIONS)}")
        if durability is not None and durability not in LEVELS:
            raise InvalidOperation("durability", durability, f"must be one of {', '.join(LEVELS)}")
        if type(replicas) is not int or not 1 <= replicas <= MAX_REPLICAS:
            raise InvalidOperation("replicas", replicas, f"must be a whole number from 1 to {MAX_REPLICAS}")
        self._servers = servers_for(redis, queue, database)
        self.alerts = Alerts(namespace, lambda: self.stock)
        self._metrics = Fanout([*_sinks(metrics), self.alerts])
        declared = lanes if lanes is not None else {"core": Lane(), "batch": Lane(max_concurrency=4)}
        self.lanes = Lanes(declared, self._metrics)
        self._settings = StockSettings(
            namespace=namespace,
            partitions=partitions,
            partition_by=partition_by,
            redis_timeout=redis_timeout,
            results_window=results_window,
            journal_cap=journal_cap,
            replicas=replicas,
            connections=self.lanes.connections(),
            admission=admission,
        )
        self._prefix = table_prefix
        self._merchant = merchant
        self._durability: str | None = durability
        self._ledger_part = self._servers.make_ledger(table_prefix, self._new_stock())
        self.hotspots = Hotspots(detection or Detection(), self.lanes, self._default_merchant, auto=admission == "auto")
        for name in redistribution.slows if redistribution is not None else ():
            self.lanes.declared(name)
        self.redistribution = Redistribution(redistribution, self.lanes)
        self._beside: list[Beside] = [self.alerts, self.hotspots, self.redistribution]
        self._here: dict[asyncio.AbstractEventLoop, Running] = {}  # asked at every call: a weak one costs ten times as much
        self._uses: WeakKeyDictionary[asyncio.AbstractEventLoop, int] = WeakKeyDictionary()
        self._changing: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()
        settings = reconcile if reconcile is not None else Reconcile()
        hooks = self._hooks
        self.reconciler = Reconciler(settings, lambda: self.stock, lambda: hooks.reads_stock, hooks.writes_stock, lambda: self._merchant)
        self._beside.append(self.reconciler)
        self.stock = Stock(self._engine, merchant=merchant, durability=self._default_durability, reach=self._reach, keeps=self._keeps)
        self.gray_links = GrayLinks(self._default_merchant, self.stock, self._metrics, gray_snapshot)
        self._registry.runner = self.gray_links.run_later
        self._beside.append(self.gray_links)

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """From INVENTORY_REDIS_URL, INVENTORY_QUEUE_URL, INVENTORY_DATABASE_URL, INVENTORY_MERCHANT, INVENTORY_NAMESPACE,
        INVENTORY_PARTITIONS, INVENTORY_PARTITION_BY and INVENTORY_DURABILITY; keyword arguments win."""
        arguments: dict[str, Any] = {}
        for name, variable in (
            ("redis", "INVENTORY_REDIS_URL"),
            ("queue", "INVENTORY_QUEUE_URL"),
            ("database", "INVENTORY_DATABASE_URL"),
            ("merchant", "INVENTORY_MERCHANT"),
            ("namespace", "INVENTORY_NAMESPACE"),
            ("partitions", "INVENTORY_PARTITIONS"),
            ("partition_by", "INVENTORY_PARTITION_BY"),
            ("durability", "INVENTORY_DURABILITY"),
        ):
            value = os.environ.get(variable)
            if value:
                arguments[name] = value
        if "partitions" in arguments:
            text = arguments["partitions"]
            if not text.isdecimal():
                raise InvalidOperation("INVENTORY_PARTITIONS", text, "must be a whole number")
            arguments["partitions"] = int(text)
        arguments.update(overrides)
        if "redis" not in arguments:
            raise InvalidOperation("INVENTORY_REDIS_URL", None, "set it to redis://host:port/db, or to memory:// to embed everything")
        return cls(**arguments)

    # Life --------------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Connect in this event loop. Counted: each ``start`` wants its ``close``."""
        loop = asyncio.get_running_loop()
        async with self._changing.setdefault(loop, asyncio.Lock()):
            if loop not in self._here:
                for other in [other for other in self._here if other.is_closed()]:
                    del self._here[other]  # it was not left in an orderly way
                running = Running(
                    self._servers, self._ledger_part, self._settings, self._metrics, self._hooks, self._registry, self._beside
                )
                try:
                    await running.start()
                    if self._durability is not None and running.open:
                        await running.keeps(self._durability)
                except BaseException:
                    await running.close()
                    raise
                self._here[loop] = running
            self._uses[loop] = self._uses.get(loop, 0) + 1

    async def close(self) -> None:
        """The counterpart of ``start``; the last one waits for what is under way and disconnects."""
        loop = asyncio.get_running_loop()
        async with self._changing.setdefault(loop, asyncio.Lock()):
            if loop not in self._here:
                raise NotStarted
            self._uses[loop] -= 1
            if self._uses[loop]:
                return
            running = self._here[loop]
            try:
                await self._afterwards.drain()
                await running.close()
            finally:
                self.lanes.flush()
                del self._here[loop], self._uses[loop]
        if running.failure is not None:
            raise InventoryError(f"a background task of the inventory died: {running.failure!r}") from running.failure

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def create_schema(self) -> None:
        """Make the ledger's tables where they are missing, and open the stock."""
        running = self._running()
        await running.ledger.create_schema()
        async with self._changing[asyncio.get_running_loop()]:
            await running.open_stock()

    @property
    def ledger(self) -> Ledger:
        """The SQL truth: balances, operations, ``verify()``."""
        return self._ledger_part

    async def settled(self, receipt: Receipt | None = None, *, timeout: float = LEDGER_TIMEOUT) -> None:
        """Returns once the ledger has applied what is journaled now, or this receipt. ``DurabilityNotReached`` after ``timeout``
        seconds, and at once where no worker has given a sign of life for ten."""
        running = self._ready()
        if receipt is not None:
            positions = [position for position in receipt.positions if position.epoch]
        else:
            positions = []
            for partition in running.engine.partitions:
                hello = await partition.hello()
                if hello.epoch and hello.sequence:
                    positions.append(Position(partition.number, hello.epoch, hello.sequence))
        await running.watermark.settled(positions, timeout)

    @asynccontextmanager
    async def worker(self, *, variant: str | None = None, **options: Any) -> AsyncIterator[Worker]:
        """Apply the journal to the ledger, expire holds, run later-functions, in this event loop, until the block ends.

        ``variant``: run later-functions of merchants on this side of the link only (``gray_links.split_workers``); None: of all.
        ``options`` as for ``sync.worker.Worker``. In ``memory://`` a worker runs inside already.
        """
        async with self, self._ready().make_worker(serves=self.gray_links.serves(variant), **options) as worker:
            yield worker

    @asynccontextmanager
    async def replaced(
        self,
        *,
        redis: str | Redis | RedisCluster = "memory://",
        database: str | AsyncEngine | None = None,
        queue: str | None = None,
        stock: Mapping[str, Mapping[str, int]] | None = None,
    ) -> AsyncIterator[Self]:
        """For tests: this same object, decorators included, on other servers, with a worker inside, stocked with
        ``{merchant: {sku: units}}``. What was there is back afterwards."""
        servers = servers_for(redis, queue, database or "sqlite+aiosqlite://", embedded=True)
        kept = self._servers, self._ledger_part, self._here, self._uses
        self._servers = servers
        self._ledger_part = servers.make_ledger(self._prefix, self._new_stock())
        self._here, self._uses = {}, WeakKeyDictionary()
        try:
            async with self:
                for merchant, units in (stock or {}).items():
                    lines = [Line(sku, quantity) for sku, quantity in units.items()]
                    await self.stock.restock_many(lines, merchant=merchant, operation_id="replaced")
                yield self
        finally:
            self._servers, self._ledger_part, self._here, self._uses = kept

    def hotspot(
        self,
        *,
        threshold: str,
        limit: str,
        max_wait: float = 0.3,
        keys: Selector | None = None,
        overflow: Overflow = "queue",
        on_reject: OnReject | None = None,
    ) -> Now:
        """Calls of a key that is called ``threshold`` times (``"200/second"``), by all processes together, are let through at ``limit``,
        one after the other, each key in a line of its own; a call that would wait longer than ``max_wait`` seconds is refused.

        ``keys``: a selector of one key or several; None: the SKUs of the function's stock decorator. ``overflow="reject"``: nobody
        waits. ``on_reject`` gets the ``HotspotLimited``; what it answers, or awaits, is the call's result. Calls of keys that are not
        hot pay nothing. Raises ``HotspotLimited`` with the seconds after which there is room.
        """
        rule = make_rule(threshold, limit, max_wait, overflow)
        aspect = HotspotAspect(self.hotspots, rule, keys, on_reject)

        def decorate(function: Any) -> Any:
            woven = weave(function, aspect)
            self.hotspots.declare(rule.threshold)
            return woven

        return decorate

    def lane(self, name: str, *, lines: Selector | None = None) -> Now:
        """The function runs in a lane: in one of its slots, within its timeout, refused at the door when it is too full.

        ``lines`` is a selector of what makes the timeout longer (``timeout_per_line``): a collection or a number; without it the
        lines of the function's stock decorator do. Raises ``LaneFull``, ``LaneNotServed``, ``DeadlineExceeded``.
        """
        aspect = LaneAspect(self, self.lanes.declared(name), lines)

        def decorate(function: Any) -> Any:
            return weave(function, aspect)

        return decorate

    def verifies(
        self,
        *,
        lines: Selector | None = None,
        sku: Selector | None = None,
        quantity: Selector | int | None = None,
        line_merchant: Selector | None = None,
        merchant: Selector | None = None,
        by: int | Mapping[str, int] = -1,
        log: Literal["signed", "unsigned"] | None = "signed",
        changes: Changes = "recorded",
        session: Selector | None = None,
        mode: Mode = "enforce",
    ) -> Now:
        """The function moves each of its lines by exactly its quantity, writes the change-log row of each, and moves nothing else;
        or ``QuantityMismatch`` is raised, inside its transaction.

        Lines are named as in the stock decorators. ``by``: what one unit of a line does, −1 for a take. ``changes`` says how it is
        known what was done: ``"recorded"`` with ``record_change`` beside each write; ``"returned"``, or a function of the result,
        as ``Change`` objects; ``WatchedTables(…)`` by watching the session, and then ``by`` is ``{column: units}``. ``session``: a
        selector of the AsyncSession whose commit has to wait for the verdict. ``log``: whether the change log's quantities have a
        sign; None: there is no change log. ``mode="observe"`` counts and tells ``on("mismatch")`` without refusing.

        Works with or without stock decorators, and on an Inventory that is not started.
        """
        told = Asked(
            lines=lines, sku=sku, quantity=quantity, line_merchant=line_merchant, merchant=merchant,
            by=by, log=log, changes=changes, session=session, mode=mode,
        )  # fmt: skip
        aspect = VerifyAspect(self, told)

        def decorate(function: Any) -> Any:
            return weave(function, aspect)

        return decorate

    def gray(self, link: str, *, candidate: str | Callable[..., Any], merchant: Selector | None = None) -> Now:
        """Calls of merchants on the link's candidate go to ``candidate``, an async function of the same signature (for methods: the name
        of one, or a function that takes ``self``); see ``gray_links``. A plain candidate runs inside this function's other aspects.

        ``merchant``: a selector; without it the stock decorator's, else the request's, else the Inventory's. ``TypeError`` at
        ``start()`` for a candidate that does something else to stock, or can't be called alike.
        """

        def decorate(function: Any) -> Any:
            aspect = GrayAspect(self.gray_links, link, candidate, merchant)
            woven = weave(function, aspect)
            self.gray_links.declare(aspect)
            return woven

        return decorate

    def coalesce(
        self,
        *,
        key: Selector,
        debounce: float = 0.2,
        max_wait: float = 2.0,
        executor: Literal["loop", "process"] = "loop",
        timeout: float = 60.0,
        cpu_budget: float | None = None,
        key_cpu_budget: float | None = None,
        name: str | None = None,
    ) -> Now:
        """Calls with the same ``key`` become one run: at most one is running and one waiting per key, in all processes together.

        A run begins ``debounce`` seconds after the last call, and no later than ``max_wait`` after the first one that waits, with the
        arguments of the last one. The caller gets the result of a run that started after its call, or ``RecalculationFailed``; if it
        is cancelled the run goes on. ``executor``: in the event loop, or in a process, which is killed after ``timeout`` seconds
        (``RecalculationCutOff``). ``cpu_budget``: share of this process' CPUs for all of its runs on the average, ``key_cpu_budget``
        for those of one key. ``name`` is what it is called in Redis; None: its module and name.

        For functions and staticmethods with annotations that JSON can hold: another process may run them.
        """
        options = Options(key, debounce, max_wait, executor, timeout, cpu_budget, key_cpu_budget, name)

        def decorate(function: Any) -> Any:
            aspect = CoalesceAspect(self.redistribution, options)
            woven = weave(function, aspect)
            assert aspect.function is not None
            self.redistribution.add(aspect.function)
            return woven

        return decorate

    def trigger(self, name: str, *, runs: Callable[..., Awaitable[Any]], key: Selector | None = None) -> Now:
        """Whenever the function has returned, a run of ``runs`` is asked for, which ``@inventory.coalesce`` decorates. The caller does
        not wait for the run. ``redistribution.triggers()`` tells what it costs under this ``name``.

        The run's arguments are the function's parameters of the same names; ``key`` is a selector for the one that is the run's key.
        """
        aspect = TriggerAspect(self.redistribution, name, runs, key)

        def decorate(function: Any) -> Any:
            woven = weave(function, aspect)
            site = site_of(woven)
            assert site is not None
            self.redistribution.add_trigger(name, aspect.runs, site.label)
            return woven

        return decorate

    # The parts, as they are now --------------------------------------------------------------------------------------------------

    def _running(self) -> Running:
        running = self._here.get(asyncio.get_running_loop())
        if running is None:
            raise NotStarted
        return running

    def _ready(self) -> Running:
        running = self._running()
        if running.failure is not None:
            raise InventoryError(f"a background task of the inventory died: {running.failure!r}") from running.failure
        if not running.open:
            raise NotStarted("the ledger has no schema yet (await inventory.create_schema()), so the stock")
        return running

    def _engine(self) -> Engine:
        return self._ready().engine

    def _default_durability(self) -> str:
        running = self._running()
        if self._durability is None or (self._servers.embedded and self._durability == "queue"):
            return running.default_durability
        return self._durability

    async def _reach(self, _: Engine, position: Position, level: str, key: str, batch: Answered | None) -> OperationRow | None:
        return await self._ready().reach(position, level, key, batch)

    async def _keeps(self, _: Engine, level: str) -> None:
        await self._running().keeps(level)

    def _stock_acts(self) -> Stock:
        self._running()
        return self.stock

    def _task_route(self, merchant: str) -> str:
        return self.gray_links.route(merchant)

    def _ledger(self) -> Ledger:
        return self._ledger_part

    def _new_stock(self) -> str:
        """Who sells what is new to the ledger."""
        return "database" if self._settings.admission == "auto" else self._settings.admission

    def _default_merchant(self) -> str | None:
        return self._merchant

    async def _tell(self, name: str, facts: Mapping[str, Any]) -> None:
        await self._hooks.tell(name, facts)


def _sinks(metrics: Sequence[Metrics] | None) -> Sequence[Metrics]:
    if metrics is not None:
        return metrics
    from inventory_sdk.metrics.prometheus import PrometheusMetrics

    return [PrometheusMetrics()]
