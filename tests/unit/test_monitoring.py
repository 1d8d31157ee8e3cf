"""The alert rules and the dashboard that come with the package: valid, about series that there are, and every rule fires and resolves."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from inventory_sdk.cli.app import app
from inventory_sdk.metrics.series import all_series
from tests.servers_kit import program

SHIPPED = files("inventory_sdk.metrics").joinpath("monitoring")
RULES: dict[str, Any] = yaml.safe_load(SHIPPED.joinpath("rules.yaml").read_text())
DASHBOARD: dict[str, Any] = json.loads(SHIPPED.joinpath("dashboard.json").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}
RUN_BOOK = (Path(__file__).resolve().parents[2] / "docs/operations/monitoring.md").read_text()


class Case(NamedTuple):
    """Series by the minute, in promtool's notation, and the minutes at which the alert is still quiet, fires, and has resolved. Never
    (0): it must not fire of this, at no minute up to ``quiet``."""

    series: dict[str, str]
    quiet: int
    fires: int
    resolved: int


def happening(name: str, more: str = ', partition="0", reason=""') -> list[Case]:
    """A counter that is born with its first happening, and one that has counted before."""
    series = f'inventory_events_total{{name="{name}"{more}}}'
    return [Case({series: "_x10 1x40"}, 8, 13, 30), Case({series: "5x30 6x40"}, 20, 33, 55)]


def slow(name: str, labels: str, bound: str, above: str, fires: int) -> list[Case]:
    """A histogram whose observations all fall above a bound for half an hour."""
    at = f"inventory_{name}_bucket{{{labels}"
    seen = "0x10 60+60x30 1860x40"
    return [Case({f'{at}le="{bound}"}}': "0x80", f'{at}le="{above}"}}': seen, f'{at}le="+Inf"}}': seen}, 8, fires, 60)]


BURST = "0x10 60+60x20 1260x30"
STEADY = "0+600x70"
LONG = "0x10 60+60x50 3060x60"
RETRIED_LEDGER = 'inventory_retries_total{what="ledger", reason="deadlock"}'
OWN_RETRIES = 'inventory_retries_total{what="alerts", reason="ConnectionError"}'
CASES: dict[str, list[Case]] = {
    "InventoryNoWorker": [Case({'inventory_partition_open{partition="0"}': "1x5 _x15 1x30"}, 4, 15, 25)],
    "InventoryLedgerBehind": [Case({'inventory_behind_seconds{partition="0"}': "0x5 60x5 0x10"}, 4, 9, 14)],
    "InventoryLedgerFarBehind": [Case({'inventory_behind_seconds{partition="0"}': "60x5 400x5 0x10"}, 4, 9, 14)],
    "InventoryJournalFilling": [Case({'inventory_journal_entries{partition="0"}': "1000x5 600000x10 1000x10"}, 4, 14, 20)],
    "InventoryDrift": happening("rejected"),
    "InventoryDuplicates": happening("duplicate"),
    "InventoryFrozen": happening("frozen", ', partition="0", reason="meta_missing"'),
    "InventoryNotRecovered": [
        Case({'inventory_partition_open{partition="0"}': "1x5 0x10 1x10", 'inventory_partition_open{partition="1"}': "1x25"}, 6, 12, 20),
        # It stays for as long as it is not open, however long ago that began.
        Case({'inventory_partition_open{partition="0"}': "1x5 0x120 1x10"}, 6, 120, 130),
    ],
    "InventoryPartsWait": [
        Case({'inventory_events_total{name="part_waits", partition="0", reason=""}': "_x10 1+60x15 961x40"}, 15, 24, 45)
    ],
    "InventoryQuantityMismatch": happening("mismatch", ', partition="", reason="enforce"'),
    "InventoryLost": happening("lost"),
    "InventoryFork": happening("fork"),
    "InventoryUnreadable": happening("unreadable"),
    "InventoryWritesStockFailed": happening("writes_stock_failed"),
    "InventoryDeadLetter": happening("dead_letter", ', partition="", reason="write_order"'),
    "InventoryLaterFunctionsRetried": [
        Case({'inventory_retries_total{what="task", reason="ValueError"}': "0x10 1+1x15 16x40", RETRIED_LEDGER: "0+600x65"}, 8, 20, 45)
    ],
    "InventoryTaskDied": happening("task_died", ', partition="", reason="inventory-tasks"') + happening("background_failed"),
    "InventoryDiscrepancyFound": happening("drift", ', partition="", reason="went_back"'),
    "InventoryDiscrepanciesOpen": [
        Case(
            {
                'inventory_discrepancies_open{cause="went_back"}': "0x5 2x180 0x20",
                'inventory_discrepancies_open{cause="rejected"}': "0x200",
            },
            100,
            180,
            195,
        )
    ],
    "InventoryComparisonOverdue": [
        Case(  # the worker that knows of the newest comparison is right
            {
                'inventory_comparison_overdue_seconds{scope="what", instance="a"}': "0x5 3700x20 0x20",
                'inventory_comparison_overdue_seconds{scope="what", instance="b"}': "9000x10 3700x15 9000x20",
            },
            5,
            20,
            35,
        )
    ],
    "InventoryComparisonSinkFails": happening("sink_away", ', partition="", reason="elasticsearch"')
    + happening("sink_refused", ', partition="", reason="elasticsearch"'),
    "InventoryAnnouncementsMissed": happening("announce_failed"),
    "InventoryStaleHolds": happening("stale"),
    "InventoryNotPublished": [
        Case(
            {
                'inventory_publish_failures_total{partition="0", reason="unconfirmed"}': BURST,
                'inventory_entries_published_total{partition="0"}': STEADY,
            },
            8,
            22,
            45,
        ),
        Case({'inventory_publish_failures_total{partition="0", reason="unconfirmed"}': BURST}, 8, 22, 45),
    ],
    "InventoryRetries": [Case({'inventory_retries_total{what="ledger", reason="OSError"}': "0x10 120+120x30 3720x40"}, 8, 30, 60)],
    "InventoryRedeliveries": [Case({'inventory_entries_redelivered_total{partition="0"}': "0x10 120+120x40 4920x60"}, 8, 40, 90)],
    "InventoryScriptSlow": slow("batch_seconds", 'lane="core", ', "0.1", "0.25", 25),
    "InventoryApplySlow": slow("apply_seconds", 'partition="0", ', "1", "2.5", 30),
    "InventoryLaneRefusing": [
        Case(
            {'inventory_lane_refused_total{lane="core", reason="queue_full"}': BURST, 'inventory_lane_admitted_total{lane="core"}': STEADY},
            8,
            22,
            45,
        )
    ],
    "InventoryLaneWaits": slow("lane_wait_seconds", 'lane="core", ', "0.25", "0.5", 25),
    "InventoryDeadlinesExceeded": [
        Case(
            {'inventory_lane_deadline_exceeded_total{lane="core"}': BURST, 'inventory_lane_admitted_total{lane="core"}': STEADY}, 8, 22, 45
        )
    ],
    "InventoryHotKeysRefused": [
        Case(
            {'inventory_hotspot_refused_total{reason="predicted_wait"}': LONG, "inventory_hotspot_admitted_total": "0+60x120"}, 20, 45, 90
        ),
        # The rush of a sale of ten minutes is no reason to call anybody.
        Case(
            {'inventory_hotspot_refused_total{reason="waited"}': "0x5 60+60x5 360x60", "inventory_hotspot_admitted_total": "0+60x70"},
            15,
            0,
            0,
        ),
    ],
    "InventoryHotKeysWait": slow("hotspot_wait_seconds", "", "0.25", "0.5", 38),
    "InventoryHotKeysAlone": [
        Case({'inventory_hotspot_alone{instance="a"}': "0x5 2x5 0x10", 'inventory_hotspot_alone{instance="b"}': "0x20"}, 6, 9, 14)
    ],
    "InventoryPromotionStuck": [
        Case({'inventory_promotion_waiting{to="redis"}': "0x5 1x30 0x10", 'inventory_promotion_waiting{to="database"}': "0x45"}, 15, 30, 40)
    ],
    "InventoryGrayTakenBack": happening("gray_guard", ', partition="", reason="merchants"')
    + happening("gray_guard", ', partition="", reason="link"'),
    "InventoryGrayPaused": [Case({'inventory_gray_paused{link="checkout"}': "0x5 1x60 0x10"}, 30, 50, 70)],
    "InventoryGrayRulesStale": [
        Case(
            {
                'inventory_gray_rules_age_seconds{instance="a"}': "4x5 10+60x10 2x10",
                'inventory_gray_rules_age_seconds{instance="b"}': "4x30",
            },
            6,
            14,
            20,
        )
    ],
    "InventoryGrayRulesUnreadable": happening("gray_unreadable", ', partition="", reason=""'),
    "InventoryRecalculationsOverdue": [
        Case({'inventory_recalculation_overdue_seconds{function="recount"}': "0x5 10+60x15 0x10"}, 8, 16, 25)
    ],
    "InventoryGovernorSlows": [
        Case(
            {
                'inventory_governor_share_ratio{what="redistribution"}': "1x5 0.1x30 1x10",
                'inventory_governor_share_ratio{what="batch"}': "1x45",
            },
            15,
            30,
            40,
        )
    ],
    "InventoryRecalculationsCutOff": happening("recalculation_cut_off", ', partition="", reason="recount"'),
    "InventoryRecalculationsFail": happening("recalculation_failed", ', partition="", reason="recount"'),
    "InventoryRecalculationStuck": happening("recalculation_stuck", ', partition="", reason="recount"'),
    "InventoryBusinessAlert": [Case({'inventory_alerts_firing{rule="stock_out"}': "0x5 2x5 0x10"}, 4, 8, 14)],
    "InventoryAlertsNotTold": [
        Case({'inventory_retries_total{what="alerts", reason="sink_HTTPError"}': "0x5 12+12x10 132x20", OWN_RETRIES: "0+12x35"}, 4, 12, 25)
    ],
    "InventoryAlertRuleFails": [
        Case({'inventory_retries_total{what="alerts", reason="rule_stock_out"}': "0x5 12+12x10 132x20", OWN_RETRIES: "0+12x35"}, 4, 12, 25)
    ],
    "InventoryMetricsSinkFails": happening("metrics_sink_failed", ', partition="", reason="StatsdMetrics"'),
}


def promtool(*words: str | Path) -> str:
    done = subprocess.run([program("promtool"), *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def shipped(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    path.write_text(SHIPPED.joinpath(name).read_text())
    return path


def test_every_alert_has_a_case_and_an_entry_in_the_run_book() -> None:
    assert set(ALERTS) == set(CASES)
    headings = set(re.findall(r"^#+ (Inventory\w+)$", RUN_BOOK, re.MULTILINE))
    assert headings == set(ALERTS)
    for name, rule in ALERTS.items():
        assert list(rule) == ["alert", "expr", "for", "labels", "annotations"], name
        assert rule["annotations"]["runbook_url"] == f"operations/monitoring.html#{name.lower()}"
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert " Do: " in rule["annotations"]["description"], name
        entry = RUN_BOOK.partition(f" {name}\n")[2].partition("\n##")[0]
        assert [word for word in ("**Means**", "**Look**", "**Do**", "**Harmless**") if entry.count(word) != 1] == [], name


def expressions() -> list[tuple[str, str]]:
    rules = [(rule.get("alert", rule.get("record")), rule["expr"]) for group in RULES["groups"] for rule in group["rules"]]
    return rules + [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


@pytest.mark.parametrize(("where", "expression"), expressions())
def test_every_expression_is_about_series_and_labels_that_there_are(where: str, expression: str) -> None:
    known: dict[str, tuple[str, ...]] = {}
    for series in all_series():
        ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[series.kind]
        for end in ends:
            known[f"inventory_{series.name}{end}"] = (*series.labels, *(("le",) if end == "_bucket" else ()))
    used = set(re.findall(r"\binventory_\w+", expression))
    assert used <= set(known), where
    named = {label for labels in re.findall(r"by \(([^)]*)\)", expression) for label in re.split(r",\s*", labels)}
    if used:
        assert named <= {label for name in used for label in known[name]}, where


def test_every_series_is_in_a_panel() -> None:
    shown = " ".join(expression for _, expression in expressions())
    assert [series.name for series in all_series() if f"inventory_{series.name}" not in shown] == []


def test_promtool_finds_nothing_wrong_with_the_rules(tmp_path: Path) -> None:
    assert "SUCCESS" in promtool("check", "rules", shipped(tmp_path, "rules.yaml"))


def test_every_alert_is_quiet_fires_and_resolves(tmp_path: Path) -> None:
    """Each alert has a file of its own, with what is recorded for it: all rules at every minute of every case would take long."""
    (group,) = RULES["groups"]
    recorded = [rule for rule in group["rules"] if "record" in rule]
    tests: list[Path] = []
    for name, cases in CASES.items():
        rules = [{"name": group["name"], "rules": [*recorded, ALERTS[name]]}]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"groups": rules}))
        firing = f'sum(ALERTS{{alertname="{name}", alertstate="firing"}})'
        found = []
        for case in cases:
            quiet = firing if case.fires else f"max_over_time({firing}[{case.quiet}m:1m])"
            said = [(quiet, case.quiet, False), (firing, case.fires, True), (firing, case.resolved, False)]
            found.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
                    "promql_expr_test": [
                        {"expr": asked, "eval_time": f"{minute}m", "exp_samples": [{"labels": "{}", "value": 1}] if fires else []}
                        for asked, minute, fires in said
                        if minute
                    ],
                }
            )
        tests.append(tmp_path / f"test_{name}.yaml")
        tests[-1].write_text(yaml.safe_dump({"rule_files": [f"{name}.yaml"], "evaluation_interval": "1m", "tests": found}))
    assert promtool("test", "rules", *tests).count("SUCCESS") == len(ALERTS)


@pytest.mark.parametrize(("what", "name"), [("rules", "rules.yaml"), ("dashboard", "dashboard.json")])
def test_the_command_prints_what_is_shipped(what: str, name: str) -> None:
    done = CliRunner().invoke(app, ["monitoring", what])
    assert done.exit_code == 0
    assert done.output == SHIPPED.joinpath(name).read_text()


def test_the_command_links_the_rules_to_where_the_run_book_stands() -> None:
    done = CliRunner().invoke(app, ["monitoring", "rules", "--docs", "https://docs.example/stock/"])
    printed = yaml.safe_load(done.output)
    links = [rule["annotations"]["runbook_url"] for group in printed["groups"] for rule in group["rules"] if "alert" in rule]
    assert links == [f"https://docs.example/stock/operations/monitoring.html#{name.lower()}" for name in ALERTS]
    refused = CliRunner().invoke(app, ["monitoring", "rules", "--docs", "docs.example"])
    assert refused.exit_code == 2
    assert "--docs='docs.example'" in refused.output


def test_the_command_says_what_it_can_print() -> None:
    done = CliRunner().invoke(app, ["monitoring", "everything"])
    assert done.exit_code == 2
    assert "rules" in done.output
