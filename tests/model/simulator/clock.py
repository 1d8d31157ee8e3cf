"""Time that passes only when everybody waits: an event loop on a virtual clock, and a process-wide disguise for clocks and chance.

Ready callbacks run in asyncio's own order (first come, first served: code may rely on it). What comes first is decided by the
delays of the doubles, and those come from the seed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from asyncio import base_events
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, Final
from unittest import mock

BEGIN: Final = 1_000.0
"""Monotonic seconds at the start; code that compares with 0 must not see a clock that has just begun."""
EPOCH: Final = 1_800_000_000.0
"""Unix seconds at the monotonic zero."""
MOST_STEPS: Final = 3_000_000

home: ContextVar[Any] = ContextVar("home", default=None)
"""The simulated process that a task belongs to; children inherit it."""


class Stalled(Exception):
    """Nothing is ready and nothing is scheduled: somebody waits for ever. Or the loop turns without an end."""


class SimTask(asyncio.Task):  # type: ignore[type-arg]
    """Hashes by number instead of by address, so that sets of tasks have the same order in every run."""

    def __init__(self, number: int, coro: Any, **options: Any) -> None:
        self.number = number
        context = options.get("context")
        self.process = home.get() if context is None else context.get(home)
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class SimFuture(asyncio.Future):  # type: ignore[type-arg]
    """As ``SimTask``."""

    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self.number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class VirtualLoop(base_events.BaseEventLoop):
    """An event loop without sockets, threads or waiting."""

    def __init__(self) -> None:
        super().__init__()
        self._now = BEGIN
        self._selector = self
        self._numbers = itertools.count()
        self.steps = 0
        self.living: dict[SimTask, None] = {}
        self.complaints: list[dict[str, Any]] = []
        self.set_task_factory(self._make_task)
        self.set_exception_handler(lambda _, context: self.complaints.append(context))

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> tuple[()]:
        """The selector's part: instead of waiting, it is later."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise Stalled(f"still busy after {MOST_STEPS} turns of the loop")
        if timeout is None:
            raise Stalled("nothing is scheduled and nobody can go on")
        if timeout > 0:
            self._now = max(self._now, self._scheduled[0]._when)  # type: ignore[attr-defined]
        return ()

    def _process_events(self, events: Any) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody sleeps."""

    def call_soon(self, callback: Any, *args: Any, context: Any = None) -> Any:
        handle = super().call_soon(callback, *args, context=context)
        if context is not None:
            process = context.get(home)
            if process is not None and process.dead:
                handle.cancel()
        return handle

    def freeze(self, process: Any) -> None:
        """Nothing of this (dead) process runs any more: a killed process has no ``finally``."""
        for handle in (*self._ready, *self._scheduled):  # type: ignore[attr-defined]
            if handle._context.get(home) is process:
                handle.cancel()

    def create_future(self) -> Any:
        return SimFuture(next(self._numbers), self)

    def _make_task(self, loop: Any, coro: Any, **options: Any) -> SimTask:
        task = SimTask(next(self._numbers), coro, loop=loop, **options)
        self.living[task] = None
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: Any) -> None:
        self.living.pop(task, None)

    def begin(self, process: Any, work: Any, name: str) -> SimTask:
        """A task of this process."""
        context = copy_context()
        context.run(home.set, process)
        task: Any = self.create_task(work, name=name, context=context)
        return task  # type: ignore[no-any-return]


@contextmanager
def disguised(loop: VirtualLoop, seed: int) -> Iterator[None]:
    """Every clock shows the loop's time and every chance comes from the seed, in this thread's whole process."""
    chance = random.Random(seed ^ 0x5EED)

    def now() -> float:
        return loop._now

    def random_bytes(count: int) -> bytes:
        return chance.randbytes(count)

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (time, "monotonic", now),
        (time, "perf_counter", now),
        (time, "time", lambda: EPOCH + loop._now),
        (time, "time_ns", lambda: int((EPOCH + loop._now) * 1e9)),
        (os, "urandom", random_bytes),
        (random, "_urandom", random_bytes),
    ]
    state = random.getstate()
    random.seed(seed)
    with _all_replaced(replaced):
        try:
            yield
        finally:
            random.setstate(state)


@contextmanager
def _all_replaced(replaced: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """All of these attributes replaced for the duration."""
    patches = [mock.patch.object(owner, name, value) for owner, name, value in replaced]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
