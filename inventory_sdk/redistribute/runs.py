"""One run: its calculation, in the event loop or in a process, its end, and what it is called in each case."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from inventory_sdk import context
from inventory_sdk.errors import RecalculationCutOff, RecalculationFailed
from inventory_sdk.metrics import Happened, Metrics
from inventory_sdk.redistribute.board import Board, Claim
from inventory_sdk.redistribute.coalesced import Coalesced, Recalculation, Within, within
from inventory_sdk.redistribute.governor import REDISTRIBUTION
from inventory_sdk.redistribute.meter import Meter, metered
from inventory_sdk.redistribute.outcome import Outcome
from inventory_sdk.redistribute.pool import Pool, TimeUp

log = logging.getLogger("inventory_sdk.redistribute")

GRACE: Final = 1.0
"""Seconds that a cancelled calculation has to end, before it is reported (and cancelled) again."""


class Run:
    """One claim being calculated here. ``kept``: monotonic time until which its lease is known to be ours."""

    def __init__(self, function: Coalesced, board: Board, claim: Claim, kept: float) -> None:
        self.function = function
        self.board = board
        self.claim = claim
        self.kept = kept
        self.lost = False
        self.meter = Meter()
        self.began = time.monotonic()
        self.seconds = 0.0
        self._calculation: asyncio.Task[Any] | None = None

    def lose(self) -> None:
        """Its lease is somebody else's: what is being calculated is not needed any more."""
        if not self.lost:
            self.lost = True
            if self._calculation is not None:
                self._calculation.cancel()

    async def calculate(self, pool: Pool, metrics: Metrics) -> Outcome:
        """How it ended. When this is cancelled, the calculation is ended first, however long that takes."""
        around = Within(self.function.name, self.claim.key)
        task = asyncio.get_running_loop().create_task(
            self._body(pool, around), name=f"inventory run of {self.function.name}", context=contextvars.Context()
        )
        self._calculation = task
        cut_off = False
        try:
            # In a process the time begins when the process is ready, and ends there.
            await asyncio.wait({task}, timeout=None if self._in_process else self.function.options.timeout)
            cut_off = not task.done()
        finally:
            await self._ended(task, metrics)
            around.live = False
            self.seconds = time.monotonic() - self.began
        return self._outcome(task, cut_off)

    @property
    def _in_process(self) -> bool:
        return self.function.options.executor == "process"

    async def _body(self, pool: Pool, around: Within) -> Any:
        context.lane.set(REDISTRIBUTION)
        within.set(around)
        function, claim = self.function, self.claim
        run = Recalculation(claim.key, claim.version, claim.fence)
        if not self._in_process:
            return await metered(_awaited(function.run(claim.arguments, run)), self.meter)

        async def elsewhere(**arguments: Any) -> Any:
            return await pool.run(function.site, arguments, function.options.timeout, self.meter)

        return await function.run(claim.arguments, run, elsewhere)

    async def _ended(self, task: asyncio.Task[Any], metrics: Metrics) -> None:
        """Cancel it until it has ended. While it has not, the key is its: nobody else may calculate it."""
        cancelled = False
        while not task.done():
            task.cancel()
            try:
                await asyncio.wait({task}, timeout=GRACE)
            except asyncio.CancelledError:
                cancelled = True
            if not task.done():
                log.error("%s, key %r, does not end although it was cancelled", self.function.name, self.claim.key)
                metrics.record(Happened("recalculation_stuck", {"task": self.function.name}))
        if cancelled:
            raise asyncio.CancelledError

    def _outcome(self, task: asyncio.Task[Any], cut_off: bool) -> Outcome:
        error = asyncio.CancelledError("it cancelled itself") if task.cancelled() else task.exception()
        if error is None:
            return Outcome(task.result())
        if isinstance(error, TimeUp) or (cut_off and isinstance(error, asyncio.CancelledError)):
            why = f"not done within {self.function.options.timeout:g} s"
            return Outcome(None, (RecalculationCutOff, "TimeoutError", why), error)
        return Outcome(None, (RecalculationFailed, type(error).__name__, str(error)), error)

    def written(self, outcome: Outcome) -> tuple[Outcome, str]:
        """The outcome, and its text for other processes: a result that can't be kept is a failure, for all callers alike."""
        if not self.claim.wanted:
            return outcome, ""
        try:
            return outcome, outcome.text(self.function)
        except Exception as error:  # noqa: BLE001  # whatever a user's serializer raises; it becomes the outcome
            failed = Outcome(None, (RecalculationFailed, type(error).__name__, f"its result can't be kept as JSON: {error}"), error)
            return failed, failed.text(self.function)

    def charges(self) -> dict[str, int]:
        """CPU microseconds by trigger, each for its part of the calls; together exactly what the run took."""
        return shared_out(round(self.meter.cpu_seconds * 1e6), self.claim.calls)

    def rest(self, cpus: float) -> float:
        """Seconds that its key has to rest now, so that it keeps to its budget."""
        budget = self.function.options.key_cpu_budget
        return 0.0 if budget is None else max(0.0, self.meter.cpu_seconds / (budget * cpus) - self.seconds)


def shared_out(amount: int, calls: Mapping[str, int]) -> dict[str, int]:
    """``amount`` in proportion to the calls; what rounding leaves goes to the first ones."""
    total = sum(calls.values())
    if not total:
        return {}
    parts = {name: amount * count // total for name, count in calls.items()}
    left = amount - sum(parts.values())
    for name in list(parts)[:left]:
        parts[name] += 1
    return parts


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


Tell = Callable[[str, Mapping[str, Any]], Awaitable[None]]


async def report(run: Run, outcome: Outcome, metrics: Metrics, tell: Tell) -> None:
    """Count a failed run, log it, and call the service's handlers; a handler that raises is logged."""
    if outcome.failed is None:
        return
    _, name, why = outcome.failed
    event = f"recalculation_{outcome.called}"
    log.error(
        "%s, key %r: %s: %s", run.function.name, run.claim.key, name, why, exc_info=outcome.cause if outcome.called == "failed" else None
    )
    metrics.record(Happened(event, {"task": run.function.name}))
    facts = {"function": run.function.name, "key": run.claim.key, "error": name, "why": why, "seconds": run.seconds}
    try:
        await tell(event, facts)
    except Exception:
        log.exception("a handler of %r failed", event)
