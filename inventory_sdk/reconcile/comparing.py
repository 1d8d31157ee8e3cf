"""One comparison, exact while sales go on. See docs/explanation/comparison.md for why.

For a stride of SKUs: ask the ledger who sells them, read Redis (values and the sequence that they include, in one script), wait until
the ledger has applied that sequence, then read the ledger at one moment: rows, watermark, pending credits and voids, and what the
entries between the two moments moved. Nothing is left that could be in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from inventory_sdk.beside import Ground
from inventory_sdk.errors import DurabilityNotReached
from inventory_sdk.ledger.accounts import Account, Moved, Place
from inventory_sdk.model import OpeningBalance, Position, split_key
from inventory_sdk.reconcile.redis_side import Counters, read_counters
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.wire import NotExecuted

if TYPE_CHECKING:
    from inventory_sdk.ledger.comparing import Comparing, ReadsStock, Snapshot

CHUNK: Final = 500
"""SKUs of one script: it blocks Redis for a fraction of a millisecond."""
STRIDE: Final = 4000
"""SKUs that wait for the watermark together."""
LOOKS: Final = 4
"""Looks at what differs, until two in a row say the same."""
ATTEMPTS: Final = 20
PAUSE: Final = 0.1
PATIENCE: Final = 30.0
"""Seconds that a stride waits for the ledger to catch up."""


@dataclass(frozen=True, slots=True)
class Drift:
    """One SKU whose two sides differ: by how much the first is above the ledger, and where they were read."""

    field: str
    available: int
    reserved: int
    account: Account
    epoch: int
    sequence: int
    watermark: int
    found: tuple[int, int]
    """What stands on the other side, (available, reserved)."""

    @property
    def units(self) -> tuple[int, int]:
        """The difference."""
        return self.available, self.reserved


@dataclass(slots=True)
class Look:
    """What a look at some SKUs has shown."""

    skus: int = 0
    absent: int = 0
    direct: int = 0
    service: int = 0
    moving: list[str] = field(default_factory=list)
    stock: dict[str, Drift] = field(default_factory=dict)
    services: dict[str, Drift] = field(default_factory=dict)
    unsound: dict[str, Account] = field(default_factory=dict)
    closed: str = ""
    """Why the partition could not be looked at."""
    behind: tuple[int, int] | None = None
    """(sequence in Redis, watermark of the ledger before) where Redis is behind what the ledger has applied."""
    fields: int = 0
    """Counters that Redis has in all."""
    present: int = 0


class Pace:
    """At most ``rate`` SKUs per second, and never more than ``stride`` of them at once."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._due = time.monotonic()
        self.stride = max(1, int(min(STRIDE, rate)))

    async def take(self, skus: int) -> None:
        """Wait until so many more may be looked at."""
        now = time.monotonic()
        wait = self._due - now
        self._due = max(self._due, now) + skus / self._rate
        if wait > 0:
            await asyncio.sleep(wait)


