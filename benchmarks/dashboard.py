"""The shipped dashboard on a real run, drawn: ``python -m benchmarks.dashboard --seconds 90 --out docs/operations/dashboard.svg``.

A shop sells on Redis, RabbitMQ and PostgreSQL with a worker beside it: with a hot SKU that is paced, a gray link, comparisons,
recalculations and business alerts. Prometheus (Debian's) scrapes it and answers the dashboard's own
queries; what Grafana would show is drawn as SVG. It stands in for a screenshot where no Grafana can be had.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from prometheus_client import CollectorRegistry, start_http_server
from redis.asyncio import Redis

from inventory_sdk import InsufficientStock, Inventory, Lane, Line
from inventory_sdk.alerts import RefusalRatio, StockOut
from inventory_sdk.errors import InventoryError, Overloaded
from inventory_sdk.metrics.prometheus import PrometheusMetrics
from tests.prometheus_kit import PrometheusServer, prometheus

REDIS: Final = "redis://127.0.0.1:6379/0"
AMQP: Final = "amqp://guest:guest@127.0.0.1:5672/"
POSTGRESQL: Final = "postgresql+asyncpg://postgres@127.0.0.1:5432/test"
COLORS: Final = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0", "#508642", "#cca300")
WIDTH, HEIGHT, GAP = 400, 190, 8
QUIET: Final = {
    "Tried again": "nothing failed",
    "Alerts that fire": "none fires: a minute is short for them",
    "Waiting to be moved": 'this shop has no admission="auto"',
}
"""Panels that may have nothing to show in this run, and why."""


@dataclass
class Panel:
    """One panel's title, unit and what its queries answered: (legend, [(time, value), …])."""

    title: str
    unit: str
    lines: list[tuple[str, list[tuple[float, float]]]]


def make_shop(namespace: str, registry: CollectorRegistry, **servers: Any) -> Inventory:
    """A shop with a core lane that is too small for its rushes, a bulk lane, and alerts that nobody is told of."""
    lanes = {
        "core": Lane(max_concurrency=32, max_queue=64, max_wait=0.2, timeout=2.0),
        "batch": Lane(max_concurrency=2, max_queue=4, max_wait=0.5, timeout=2.0),
    }
    metrics = [PrometheusMetrics(registry)]
    redis = servers.pop("redis")
    inventory = Inventory(redis, **servers, namespace=namespace, table_prefix=f"{namespace}_", lanes=lanes, metrics=metrics)
    inventory.alerts.watch(RefusalRatio(above=0.05, at_least=20), StockOut())
    inventory.alerts.tell(lambda _: None)
    return inventory


async def sell(inventory: Inventory, seconds: float, callers: int = 24, rush: int = 150) -> int:
    """Buyers come and go in waves, some repeat their call, some find nothing left, in the middle a rush; how many calls were made."""

    @inventory.coalesce(key="shop", debounce=0.1, name="recount")
    async def recount(shop: str) -> None:
        await asyncio.sleep(sum(number % 7 for number in range(20_000)) * 1e-7)

    @inventory.trigger("order_paid", runs=recount)
    async def paid(shop: str, order: str) -> None:
        await inventory.stock.confirm(order)

    async def quote_fast(merchant: str) -> None:
        await asyncio.sleep(0.001)

    @inventory.gray("quoting", candidate=quote_fast, merchant="merchant")
    async def quote(merchant: str) -> None:
        await asyncio.sleep(0.003)

    @inventory.lane("core")
    @inventory.hotspot(threshold="60/second", limit="200/second", max_wait=0.1)
    @inventory.reserves(run="now", operation_id="order", sku="sku", quantity="quantity", ttl=600)
    async def place_order(order: str, sku: str, quantity: int) -> None:
        await asyncio.sleep(0.002)

    @inventory.lane("batch")
    @inventory.deducts(run="now", operation_id="order", sku="sku", quantity="quantity")
    async def write_off(order: str, sku: str, quantity: int) -> None:
        await asyncio.sleep(0.01)

    async def compare() -> None:
        """What was touched, again and again."""
        while (left := seconds - (time.monotonic() - began)) > 0:
            await inventory.reconciler.run(touched=True)
            await asyncio.sleep(min(2.0, left))

    calls = 0
    began = time.monotonic()
    await inventory.gray_links.set("quoting", percentage=30, who="benchmark", why="a third of the merchants")
    await inventory.stock.restock([Line(f"sku-{number}", 10_000_000 if number else 60) for number in range(6)], operation_id="in")

    async def buyer(number: int) -> None:
        nonlocal calls
        dice = random.Random(number)
        while (passed := time.monotonic() - began) < seconds:
            if number >= callers and not 0.5 < passed / seconds < 0.65:
                await asyncio.sleep(0.05)
                continue
            order = uuid4().hex
            with suppress(InsufficientStock, Overloaded, InventoryError):
                calls += 1
                work = write_off if dice.random() < 0.03 else place_order
                await work(order, f"sku-{dice.choice([0, 1, 1, 1, 2, 3, 4, 5])}", dice.randint(1, 3))
                if dice.random() < 0.05:
                    await work(order, "sku-1", 1) if dice.random() < 0.1 else await paid(f"shop-{dice.randrange(4)}", order)
                if dice.random() < 0.1:
                    await quote(f"m{dice.randrange(20)}")
                if dice.random() < 0.05:
                    await inventory.stock.deduct([Line("sku-1", 1)], operation_id=f"again-{number}")
            await asyncio.sleep(dice.random() * 0.02)

    await asyncio.gather(compare(), *[buyer(number) for number in range(callers + rush)])
    return calls


