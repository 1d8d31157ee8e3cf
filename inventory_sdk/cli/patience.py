"""Calls that are worth repeating with the same operation id: refused at the door, or the reply was lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import stamina

from inventory_sdk.errors import DurabilityNotReached, OutcomeUnknown, Overloaded

T = TypeVar("T")

LONGEST: Final = 120.0
"""Seconds after which the last error goes to the caller."""


def _worth_repeating(error: Exception) -> bool | float:
    if isinstance(error, Overloaded):
        return error.retry_after
    return isinstance(error, OutcomeUnknown | DurabilityNotReached)


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """The call's result; repeats it while the SDK says that this is safe, for up to ``LONGEST`` seconds."""
    async for attempt in stamina.retry_context(on=_worth_repeating, attempts=None, timeout=LONGEST):
        with attempt:
            return await call()
    raise AssertionError("stamina ends with a result or an error")
