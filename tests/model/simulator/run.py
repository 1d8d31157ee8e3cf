"""One seed from its first process to the count at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Final
from unittest import mock

from inventory_sdk import inventory as inventory_module
from inventory_sdk import running as running_module
from inventory_sdk.inventory import Inventory
from inventory_sdk.metrics.events import Event, Retried
from inventory_sdk.model import Layout, Line
from inventory_sdk.stock import batch as batch_module
from inventory_sdk.stock import deciding as deciding_module
from inventory_sdk.stock import spanning as spanning_module
from inventory_sdk.stock import upkeep as upkeep_module
from inventory_sdk.sync import recovery as recovery_module
from inventory_sdk.sync import watermark as watermark_module
from inventory_sdk.sync.publish import Publisher
from tests.model.simulator import final
from tests.model.simulator.auditor import Attempt, Violation
from tests.model.simulator.broker import SimQueue
from tests.model.simulator.clock import BEGIN, SimTask, Stalled, disguised
from tests.model.simulator.ledger import SimLedger
from tests.model.simulator.redis import SimClient
from tests.model.simulator.scenario import Call, Scenario, flat_of
from tests.model.simulator.world import Process, World

RATES: Final = {
    "delayed": 0.05,
    "request_lost": 0.02,
    "request_held": 0.02,
    "reply_lost": 0.03,
    "publish_lost": 0.1,
    "publish_late": 0.08,
    "confirm_lost": 0.08,
    "duplicated": 0.1,
    "reordered": 0.2,
    "trickle": 0.3,
    "ack_lost": 0.05,
    "broker_away": 0.02,
    "database_gone": 0.01,
    "commit_broken": 0.04,
    "commit_unheard": 0.04,
    "caller_cancelled": 0.06,
    "replica_lags": 0.1,
    "struck": 0.05,
    "killed_here": 0.002,
    "giver_killed": 0.5,
    "giver_lost": 0.5,
}
FOCUSED: Final = (
    "delayed", "request_held", "reply_lost", "publish_lost", "publish_late", "confirm_lost", "ack_lost", "commit_broken", "commit_unheard",
)  # fmt: skip
EVENTS: Final = (
    "kill_caller",
    "kill_worker",
    "stop_worker",
    "redis_restarted",
    "redis_rolled_back",
    "redis_emptied",
    "redis_flushed",
    "failed_over",
    "broker_restarted",
    "broker_emptied",
    "database_restarted",
    "redis_full",
    "xadd_fails",
)
NAMESPACE: Final = "sim"
PUBLISH_TIMEOUT: Final = 1.5
WORKER: Final = {
    "idle": 0.4,
    "take_over": 3.0,
    "credit_grace": 1.0,
    "first_delay": 0.02,
    "longest_delay": 1.0,
    "rebind": 5.0,
    "publish_timeout": PUBLISH_TIMEOUT,
}
PATIENCE: Final = 400.0
"""Virtual seconds after the last fault within which everybody has an answer and all is quiet."""


@dataclass(frozen=True)
class Plan:
    """What a seed is like. ``rates``: chance per occasion; ``events``: kind and virtual second."""

    seed: int
    partitions: int
    callers: int
    workers: int
    calls: int
    span: float
    rates: dict[str, float]
    events: list[tuple[float, str]]
    faulty_start: bool
    spanning: float = 0.0
    copies: bool = False
    anonymous: bool = False
    scarce: bool = False
    redis_timeout: float = 0.5
    window: float = 86_400.0
    partition_by: str = "merchant"


def plan_of(seed: int) -> Plan:
    """Some seeds are calm, some have one kind of trouble, some all."""
    chance = random.Random(f"plan {seed}")
    mood = chance.random()
    rates: dict[str, float] = {"delayed": 0.05, "reordered": 0.2, "trickle": 0.3, "caller_cancelled": 0.05}
    events: list[tuple[float, str]] = []
    span = chance.uniform(3.0, 12.0)
    if mood > 0.08:
        share = chance.choice((0.15, 0.5, 1.0))
        for kind, rate in RATES.items():
            if chance.random() < share:
                rates[kind] = rate * chance.choice((0.3, 1.0, 2.5))
        kinds = [kind for kind in EVENTS if chance.random() < share]
        # What is confirmed survives the loss of Redis or of the broker, not of both.
        if any(kind.startswith(("redis_rolled", "redis_emptied", "redis_flushed", "failed")) for kind in kinds):
            kinds = [kind for kind in kinds if kind != "broker_emptied"]
        if chance.random() < 0.3:
            # One kind of trouble, far more often than the rest.
            rates[chance.choice(FOCUSED)] = 0.25
        if "broker_emptied" in kinds:
            rates.pop("struck", None)
            rates.pop("giver_lost", None)
        many = chance.choice((1, 2, 3, 5)) if kinds else 0
        events = [(chance.uniform(0.0, span), chance.choice(kinds)) for _ in range(many)]
    return Plan(
        seed=seed,
        partitions=chance.choice((1, 1, 2, 3)),
        callers=chance.randint(1, 3),
        workers=chance.choice((1, 1, 2)),
        calls=chance.choice((10, 25, 45)),
        span=span,
        rates=rates,
        events=sorted(events),
        faulty_start=chance.random() < 0.2,
        spanning=chance.choice((0.0, 0.3, 0.6)),
        copies=chance.random() < 0.3,
        anonymous=chance.random() < 0.12,
        scarce=chance.random() < 0.3,
        redis_timeout=chance.choice((0.5, 0.5, 0.5, 2.5)),
        window=15.0 if chance.random() < 0.03 else 86_400.0,
        partition_by=chance.choice(("merchant", "merchant", "sku")),
    )


class Sink:
    """Metrics of all processes."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.retried: Counter[str] = Counter()

    def record(self, event: Event) -> None:
        if isinstance(event, Retried):
            self.retried[event.what] += 1
            self._world.trace("retried", event.what, event.reason)


