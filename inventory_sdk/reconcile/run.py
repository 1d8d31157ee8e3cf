"""One run of a comparison over its scope: strides at a bounded pace, causes named, findings kept as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from inventory_sdk.beside import Ground
from inventory_sdk.ledger.accounts import Place
from inventory_sdk.ledger.protocol import ReservationRow
from inventory_sdk.model import key_of
from inventory_sdk.reconcile.causes import Causes
from inventory_sdk.reconcile.comparing import CHUNK, Drift, Look, Looking, Pace
from inventory_sdk.reconcile.holds import HoldLook
from inventory_sdk.reconcile.model import Cause, Comparison, Discrepancy, Finding, Progress, Reconcile, What, discrepancy, subject_of
from inventory_sdk.reconcile.redis_side import read_counters
from inventory_sdk.stock.partition import Partition

if TYPE_CHECKING:
    from inventory_sdk.ledger.comparing import Comparing, ReadsStock
    from inventory_sdk.ledger.register import Acts, Register

Keep = Callable[[Sequence[Finding], "Acts"], Awaitable[list[Discrepancy]]]
"""(what was found, how acts stood before the look) → what is on record; what was acted on since is not."""
Ended = Callable[["Scope", Callable[[Discrepancy], bool], set[int]], Awaitable[int]]
"""(scope, is it in the scope and was looked at?, numbers that the run has seen) → how many others of the scope are no more."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What a run looks at. ``fields`` None: every SKU, of ``merchant`` if given; ``keys`` None: every reservation likewise."""

    name: str
    merchant: str | None = None
    fields: Sequence[str] | None = None
    keys: Sequence[str] | None = None
    single: bool = False
    """One discrepancy, looked at once more."""
    books: bool = False
    """The ledger's own books too, all of them."""


@dataclass(slots=True)
class _Sums:
    skus: int = 0
    absent: int = 0
    direct: int = 0
    service: int = 0
    holds: int = 0
    looked: int = 0
    moving: list[str] = field(default_factory=list)
    unsettled: set[str] = field(default_factory=set)
    """Whose service has written, or is about to write, in its own time."""
    unopened: set[int] = field(default_factory=set)
    open: dict[int, Discrepancy] = field(default_factory=dict)


