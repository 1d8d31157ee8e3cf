"""The one rule of quantities: each thing moved by exactly what was asked, and nothing else moved. Used on the ledger's batches and on
the service's own functions."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

K = TypeVar("K", bound=Hashable)


def differences(expected: Mapping[K, int], found: Mapping[K, int]) -> list[tuple[K, int, int]]:
    """(key, expected, found) of every key on which the two differ, those expected first; what a side does not name is 0 there."""
    keys = [*expected, *(key for key in found if key not in expected)]
    pairs = [(key, expected.get(key, 0), found.get(key, 0)) for key in keys]
    return [pair for pair in pairs if pair[1] != pair[2]]
