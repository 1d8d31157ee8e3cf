"""What every sink must do, one suite for all of them: each event arrives in its series, labels stay few, nothing raises or blocks."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry

from inventory_sdk import InvalidOperation, Inventory, Line
from inventory_sdk.metrics import Alerting, Applied, BatchSent, Behind, Event, Fanout, Happened, LaneUsed, Published, Retried
from inventory_sdk.metrics.events import (
    Compared,
    ComparisonsOverdue,
    DiscrepanciesOpen,
    Governed,
    GrayRouted,
    GrayRules,
    GrayRulesRead,
    HotspotsUsed,
    PartitionOpen,
    PromotionsWaiting,
    Recalculated,
    RecalculationsDue,
    Triggered,
)
from inventory_sdk.metrics.opentelemetry import OpenTelemetryMetrics
from inventory_sdk.metrics.prometheus import PrometheusMetrics
from inventory_sdk.metrics.series import TABLE, Reading, Series, all_series
from inventory_sdk.metrics.sink import MOST, TOP, SeriesSink
from inventory_sdk.metrics.statsd import MAX_PACKET, StatsdMetrics

EXAMPLES: list[Event] = [
    BatchSent(0, "core", 12, {"reserve": 8, "deduct": 2}, {"insufficient": 1}, 1, 0.004),
    Published(0, 0.002),
    Published(0, 0.1, failed="unconfirmed"),
    Applied(0, 3, 41, 500, 2, 1, 4, 0.2, 0.03),
    Behind(0, 7, 80, 1.5, 300),
    PartitionOpen(0, True),
    Retried("ledger", "deadlock"),
    Happened("frozen", {"partition": "0", "why": "meta_missing"}),
    LaneUsed("core", 3, 2, 1, 40, 1, (0.002, 0.03), {"queue_full": 5}),
    HotspotsUsed(2, 1, 0, 9, (0.01,), {"waited": 2}, {"granted": 3}, (("m1", "sku-1", 120.0),)),
    GrayRouted("checkout", "candidate", 5, 1, 0.25),
    GrayRules("checkout", 7, 12.5, True, False),
    GrayRulesRead(3.5),
    PromotionsWaiting(2, 1),
    Compared("everything", 1000, 5, {"went_back": 2}, 1.5),
    DiscrepanciesOpen({"went_back": 3}),
    ComparisonsOverdue({"everything": 0.0, "what": 12.5}),
    Triggered("recount", {"shop_saved": 3}),
    RecalculationsDue("recount", 4, 2.5),
    Recalculated("recount", "done", 0.5, 0.2, 3, 0.1),
    Governed(0.7, 0.01, {"redistribution": 0.5}),
    Alerting({"drift": 2}),
]

Found = Callable[[str, dict[str, str]], float | None]
"""(series name, labels) → the counter's sum, the gauge's value, the histogram's sum of observations."""


@dataclass
class Bench:
    sink: SeriesSink
    found: Found


def prometheus() -> Iterator[Bench]:
    registry = CollectorRegistry()

    def found(name: str, labels: dict[str, str]) -> float | None:
        for end in ("", "_total", "_sum"):
            value = registry.get_sample_value(f"inventory_{name}{end}", labels)
            if value is not None:
                return value
        return None

    yield Bench(PrometheusMetrics(registry), found)


def opentelemetry() -> Iterator[Bench]:
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])

    def found(name: str, labels: dict[str, str]) -> float | None:
        data = reader.get_metrics_data()
        for resource in data.resource_metrics if data is not None else ():
            for metric in resource.scope_metrics[0].metrics:
                for point in metric.data.data_points:
                    if metric.name == f"inventory.{name}" and dict(point.attributes or {}) == labels:
                        value: Any = point
                        return float(value.sum if hasattr(value, "sum") else value.value)
        return None

    yield Bench(OpenTelemetryMetrics(provider), found)
    provider.shutdown()


def statsd() -> Iterator[Bench]:
    yield from _statsd(tags=True)


def statsd_without_tags() -> Iterator[Bench]:
    yield from _statsd(tags=False)


