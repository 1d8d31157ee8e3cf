"""``inventory.redistribution``: the coalesced functions and triggers of an Inventory, and what runs for them in each event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from inventory_sdk.beside import Ground, Job
from inventory_sdk.ending import end
from inventory_sdk.errors import InventoryError, NotStarted, RecalculationFailed
from inventory_sdk.metrics.events import RecalculationsDue, Retried
from inventory_sdk.redistribute.asking import FAULTS, Requests, Waiting
from inventory_sdk.redistribute.board import Board, Counts
from inventory_sdk.redistribute.budget import Budget
from inventory_sdk.redistribute.coalesced import DIRECT, Coalesced, here
from inventory_sdk.redistribute.cpu import CpuWatch
from inventory_sdk.redistribute.governor import Governor, Slowable
from inventory_sdk.redistribute.policy import RedistributionPolicy
from inventory_sdk.redistribute.runner import Desk, Runner
from inventory_sdk.redistribute.triggers import TriggerCount

PATIENCE: Final = 5.0
"""Seconds that a caller waits for Redis to write down its request; the request itself is tried for longer."""
FIRST_LOOK: Final = 0.03
LAST_LOOK: Final = 0.5
"""Seconds between looks for outcomes of other processes: the first, and the longest."""
REFRESH: Final = 2.0
"""Seconds after which the counts of all processes are read again."""


class Redistribution:
    """Coalesced functions, their triggers, and the CPU governor. Its runs, slots and budgets belong to the event loop it was started in.

    ``runs_here``: set it to False before the start in a process that shall ask and never run (a web server, where workers run).
    """

    def __init__(self, policy: RedistributionPolicy | None, lanes: Slowable) -> None:
        self.policy = policy or RedistributionPolicy()
        self.runs_here = True
        self._lanes = lanes
        self._functions: dict[str, Coalesced] = {}
        self._triggers: dict[tuple[str, str], str] = {}
        self._here: dict[asyncio.AbstractEventLoop, list[Here]] = {}  # asked at every trigger: a weak one costs ten times as much

    def add(self, function: Coalesced) -> None:
        """Register; ``TypeError`` if another function has the name."""
        known = self._functions.setdefault(function.name, function)
        if known.site.function is not function.site.function and known.site.label != function.site.label:
            raise TypeError(f"name={function.name!r} of {function.site.label} is taken by {known.site.label}")
        self._functions[function.name] = function

    def add_trigger(self, name: str, function: Coalesced, place: str) -> None:
        """Register; ``TypeError`` if the trigger is somewhere else already: a name is one place."""
        known = self._triggers.setdefault((name, function.name), place)
        if known != place:
            raise TypeError(f"trigger {name!r} of {function.name} at {place} is at {known} already; each place has a name of its own")

    def triggers(self) -> list[TriggerCount]:
        """What each trigger did, in all processes, the dearest first: as it was read at most a few seconds ago, and zeros before
        the first time. ``counted`` reads now."""
        started = self._started()
        found = dict.fromkeys(self._triggers, Counts()) | (started.counts if started is not None else {})
        listed = [
            TriggerCount(name, function, self._place(name, function), counts.calls, counts.runs, counts.cpu_us / 1e6)
            for (name, function), counts in found.items()
        ]
        return sorted(listed, key=lambda each: (-each.cpu_seconds, -each.calls, each.function, each.name))

    async def counted(self) -> list[TriggerCount]:
        """As ``triggers``, read now. Redis' errors come through."""
        await self._now().count()
        return self.triggers()

    @property
    def governor(self) -> Governor:
        """The governor of this event loop; ``governor.state()`` says how things stand."""
        return self._now().governor

    # What the aspects ask ------------------------------------------------------------------------------------------------------

    def asking(self, function: Coalesced) -> Requests:
        """Where its requests go; ``NotStarted`` where nothing could be asked for."""
        return self._now().desk(function).requests

    async def call(self, function: Coalesced, key: str, arguments: str) -> Any:
        """The result of a run that started after this call. ``RecalculationFailed`` is what it failed of, also where Redis did not
        take the request in time: then there may be a run all the same."""
        now = self._now()
        desk = now.desk(function)
        while True:
            asked = desk.requests.add(key, arguments, DIRECT, wanted=True)
            await asyncio.wait({asked}, timeout=PATIENCE)
            if not asked.done():
                why = f"Redis did not take the request within {PATIENCE:g} s; it is still being tried"
                raise RecalculationFailed(function.name, key, "TimeoutError", why)
            waiter = desk.waiting.add(key, asked.result())
            now.somebody_waits()
            try:
                outcome = await waiter
            finally:
                desk.waiting.drop(key, waiter)
            if outcome is not None:
                return outcome.answer(function.name, key)

    # Life ------------------------------------------------------------------------------------------------------------------------

    async def start(self, ground: Ground) -> None:
        """See ``Beside``. Without a coalesced function nothing is started."""
        for other in [other for other in self._here if other.is_closed()]:
            del self._here[other]  # it was not left in an orderly way
        started = Here(self, ground)
        self._here.setdefault(asyncio.get_running_loop(), []).append(started)
        started.begin()

    async def close(self) -> None:
        """See ``Beside``: what runs is given back, what was asked for is written down."""
        loop = asyncio.get_running_loop()
        stack = self._here[loop]
        try:
            await stack[-1].close()
        finally:
            stack.pop()
            if not stack:
                del self._here[loop]

    def jobs(self, ground: Ground) -> Sequence[Job]:
        """None: whoever has the functions runs them, a worker's process too."""
        return ()

    def _now(self) -> Here:
        started = self._started()
        if started is None:
            raise NotStarted
        return started

    def _started(self) -> Here | None:
        try:
            stack = self._here.get(asyncio.get_running_loop())
        except RuntimeError:  # no event loop: nothing was started in it
            return None
        return stack[-1] if stack else None

    def _place(self, name: str, function: str) -> str:
        if name == DIRECT:
            return self._functions[function].site.label if function in self._functions else ""
        return self._triggers.get((name, function), "")


