"""A flash sale: many buyers, few units, and everything that goes wrong in real ones. No output here; see ``screen``.

A buyer may send a call twice, hang up while waiting, change their mind, walk away and come back too late, or simply pay. What
each of them saw is tallied, so that the books can be held against it afterwards.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeVar

from inventory_sdk.cli.patience import patiently
from inventory_sdk.errors import InsufficientStock, ReservationClosed, ReservationExpired, ReservationNotFound
from inventory_sdk.model import Line, Receipt

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

T = TypeVar("T")

MERCHANT: Final = "demo-shop"
SKUS: Final = {"console": 0.8, "controller": 0.15, "headset": 0.05}
"""What is on sale, and which part of the buyers wants it: one is hot."""


class Behaviour(StrEnum):
    PAYS = "reserves and pays"
    PAYS_AT_ONCE = "pays at once"
    CHANGES_MIND = "reserves and gives back"
    WALKS_AWAY = "reserves and walks away"
    HANGS_UP = "hangs up while waiting"


WEIGHTS: Final = {
    Behaviour.PAYS: 0.5,
    Behaviour.PAYS_AT_ONCE: 0.2,
    Behaviour.CHANGES_MIND: 0.1,
    Behaviour.WALKS_AWAY: 0.1,
    Behaviour.HANGS_UP: 0.1,
}


@dataclass(frozen=True, slots=True)
class FlashSale:
    """``units`` of each SKU; ``retries`` is the part of buyers who send their call twice; ``hold`` in seconds."""

    buyers: int = 2000
    units: int = 100
    seed: int = 1
    retries: float = 0.25
    hold: float = 0.5
    at_once: int = 256


@dataclass(slots=True)
class Tally:
    """What the buyers saw. Units where it says units, else calls or buyers; ``seconds`` is how long the sale took."""

    supplied: Counter[str] = field(default_factory=Counter)
    sold: Counter[str] = field(default_factory=Counter)
    done: int = 0
    refused: int = 0
    duplicates: int = 0
    cancelled: int = 0
    released: int = 0
    expired: int = 0
    contradictions: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Answered calls per second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def percentile(self, part: float) -> float:
        """Seconds within which this part of the calls was answered."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0


@dataclass(frozen=True, slots=True)
class Buyer:
    number: int
    sku: str
    behaviour: Behaviour
    twice: bool
    impatience: int
    """How many turns of the event loop a buyer waits before hanging up."""
    anonymous: bool
    """Hangs up on a call without an id of its own: the SDK has to clean up."""

    @property
    def operation_id(self) -> str:
        return f"buyer-{self.number}"


def buyers(sale: FlashSale) -> Iterator[Buyer]:
    """The same crowd for the same seed."""
    chance = random.Random(sale.seed)  # noqa: S311  (a reproducible crowd, not a secret)
    for number in range(1, sale.buyers + 1):
        yield Buyer(
            number,
            chance.choices(list(SKUS), list(SKUS.values()))[0],
            chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0],
            chance.random() < sale.retries,
            chance.randrange(6),
            chance.random() < 0.5,
        )


