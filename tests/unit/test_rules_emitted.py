"""No shipped rule and no panel is about a series that nobody emits: the parts themselves are run into what each rule is about, and what
they tell the metrics is looked for by the rules' own selectors."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any, NamedTuple, cast

import pytest
import yaml
from fakeredis import FakeAsyncRedis
from prometheus_client import CollectorRegistry

from inventory_sdk import Change, Detection, Inventory, Lane, Line, QuantityMismatch, RecalculationCutOff, RecalculationFailed
from inventory_sdk.alerts.alerts import Alerts
from inventory_sdk.alerts.rules import Available, Counting, Finding, Sums
from inventory_sdk.gray.guard import GuardJob
from inventory_sdk.gray.rules import Guard
from inventory_sdk.gray.samples import Samples, Tally
from inventory_sdk.hotspot.promotion import Promotion
from inventory_sdk.ledger.protocol import LedgerUnavailable, ReservationRow, Task
from inventory_sdk.metrics.prometheus import PrometheusMetrics
from inventory_sdk.model import Movement, Position, Receipt, key_of
from inventory_sdk.reconcile.model import Reconcile
from inventory_sdk.reconcile.schedule import MEMORY, Schedule
from inventory_sdk.reconcile.sinks.protocol import Document, SinkRefused
from inventory_sdk.redistribute.governor import Governor
from inventory_sdk.redistribute.policy import RedistributionPolicy
from inventory_sdk.stock.parts import part_key
from inventory_sdk.sync.publish import Publisher
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.queues.protocol import Message, PublishFailed
from tests.gray_kit import Places, links, watch_of
from tests.redistribution_kit import UNSLOWED
from tests.worker_fakes import Shop, body, open_shop, until

RULES: dict[str, Any] = yaml.safe_load(files("inventory_sdk.metrics").joinpath("monitoring", "rules.yaml").read_text())
RECORDED = {rule["record"]: "inventory_events_total" for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
SELECTORS = [
    (rule.get("alert", rule.get("record")), selector)
    for group in RULES["groups"]
    for rule in group["rules"]
    for selector in re.findall(r"\binventory[\w:]*(?:\{[^}]*\})?", re.sub(r"by \([^)]*\)|on \([^)]*\)", "", rule["expr"]))
]


class Part(NamedTuple):
    """One sample of a registry."""

    name: str
    labels: Mapping[str, str]


def alternatives(pattern: str) -> list[str]:
    """Of ``a|b`` each must be emitted by somebody; other patterns stand for themselves."""
    return pattern.split("|") if re.fullmatch(r"\w+(\|\w+)+", pattern) else [pattern]


def wanted(selector: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(series, patterns by label), one for each alternative."""
    name, _, inside = selector.partition("{")
    found: list[dict[str, str]] = [{}]
    for label, equal, value in re.findall(r'(\w+)(=~?)"([^"]*)"', inside):
        values = alternatives(value) if equal == "=~" else [re.escape(value)]
        found = [{**each, label: value} for each in found for value in values]
    for each in found:
        yield RECORDED.get(name, name), each


# The parts, each in a run of its own -----------------------------------------------------------------------------------------------------


async def synchronised(act: Callable[[Shop], Awaitable[None]], sink: PrometheusMetrics) -> None:
    """Something happens to a worker; its events go to the sink."""
    shop = await open_shop()
    await act(shop)
    for event in shop.facts.events:
        sink.record(event)


async def refused_by_the_ledger(shop: Shop) -> None:
    shop.ledger.refuse = {1: "duplicate", 2: "insufficient"}
    for sequence in range(1, 4):
        shop.redis.write(sequence)
    async with shop.worker():
        await shop.publish(1, 1, 2, 3)
        await until(lambda: len(shop.redis.voided) == 2 and any(type(event).__name__ == "Behind" for event in shop.facts.events))


async def forgotten_by_redis(shop: Shop) -> None:
    shop.redis.write(1)
    async with shop.worker() as worker:
        await worker.ready()
        shop.redis.write(3)  # nobody has the second
        await until(lambda: "recovered" in shop.facts.names() and "lost" in shop.facts.names())


