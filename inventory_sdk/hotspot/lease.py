"""The rate that all processes share, fetched in small leases: one round trip for many permits.

A lease is asked for before the last one is used up, and is as large as what goes in ``AHEAD`` seconds, found by doubling and halving;
a refused one is asked for again at half the size a moment later. What is left of a lease after ``KEPT`` seconds is forgotten: permits
that nobody wanted then must not become a burst now.

When Redis does not answer, this process goes on alone: with what it got lately of the shared rate, or with its part among the processes
that were there last. All parts together are the limit, so that nobody stampedes; that it is so is counted, and shown, and every few
seconds one request looks whether Redis is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol
from urllib.parse import quote

from inventory_sdk.hotspot.pacing import Timers
from inventory_sdk.hotspot.rates import Rate

AHEAD: Final = 0.05
LEAST: Final = 0.02
"""Seconds of the limit below which a refused lease is not halved further: more requests would not bring more permits."""
KEPT: Final = 0.25
LARGEST: Final = 256
TIMEOUT: Final = 0.25
"""Seconds that one request for a lease may take."""
ALONE_FOR: Final = (0.25, 0.5, 1.0, 2.0)
"""Seconds between requests while Redis does not answer."""
LATELY: Final = 10.0
"""Seconds after which what this process got is no longer its part."""


class Source(Protocol):
    """The shared rate of all keys."""

    async def hit(self, limit: Rate, key: str, cost: int) -> bool:
        """So many permits, or none. Raises where it can't be asked."""
        ...


