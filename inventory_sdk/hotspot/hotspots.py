"""``inventory.hotspots``: what is hot, and the parts that find, pace and move it, in each event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from inventory_sdk.beside import Ground, Job
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.hotspot.detector import CALLS, STOCK, Detector, Watch
from inventory_sdk.hotspot.lease import LimitsSource
from inventory_sdk.hotspot.paces import Paces
from inventory_sdk.hotspot.promotion import Promotion
from inventory_sdk.hotspot.rates import parse_rate
from inventory_sdk.model import SEPARATOR, Detection, Lane


@dataclass(frozen=True, slots=True)
class HotKey:
    """A key and its calls per second over all processes. ``merchant`` and ``sku`` are None for a key that is no SKU; ``hot_since``
    (Unix seconds) is None while it is not hot. ``waiting``: calls in its line in this process. ``promoted``: ``admission="auto"`` has
    moved it to Redis."""

    key: str
    merchant: str | None
    sku: str | None
    rate: float
    hot_since: float | None
    waiting: int
    promoted: bool


class Here:
    """One event loop's half. ``ground`` and ``paces`` are there once it is started; nothing is hot before. ``outer``: the half that this
    one stands in for (``Inventory.replaced``)."""

    __slots__ = ("detector", "ground", "outer", "paces", "promotion", "watches")

    def __init__(self, detection: Detection, thresholds: set[float], ground: Ground | None = None, outer: Here | None = None) -> None:
        self.ground = ground
        self.outer = outer
        self.detector = Detector(detection)
        self.promotion: Promotion | None = None
        self.paces: Paces | None = None
        self.watches: dict[float, Watch] = {}
        for threshold in thresholds:
            self.watch(threshold)

    def watch(self, threshold: float) -> Watch:
        """Calls that are hot at this threshold."""
        watch = self.watches.get(threshold)
        if watch is None:
            watch = self.watches[threshold] = self.detector.watch(CALLS, threshold)
        return watch


class Hotspots:
    """The controller; its state belongs to the event loop it was started in.

    ``lanes``: the declared ones. ``auto``: whether SKUs are moved to Redis while they are hot."""

    def __init__(
        self, detection: Detection, lanes: Mapping[str, Lane], default_merchant: Callable[[], str | None], *, auto: bool = False
    ) -> None:
        self._promote_at = parse_rate("promote", detection.promote).per_second
        self._detection = detection
        self._lanes = lanes
        self._auto = auto
        self.default_merchant = default_merchant
        self._thresholds: set[float] = set()
        self._here: WeakKeyDictionary[asyncio.AbstractEventLoop, Here] = WeakKeyDictionary()
        self.last: tuple[weakref.ref[asyncio.AbstractEventLoop] | None, Here | None] = (None, None)

    def top(self, limit: int = 20) -> list[HotKey]:
        """The keys that are called most over all processes, those that are hot first; as this process saw it at its last look.

        What is far below every threshold (a tenth of the lowest) is not counted over processes and not here."""
        if type(limit) is not int or limit < 1:
            raise InvalidOperation("limit", limit, "must be a whole number, at least 1")
        here = self.here()
        rates: dict[str, float] = {}
        for (_, key), rate in here.detector.rates.items():
            rates[key] = max(rate, rates.get(key, 0.0))
        since: dict[str, float] = {}
        for watch in here.detector.watches.values():
            for key, at in watch.hot.items():
                since[key] = min(at, since.get(key, at))
        keys = sorted(rates.keys() | since.keys(), key=lambda key: (key not in since, -rates.get(key, 0.0), key))[:limit]
        return [self._hot_key(here, key, rates.get(key, 0.0), since.get(key)) for key in keys]

    def away(self) -> bool:
        """Whether Redis does not answer: then keys are judged by this process' own calls, and paced by its part of the last rate."""
        here = self.here()
        return here.detector.away or (here.paces is not None and here.paces.alone > 0)

    # For the aspect -----------------------------------------------------------------------------------------------------------------

    def declare(self, threshold: float) -> None:
        """A decorator has this threshold; those that were started before begin to look for it now."""
        self._thresholds.add(threshold)
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        for loop, here in list(self._here.items()):
            here.watch(threshold)
            if here.ground is None or loop.is_closed():
                continue
            if loop is running:
                self._begin(here)
            else:
                loop.call_soon_threadsafe(self._begin, here)

    def here(self) -> Here:
        """This event loop's half."""
        loop, here = self.last
        running = asyncio.get_running_loop()
        if here is not None and loop is not None and loop() is running:
            return here
        here = self._here.get(running)
        if here is None:
            for closed in [each for each in self._here if each.is_closed()]:
                del self._here[closed]
            here = self._here[running] = Here(self._detection, self._thresholds)
        self.last = (weakref.ref(running), here)
        return here

    def lane(self, name: str) -> Lane | None:
        """A declared lane."""
        return self._lanes.get(name)

    # Life ---------------------------------------------------------------------------------------------------------------------------

    async def start(self, ground: Ground) -> None:
        """Begin to look, if anything was declared."""
        loop = asyncio.get_running_loop()
        outer = self._here.get(loop)
        if outer is not None and outer.ground is None:
            outer = None  # it only counted, and its counts are of no use to anyone
        here = self._here[loop] = Here(self._detection, self._thresholds, ground, outer)
        self.last = (None, None)
        if self._auto:
            here.detector.watch(STOCK, self._promote_at)
            here.promotion = Promotion(ground, here.detector)
            ground.engine.count = here.detector.rings[STOCK].count
            ground.engine.direct.bring = here.promotion.bring
            ground.engine.direct.known = here.promotion.known
        if self._auto or self._thresholds:
            self._begin(here)

    async def close(self) -> None:
        """End what ``start`` began; who waits for a pace is refused."""
        here = self._here.pop(asyncio.get_running_loop(), None)
        self.last = (None, None)
        if here is None:
            return
        if here.outer is not None:
            self._here[asyncio.get_running_loop()] = here.outer
        here.ground = None
        await here.detector.close()
        if here.paces is not None:
            await here.paces.close()

    def jobs(self, ground: Ground) -> Sequence[Job]:
        """Moving hot SKUs to Redis and back, where admission is automatic."""
        here = self.here()
        return [Job("promotion", here.promotion.run)] if here.promotion is not None else []

    def _begin(self, here: Here) -> None:
        ground = here.ground
        if here.paces is not None or ground is None:
            return
        detector = here.detector
        paces = here.paces = Paces(
            LimitsSource(ground.client, ground.namespace),
            ground.metrics,
            lambda: detector.processes,
            lambda: len({key for watch in detector.watches.values() for key in watch.hot}),
            lambda most: [(key.merchant or "", key.sku or key.key, key.rate) for key in self.top(most) if key.hot_since is not None],
        )

        def cooled(_: Watch, key: str) -> None:
            if not any(key in watch.hot for watch in detector.watches.values()):
                paces.cool(key)

        detector.cooled.append(cooled)
        detector.start(ground)

    def _hot_key(self, here: Here, key: str, rate: float, since: float | None) -> HotKey:
        merchant, _, sku = key.partition(SEPARATOR)
        waiting = here.paces.waiting_for(key) if here.paces is not None else 0
        promoted = key in here.detector.promoted
        return HotKey(key, merchant if sku else None, sku or None, rate, since, waiting, promoted)