class Here:
    """One start in one event loop."""

    def __init__(self, owner: Redistribution, ground: Ground) -> None:
        self._owner = owner
        self._ground = ground
        self.desks: dict[str, Desk] = {}
        self.governor = Governor(owner.policy, owner._lanes, CpuWatch(), ground.metrics)
        self._runner = Runner(self.desks, owner.policy, self.governor, ground.metrics, ground.tell, ground.failed)
        self.counts: dict[tuple[str, str], Counts] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._waits = asyncio.Event()
        self._begun = False

    def begin(self) -> None:
        """Desks for all functions; tasks once there is one."""
        for function in self._owner._functions.values():
            self.desk(function)

    def desk(self, function: Coalesced) -> Desk:
        """The function's desk; one that was decorated after the start gets it now."""
        desk = self.desks.get(function.name)
        if desk is None:
            ground, share = self._ground, function.options.cpu_budget
            board = Board(ground.client, ground.namespace, function.name)
            desk = self.desks[function.name] = Desk(
                function,
                board,
                Requests(function, board, ground.metrics, self._runner.due, ground.failed),
                Waiting(function, board),
                None if share is None else Budget(share * self.governor.cpus),
            )
            self._begin()
        return desk

    async def count(self) -> None:
        """Read the counts of all processes."""
        for desk in list(self.desks.values()):
            for trigger, counts in (await desk.board.counted()).items():
                self.counts[trigger, desk.function.name] = counts

    async def tell_due(self) -> None:
        """Say what waits although it is due, whoever's it is to run."""
        for desk in list(self.desks.values()):
            self._ground.metrics.record(RecalculationsDue(desk.function.name, *await desk.board.overdue()))

    def somebody_waits(self) -> None:
        """Outcomes of other processes are looked for from now on."""
        self._waits.set()

    async def close(self) -> None:
        """End all of it."""
        await end(self._tasks)
        await self._runner.close()
        failures = []
        for desk in self.desks.values():
            try:
                await desk.requests.close()
            except InventoryError as error:
                failures.append(error)
            desk.waiting.close()
        if failures:
            raise failures[0]

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        for work in (self.governor.run(), self._look(), self._refresh()):
            task = asyncio.create_task(work, name="inventory redistribution")
            task.add_done_callback(self._died)
            self._tasks.append(task)
        if self._owner.runs_here and not here.calculates:
            self._runner.start()

    def _died(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._ground.failed(error)

    async def _look(self) -> None:
        """Ask after runs of other processes while somebody here waits for one."""
        wait = FIRST_LOOK
        while True:
            if not any(desk.waiting.awaited for desk in self.desks.values()):
                await self._waits.wait()
            if self._waits.is_set():
                self._waits.clear()
                wait = FIRST_LOOK
            await asyncio.sleep(wait)
            wait = min(wait * 1.5, LAST_LOOK)
            for desk in list(self.desks.values()):
                keys = [key for key in desk.waiting.awaited if not self._runner.runs_here(desk.function.name, key)]
                if keys:
                    try:
                        await desk.waiting.ask(keys)
                    except FAULTS as error:
                        self._ground.metrics.record(Retried("redistribution", type(error).__name__))

    async def _refresh(self) -> None:
        """Keep the triggers' counts fresh, and tell what is overdue."""
        while True:
            try:
                await self.count()
                await self.tell_due()
            except FAULTS as error:
                self._ground.metrics.record(Retried("redistribution", type(error).__name__))
            await asyncio.sleep(REFRESH)