class SimServers:
    """Stands for ``Servers``: the doubles of one process."""

    embedded = False
    database = None
    redis = "redis://simulated"

    def __init__(self, process: Process) -> None:
        self.process = process
        self.queue = SimQueue(process, process.world.broker)

    def make_client(self) -> SimClient:
        return SimClient(self.process)

    def make_ledger(self, prefix: str, admission: str) -> SimLedger:
        return SimLedger(self.process, self.process.world.database)


@dataclass
class Result:
    """What became of a seed. ``violation`` is None when every promise was kept."""

    seed: int
    calls: int
    outcomes: Counter[str]
    injected: Counter[str]
    tolerated: Counter[str]
    violation: str | None = None
    lines: list[str] = field(default_factory=list)
    digest: int = 0


class Run:
    """The director."""

    def __init__(self, plan: Plan, tracing: bool) -> None:
        self.plan = plan
        self.layout = Layout(plan.partitions, plan.partition_by)
        rates = plan.rates if plan.faulty_start else {}
        self.world = World(plan.seed, rates, tracing, plan.copies, plan.anonymous)
        self.world.bereaved = self.bereaved
        self.world.forgets = plan.window if plan.window < 3600 else 0.0
        spanning = plan.spanning if plan.partitions > 1 else 0.0
        self.scenario = Scenario(random.Random(f"scenario {plan.seed}"), plan.partitions, spanning, plan.copies, plan.scarce)
        self.sink = Sink(self.world)
        self.callers: list[tuple[Process, Inventory]] = []
        self.workers: list[tuple[Process, Any]] = []
        self.calls: list[asyncio.Task[None]] = []
        self.numbers = count(1)
        self.names = count(1)
        self.starting = 0
        self.strikes = 2
        self.closing = False

    # Processes -------------------------------------------------------------------------------------------------------------------

    def _inventory(self, process: Process) -> Inventory:
        with mock.patch.object(inventory_module, "servers_for", return_value=SimServers(process)):
            made = Inventory(
                "redis://simulated",
                merchant=None,
                namespace=NAMESPACE,
                partitions=self.plan.partitions,
                partition_by=self.plan.partition_by,
                metrics=[self.sink],
                redis_timeout=self.plan.redis_timeout,
                results_window=self.plan.window,
                lanes={},
            )
        made._beside.clear()  # hotspots, links, comparison, …: they live beside the stock and are not played
        for name in ("lost", "rejected", "duplicate", "frozen", "recovered", "fork", "late_entry", "unreadable"):
            made._hooks.handlers.setdefault(name, []).append(lambda facts, name=name: self.world.auditor.told(name, facts))
        return made

    async def _started(self, process: Process) -> Inventory:
        """As a service would: a start that fails is tried again."""
        while True:
            inventory = self._inventory(process)
            try:
                await inventory.start()
            except Exception as error:  # noqa: BLE001 - whatever a start raises, a supervisor tries again
                self.world.trace("start failed", process.name, repr(error))
                await asyncio.sleep(0.2)
            else:
                self.world.trace("started", process.name)
                return inventory

    def begin_caller(self) -> None:
        if self.closing:
            return
        self.starting += 1
        process = Process(self.world, f"caller{next(self.names)}")

        async def live() -> None:
            self.callers.append((process, await self._started(process)))
            process.ready = True
            self.starting -= 1

        self.world.loop.begin(process, live(), process.name)

    def begin_worker(self) -> None:
        if self.closing:
            return
        self.starting += 1
        process = Process(self.world, f"worker{next(self.names)}")

        async def live() -> None:
            inventory = await self._started(process)
            worker = inventory._ready().make_worker(**WORKER)
            self.workers.append((process, (inventory, worker)))
            process.ready = True
            self.starting -= 1
            await worker.start()
            await worker.wait()

        self.world.loop.begin(process, live(), process.name)

    def bereaved(self, process: Process) -> None:
        """It died at one of its awaits; a supervisor starts another one."""
        if process.leaving:
            return  # it has its successor
        if not process.ready:
            self.starting -= 1
        begin = self.begin_worker if process.name.startswith("worker") else self.begin_caller
        self.world.later(self.world.random.uniform(0.1, 2.0), begin)

    # Calls -----------------------------------------------------------------------------------------------------------------------

    def call(self, call: Call, cancel: bool = True) -> Attempt | None:
        """Let some caller make it, as a task of its own."""
        living = [(process, inventory) for process, inventory in self.callers if not process.dead]
        if not living:
            return None
        process, inventory = self.world.random.choice(living)
        key = f"{call.merchant}\x1f{call.name}" if call.name is not None else None
        attempt = Attempt(
            next(self.numbers), call.kind, call.merchant, key, call.flat, call.level, process.name, self.world.loop.time(), bad=call.bad
        )
        task = self.world.loop.begin(process, self._make(process, inventory, call, attempt), f"call {attempt.number}")
        self.calls.append(task)
        if cancel and self.world.chance("caller_cancelled"):
            self.world.later(self.world.random.choice((0.0, 0.0005, 0.002, 0.02, 0.5)), lambda: process.dead or task.cancel())
        return attempt

    def _soon(self, call: Call) -> None:
        """Somebody is quick."""
        self.world.later(self.world.random.choice((0.0, 0.002, 0.01, 0.05)), lambda: self.call(call))

    async def _make(self, process: Process, inventory: Inventory, call: Call, attempt: Attempt) -> None:
        auditor = self.world.auditor
        auditor.asks(attempt)
        try:
            receipt = await self._perform(inventory, call)
        except asyncio.CancelledError:
            auditor.cancelled(attempt)
            raise
        except Violation:
            raise
        except Exception as error:  # noqa: BLE001 - the auditor judges it
            auditor.refused(attempt, error)
            return
        if receipt is None:
            attempt.state = "answered"
            return
        auditor.answered(attempt, receipt)
        self.scenario.accepted(call, receipt)
        if call.then is not None:
            self.scenario.calls.append(call.then)
            self._soon(call.then)
        if call.then is not None and call.then.rests and self.world.chance("giver_killed"):
            process.kill()
            self.bereaved(process)
        self._struck(call, receipt.durability)

    def _struck(self, call: Call, level: str) -> None:
        """At once after an answer: the worst that its level survives."""
        world = self.world
        if not self.strikes or level not in ("replica", "aof", "queue"):
            return
        if not (world.chance("struck") or (call.rests and world.chance("giver_lost"))):
            return
        self.strikes -= 1
        if level == "replica":
            world.fail_over(12, 0.3)
        elif level == "aof":
            world.crash_redis(12, 0.2)
        else:
            world.flush_redis()

    async def _perform(self, inventory: Inventory, call: Call) -> Any:
        stock = inventory.stock
        options: dict[str, Any] = dict(call.arguments)
        if call.level is not None:
            options["durability"] = call.level
        kind = call.kind
        if kind == "question":
            return await self._ask(inventory, call)
        if kind in ("undo", "keep"):
            assert call.receipt is not None
            key = f"{call.receipt.merchant}\x1f{call.receipt.operation_id}"
            if kind == "undo":
                self.world.auditor.undone[key] += 1
                self.world.trace("undone", await stock.undo(call.receipt))
            else:
                await stock.keep(call.receipt)
            return None
        if kind in ("confirm", "release"):
            if call.flat is not None:
                options["operation_id"] = call.name
            return await getattr(stock, kind)(options.pop("reservation"), merchant=call.merchant, **options)
        if kind == "extend":
            await stock.extend(options.pop("reservation"), merchant=call.merchant, **options)
            return None
        lines = options.pop("lines")
        return await getattr(stock, kind)(lines, merchant=call.merchant, operation_id=call.name, **options)

    async def _ask(self, inventory: Inventory, call: Call) -> None:
        what, stock = call.arguments["what"], inventory.stock
        if what == "level":
            level = await stock.level(call.arguments["sku"], merchant=call.merchant)
            total = sum(call.arguments["sku"] in skus for skus in self.scenario.supply.values())
            self.world.auditor.must(level.reserved >= 0 and total, f"{level} of {call.arguments['sku']!r}")
        elif what == "reservation":
            await stock.reservation(call.arguments["name"], merchant=call.merchant)
        elif what == "status":
            await stock.status(call.arguments["name"], merchant=call.merchant)
        else:
            await inventory.settled()

    # Misfortune -------------------------------------------------------------------------------------------------------------------

    def befall(self, kind: str) -> None:
        """One event of the plan."""
        world, chance = self.world, self.world.random
        if kind in ("kill_caller", "kill_worker"):
            pool: list[Any] = self.callers if kind == "kill_caller" else self.workers
            living = [process for process, _ in pool if not process.dead]
            if not living:
                return
            chance.choice(living).kill()
            begin = self.begin_caller if kind == "kill_caller" else self.begin_worker
            world.later(chance.uniform(0.1, 4.0), begin)
        elif kind == "stop_worker":
            living = [(process, parts) for process, parts in self.workers if not process.dead]
            if not living:
                return
            process, (inventory, worker) = chance.choice(living)
            self.workers = [each for each in self.workers if each[0] is not process]
            process.leaving = True

            async def stop() -> None:
                await worker.stop()
                await inventory.close()

            world.loop.begin(process, stop(), f"stop {process.name}")
            world.later(chance.uniform(0.1, 3.0), self.begin_worker)
        elif kind == "redis_restarted":
            world.crash_redis(0, chance.uniform(0.05, 2.0))
        elif kind == "redis_rolled_back":
            world.crash_redis(chance.randint(1, 12), chance.uniform(0.05, 2.0))
        elif kind == "redis_emptied":
            world.crash_redis(None, chance.uniform(0.05, 2.0))
        elif kind == "redis_flushed":
            world.flush_redis()
        elif kind == "failed_over":
            world.fail_over(chance.randint(0, 8), chance.choice((0.0, 0.3, 2.0)))
        elif kind == "broker_restarted":
            world.broker.restart()
        elif kind == "broker_emptied":
            world.broker.empty()
        elif kind == "database_restarted":
            world.database.restart(chance.uniform(0.1, 2.0))
        elif kind in ("redis_full", "xadd_fails"):
            server = world.redis
            server.trouble = b"full" if kind == "redis_full" else b"xadd"
            world.later(chance.uniform(0.1, 1.5), lambda: setattr(server, "trouble", b""))
        world.count(kind)

    def heal(self) -> None:
        """From now on nothing goes wrong any more."""
        world = self.world
        world.trace("heal")
        world.rates.clear()
        for process, _ in self.workers:
            if not process.dead:
                break
        else:
            self.begin_worker()
        if not any(not process.dead for process, _ in self.callers):
            self.begin_caller()

    # The story --------------------------------------------------------------------------------------------------------------------

    async def direct(self) -> None:
        plan, world, chance = self.plan, self.world, self.world.random
        for _ in range(plan.callers):
            self.begin_caller()
        for _ in range(plan.workers):
            self.begin_worker()
        if plan.faulty_start:
            world.later(4.0, world.rates.clear)  # the storm passes
        await self._until(lambda: bool(self.callers), "no caller ever started")
        await self._supply()
        if plan.faulty_start:
            await asyncio.sleep(max(0.0, BEGIN + 4.0 - world.loop.time()))
        world.rates.update(plan.rates)
        begun = world.loop.time()
        moments: list[tuple[float, Any]] = [(at, kind) for at, kind in plan.events]
        moments += [(chance.uniform(0.0, plan.span), None) for _ in range(plan.calls)]
        moments.sort(key=lambda each: each[0])
        for at, kind in moments:
            left = begun + at - world.loop.time()
            if left > 0:
                await asyncio.sleep(left)
            world.auditor.check()
            if kind is not None:
                self.befall(kind)
            else:
                for _ in range(chance.choice((1, 1, 1, 3))):
                    self.call(self.scenario.next())
                while self.scenario.soon:
                    self._soon(self.scenario.soon.pop())
        await asyncio.sleep(chance.uniform(0.0, 3.0))
        self.heal()
        await self._quiet()
        final.audit(world, plan.partitions)
        if world.forgets:
            await asyncio.sleep(2 * plan.window + 3.0)
        await self._repeat()
        await self._quiet()
        final.audit(world, plan.partitions)
        await self._close()

    async def _supply(self) -> None:
        for merchant, units in self.scenario.supply.items():
            lines = [Line(sku, quantity) for sku, quantity in units.items()]
            call = Call("restock", merchant, f"supply-{merchant}", {"lines": lines}, flat_of(lines, merchant))
            while True:
                attempt = self.call(call, cancel=False)
                if attempt is not None:
                    task: Any = self.calls[-1]
                    await self._until(lambda task=task: task.done() or task.process.dead, f"{attempt} waits for ever", step=0.01)
                    if attempt.state == "done":
                        break
                await asyncio.sleep(0.3)

    async def _repeat(self) -> None:
        """Every acknowledged take that stands is answered with its first receipt, or says that its hold is closed."""
        world = self.world
        known = [call for call in self.scenario.calls if call.name and call.kind in ("reserve", "deduct") and not call.bad]
        done = {attempt.key for attempt in world.auditor.attempts if attempt.state == "done"}
        chosen = [call for call in known if f"{call.merchant}\x1f{call.name}" in done]
        for call in world.random.sample(chosen, min(6, len(chosen))):
            key = f"{call.merchant}\x1f{call.name}"
            stands = key in world.database.tables.claims
            await self._until(lambda: any(not process.dead for process, _ in self.callers), "no caller lives")
            attempt = self.call(call, cancel=False)
            assert attempt is not None
            await self._until(lambda attempt=attempt: attempt.state != "running", f"{attempt} waits for ever", step=0.01)
            if stands and attempt.state == "done" and not world.forgets:
                assert attempt.receipt is not None
                world.auditor.must(attempt.receipt.replayed, f"{attempt} stands and was accepted again")

    async def _until(self, condition: Any, why: Any, patience: float = PATIENCE, step: float = 0.15) -> None:
        until = self.world.loop.time() + patience
        while not condition():
            self.world.auditor.check()
            if self.world.loop.time() > until:
                raise Violation(why() if callable(why) else why)
            await asyncio.sleep(step)

    async def _quiet(self) -> None:
        def waiting() -> list[Any]:
            return [task for task in self.calls if not task.done() and not task.process.dead]  # type: ignore[attr-defined]

        await self._until(lambda: not waiting(), lambda: f"waits for ever: {[task.get_name() for task in waiting()]}")
        self.world.auditor.check()
        for task in self.calls:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error
        calm = 0

        def quiet() -> bool:
            nonlocal calm
            calm = 0 if final.unquiet(self.world, self.layout) else calm + 1
            return calm > 2

        await self._until(quiet, lambda: f"never quiet: {final.unquiet(self.world, self.layout)}")

    async def _close(self) -> None:
        """Every process that lives ends in good order and leaves no task behind."""
        world = self.world
        self.closing = True
        await self._until(lambda: not self.starting, "a process never started")
        for process, (inventory, worker) in self.workers:
            if not process.dead:
                await self._ended(process, worker.stop(), "worker.stop()")
                await self._ended(process, inventory.close(), "inventory.close()")
        for process, inventory in self.callers:
            if not process.dead:
                await self._ended(process, inventory.close(), "inventory.close()")
        await asyncio.sleep(1.0)
        living = {process for process, _ in (*self.workers, *self.callers) if not process.dead}
        left = [task.get_name() for task in world.loop.living if task.process in living and not task.done()]
        world.auditor.must(not left, f"tasks are left: {left}")

    async def _ended(self, process: Process, work: Any, what: str) -> None:
        task = self.world.loop.begin(process, work, what)
        await asyncio.wait([task], timeout=60.0)
        self.world.auditor.must(task.done(), f"{what} of {process.name} does not end")
        task.result()


