"""Business alerts: what is found, when it fires, who is told and how often. Time is the test's own."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis, FakeServer
from redis.exceptions import ResponseError

from inventory_sdk import InsufficientStock, InvalidOperation, Inventory, InventoryError, Line, NotStarted
from inventory_sdk.alerts import (
    Alert,
    Drift,
    LedgerBehind,
    Queueing,
    RefusalRatio,
    ShadowMismatch,
    StockOut,
    Webhook,
    to_log,
)
from inventory_sdk.alerts.rules import Available, Count, Counting, Finding, Sums
from inventory_sdk.metrics import Alerting, Applied, Behind, Event, Happened, LaneUsed, Retried
from inventory_sdk.model import JournalEntry

BEGIN = 1_700_000_000.0


class Facts:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        self.events.append(event)

    def firing(self) -> Mapping[str, int]:
        return [event for event in self.events if isinstance(event, Alerting)][-1].firing

    def retried(self) -> set[str]:
        return {event.reason for event in self.events if isinstance(event, Retried) and event.what == "alerts"}


class Heard:
    """A sink that keeps what it is told, and can be out of order."""

    def __init__(self) -> None:
        self.alerts: list[Alert] = []
        self.broken: Exception | None = None

    async def __call__(self, alert: Alert) -> None:
        if self.broken is not None:
            raise self.broken
        self.alerts.append(alert)

    def said(self) -> list[tuple[str, str]]:
        return [(alert.rule, alert.state) for alert in self.alerts]


class Shop:
    """An inventory with one rule, its sink, and a clock that only the test moves."""

    def __init__(self, *rules: Any, sinks: Sequence[Any] | None = None, redis: Any = "memory://") -> None:
        self.facts, self.heard = Facts(), Heard()
        options: dict[str, Any] = {} if redis == "memory://" else {"database": "sqlite+aiosqlite://"}
        self.inventory = Inventory(redis, metrics=[self.facts], **options)
        self.alerts = self.inventory.alerts
        self.now = BEGIN
        self.alerts.clock = lambda: self.now
        self.alerts.watch(*rules)
        self.alerts.tell(*(sinks if sinks is not None else [self.heard]))

    async def round(self, seconds: float = 5.0) -> list[tuple[str, str]]:
        """Time passes, everybody pushes, the judge judges; what the sink was told in it."""
        self.now += seconds
        before = len(self.heard.alerts)
        await self.alerts._push(self.alerts._ground())
        await self.alerts.judge()
        return self.heard.said()[before:]


@asynccontextmanager
async def opened(shop: Shop) -> AsyncIterator[Shop]:
    """Its own rounds never come: PERIOD is patched to be long."""
    async with shop.inventory:
        yield shop


@pytest.fixture(autouse=True)
def no_rounds_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any) -> bool:
        return False

    monkeypatch.setattr("inventory_sdk.alerts.alerts.PERIOD", 3600.0)
    monkeypatch.setattr("inventory_sdk.alerts.alerts.Alerts._elected", never)


async def sell(inventory: Inventory, sku: str, calls: int, merchant: str | None = None) -> int:
    """How many of them were refused."""
    outcomes = await asyncio.gather(
        *[inventory.stock.deduct([Line(sku, 1)], merchant=merchant) for _ in range(calls)], return_exceptions=True
    )
    assert all(isinstance(outcome, InsufficientStock) or not isinstance(outcome, BaseException) for outcome in outcomes)
    return sum(isinstance(outcome, InsufficientStock) for outcome in outcomes)


# The rules on a real run -------------------------------------------------------------------------------------------------------------


async def test_a_sku_that_is_out_in_minutes_at_this_rate_is_named_with_its_merchant() -> None:
    async with opened(Shop(StockOut(minutes=10, at_least=5))) as shop:
        stock = shop.inventory.stock
        await stock.restock([Line("fast", 100), Line("slow", 100_000)], merchant="m1", operation_id="in")
        await sell(shop.inventory, "fast", 40, "m1")
        await sell(shop.inventory, "slow", 40, "m1")
        await shop.inventory.settled()
        assert await shop.round(20) == [("stock_out", "firing")]
        (alert,) = shop.heard.alerts
        assert alert.value == pytest.approx(60 / (40 / (shop.now - BEGIN // 10 * 10)) / 60)
        assert (alert.document()["merchant"], alert.document()["sku"], alert.document()["subject"]) == ("m1", "fast", "m1/fast")
        assert "'fast' of merchant 'm1' is out in" in alert.message
        await stock.restock([Line("fast", 1_000_000)], merchant="m1", operation_id="more")
        assert await shop.round() == [("stock_out", "resolved")]


async def test_what_comes_back_does_not_count_as_leaving() -> None:
    async with opened(Shop(StockOut(minutes=1000, at_least=5))) as shop:
        await shop.inventory.stock.restock([Line("a", 50)], operation_id="in")
        for number in range(20):
            await shop.inventory.stock.reserve([Line("a", 1)], operation_id=f"o-{number}", ttl=600)
            await shop.inventory.stock.release(f"o-{number}")
        await shop.inventory.settled()
        assert await shop.round(20) == []


async def test_a_sku_that_is_out_is_out_now() -> None:
    async with opened(Shop(StockOut(at_least=5))) as shop:
        await shop.inventory.stock.restock([Line("a", 6)], operation_id="in")
        assert await sell(shop.inventory, "a", 10) == 4
        await shop.inventory.settled()
        await shop.round(20)
    assert "is out now" in shop.heard.alerts[0].message


async def test_a_merchant_whose_takes_are_refused_is_named_and_only_that_one() -> None:
    async with opened(Shop(RefusalRatio(above=0.5, at_least=20))) as shop:
        await shop.inventory.stock.restock([Line("a", 5)], merchant="m1", operation_id="in")
        await shop.inventory.stock.restock([Line("a", 500)], merchant="m2", operation_id="in")
        assert await sell(shop.inventory, "a", 30, "m1") == 25
        assert await sell(shop.inventory, "a", 30, "m2") == 0
        assert await shop.round() == [("refusal_ratio", "firing")]
        assert shop.heard.alerts[0].subject == "m1"
        assert shop.heard.alerts[0].value == pytest.approx(25 / 30)
        assert shop.facts.firing() == {"refusal_ratio": 1}
        assert await shop.round(120) == [("refusal_ratio", "resolved")]  # the window has passed


async def test_takes_of_a_merchant_on_the_database_count_too() -> None:
    shop = Shop(RefusalRatio(at_least=10))
    inventory = Inventory("memory://", admission="database", metrics=[shop.facts])
    inventory.alerts.clock = lambda: shop.now
    inventory.alerts.watch(RefusalRatio(at_least=10))
    inventory.alerts.tell(shop.heard)
    shop.inventory, shop.alerts = inventory, inventory.alerts
    async with opened(shop):
        await inventory.stock.restock([Line("a", 2)], operation_id="in")
        assert await sell(inventory, "a", 12) == 10
        assert await shop.round() == [("refusal_ratio", "firing")]


async def test_a_repeat_is_no_refusal_and_stock_that_is_loaded_first_counts_once() -> None:
    async with opened(Shop(RefusalRatio(above=0.0, at_least=1))) as shop:
        await shop.inventory.stock.restock([Line("a", 5)], operation_id="in")
        await shop.inventory.settled()
        await shop.alerts._client().delete(shop.inventory._running().engine.partitions[0].key("available"))
        for _ in range(3):
            await shop.inventory.stock.deduct([Line("a", 1)], operation_id="same")
        assert await shop.round() == []
        sums = await shop.alerts._tally.sums(shop.alerts._client(), [RefusalRatio()], shop.now)
        assert sums["refusal_ratio"]["default"].parts == {"accepted": 3}


# Rules on events ---------------------------------------------------------------------------------------------------------------------

EVENTS: list[tuple[Any, Event, Event, str]] = [
    (Drift(), Applied(2, 1, 5, 10, 0, 0, 0, 0.1, 0.1), Applied(2, 1, 6, 10, 3, 0, 0, 0.1, 0.1), "partition 2"),
    (Drift(), Happened("rejected"), Happened("drift", {"reason": "lost_entry"}), "lost_entry"),
    (
        Queueing(seconds=5),
        LaneUsed("core", 1, 1, 0, 1, 0, (4.9, 0.1), {}),
        LaneUsed("core", 1, 1, 0, 1, 0, (0.1, 5.1), {}),
        "lane core",
    ),
    (LedgerBehind(seconds=30), Behind(1, 5, 5, 29.0, 5), Behind(1, 5, 5, 31.0, 5), "partition 1"),
]


@pytest.mark.parametrize(("rule", "harmless", "harmful", "subject"), EVENTS)
async def test_a_rule_on_events_tells_the_harmful_from_the_harmless(rule: Any, harmless: Event, harmful: Event, subject: str) -> None:
    async with opened(Shop(rule)) as shop:
        shop.inventory._metrics.record(harmless)
        assert await shop.round() == []
        shop.inventory._metrics.record(harmful)
        assert await shop.round() == [(rule.name, "firing")]
        assert shop.heard.alerts[0].subject == subject
        assert shop.heard.alerts[0].severity == rule.severity
        assert await shop.round(rule.window + 20) == [(rule.name, "resolved")]


async def test_answers_that_differ_from_their_shadows_are_a_ratio() -> None:
    async with opened(Shop(ShadowMismatch(above=0.1, at_least=20))) as shop:
        for number in range(30):
            shop.alerts.compared("fast-allocation", same=number % 5 != 0)
            shop.alerts.compared("other", same=number % 15 != 0)
        assert await shop.round() == [("shadow_mismatch", "firing")]
        assert shop.heard.alerts[0].subject == "fast-allocation"
        assert "20.00%" in shop.heard.alerts[0].message


# For how long, how often, to whom ------------------------------------------------------------------------------------------------------


class Wrong(Counting):
    """Finds what the test says."""

    found: dict[str, float] = {}  # noqa: RUF012  # shared on purpose: a rule is frozen

    async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
        return [Finding(subject, value, f"{subject} is {value}") for subject, value in self.found.items()]


@pytest.fixture
def found() -> Iterator[dict[str, float]]:
    Wrong.found = {}
    yield Wrong.found
    Wrong.found = {}


async def test_it_fires_once_it_was_found_for_long_enough_without_a_break(found: dict[str, float]) -> None:
    async with opened(Shop(Wrong(name="wrong", hold=60))) as shop:
        found["x"] = 1
        assert await shop.round() == []
        assert await shop.round(55) == []
        found.clear()
        assert await shop.round() == []  # a break
        found["x"] = 2
        assert await shop.round() == []
        assert await shop.round(59) == []
        assert await shop.alerts.firing() == []
        assert await shop.round(1) == [("wrong", "firing")]
        (alert,) = await shop.alerts.firing()
        assert (alert.subject, alert.value, alert.at - alert.since) == ("x", 2, 60)


async def test_what_goes_on_is_told_once_and_its_end_once(found: dict[str, float]) -> None:
    async with opened(Shop(Wrong(name="wrong"))) as shop:
        found["x"] = 1
        assert await shop.round() == [("wrong", "firing")]
        for value in range(2, 30):
            found["x"] = value
            assert await shop.round() == []
        assert (await shop.alerts.firing())[0].value == 29
        found.clear()
        assert await shop.round() == [("wrong", "resolved")]
        assert await shop.round() == []
        assert await shop.alerts.firing() == []


async def test_each_subject_has_a_life_of_its_own(found: dict[str, float]) -> None:
    async with opened(Shop(Wrong(name="wrong"))) as shop:
        found["x"] = 1
        await shop.round()
        found["y"] = 1
        assert await shop.round() == [("wrong", "firing")]
        del found["x"]
        assert await shop.round() == [("wrong", "resolved")]
        assert [alert.subject for alert in shop.heard.alerts] == ["x", "y", "x"]
        assert shop.facts.firing() == {"wrong": 1}


async def test_a_silence_keeps_beginnings_back_until_it_is_over_and_lets_ends_through(found: dict[str, float]) -> None:
    async with opened(Shop(Wrong(name="wrong"), Wrong(name="other"))) as shop:
        found["m\x1fx"] = 1
        silence = await shop.alerts.silence(600, rule="wrong", subject="m/x", who="ann", why="known")
        assert await shop.round() == [("other", "firing")]
        assert {alert.rule for alert in await shop.alerts.firing()} == {"wrong", "other"}
        assert await shop.alerts.silences() == [silence]
        assert await shop.round(600) == [("wrong", "firing")]
        assert await shop.alerts.silences() == []
        await shop.alerts.silence(600)
        found.clear()
        assert sorted(await shop.round()) == [("other", "resolved"), ("wrong", "resolved")]


async def test_what_began_and_ended_in_silence_is_never_told(found: dict[str, float]) -> None:
    async with opened(Shop(Wrong(name="wrong"))) as shop:
        silence = await shop.alerts.silence(600)
        found["x"] = 1
        await shop.round()
        found.clear()
        await shop.round()
        assert await shop.alerts.unsilence(silence.number)
        assert not await shop.alerts.unsilence(silence.number)
        assert await shop.round() == []
    assert shop.heard.alerts == []


async def test_a_sink_that_fails_is_told_again_and_the_others_only_once(found: dict[str, float]) -> None:
    broken, fine = Heard(), Heard()
    broken.broken = ConnectionError("no route")
    async with opened(Shop(Wrong(name="wrong"), sinks=[broken, fine])) as shop:
        found["x"] = 1
        await shop.round()
        await shop.round()
        assert (broken.said(), fine.said()) == ([], [("wrong", "firing")])
        assert "sink_ConnectionError" in shop.facts.retried()
        broken.broken = None
        await shop.round()
        assert broken.said() == fine.said() == [("wrong", "firing")]
        broken.broken = ConnectionError("again")
        found.clear()
        await shop.round()
        broken.broken = None
        await shop.round()
        await shop.round()
        assert broken.said() == fine.said() == [("wrong", "firing"), ("wrong", "resolved")]


async def test_a_rule_that_raises_is_counted_and_changes_nothing_for_the_others(
    found: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks(Wrong):
        async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
            if "boom" in self.found:
                raise ZeroDivisionError
            return await Wrong.judge(self, sums, available)

    async with opened(Shop(Breaks(name="breaks"), Wrong(name="wrong"))) as shop:
        found["x"] = 1
        assert await shop.round() == [("breaks", "firing"), ("wrong", "firing")]
        found["boom"] = 1
        assert await shop.round() == [("wrong", "firing")]  # of "boom"; and "breaks" goes on
        assert "rule_breaks" in shop.facts.retried()
        assert shop.facts.firing() == {"breaks": 1, "wrong": 2}


async def test_handlers_callables_and_the_log_are_told(found: dict[str, float], caplog: pytest.LogCaptureFixture) -> None:
    plain: list[Alert] = []
    shop = Shop(Wrong(name="wrong", severity="critical"), sinks=[plain.append, to_log])
    facts: list[Mapping[str, Any]] = []
    shop.inventory.on("alert")(facts.append)
    async with opened(shop):
        found["x"] = 1
        with caplog.at_level(logging.INFO, "inventory_sdk.alerts"):
            await shop.round()
            found.clear()
            await shop.round()
    assert [alert.state for alert in plain] == ["firing", "resolved"]
    assert [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "inventory_sdk.alerts"] == [
        ("ERROR", "wrong firing: x is 1"),
        ("INFO", "wrong resolved: x is 1"),
    ]
    assert [(each["rule"], each["state"], each["alert"].subject) for each in facts] == [
        ("wrong", "firing", "x"),
        ("wrong", "resolved", "x"),
    ]


async def test_without_a_sink_the_log_is_told(found: dict[str, float], caplog: pytest.LogCaptureFixture) -> None:
    async with opened(Shop(Wrong(name="wrong"), sinks=[])) as shop:
        found["x"] = 1
        await shop.round()
    assert "wrong firing: x is 1" in caplog.text


class Hook(BaseHTTPRequestHandler):
    seen: list[tuple[dict[str, Any], str | None]] = []  # noqa: RUF012  # the server makes a handler for each request
    answer = 200

    def do_POST(self) -> None:  # http.server's name
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((body, self.headers["Authorization"]))
        self.send_response(self.answer)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # http.server's name
        """Nothing."""


async def test_a_webhook_gets_json_and_is_asked_again_until_it_says_yes(found: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hook, "seen", [])
    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        hook = Webhook(f"http://127.0.0.1:{server.server_port}/alerts", headers={"Authorization": "Bearer t"})
        async with opened(Shop(Wrong(name="wrong"), sinks=[hook])) as shop:
            found["m\x1fx"] = 1
            monkeypatch.setattr(Hook, "answer", 503)
            await shop.round()
            monkeypatch.setattr(Hook, "answer", 204)
            await shop.round()
            await shop.round()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert len(Hook.seen) == 2
    body, token = Hook.seen[-1]
    assert token == "Bearer t"
    assert (body["rule"], body["state"], body["merchant"], body["sku"], body["severity"]) == ("wrong", "firing", "m", "x", "warning")


# Several processes ---------------------------------------------------------------------------------------------------------------------


async def test_processes_count_together_and_another_judge_goes_on_where_one_ended(found: dict[str, float]) -> None:
    server = FakeServer()
    rule = RefusalRatio(above=0.1, at_least=20)
    one = Shop(rule, Wrong(name="wrong"), redis=FakeAsyncRedis(server=server))
    two = Shop(rule, Wrong(name="wrong"), redis=FakeAsyncRedis(server=server))
    found["x"] = 1
    async with opened(one):
        await one.inventory.create_schema()
        one.alerts.answered("m1", False)
        for _ in range(12):
            one.alerts.answered("m1", True)
        assert await one.round() == [("wrong", "firing")]
    two.now = one.now
    two.inventory._servers, two.inventory._ledger_part = one.inventory._servers, one.inventory._ledger_part
    async with opened(two):
        for _ in range(12):
            two.alerts.answered("m1", False)
        assert await two.round() == [("refusal_ratio", "firing")]
        assert two.heard.alerts[0].value == pytest.approx(13 / 25)
        found.clear()
        assert await two.round() == [("wrong", "resolved")]


async def test_only_one_of_two_judges_judges_and_the_other_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    server = FakeServer()
    grounds: list[Any] = []
    shops = [Shop(Drift(), redis=FakeAsyncRedis(server=server)) for _ in range(2)]
    for shop in shops:
        client = FakeAsyncRedis(server=server)
        grounds.append(type("Ground", (), {"client": client, "metrics": shop.facts}))
    first, second = (shop.alerts._elected for shop in shops)
    assert [await first(grounds[0]), await second(grounds[1]), await first(grounds[0])] == [True, False, True]
    assert 0 < await grounds[0].client.pttl("inventory:alerts:judge") <= 30_000
    await grounds[0].client.delete("inventory:alerts:judge")  # it ended, or fell silent
    assert [await second(grounds[1]), await first(grounds[0])] == [True, False]


async def test_the_judge_works_by_itself_in_the_worker_and_leaves_its_place_at_the_end(
    found: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("inventory_sdk.alerts.alerts.PERIOD", 0.01)
    Wrong.found = {"x": 1}
    shop = Shop(Wrong(name="wrong"))
    told = asyncio.Event()
    shop.alerts.tell(lambda _: told.set())
    async with shop.inventory:
        await asyncio.wait_for(told.wait(), 10)
        client = shop.alerts._client()
        assert await client.exists("inventory:alerts:judge")
        worker = shop.inventory._running().embedded_worker
        assert worker is not None
        await worker.stop()
        assert not await client.exists("inventory:alerts:judge")
    assert shop.heard.said() == [("wrong", "firing")]


async def test_while_redis_is_away_counts_wait_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    server = FakeServer()
    async with opened(Shop(RefusalRatio(at_least=1, above=0.0), redis=FakeAsyncRedis(server=server))) as shop:
        await shop.inventory.create_schema()
        ground = shop.alerts._ground()
        server.connected = False
        shop.alerts.answered("m1", False)
        await shop.alerts._push(ground)
        assert "ConnectionError" in shop.facts.retried()
        server.connected = True
        assert await shop.round() == [("refusal_ratio", "firing")]
        monkeypatch.setattr("inventory_sdk.alerts.tally.KEPT", 10)
        server.connected = False
        for number in range(50):
            shop.alerts._tally.add("refusal_ratio", [Count(f"m{number}", "refused", 49 if number == 49 else 1)])
        await shop.alerts._push(ground)
        assert len(shop.alerts._tally._waiting) == 10
        assert shop.alerts._tally._waiting["refusal_ratio", "m49", "refused"] == 49
        server.connected = True


async def test_a_push_that_is_cancelled_keeps_what_it_had() -> None:
    async with opened(Shop(RefusalRatio())) as shop:
        shop.alerts.answered("m1", True)
        pushing = asyncio.create_task(shop.alerts._push(shop.alerts._ground()))
        await asyncio.sleep(0)
        pushing.cancel()
        await asyncio.wait([pushing])
        await shop.round()
        sums = await shop.alerts._tally.sums(shop.alerts._client(), [RefusalRatio()], shop.now)
        assert sums["refusal_ratio"]["m1"].parts["accepted"] >= 1


async def test_counts_leave_redis_by_themselves() -> None:
    async with opened(Shop(RefusalRatio())) as shop:
        shop.alerts.answered("m1", True)
        await shop.round()
        client = shop.alerts._client()
        keys = [key async for key in client.scan_iter(match="inventory:alerts:counts:*")]
        assert keys
        assert all([0 < await client.ttl(key) <= 3700 for key in keys])


# Rules that are broken -----------------------------------------------------------------------------------------------------------------


class Broken(Counting):
    """Fails wherever it is asked."""

    def on_event(self, event: Event) -> Iterator[Count]:
        raise KeyError("event")

    def on_answer(self, merchant: str, accepted: bool) -> Iterator[Count]:
        yield Count(merchant, "half", 0.5)  # type: ignore[arg-type]

    def on_applied(self, entry: JournalEntry) -> Iterator[Count]:
        raise KeyError("applied")

    async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
        return [("only", "two")]  # type: ignore[list-item]


async def test_a_rule_that_can_not_count_hurts_neither_sales_nor_ledger_nor_the_other_rules(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with opened(Shop(Broken(name="broken"), RefusalRatio(above=0.1, at_least=10))) as shop:
        await shop.inventory.stock.restock([Line("a", 4)], operation_id="in")
        assert await sell(shop.inventory, "a", 10) == 6
        await shop.inventory.settled()
        assert await shop.round() == [("refusal_ratio", "firing")]
        sums = await shop.alerts._tally.sums(shop.alerts._client(), shop.alerts._rules.values(), shop.now)
        assert dict(sums["refusal_ratio"]["default"].parts) == {"accepted": 4, "refused": 6}
        assert sums["broken"] == {}
    assert shop.facts.retried() == {"rule_broken"}  # half a unit was never sent to Redis, which would refuse it
    assert "alert rule broken failed to count (2 times by now)" in caplog.text


async def test_a_rule_that_never_answers_is_given_up_and_the_others_are_judged(
    found: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hangs(Wrong):
        async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
            if "hang" in self.found:
                await asyncio.Event().wait()
            return await Wrong.judge(self, sums, available)

    monkeypatch.setattr("inventory_sdk.alerts.alerts.RULE_TIMEOUT", 0.05)
    async with opened(Shop(Hangs(name="hangs"), Wrong(name="wrong"))) as shop:
        found["x"] = 1
        assert await shop.round() == [("hangs", "firing"), ("wrong", "firing")]
        found["hang"] = 1
        assert await shop.round() == [("wrong", "firing")]
        assert "rule_hangs" in shop.facts.retried()
        assert shop.facts.firing() == {"hangs": 1, "wrong": 2}


async def test_whatever_a_round_fails_of_the_worker_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(Shop(Drift(), redis=FakeAsyncRedis())) as shop:  # without a worker of its own
        rounds = 0
        stopping = asyncio.Event()

        async def elected(ground: object) -> bool:
            return True

        async def judge() -> None:
            nonlocal rounds
            rounds += 1
            if rounds == 3:
                stopping.set()
            raise ZeroDivisionError

        monkeypatch.setattr("inventory_sdk.alerts.alerts.PERIOD", 0.001)
        monkeypatch.setattr(shop.alerts, "_elected", elected)
        monkeypatch.setattr(shop.alerts, "judge", judge)
        await shop.alerts._judge_on(shop.alerts._ground(), stopping)
        assert rounds == 3
        assert "ZeroDivisionError" in shop.facts.retried()


async def test_a_rule_that_is_watched_no_more_is_over_for_those_who_were_told(found: dict[str, float]) -> None:
    server = FakeServer()
    one = Shop(Wrong(name="wrong"), Wrong(name="old"), redis=FakeAsyncRedis(server=server))
    two = Shop(Wrong(name="wrong"), redis=FakeAsyncRedis(server=server))
    found["x"] = 1
    async with opened(one):
        await one.inventory.create_schema()
        assert await one.round() == [("wrong", "firing"), ("old", "firing")]
    two.now = one.now
    two.inventory._servers, two.inventory._ledger_part = one.inventory._servers, one.inventory._ledger_part
    async with opened(two):
        assert await two.round() == [("old", "resolved")]
        assert await two.round() == []
        assert [alert.rule for alert in await two.alerts.firing()] == ["wrong"]


# Clocks, restarts, a Redis that takes nothing ---------------------------------------------------------------------------------------------


async def test_the_time_for_which_it_was_found_goes_on_over_restarts(found: dict[str, float]) -> None:
    server = FakeServer()
    rule = Wrong(name="wrong", hold=60)
    one, two = (Shop(rule, redis=FakeAsyncRedis(server=server)) for _ in range(2))
    found["x"] = 1
    async with opened(one):
        await one.inventory.create_schema()
        assert await one.round() == []
        began = one.now
    two.now = one.now + 40
    two.inventory._servers, two.inventory._ledger_part = one.inventory._servers, one.inventory._ledger_part
    async with opened(two):
        assert await two.round(15) == []
        assert await two.round(5) == [("wrong", "firing")]
        assert two.heard.alerts[0].since == began
        assert await two.round() == []


async def test_a_clock_that_goes_back_makes_nothing_begin_later_and_no_silence_longer(found: dict[str, float]) -> None:
    async with opened(Shop(Wrong(name="wrong", hold=60), Wrong(name="other"))) as shop:
        await shop.alerts.silence(600, rule="other")
        found["x"] = 1
        assert await shop.round() == []
        shop.now -= 3600
        assert await shop.round() == [("other", "firing")]  # the silence is not in force before it was made
        assert await shop.round(55) == []
        assert await shop.round(5) == [("wrong", "firing")]
        shop.now -= 3600
        assert await shop.round() == []
        found.clear()
        assert sorted(await shop.round()) == [("other", "resolved"), ("wrong", "resolved")]


async def test_time_is_that_of_redis_so_no_process_clock_counts() -> None:
    async with opened(Shop(Drift())) as shop:
        shop.alerts.clock = None
        client = shop.alerts._client()
        before, now, after = await client.time(), await shop.alerts._now(shop.alerts._ground()), await client.time()
        assert before[0] + before[1] / 1e6 <= now <= after[0] + after[1] / 1e6


async def test_while_redis_takes_no_writes_nobody_is_told_twice_and_the_end_is_told(
    found: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(Shop(Wrong(name="wrong"))) as shop:
        client = shop.alerts._client()

        async def full(*_: object, **__: object) -> None:
            raise ResponseError("OOM command not allowed when used memory > 'maxmemory'.")

        monkeypatch.setattr(client, "hset", full)
        found["x"] = 1
        for expected in ([("wrong", "firing")], [], []):
            before = len(shop.heard.alerts)
            with pytest.raises(ResponseError):
                await shop.round()
            assert shop.heard.said()[before:] == expected
        monkeypatch.undo()
        assert await shop.round() == []
        assert [alert.subject for alert in await shop.alerts.firing()] == ["x"]
        found.clear()
        assert await shop.round() == [("wrong", "resolved")]


async def test_the_judge_stays_in_office_while_redis_has_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    shop = Shop(Drift(), redis=FakeAsyncRedis())
    client = FakeAsyncRedis()
    ground: Any = type("Ground", (), {"client": client, "metrics": shop.facts})
    assert await shop.alerts._elected(ground)

    async def full(*_: object, **__: object) -> None:
        raise ResponseError("OOM command not allowed when used memory > 'maxmemory'.")

    monkeypatch.setattr(client, "set", full)
    assert await shop.alerts._elected(ground)


async def test_what_can_not_be_read_is_forgotten_and_the_rest_goes_on(found: dict[str, float], caplog: pytest.LogCaptureFixture) -> None:
    async with opened(Shop(Wrong(name="wrong"))) as shop:
        client = shop.alerts._client()
        for name in ("state", "silences"):
            await client.hset(f"inventory:alerts:{name}", mapping={"a": "{", "b": "[1]", "c": '["r", null, "soon", "", ""]'})
        found["x"] = 1
        assert await shop.round() == [("wrong", "firing")]
        assert await client.hkeys("inventory:alerts:state") == [b"wrong\x1fx"]
        assert await client.hkeys("inventory:alerts:silences") == []
    assert "can't be read and is forgotten" in caplog.text


async def test_silences_that_are_over_leave_redis() -> None:
    async with opened(Shop(Drift())) as shop:
        kept = await shop.alerts.silence(60)
        await shop.alerts.silence(10)
        await shop.round(20)
        assert await shop.alerts._client().hkeys("inventory:alerts:silences") == [kept.number.encode()]


async def test_a_count_that_redis_refuses_does_not_count_the_others_again() -> None:
    async with opened(Shop(RefusalRatio())) as shop:
        client = shop.alerts._client()
        await client.hset(f"inventory:alerts:counts:{int(BEGIN + 5) // 10}", "refusal_ratio\x1fm1\x1eaccepted", "none")
        shop.alerts.answered("m1", True)
        shop.alerts.answered("m2", True)
        for _ in range(3):
            shop.now = BEGIN + 5
            await shop.alerts._push(shop.alerts._ground())
        assert "ResponseError" in shop.facts.retried()
        counted = await client.hgetall(f"inventory:alerts:counts:{int(BEGIN + 5) // 10}")
        assert counted[b"refusal_ratio\x1fm2\x1eaccepted"] == b"1"
        assert shop.alerts._tally._waiting == Counter({("refusal_ratio", "m1", "accepted"): 1})


async def test_a_flood_of_names_between_two_pushes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inventory_sdk.alerts.tally.COUNTED", 10)
    async with opened(Shop(RefusalRatio())) as shop:
        for number in range(1000):
            shop.alerts.answered(f"m{number}", False)
            shop.alerts.answered("m1", False)
        assert len(shop.alerts._tally._waiting) == 10
        assert shop.alerts._tally._waiting["refusal_ratio", "m1", "refused"] == 1001


class Elsewhere(BaseHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012  # the server makes a handler for each request

    def do_POST(self) -> None:  # http.server's name
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(302)
        self.send_header("Location", "/login")
        self.end_headers()

    def do_GET(self) -> None:  # http.server's name
        self.asked.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # http.server's name
        """Nothing."""


async def test_a_webhook_that_sends_us_elsewhere_was_not_told(found: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Elsewhere, "asked", [])
    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        async with opened(Shop(Wrong(name="wrong"), sinks=[Webhook(f"http://127.0.0.1:{server.server_port}/alerts")])) as shop:
            found["x"] = 1
            await shop.round()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert shop.facts.retried() == {"sink_HTTPError"}
    assert Elsewhere.asked == []


async def test_a_webhook_that_hangs_keeps_four_threads_of_its_own_and_nobody_else_waiting(
    found: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inventory_sdk.alerts.alerts.SINK_TIMEOUT", 0.2)
    fine = Heard()
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        hook = Webhook(f"http://127.0.0.1:{hangs.getsockname()[1]}/alerts", timeout=0.4)
        async with opened(Shop(Wrong(name="wrong"), sinks=[hook, fine])) as shop:
            found.update(dict.fromkeys("abcdefghij", 1.0))
            await shop.round()
            assert len(hook._threads._threads) == 4
            assert len(fine.alerts) == 10
            assert shop.facts.retried() == {"sink_TimeoutError"}
            await shop.round()
            assert len(fine.alerts) == 10
    await asyncio.to_thread(hook._threads.shutdown)


# What is refused -----------------------------------------------------------------------------------------------------------------------


async def test_mistakes_are_named() -> None:
    inventory = Inventory("memory://", metrics=())
    with pytest.raises(InvalidOperation, match="watched already"):
        inventory.alerts.watch(Drift(), Drift())
    for wrong in ({"window": 5}, {"window": 7200}, {"hold": -1}, {"name": "with space"}):
        with pytest.raises(InvalidOperation, match=next(iter(wrong))):
            Drift(**wrong)  # type: ignore[arg-type]
    not_callable: Any = "log"
    with pytest.raises(InvalidOperation, match="sink"):
        inventory.alerts.tell(not_callable)
    with pytest.raises(InvalidOperation, match="name='two words'"):
        inventory.alerts.watch(type("Own", (), {"name": "two words", "hold": 0.0, "window": 60.0, "severity": "info"})())
    with pytest.raises(InvalidOperation, match="http"):
        Webhook("ftp://x")
    with pytest.raises(NotStarted):
        await inventory.alerts.firing()
    async with inventory:
        with pytest.raises(InventoryError, match="before the inventory is started"):
            inventory.alerts.watch(StockOut())
        with pytest.raises(InvalidOperation, match="not watched"):
            await inventory.alerts.silence(60, rule="nothing")
        with pytest.raises(InvalidOperation, match="seconds"):
            await inventory.alerts.silence(0)


async def test_without_a_rule_nothing_is_counted_and_no_job_runs() -> None:
    async with Inventory("memory://", metrics=()) as inventory:
        await inventory.stock.restock([Line("a", 5)], operation_id="in")
        await inventory.stock.deduct([Line("a", 1)])
        ground = inventory._running().ground
        assert inventory.alerts.jobs(ground) == []
        assert ground.applied == []
        assert inventory.alerts._tally._waiting == Counter()
