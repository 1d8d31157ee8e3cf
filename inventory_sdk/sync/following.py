"""Behind the ledger: the parts of calls over several partitions follow what their home's journal says.

Their callers' processes let them follow at once; this is for callers that died. What is missed here (the worker died as well) is
found by the parts' own clocks.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from inventory_sdk.model import JournalEntry, Kind
from inventory_sdk.stock.parts import part_key
from inventory_sdk.sync.backoff import waited
from inventory_sdk.sync.parts import Parts, log

AT_ONCE: Final = 8
TRIES: Final = 4
MOST: Final = 10_000
"""Parts that wait to follow; what comes beyond is left to their clocks."""


class Followed(NamedTuple):
    """One part of an applied entry. ``mark``: its position, "" where the entry only closed some of it."""

    partition: int
    key: str
    mark: str


def followed(entry: JournalEntry) -> list[Followed]:
    """The parts that an entry of home speaks of."""
    found: list[Followed] = []
    for operation in entry.operations:
        if not operation.extra or '"parts":' not in operation.extra:
            continue
        call = operation.key if operation.kind in (Kind.RESERVE, Kind.DEDUCT, Kind.ADJUST) else operation.reference
        found += [Followed(part[0], part_key(call, part[0]), part[1]) for part in json.loads(operation.extra)["parts"]]
    return found


class Following:
    """One worker's. ``applied`` notes what has to follow, ``run`` sees to it."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._waiting: deque[Followed] = deque()
        self.due = asyncio.Event()

    def applied(self, entries: Sequence[JournalEntry]) -> None:
        """The ledger has these; returns at once."""
        for entry in entries:
            for each in followed(entry):
                if len(self._waiting) >= MOST:
                    self._parts.happened("part_waits", partition=each.partition)
                    continue
                self._waiting.append(each)
                self.due.set()

    async def run(self) -> None:
        """Until the worker stops."""
        stopping = self._parts.stopping
        while not stopping.is_set():
            await self.due.wait()
            self.due.clear()
            while self._waiting and not stopping.is_set():
                batch = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
                await asyncio.gather(*[self._follow(each) for each in batch])

    async def _follow(self, part: Followed) -> None:
        parts = self._parts
        backoff = parts.backoff()
        while True:
            try:
                if await parts.stock_side.resolve_part(part.partition, part.key, part.mark):
                    return
            except Exception as error:  # noqa: BLE001 - Redis or database is away: tried again, then left to the part's clock
                parts.retried("follow", error, backoff.attempts + 1)
            delay = backoff.delay()
            if backoff.attempts >= TRIES or await waited(parts.stopping, delay):
                log.info("part %r has not followed yet; it is looked at again when it is overdue", part.key)
                parts.happened("part_waits", partition=part.partition)
                return
