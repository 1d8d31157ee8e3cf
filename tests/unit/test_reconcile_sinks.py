"""One suite, three sinks: what every place that discrepancies are told to must do. Elasticsearch is a strict double here."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import pytest

from inventory_sdk import InvalidOperation, Inventory, Line
from inventory_sdk.beside import Ground
from inventory_sdk.ledger.accounts import Row
from inventory_sdk.metrics import Event, Happened, Retried
from inventory_sdk.model import key_of
from inventory_sdk.reconcile import telling
from inventory_sdk.reconcile.model import Discrepancy, Reconcile
from inventory_sdk.reconcile.sinks.elasticsearch import ElasticsearchSink
from inventory_sdk.reconcile.sinks.log import LogSink
from inventory_sdk.reconcile.sinks.protocol import Document, Sink, SinkAway, SinkRefused, document
from inventory_sdk.reconcile.sinks.sql import SqlSink
from inventory_sdk.reconcile.telling import Teller
from tests.elasticsearch_double import Elasticsearch, elasticsearch
from tests.reconcile_kit import shop
from tests.stock_kit import Recorded

HOSTILE = [
    "'; DROP TABLE inventory_stock; --",
    "<script>alert(1)</script>",
    "a\u2028b",
    "Ω" * 40,
    '{"sku": "x"}',
    "x" * 128,
    "-",
    "%s%n",
    " ",
]


def found(number: int, sku: str = "sku-1", **more: Any) -> Discrepancy:
    values: dict[str, Any] = {
        "number": number, "what": "stock", "name": key_of("m1", sku), "merchant": "m1", "sku": sku, "reservation": None,
        "cause": "manual_redis", "available": 3, "reserved": -1, "evidence": {"redis": [13, 0], "last": [{"operation": "m1\x1fo-1"}]},
        "state": "open", "found_ms": 1_700_000_000_000 + number, "resolved_ms": None, "correction": None,
    }  # fmt: skip
    return Discrepancy(**values | more)


def told(number: int, event: str = "found", **more: Any) -> Document:
    each = found(number, **more)
    return Document(f"ns-{number}-{event}", each.found_ms, event, "ns", each)  # type: ignore[arg-type]


@dataclass
class Bench:
    """A sink and how to read back what it was told: (sku, cause, available, reserved) of what was found."""

    sink: Sink
    read: Callable[[], Awaitable[list[tuple[Any, ...]]]]


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.documents: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        assert "\n" not in text
        assert text.isascii()
        self.documents.append(json.loads(text))


@pytest.fixture
async def ground() -> AsyncIterator[Ground]:
    inventory = Inventory("memory://", metrics=[], reconcile=Reconcile(every=None, whole_every=None))
    async with inventory:
        yield inventory._running().ground


@pytest.fixture(params=["sql", "log", "elasticsearch"])
async def bench(request: pytest.FixtureRequest, ground: Ground) -> AsyncIterator[Bench]:
    def shown(values: dict[str, Any]) -> tuple[Any, ...]:
        return values["sku"], values["cause"], values["available"], values["reserved"]

    async with AsyncExitStack() as stack:
        sink: Sink
        if request.param == "sql":
            sink = SqlSink()

            async def read() -> list[tuple[Any, ...]]:
                register = ground.ledger.register  # type: ignore[attr-defined]
                rows = await register.find(state="open", limit=5000)
                return [(row.sku, row.kind, row.details["available"], row.details["reserved"]) for row in rows]
        elif request.param == "log":
            lines = Lines()
            logger = logging.getLogger("inventory_sdk.discrepancies")
            logger.addHandler(lines)
            logger.setLevel(logging.INFO)
            stack.callback(logger.removeHandler, lines)
            sink = LogSink()

            async def read() -> list[tuple[Any, ...]]:
                # A log is read by somebody who keeps one line per id.
                return [shown(each) for each in {each["id"]: each for each in lines.documents}.values()]
        else:
            double = await stack.enter_async_context(elasticsearch())
            sink = ElasticsearchSink(double.url, first_delay=0.001)

            async def read() -> list[tuple[Any, ...]]:
                return [shown(each) for each in double.documents()]

        await sink.start(ground)
        stack.push_async_callback(sink.close)
        yield Bench(sink, read)


async def test_what_was_found_is_there_with_its_cause_and_units(bench: Bench) -> None:
    await bench.sink.write([told(1), told(2, sku="sku-2", cause="went_back", available=-4)])
    assert sorted(await bench.read()) == [("sku-1", "manual_redis", 3, -1), ("sku-2", "went_back", -4, -1)]


async def test_the_same_documents_sent_again_are_there_once(bench: Bench) -> None:
    documents = [told(number, sku=f"sku-{number}") for number in range(1, 8)]
    await bench.sink.write(documents[:4])
    await bench.sink.write(documents)
    await bench.sink.write(documents)
    assert len(await bench.read()) == 7


async def test_more_than_one_request_takes_arrives_whole(bench: Bench) -> None:
    await bench.sink.write([told(number, sku=f"sku-{number}") for number in range(1, 1202)])
    assert len({row[0] for row in await bench.read()}) == 1201


async def test_hostile_names_arrive_as_they_are(bench: Bench) -> None:
    await bench.sink.write([told(number, sku=sku) for number, sku in enumerate(HOSTILE, 1)])
    assert sorted(row[0] for row in await bench.read()) == sorted(HOSTILE)


async def test_nothing_to_tell_is_nothing(bench: Bench) -> None:
    await bench.sink.write([])
    assert await bench.read() == []


async def test_a_document_survives_json() -> None:
    for each in (told(1), told(2, "corrected", correction={"way": "redis"}, resolved_ms=5)):
        assert document(json.loads(json.dumps(each.fields()))) == each


# Elasticsearch's own ways -------------------------------------------------------------------------------------------------------


@pytest.fixture
async def double() -> AsyncIterator[Elasticsearch]:
    async with elasticsearch() as state:
        yield state


@pytest.fixture
async def elastic(double: Elasticsearch, ground: Ground) -> AsyncIterator[ElasticsearchSink]:
    sink = ElasticsearchSink(double.url, first_delay=0.001)
    await sink.start(ground)
    yield sink
    await sink.close()


async def test_the_template_stands_before_the_first_document_and_is_made_once(elastic: ElasticsearchSink, double: Elasticsearch) -> None:
    await elastic.write([told(1)])
    await elastic.write([told(2)])
    assert double.requests[:2] == ["PUT /_index_template/inventory-discrepancies", "PUT /_bulk"]
    assert [each for each in double.requests if "template" in each] == double.requests[:1]
    template = double.templates["inventory-discrepancies"]
    assert template["data_stream"] == {}
    assert template["template"]["mappings"]["dynamic"] == "strict"


async def test_documents_go_in_bulks_of_a_bounded_size(elastic: ElasticsearchSink, double: Elasticsearch) -> None:
    await elastic.write([told(number, sku=f"s-{number}") for number in range(1, 1202)])
    assert double.bulks == [500, 500, 201]


async def test_what_a_busy_server_left_out_is_sent_once_more_and_only_that(elastic: ElasticsearchSink, double: Elasticsearch) -> None:
    double.busy = 3
    await elastic.write([told(number, sku=f"s-{number}") for number in range(1, 11)])
    assert double.bulks == [10, 3]
    assert len(double.documents()) == 10


@pytest.mark.parametrize("status", [429, 502, 503])
async def test_a_server_that_is_away_for_a_moment_gets_it_later_and_that_is_counted(double: Elasticsearch, status: int) -> None:
    metrics = Recorded()
    inventory = Inventory("memory://", metrics=[metrics])
    async with inventory:
        sink = ElasticsearchSink(double.url, first_delay=0.001)
        await sink.start(inventory._running().ground)
        double.failing, double.status = 2, status
        await sink.write([told(1)])
        await sink.close()
    assert len(double.documents()) == 1
    assert [each.reason for each in metrics.events if isinstance(each, Retried) and each.what == "elasticsearch"] == [
        f"status {status}"
    ] * 2


async def test_a_server_that_stays_away_is_said_to_be_away(elastic: ElasticsearchSink, double: Elasticsearch) -> None:
    double.failing = 1000
    with pytest.raises(SinkAway, match="did not take 1 documents: status 503"):
        await elastic.write([told(1)])


async def test_no_server_at_all_is_said_to_be_away(ground: Ground) -> None:
    sink = ElasticsearchSink("http://127.0.0.1:1", first_delay=0.001)
    await sink.start(ground)
    with pytest.raises(SinkAway, match="ConnectionError"):
        await sink.write([told(1)])
    await sink.close()


async def test_a_document_that_no_mapping_fits_is_named_and_not_sent_for_ever(elastic: ElasticsearchSink, double: Elasticsearch) -> None:
    double.refuse, double.busy = {"ns-2-found"}, 1
    with pytest.raises(SinkRefused, match="'ns-2-found' first: status 400") as refused:
        await elastic.write([told(1), told(2), told(3)])
    assert refused.value.ids == ("ns-2-found",)
    assert double.bulks == [3, 1]
    assert len(double.documents()) == 2


async def test_words_that_no_utf_8_can_hold_arrive_and_hold_up_nobody(elastic: ElasticsearchSink, double: Elasticsearch) -> None:
    correction = {"reason": "nul \x00 and \ud800"}
    await elastic.write([told(1), told(2, "corrected", correction=correction), told(3)])
    assert [each["correction"] for each in double.documents()] == [None, correction, None]


async def test_a_request_that_is_too_large_goes_in_parts(elastic: ElasticsearchSink, double: Elasticsearch) -> None:
    double.most = 3
    await elastic.write([told(number, sku=f"s-{number}") for number in range(1, 11)])
    assert len(double.documents()) == 10


async def test_one_that_is_too_large_by_itself_is_named_and_the_others_are_taken(double: Elasticsearch, elastic: ElasticsearchSink) -> None:
    await elastic.write([told(1)])
    double.most = 0
    with pytest.raises(SinkRefused, match="status 413") as refused:
        await elastic.write([told(2), told(3)])
    assert refused.value.ids == ("ns-2-found", "ns-3-found")


async def test_a_template_that_the_server_refuses_is_no_documents_fault(double: Elasticsearch, elastic: ElasticsearchSink) -> None:
    double.failing, double.status = 1, 400
    with pytest.raises(SinkAway, match="refused: 400"):
        await elastic.write([told(1), told(2)])


async def test_before_anything_was_written_nothing_is_found(elastic: ElasticsearchSink) -> None:
    assert await elastic.search(merchant="m1") == []


@pytest.mark.parametrize(
    ("more", "why"),
    [({"available": True}, "True, not long"), ({"found_ms": 2**63}, "not long"), ({"sku": "x" * 40_000}, "not keyword"), ({"sku": 7}, "7")],
)
async def test_the_double_refuses_what_a_server_would(
    more: dict[str, Any], why: str, elastic: ElasticsearchSink, double: Elasticsearch
) -> None:
    document = Document("ns-1-found", 1, "found", "ns", found(1, **more))
    with pytest.raises(SinkRefused, match=why):
        await elastic.write([document])
    assert double.documents() == []


async def test_what_was_written_is_found_by_merchant_sku_cause_and_event(elastic: ElasticsearchSink) -> None:
    written = [told(1), told(2, sku="b", cause="rejected"), told(3, "gone", sku="b", merchant="m2")]
    await elastic.write(written)
    assert await elastic.search(merchant="m1") == [written[1], written[0]]
    assert await elastic.search(sku="b", event="gone") == [written[2]]
    assert await elastic.search(cause="rejected", limit=1) == [written[1]]


@pytest.mark.parametrize("stream", ["", "Upper", "a b", "-a", "a*", "a:b"])
def test_a_name_that_no_data_stream_may_have_is_refused(stream: str) -> None:
    with pytest.raises(InvalidOperation, match="stream"):
        ElasticsearchSink("http://127.0.0.1:9200", stream=stream)


def test_without_its_extra_the_sink_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "elasticsearch", None)
    with pytest.raises(ImportError, match=r"inventory_sdk\[elasticsearch\]"):
        ElasticsearchSink("http://127.0.0.1:9200")


# Letters ------------------------------------------------------------------------------------------------------------------------


async def drifted(inventory: Inventory, sku: str, units: int) -> None:
    running = inventory._running()
    client: Any = running.client
    await client.hincrby(running.engine.partitions[0].key("available"), key_of("default", sku), units)


async def test_what_a_sink_could_not_take_waits_in_the_ledger_and_goes_first_the_next_time(double: Elasticsearch) -> None:
    metrics = Recorded()
    sink = ElasticsearchSink(double.url, first_delay=0.001)
    inventory = Inventory("memory://", metrics=[metrics], reconcile=Reconcile(sinks=[sink]))
    async with inventory:
        await inventory.stock.restock([Line("a", 5), Line("b", 5)], operation_id="po")
        double.failing = 10**6
        await drifted(inventory, "a", 1)
        done = await inventory.reconciler.run()
        assert [each.sku for each in done.open] == ["a"]  # the register has it
        double.failing = 0
        await drifted(inventory, "b", 1)
        await inventory.reconciler.run()
        assert [each["sku"] for each in double.documents()] == ["a", "b"]
        await inventory.reconciler.run()
        assert len(double.documents()) == 2
        register = inventory.ledger.register  # type: ignore[attr-defined]
        assert await register.letters("elasticsearch", 10) == []
    away: list[Event] = [each for each in metrics.events if isinstance(each, Happened) and each.name == "sink_away"]
    assert away


async def test_what_a_sink_refuses_for_good_is_kept_aside_and_holds_up_nothing(double: Elasticsearch) -> None:
    inventory = Inventory("memory://", metrics=[], reconcile=Reconcile(sinks=[ElasticsearchSink(double.url, first_delay=0.001)]))
    async with inventory:
        await inventory.stock.restock([Line("a", 5), Line("b", 5)], operation_id="po")
        double.refuse = {"a"}
        await drifted(inventory, "a", 1)
        await inventory.reconciler.run()
        await drifted(inventory, "b", 1)
        await inventory.reconciler.run()
        register = inventory.ledger.register  # type: ignore[attr-defined]
        assert [letter["sku"] for _, _, letter in await register.letters("elasticsearch.refused", 10)] == ["a"]
        assert await register.letters("elasticsearch", 10) == []
    assert [each["sku"] for each in double.documents()] == ["b"]


async def test_a_sink_of_ones_own_that_breaks_breaks_no_comparison() -> None:
    class Broken:
        name = "mine"

        async def start(self, ground: Ground) -> None: ...

        async def write(self, documents: Any) -> None:
            raise ZeroDivisionError

        async def close(self) -> None: ...

    inventory = Inventory("memory://", metrics=[], reconcile=Reconcile(sinks=[Broken()]))
    async with inventory:
        await inventory.stock.restock([Line("a", 5)], operation_id="po")
        await drifted(inventory, "a", 1)
        assert len((await inventory.reconciler.run()).open) == 1
        register = inventory.ledger.register  # type: ignore[attr-defined]
        ((_, _, letter),) = await register.letters("mine", 10)
        assert replace(document(letter).discrepancy, evidence={}).sku == "a"


class Kept:
    """A sink of the service's own. It waits for ``gate``, and raises ``fails``."""

    def __init__(self, name: str = "mine") -> None:
        self.name = name
        self.gate = asyncio.Event()
        self.asked = asyncio.Event()
        self.fails: Exception | None = None
        self.documents: list[Document] = []
        self.open = False

    async def start(self, ground: Ground) -> None:
        self.open = True

    async def write(self, documents: Any) -> None:
        self.asked.set()
        await self.gate.wait()
        if self.fails is not None:
            raise self.fails
        self.documents += documents

    async def close(self) -> None:
        self.open = False

    def told(self) -> list[tuple[str, int, str]]:
        return [(each.event, each.discrepancy.number, each.discrepancy.state) for each in self.documents]


