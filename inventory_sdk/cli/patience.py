"""Calls that are worth repeating with the same operation id: refused at the door, or the reply was lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from inventory_sdk.errors import DurabilityNotReached, OutcomeUnknown, Overloaded

T = TypeVar("T")

LONGEST: Final = 120.0
"""Seconds after which the last error goes to the caller."""
FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 2.0


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """The call's result; repeats it while the SDK says that this is safe, for up to ``LONGEST`` seconds.

    A plain loop: it stands around every call of the demo, and a retry library would be a good part of what the demo measures.
    """
    give_up = time.monotonic() + LONGEST
    pause = FIRST_PAUSE
    while True:
        try:
            return await call()
        except (Overloaded, OutcomeUnknown, DurabilityNotReached) as error:
            if time.monotonic() > give_up:
                raise
            await asyncio.sleep(error.retry_after if isinstance(error, Overloaded) else pause)
            pause = min(pause * 2, LONGEST_PAUSE)
