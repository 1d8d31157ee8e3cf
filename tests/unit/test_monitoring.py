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
    """Series by the minute, in promtool's notation, and the minutes at which the alert is still quiet, fires, and has resolved."""

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
CASES: dict[str, list[Case]] = {
    "InventoryNoWorker": [Case({'inventory_behind_entries{partition="0"}': "0x5 _x15 0x30"}, 4, 15, 25)],
    "InventoryLedgerBehind": [Case({'inventory_behind_seconds{partition="0"}': "0x5 60x5 0x10"}, 4, 9, 14)],
    "InventoryLedgerFarBehind": [Case({'inventory_behind_seconds{partition="0"}': "60x5 400x5 0x10"}, 4, 9, 14)],
    "InventoryJournalFilling": [Case({'inventory_journal_entries{partition="0"}': "1000x5 600000x10 1000x10"}, 4, 14, 20)],
    "InventoryDrift": happening("rejected"),
    "InventoryDuplicates": happening("duplicate"),
    "InventoryFrozen": happening("frozen", ', partition="0", reason="meta_missing"'),
    "InventoryNotRecovered": [
        Case(
            {
                'inventory_events_total{name="frozen", partition="0", reason="went_back"}': "_x10 1x40",
                'inventory_events_total{name="recovered", partition="0", reason="went_back"}': "_x16 1x40",
                'inventory_events_total{name="recovered", partition="1", reason="went_back"}': "_x10 1x40",
            },
            11,
            15,
            18,
        )
    ],
    "InventoryLost": happening("lost"),
    "InventoryFork": happening("fork"),
    "InventoryUnreadable": happening("unreadable"),
    "InventoryWritesStockFailed": happening("writes_stock_failed"),
    "InventoryDeadLetter": happening("dead_letter", ', partition="", reason="write_order"'),
    "InventoryTaskDied": happening("task_died", ', partition="", reason="inventory-tasks"') + happening("background_failed"),
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
    "InventoryBusinessAlert": [Case({'inventory_alerts_firing{rule="stock_out"}': "0x5 2x5 0x10"}, 4, 8, 14)],
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
        assert rule["annotations"]["runbook"] == f"operations/monitoring.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description", "runbook"}
        entry = RUN_BOOK.partition(f" {name}\n")[2].partition("\n##")[0]
        assert [word for word in ("**Means**", "**Look**", "**Do**") if word not in entry] == [], name


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
    shipped(tmp_path, "rules.yaml")
    groups = []
    for name, cases in CASES.items():
        for case in cases:
            firing = f'sum(ALERTS{{alertname="{name}", alertstate="firing"}})'
            groups.append(
                {
                    "name": name,
                    "interval": "1m",
                    "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
                    "promql_expr_test": [
                        {"expr": firing, "eval_time": f"{case.quiet}m", "exp_samples": []},
                        {"expr": firing, "eval_time": f"{case.fires}m", "exp_samples": [{"labels": "{}", "value": 1}]},
                        {"expr": firing, "eval_time": f"{case.resolved}m", "exp_samples": []},
                    ],
                }
            )
    test = tmp_path / "test.yaml"
    test.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": groups}))
    assert "SUCCESS" in promtool("test", "rules", test)


@pytest.mark.parametrize(("what", "name"), [("rules", "rules.yaml"), ("dashboard", "dashboard.json")])
def test_the_command_prints_what_is_shipped(what: str, name: str) -> None:
    done = CliRunner().invoke(app, ["monitoring", what])
    assert done.exit_code == 0
    assert done.output == SHIPPED.joinpath(name).read_text()


def test_the_command_says_what_it_can_print() -> None:
    done = CliRunner().invoke(app, ["monitoring", "everything"])
    assert done.exit_code == 2
    assert "rules" in done.output
