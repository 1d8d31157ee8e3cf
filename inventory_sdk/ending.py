"""Ending background tasks that talk to Redis, for sure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

AGAIN: Final = 0.5
"""Seconds after which a task that goes on is cancelled once more."""


async def end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel them until they have ended. Once may not do: ``asyncio.wait_for`` of Python 3.11, which Redis clients use, loses a
    cancellation that comes in the same turn as the reply, and a task that loops would go on for ever."""
    going = {task for task in tasks if not task.done()}
    while going:
        for task in going:
            task.cancel()
        _, going = await asyncio.wait(going, timeout=AGAIN)