async def forked(shop: Shop) -> None:
    shop.redis.write(1)
    async with shop.worker():
        await until(lambda: shop.ledger.watermark() == 1)
        await shop.publish(1, text=body(1, nonce="another"))
        await until(lambda: "fork" in shop.facts.names())


async def unreadable(shop: Shop) -> None:
    shop.redis.write(1, '{"v": 99}')
    async with shop.worker():
        await until(lambda: "unreadable" in shop.facts.names())


async def writes_stock_fails(shop: Shop) -> None:
    async def write(moves: Sequence[Movement], session: Any) -> None:
        raise ValueError("no such product")

    shop.redis.write(1)
    async with shop.worker(writes_stock=[write]) as worker:
        await until(lambda: "writes_stock_failed" in shop.facts.names())
        await worker.stop(timeout=0.01)


async def later_function_fails(shop: Shop) -> None:
    class Registry:
        async def run(self, task: Task, session: Any, receipt: Receipt) -> None:
            raise ValueError("no such order")

    what = {"kind": "reserve", "merchant": "m", "operation_id": "o1", "order": "g"}
    receipt = {**what, "lines": [], "remaining": [], "position": [0, 1, 1]}
    shop.ledger.tasks[1] = Task(1, "write_order", 1, "{}", "g", "o1", "m", 0, json.dumps(receipt))
    async with shop.worker(tasks=Registry(), task_attempts=2, first_task_retry=0.001):
        await until(lambda: "dead_letter" in shop.facts.names())


async def task_dies(shop: Shop) -> None:
    async def bug(task: object) -> None:
        raise ZeroDivisionError

    worker = shop.worker()
    worker._rooms[0][1]._stay = bug  # type: ignore[method-assign]
    await worker.start()
    with suppress(ZeroDivisionError):
        await worker.wait()
    await worker.stop()


async def announcements_fail(shop: Shop) -> None:
    async def refuse(messages: Sequence[Message]) -> None:
        raise ConnectionError("no exchange")

    shop.queue.announce = refuse  # type: ignore[method-assign]
    shop.redis.write(1)
    worker = shop.worker()
    await worker.start()
    await until(lambda: "announce" in shop.facts.retried())
    await worker.stop(timeout=0.01)


async def holds_stay(shop: Shop) -> None:
    async def resolve_part(partition: int, key: str, journaled: str | None = None) -> bool:
        return False

    shop.redis.resolve_part = resolve_part  # type: ignore[attr-defined]
    shop.redis.pinned = [part_key("m\x1fo1", 0)]
    shop.ledger.stale = [ReservationRow("m\x1fr1", "held", "f", Position(0, 1, 1), "order-1", 0, False, ("m\x1fa", 1, 1, 0, 0))]
    async with shop.worker():
        await until(lambda: {"stale", "part_waits"} <= set(shop.facts.names()))


async def publishing(sink: PrometheusMetrics) -> None:
    class Deaf(MemoryQueue):
        async def publish(self, partition: int, epoch: int, sequence: int, *_: Any, **__: Any) -> None:
            if sequence == 2:
                raise PublishFailed("nothing came back")

    publisher = Publisher(Deaf(), sink)
    for sequence in (1, 2):
        with suppress(PublishFailed):
            await publisher.confirmed(publisher.publish(0, 1, sequence, "body"))
    await publisher.close()


class Deaf:
    """A sink of comparisons that is away, and then refuses."""

    name = "mine"

    def __init__(self) -> None:
        self.times = 0

    async def start(self, ground: Any) -> None: ...

    async def write(self, documents: Sequence[Document]) -> None:
        self.times += 1
        if self.times == 1:
            raise ConnectionError
        raise SinkRefused([each.id for each in documents], "not this")

    async def close(self) -> None: ...


