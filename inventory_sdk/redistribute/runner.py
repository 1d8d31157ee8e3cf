"""The runner of one event loop: takes what is due, keeps its leases, and gives back what it does not finish.

Whoever has a function runs it. A key that was asked for is in the sorted set of due keys until a run has answered it; while a runner
has it, it is due when the lease ends. So the death of a runner needs no notice: its keys simply come due.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

from inventory_sdk.ending import end
from inventory_sdk.metrics import Happened, Metrics
from inventory_sdk.metrics.events import Recalculated, Retried
from inventory_sdk.redistribute.asking import FAULTS, Requests, Waiting
from inventory_sdk.redistribute.board import Board, Claim
from inventory_sdk.redistribute.budget import Budget
from inventory_sdk.redistribute.coalesced import Coalesced
from inventory_sdk.redistribute.governor import Governor
from inventory_sdk.redistribute.outcome import Outcome
from inventory_sdk.redistribute.policy import RedistributionPolicy
from inventory_sdk.redistribute.pool import Pool
from inventory_sdk.redistribute.runs import Run, Tell, report

log = logging.getLogger("inventory_sdk.redistribute")

POLL: Final = 0.5
"""Seconds after which a runner looks for what other processes asked for, or left behind."""
RETRY: Final = 0.2
"""Seconds after a fault of Redis."""
LONGEST_REST: Final = 30.0
"""Seconds that a slot rests at the most, when redistribution is slowed."""
LOOK: Final = 0.25
"""Seconds after which a resting slot sees whether it still has to."""


@dataclass
class Desk:
    """One function in this event loop."""

    function: Coalesced
    board: Board
    requests: Requests
    waiting: Waiting
    budget: Budget | None


class Runner:
    """See above. ``desks`` may grow while it runs."""

    def __init__(
        self,
        desks: Mapping[str, Desk],
        policy: RedistributionPolicy,
        governor: Governor,
        metrics: Metrics,
        tell: Tell,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._desks = desks
        self._policy = policy
        self._governor = governor
        self._metrics = metrics
        self._tell = tell
        self._failed = failed
        self._pool = Pool(policy.nice)
        self._budget = None if policy.cpu_budget is None else Budget(policy.cpu_budget * governor.cpus)
        self._concurrency = policy.concurrency(governor.cpus)
        self._slots = 0
        self._runs: set[Run] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._next = 0.0
        self._turn = 0
        self._loops: list[asyncio.Task[None]] = []
        self._closing = False

    def start(self) -> None:
        """Begin to take what is due."""
        for name, work in (("claims", self._claim_all()), ("leases", self._renew_all())):
            self._loops.append(self._watched(work, f"inventory redistribution {name}"))

    def due(self, seconds: float) -> None:
        """A key will be due then."""
        at = time.monotonic() + seconds
        if at < self._next:
            self._next = at
            self._wake.set()

    def runs_here(self, function: str, key: str) -> bool:
        """Its outcome comes from here."""
        return any(run.claim.key == key and run.function.name == function for run in self._runs)

    async def close(self) -> None:
        """Give back what is running, for others to run at once."""
        self._closing = True
        await end(self._loops)  # first, so that nothing new begins
        await end(self._running)
        await self._pool.close()

    def _watched(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._died)
        return task

    def _died(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s died", task.get_name(), exc_info=error)
            self._metrics.record(Happened("task_died", {"task": task.get_name()}))
            self._failed(error)

    # Claims ----------------------------------------------------------------------------------------------------------------------

    async def _claim_all(self) -> None:
        while True:
            self._next = time.monotonic() + POLL
            self._wake.clear()
            try:
                await self._claim()
            except FAULTS as error:
                self._metrics.record(Retried("redistribution", type(error).__name__))
                await asyncio.sleep(RETRY)
            while (wait := self._next - time.monotonic()) > 0:
                try:
                    async with asyncio.timeout(wait):
                        await self._wake.wait()
                except TimeoutError:
                    break
                self._wake.clear()

    async def _claim(self) -> None:
        """Fill the free slots, one function after the other, another one first each time."""
        desks = list(self._desks.values())
        self._turn += 1
        for number in range(len(desks)):
            desk = desks[(number + self._turn) % len(desks)]
            owed = max(budget.wait() if budget else 0.0 for budget in (desk.budget, self._budget))
            free = self._allowed() - self._slots
            if owed > 0:
                self.due(owed)
                continue
            if free <= 0:
                return  # the end of a run, or of a slot's rest, wakes us
            keys, later = await desk.board.peek(free)
            if later is not None:
                self.due(later)
            if keys:
                asked = time.monotonic()
                claims = await desk.board.claim(keys, self._policy.lease)
                for claim in claims:
                    self._begin(desk, claim, asked + self._policy.lease)

    def _allowed(self) -> int:
        return max(1, round(self._concurrency * self._governor.share))

    def _begin(self, desk: Desk, claim: Claim, kept: float) -> None:
        if claim.taken_over:
            log.warning("%s, key %r: its runner is gone, it is run anew", desk.function.name, claim.key)
            self._metrics.record(Happened("recalculation_taken_over", {"task": desk.function.name}))
        run = Run(desk.function, desk.board, claim, kept)
        self._runs.add(run)
        self._slots += 1
        task = self._watched(self._run(desk, run), f"inventory redistribution of {desk.function.name}")
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    # Runs ------------------------------------------------------------------------------------------------------------------------

    async def _run(self, desk: Desk, run: Run) -> None:
        try:
            try:
                ended = await self._calculated(desk, run)
            except asyncio.CancelledError:
                # Where it was written down already, there is nothing to give back, and the fence says so.
                await self._give_back(run)
                self._count(run, "given_back")
                raise
            self._runs.discard(run)
            if ended is not None:
                await report(run, ended, self._metrics, self._tell)
            await self._rest(run.meter.cpu_seconds)
        finally:
            self._runs.discard(run)
            self._slots -= 1
            self.due(0.0)

    async def _calculated(self, desk: Desk, run: Run) -> Outcome | None:
        """The outcome, which all who wait here have; None where the key was lost to somebody else."""
        try:
            outcome = await run.calculate(self._pool, self._metrics)
        finally:
            self._charge(desk, run)
        outcome, text = run.written(outcome)
        if not await self._finish(desk, run, text):
            self._count(run, "lost")
            return None
        desk.waiting.answer(run.claim.key, run.claim.version, outcome)
        self._count(run, outcome.called)
        return outcome

    def _charge(self, desk: Desk, run: Run) -> None:
        for budget in (desk.budget, self._budget):
            if budget is not None:
                budget.charge(run.meter.cpu_seconds)

    async def _finish(self, desk: Desk, run: Run, text: str) -> bool:
        """Write down that it was done, until Redis has it or the key is somebody else's."""
        options = desk.function.options
        rest = run.rest(self._governor.cpus)
        while not run.lost:
            try:
                ours, due = await desk.board.finish(run.claim, text, options.debounce, options.max_wait, rest, run.charges())
            except FAULTS as error:
                self._metrics.record(Retried("redistribution", type(error).__name__))
                await asyncio.sleep(RETRY)
                continue
            if due is not None:
                self.due(due)
            return ours
        return False

    async def _give_back(self, run: Run) -> None:
        try:
            await run.board.give_back(run.claim)
        except FAULTS as error:
            # Its lease ends by itself.
            log.warning("%s, key %r was not given back: %r", run.function.name, run.claim.key, error)
            self._metrics.record(Retried("redistribution", type(error).__name__))

    async def _rest(self, seconds: float) -> None:
        """After so much CPU time a slot rests for as long as makes its share of the time what the governor says."""
        began = time.monotonic()
        while not self._closing:
            rest = min(LONGEST_REST, seconds * (1 / self._governor.share - 1)) - (time.monotonic() - began)
            if rest <= 0:
                return
            await asyncio.sleep(min(rest, LOOK))

    def _count(self, run: Run, outcome: str) -> None:
        claim = run.claim
        calls = sum(claim.calls.values())
        self._metrics.record(Recalculated(run.function.name, outcome, run.seconds, run.meter.cpu_seconds, calls, claim.waited))

    # Leases ----------------------------------------------------------------------------------------------------------------------

    async def _renew_all(self) -> None:
        lease = self._policy.lease
        while True:
            await asyncio.sleep(lease / 4)
            by_board: dict[Board, list[Run]] = {}
            for run in self._runs:
                by_board.setdefault(run.board, []).append(run)
            for board, runs in by_board.items():
                await self._renew(board, runs)

    async def _renew(self, board: Board, runs: list[Run]) -> None:
        lease = self._policy.lease
        asked = time.monotonic()
        try:
            async with asyncio.timeout(lease / 8):
                kept = await board.renew([run.claim for run in runs], lease)
        except FAULTS as error:
            self._metrics.record(Retried("redistribution", type(error).__name__))
            kept = [run.kept - time.monotonic() > lease / 4 for run in runs]
        else:
            for run in runs:
                run.kept = asked + lease
        for run, still in zip(runs, kept, strict=True):
            if not still and run in self._runs and not run.lost:
                log.error("%s, key %r: its lease is lost, the run is given up", run.function.name, run.claim.key)
                self._metrics.record(Happened("recalculation_lease_lost", {"task": run.function.name}))
                run.lose()
