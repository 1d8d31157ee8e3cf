"""The guard: compares both sides of a link over the same window and takes back what got worse, one merchant first, then the link.

Every worker looks; compare-and-set lets one of them act. What it did, and on which figures, stands in the link's history.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from inventory_sdk.gray.decision import CANDIDATE, STABLE
from inventory_sdk.gray.rules import MAX_TEXT, Guard, Rules
from inventory_sdk.gray.samples import Samples, Tally
from inventory_sdk.gray.store import RulesChanged, RuleStore, RulesUnavailable
from inventory_sdk.metrics import Happened, Metrics, Retried
from inventory_sdk.sync.backoff import waited

WHO: Final = "guard"
TICK: Final = 1.0
LATE: Final = 2.5
"""Seconds after a window's end until every process has handed on what it counted."""
SHOWN: Final = 5


Tell = Callable[[str, Mapping[str, Any]], Awaitable[None]]
"""Calls the service's ``on`` handlers."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a window says. ``merchants``: whom to take back, and why."""

    verdict: Literal["idle", "passed", "inconclusive", "merchants", "link"]
    why: str
    merchants: Mapping[str, str]


def judge(rules: Rules, guard: Guard, window: Samples) -> Finding:
    """Pure: from the counts of one window to what they mean."""
    stable, candidate = window.sides[STABLE], window.sides[CANDIDATE]
    need = guard.minimum_samples
    if candidate.calls == 0:
        return Finding("idle", "no call went to the candidate", {})
    if stable.calls < need:
        return Finding("inconclusive", f"only {stable.calls} calls went to the stable side, {need} are needed to compare", {})
    bad: dict[str, str] = {}
    rest = replace(candidate)
    gone = {*rules.taken_back, *rules.deny}
    for merchant, tally in sorted(window.merchants.items()):
        if merchant in gone:
            rest = rest.without(tally)
        elif tally.calls >= need and (why := _worse(guard, tally, stable)):
            bad[merchant] = why
            rest = rest.without(tally)
    if rest.calls >= need and (why := _worse(guard, rest, stable)):
        return Finding("link", f"the candidate fails beyond single merchants: {why}", {})
    if bad and len(bad) + len(rules.taken_back) >= guard.max_merchants:
        said = f"{len(bad) + len(rules.taken_back)} merchants failed, at most {guard.max_merchants - 1} may: {_said(bad)}"
        return Finding("link", said, {})
    if bad:
        return Finding("merchants", _said(bad), bad)
    if rest.calls == 0:
        return Finding("idle", "only merchants that were taken back called the candidate", {})
    if rest.calls < need:
        return Finding("inconclusive", f"only {rest.calls} calls went to the candidate, {need} are needed to compare", {})
    return Finding("passed", _figures(rest, stable), {})


def _worse(guard: Guard, tally: Tally, stable: Tally) -> str:
    """Why this is worse than the stable side; empty where it is not."""
    allowed = max(guard.error_floor, stable.error_share * guard.error_ratio)
    if tally.error_share > allowed:
        return f"{_figures(tally, stable)}: at most {allowed:.2%} may fail"
    if tally.mean > stable.mean * guard.latency_ratio:
        return f"{_figures(tally, stable)}: at most {guard.latency_ratio:g} × the stable side's time is allowed"
    return ""


def _figures(tally: Tally, stable: Tally) -> str:
    def side(name: str, of: Tally) -> str:
        return f"{name} {of.errors} of {of.calls} failed ({of.error_share:.2%}), {of.mean * 1e3:.3g} ms"

    return f"{side('candidate', tally)}; {side('stable', stable)}"


def _said(bad: Mapping[str, str]) -> str:
    shown = "; ".join(f"merchant {merchant}: {why}" for merchant, why in list(bad.items())[:SHOWN])
    return shown + (f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else "")


class GuardJob:
    """Runs in every worker. ``known``: the links' rules as this process knows them; each act looks at Redis first."""

    def __init__(self, store: RuleStore, known: Callable[[], Mapping[str, Rules]], metrics: Metrics, tell: Tell) -> None:
        self._store = store
        self._known = known
        self._metrics = metrics
        self._tell = tell
        self._done: dict[str, tuple[float, int]] = {}

    async def run(self, stopping: asyncio.Event) -> None:
        """Until the worker stops."""
        while not await waited(stopping, TICK):
            for link, rules in list(self._known().items()):
                if rules.guard is None or rules.killed:
                    continue
                try:
                    await self.look(link, rules.guard, await self._store.now())
                except RulesUnavailable as error:
                    self._metrics.record(Retried("gray_guard", type(error.__cause__).__name__))
                except RulesChanged:
                    # Another worker was first, or a person: what they did is looked at with the next window.
                    self._metrics.record(Retried("gray_guard", "changed"))

    async def look(self, link: str, guard: Guard, now: float) -> Finding | None:
        """Judge the last window that is complete, once; None while there is none, or for one that was judged here before."""
        number = int(now // guard.interval) - 1
        late = min(LATE, guard.interval / 2)
        if now - (number + 1) * guard.interval < late or self._done.get(link) == (guard.interval, number):
            return None
        counts = await self._store.counted(link, guard.interval, number)
        rules = await self._store.get(link)
        if rules.guard != guard or rules.killed:
            return None
        finding = judge(rules, guard, Samples.of(counts))
        await self._act(rules, finding)
        self._done[link] = guard.interval, number
        return finding

    async def _act(self, rules: Rules, finding: Finding) -> None:
        why = finding.why[:MAX_TEXT]
        if finding.verdict == "link":
            await self._store.put(rules, replace(rules, killed=True), WHO, why)
        elif finding.verdict == "merchants":
            taken = tuple(sorted({*rules.taken_back, *finding.merchants}))
            await self._store.put(rules, replace(rules, taken_back=taken), WHO, why)
        elif finding.verdict == "inconclusive":
            if not rules.paused:
                await self._store.put(rules, replace(rules, paused=True), WHO, why)
        elif finding.verdict == "passed":
            if rules.paused and await self._paused_it(rules.link):
                await self._store.put(rules, replace(rules, paused=False), WHO, why)
            else:
                await self._store.note(rules, "passed", WHO, f"passed: {why}"[:MAX_TEXT])
        self._metrics.record(Happened("gray_guard", {"reason": finding.verdict}))
        if finding.verdict in ("link", "merchants"):
            facts = {"link": rules.link, "merchants": sorted(finding.merchants), "killed": finding.verdict == "link", "why": why}
            await self._tell("gray_taken_back", facts)

    async def _paused_it(self, link: str) -> bool:
        """Whether the pause is the guard's own: it does not lift a person's."""
        for change in await self._store.history(link, 100):
            if "paused" in change.changes:
                return change.who == WHO
        return False
