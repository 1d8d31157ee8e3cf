"""The paces of all hot keys in one event loop, and what is reported of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final

from inventory_sdk import context
from inventory_sdk.ending import end
from inventory_sdk.errors import HotspotLimited
from inventory_sdk.hotspot.lease import SharedLease, Source
from inventory_sdk.hotspot.pacing import Pacer, Waiter
from inventory_sdk.hotspot.rates import Rate, Rule
from inventory_sdk.metrics import HotspotsUsed, Metrics, Retried
from inventory_sdk.model import SEPARATOR

REPORT_EVERY: Final = 1.0
MOST_WAITS: Final = 1024
MOST_TOLD: Final = 10


class Paces:
    """See above. ``peers``: how many processes there were lately; ``hot``: how many keys are hot; ``hottest``: merchant, sku, rate."""

    def __init__(
        self,
        source: Source,
        metrics: Metrics,
        peers: Callable[[], int],
        hot: Callable[[], int],
        hottest: Callable[[int], Sequence[tuple[str, str, float]]],
    ) -> None:
        self._source = source
        self._metrics = metrics
        self._peers = peers
        self._hot = hot
        self._hottest = hottest
        self._loop = asyncio.get_running_loop()
        self._pacers: dict[tuple[Rate, str], tuple[Pacer, SharedLease]] = {}
        self._in_lane: dict[str, int] = {}
        self._requests: set[asyncio.Future[None]] = set()
        self._waits: list[float] = []
        self._refused: dict[str, int] = {}
        self._leases: dict[str, int] = {}
        self._admitted = 0
        self._report_timer: asyncio.TimerHandle | None = None

    @property
    def alone(self) -> int:
        """Keys whose rate this process keeps by itself, because Redis does not answer."""
        return sum(lease.alone for _, lease in self._pacers.values())

    @property
    def waiting(self) -> int:
        """Calls in all lines."""
        return sum(pacer.waiting for pacer, _ in self._pacers.values())

    def waiting_for(self, key: str) -> int:
        """Calls in this key's lines."""
        return sum(pacer.waiting for (_, each), (pacer, _) in self._pacers.items() if each == key)

    async def enter(self, rule: Rule, keys: Sequence[str], lane: str, room: int) -> None:
        """Returns when the call may go: a permit of each key, taken in a fixed order and within one ``max_wait``.

        At most ``room`` calls of one lane wait, so that its other slots are other keys'. ``HotspotLimited``; then, or when the
        caller goes away, the permits that it has go to the next in their lines."""
        loop = self._loop
        began = loop.time()
        left = context.remaining()
        patience = rule.max_wait if left is None else min(rule.max_wait, left)
        taken: list[Pacer] = []
        try:
            for key in sorted(set(keys)):
                pacer = self._pacer(rule.limit, key)
                try:
                    waiter = pacer.enter(max(0.0, patience - (loop.time() - began)), rule.overflow == "reject")
                except HotspotLimited:
                    self._refuse("rejected" if rule.overflow == "reject" else "deadline" if patience < rule.max_wait else "predicted_wait")
                    raise
                if waiter is not None:
                    if self._in_lane.get(lane, 0) >= room:
                        pacer.leave(waiter)
                        self._refuse("lane_share")
                        now = loop.time()
                        why = f"{room} calls of lane {lane!r} wait for hot keys already, which is half of its slots"
                        raise pacer.refusal(now, pacer.predicted(now), 0.0, why)
                    await self._wait(pacer, waiter, lane)
                taken.append(pacer)
        except BaseException:
            for pacer in reversed(taken):
                pacer.give_back()
            raise
        self._admitted += 1
        if self._report_timer is None:
            self._report_timer = loop.call_later(REPORT_EVERY, self._report)

    async def _wait(self, pacer: Pacer, waiter: Waiter, lane: str) -> None:
        began = self._loop.time()
        self._in_lane[lane] = self._in_lane.get(lane, 0) + 1
        try:
            await pacer.wait(waiter)
        except HotspotLimited:
            self._refuse("rejected" if waiter.at_once else "waited")
            raise
        finally:
            self._in_lane[lane] -= 1
            if len(self._waits) < MOST_WAITS:
                self._waits.append(self._loop.time() - began)

    def cool(self, key: str) -> None:
        """It is not hot any more: who waits still has its turn in order, then its pace is forgotten."""
        for (limit, each), (pacer, _) in list(self._pacers.items()):
            if each == key:
                if pacer.waiting:
                    pacer.on_empty = partial(self._drop, limit, key)
                else:
                    self._drop(limit, key)

    async def close(self) -> None:
        """Nobody waits any more, and no request for a lease is under way."""
        for pacer, lease in self._pacers.values():
            lease.close()
            pacer.close()
        await end(self._requests)
        if self._report_timer is not None:
            self._report_timer.cancel()
            self._report()

    def _pacer(self, limit: Rate, key: str) -> Pacer:
        found = self._pacers.get((limit, key))
        if found is None:
            merchant, _, sku = key.partition(SEPARATOR)
            shown = f"sku {sku!r} of merchant {merchant!r}" if sku else f"key {key!r}"
            lease = SharedLease(key, limit, self._source, self._loop, self._spawn, self._peers, self._told)
            pacer = Pacer(shown, lease, self._loop)
            lease.on_change = pacer.advance
            found = self._pacers[limit, key] = pacer, lease
        pacer = found[0]
        pacer.on_empty = None
        return pacer

    def _drop(self, limit: Rate, key: str) -> None:
        found = self._pacers.pop((limit, key), None)
        if found is not None:
            found[1].close()

    def _spawn(self, work: Awaitable[None]) -> None:
        request = asyncio.ensure_future(work)
        self._requests.add(request)
        request.add_done_callback(self._requests.discard)

    def _told(self, outcome: str, error: BaseException | None) -> None:
        self._leases[outcome] = self._leases.get(outcome, 0) + 1
        if error is not None:
            self._metrics.record(Retried("hotspot_lease", type(error).__name__))

    def _refuse(self, reason: str) -> None:
        self._refused[reason] = self._refused.get(reason, 0) + 1
        if self._report_timer is None:
            self._report_timer = self._loop.call_later(REPORT_EVERY, self._report)

    def _report(self) -> None:
        self._report_timer = None
        waits, refused, leases, admitted = self._waits, self._refused, self._leases, self._admitted
        self._waits, self._refused, self._leases, self._admitted = [], {}, {}, 0
        event = HotspotsUsed(self._hot(), self.waiting, self.alone, admitted, waits, refused, leases, self._hottest(MOST_TOLD))
        self._metrics.record(event)
        if event.hot or event.waiting:
            self._report_timer = self._loop.call_later(REPORT_EVERY, self._report)