async def test_a_comparison_that_is_cancelled_while_it_tells_has_told_it_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sink, heard = Kept(), list[Any]()
    async with shop(sinks=[sink]) as it:
        it.inventory.on("drift")(heard.append)
        await it.by_hand("a", 1)
        task = asyncio.ensure_future(it.inventory.reconciler.run())
        await sink.asked.wait()
        task.cancel()
        await asyncio.wait({task})
        sink.gate.set()
        teller = Teller(it.inventory._running().ground, [sink])  # another process'
        await teller.start()
        await teller.deliver()
        assert sink.told() == []  # who wrote the letter may be on the way with it
        monkeypatch.setattr(telling, "FRESH_MS", -1)
        await teller.deliver()
        await teller.deliver()
        assert sink.told() == [("found", 1, "open")]
        assert [facts["number"] for facts in heard] == [1]


async def test_one_that_is_cancelled_before_anybody_was_told_has_told_the_handlers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []
    async with shop() as it:
        it.inventory.on("drift")(heard.append)
        await it.by_hand("a", 1)
        teller = it.inventory.reconciler._here().teller

        async def is_cancelled() -> bool:
            raise asyncio.CancelledError

        with monkeypatch.context() as patched:
            patched.setattr(teller, "deliver", is_cancelled)
            with pytest.raises(asyncio.CancelledError):
                await it.inventory.reconciler.run()
        assert heard == []
        await teller.deliver()
        await teller.deliver()
        assert [facts["number"] for facts in heard] == [1]


