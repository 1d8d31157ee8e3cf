"""What is hot, in one event loop: counts go out, what all have counted comes back, and heat is judged with hysteresis.

Judging is the same in every process, from the same numbers; ``hot`` in Redis decides who was first. While Redis is away nothing cools,
and what is hot by this process' own counts alone becomes hot here.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final
from uuid import uuid4

from redis.asyncio import RedisCluster
from redis.exceptions import RedisError

from inventory_sdk.beside import Ground
from inventory_sdk.ending import end
from inventory_sdk.hotspot.board import EVERY, Board, Changes, Entry, Look, mark_of, parts_of
from inventory_sdk.hotspot.ring import Ring
from inventory_sdk.metrics import Happened, Retried
from inventory_sdk.model import SEPARATOR, Detection
from inventory_sdk.sync.notices import Notices

log = logging.getLogger("inventory_sdk.hotspot")

CALLS: Final = "c"
"""The stream of calls through hotspot decorators."""
STOCK: Final = "s"
"""The stream of takes, counted where admission is automatic."""
IDLE_LOOKS: Final = 5
"""One look in so many while nothing is called and nothing is hot."""
FORGOTTEN_MS: Final = 60_000
"""After which a hot mark that nobody judges any more (its threshold was changed) is removed by anyone."""
PATIENCE: Final = 1.0
"""Seconds that one look may take; what a plain command may is too long for what is hot now."""
LISTEN_AGAIN: Final = 0.5

AWAY: Final = (RedisError, OSError, asyncio.TimeoutError)


class Watch:
    """Keys that are hot at one threshold of one stream: key → since when (Unix seconds). ``ring`` counts the stream's calls."""

    __slots__ = ("hot", "ring", "stream", "threshold")

    def __init__(self, ring: Ring, stream: str, threshold: float) -> None:
        self.ring = ring
        self.stream = stream
        self.threshold = threshold
        self.hot: dict[str, float] = {}