async def comparing(sink: PrometheusMetrics) -> None:
    settings = Reconcile(sinks=[Deaf()], every=None, whole_every=None, settle=0.01)
    async with Inventory("memory://", metrics=[sink], reconcile=settings) as inventory:
        await inventory.stock.restock([Line("a", 5), Line("b", 5)], operation_id="po")
        running = inventory._running()
        client: Any = running.client
        for sku in "ab":
            await client.hincrby(running.engine.partitions[0].key("available"), key_of("default", sku), 1)
            await inventory.reconciler.run()
        ledger: Any = inventory.ledger
        await ledger.register.remember(MEMORY, {"touched": time.time() - 9000, "whole": time.time()})
        compared = asyncio.Event()

        async def compare(whole: bool) -> None:
            compared.set()

        async def caught_up() -> bool:
            return True

        stopping = asyncio.Event()
        working = asyncio.create_task(Schedule(running.ground, Reconcile(), compare, caught_up).run(stopping))
        await compared.wait()
        stopping.set()
        await working


async def selling(sink: PrometheusMetrics) -> None:
    lanes = {"core": Lane(max_concurrency=1, max_queue=1, max_wait=5.0, timeout=0.05)}
    async with Inventory("memory://", metrics=[sink], lanes=lanes, merchant="m1") as inventory:
        await inventory.stock.restock([Line("a", 100)], operation_id="po")

        @inventory.lane("core")
        @inventory.hotspot(threshold="100/second", limit="20/second", max_wait=0.15)
        @inventory.deducts(run="now", sku="sku", quantity=1, operation_id="order")
        async def buy(order: str, sku: str, seconds: float = 0.0) -> None:
            await asyncio.sleep(seconds)

        @inventory.hotspot(threshold="100/second", limit="20/second", max_wait=0.15, keys="key")
        async def look(key: str) -> None: ...

        await asyncio.gather(*(buy(f"o{number}", "a", 0.01) for number in range(4)), return_exceptions=True)
        await asyncio.gather(buy("slow", "a", 1.0), return_exceptions=True)
        watch = inventory.hotspots.here().watch(100.0)
        watch.hot["hot"] = 1.0
        await asyncio.gather(*(look("hot") for _ in range(20)), return_exceptions=True)
        running = inventory._running()

        async def breaks() -> None:
            raise ZeroDivisionError

        await asyncio.wait([running.engine.in_background(breaks(), "undo of o1")])


async def verifying(sink: PrometheusMetrics) -> None:
    inventory = Inventory("memory://", metrics=[sink])

    @inventory.verifies(lines="lines", changes="returned")
    async def take(lines: Mapping[str, int]) -> list[Change]:
        return [Change("a", -1, -1)]

    with suppress(QuantityMismatch):
        await take({"a": 2})


async def promoting(sink: PrometheusMetrics) -> None:
    options: dict[str, Any] = {"database": "sqlite+aiosqlite://", "admission": "auto", "merchant": "m1"}
    detection = Detection(stay=600.0, promote="1000000/second")
    async with Inventory(FakeAsyncRedis(), metrics=[sink], detection=detection, **options) as inventory:
        await inventory.create_schema()
        mover = cast("Promotion", inventory.hotspots.here().promotion)
        mover._detector.watch("s", 1e6).hot["m1\x1fa"] = 1.0

        async def away(*_: object) -> None:
            raise LedgerUnavailable("disconnected", OSError())

        mover._ground.ledger.joined = away  # type: ignore[method-assign, assignment]
        await mover.move()


async def graying(sink: PrometheusMetrics) -> None:
    guard = Guard(interval=60, minimum_samples=10, error_ratio=2, error_floor=0.01, latency_ratio=1.5, max_merchants=3)
    who: dict[str, Any] = {"who": "eva", "why": "try"}
    places = Places(None)
    async with links(places, "gray", cast("Any", sink)) as here:
        await here.set("checkout", percentage=10, guard=guard, paused=True, **who)
        watch = watch_of(here)

        async def tell(name: str, facts: Mapping[str, Any]) -> None: ...

        job = GuardJob(watch.store, lambda: watch.rules, sink, tell)
        for number, failed in ((1, {"m1": 9}), (2, {"m2": 9, "m3": 9, "m4": 9})):
            window = Samples()
            window.sides["stable"] = Tally(100, 0, 1.0)
            window.sides["candidate"] = Tally(20 * len(failed), sum(failed.values()), 0.2)
            window.merchants.update({merchant: Tally(20, errors, 0.2) for merchant, errors in failed.items()})
            await watch.store.count("checkout", guard.interval, number, window.counts())
            await job.look("checkout", guard, (number + 1) * guard.interval + 3)
        await watch._pushed(b"{")
        await watch.flush()
        watch._tell_age()


