"""What the overview shows: how far the ledger is behind Redis, and what is hot, full, dead or frozen.

Each fact is read by itself, with a time limit, and may fail by itself: when Redis is away these pages are needed most.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

from redis.exceptions import RedisError

from inventory_sdk.errors import InventoryError, NotStarted
from inventory_sdk.ledger.protocol import LedgerUnavailable
from inventory_sdk.model import SEPARATOR, Lane, split_key
from inventory_sdk.stock.batch import read_entries
from inventory_sdk.stock.journal import decode
from inventory_sdk.stock.partition import Partition
from inventory_sdk.traffic.lanes import LaneUsage
from inventory_sdk.web.admin.controllers import controllers_of

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

T = TypeVar("T")
log = logging.getLogger("inventory_sdk.web")

PATIENCE: Final = 3.0
"""Seconds that one fact is waited for."""
LEDGER_PATIENCE: Final = 5.0
"""Seconds for what is searched and listed in the ledger."""
SAMPLES: Final = 360
PERIOD: Final = 5.0
"""Seconds between two samples: half an hour is kept."""
MOST: Final = 1000
"""Up to which dead, frozen and open things are counted."""


@dataclass(frozen=True, slots=True)
class Fact(Generic[T]):
    """What was found, or why it could not be."""

    value: T | None
    trouble: str = ""


async def fact(ask: Callable[[], Awaitable[T]], patience: float | None = None) -> Fact[T]:
    """The answer, or its error in words. Errors are expected here: they are what the page is for."""
    patience = PATIENCE if patience is None else patience
    try:
        async with asyncio.timeout(patience):
            return Fact(await ask())
    except TimeoutError:
        return Fact(None, f"no answer for {patience:g} s")
    except NotStarted:
        return Fact(None, "the inventory has not started")
    except InventoryError as error:
        return Fact(None, str(error))
    except RedisError as error:
        return Fact(None, f"Redis does not answer: {error}")
    except Exception as error:  # a driver's own, from a server that is in pieces
        log.warning("the pages could not read something", exc_info=True)
        return Fact(None, f"{type(error).__name__}: {error}")


async def of_ledger(ask: Callable[[], Awaitable[T]]) -> T:
    """What a page is nothing without. ``LedgerUnavailable`` also where the database hangs."""
    try:
        async with asyncio.timeout(LEDGER_PATIENCE):
            return await ask()
    except TimeoutError as error:
        raise LedgerUnavailable("no_answer", TimeoutError(f"nothing for {LEDGER_PATIENCE:g} s")) from error


@dataclass(frozen=True, slots=True)
class PartitionFacts:
    """One partition. ``behind``: journal entries that the ledger has not applied; ``seconds``: the age of the oldest of them, by Redis'
    clock; None where the two can't be compared. ``worker``: seconds since a worker's last sign, None: none in the last ten."""

    number: int
    state: str
    epoch: int
    sequence: int
    applied: int
    behind: int | None
    seconds: float | None
    entries: int
    worker: float | None


@dataclass(frozen=True, slots=True)
class LaneFacts:
    """A lane as it was declared, and as it is in this process now."""

    name: str
    lane: Lane
    usage: LaneUsage


@dataclass(frozen=True, slots=True)
class Firing:
    """A business alert that fires (``alerts.Alert``). ``merchant`` and ``sku`` where it is about one, else ``subject`` names it.
    ``seconds``: since it was first found. ``silenced``: nobody is told of it for now."""

    alert: Any
    merchant: str
    sku: str
    seconds: float
    silenced: bool


@dataclass(frozen=True, slots=True)
class Overview:
    """One look. Counts end at ``MOST``. ``rules``: how many business alerts are watched."""

    partitions: Fact[Sequence[PartitionFacts]]
    lanes: Sequence[LaneFacts]
    tasks: Fact[tuple[int, int]]
    frozen: Fact[int]
    hot: Fact[Sequence[Any]]
    links: Fact[Sequence[str]]
    discrepancies: Fact[int]
    rules: int
    alerts: Fact[Sequence[Firing]]
    lag: Sequence[float | None]
    pace: Sequence[float | None]


class Looking:
    """Looks, and remembers the last half hour: one sample every five seconds while somebody looks, or all the time where ``run`` does."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._lag: deque[float | None] = deque(maxlen=SAMPLES)
        self._pace: deque[float | None] = deque(maxlen=SAMPLES)
        self._last: tuple[float, dict[int, tuple[int, int]]] | None = None

    async def overview(self) -> Overview:
        """Everything, asked at once."""
        inventory = self._inventory
        parts = controllers_of(inventory)

        async def hot() -> Sequence[Any]:
            return parts.hotspots.top(limit=10) if parts.hotspots is not None else ()

        async def links() -> Sequence[str]:
            return list(parts.gray_links.links()) if parts.gray_links is not None else ()

        async def open_discrepancies() -> int:
            if parts.reconciler is None:
                return 0
            return len(await parts.reconciler.discrepancies(limit=MOST))

        async def alerts() -> Sequence[Firing]:
            if parts.alerts is None or not parts.alerts.rules:
                return ()
            silences, now = await parts.alerts.silences(), time.time()
            return sorted(
                [
                    Firing(
                        each,
                        *_sku_of(each.subject),
                        now - each.since,
                        any(silence.covers(each.rule, each.subject, now) for silence in silences),
                    )
                    for each in await parts.alerts.firing()
                ],
                key=lambda each: (each.silenced, each.alert.severity != "critical"),
            )

        async def frozen() -> int:
            return len(await inventory.stock.frozen(limit=MOST))

        (partitions, tasks, differ), (stopped, wanted, gray, ringing) = await asyncio.gather(
            asyncio.gather(fact(self.partitions), fact(lambda: inventory.ledger.pages.waiting_tasks(MOST)), fact(open_discrepancies)),
            asyncio.gather(fact(frozen), fact(hot), fact(links), fact(alerts)),
        )
        self._sample(partitions)
        usage = inventory.lanes.usage()
        lanes = [LaneFacts(name, lane, usage[name]) for name, lane in inventory.lanes.items()]
        rules = len(parts.alerts.rules) if parts.alerts is not None else 0
        return Overview(partitions, lanes, tasks, stopped, wanted, gray, differ, rules, ringing, list(self._lag), list(self._pace))

    async def run(self) -> None:
        """Samples until it is cancelled."""
        while True:
            self._sample(await fact(self.partitions))
            await asyncio.sleep(PERIOD)

    async def partitions(self) -> Sequence[PartitionFacts]:
        """Every partition, at once."""
        engine = self._inventory._ready().engine
        return await asyncio.gather(*[self._partition(each) for each in engine.partitions])

    async def _partition(self, view: Partition) -> PartitionFacts:
        engine = self._inventory._ready().engine
        # The ledger first: what Redis journals in between only makes it look further behind, never ahead.
        row = await self._inventory.ledger.partition(view.number)
        hello = await view.hello()
        worker = await engine.upkeep.worker_seen(view.number)
        epoch, applied = hello.epoch or 0, row.applied if row is not None else 0
        behind: int | None = None
        seconds: float | None = None
        if row is not None and row.epoch == epoch:
            behind = max(hello.sequence - applied, 0)
            seconds = 0.0
            if behind:
                oldest = await read_entries(view, epoch, applied, applied + 1, 1)
                seconds = (hello.now_ms - decode(view.number, epoch, *oldest[0]).at_ms) / 1000 if oldest else None
        state = hello.state or "missing"
        return PartitionFacts(view.number, state, epoch, hello.sequence, applied, behind, seconds, hello.entries, worker)

    def _sample(self, found: Fact[Sequence[PartitionFacts]]) -> None:
        now = time.monotonic()
        if self._last is not None and now - self._last[0] < PERIOD * 0.9:
            return
        before = self._last
        parts = found.value
        at = {each.number: (each.epoch, each.sequence) for each in parts or ()}
        self._last = now, at
        if before is not None:
            for _ in range(min(int((now - before[0]) / PERIOD) - 1, SAMPLES)):
                self._lag.append(None)  # nobody looked
                self._pace.append(None)
        if parts is None or any(each.seconds is None for each in parts):
            self._lag.append(None)
        else:
            self._lag.append(max((each.seconds or 0.0 for each in parts), default=0.0))
        if (
            parts is None
            or before is None
            or {number: epoch for number, (epoch, _) in at.items()} != {number: epoch for number, (epoch, _) in before[1].items()}
        ):
            self._pace.append(None)
        else:
            moved = sum(sequence - before[1][number][1] for number, (_, sequence) in at.items())
            self._pace.append(max(moved, 0) / (now - before[0]))


def _sku_of(subject: str) -> tuple[str, str]:
    """(merchant, sku) of an alert that is about a SKU."""
    return split_key(subject) if SEPARATOR in subject else ("", "")
