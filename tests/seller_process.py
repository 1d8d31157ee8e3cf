"""A process that sells one merchant's stock, or hands it over, until it is told to stop: for tests with several of them.

    python -m tests.seller_process sell  <settings JSON> <seed>
    python -m tests.seller_process flip  <settings JSON> <flips>
    python -m tests.seller_process work  <settings JSON>

``sell`` prints one JSON line per acknowledged act; ``flip`` one per flip that is over. Each ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from typing import Any

from inventory_sdk import Inventory, Line
from inventory_sdk.errors import (
    DurabilityNotReached,
    InsufficientStock,
    InvalidOperation,
    OutcomeUnknown,
    Overloaded,
    ReservationClosed,
    ReservationNotFound,
)
from inventory_sdk.stock.handover import Overtaken

MERCHANT = "m1"


def make(settings: dict[str, Any]) -> Inventory:
    return Inventory(metrics=[], merchant=MERCHANT, **settings)


def say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


async def told_to_stop() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()


async def insist(stop: asyncio.Event, call: Any, *arguments: Any, **options: Any) -> Any:
    """The same call until it has an answer; frozen stock and unclear outcomes are asked again under the same id."""
    while True:
        try:
            return await call(*arguments, **options)
        except (Overloaded, OutcomeUnknown) as error:
            if stop.is_set():
                # Nobody may stay half-way: the outcome of this id must be known before the count.
                await asyncio.sleep(0.05)
            await asyncio.sleep(getattr(error, "retry_after", 0.05))


async def sell(inventory: Inventory, dice: random.Random, stop: asyncio.Event) -> None:
    """One seller: deducts, holds that it confirms, releases or leaves to their time, repeats of what it did."""
    stock = inventory.stock
    done: list[tuple[str, str, int]] = []
    number = 0
    while not stop.is_set():
        number += 1
        name = f"{os.getpid()}-{dice.randrange(10**9)}-{number}"
        sku, quantity = dice.choice("ab"), dice.randint(1, 3)
        lines = [Line(sku, quantity)]
        act = dice.choices(("deduct", "confirm", "release", "expire", "repeat", "restock"), (4, 4, 2, 1, 2, 1))[0]
        try:
            if act == "deduct":
                await insist(stop, stock.deduct, lines, operation_id=name)
                say(act="sold", sku=sku, quantity=quantity)
                done.append((name, sku, quantity))
            elif act == "restock":
                await insist(stop, stock.restock, lines, operation_id=name)
                say(act="supplied", sku=sku, quantity=quantity)
            elif act == "repeat" and done:
                name, sku, quantity = dice.choice(done)
                receipt = await insist(stop, stock.deduct, [Line(sku, quantity)], operation_id=name)
                assert receipt.replayed, receipt
            elif act in ("confirm", "release", "expire"):
                await insist(stop, stock.reserve, lines, operation_id=name, ttl=0.3 if act == "expire" else 600)
                if act == "confirm":
                    await insist(stop, stock.confirm, name)
                    say(act="sold", sku=sku, quantity=quantity)
                elif act == "release":
                    await insist(stop, stock.release, name)
        except InsufficientStock:
            say(act="short", sku=sku)
        except (ReservationClosed, ReservationNotFound, InvalidOperation, AssertionError) as error:
            say(act="wrong", error=repr(error), what=act, name=name)
        await asyncio.sleep(dice.random() * 0.01)


async def flip(inventory: Inventory, flips: int, stop: asyncio.Event) -> None:
    for number in range(flips):
        if stop.is_set():
            return
        call = inventory.stock.withdraw if number % 2 else inventory.stock.adopt
        while not stop.is_set():
            try:
                say(act="flipping", to=call.__name__)
                went = await call(MERCHANT)
                say(act="flipped", to=call.__name__, went=went)
                break
            except (Overloaded, Overtaken, DurabilityNotReached) as error:
                say(act="again", error=repr(error))
                await asyncio.sleep(0.05)


async def main() -> None:
    what, settings = sys.argv[1], json.loads(sys.argv[2])
    more = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    stop = asyncio.Event()
    inventory = make(settings)
    async with inventory:
        waiting = asyncio.create_task(told_to_stop())
        waiting.add_done_callback(lambda _: stop.set())
        if what == "work":
            async with inventory.worker(housekeeping=0.1, idle=0.01) as worker:
                await worker.ready()  # it has given a sign: who withdraws must see one
                say(act="ready")
                await stop.wait()
        elif what == "sell":
            say(act="ready")
            await asyncio.gather(*(sell(inventory, random.Random(f"{more}-{number}"), stop) for number in range(4)))
        else:
            say(act="ready")
            await flip(inventory, more, stop)
        waiting.cancel()
    say(act="ended")


if __name__ == "__main__":
    asyncio.run(main())