async def test_what_becomes_of_a_discrepancy_is_told_as_it_then_stands() -> None:
    sink = Kept()
    sink.gate.set()
    async with shop(sinks=[sink]) as it:
        await it.by_hand("a", 1)
        await it.by_hand("b", 1)
        first, second = (await it.inventory.reconciler.run()).open
        await it.by_hand(str(second.sku), -1)
        await it.inventory.reconciler.run()
        await it.inventory.reconciler.correct(first.number, "counted", "kim")
        await it.inventory.reconciler.undo(first.number, "wrong", "kim")
        assert sink.told() == [
            ("found", first.number, "open"),
            ("found", second.number, "open"),
            ("gone", second.number, "gone"),
            ("corrected", first.number, "corrected"),
            ("undone", first.number, "undone"),
        ]
        assert sink.documents[2].discrepancy.resolved_ms is not None


async def test_what_is_being_corrected_is_not_told_to_be_gone() -> None:
    sink = Kept()
    sink.gate.set()
    async with shop(sinks=[sink]) as it:
        await it.by_hand("a", 1)
        found, register = await it.one(), it.ledger.register
        await register.turn(found.number, ["open"], "correcting", {})
        letters = it.inventory.reconciler._here().teller.letters("gone")
        assert await register.gone([found.number], letters) == []
        await it.inventory.reconciler._here().teller.deliver()
        assert sink.told() == [("found", found.number, "open")]