class Busy:
    """A CPU that has nothing left."""

    cpus = 1.0

    def share(self) -> float:
        return 1.0


async def recalculating(sink: PrometheusMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.redistribute.runs.GRACE", 0.01)
    inventory = Inventory("memory://", metrics=[sink], redistribution=UNSLOWED)
    swallowed = asyncio.Event()

    @inventory.coalesce(key="shop", debounce=0, timeout=0.02)
    async def recount(shop: str) -> None:
        if shop == "fails":
            raise ValueError(shop)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if shop != "stubborn":
                raise
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(1)
            swallowed.set()

    async with inventory:
        for shop in ("fails", "slow", "stubborn"):
            with suppress(RecalculationFailed, RecalculationCutOff):
                await recount(shop)
        now = inventory.redistribution._now()
        await now.tell_due()
    lanes: Any = None
    governor = Governor(RedistributionPolicy(), lanes, Busy(), sink)
    for _ in range(4):
        governor.tick(0.25, 0.0)


class Wrong(Counting):
    """Finds something, and another of its kind breaks."""

    async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
        if self.name == "breaks":
            raise ZeroDivisionError
        return [Finding("x", 1.0, "x is wrong")]


async def alerting(sink: PrometheusMetrics) -> None:
    class Broken:
        def record(self, event: object) -> None:
            raise OSError("no disk")

    inventory = Inventory("memory://", metrics=[Broken(), sink])
    inventory.alerts.watch(Wrong(name="wrong"), Wrong(name="breaks"))

    def deaf(alert: object) -> None:
        raise ConnectionError

    inventory.alerts.tell(deaf)
    async with inventory:
        await inventory.alerts.judge()


@pytest.fixture
async def emitted(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """What all parts have told one sink."""

    async def never(*_: object) -> bool:
        return False

    monkeypatch.setattr(Alerts, "_elected", never)
    registry = CollectorRegistry()
    sink = PrometheusMetrics(registry)
    for act in (
        refused_by_the_ledger,
        forgotten_by_redis,
        forked,
        unreadable,
        writes_stock_fails,
        later_function_fails,
        task_dies,
        announcements_fail,
        holds_stay,
    ):
        await synchronised(act, sink)
    for run in (publishing, comparing, selling, verifying, promoting, graying, alerting):
        await run(sink)
    await recalculating(sink, monkeypatch)
    return [Part(sample.name, sample.labels) for metric in registry.collect() for sample in metric.samples]


async def test_no_rule_is_about_a_series_that_nobody_emits(emitted: list[Part]) -> None:
    assert len(SELECTORS) >= len(RULES["groups"][0]["rules"])
    missing = {
        (rule, name, *patterns.values())
        for rule, selector in SELECTORS
        for name, patterns in wanted(selector)
        if not any(part.name == name and all(re.fullmatch(p, part.labels.get(k, "")) for k, p in patterns.items()) for part in emitted)
    }
    assert missing == set()


def test_a_selector_is_taken_apart_as_prometheus_would() -> None:
    assert list(wanted('inventory:events:in10m{name=~"a|b", reason="x.y"}')) == [
        ("inventory_events_total", {"name": "a", "reason": r"x\.y"}),
        ("inventory_events_total", {"name": "b", "reason": r"x\.y"}),
    ]
    assert list(wanted('inventory_retries_total{reason=~"sink_.+"}')) == [("inventory_retries_total", {"reason": "sink_.+"})]
    assert list(wanted("inventory_partition_open")) == [("inventory_partition_open", {})]
