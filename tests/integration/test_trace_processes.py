"""One order's trace through three processes: the shop front that was asked, the service that sells, the worker that writes the ledger."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inventory_sdk import Inventory, Line

pytestmark = [pytest.mark.redis, pytest.mark.amqp, pytest.mark.postgresql]

SHOP = """
import json, os
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from inventory_sdk import Inventory, tracing

class File(SpanExporter):
    def export(self, spans):
        with open(f"spans-{{os.getpid()}}.jsonl", "a") as file:
            for span in spans:
                context = span.get_span_context()
                file.write(json.dumps({{
                    "process": os.getpid(), "name": span.name, "trace": context.trace_id, "span": context.span_id,
                    "parent": span.parent and span.parent.span_id, "links": [link.context.span_id for link in span.links],
                    "attributes": dict(span.attributes),
                }}) + chr(10))
        return SpanExportResult.SUCCESS

provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(File()))
tracing.enable(provider)
inventory = Inventory({redis!r}, queue={queue!r}, database={database!r}, namespace={namespace!r}, table_prefix={prefix!r}, metrics=())

@inventory.reserves(run="now", operation_id="order", sku="sku", quantity="quantity", ttl=600)
async def place_order(order: str, sku: str, quantity: int) -> None: ...
"""

FRONT = """
import subprocess, sys
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
import shop
seller = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
for number in range(5):
    with shop.provider.get_tracer("front").start_as_current_span(f"POST /orders/{number}"):
        carrier = {}
        TraceContextTextMapPropagator().inject(carrier)
        print(f"order-{number}", carrier["traceparent"], file=seller.stdin, flush=True)
        seller.stdout.readline()
seller.stdin.close()
sys.exit(seller.wait())
"""

SELLER = """
import asyncio, sys
from opentelemetry import context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
import shop

async def sell():
    async with shop.inventory:
        for line in sys.stdin:
            order, parent = line.split()
            token = context.attach(TraceContextTextMapPropagator().extract({"traceparent": parent}))
            await shop.place_order(order, "a", 2)
            context.detach(token)
            await shop.inventory.settled()  # one by one: what shares a transaction is linked with it and has traces of its own
            print("done", flush=True)

asyncio.run(sell())
"""

WORKER = [sys.executable, "-c", "from inventory_sdk.cli import main; main()", "worker", "shop:inventory"]
WAY = ["POST /orders", "shop:place_order", "inventory batch", "inventory publish", "inventory apply", "inventory ledger transaction"]


async def test_one_order_is_one_trace_through_three_processes(
    tmp_path: Path, swept: str, redis_url: str, amqp_url: str, postgresql_url: str
) -> None:
    place = {"redis": redis_url, "queue": amqp_url, "database": postgresql_url, "namespace": swept, "prefix": f"{swept}_"}
    (tmp_path / "shop.py").write_text(SHOP.format(**place))
    inventory = Inventory(redis_url, queue=amqp_url, database=postgresql_url, namespace=swept, table_prefix=f"{swept}_", metrics=())
    async with inventory:
        await inventory.create_schema()
        await inventory.stock.restock([Line("a", 100)], operation_id="in")
        spans = await asyncio.to_thread(_played, tmp_path)
    complete = [order for order in range(5) if _whole(spans, order)]
    # An entry that the worker found in the journal before its message came has no headers; of five, that is never all.
    assert complete, [(span["name"], span["trace"], span["process"]) for span in spans]


def _played(folder: Path) -> list[dict[str, Any]]:
    """The spans of all three processes, after five orders."""
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).resolve().parents[2]}:{folder}"}
    worker = subprocess.Popen(WORKER, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        assert worker.stderr is not None
        for line in worker.stderr:
            if "is running" in line:
                break
        subprocess.run([sys.executable, "-c", FRONT, SELLER], cwd=folder, env=environment, check=True, timeout=60)
    finally:
        worker.terminate()
        worker.communicate(timeout=30)
    return [json.loads(line) for file in folder.glob("spans-*.jsonl") for line in file.read_text().splitlines()]


def _whole(spans: list[dict[str, Any]], order: int) -> bool:
    """From the front's span down to the transaction, by parents, in three processes."""
    (root,) = [span for span in spans if span["name"] == f"POST /orders/{order}"]
    way = [root]
    for name in WAY[1:]:
        # Where orders share a batch or a transaction, that one is linked to theirs.
        found = [
            span
            for span in spans
            if span["name"] == name and (span["parent"] == way[-1]["span"] or (not span["parent"] and way[-1]["span"] in span["links"]))
        ]
        if not found:
            return False
        way.append(found[0])
    assert way[1]["attributes"]["inventory.operation_id"] == f"order-{order}"
    one_trace = len({span["trace"] for span in way}) == 1
    assert len({span["process"] for span in way}) == 3
    return one_trace
