"""What a request carries along: its merchant, its lane and deadline, the operation id of its Idempotency-Key, and on which side of
each gray link it is. Set by middleware and decorators, read by the stock calls and by whatever the service calls further on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

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


class Side(NamedTuple):
    """What was decided for one merchant at one gray link, and the version of the rules that said so."""

    variant: str
    version: int


Sides = dict[tuple[str, str], Side]
"""By (link, merchant)."""

sides: Final[ContextVar[Sides | None]] = ContextVar("inventory_sides", default=None)
"""The gray decisions of this request: one dictionary for all that it does; None outside of a request."""

MOST_SIDES: Final = 64
"""Decisions that travel on. Whoever misses one decides by the same rules."""


def packed() -> dict[str, Any] | None:
    """This context for a message, JSON-able: merchant and gray decisions; None where there is nothing to carry."""
    known = sides.get()
    if not known:
        return None
    rows = [[link, of, side.variant, side.version] for (link, of), side in list(known.items())[-MOST_SIDES:]]
    return {"merchant": merchant.get(), "sides": rows}


def unpack(document: Mapping[str, Any] | None) -> None:
    """Take over what ``packed`` made, for the rest of the current task."""
    if document is None:
        sides.set({})
        return
    if document["merchant"] is not None:
        merchant.set(document["merchant"])
    sides.set({(link, of): Side(variant, version) for link, of, variant, version in document["sides"]})
