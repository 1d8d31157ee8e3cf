"""Deadlines: who ends a call when its time is up, and how the caller learns it.

The task that runs the call is cancelled and the cancellation becomes ``DeadlineExceeded`` where the time was set, as
``asyncio.timeout`` does it, at a fraction of its price: calls of one lane have the same timeout and so end in the order in which
they came, which takes one timer per lane and not one per call. A call whose inherited deadline is tighter, and is kept by a timer
on the same task, needs none at all.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from contextvars import Token
from types import TracebackType
from typing import Any, Final

from inventory_sdk import context
from inventory_sdk.context import Scope
from inventory_sdk.errors import DeadlineExceeded

RESOLUTION: Final = 0.001
"""Seconds: a timer that fires this much early is not set again for the rest."""


class Timed(Scope):
    """A scope with somebody who ends it. ``leave`` it in any case."""

    __slots__ = ("_cancelling", "_fired", "_handle", "_token", "watched")

    def __init__(self, now: float, timeout: float, parent: Scope | None) -> None:
        task = asyncio.current_task()
        at = now + timeout
        self.watched = True
        if parent is not None and parent.at <= at:
            at = parent.at
            timeout = at - now
            self.watched = parent.task is not task or task is None
        if at == math.inf or task is None:
            # Nobody drives a coroutine without a task but by hand, and then there is nothing to cancel.
            self.watched = False
            task = None
        self.at = at
        self.timeout = timeout
        self.task = task
        self.parent = parent
        self.serves = None if parent is None else parent.serves
        self.live = True
        self._fired = False
        self._cancelling = 0 if task is None else task.cancelling()
        self._handle: asyncio.TimerHandle | None = None
        self._token: Token[Scope | None] | None = None

    def arm(self) -> None:
        """A timer of its own."""
        self._handle = asyncio.get_running_loop().call_later(max(0.0, self.at - time.monotonic()), self.fire)

    def fire(self) -> None:
        """Its time is up."""
        if self.live and self.task is not None:
            self._fired = True
            self.task.cancel()

    def disarm(self) -> None:
        """Let the call go on. What it calls from now on keeps the deadline by timers of its own."""
        self.watched = False
        if self._fired and self.task is not None:
            self._fired = False
            self.task.uncancel()
        self.task = None
        if self._handle is not None:
            self._handle.cancel()

    def ended(self, error: asyncio.CancelledError) -> bool:
        """Was it this deadline that cancelled the task, and nobody else?"""
        task, fired = self.task, self._fired
        self._fired = False
        return fired and task is not None and task.uncancel() <= self._cancelling

    def leave(self) -> None:
        """The call has ended, one way or another."""
        self.live = False
        if self._handle is not None:
            self._handle.cancel()
        if self._fired and self.task is not None:
            # The call swallowed the cancellation, or ended in another way: it is not cancelled any more.
            self._fired = False
            self.task.uncancel()
        if self._token is not None:
            reset(context.scope, self._token)


def reset(variable: Any, token: Token[Any]) -> None:
    """``variable.reset``, for ends that come from anywhere."""
    try:
        variable.reset(token)
    except ValueError:
        # A coroutine that is closed from outside runs its end in another context; the one with our value is gone with it.
        return


class Watch:
    """Ends calls that all have the same timeout, with one timer."""

    __slots__ = ("_calls", "_handle")

    def __init__(self) -> None:
        self._calls: deque[Timed] = deque()
        self._handle: asyncio.TimerHandle | None = None

    def add(self, call: Timed) -> None:
        """``call`` ends after all that were added before."""
        calls = self._calls
        while calls and not calls[0].live:
            calls.popleft()
        calls.append(call)
        if self._handle is None:
            self._set(call)

    def _set(self, call: Timed) -> None:
        delay = max(0.0, call.at - time.monotonic())
        self._handle = asyncio.get_running_loop().call_later(delay, self._sweep)

    def _sweep(self) -> None:
        self._handle = None
        calls = self._calls
        now = time.monotonic() + RESOLUTION
        while calls:
            call = calls[0]
            if call.live and call.watched:
                if call.at > now:
                    self._set(call)
                    return
                call.fire()
            calls.popleft()


class Deadline:
    """``async with``: what is inside has ``seconds``, or less where less was inherited; ``DeadlineExceeded`` then."""

    __slots__ = ("_scope", "_seconds", "serves")

    def __init__(self, seconds: float, serves: context.Serves | None = None) -> None:
        self._seconds = seconds
        self.serves = serves

    async def __aenter__(self) -> Timed:
        now = time.monotonic()
        parent = context.living()
        if parent is not None and parent.at <= now:
            raise DeadlineExceeded(f"the time for this call was up {now - parent.at:.3f} s before it began")
        if self._seconds <= 0:
            raise DeadlineExceeded("the time for this call was up before it began")
        scope = self._scope = Timed(now, self._seconds, parent)
        if self.serves is not None:
            scope.serves = self.serves
        if scope.watched:
            scope.arm()
        scope._token = context.scope.set(scope)
        return scope

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        scope = self._scope
        try:
            if isinstance(error, asyncio.CancelledError) and scope.ended(error):
                raise DeadlineExceeded(f"not done within {scope.timeout:.3f} s") from error
        finally:
            scope.leave()
