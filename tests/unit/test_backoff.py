"""Delays between attempts."""

from __future__ import annotations

import asyncio

import pytest

from inventory_sdk.sync.backoff import Backoff, waited


def test_delays_double_up_to_the_cap_and_jitter_by_half_there_too() -> None:
    for attempt, longest in enumerate((0.1, 0.2, 0.4, 0.8, 1.0, 1.0), 1):
        seen = []
        for _ in range(200):
            backoff = Backoff(0.1, 1.0)
            backoff.attempts = attempt - 1
            seen.append(backoff.delay())
            assert backoff.attempts == attempt
        assert longest / 2 <= min(seen) <= max(seen) <= longest
        assert max(seen) - min(seen) > longest / 10  # workers that failed together don't come back together


@pytest.mark.parametrize("cap", [1e-3, 5.0])
def test_a_fault_of_days_neither_overflows_nor_passes_the_cap(cap: float) -> None:
    backoff = Backoff(0.05, cap)
    backoff.attempts = 10**6
    assert cap / 2 <= backoff.delay() <= cap


def test_a_success_begins_anew() -> None:
    backoff = Backoff(0.1, 10.0)
    for _ in range(5):
        backoff.delay()
    backoff.reset()
    assert backoff.delay() <= 0.1
    assert backoff.attempts == 1


async def test_a_pause_ends_with_its_event() -> None:
    stopping = asyncio.Event()
    assert not await waited(stopping, 0.001)
    asyncio.get_running_loop().call_soon(stopping.set)
    async with asyncio.timeout(5):
        assert await waited(stopping, 1000)
