"""A lane's share of the connections: so many script calls under way at once, over all partitions."""

from __future__ import annotations

import asyncio
from typing import Any

from inventory_sdk.stock.batch import Batcher, Begun


class SharingBatcher(Batcher):
    """A batcher that sends when its lane has a connection to spare; the batches of other partitions go first come, first served."""

    def __init__(self, share: asyncio.Semaphore, *settings: Any) -> None:
        super().__init__(*settings)
        self._share = share

    def _begin(self, item: Any) -> Begun | None:
        return None  # there may be no connection to spare

    async def _send(self, batch: list[Any], begun: Begun | None = None) -> None:
        async with self._share:
            left = [item for item in batch if not item.future.done()]  # who went away meanwhile was not sent
            if left:
                await super()._send(left)