class Run:
    """Once."""

    def __init__(
        self,
        ground: Ground,
        comparing: Comparing,
        register: Register,
        settings: Reconcile,
        reads: ReadsStock | None,
        told: bool,
        keep: Keep,
        ended: Ended,
        progress: Progress | None,
    ) -> None:
        self._ground = ground
        self._comparing = comparing
        self._register = register
        self._settings = settings
        self._pace = Pace(settings.rate)
        self._reads = reads
        self._looking = Looking(ground, comparing, reads, self._pace)
        self._holds = HoldLook(ground, comparing)
        self._told = told
        """The service's tables are written by ``writes_stock``, in the ledger's transaction."""
        self._causes = Causes(comparing, register, ground.engine.settings.results_window)
        self._keep = keep
        self._ended = ended
        self._progress = progress
        self._sums = _Sums()

    async def over(self, scope: Scope) -> Comparison:
        """Look at all of it. ``DurabilityNotReached`` where the ledger is behind and no worker brings it up."""
        began = time.monotonic()
        total = len(scope.fields) if scope.fields is not None else await self._comparing.count(scope.merchant)
        for partition in self._ground.engine.partitions:
            if scope.merchant is not None and not self._may_have(partition, scope.merchant):
                continue
            await self._stock(partition, scope, total)
            await self._reservations(partition, scope)
        if scope.books:
            await self._books()
        sums = self._sums
        gone = await self._ended(scope, self._in(scope), set(sums.open))
        return Comparison(
            scope.name, sums.skus, sums.absent, sums.direct, sums.service, sums.holds, tuple(sums.moving), tuple(sorted(sums.unopened)),
            tuple(sums.open[number] for number in sorted(sums.open)), gone, time.monotonic() - began,
        )  # fmt: skip

    def _may_have(self, partition: Partition, merchant: str) -> bool:
        layout = self._ground.engine.layout
        return layout.apart or layout.of(key_of(merchant, "")) == partition.number

    def _of(self, found: Discrepancy) -> int:
        """The partition that a SKU or a reservation is in."""
        layout = self._ground.engine.layout
        return layout.hold(found.name) if found.what == What.HOLD else layout.of(found.name)

    def _in(self, scope: Scope) -> Callable[[Discrepancy], bool]:
        fields = None if scope.fields is None else set(scope.fields)
        keys = None if scope.keys is None else set(scope.keys)
        left_out, unsettled, unopened = set(self._sums.moving), self._sums.unsettled, self._sums.unopened

        def included(found: Discrepancy) -> bool:
            if found.what == What.PARTITION:
                return scope.merchant is None and fields is None and int(found.name) not in unopened
            if found.what == What.BOOKS and not found.merchant:
                return scope.books
            if scope.merchant is not None and found.merchant != scope.merchant:
                return False
            if self._of(found) in unopened or found.name in left_out:
                return False
            if found.what == What.SERVICE and (self._reads is None or found.name in unsettled):
                return False
            chosen = keys if found.what == What.HOLD else fields
            return chosen is None or found.name in chosen

        return included

    # SKUs ------------------------------------------------------------------------------------------------------------------------

    async def _strides(self, partition: Partition, scope: Scope) -> AsyncIterator[list[Place]]:
        if scope.fields is None:
            after: str | None = None
            while places := await self._comparing.page(partition.number, after, self._pace.stride, scope.merchant):
                yield places
                after = places[-1].field
            return
        mine = [name for name in scope.fields if self._ground.engine.place(name) is partition]
        for start in range(0, len(mine), self._pace.stride):
            part = mine[start : start + self._pace.stride]
            yield await self._comparing.places(part)
            await self._unknown(partition, part)

    async def _stock(self, partition: Partition, scope: Scope, total: int) -> None:
        sums, present, fields = self._sums, 0, 0
        doubts: dict[str, tuple[Place, Drift]] = {}
        async for places in self._strides(partition, scope):
            before = await self._register.acts()
            look = await self._looking.look(partition, places)
            if look.behind is not None:
                await self._report([_behind(partition, look.behind)], before)
            if look.closed or look.behind is not None:
                sums.unopened.add(partition.number)
                return
            sums.skus += look.skus
            sums.absent += look.absent
            sums.direct += look.direct
            sums.service += look.service
            sums.moving += look.moving
            sums.looked += len(places)
            present, fields = present + look.present, max(fields, look.fields)
            if not self._told:
                by_name = {place.field: place for place in places}
                doubts.update({name: (by_name[name], drift) for name, drift in look.services.items()})
                look.services.clear()
            if look.stock or look.services or look.unsound:
                # A single discrepancy was looked at twice when it was found.
                certain = look if scope.single else await self._looking.confirmed(partition, places, look)
                sums.moving += [name for name in certain.moving if name not in look.moving]
                await self._name(partition, certain, before)
            if self._progress is not None:
                self._progress(sums.looked, total)
        if doubts:
            await self._outwait(partition, doubts)
        if scope.fields is None and scope.merchant is None and fields > present:
            await self._orphans(partition)

    async def _name(self, partition: Partition, look: Look, before: Acts) -> None:
        found: list[Finding] = []
        subjects = [subject_of(What.STOCK, name) for name in look.stock]
        known: dict[str, Discrepancy] = {}
        for start in range(0, len(subjects), CHUNK):
            rows = await self._register.find(state="open", subjects=subjects[start : start + CHUNK], limit=CHUNK)
            known.update({each.name: each for each in map(discrepancy, rows)})
        for drift in look.stock.values():
            cause, evidence = await self._causes.of(partition, drift, known.get(drift.field))
            found.append(Finding(What.STOCK, drift.field, cause, *drift.units, evidence))
        for name, account in look.unsound.items():
            facts = {"row": list(account.row), "last_change_left": account.left and list(account.left), "version": account.version}
            found.append(Finding(What.BOOKS, name, Cause.LEDGER_BOOKS, evidence=facts))
        found += [_service(drift) for drift in look.services.values()]
        await self._report(found, before)

    async def _outwait(self, partition: Partition, doubts: Mapping[str, tuple[Place, Drift]]) -> None:
        await asyncio.sleep(self._settings.settle)
        names = sorted(doubts)
        for start in range(0, len(names), self._pace.stride):
            part = names[start : start + self._pace.stride]
            differing = {name: doubts[name][1] for name in part}
            before = await self._register.acts()
            stands, unsettled = await self._looking.standing(partition, [doubts[name][0] for name in part], differing)
            self._sums.unsettled |= set(unsettled)
            await self._report([_service(drift) for drift in stands.values()], before)

    async def _orphans(self, partition: Partition) -> None:
        """Redis has more counters than the ledger has SKUs: look at each."""
        client: Any = partition.wire.client
        cursor = 0
        while True:
            cursor, values = await client.hscan(partition.key("available"), cursor, count=CHUNK)
            await self._pace.take(len(values))
            await self._unknown(partition, [bytes(name).decode() for name in values])
            if not int(cursor):
                return

    async def _unknown(self, partition: Partition, names: Sequence[str]) -> None:
        """Counters in Redis of SKUs that the ledger does not have. A row comes before its counter, so none is just being made."""
        before = await self._register.acts()
        counters = await read_counters(partition, names)
        there = [name for name, available in zip(names, counters.available, strict=True) if available is not None]
        known = {place.field for place in await self._comparing.places(there)} if there else set()
        why = {"epoch": counters.epoch, "why": "the ledger has no such SKU: its counters were written by hand"}
        found = []
        for name, available, reserved in zip(names, counters.available, counters.reserved, strict=True):
            if name in there and name not in known and (available or reserved):
                found.append(Finding(What.STOCK, name, Cause.MANUAL_REDIS, available or 0, reserved or 0, why))
        await self._report(found, before)

    # Reservations, books ---------------------------------------------------------------------------------------------------------

    async def _reservations(self, partition: Partition, scope: Scope) -> None:
        if partition.number in self._sums.unopened:
            return
        if scope.keys is None:
            pages = self._holds.pages(partition, scope.merchant)
        else:
            mine = [key for key in scope.keys if self._ground.engine.layout.hold(key) == partition.number]
            pages = _one(await self._comparing.holds(mine) if mine else [])
        async for rows in pages:
            await self._pace.take(len(rows))
            before = await self._register.acts()
            found = await self._holds.look(partition, [row for row in rows if row.state == "held"])
            if found is None:
                self._sums.unopened.add(partition.number)
                return
            self._sums.holds += len(rows)
            await self._report(found, before)

    async def _books(self) -> None:
        before = await self._register.acts()
        words = await self._ground.ledger.verify()
        # Named by what they say of which row, so that the same defect stays one discrepancy.
        await self._report([Finding(What.BOOKS, f"\x1f{text[:200]}", Cause.LEDGER_BOOKS, evidence={"why": text}) for text in words], before)

    async def _report(self, found: Sequence[Finding], before: Acts) -> None:
        if found:
            kept = await self._keep(found, before)
            self._sums.open.update({each.number: each for each in kept})
            known = {each.name for each in kept}
            self._sums.moving += [each.name for each in found if each.name not in known]


def _service(drift: Drift) -> Finding:
    facts = {
        "service": list(drift.found),
        "ledger": dict(zip(("available", "reserved", "sold", "supplied", "written_off"), drift.account.row, strict=True)),
        "why": "Redis and the ledger agree; the service's own table was written past the SDK",
    }
    return Finding(What.SERVICE, drift.field, Cause.SERVICE_TABLE, *drift.units, facts)


def _behind(partition: Partition, where: tuple[int, int]) -> Finding:
    facts = {"sequence": where[0], "watermark": where[1], "why": "Redis is behind what the ledger has applied: the worker recovers it"}
    return Finding(What.PARTITION, str(partition.number), Cause.WENT_BACK, evidence=facts)


async def _one(rows: list[ReservationRow]) -> AsyncIterator[list[ReservationRow]]:
    if rows:
        yield rows
