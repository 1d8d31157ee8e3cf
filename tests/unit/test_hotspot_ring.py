"""Counting with bounded memory: what the error bound says holds, for any stream of keys."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from inventory_sdk.hotspot.ring import Ring, top


def counted(ring: Ring, keys: list[str]) -> Counter[str]:
    ring.count(keys)
    return Counter(keys)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 60).map(str), max_size=600), st.integers(1, 8))
def test_a_count_is_never_too_high_and_too_low_by_at_most_calls_over_most(keys: list[str], most: int) -> None:
    ring = Ring(3, most)
    true = counted(ring, keys)
    assert len(ring.counts) <= 2 * most
    for key, count in true.items():
        found = ring.counts.get(key, 0)
        assert found <= count
        assert count - found <= ring.low
    assert ring.low * most <= len(keys)


def test_a_flood_of_invented_keys_neither_hides_a_hot_one_nor_grows_the_table() -> None:
    ring = Ring(3, 128)
    keys = [f"invented-{number}" for number in range(50_000)] + ["hot"] * 5_000
    random.Random(7).shuffle(keys)
    counted(ring, keys)
    assert len(ring.counts) <= 256
    assert top(ring.counts, 1)[0][0] == "hot"
    assert ring.counts["hot"] >= 5_000 - len(keys) / 128


def test_a_window_is_the_sum_of_its_closed_sub_windows_and_forgets_older_ones() -> None:
    ring = Ring(2)
    for calls in (5, 3, 1):
        ring.count(["a"] * calls)
        assert ring.turn() == {"a": calls}
    assert ring.closed() == {"a": 4}
    assert ring.counts == {}
