"""Counts from every process, summed in Redis: one hash for each ten seconds, which goes by itself after an hour and a bit.

Keys ``<namespace>:alerts:counts:<bucket>``, fields ``rule ␟ subject ␞ part`` (a subject may be a merchant and SKU, joined by ␟).
"""

from __future__ import annotations

import heapq
import operator
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.alerts.rules import BUCKET, MAX_WINDOW, Count, Rule, Sums

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

PUSHED: Final = 1000
"""Counts of one push; the largest go first, what is beyond them stays here until the next one."""
KEPT: Final = 20_000
"""Counts that may wait here while Redis is away; the smallest are forgotten beyond that."""
COUNTED: Final = 2 * KEPT
"""Subjects counted between two pushes: a flood of names that come once each must not fill the memory."""
SETTLED: Final = 30
"""Seconds after which nobody adds to a bucket any more."""


class Tally:
    """One process' counts on their way, and one judge's memory of what all of them counted."""

    def __init__(self, namespace: str) -> None:
        self._prefix = f"{namespace}:alerts:counts:"
        self._waiting: Counter[tuple[str, str, str]] = Counter()
        self._known: dict[int, dict[tuple[str, str, str], int]] = {}

    def add(self, rule: str, counts: Iterable[Count]) -> None:
        """Count; returns at once. ``TypeError`` for a number that is not whole: Redis could not add it to the others."""
        waiting = self._waiting
        for subject, part, number in counts:
            name = rule, subject, part
            if name in waiting or len(waiting) < COUNTED:
                waiting[name] += operator.index(number)

    async def push(self, client: Redis | RedisCluster, now: float) -> None:
        """Add what was counted here to the sums. Raises the client's errors: what Redis refused stays here. Where its answer is lost, all
        stays here, and may be counted twice."""
        if not self._waiting:
            return
        taken, self._waiting = self._waiting, Counter()
        going = dict(heapq.nlargest(PUSHED, (item for item in taken.items() if item[1]), _size))
        key = f"{self._prefix}{int(now // BUCKET)}"
        stay: Mapping[tuple[str, str, str], int] = taken  # until Redis has answered
        try:
            async with client.pipeline(transaction=False) as pipeline:
                for (rule, subject, part), number in going.items():
                    pipeline.hincrby(key, f"{rule}\x1f{subject}\x1e{part}", number)
                pipeline.expire(key, int(MAX_WINDOW + 10 * BUCKET))
                answers = await pipeline.execute(raise_on_error=False)
            refused = {name for name, answer in zip(going, answers, strict=False) if isinstance(answer, Exception)}
            stay = {name: number for name, number in taken.items() if name in refused or name not in going}
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        finally:
            for name, number in stay.items():
                if number:
                    self._waiting[name] += number
            if len(self._waiting) > KEPT:
                self._waiting = Counter(dict(heapq.nlargest(KEPT, self._waiting.items(), _size)))

    async def sums(self, client: Redis | RedisCluster, rules: Iterable[Rule], now: float) -> dict[str, dict[str, Sums]]:
        """By rule and subject, over each rule's window."""
        rules = list(rules)
        last = int(now // BUCKET)
        first = int((now - max((rule.window for rule in rules), default=0)) // BUCKET) + 1
        await self._read(client, first, last, now)
        windows = {rule.name: int((now - rule.window) // BUCKET) + 1 for rule in rules}
        parts: dict[str, dict[str, Counter[str]]] = {rule.name: defaultdict(Counter) for rule in rules}
        since: dict[tuple[str, str], int] = {}
        for bucket in sorted(self._known):
            for (rule, subject, part), number in self._known[bucket].items():
                if bucket >= windows.get(rule, last + 1):
                    parts[rule][subject][part] += number
                    since.setdefault((rule, subject), bucket)
        return {
            rule: {subject: Sums(counted, now - since[rule, subject] * BUCKET) for subject, counted in subjects.items()}
            for rule, subjects in parts.items()
        }

    async def _read(self, client: Redis | RedisCluster, first: int, last: int, now: float) -> None:
        settled = int((now - SETTLED) // BUCKET)
        self._known = {bucket: found for bucket, found in self._known.items() if first <= bucket < settled}
        missing = [bucket for bucket in range(first, last + 1) if bucket not in self._known]
        async with client.pipeline(transaction=False) as pipeline:
            for bucket in missing:
                pipeline.hgetall(f"{self._prefix}{bucket}")
            answers: list[Mapping[Any, Any]] = await pipeline.execute()
        for bucket, answer in zip(missing, answers, strict=True):
            self._known[bucket] = {_named(field): int(number) for field, number in answer.items()}


def _size(item: tuple[tuple[str, str, str], int]) -> int:
    return abs(item[1])


def _named(field: str | bytes) -> tuple[str, str, str]:
    rule, _, rest = (field.decode() if isinstance(field, bytes) else field).partition("\x1f")
    subject, _, part = rest.rpartition("\x1e")
    return rule, subject, part
