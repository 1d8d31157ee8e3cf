"""Metrics: every event lands in a series, sinks don't hurt each other, and several inventories share collectors."""

from __future__ import annotations

import logging

import pytest
from prometheus_client import CollectorRegistry

from inventory_sdk import Inventory, Line
from inventory_sdk.metrics import (
    Applied,
    BatchSent,
    Compared,
    Event,
    Fanout,
    Governed,
    GrayRouted,
    GrayRules,
    Happened,
    HotspotsUsed,
    LaneUsed,
    NoMetrics,
    Published,
    Recalculated,
    Retried,
    Triggered,
)
from inventory_sdk.metrics.prometheus import PrometheusMetrics

BATCH = BatchSent(0, "core", 12, {"reserve": 8, "deduct": 2}, {"insufficient": 1}, 1, 0.004)
APPLIED = Applied(0, 3, 41, 500, 2, 1, 4, 0.2, 0.03)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_every_event_is_counted_in_base_units(registry: CollectorRegistry) -> None:
    metrics = PrometheusMetrics(registry)
    for event in (BATCH, BATCH, Published(0, 0.002), Published(0, 0.1, failed="timeout"), APPLIED, Retried("ledger", "OSError")):
        metrics.record(event)
    metrics.record(Happened("frozen", {"partition": "0", "why": "meta_missing"}))
    metrics.record(Happened("dead_letter", {"task": "write_order"}))
    value = registry.get_sample_value
    assert value("inventory_operations_accepted_total", {"kind": "reserve"}) == 16
    assert value("inventory_operations_refused_total", {"reason": "insufficient"}) == 2
    assert value("inventory_operations_replayed_total", {"lane": "core"}) == 2
    assert value("inventory_batch_operations_sum", {"lane": "core"}) == 24
    assert value("inventory_batch_seconds_count", {"lane": "core"}) == 2
    assert value("inventory_entries_published_total", {"partition": "0"}) == 1
    assert value("inventory_publish_failures_total", {"partition": "0", "reason": "timeout"}) == 1
    assert value("inventory_publish_seconds_sum", {"partition": "0"}) == pytest.approx(0.002)
    assert value("inventory_operations_applied_total", {"partition": "0"}) == 500
    assert value("inventory_operations_rejected_total", {"partition": "0"}) == 2
    assert value("inventory_operations_duplicate_total", {"partition": "0"}) == 1
    assert value("inventory_entries_redelivered_total", {"partition": "0"}) == 4
    assert value("inventory_apply_lag_seconds_sum", {"partition": "0"}) == pytest.approx(0.2)
    assert value("inventory_apply_seconds_sum", {"partition": "0"}) == pytest.approx(0.03)
    assert value("inventory_applied_sequence", {"partition": "0"}) == 41
    assert value("inventory_applied_epoch", {"partition": "0"}) == 3
    assert value("inventory_retries_total", {"what": "ledger", "reason": "OSError"}) == 1
    assert value("inventory_events_total", {"name": "frozen", "partition": "0", "reason": "meta_missing"}) == 1
    assert value("inventory_events_total", {"name": "dead_letter", "partition": "", "reason": "write_order"}) == 1


def test_a_comparison_is_counted_and_only_one_of_everything_says_how_many_are_open(registry: CollectorRegistry) -> None:
    metrics = PrometheusMetrics(registry)
    metrics.record(Compared("everything", 1000, 5, {"went_back": 2, "rejected": 0}, 1.5))
    metrics.record(Compared("what", 10, 5, {}, 0.5))
    value = registry.get_sample_value
    assert value("inventory_compared_skus_total", {"scope": "everything"}) == 1000
    assert value("inventory_compared_holds_total", {"scope": "what"}) == 5
    assert value("inventory_comparison_seconds_sum", {"scope": "everything"}) == 1.5
    assert value("inventory_discrepancies_open", {"cause": "went_back"}) == 2


