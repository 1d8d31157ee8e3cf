"""A selling process: ``python -m tests.faults.caller PLAN.json``. It writes down what it asks before it asks, and what it was
told before it asks again, each line on disk at once: a SIGKILL takes away what it might have learnt, not what it knew.

A line is a JSON object: {"id", "said": "asked", "kind", "merchant", "lines", "of", "level"}, later {"id", "said": "acked",
"at": [[partition, epoch, sequence], …]}, or "said": "refused" (nothing moved), "unknown" (it may stand), "weaker" (it stands,
below its level), "raw" (an error from outside the SDK's tree: always a defect), with "error".
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from inventory_sdk import DurabilityNotReached, InventoryError, Line, OutcomeUnknown, Receipt
from inventory_sdk.errors import NotStarted, Overloaded

log = logging.getLogger(__name__)

Ask = Callable[[], Awaitable[Receipt]]


class Book:
    """What this process asked and was told."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, operation_id: str, said: str, **more: Any) -> None:
        os.write(self._file, json.dumps({"id": operation_id, "said": said, **more, "t": round(time.time(), 3)}).encode() + b"\n")
        os.fdatasync(self._file)


class Caller:
    """``plan``: name, book, seed, sellers, merchants, levels, acts (kind → weight), skus (sku → most units in one line)."""

    def __init__(self, inventory: Any, plan: dict[str, Any], stopping: asyncio.Event) -> None:
        self._stock = inventory.stock
        self._plan = plan
        self._book = Book(Path(plan["book"]))
        self._random = random.Random(plan["seed"])
        self._numbers = count(1)
        self._stopping = stopping

    async def sell(self) -> None:
        """One seller: an act after the other, until told to stop."""
        plan, chance = self._plan, self._random
        acts = plan["acts"]
        while not self._stopping.is_set():
            merchant, level = chance.choice(plan["merchants"]), chance.choice(plan["levels"])
            kind = chance.choices(list(acts), list(acts.values()))[0]
            name = f"{plan['name']}-{next(self._numbers)}"
            chosen = chance.sample(sorted(plan["skus"]), min(len(plan["skus"]), chance.choice((1, 1, 1, 2))))
            lines = {sku: chance.randint(1, plan["skus"][sku]) for sku in chosen}
            await self._act(kind, name, merchant, lines, level)
            await asyncio.sleep(chance.uniform(0, 0.01))

    async def _act(self, kind: str, name: str, merchant: str, lines: dict[str, int], level: str) -> None:
        stock = self._stock
        parts = [Line(sku, quantity) for sku, quantity in lines.items()]
        common: dict[str, Any] = {"merchant": merchant, "operation_id": name}
        asks: dict[str, Ask] = {
            "deduct": lambda: stock.deduct(parts, durability=level, **common),
            "reserve": lambda: stock.reserve(parts, ttl=600, durability=level, **common),
            "brief": lambda: stock.reserve(parts, ttl=1, durability=level, **common),
            "restock": lambda: stock.restock(parts, **common),
        }
        plain = "reserve" if kind == "brief" else kind
        stands = await self._insist(asks[kind], name, kind=plain, merchant=merchant, lines=lines, level=level)
        if not stands or kind != "reserve":
            return
        end = self._random.choice(("confirm", "confirm", "release", "leave"))
        if end == "leave":
            return
        closing = {"merchant": merchant, "operation_id": f"{name}-end", "durability": level}
        act = stock.confirm if end == "confirm" else stock.release
        await self._insist(
            lambda: act(name, **closing), f"{name}-end", kind=end, merchant=merchant, lines=lines, level=level, of=name
        )  # fmt: skip

    async def _insist(self, ask: Ask, name: str, **asked: Any) -> bool:
        """Ask; where the outcome is not clear sometimes ask again under the same id; whether it stands for sure."""
        self._book.write(name, "asked", **asked)
        for _ in range(6):
            try:
                receipt = await ask()
            except OutcomeUnknown as error:
                self._book.write(name, "unknown", error=str(error))
            except DurabilityNotReached as error:
                self._book.write(name, "weaker", error=str(error))
            except NotStarted:
                raise
            except Overloaded as error:
                self._book.write(name, "refused", error=repr(error))
                await asyncio.sleep(min(error.retry_after, 0.2))
            except InventoryError as error:
                self._book.write(name, "refused", error=repr(error))
                return False
            except Exception as error:  # noqa: BLE001 - what a caller of the SDK should never see is what this looks for
                self._book.write(name, "raw", error=f"{type(error).__module__}.{type(error).__name__}: {error}")
            else:
                at = [[each.partition, each.epoch, each.sequence] for each in receipt.positions]
                self._book.write(name, "acked", at=at, replayed=receipt.replayed)
                return True
            if self._stopping.is_set() or self._random.random() < 0.3:
                return False
        return False


async def main(plan: dict[str, Any]) -> None:
    from tests.faults.shop import inventory

    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    while not stopping.is_set():
        try:
            await inventory.start()
            break
        except Exception:  # a server is away just now; a service would be started again
            log.warning("%s can't start yet", plan["name"], exc_info=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await stopping.wait()
    else:
        return
    caller = Caller(inventory, plan, stopping)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(plan["sellers"]):
                group.create_task(caller.sell())
    finally:
        await inventory.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