class Looking:
    """Looks at SKUs of one Inventory in one event loop. ``reads``: the service's side, if it has one."""

    def __init__(self, ground: Ground, comparing: Comparing, reads: ReadsStock | None, pace: Pace) -> None:
        self._ground = ground
        self._comparing = comparing
        self._reads = reads
        self._pace = pace

    async def look(self, partition: Partition, places: Sequence[Place]) -> Look:
        """Once; what is in flight is accounted for."""
        why = ""
        await self._pace.take(len(places))
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(PAUSE)
                names = [place.field for place in places]
                places = await self._comparing.places(names)
            try:
                done = await self._once(partition, places)
            except NotExecuted as error:
                done = str(error)
            if isinstance(done, Look):
                return done
            why = done
        return Look(closed=why)

    async def _once(self, partition: Partition, places: Sequence[Place]) -> Look | str:
        """A look, or why there was none."""
        number = partition.number
        before = await self._ground.ledger.partition(number)
        fields = [place.field for place in places if place.admission == "redis"]
        chunks: list[tuple[Sequence[str], Counters]] = []
        for start in range(0, len(fields), CHUNK):
            part = fields[start : start + CHUNK]
            chunks.append((part, await read_counters(partition, part)))
        epoch, first, last = 0, 0, 0
        if chunks:
            states = {(counters.epoch, counters.state) for _, counters in chunks}
            epoch, state = max(states)
            if len(states) > 1 or state != "open" or not epoch:
                return f"partition {number} is {state}"
            first, last = chunks[0][1].sequence, chunks[-1][1].sequence
            if before is not None and before.epoch == epoch and first < before.applied:
                return Look(behind=(first, before.applied))
            try:
                await self._ground.watermark.reached(Position(number, epoch, last), PATIENCE)
            except DurabilityNotReached as error:
                if error.why.startswith("lost"):
                    return error.why
                raise
        async with self._comparing.snapshot() as shot:
            if chunks:
                row = await shot.partition(number)
                if row is None or row.epoch != epoch or row.state != "open" or row.applied < last:
                    return f"partition {number} is in another epoch"
            else:
                row = None
            watermark = row.applied if row is not None else 0
            accounts = await shot.accounts(number, epoch, [place.field for place in places])
            moved = await shot.moved(number, epoch, first, watermark) if chunks else {}
            look = Look(fields=chunks[-1][1].fields if chunks else 0)
            self._judge(look, {place.field: place for place in places}, chunks, accounts, moved, watermark)
            if self._reads is not None:
                await self._compare_service(look, shot, accounts, epoch, watermark)
        return look

    def _judge(
        self,
        look: Look,
        places: dict[str, Place],
        chunks: Sequence[tuple[Sequence[str], Counters]],
        accounts: dict[str, Account],
        moved: dict[str, list[Moved]],
        watermark: int,
    ) -> None:
        """Hold Redis against what it must have."""
        look.direct = sum(place.admission == "database" for place in places.values())
        for name, place in places.items():
            account = accounts[name]
            if (account.admission, account.fence) != (place.admission, place.fence) or place.admission == "arriving":
                look.moving.append(name)
            if not account.sound:
                look.unsound[name] = account
        changing = set(look.moving)
        for fields, counters in chunks:
            for name, available, reserved in zip(fields, counters.available, counters.reserved, strict=True):
                if name in changing:
                    continue
                if available is None:
                    look.absent += 1
                    continue
                look.present += 1
                look.skus += 1
                account = accounts[name]
                must, must_hold = account.available, account.reserved
                for each in moved.get(name, ()):
                    if each.sequence > counters.sequence:
                        must -= each.available
                        must_hold -= each.reserved
                held = reserved or 0
                if (available, held) != (must, must_hold):
                    over = (available - must, held - must_hold)
                    look.stock[name] = Drift(name, *over, account, counters.epoch, counters.sequence, watermark, (available, held))

    async def _compare_service(self, look: Look, shot: Snapshot, accounts: dict[str, Account], epoch: int, watermark: int) -> None:
        assert self._reads is not None
        by_merchant: dict[str, list[str]] = {}
        for name in accounts:
            merchant, sku = split_key(name)
            by_merchant.setdefault(merchant, []).append(sku)
        for merchant, skus in by_merchant.items():
            found = await shot.service(self._reads, merchant, skus)
            for sku, balance in found.items():
                look.service += 1
                account = accounts[f"{merchant}\x1f{sku}"]
                over, held = service_difference(balance, account)
                if over or held:
                    there = (balance.available, account.row[1] + held)
                    look.services[account.field] = Drift(account.field, over, held, account, epoch, watermark, watermark, there)

    async def confirmed(self, partition: Partition, places: Sequence[Place], first: Look) -> Look:
        """The same look again for what differs, until two in a row say the same of a SKU: whoever writes by hand may be at it."""
        certain = Look()
        asked = {place.field: place for place in places}
        before = first
        for _ in range(LOOKS):
            doubtful = sorted(before.stock.keys() | before.services.keys() | before.unsound.keys())
            if not doubtful:
                return certain
            now = await self.look(partition, [asked[name] for name in doubtful])
            if now.closed or now.behind is not None:
                certain.moving += doubtful  # nobody has looked twice: neither found nor gone
                return certain
            certain.moving += now.moving
            for kind in ("stock", "services"):
                was, there = getattr(before, kind), getattr(now, kind)
                for name in was.keys() & there.keys():
                    if was[name].units == there[name].units:
                        getattr(certain, kind)[name] = there.pop(name)
            for name in before.unsound.keys() & now.unsound.keys():
                certain.unsound[name] = now.unsound.pop(name)
            before = now
        certain.moving += sorted(before.stock.keys() | before.services.keys() | before.unsound.keys())
        return certain

    async def standing(
        self, partition: Partition, places: Sequence[Place], differing: dict[str, Drift]
    ) -> tuple[dict[str, Drift], list[str]]:
        """Of a service that writes in its own time: what differs by the same as a while ago, with nothing moved since; and what
        differs otherwise, or could not be looked at, so that nobody can tell yet."""
        names = sorted(differing)
        now = await self.look(partition, [place for place in places if place.field in differing])
        if now.closed or now.behind is not None:
            return {}, names
        stands: dict[str, Drift] = {}
        for name in names:
            was, there = differing[name], now.services.get(name)
            quiet = there is not None and there.account.version == was.account.version and name not in now.stock
            if there is not None and quiet and (there.units, there.found) == (was.units, was.found):
                stands[name] = there
        return stands, [name for name in names if name not in stands and (name in now.services or name in now.moving)]


def service_difference(balance: OpeningBalance, account: Account) -> tuple[int, int]:
    """By how much the service's own table is above the ledger. Holds count where the service lists any."""
    over = balance.available - account.row[0]
    held = sum(quantity for _, quantity in balance.reservations) - account.row[1] if balance.reservations else 0
    return over, held