def test_redistribution_is_counted_by_its_runs_and_triggers(registry: CollectorRegistry) -> None:
    metrics = PrometheusMetrics(registry)
    metrics.record(Triggered("shops", {"paid": 3, "returned": 1}))
    metrics.record(Recalculated("shops", "done", 0.5, 0.25, 4, 0.2))
    metrics.record(Recalculated("shops", "lost", 1.5, 0.75, 4, 0.2))  # whoever has the key now answers its requests
    metrics.record(Governed(0.9, 0.01, {"redistribution": 0.1, "core": 0.8}))
    value = registry.get_sample_value
    assert value("inventory_trigger_calls_total", {"function": "shops", "trigger": "paid"}) == 3
    assert value("inventory_recalculations_total", {"function": "shops", "outcome": "done"}) == 1
    assert value("inventory_recalculations_total", {"function": "shops", "outcome": "lost"}) == 1
    assert value("inventory_recalculation_calls_total", {"function": "shops"}) == 4
    assert value("inventory_recalculation_cpu_seconds_total", {"function": "shops"}) == 1.0
    assert value("inventory_recalculation_seconds_count", {"function": "shops"}) == 2
    assert value("inventory_recalculation_wait_seconds_sum", {"function": "shops"}) == pytest.approx(0.2)
    assert value("inventory_governor_share_ratio", {"what": "core"}) == 0.8
    assert value("inventory_cpu_in_use_ratio") == 0.9
    assert value("inventory_loop_lag_seconds") == 0.01


def test_a_lane_is_counted_by_its_reports(registry: CollectorRegistry) -> None:
    metrics = PrometheusMetrics(registry)
    metrics.record(LaneUsed("core", 3, 2, 1, 40, 1, (0.002, 0.03), {"queue_full": 5}))
    metrics.record(LaneUsed("core", 1, 0, 0, 2, 0, (), {"queue_full": 1, "waited": 1}))
    value = registry.get_sample_value
    assert value("inventory_lane_running", {"lane": "core"}) == 1
    assert value("inventory_lane_waiting", {"lane": "core"}) == 0
    assert value("inventory_lane_lent", {"lane": "core"}) == 0
    assert value("inventory_lane_admitted_total", {"lane": "core"}) == 42
    assert value("inventory_lane_deadline_exceeded_total", {"lane": "core"}) == 1
    assert value("inventory_lane_refused_total", {"lane": "core", "reason": "queue_full"}) == 6
    assert value("inventory_lane_wait_seconds_sum", {"lane": "core"}) == pytest.approx(0.032)


def test_hot_keys_are_shown_while_they_are_the_hottest_and_their_labels_stay_few(registry: CollectorRegistry) -> None:
    metrics = PrometheusMetrics(registry)
    for turn in range(50):
        top = [("m1", f"sku-{turn}-{number}", 100.0 + number) for number in range(10)]
        metrics.record(HotspotsUsed(12, 3, 1, 40, (0.002, 0.03), {"waited": 2}, {"granted": 4, "away": 1}, top))
    value = registry.get_sample_value
    assert value("inventory_hotspot_rate", {"merchant": "m1", "sku": "sku-49-9"}) == 109.0
    assert sum(sample.name == "inventory_hotspot_rate" for metric in registry.collect() for sample in metric.samples) == 10
    assert (value("inventory_hotspot_keys"), value("inventory_hotspot_waiting"), value("inventory_hotspot_alone")) == (12, 3, 1)
    assert value("inventory_hotspot_admitted_total") == 2000
    assert value("inventory_hotspot_refused_total", {"reason": "waited"}) == 100
    assert value("inventory_hotspot_leases_total", {"outcome": "away"}) == 50
    assert value("inventory_hotspot_wait_seconds_sum") == pytest.approx(1.6)


def test_two_inventories_in_one_process_share_the_collectors(registry: CollectorRegistry) -> None:
    first, second = PrometheusMetrics(registry), PrometheusMetrics(registry)
    first.record(BATCH)
    second.record(BATCH)
    assert registry.get_sample_value("inventory_operations_accepted_total", {"kind": "deduct"}) == 4


