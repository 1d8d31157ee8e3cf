"""Ending background tasks that talk to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

SAID_AGAIN: Final = 0.1


async def ended(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel them and wait until they have ended. Said again where a client has taken the cancellation for its own time-out: seen
    with redis-py's, and then whoever waits for the task waits for ever."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=SAID_AGAIN)