class Detector:
    """See above. ``heated`` and ``cooled`` hear of every change in this event loop."""

    def __init__(self, detection: Detection) -> None:
        self.detection = detection
        moments = max(2, round(detection.window / EVERY))
        self.rings = {CALLS: Ring(moments), STOCK: Ring(moments)}
        self.watches: dict[tuple[str, float], Watch] = {}
        self.rates: Mapping[tuple[str, str], float] = {}
        self.processes = 1
        self.away = False
        self.promoted: Mapping[str, int] = {}
        """Stock that was moved to Redis by itself, since when (ms)."""
        self.looked = asyncio.Event()
        """Set, and made anew, after each look."""
        self.heated: list[Callable[[Watch, str], None]] = []
        self.cooled: list[Callable[[Watch, str], None]] = []
        self._ground: Ground | None = None
        self._board: Board | None = None
        self._notices: Notices | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._idle = 0
        self._heard = 0

    @property
    def board(self) -> Board:
        """Where all processes meet."""
        assert self._board is not None
        return self._board

    def watch(self, stream: str, threshold: float) -> Watch:
        """The keys that are hot at this threshold, made when first asked for."""
        watch = self.watches.get((stream, threshold))
        if watch is None:
            watch = self.watches[stream, threshold] = Watch(self.rings[stream], stream, threshold)
        return watch

    # Life ------------------------------------------------------------------------------------------------------------------------

    def start(self, ground: Ground) -> None:
        """Begin to look. Waits for nothing."""
        self._ground = ground
        self._board = Board(ground.engine.wire.client, ground.namespace, uuid4().hex, self.detection.window)
        self._notices = Notices(ground.tell)
        self._task(self._look_again_and_again(), "inventory hotspots")
        self._task(self._notices.run(), "inventory hotspot notices")
        if not ground.embedded and not isinstance(ground.client, RedisCluster):
            self._task(self._listen(ground.client), "inventory heat")

    async def close(self) -> None:
        """End what ``start`` began."""
        await end(self._tasks)
        self._tasks.clear()
        self._ground = None

    def _task(self, work: Any, name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or self._ground is None:
            return
        error = task.exception()
        if error is not None:
            log.error("%s died", task.get_name(), exc_info=error)
            self._ground.failed(error)

    # Looking ----------------------------------------------------------------------------------------------------------------------

    async def _look_again_and_again(self) -> None:
        while True:
            # Many processes that were started together should not look together.
            await asyncio.sleep(EVERY * random.uniform(0.9, 1.1))  # noqa: S311  # to spread, not to hide
            await self.look()
            looked, self.looked = self.looked, asyncio.Event()
            looked.set()

    async def look(self) -> None:
        """Once. A Redis that does not answer is counted and looked for again."""
        ground, board = self._ground, self._board
        assert ground is not None
        assert board is not None
        quiet = not any(ring.counts for ring in self.rings.values()) and not any(watch.hot for watch in self.watches.values())
        self._idle = self._idle + 1 if quiet else 0
        if self._idle % IDLE_LOOKS and not self.promoted:
            for ring in self.rings.values():
                ring.turn()
            self.rates = {} if self._idle > self.detection.window / EVERY else self.rates
            return
        heard = self._heard
        counted = {stream: ring.turn() for stream, ring in self.rings.items()}
        thresholds = [watch.threshold for watch in self.watches.values()]
        try:
            async with asyncio.timeout(PATIENCE):
                found = await board.look(counted, min(thresholds, default=1.0))
                changes = self.judge(found)
                heated: list[str] = []
                cooled: list[str] = []
                if changes.heat or changes.cool or changes.touch:
                    heated, cooled = await board.change(changes, found)
        except AWAY as error:
            self.away = True
            ground.metrics.record(Retried("hotspots", type(error).__name__))
            self._judge_alone()
            return
        self.away = False
        self.rates = found.rates
        self.processes = max(1, found.processes)
        self.promoted = found.promoted
        if heard == self._heard:  # else what was seen is older than what was heard; the next look will do
            hot = set(found.hot).union(changes.heat).difference(changes.cool)
            self._show(hot, {mark: entry.since / 1000 for mark, entry in found.hot.items()})
        for what, marks in (("hotspot_heated", heated), ("hotspot_cooled", cooled)):
            for _ in marks:
                ground.metrics.record(Happened(what))

    def judge(self, found: Look) -> Changes:
        """What should become of the hot marks, by what was seen."""
        stay = int(self.detection.stay * 1000)
        heat: dict[str, float] = {}
        touch: list[str] = []
        cool: list[str] = []
        by_stream: dict[str, list[Watch]] = {}
        for watch in self.watches.values():
            by_stream.setdefault(watch.stream, []).append(watch)
        warm: set[str] = set()
        for (stream, key), rate in found.rates.items():
            for watch in by_stream.get(stream, ()):
                if rate < watch.threshold * self.detection.cool:
                    continue
                mark = mark_of(stream, watch.threshold, key)
                warm.add(mark)
                entry = found.hot.get(mark)
                if entry is None:
                    if rate >= watch.threshold:
                        heat[mark] = rate
                elif found.now - entry.seen > stay // 4:
                    touch.append(mark)
        for mark, entry in found.hot.items():
            if mark not in warm and self._is_over(mark, entry, found.now, stay):
                cool.append(mark)
        return Changes(heat, touch, cool)

    def _is_over(self, mark: str, entry: Entry, now: int, stay: int) -> bool:
        parts = parts_of(mark)
        if parts is None or parts[:2] not in self.watches:
            return now - entry.seen > max(FORGOTTEN_MS, 4 * stay)
        return now - entry.seen > stay and now - entry.since > stay

    def _judge_alone(self) -> None:
        seconds = self.detection.window
        self.rates = {(stream, key): n / seconds for stream, ring in self.rings.items() for key, n in ring.closed().items()}
        for watch in self.watches.values():
            for (stream, key), rate in self.rates.items():
                if stream == watch.stream and rate >= watch.threshold and key not in watch.hot:
                    self._heat(watch, key, time.time())

    # Changes ----------------------------------------------------------------------------------------------------------------------

    def _show(self, marks: Iterable[str], since: Mapping[str, float]) -> None:
        """Make the watches what these marks say."""
        wanted: dict[tuple[str, float], set[str]] = {}
        for mark in marks:
            parts = parts_of(mark)
            if parts is not None:
                wanted.setdefault(parts[:2], set()).add(parts[2])
        for where, watch in self.watches.items():
            keys = wanted.get(where, set())
            for key in keys - watch.hot.keys():
                self._heat(watch, key, since.get(mark_of(*where, key), time.time()))
            for key in watch.hot.keys() - keys:
                self._cool(watch, key)

    def _heat(self, watch: Watch, key: str, since: float, rate: float | None = None) -> None:
        watch.hot[key] = since
        self._tell("hot", watch, key, rate)
        for hear in self.heated:
            hear(watch, key)

    def _cool(self, watch: Watch, key: str) -> None:
        del watch.hot[key]
        self._tell("cool", watch, key)
        for hear in self.cooled:
            hear(watch, key)

    def _tell(self, name: str, watch: Watch, key: str, rate: float | None = None) -> None:
        if self._notices is not None:
            merchant, _, sku = key.partition(SEPARATOR)
            facts = {
                "key": key,
                "merchant": merchant if sku else None,
                "sku": sku or None,
                "threshold": watch.threshold,
                "rate": self.rates.get((watch.stream, key), 0.0) if rate is None else rate,
                "counted": "calls" if watch.stream == CALLS else "stock",
            }
            self._notices.tell(name, facts)

    async def _listen(self, client: Any) -> None:
        """Changes that other processes were first to see, sooner than the next look."""
        assert self._ground is not None
        board = self.board
        while True:
            try:
                async with client.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(board.channel)
                    while True:
                        message = await channel.get_message(timeout=5.0)
                        if message is not None and message["type"] == "message":
                            self.hear(message["data"].decode())
            except AWAY as error:
                self._ground.metrics.record(Retried("heat", type(error).__name__))
                await asyncio.sleep(LISTEN_AGAIN)

    def hear(self, text: str) -> None:
        """A change that some process wrote to ``hot``."""
        what, _, mark = text.partition(" ")
        parts = parts_of(mark)
        watch = self.watches.get(parts[:2]) if parts is not None else None
        if parts is None or watch is None:
            return
        key = parts[2]
        self._heard += 1
        if what.startswith("h") and key not in watch.hot:
            self._heat(watch, key, time.time(), float(what[1:]))
        elif what.startswith("c") and key in watch.hot:
            self._cool(watch, key)
