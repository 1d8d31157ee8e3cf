"""What durability ``replica`` costs: one hot SKU at ``redis`` and at ``replica``, in turns, on a primary and a replica of its own.

    python -m benchmarks.replica [--callers 256] [--seconds 5]

The last line is one JSON object. Needs the redis-server program; the servers are removed afterwards.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

from benchmarks.load import put
from benchmarks.options import parse
from inventory_sdk import Inventory, Line
from tests.servers_kit import redis_with_replica

WARM_UP = 1.0
ROUNDS = 3
UNITS = 10_000_000


def selling(inventory: Inventory, durability: Any) -> Callable[[], Awaitable[object]]:
    numbers, lines = count(), [Line("hot", 1)]

    async def sell() -> object:
        return await inventory.stock.deduct(lines, operation_id=f"{durability}-{next(numbers)}", durability=durability)

    return sell


async def main() -> None:
    options = parse(__doc__, "256")
    result: dict[str, Any] = {}
    with redis_with_replica() as (primary, _), tempfile.TemporaryDirectory() as folder:
        database = f"sqlite+aiosqlite:///{folder}/stock.db"
        async with Inventory(primary.url, database=database, metrics=[]) as inventory:
            await inventory.create_schema()
            await inventory.stock.restock([Line("hot", UNITS)], operation_id="po")
            for callers in options.callers:
                rounds: dict[str, list[dict[str, Any]]] = {"redis": [], "replica": []}
                calls = {name: selling(inventory, name) for name in rounds}
                for _ in range(ROUNDS):
                    for name, figures in rounds.items():
                        await put(calls[name], callers, WARM_UP)
                        load = await put(calls[name], callers, options.seconds)
                        figures.append(load.figures())
                for name, figures in rounds.items():
                    # The best of its turns: neighbours on the machine only ever take away.
                    result.setdefault(name, {})[str(callers)] = max(figures, key=lambda each: each["tps"])
    print(json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main())
