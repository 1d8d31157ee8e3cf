"""Every query of the shipped dashboard, asked of a real Prometheus that scraped a shop selling on real servers."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Final

import pytest
from prometheus_client import CollectorRegistry, start_http_server

from benchmarks.dashboard import QUIET, drawn, make_shop, read_panels, sell
from tests.prometheus_kit import prometheus

pytestmark = [pytest.mark.redis, pytest.mark.amqp, pytest.mark.postgresql]

SECONDS: Final = float(os.environ.get("INVENTORY_TEST_DASHBOARD_SECONDS", "6"))


async def test_every_panel_shows_what_a_real_run_did(
    tmp_path: Path, swept: str, redis_url: str, amqp_url: str, postgresql_url: str
) -> None:
    registry = CollectorRegistry()
    exposed, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        inventory = make_shop(swept, registry, redis=redis_url, queue=amqp_url, database=postgresql_url)
        with prometheus(tmp_path, exposed.server_port) as server:
            async with inventory:
                await inventory.create_schema()
                async with inventory.worker():
                    await sell(inventory, SECONDS)
                    await inventory.settled()
                    applied = registry.get_sample_value("inventory_operations_applied_total", {"partition": "0"})

                    def seen() -> float:
                        (series,) = server.ask("query", query="sum(inventory_operations_applied_total)")["result"]
                        return float(series["value"][1])

                    while await asyncio.to_thread(seen) != applied:
                        await asyncio.sleep(0.2)
                    panels = await asyncio.to_thread(read_panels, server, SECONDS + 2, "4s")
                    rules = await asyncio.to_thread(server.ask, "rules")
    finally:
        exposed.shutdown()
        exposed.server_close()
        thread.join()
    assert {panel.title for panel in panels if not panel.lines} <= set(QUIET)
    shown = {panel.title: panel for panel in panels}
    assert {legend for legend, _ in shown["Accepted"].lines} >= {"reserve", "deduct", "confirm"}
    assert {legend for legend, _ in shown["Refused"].lines} >= {"insufficient"}
    assert any(legend.startswith("core ") and "admitted" not in legend for legend, _ in shown["Admitted and refused"].lines)
    assert max(value for _, values in shown["Operations per script call"].lines for _, value in values) > 1
    assert drawn(panels).count("<polyline") == sum(len(panel.lines) for panel in panels)
    states = {rule["name"]: rule["health"] for group in rules["groups"] for rule in group["rules"]}
    assert set(states.values()) == {"ok"}, states
