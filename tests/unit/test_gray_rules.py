"""Rules: what can't be is refused at the door, by field and value, and what is stored reads back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.gray.rules import Guard, Rules, changed, check_link, check_note, difference, read

RULES = Rules("checkout", 3, percentage=10.0)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("percentage", -1, "percentage"),
        ("percentage", 100.01, "percentage"),
        ("percentage", 0.005, "0.01"),
        ("percentage", True, "percentage"),
        ("percentage", float("nan"), "percentage"),
        ("percentage", "10", "percentage"),
        ("killed", 1, "killed"),
        ("allow", "m1", "allow"),
        ("allow", ["m1", ""], "allow"),
        ("deny", ["a\x1fb"], "control"),
        ("deny", [f"m{number}" for number in range(10_001)], "at most"),
        ("where", ["region"], "where"),
        ("where", {"region": "eu"}, "region"),
        ("where", {"region": [str(number) for number in range(1_001)]}, "at most"),
        ("guard", {"interval": 60, "window": 3}, "guard"),
        ("guard", {"interval": 0.5}, "guard.interval"),
        ("guard", {"interval": float("inf")}, "guard.interval"),
        ("guard", {"minimum_samples": 1.5}, "whole"),
        ("guard", {"error_ratio": 0.5}, "guard.error_ratio"),
        ("version", 9, "version"),
        ("percent", 9, "percent"),
    ],
)
def test_what_cannot_be_is_refused_by_field_and_value(field: str, value: Any, named: str) -> None:
    with pytest.raises(InvalidOperation, match=named):
        changed(RULES, **{field: value})


def test_a_merchant_is_not_allowed_and_denied_at_once() -> None:
    with pytest.raises(InvalidOperation, match="m1"):
        changed(changed(RULES, allow=["m1"]), deny=["m1", "m2"])


def test_a_paused_rollout_is_not_raised_until_somebody_lifts_the_pause() -> None:
    paused = changed(RULES, paused=True)
    with pytest.raises(InvalidOperation, match="paused"):
        changed(paused, percentage=11)
    assert changed(paused, percentage=9).percentage == 9
    assert changed(paused, percentage=11, paused=False).percentage == 11


def test_every_hundredth_of_a_percent_is_exact() -> None:
    assert [changed(RULES, percentage=step / 100).steps for step in range(10_001)] == list(range(10_001))


def test_what_is_stored_reads_back() -> None:
    rules = changed(RULES, allow=["m2", "m1"], deny=["m3"], where={"region": ["eu"]}, keep_exposed=True, guard=Guard(interval=5))
    assert read(rules.text()) == rules
    assert rules.allow == ("m1", "m2")


@pytest.mark.parametrize(
    "document",
    [
        b"{",
        b"[]",
        b"7",
        {"format": 2},
        {"link": "Checkout"},
        {"version": 0},
        {"version": True},
        {"version": 10**15},
        {"percentage": 101},
        {"colour": "red"},
        {"allow": ["m1"], "deny": ["m1"]},
    ],
)
def test_a_document_that_this_release_would_not_have_stored_is_not_read(document: Any) -> None:
    text = document if isinstance(document, bytes) else json.dumps({**RULES.document(), **document})
    with pytest.raises(InvalidOperation):
        read(text)


@pytest.mark.parametrize("name", ["", "A", "a b", "a:b", "-a", "a" * 65, "ä", 7, "a=b", "a,b"])
def test_a_link_has_a_name_that_can_travel_in_a_header(name: Any) -> None:
    with pytest.raises(InvalidOperation, match="link"):
        check_link(name)


@pytest.mark.parametrize("text", ["", "  ", "x" * 501, None])
def test_a_change_says_who_and_why(text: Any) -> None:
    with pytest.raises(InvalidOperation, match="why"):
        check_note("why", text)


def test_the_difference_names_what_changed_only() -> None:
    assert difference(RULES, changed(RULES, percentage=12.5, killed=False)) == {"percentage": [10.0, 12.5]}