def _statsd(tags: bool) -> Iterator[Bench]:
    agent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    agent.bind(("127.0.0.1", 0))
    agent.setblocking(False)
    sink = StatsdMetrics("127.0.0.1", agent.getsockname()[1], tags=tags)
    values: dict[str, float] = {}

    def found(name: str, labels: dict[str, str]) -> float | None:
        while True:
            try:
                packet = agent.recv(65_536)
            except BlockingIOError:
                break
            assert len(packet) <= MAX_PACKET
            for line in packet.decode().splitlines():
                matched = re.fullmatch(r"([^:|]+):([^|]+)\|(c|g|ms|h)(\|#.*)?", line)
                assert matched, line
                key, value = matched[1] + (matched[4] or ""), float(matched[2])
                if matched[3] == "ms" and "_operations" not in matched[1]:
                    value /= 1000
                values[key] = value if matched[3] == "g" else values.get(key, 0) + value
        if name in {series.name for series in all_series() if series.kind == "histogram"}:
            name = name.removesuffix("_seconds")  # StatsD's own word for it is a timer
        if tags:
            return values.get(f"inventory.{name}" + ("|#" + ",".join(f"{key}:{value}" for key, value in labels.items()) if labels else ""))
        return values.get(".".join([f"inventory.{name}", *(value or "none" for value in labels.values())]))

    yield Bench(sink, found)
    sink.close()
    agent.close()


SINKS = [prometheus, opentelemetry, statsd, statsd_without_tags]


@pytest.fixture(params=SINKS, ids=lambda make: make.__name__)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    yield from request.param()


def expected() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for event in EXAMPLES:
        for series, labels, value in TABLE[type(event)].read(event):
            key = (series.name, tuple(zip(series.labels, labels, strict=True)))
            sums[key] = value if series.kind == "gauge" else sums.get(key, 0) + value
    return sums


def test_every_event_has_an_example_and_a_row_in_the_table() -> None:
    assert set(typing.get_args(Event)) == set(TABLE) == {type(example) for example in EXAMPLES}


def test_every_series_is_written_by_some_event() -> None:
    assert {name for name, _ in expected()} == {series.name for series in all_series()}


def test_the_series_are_in_base_units_with_bounded_labels() -> None:
    for series in all_series():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", series.name)
        assert not re.search(r"milli|micro|minutes|_ms$|_total$|_count$|_sum$", series.name)
        assert series.name.endswith("_seconds") == (series.unit == "s")
        assert (series.kind == "histogram") == bool(series.buckets)
        if {"sku", "merchant"} & set(series.labels):
            assert any(series in reading.whole for reading in TABLE.values()), f"{series.name} has a row for every SKU there is"


def test_every_event_arrives_in_its_series(bench: Bench) -> None:
    for event in EXAMPLES:
        bench.sink.record(event)
    for (name, labels), value in expected().items():
        assert bench.found(name, dict(labels)) == pytest.approx(value), (name, labels)


def test_counters_add_up_and_gauges_are_set(bench: Bench) -> None:
    for operations in (9, 4):
        bench.sink.record(Behind(1, 1, operations, 0.1, 5))
        bench.sink.record(Retried("redis", "lost"))
    assert bench.found("behind_operations", {"partition": "1"}) == 4
    assert bench.found("retries", {"what": "redis", "reason": "lost"}) == 2


def test_an_event_with_many_numbers_arrives_whole(bench: Bench) -> None:
    bench.sink.record(LaneUsed("core", 3, 2, 1, 40, 1, (0.5,) * 300, {}))
    assert bench.found("lane_wait_seconds", {"lane": "core"}) == pytest.approx(150)


def test_an_event_of_a_later_release_is_none_of_its_business(bench: Bench) -> None:
    later: Any = object()
    bench.sink.record(later)


def test_label_values_of_any_kind_do_no_harm(bench: Bench) -> None:
    for reason in ("a b", 'quo"te', "new\nline", "pipe|hash#colon:comma,", "größe", "", "x" * 2000):
        bench.sink.record(Retried("redis", reason))
    bench.sink.record(Retried("redis", "plain"))
    assert bench.found("retries", {"what": "redis", "reason": "plain"}) == 1


def test_a_flood_of_label_values_ends_up_in_one_row(bench: Bench) -> None:
    for number in range(MOST + 25):
        bench.sink.record(Retried("redis", f"reason{number}"))
        if number % 50 == 0:
            bench.found("retries", {})  # an agent's socket holds a few hundred packets
    assert bench.found("retries", {"what": "other", "reason": "other"}) == 25
    assert bench.found("retries", {"what": "redis", "reason": "reason0"}) == 1
    assert bench.found("retries", {"what": "redis", "reason": f"reason{MOST + 1}"}) is None


def test_a_flood_of_hot_skus_leaves_few_rows_whether_or_not_the_system_can_forget_them(bench: Bench) -> None:
    for number in range(0, 3 * MOST, TOP):
        top = [("m1", f"sku-{number + place}", 100.0 - place) for place in range(TOP)]
        bench.sink.record(HotspotsUsed(TOP, 0, 0, 1, (), {}, {}, top))
        if number % (20 * TOP) == 0:
            bench.found("hotspot_rate", {})  # an agent's socket holds a few hundred packets
    rows = [row for row in bench.sink._writes if row[0].name == "hotspot_rate"]
    assert TOP <= len(rows) <= MOST + 1
    bench.sink.record(HotspotsUsed(0, 0, 0, 0, (), {}, {}, ()))
    for series, labels in rows:
        assert not bench.found(series.name, dict(zip(series.labels, labels, strict=True)))