def run_seed(seed: int, tracing: bool = False) -> Result:
    """The whole of a seed; never raises for what the SDK did."""
    run = Run(plan_of(seed), tracing)
    violation = play(run)
    world = run.world
    attempts = world.auditor.attempts
    outcomes: Counter[str] = Counter(_outcome(attempt) for attempt in attempts)
    injected = world.injected + Counter({f"retried {what}": n for what, n in run.sink.retried.items()})
    digest = hash(tuple((a.kind, a.state, a.started, a.ended, str(a.receipt)) for a in attempts))
    return Result(seed, len(attempts), outcomes, injected, world.auditor.tolerated, violation, world.lines, digest)


def play(run: Run) -> str | None:
    """From the first process to the last; the promise that was broken, or None."""
    loop, world = run.world.loop, run.world
    violation: str | None = None
    with disguised(loop, world.seed), _same_every_time():
        try:
            loop.run_until_complete(loop.create_task(run.direct()))
        except Violation as broken:
            violation = str(broken)
        except Stalled as stalled:
            violation = f"stalled: {stalled}"
        except Exception as error:  # noqa: BLE001 - a seed ends with what went wrong
            violation = f"{type(error).__name__}: {error}"
            world.lines += traceback.format_exc().splitlines()
        finally:
            _tear_down(world)
    return violation


