"""The CPU governor of one event loop: when CPU or event loop are short of breath, it says who goes slower, and by how much.

Redistribution is the first that is slowed, then each lane in the order its owner gave; one begins only when all before it are at
the floor. Recovery goes the other way round and more gently than the way down, with a gap between the two thresholds, so that the
governor does not swing.

CPU alone never turns a call away. A lane keeps the slots that its work needs: as many as were ever in use at once in the last half
minute in which there was CPU enough, and twice the calls per second times what they take at best (Little's law). Only what is in
flight beyond that is work that waits for CPU, and would wait as well if it were let in.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from inventory_sdk.metrics import Metrics
from inventory_sdk.metrics.events import Governed
from inventory_sdk.redistribute.policy import RedistributionPolicy

REDISTRIBUTION: Final = "redistribution"
TICK: Final = 0.25
"""Seconds between two looks at the CPU."""
WEIGHT: Final = 0.3
"""Of the newest look in the average: about a second counts."""
DOWN: Final = 0.8
"""What is slowed has so much of its share left after a tick."""
UP: Final = 0.05
"""What recovers has so much more after a tick."""
GAP: Final = 0.1
"""CPU share below the threshold at which recovery begins; the lag must be half of its threshold."""
ROOM: Final = 2.0
"""Slots per call that is in flight on the average: calls don't come evenly."""
WINDOW: Final = 120
"""Ticks that a lane's needs are remembered."""
REPORT: Final = 4
"""Ticks between two reports to the metrics."""


class Load(Protocol):
    """A lane as it is now: ``peak`` slots in use at once since the last look, ``ended`` calls since the beginning,
    ``service_seconds`` they take on the average."""

    @property
    def peak(self) -> int: ...
    @property
    def ended(self) -> int: ...
    @property
    def service_seconds(self) -> float: ...
    @property
    def declared(self) -> int: ...


class Slowable(Protocol):
    """The lanes."""

    def load(self, name: str) -> Load:
        """How it is doing in this event loop."""
        ...

    def narrow(self, name: str, slots: int) -> None:
        """Give it so many slots, until told otherwise; at least 1, at most what it was declared with."""
        ...


@dataclass(frozen=True, slots=True)
class GovernorState:
    """``cpu``: share in use, ``lag``: lateness of the event loop in seconds, both smoothed. ``shares``: what each may use of what it
    was declared with, ``redistribution`` first. ``cpus``: that this process may use."""

    cpu: float
    lag: float
    shares: Mapping[str, float]
    cpus: float


class Watch(Protocol):
    """Where CPU use comes from."""

    cpus: float

    def share(self) -> float | None: ...


class Needs:
    """What a lane's work needs: see above."""

    def __init__(self) -> None:
        self._calm: deque[int] = deque(maxlen=WINDOW)
        self._flow: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._ended: int | None = None

    def slots(self, load: Load, seconds: float, calm: bool) -> int:
        """After a look at it, ``seconds`` after the last one. ``calm``: there is CPU enough."""
        if self._ended is not None and load.service_seconds > 0 and seconds > 0:
            self._flow.append(((load.ended - self._ended) / seconds, load.service_seconds))
        self._ended = load.ended
        if calm:
            self._calm.append(load.peak)
        if not self._calm:
            return load.declared  # it is not known what it needs, so nothing is taken from it
        if not self._flow:
            return max(self._calm)
        return max(*self._calm, math.ceil(ROOM * max(rate for rate, _ in self._flow) * min(service for _, service in self._flow)))


class Governor:
    """See above. ``share`` is redistribution's."""

    def __init__(self, policy: RedistributionPolicy, lanes: Slowable, watch: Watch, metrics: Metrics) -> None:
        self._policy = policy
        self._lanes = lanes
        self._watch = watch
        self._metrics = metrics
        self._order = (REDISTRIBUTION, *policy.slows)
        self._shares = dict.fromkeys(self._order, 1.0)
        self._needs = {name: Needs() for name in policy.slows}
        self._cpu = 0.0
        self._lag = 0.0
        self._ticks = 0

    @property
    def share(self) -> float:
        """What redistribution may use now, of its ``max_concurrency`` and of the time: 1 all of it."""
        return self._shares[REDISTRIBUTION]

    @property
    def cpus(self) -> float:
        """CPUs that this process may use, a part of one included."""
        return self._watch.cpus

    def state(self) -> GovernorState:
        """How things stand."""
        return GovernorState(self._cpu, self._lag, dict(self._shares), self.cpus)

    async def run(self) -> None:
        """Look and decide, until cancelled; then everything has its full share again."""
        try:
            while True:
                began = time.monotonic()
                await asyncio.sleep(TICK)
                passed = time.monotonic() - began
                self.tick(passed, passed - TICK)
        finally:
            for name in self._policy.slows:
                self._lanes.narrow(name, self._lanes.load(name).declared)

    def tick(self, passed: float, late: float) -> None:
        """One look: ``passed`` seconds after the last, ``late`` by so many."""
        cpu = self._watch.share()
        if cpu is not None:
            self._cpu += (cpu - self._cpu) * WEIGHT
        self._lag += (max(0.0, late) - self._lag) * WEIGHT
        short = self._cpu > self._policy.cpu or self._lag > self._policy.lag
        if short:
            self._slow()
        elif self._cpu < self._policy.cpu - min(GAP, self._policy.cpu / 2) and self._lag < self._policy.lag / 2:
            self._recover()
        # The averages are late to notice: what was in use in this very look must not count as calm then.
        calm = not short and (cpu or 0.0) <= self._policy.cpu and late <= self._policy.lag
        for name in self._policy.slows:
            self._narrow(name, passed, calm)
        self._ticks += 1
        if self._ticks % REPORT == 0:
            self._metrics.record(Governed(self._cpu, self._lag, dict(self._shares)))

    def _slow(self) -> None:
        for name in self._order:
            share = self._shares[name]
            if share > self._policy.floor:
                self._shares[name] = max(self._policy.floor, share * DOWN)
                return

    def _recover(self) -> None:
        for name in reversed(self._order):
            share = self._shares[name]
            if share < 1.0:
                self._shares[name] = min(1.0, share + UP)
                return

    def _narrow(self, name: str, passed: float, calm: bool) -> None:
        load = self._lanes.load(name)
        needed = self._needs[name].slots(load, passed, calm)
        allowed = math.ceil(self._shares[name] * load.declared)
        self._lanes.narrow(name, min(load.declared, max(1, needed, allowed)))