class SharedLease:
    """Permits of one key in one event loop; a ``pacing.Lease``.

    ``spawn`` runs a request; ``peers`` says how many processes there were lately; ``told`` hears what came of each request:
    ``granted``, ``refused``, or ``away`` with the error."""

    def __init__(
        self,
        key: str,
        limit: Rate,
        source: Source,
        timers: Timers,
        spawn: Callable[[Awaitable[None]], object],
        peers: Callable[[], int],
        told: Callable[[str, BaseException | None], None],
    ) -> None:
        self.key = key
        self.limit = limit
        self.tokens = 0
        self.alone = False
        self.on_change: Callable[[], None] = _nobody
        self._source = source
        self._timers = timers
        self._spawn = spawn
        self._peers = peers
        self._told = told
        self._full = 1 / limit.per_second
        self._size = 1
        self._ends = 0.0
        self._came = 0.0
        self._asking = False
        self._not_before = 0.0
        self._again: asyncio.TimerHandle | None = None
        self._failures = 0
        self._refused_at = -LATELY
        self._used = 0
        self._used_since = timers.time()
        self._rate = 0.0
        self._rate_at = -LATELY
        self._share = limit.per_second

    @property
    def interval(self) -> float:
        return 1 / self._share if self.alone else self._full

    @property
    def pace(self) -> float:
        if self.alone or self._rate <= 0 or self._timers.time() - self._refused_at > 1.0:
            return self.interval
        return max(self._full, 1 / self._rate)

    @property
    def lately(self) -> float:
        """Permits per second that this process got; 0 where that is long ago."""
        return self._rate if self._timers.time() - self._rate_at <= LATELY else 0.0

    def take(self, now: float) -> bool:
        if self.alone:
            self._want(now)
            return True
        if self.tokens and now >= self._ends:
            self.tokens = 0
        if self.tokens:
            self.tokens -= 1
            self._note_use(now)
            if self.tokens <= self._size // 2:
                self._want(now)
            return True
        self._want(now)
        return False

    def blocked(self, now: float) -> float:
        if self.alone or self.tokens:
            return 0.0
        return max(0.0, self._not_before - now)

    def put_back(self) -> None:
        if not self.alone:
            self.tokens += 1
            self._ends = max(self._ends, self._timers.time() + KEPT)

    def close(self) -> None:
        """No more requests from here on."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        self._asking = True

    def _note_use(self, now: float) -> None:
        self._used += 1
        over = now - self._used_since
        if over >= 1.0:
            rate = self._used / over
            self._rate = rate if now - self._rate_at > LATELY else (self._rate + rate) / 2
            self._rate_at = now
            self._used = 0
            self._used_since = now

    def _want(self, now: float) -> None:
        if self._asking:
            return
        if now < self._not_before:
            if self._again is None:
                self._again = self._timers.call_at(self._not_before, self._ask_again)
            return
        self._asking = True
        self._spawn(self._ask())

    def _ask_again(self) -> None:
        self._again = None
        if not self._asking:
            self._asking = True
            self._spawn(self._ask())

    async def _ask(self) -> None:
        cost = self._size
        try:
            async with asyncio.timeout(TIMEOUT):
                granted = await self._source.hit(self.limit, self.key, cost)
        except Exception as error:  # noqa: BLE001  # whatever keeps the shared rate away: told, and this process goes on alone
            self._away(error)
        else:
            self._answered(granted, cost)
        finally:
            self._asking = False
        self.on_change()

    def _answered(self, granted: bool, cost: int) -> None:
        now = self._timers.time()
        self._failures = 0
        self.alone = False
        if not granted:
            self._size = max(1, cost // 2, min(cost, int(self.limit.per_second * LEAST)))
            self._refused_at = now
            self._not_before = now + max(self._full * self._size, 0.004)
            self._told("refused", None)
            return
        since, self._came = now - self._came, now
        most = max(1, min(LARGEST, self.limit.amount // 10, int(self.limit.per_second * AHEAD)))
        if since < AHEAD:
            self._size = min(most, cost * 2)
        elif since > 4 * AHEAD:
            self._size = max(1, cost // 2)
        self.tokens += cost
        self._ends = now + max(KEPT, self._full * cost * 2)
        self._told("granted", None)

    def _away(self, error: BaseException) -> None:
        now = self._timers.time()
        pause = ALONE_FOR[min(self._failures, len(ALONE_FOR) - 1)]
        self._failures += 1
        self._not_before = now + pause
        if not self.alone:
            self._share = min(self.limit.per_second, self.lately or self.limit.per_second / max(1, self._peers()))
            self.alone = True
            self.tokens = 0
        self._told("away", error)


def _nobody() -> None:
    """Before a pacer listens."""


class LimitsSource:
    """The sliding window counter of ``limits`` in Redis, on a client of the caller's."""

    def __init__(self, client: Any, namespace: str) -> None:
        from limits import RateLimitItemPerHour, RateLimitItemPerMinute, RateLimitItemPerSecond
        from limits.aio.storage import RedisStorage
        from limits.aio.strategies import SlidingWindowCounterRateLimiter

        storage: Any = RedisStorage(
            "async+redis://", implementation="redispy", key_prefix=f"{namespace}:hotspot", connection_pool=pool_of(client)
        )
        if storage.bridge.storage.connection_pool is not getattr(client, "connection_pool", None):
            # A cluster has a pool per node: its scripts go through the cluster's own client.
            storage.bridge.storage = client
            storage.bridge.connection_getter = lambda _: client
            storage.bridge.register_scripts()
        self._strategy = SlidingWindowCounterRateLimiter(storage)
        self._items = {1: RateLimitItemPerSecond, 60: RateLimitItemPerMinute, 3600: RateLimitItemPerHour}

    async def hit(self, limit: Rate, key: str, cost: int) -> bool:
        # limits joins identifiers with slashes, and its keys are hash tags: both are escaped.
        return await self._strategy.hit(self._items[limit.seconds](limit.amount), quote(key, safe=""), cost=cost)


def pool_of(client: Any) -> Any:
    """The client's own pool; for a cluster's client, which has none, one that is never used."""
    from redis.asyncio import ConnectionPool

    return getattr(client, "connection_pool", None) or ConnectionPool()
