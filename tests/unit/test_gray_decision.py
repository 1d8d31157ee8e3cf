"""The decision: fair at every percentage, sticky, independent between links, and the same wherever it is made."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from inventory_sdk.gray.decision import CANDIDATE, Decider, bucket
from inventory_sdk.gray.rules import Rules, changed, read

VECTORS = json.loads((Path(__file__).parents[1] / "gray_vectors.json").read_text(encoding="utf-8"))
MERCHANTS = 1_000_000


@cache
def buckets(link: str) -> list[int]:
    return [bucket(link, f"merchant-{number}") for number in range(MERCHANTS)]


@pytest.mark.parametrize("case", VECTORS["buckets"], ids=lambda case: f"{case['link']}-{case['merchant'][:12]}")
def test_a_bucket_is_what_the_vectors_say(case: Mapping[str, Any]) -> None:
    assert bucket(case["link"], case["merchant"]) == case["bucket"]


def test_the_buckets_in_the_reference_are_those_of_the_vectors() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/gray-decision.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| `(\w+)` \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) == 3
    known = {(case["link"], case["merchant"]): case["bucket"] for case in VECTORS["buckets"]}
    assert {(link, merchant): int(number) for link, merchant, number in rows}.items() <= known.items()


@pytest.mark.parametrize("case", VECTORS["decisions"], ids=lambda case: case["why"])
def test_a_decision_is_what_the_vectors_say(case: Mapping[str, Any]) -> None:
    decider = Decider(read(json.dumps(case["rules"])), case["exposed"], lambda merchant: case["attributes"])
    decision = decider(case["merchant"])
    assert (decision.variant, decision.reason, decision.version) == (case["variant"], case["reason"], 3)


@pytest.mark.parametrize("percentage", [0.01, 1, 10, 50])
def test_a_million_merchants_are_shared_out_as_the_percentage_says(percentage: float) -> None:
    share = percentage / 100
    expected, deviation = MERCHANTS * share, math.sqrt(MERCHANTS * share * (1 - share))
    found = sum(each < percentage * 100 for each in buckets("checkout"))
    assert abs(found - expected) < 4 * deviation


def test_every_bucket_is_as_likely_as_the_others() -> None:
    counts = [0] * 10_000
    for each in buckets("checkout"):
        counts[each] += 1
    chi = sum((count - 100) ** 2 / 100 for count in counts)
    assert abs(chi - 9_999) < 4 * math.sqrt(2 * 9_999)


def test_raising_the_percentage_never_moves_a_merchant_back() -> None:
    merchants = [f"merchant-{number}" for number in range(2_000)]
    before: set[str] = set()
    for percentage in (0, 0.01, 0.5, 1, 1.01, 10, 33.33, 50, 99.99, 100):
        decider = Decider(changed(Rules("checkout", 1), percentage=percentage))
        now = {merchant for merchant in merchants if decider(merchant).variant == CANDIDATE}
        assert before <= now
        before = now
    assert before == set(merchants)


@pytest.mark.parametrize("percentage", [10, 50])
def test_the_cohorts_of_two_links_are_independent(percentage: int) -> None:
    border = percentage * 100
    both = sum(a < border and b < border for a, b in zip(buckets("checkout"), buckets("checkout-2"), strict=True))
    share = (percentage / 100) ** 2
    assert abs(both - MERCHANTS * share) < 4 * math.sqrt(MERCHANTS * share * (1 - share))


def test_another_process_with_another_hash_seed_answers_the_same() -> None:
    code = "from inventory_sdk.gray.decision import bucket\nprint([bucket('checkout', f'merchant-{n}') for n in range(500)])"
    for seed in ("1", "2"):
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed})
        assert json.loads(answer.stdout) == buckets("checkout")[:500]
