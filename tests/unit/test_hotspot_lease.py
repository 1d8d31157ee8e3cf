"""The shared rate in small leases, and what becomes of it while Redis is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from redis.exceptions import ConnectionError as RedisConnectionError

from inventory_sdk.hotspot.lease import KEPT, SharedLease
from inventory_sdk.hotspot.pacing import Pacer
from inventory_sdk.hotspot.rates import Rate
from tests.hotspot_kit import Clock, Window, settle

AWAY = RedisConnectionError("gone")


class Stand:
    """A lease and its pacer on a clock that is turned by hand."""

    def __init__(self, window: Window, per_second: int = 1000, peers: int = 1) -> None:
        self.clock = Clock()
        self.window = window
        self.told: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.lease = SharedLease(
            "a", Rate(per_second, 1), window, self.clock, self._spawn, lambda: peers, lambda what, _: self.told.append(what)
        )
        self.pacer = Pacer("a", self.lease, self.clock)
        self.lease.on_change = self.pacer.advance

    def _spawn(self, work: Awaitable[None]) -> None:
        self.tasks.add(asyncio.ensure_future(work))  # type: ignore[arg-type]

    async def calls(self, many: int, every: float) -> int:
        """So many calls, one every so many seconds; how many went meanwhile."""
        before = self.pacer.went
        for _ in range(many):
            self.pacer.enter(10.0)
            self.clock.turn(every)
            await settle()
        return self.pacer.went - before


async def test_one_round_trip_brings_many_permits() -> None:
    stand = Stand(Window())
    await stand.calls(1000, 0.001)
    assert sum(stand.window.costs) >= 990
    assert len(stand.window.costs) < 60
    assert max(stand.window.costs) <= 50  # a twentieth of a second's worth


async def test_a_refused_lease_is_asked_for_again_a_moment_later_and_never_in_a_storm() -> None:
    stand = Stand(Window(after=False))
    assert await stand.calls(200, 0.001) == 0
    assert len(stand.window.costs) <= 60
    stand.window.after = True
    stand.clock.turn(0.1)
    await settle()
    assert stand.pacer.went > 0


async def test_permits_that_nobody_wanted_do_not_become_a_burst() -> None:
    stand = Stand(Window())
    await stand.calls(300, 0.001)
    assert stand.lease.tokens > 0
    stand.clock.turn(KEPT * 2)
    before = len(stand.window.costs)
    stand.pacer.enter(1.0)
    await settle()
    assert len(stand.window.costs) == before + 1  # none was left, it had to be asked for


async def test_without_redis_a_process_takes_its_part_of_the_last_rate_and_says_so() -> None:
    """Eight processes without Redis must not let through eight times the limit."""
    stand = Stand(Window(after=AWAY), per_second=800, peers=8)
    went = await stand.calls(1000, 0.001)
    assert stand.lease.alone
    assert 95 <= went <= 115  # a second of 800 / 8, and a burst
    assert set(stand.told) == {"away"}
    assert len(stand.told) <= 5


async def test_the_part_is_what_this_process_got_lately_where_that_is_known() -> None:
    stand = Stand(Window(), per_second=1000, peers=1)
    await stand.calls(4 * 200, 1 / 200)  # 200 a second of 1000
    stand.window.after = AWAY
    stand.clock.turn(1.0)
    await stand.calls(10, 0.001)
    assert stand.lease.alone
    assert 150 <= 1 / stand.lease.interval <= 250


async def test_when_redis_is_back_the_rate_is_shared_again() -> None:
    stand = Stand(Window(AWAY, AWAY), per_second=100, peers=4)
    await stand.calls(200, 0.01)
    assert not stand.lease.alone
    assert stand.told[:2] == ["away", "away"]
    assert "granted" in stand.told


async def test_a_closed_lease_asks_no_more() -> None:
    stand = Stand(Window(after=False))
    await stand.calls(5, 0.001)
    asked = len(stand.window.costs)
    stand.lease.close()
    stand.pacer.close()
    stand.clock.turn(5.0)
    await settle()
    assert len(stand.window.costs) == asked