async def test_a_sink_that_never_answers_is_given_up_and_left_alone_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "PATIENCE", 0.05)
    monkeypatch.setattr(telling, "SLOW", 0.01)
    monkeypatch.setattr(telling, "REST", 1e6)
    sink, other = Kept(), Kept("other")
    other.gate.set()
    async with shop(sinks=[sink, other]) as it:
        await it.by_hand("a", 1)
        assert len((await it.inventory.reconciler.run()).open) == 1
        assert len(other.documents) == 1
        sink.asked.clear()
        assert not await it.inventory.reconciler._here().teller.deliver()
        assert not sink.asked.is_set()
        sink.gate.set()
        it.inventory.reconciler._here().teller._rests.clear()  # the while is over
        assert await it.inventory.reconciler._here().teller.deliver()
        assert sink.told() == [("found", 1, "open")]


async def test_more_letters_than_are_read_at_once_are_all_delivered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "LETTERS", 2)
    monkeypatch.setattr(telling, "FRESH_MS", -1)
    sink = Kept()
    sink.gate.set()
    async with shop(sinks=[sink]) as it:
        await it.ledger.register.post("mine", [told(number).fields() for number in range(1, 8)])
        assert await it.inventory.reconciler._here().teller.deliver()
        assert [each.discrepancy.number for each in sink.documents] == list(range(1, 8))
        assert await it.ledger.register.letters("mine", 10) == []


