"""One order's spans: from the decorated call over its batch and its message to the ledger's transaction."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

from inventory_sdk import InsufficientStock, Inventory, Line, tracing
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.sync.queues.memory import MemoryQueue
from tests.worker_fakes import until


class Seen:
    def __init__(self, **options: object) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**options)  # type: ignore[arg-type]
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("test")

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name.endswith(name)]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span


@pytest.fixture
def seen() -> Iterator[Seen]:
    found = Seen()
    tracing.enable(found.provider)
    yield found
    tracing.disable()
    found.provider.shutdown()


def place(span: ReadableSpan) -> int:
    return span.get_span_context().span_id


def parent(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


def linked(span: ReadableSpan) -> set[int]:
    return {link.context.span_id for link in span.links}


def shop(inventory: Inventory) -> dict[str, object]:
    @inventory.lane("core")
    @inventory.deducts(run="now", operation_id="order", sku="sku", quantity=1)
    async def sell(order: str, sku: str) -> str:
        return order

    @inventory.reserves(run="now", operation_id="order", sku="sku", quantity=1, ttl=60)
    async def hold(order: str, sku: str) -> str:
        if order == "broken":
            raise RuntimeError("no address")
        return order

    return {"sell": sell, "hold": hold}


@pytest.mark.parametrize("queue", [None, "memory://"])
async def test_one_order_is_one_trace_from_the_call_to_the_transaction(seen: Seen, queue: str | None) -> None:
    async with Inventory("memory://", queue=queue, metrics=[NoMetrics()]) as inventory:
        hold = shop(inventory)["hold"]
        await inventory.stock.restock([Line("a", 9)], operation_id="in")
        await inventory.settled()
        assert await hold("o-1", sku="a") == "o-1"  # type: ignore[operator]
        await inventory.settled()
        await until(lambda: seen.named("inventory apply"))
    names = ["hold", "inventory batch", "inventory publish", "inventory apply", "inventory ledger transaction"]
    if queue is None:
        names.remove("inventory publish")  # the journal is the queue: the entry itself carries the batch's context
    way = [seen.one(name) for name in names]
    assert len({span.get_span_context().trace_id for span in way}) == 1
    assert [parent(span) for span in way] == [None, *(place(span) for span in way[:-1])]
    call, batch, apply = way[0], way[1], way[-2]
    attributes = dict(call.attributes or {})
    assert attributes == {"inventory.merchant": "default", "inventory.operation_id": "o-1"}
    assert dict(batch.attributes or {})["inventory.operations"] == 1
    assert dict(apply.attributes or {})["inventory.epoch"] == dict(batch.attributes or {})["inventory.epoch"] == 1


async def test_callers_who_share_a_batch_are_linked_with_it_in_both_directions(seen: Seen) -> None:
    async with Inventory("memory://", queue="memory://", metrics=[NoMetrics()]) as inventory:
        await inventory.stock.restock([Line("a", 90)], operation_id="in")

        async def one(number: int) -> None:
            with seen.tracer.start_as_current_span(f"request {number}"):
                await inventory.stock.deduct([Line("a", 1)], operation_id=f"o-{number}", order="basket")

        await asyncio.gather(*[one(number) for number in range(20)])
        await inventory.settled()
    requests = {place(span): span for span in seen.exporter.get_finished_spans() if span.name.startswith("request")}
    batches = {place(span): span for span in seen.named("inventory batch")}
    shared = [span for span in batches.values() if len(span.links) > 1]
    assert shared
    assert all(parent(span) is None for span in shared)
    assert set().union(*(linked(span) for span in batches.values())) == set(requests)
    for span in requests.values():
        (batch,) = linked(span)
        assert place(span) in linked(batches[batch])
        assert dict(span.attributes or {})["inventory.order"] == "basket"
    applied = set().union(*(linked(span) for span in seen.named("inventory apply")))
    assert applied <= {place(span) for span in seen.named("inventory publish")}
    assert applied


async def test_a_later_batch_of_the_same_task_is_not_a_child_of_the_first_callers_span(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Inventory("memory://", queue="memory://", metrics=[NoMetrics()]) as inventory:
        await inventory.stock.restock([Line("a", 90)], operation_id="in")
        engine = inventory._running().engine
        batcher = engine.batcher(engine.home("default"), "default")
        run, sent = engine.wire.run, asyncio.Event()

        async def held(name: str, *arguments: Any) -> Any:
            if name == "batch" and not sent.is_set():
                sent.set()
                await until(lambda: batcher._waiting)
            return await run(name, *arguments)

        monkeypatch.setattr(engine.wire, "run", held)

        async def traced() -> None:
            with seen.tracer.start_as_current_span("request"):
                await inventory.stock.deduct([Line("a", 1)])

        first = asyncio.create_task(traced())
        await sent.wait()
        # The same task, begun in the first one's context, sends this one too.
        await asyncio.gather(first, inventory.stock.deduct([Line("a", 1)]))
        await inventory.settled()
    assert [dict(span.attributes or {})["inventory.operations"] for span in seen.named("inventory batch")] == [1]
    assert len(seen.named("inventory publish")) == 1


async def test_a_refusal_is_an_answer_and_what_the_function_raises_an_error(seen: Seen) -> None:
    async with Inventory("memory://", metrics=[NoMetrics()]) as inventory:
        functions = shop(inventory)
        await inventory.stock.restock([Line("a", 1)], operation_id="in")
        with pytest.raises(RuntimeError):
            await functions["hold"]("broken", sku="a")  # type: ignore[operator]
        await functions["sell"]("o-1", sku="a")  # type: ignore[operator]
        with pytest.raises(InsufficientStock):
            await functions["sell"]("o-2", sku="a")  # type: ignore[operator]
        level = await inventory.stock.level("a")
    assert level.available == 0
    broken = seen.one("hold")
    assert broken.status.status_code is StatusCode.ERROR
    assert [event.name for event in broken.events] == ["exception"]
    sold, short = seen.named("sell")
    assert sold.status.status_code is short.status.status_code is StatusCode.UNSET
    assert dict(short.attributes or {})["inventory.refused"] == "InsufficientStock"
    assert dict(sold.attributes or {})["inventory.operation_id"] == "o-1"


async def test_what_is_not_sampled_leaves_no_span_and_no_header() -> None:
    unsampled = Seen(sampler=ALWAYS_OFF)
    tracing.enable(unsampled.provider)
    try:
        async with Inventory("memory://", metrics=[NoMetrics()]) as inventory:
            await inventory.stock.restock([Line("a", 9)], operation_id="in")
            await shop(inventory)["sell"]("o-1", sku="a")  # type: ignore[operator]
            await inventory.settled()
        assert not unsampled.exporter.get_finished_spans()
        with tracing.current() as headers:
            assert headers is None
    finally:
        tracing.disable()
        unsampled.provider.shutdown()


async def test_a_caller_who_goes_away_ends_its_span_and_the_batch_goes_on(seen: Seen) -> None:
    async with Inventory("memory://", metrics=[NoMetrics()]) as inventory:
        await inventory.stock.restock([Line("a", 9)], operation_id="in")

        async def request() -> None:
            with seen.tracer.start_as_current_span("request"):
                await inventory.stock.deduct([Line("a", 1)], operation_id="o-1")

        going = asyncio.create_task(request())
        staying = asyncio.create_task(request())
        await asyncio.sleep(0)
        going.cancel()
        await asyncio.wait([going, staying])
        await inventory.settled()
        assert going.cancelled()
        assert (await inventory.stock.level("a")).available == 8
    assert len(seen.named("request")) == 2
    assert trace.get_current_span() is trace.INVALID_SPAN


async def test_headers_that_are_no_trace_are_passed_over(seen: Seen) -> None:
    for carrier in ({"traceparent": "rubbish"}, {"tracestate": "a=b"}, {"traceparent": "00-" + "0" * 32 + "-" + "0" * 16 + "-01"}):
        with tracing.applying([carrier], partition=0):
            assert not trace.get_current_span().is_recording()
    assert not seen.exporter.get_finished_spans()


async def test_a_message_keeps_its_headers_when_it_comes_again() -> None:
    queue = MemoryQueue()
    await queue.bind(0, 1)
    await queue.publish(0, 1, 1, "{}", 1.0, headers={"traceparent": "x"})
    async with queue.consume(0, 1, 0) as consumer:
        (message,) = await consumer.get(1)
    assert message.headers == {"traceparent": "x"}
    async with queue.consume(0, 1, 0) as consumer:
        (message,) = await consumer.get(1)
    assert message.redelivered
    assert message.headers == {"traceparent": "x"}


async def test_without_tracing_no_call_and_no_message_knows_of_it() -> None:
    provider = Seen()
    async with Inventory("memory://", metrics=[NoMetrics()]) as inventory:
        await inventory.stock.restock([Line("a", 9)], operation_id="in")
        with provider.tracer.start_as_current_span("request") as span:
            await shop(inventory)["sell"]("o-1", sku="a")  # type: ignore[operator]
            assert not span.attributes  # type: ignore[attr-defined]
    assert [each.name for each in provider.exporter.get_finished_spans()] == ["request"]


def test_without_opentelemetry_enable_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"inventory_sdk\[otel\]"):
        tracing.enable()
    assert tracing.active is None