def test_an_agent_of_statsd_sees_few_names_however_many_skus_were_hot() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as agent:
        agent.bind(("127.0.0.1", 0))
        agent.setblocking(False)
        sink = StatsdMetrics(*agent.getsockname())
        names: set[bytes] = set()
        for number in range(0, 3 * MOST, TOP):
            sink.record(HotspotsUsed(TOP, 0, 0, 1, (), {}, {}, [("m1", f"sku-{number + place}", 1.0) for place in range(TOP)]))
            with suppress(BlockingIOError):
                while True:
                    lines = agent.recv(65_536).splitlines()
                    names |= {line.partition(b"|#")[2] for line in lines if line.startswith(b"inventory.hotspot_rate:")}
        sink.close()
    assert MOST <= len(names) <= MOST + 1


def test_rows_are_opened_once_however_many_threads_write() -> None:
    class Slow(SeriesSink):
        def __init__(self) -> None:
            super().__init__()
            self.both = Barrier(2)
            self.opened_rows: list[tuple[str, ...]] = []

        def opened(self, series: Series, labels: tuple[str, ...]) -> Callable[[float], None]:
            self.opened_rows.append(labels)
            with suppress(BrokenBarrierError):
                self.both.wait(0.2)  # for another thread to come in here as well; it must not
            return lambda _: None

    sink = Slow()
    threads = [Thread(target=sink.record, args=(Retried("redis", "lost"),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sink.opened_rows == [("redis", "lost")]


@dataclass(frozen=True)
class Top:
    rows: dict[str, float]


def test_a_series_with_a_row_per_sku_has_the_top_rows_of_its_last_event_only(monkeypatch: pytest.MonkeyPatch) -> None:
    hot = Series("hot_rate", "gauge", "Calls a second.", ("sku",))
    monkeypatch.setitem(TABLE, Top, Reading(lambda event: ((hot, (sku,), rate) for sku, rate in event.rows.items()), (hot,)))
    for module in ("prometheus", "opentelemetry"):
        monkeypatch.setattr(f"inventory_sdk.metrics.{module}.all_series", lambda: [*all_series(), hot])
    for make in SINKS:
        for bench in make():
            record: Any = bench.sink.record
            record(Top({f"sku{number}": number for number in range(TOP + 5)}))
            assert bench.found("hot_rate", {"sku": f"sku{TOP - 1}"}) == TOP - 1
            assert bench.found("hot_rate", {"sku": f"sku{TOP}"}) is None
            record(Top({"sku3": 7.0}))
            assert bench.found("hot_rate", {"sku": "sku3"}) == 7
            assert not bench.found("hot_rate", {"sku": "sku4"})
            record(Top({}))
            assert not bench.found("hot_rate", {"sku": "sku3"})


def test_a_series_needs_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Series("plain_seconds", "gauge", "Seconds.", (), "s")
    monkeypatch.setitem(TABLE, Top, Reading(lambda event: [(plain, (), event.rows["only"])]))
    for module in ("prometheus", "opentelemetry"):
        monkeypatch.setattr(f"inventory_sdk.metrics.{module}.all_series", lambda: [*all_series(), plain])
    for make in SINKS:
        for bench in make():
            record: Any = bench.sink.record
            record(Top({"only": 7.0}))
            assert bench.found("plain_seconds", {}) == 7


def test_an_agent_that_is_away_costs_nothing_but_the_numbers() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    sink = StatsdMetrics("127.0.0.1", port)
    for _ in range(200):
        sink.record(EXAMPLES[0])
    assert sink.dropped
    sink.close()
    dropped = sink.dropped
    sink.record(EXAMPLES[0])
    assert sink.dropped == dropped + 1


def test_an_agent_that_comes_back_is_told_again() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as agent:
        agent.bind(("127.0.0.1", 0))
        place = agent.getsockname()
    sink = StatsdMetrics(*place)
    for _ in range(5):
        sink.record(Retried("redis", "lost"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as agent:
        agent.bind(place)
        agent.settimeout(5)
        sink.record(Retried("redis", "first"))  # the kernel may still report the refusal of the last one instead
        sink.record(Retried("redis", "second"))
        assert agent.recv(2000).startswith(b"inventory.retries:1|c|#what:redis,reason:")
    sink.close()


def test_an_agent_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    with pytest.raises(InvalidOperation, match=r"host='agent.invalid'.*not known"):
        StatsdMetrics("agent.invalid")


async def test_an_inventory_tells_all_of_its_sinks_the_same() -> None:
    benches = [(generator := make(), next(generator)) for make in SINKS]
    async with Inventory("memory://", metrics=[each.sink for _, each in benches]) as inventory:
        await inventory.stock.restock([Line("a", 3)], operation_id="in")
        await inventory.stock.deduct([Line("a", 2)])
        await inventory.settled()
    for generator, each in benches:
        assert each.found("operations_accepted", {"kind": "deduct"}) == 1
        assert (each.found("operations_applied", {"partition": "0"}) or 0) >= 1
        assert list(generator) == []


def test_the_sinks_work_behind_a_fanout_one_by_one() -> None:
    assert isinstance(Inventory("memory://", metrics=[PrometheusMetrics(CollectorRegistry()), StatsdMetrics()])._metrics, Fanout)


PROCESS = """
import sys
from prometheus_client import CollectorRegistry
from inventory_sdk.metrics import Applied, Behind, ComparisonsOverdue, HotspotsUsed, LaneUsed
from inventory_sdk.metrics.prometheus import PrometheusMetrics
metrics = PrometheusMetrics(CollectorRegistry())
metrics.record(Applied(0, 3, int(sys.argv[1]), 10, 0, 0, 0, 0.1, 0.01))
metrics.record(LaneUsed("core", 2, 1, 0, 5, 0, (0.2,), {}))
metrics.record(Behind(0, int(sys.argv[1]), 0, 0.0, 0))
metrics.record(ComparisonsOverdue({"what": float(sys.argv[1])}))
for number in range(1200):
    metrics.record(HotspotsUsed(1, 0, 0, 1, (), {}, {}, [("m1", f"sku-{number}", 5.0)]))
metrics.record(HotspotsUsed(1, 0, 0, 1, (), {}, {}, [("m1", "sku-7", 9.0)]))
print("recorded", flush=True)
sys.stdin.read()
"""
SCRAPE = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_processes_of_one_service_add_up_in_prometheus_multiprocess_mode(tmp_path: Path) -> None:
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    root = Path(__file__).resolve().parents[2]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        for number in (41, 40):
            command = [sys.executable, "-c", PROCESS, str(number)]
            worker = subprocess.Popen(command, env=environment, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            workers.append(worker)
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"recorded\n"  # the second one's report is the most recent
        scrape = [sys.executable, "-c", SCRAPE]
        shown = subprocess.run(scrape, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
        assert 'inventory_behind_entries{partition="0"} 40.0' in shown
        assert 'inventory_operations_applied_total{partition="0"} 20.0' in shown
        assert 'inventory_lane_running{lane="core"} 4.0' in shown
        assert 'inventory_lane_wait_seconds_count{lane="core"} 2.0' in shown
        assert 'inventory_applied_epoch{partition="0"} 3.0' in shown
        assert 'inventory_comparison_overdue_seconds{scope="what"} 40.0' in shown
        assert 'inventory_hotspot_rate{merchant="m1",sku="sku-7"} 9.0' in shown
        assert shown.count("\ninventory_hotspot_rate{") <= MOST + 1
        assert shown.count('inventory_hotspot_rate{merchant="m1",') - shown.count("} 0.0\n") <= 1
        assert "pid=" not in shown
        # The second one dies without a word. What it did stays counted; what it was at is over once its end was noted.
        workers[1].kill()
        workers[1].wait()
        bury = f"from prometheus_client import multiprocess; multiprocess.mark_process_dead({workers[1].pid})"
        subprocess.run([sys.executable, "-c", bury], env=environment, cwd=root, check=True)
        shown = subprocess.run(scrape, env=environment, cwd=root, capture_output=True, text=True, check=True).stdout
        assert 'inventory_operations_applied_total{partition="0"} 20.0' in shown
        assert 'inventory_lane_running{lane="core"} 2.0' in shown
        assert 'inventory_behind_entries{partition="0"} 41.0' in shown
        assert 'inventory_comparison_overdue_seconds{scope="what"} 41.0' in shown
    finally:
        for worker in workers:
            worker.communicate(b"")


def test_with_opentelemetrys_api_alone_everything_is_taken_and_goes_nowhere() -> None:
    lines = [
        "import sys",
        "sys.modules['opentelemetry.sdk'] = None",
        "from inventory_sdk.metrics.events import *",
        "from inventory_sdk.metrics.opentelemetry import OpenTelemetryMetrics",
        "sink = OpenTelemetryMetrics()",
        f"for event in {EXAMPLES!r}:",
        "    sink.record(event)",
        "print('taken')",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("taken\n", "")


def test_without_opentelemetry_the_sink_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"inventory_sdk\[otel\]"):
        OpenTelemetryMetrics()