@pytest.mark.parametrize(("ids", "aside"), [(["nobody's"], 2), ([], 1)])
async def test_what_a_sink_refuses_by_names_that_nobody_gave_is_not_lost(ids: list[str], aside: int) -> None:
    sink = Kept()
    sink.gate.set()
    async with shop(sinks=[sink]) as it:
        register, teller = it.ledger.register, it.inventory.reconciler._here().teller
        sink.fails = SinkRefused(ids or [f"{told(1).id}"], "no")
        await register.post("mine", [told(1).fields(), told(2).fields()])
        teller._ours |= {("mine", told(1).id), ("mine", told(2).id)}
        assert await teller.deliver()
        assert len(await register.letters("mine.refused", 10)) == aside
        assert await register.letters("mine", 10) == []


async def test_where_one_sink_can_not_be_started_the_others_are_ended() -> None:
    class Unable(Kept):
        async def start(self, ground: Ground) -> None:
            raise ZeroDivisionError

    first = Kept("first")
    inventory = Inventory("memory://", metrics=[], reconcile=Reconcile(sinks=[first, Unable()]))
    with pytest.raises(ZeroDivisionError):
        async with inventory:
            pass
    assert not first.open


async def test_a_ledger_that_was_restored_gives_a_number_again_and_not_the_document(ground: Ground) -> None:
    teller = Teller(ground, [])
    row = Row(1, "m1", "a", "manual_redis", "s", "open", {"what": "stock", "name": "m1\x1fa"}, 1000, None)
    ((_, first),) = teller.letters("found")(row)
    ((_, second),) = teller.letters("found")(replace(row, created_ms=2000))
    assert first["id"] != second["id"]