def _outcome(attempt: Attempt) -> str:
    if attempt.error is not None:
        return type(attempt.error).__name__
    if attempt.receipt is not None and attempt.receipt.replayed:
        return "replayed"
    return attempt.state


@contextmanager
def _same_every_time() -> Iterator[None]:
    """What modules keep between runs begins anew, and nothing is ordered by address."""
    logging.disable(logging.CRITICAL)
    with (
        mock.patch.object(batch_module, "_PROCESS", "sim"),
        mock.patch.object(batch_module, "_NUMBERS", count()),
        mock.patch.object(running_module, "Watermark", partial(watermark_module.Watermark, longest=0.3)),
        mock.patch.object(running_module, "open_first", partial(recovery_module.open_first, timeout=5.0, poll=0.3)),
        mock.patch.object(running_module, "from_url", lambda queue, *_, **__: queue),
        mock.patch.object(running_module, "Publisher", partial(Publisher, timeout=PUBLISH_TIMEOUT)),
        mock.patch.object(recovery_module, "PUBLISH_TIMEOUT", PUBLISH_TIMEOUT),
        # What takes minutes for the dead to be found takes seconds here, and what goes on for ever looks sooner.
        mock.patch.object(deciding_module, "PART_OVERDUE_MS", 4_000),
        mock.patch.object(spanning_module, "PART_OVERDUE_MS", 4_000),
        mock.patch.object(deciding_module, "LOOK_AGAIN_MS", 10_000),
        mock.patch.object(upkeep_module, "PIN_OVERDUE_MS", 4_000),
        mock.patch.object(watermark_module._Waiter, "__hash__", lambda waiter: hash(waiter.position), create=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _tear_down(world: World) -> None:
    """Dispose of what is left, the dead included, without letting it do anything any more."""
    loop = world.loop
    world.over = True
    world.rates.clear()
    loop.steps = 0
    for task in list(loop.living):
        if task.process is not None:
            task.process.dead = False
    for _ in range(50):
        left = [task for task in loop.living if not task.done()]
        if not left:
            break
        for task in left:
            task.cancel()
        stop = loop.create_task(asyncio.sleep(0.5))
        try:
            loop.run_until_complete(stop)
        except Stalled:
            break
    loop.run_until_complete(loop.create_task(_closed([task for task in loop.living if not task.done()])))
    loop.close()


async def _closed(tasks: list[SimTask]) -> None:
    """Tasks of killed processes whose next step was taken away: nothing can wake them any more."""
    for task in tasks:
        if task is asyncio.current_task():
            continue
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        with contextlib.suppress(RuntimeError):  # a ``finally`` that awaits
            task.get_coro().close()