def test_another_registry_has_its_own_collectors(registry: CollectorRegistry) -> None:
    other = CollectorRegistry()
    PrometheusMetrics(registry).record(APPLIED)
    PrometheusMetrics(other)
    assert other.get_sample_value("inventory_operations_applied_total", {"partition": "0"}) is None


def test_the_default_is_the_global_registry_and_can_be_made_again() -> None:
    PrometheusMetrics()
    PrometheusMetrics().record(BATCH)


class Keeps:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        self.events.append(event)


class Breaks:
    def record(self, event: Event) -> None:
        raise RuntimeError("no disk")


FAILED = Happened("metrics_sink_failed", {"reason": "Breaks"})


def test_a_sink_that_raises_hurts_nobody_and_the_others_count_it(caplog: pytest.LogCaptureFixture) -> None:
    before, behind = Keeps(), Keeps()
    fanout = Fanout([before, Breaks(), behind, NoMetrics()])
    with caplog.at_level(logging.ERROR):
        for _ in range(5):
            fanout.record(BATCH)
    assert before.events == [BATCH, FAILED] * 5
    assert behind.events == [FAILED, BATCH] * 5
    assert fanout.failures == [0, 5, 0, 0]
    assert len(caplog.records) == 3  # the first, the second, the fourth
    assert "Breaks failed (4 times by now)" in caplog.text


def test_two_sinks_that_raise_do_not_tell_each_other_for_ever() -> None:
    kept = Keeps()
    fanout = Fanout([Breaks(), kept, Breaks()])
    fanout.record(BATCH)
    assert kept.events == [FAILED, BATCH, FAILED]
    assert fanout.failures == [2, 0, 2]


async def test_a_sale_goes_on_beside_sinks_that_raise(registry: CollectorRegistry) -> None:
    async with Inventory("memory://", metrics=[Breaks(), PrometheusMetrics(registry)]) as inventory:
        await inventory.stock.restock([Line("a", 3)], operation_id="in")
        receipt = await inventory.stock.deduct([Line("a", 2)])
        await inventory.settled(receipt)
        assert (await inventory.stock.level("a")).available == 1
    counted = registry.get_sample_value("inventory_events_total", {"name": "metrics_sink_failed", "partition": "", "reason": "Breaks"})
    assert counted is not None
    assert counted >= 2


def test_what_one_inventory_has_hot_does_not_go_when_it_cools_in_another(registry: CollectorRegistry) -> None:
    one, two = PrometheusMetrics(registry), PrometheusMetrics(registry)
    for sink in (one, two):
        sink.record(HotspotsUsed(1, 0, 0, 1, (), {}, {}, [("m1", "a", 100.0)]))
    one.record(HotspotsUsed(0, 0, 0, 1, (), {}, {}, ()))
    two.record(HotspotsUsed(1, 0, 0, 1, (), {}, {}, [("m1", "a", 90.0)]))
    assert registry.get_sample_value("inventory_hotspot_rate", {"merchant": "m1", "sku": "a"}) == 90.0
    two.record(HotspotsUsed(0, 0, 0, 1, (), {}, {}, ()))
    assert registry.get_sample_value("inventory_hotspot_rate", {"merchant": "m1", "sku": "a"}) is None


def test_a_gray_link_is_counted_by_side_and_shown_by_its_rules(registry: CollectorRegistry) -> None:
    metrics = PrometheusMetrics(registry)
    metrics.record(GrayRouted("checkout", "candidate", 5, 1, 0.25))
    metrics.record(GrayRouted("checkout", "candidate", 3, 0, 0.25))
    metrics.record(GrayRules("checkout", 7, 12.5, True, False))
    value = registry.get_sample_value
    side = {"link": "checkout", "variant": "candidate"}
    assert value("inventory_gray_calls_total", side) == 8
    assert value("inventory_gray_errors_total", side) == 1
    assert value("inventory_gray_seconds_total", side) == 0.5
    assert value("inventory_gray_rules_version", {"link": "checkout"}) == 7
    assert value("inventory_gray_percentage", {"link": "checkout"}) == 12.5
    assert value("inventory_gray_killed", {"link": "checkout"}) == 1
    assert value("inventory_gray_paused", {"link": "checkout"}) == 0