class Till:
    """Serves buyers and tallies what they saw."""

    def __init__(self, inventory: Inventory, sale: FlashSale, advance: Callable[[Tally], None]) -> None:
        self.stock = inventory.stock
        self.sale = sale
        self.tally = Tally()
        self.advance = advance
        self.away: list[Buyer] = []

    async def open(self) -> None:
        for sku in SKUS:
            await self.stock.restock([Line(sku, self.sale.units)], merchant=MERCHANT, operation_id=f"supply-{sku}")
            self.tally.supplied[sku] += self.sale.units

    async def sell(self) -> None:
        """All buyers, ``at_once`` of them at a time."""
        crowd = buyers(self.sale)
        began = time.perf_counter()
        async with asyncio.TaskGroup() as counters:
            for _ in range(min(self.sale.at_once, self.sale.buyers)):
                counters.create_task(self._serve(crowd))
        self.tally.seconds = time.perf_counter() - began

    async def _serve(self, crowd: Iterator[Buyer]) -> None:
        for buyer in crowd:
            await self._one(buyer)
            self.tally.done += 1
            self.advance(self.tally)

    async def _one(self, buyer: Buyer) -> None:
        if buyer.behaviour is Behaviour.HANGS_UP:
            await self._hang_up(buyer)
            return
        receipt = await self._take(buyer)
        if receipt is None:
            self.tally.refused += 1
        elif buyer.behaviour is Behaviour.PAYS:
            await self._twice(buyer, lambda: self.stock.confirm(buyer.operation_id, merchant=MERCHANT))
            self.tally.sold[buyer.sku] += 1
        elif buyer.behaviour is Behaviour.PAYS_AT_ONCE:
            self.tally.sold[buyer.sku] += 1
        elif buyer.behaviour is Behaviour.CHANGES_MIND:
            await self._twice(buyer, lambda: self.stock.release(buyer.operation_id, merchant=MERCHANT))
            self.tally.released += 1
        else:
            self.away.append(buyer)

    async def _take(self, buyer: Buyer) -> Receipt | None:
        lines = [Line(buyer.sku, 1)]
        if buyer.behaviour is Behaviour.PAYS_AT_ONCE:
            return await self._twice(buyer, lambda: self.stock.deduct(lines, merchant=MERCHANT, operation_id=buyer.operation_id))
        ttl = self.sale.hold if buyer.behaviour is Behaviour.WALKS_AWAY else 900.0
        return await self._twice(buyer, lambda: self.stock.reserve(lines, merchant=MERCHANT, operation_id=buyer.operation_id, ttl=ttl))

    async def _twice(self, buyer: Buyer, call: Callable[[], Awaitable[Receipt]]) -> Receipt | None:
        """The receipt, None when there was not enough. An impatient buyer sends the same call twice at the same time: one
        moves stock, the other must get the very same receipt."""
        answers = await asyncio.gather(*(self._timed(call) for _ in range(2 if buyer.twice else 1)))
        receipts = [receipt for receipt in answers if receipt is not None]
        self.tally.duplicates += sum(receipt.replayed for receipt in receipts)
        if len({receipt.lines for receipt in receipts}) > 1 or sum(not receipt.replayed for receipt in receipts) > 1:
            self.tally.contradictions.append(f"{buyer.operation_id} got different receipts: {receipts}")
        return receipts[0] if receipts else None

    async def _timed(self, call: Callable[[], Awaitable[Receipt]]) -> Receipt | None:
        began = time.perf_counter()
        try:
            return await patiently(call)
        except InsufficientStock:
            return None
        finally:
            self.tally.latencies.append(time.perf_counter() - began)

    async def _hang_up(self, buyer: Buyer) -> None:
        """The caller is cancelled in the middle of a reserve. With an id of its own the hold may stand, so it is given back;
        a made-up id nobody could ask for, so the SDK must leave nothing behind."""
        own_id = None if buyer.anonymous else buyer.operation_id
        call = asyncio.create_task(
            self.stock.reserve([Line(buyer.sku, 1)], merchant=MERCHANT, operation_id=own_id, ttl=900.0),
            name=f"{buyer.operation_id} hangs up",
        )
        try:
            for _ in range(buyer.impatience):
                await asyncio.sleep(0)
        finally:
            call.cancel()
            await asyncio.wait({call})
        hold = own_id
        if call.cancelled():
            self.tally.cancelled += 1
        elif isinstance(error := call.exception(), InsufficientStock):
            self.tally.refused += 1
            return
        elif error is not None:
            raise error
        else:
            hold = call.result().operation_id
        if hold is not None:
            try:
                await patiently(lambda: self.stock.release(hold, merchant=MERCHANT))
                self.tally.released += 1
            except ReservationNotFound:
                pass  # it had not been sent; the release closed the name, so a late arrival takes nothing

    async def wait_until_nothing_is_held(self, timeout: float = 30.0) -> bool:
        """Holds run out by Redis' clock and undos finish behind their callers; False when something is held for ever."""
        try:
            async with asyncio.timeout(timeout):
                while any([(await self.stock.level(sku, merchant=MERCHANT)).reserved for sku in SKUS]):
                    await asyncio.sleep(0.05)
        except TimeoutError:
            return False
        return True

    async def too_late(self) -> None:
        """Who walked away comes back to pay, and must be told that the hold has expired."""
        for buyer in self.away:
            try:
                await self.stock.confirm(buyer.operation_id, merchant=MERCHANT)
            except ReservationExpired:
                self.tally.expired += 1
            except ReservationClosed as error:
                self.tally.contradictions.append(f"{buyer.operation_id} walked away: {error}")
            else:
                self.tally.contradictions.append(f"{buyer.operation_id} paid for a hold that had run out")


async def flash_sale(inventory: Inventory, sale: FlashSale, advance: Callable[[Tally], None]) -> Tally:
    """Hold the sale on a started inventory; ``advance`` is called after each buyer. What does not fit together is in
    ``contradictions``."""
    till = Till(inventory, sale, advance)
    await till.open()
    await till.sell()
    if await till.wait_until_nothing_is_held():
        await till.too_late()
    else:
        till.tally.contradictions.append("units are still held 30 s after the sale: a hold did not expire or was not undone")
    return till.tally
