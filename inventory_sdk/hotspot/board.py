"""What all processes know together: counts per key and moment, and which keys are hot. Plain commands, one pipeline per look.

Keys, all with the tag ``{namespace:hotspot}``:

- ``counts:<n>``: a sorted set per moment (``EVERY`` seconds of Redis' clock): how often each key was called. Gone after the window.
- ``hot``: a hash, mark → "since seen" (ms): since when it is hot, and when it was last seen above its cool level.
- ``processes``: a sorted set of those that have looked lately.
- ``promoted``: a hash of the stock fields that ``admission="auto"`` has moved to Redis.

Each process sends its ``MOST_SENT`` largest counts, so a key is missed by at most the smallest of them in each: with the ring's own
bound, N·(1/1024 + 1/128) of N calls. ``hot`` is the truth about what is hot; the channel ``heat`` only tells of it sooner.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from inventory_sdk.hotspot.ring import top

EVERY: Final = 0.2
"""Seconds of one sub-window, and between two looks."""
MOST_SENT: Final = 128
MOST_READ: Final = 1000
"""Keys read per moment."""
SHOWN: Final = 0.1
"""Keys below this part of the lowest threshold are not read."""

CLOCK: Final = "return redis.call('TIME')"
"""TIME names no key, so a cluster would not know which node is asked."""
MARK: Final = "\x1e"
"""Between the parts of a mark: stream, threshold, key."""


def mark_of(stream: str, threshold: float, key: str) -> str:
    """The field of ``hot``."""
    return f"{stream}{MARK}{threshold:g}{MARK}{key}"


def parts_of(mark: str) -> tuple[str, float, str] | None:
    """Stream, threshold, key; None for what is no mark."""
    stream, _, rest = mark.partition(MARK)
    threshold, found, key = rest.partition(MARK)
    try:
        return (stream, float(threshold), key) if found else None
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Entry:
    """A hot key: since when, and when it was last seen above its cool level (ms, Redis' clock)."""

    since: int
    seen: int


@dataclass(frozen=True, slots=True)
class Look:
    """What one look saw. ``rates``: (stream, key) → calls per second over all processes; ``promoted``: field → since when (ms)."""

    now: int
    rates: Mapping[tuple[str, str], float]
    hot: Mapping[str, Entry]
    processes: int
    promoted: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Changes:
    """What should become of ``hot``: marks that are hot now, still hot, and no longer."""

    heat: Mapping[str, float]
    touch: Sequence[str]
    cool: Sequence[str]


class Board:
    """See above. ``client`` is for plain commands."""

    def __init__(self, client: Any, namespace: str, process: str, window: float) -> None:
        self.client = client
        self.channel = f"{{{namespace}:hotspot}}:heat"
        self._process = process
        self._prefix = f"{{{namespace}:hotspot}}:"
        self._moments = max(2, round(window / EVERY))
        self._every = int(EVERY * 1000)
        self._ahead: int | None = None

    def key(self, name: str) -> str:
        """A key of ours."""
        return self._prefix + name

    async def look(self, counted: Mapping[str, dict[str, int]], least: float) -> Look:
        """Send what was counted since the last look (by stream), and see what all have counted together; keys with fewer than
        ``least`` calls per second are left out."""
        if self._ahead is None:
            self._ahead = _ms(await self.client.eval(CLOCK, 1, self.key("hot"))) - time.time_ns() // 1_000_000
        moment = (time.time_ns() // 1_000_000 + self._ahead) // self._every
        counts = self.key(f"counts:{moment}")
        keep = self._every * (self._moments + 2) + 2000
        sent = 0
        async with self.client.pipeline(transaction=False) as pipeline:
            for stream, window in counted.items():
                for key, count in top(window, MOST_SENT):
                    pipeline.zincrby(counts, count, stream + MARK + key)
                    sent += 1
            if sent:
                pipeline.pexpire(counts, keep)
            pipeline.zadd(self.key("processes"), {self._process: moment})
            pipeline.zremrangebyscore(self.key("processes"), "-inf", f"({moment - 15}")
            pipeline.pexpire(self.key("processes"), 60_000)
            pipeline.zcard(self.key("processes"))
            pipeline.eval(CLOCK, 1, self.key("hot"))
            pipeline.hgetall(self.key("hot"))
            pipeline.hgetall(self.key("promoted"))
            floor = max(1, int(least * EVERY * SHOWN))
            for back in range(self._moments + 1):
                pipeline.zrevrangebyscore(self.key(f"counts:{moment - back}"), "+inf", floor, start=0, num=MOST_READ, withscores=True)
            answers = await pipeline.execute()
        processes, at, hot, promoted, *seen = answers[-(5 + self._moments) :]
        now = _ms(at)
        self._ahead = now - time.time_ns() // 1_000_000
        return Look(
            now,
            self._rates(seen, moment, now),
            {field.decode(): entry for field, value in hot.items() if (entry := _entry(value)) is not None},
            int(processes),
            {field.decode(): int(since) for field, since in promoted.items()},
        )

    async def change(self, changes: Changes, look: Look) -> tuple[list[str], list[str]]:
        """Write them; the marks that this process was the first to heat, and to cool. All others hear of those."""
        marks = [*changes.heat, *changes.cool]
        async with self.client.pipeline(transaction=False) as pipeline:
            for mark in changes.heat:
                pipeline.hsetnx(self.key("hot"), mark, f"{look.now} {look.now}")
            for mark in changes.cool:
                pipeline.hdel(self.key("hot"), mark)
            for mark in changes.touch:
                pipeline.hset(self.key("hot"), mark, f"{look.hot[mark].since} {look.now}")
            answers = await pipeline.execute()
        mine = [mark for mark, first in zip(marks, answers, strict=False) if first]
        heated = [mark for mark in mine if mark in changes.heat]
        cooled = [mark for mark in mine if mark not in changes.heat]
        if mine:
            async with self.client.pipeline(transaction=False) as pipeline:
                for mark in heated:
                    pipeline.publish(self.channel, f"h{changes.heat[mark]:.1f} {mark}")
                for mark in cooled:
                    pipeline.publish(self.channel, f"c0 {mark}")
                await pipeline.execute()
        return heated, cooled

    def _rates(self, seen: Sequence[Any], moment: int, now: int) -> dict[tuple[str, str], float]:
        """The oldest moment counts by what is still in the window."""
        into = min(1.0, max(0.0, now / self._every - moment))
        sums: dict[tuple[str, str], float] = {}
        for back, counts in enumerate(seen):
            weight = 1.0 - into if back == self._moments else 1.0
            for member, count in counts:
                stream, _, key = member.decode().partition(MARK)
                sums[stream, key] = sums.get((stream, key), 0.0) + float(count) * weight
        seconds = self._moments * EVERY
        return {key: total / seconds for key, total in sums.items()}


def _ms(clock: Sequence[Any]) -> int:
    seconds, micros = clock
    return int(seconds) * 1000 + int(micros) // 1000


def _entry(value: bytes) -> Entry | None:
    since, _, seen = value.decode().partition(" ")
    return Entry(int(since), int(seen)) if since.isdecimal() and seen.isdecimal() else None