def read_panels(server: PrometheusServer, seconds: float, interval: str) -> list[Panel]:
    """Every panel of the shipped dashboard, answered for the last ``seconds``."""
    document = json.loads(files("inventory_sdk.metrics").joinpath("monitoring", "dashboard.json").read_text())
    panels: list[Panel] = []
    for panel in document["panels"]:
        if panel["type"] == "row":
            continue
        found = Panel(panel["title"], panel["fieldConfig"]["defaults"]["unit"], [])
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", interval).replace("$job", ".*")
            for series in server.range(expression, seconds):
                legend = target["legendFormat"]
                for name, value in series["metric"].items():
                    legend = legend.replace("{{" + name + "}}", value)
                legend = re.sub(r" ?\{\{\w+\}\}", "", legend)  # Prometheus drops labels that are empty
                values = [(float(at), float(value)) for at, value in series["values"] if value not in ("NaN", "+Inf")]
                if values:
                    found.lines.append((legend, values))
        panels.append(found)
    return panels


def shown(value: float, unit: str) -> str:
    """A number as an axis has it."""
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"


def drawn(panels: list[Panel], columns: int = 3) -> str:
    """The panels as one SVG picture."""
    rows = -(-len(panels) // columns)
    width, height = columns * (WIDTH + GAP) + GAP, rows * (HEIGHT + GAP) + GAP
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="#111217"/>',
    ]
    for number, panel in enumerate(panels):
        x, y = GAP + number % columns * (WIDTH + GAP), GAP + number // columns * (HEIGHT + GAP)
        out.append(f'<g transform="translate({x} {y})"><rect width="{WIDTH}" height="{HEIGHT}" rx="2" fill="#181b1f"/>')
        out.append(f'<text x="8" y="16" fill="#ccccdc" font-size="12">{escape(panel.title)}</text>')
        why = QUIET.get(panel.title, "nothing happened")
        out += _plotted(panel) if panel.lines else [f'<text x="200" y="90" fill="#7b8087" text-anchor="middle">{escape(why)}</text>']
        out.append("</g>")
    return "\n".join([*out, "</svg>"]) + "\n"


def _plotted(panel: Panel) -> list[str]:
    left, top, right, bottom = 48, 28, WIDTH - 8, HEIGHT - 34
    times = [at for _, values in panel.lines for at, _ in values]
    first, last = min(times), max(times)
    most = max(value for _, values in panel.lines for _, value in values) or 1.0
    out = []
    for part in (0, 0.5, 1):
        y = bottom - part * (bottom - top)
        out.append(f'<line x1="{left}" x2="{right}" y1="{y:.0f}" y2="{y:.0f}" stroke="#2c3235"/>')
        out.append(f'<text x="{left - 4}" y="{y + 3:.0f}" fill="#9fa7b3" text-anchor="end">{shown(most * part, panel.unit)}</text>')
    column = left
    for (legend, values), color in zip(panel.lines, COLORS * 3, strict=False):
        points = [
            f"{left + (at - first) / ((last - first) or 1) * (right - left):.1f},{bottom - value / most * (bottom - top):.1f}"
            for at, value in values
        ]
        out.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" stroke-width="1.2"/>')
        label = legend if len(legend) < 26 else legend[:25] + "…"
        if column + 11 + len(label) * 5.4 < WIDTH:
            out.append(f'<rect x="{column}" y="{HEIGHT - 18}" width="8" height="3" fill="{color}"/>')
            out.append(f'<text x="{column + 11}" y="{HEIGHT - 13}" fill="#ccccdc">{escape(label)}</text>')
            column += 20 + round(len(label) * 5.4)
    return out


async def swept(namespace: str) -> None:
    """Remove what the shop left in Redis, once nobody writes any more."""
    client: Any = Redis.from_url(REDIS)
    keys = [key async for key in client.scan_iter(match=f"*{namespace}*", count=1000)]
    if keys:
        await client.delete(*keys)
    await client.aclose()


async def main(seconds: float, out: Path) -> None:
    """Sell, scrape, draw; the servers are left as they were found."""
    from sqlalchemy.ext.asyncio import create_async_engine

    from inventory_sdk.ledger.schema import tables

    namespace = f"dash{uuid4().hex[:8]}"
    registry = CollectorRegistry()
    exposed, thread = start_http_server(0, "127.0.0.1", registry)
    inventory = make_shop(namespace, registry, redis=REDIS, queue=AMQP, database=POSTGRESQL)
    with tempfile.TemporaryDirectory() as folder, prometheus(Path(folder), exposed.server_port, "1s") as server:
        async with inventory:
            await inventory.create_schema()
            async with inventory.worker():
                calls = await sell(inventory, seconds)
                await inventory.settled()
                await asyncio.sleep(3)
                panels = await asyncio.to_thread(read_panels, server, seconds, "5s")
            running: Any = inventory._running()
            await running.queue.delete(0)
        await swept(namespace)
    engine = create_async_engine(POSTGRESQL)
    async with engine.begin() as connection:
        await connection.run_sync(tables(f"{namespace}_").metadata.drop_all)
    await engine.dispose()
    exposed.shutdown()
    thread.join()
    out.write_text(drawn(panels))  # noqa: ASYNC240  # nobody waits for this loop any more
    print(json.dumps({"benchmark": "dashboard", "calls": calls, "panels": len(panels), "empty": [p.title for p in panels if not p.lines]}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=90.0, help="how long the shop sells (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/operations/dashboard.svg"), help="default %(default)s")
    given = parser.parse_args()
    asyncio.run(main(given.seconds, given.out))
