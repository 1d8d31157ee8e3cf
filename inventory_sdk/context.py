"""What a request carries along: its merchant, its lane and deadline, and the operation id of its Idempotency-Key. Set by
middleware and decorators, read by the stock calls and by whatever the service calls further on."""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from typing import Any, Final

from inventory_sdk.errors import InvalidOperation

DEFAULT_LANE: Final = "default"
"""Where a call runs that no decorator and no middleware gave a lane: without limits, with batches of its own."""

merchant: Final[ContextVar[str | None]] = ContextVar("inventory_merchant", default=None)
lane: Final[ContextVar[str]] = ContextVar("inventory_lane", default=DEFAULT_LANE)


class Scope:
    """A stretch of time that a call was given, inherited by what it calls.

    ``at``: when it is over (monotonic seconds), the tightest of its own and what it inherited; infinity: never. ``timeout``: the
    seconds from its start until then. ``task``: the task that is cancelled then, by this scope's timer or an outer one's; None
    where nobody does that (any more). ``live`` ends with the call: a task that outlives it is no longer bound by it. ``serves``:
    the lanes that this process serves (with where others are), None: all.
    """

    __slots__ = ("at", "live", "parent", "serves", "task", "timeout")

    def __init__(self, at: float, timeout: float, task: asyncio.Task[Any] | None, parent: Scope | None) -> None:
        self.at = at
        self.timeout = timeout
        self.task = task
        self.parent = parent
        self.live = True
        self.serves: Serves | None = None if parent is None else parent.serves


class Serves:
    """The lanes that a deployment serves, and where it says that others are."""

    __slots__ = ("elsewhere", "lanes")

    def __init__(self, lanes: frozenset[str], elsewhere: dict[str, str]) -> None:
        self.lanes = lanes
        self.elsewhere = elsewhere


scope: Final[ContextVar[Scope | None]] = ContextVar("inventory_scope", default=None)


def living() -> Scope | None:
    """The innermost scope whose call has not ended."""
    found = scope.get()
    while found is not None and not found.live:
        found = found.parent
    return found


def remaining() -> float | None:
    """Seconds that this call still has, to be handed on (an HTTP client's time-out); None: nobody limited it. Never negative."""
    found = living()
    return None if found is None or found.at == float("inf") else max(0.0, found.at - time.monotonic())


class OperationName:
    """A request's own operation id (its Idempotency-Key): the id of the one act, per merchant, that names none itself."""

    __slots__ = ("_spent", "header", "name")

    def __init__(self, name: str, header: str) -> None:
        self.name = name
        self.header = header
        self._spent: set[str] = set()

    def spend(self, home: str) -> str:
        """The id. ``InvalidOperation`` for a second act: under the same id it would be answered as a repeat of the first."""
        if home in self._spent:
            why = f"the request's {self.header} names one act of merchant {home!r}, and there was one: give this one an id of its own"
            raise InvalidOperation("operation_id", None, why)
        self._spent.add(home)
        return self.name


operation: Final[ContextVar[OperationName | None]] = ContextVar("inventory_operation", default=None)
