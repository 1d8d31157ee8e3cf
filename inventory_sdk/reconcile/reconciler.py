"""``inventory.reconciler``: compare, look at what was found, correct it, undo that, and see who did what."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from inventory_sdk.beside import Ground, Job
from inventory_sdk.errors import InvalidOperation, NotStarted
from inventory_sdk.ledger.protocol import WritesStock
from inventory_sdk.metrics.events import Compared
from inventory_sdk.model import check_text, key_of
from inventory_sdk.reconcile.correcting import Correcting
from inventory_sdk.reconcile.model import (
    Audit,
    Cause,
    Comparison,
    Correction,
    Discrepancy,
    Finding,
    Progress,
    Reconcile,
    What,
    audit,
    discrepancy,
    subject_of,
)
from inventory_sdk.reconcile.run import Run, Scope
from inventory_sdk.reconcile.schedule import Schedule
from inventory_sdk.reconcile.sinks.sql import SqlSink, register_of
from inventory_sdk.reconcile.telling import Teller
from inventory_sdk.stock.stock import Stock

if TYPE_CHECKING:
    from inventory_sdk.ledger.comparing import Comparing, ReadsStock
    from inventory_sdk.ledger.register import Acts, Register

MOST: Final = 1000
"""Discrepancies or acts of one page."""
EPOCHS: Final = 8
"""Epochs whose watermarks are remembered between comparisons of what was touched: the newest, and the ledger's own."""
STATES: Final = ("open", "correcting", "corrected", "undoing", "undone", "gone")


class _Here:
    """What belongs to one start in one event loop."""

    def __init__(self, ground: Ground, settings: Reconcile) -> None:
        self.ground = ground
        self.sql = SqlSink()
        self.register: Register = register_of(ground)
        self.comparing: Comparing = getattr(ground.ledger, "comparing")  # noqa: B009 - the SQL ledger's, as the register is
        self.teller = Teller(ground, settings.sinks)


class Reconciler:
    """Of one Inventory. Only what is asked for moves stock, and only through journaled deltas."""

    def __init__(
        self,
        settings: Reconcile,
        stock: Callable[[], Stock],
        reads: Callable[[], ReadsStock | None],
        writes: Sequence[WritesStock],
        merchant: Callable[[], str | None],
    ) -> None:
        self.settings = settings
        self._stock = stock
        self._reads = reads
        self._writes = writes
        self._merchant = merchant
        self._started: WeakKeyDictionary[asyncio.AbstractEventLoop, list[_Here]] = WeakKeyDictionary()

    # Its life --------------------------------------------------------------------------------------------------------------------

    async def start(self, ground: Ground) -> None:
        """Begin in this event loop."""
        here = _Here(ground, self.settings)
        await here.sql.start(ground)
        await here.teller.start()
        self._started.setdefault(asyncio.get_running_loop(), []).append(here)

    async def close(self) -> None:
        """End what the last ``start`` in this event loop began."""
        started = self._started.get(asyncio.get_running_loop())
        if started:
            await started.pop().teller.close()

    def jobs(self, ground: Ground) -> Sequence[Job]:
        """The scheduled comparisons."""
        if self.settings.every is None and self.settings.whole_every is None:
            return []

        async def compare(whole: bool) -> Comparison:
            return await self.run() if whole else await self.run(touched=True)

        async def catch_up() -> bool:
            return await self._here().teller.deliver()

        return [Job("reconcile", Schedule(ground, self.settings, compare, catch_up).run)]

    def _here(self) -> _Here:
        started = self._started.get(asyncio.get_running_loop())
        if not started:
            raise NotStarted("inventory.reconciler")
        return started[-1]

    # Comparing -------------------------------------------------------------------------------------------------------------------

    async def run(
        self,
        merchant: str | None = None,
        sku: str | None = None,
        order: str | None = None,
        progress: Progress | None = None,
        *,
        touched: bool = False,
    ) -> Comparison:
        """Compare, while sales go on, and put what is found on record. With no scope everything, the ledger's own books too;
        ``touched``: what has moved since the last run of this kind. ``sku`` and ``order`` are of ``merchant``, or of the Inventory's.

        ``progress`` is called with (SKUs looked at, SKUs there are). Raises ``DurabilityNotReached`` where the ledger is behind and
        no worker brings it up.
        """
        here = self._here()
        if touched and (merchant, sku, order) != (None, None, None):
            raise InvalidOperation("touched", touched, "is a scope of its own: leave out merchant, sku and order")
        marks: dict[int, dict[int, int]] = {}
        if touched:
            scope, marks = await self._touched(here)
        else:
            scope = await self._scope(here, merchant, sku, order)
        done = await self._over(here, scope, progress)
        # What was left out is looked at by the next run, so that must begin from the same marks.
        left_out = {here.ground.engine.place(name).number for name in done.moving} | set(done.unopened)
        for partition, upto in marks.items():
            if partition not in left_out:
                kept = sorted(upto)[-EPOCHS:]
                await here.register.remember(f"reconcile:{partition}", {str(epoch): upto[epoch] for epoch in {0, *kept} & upto.keys()})
        return done

    async def _scope(self, here: _Here, merchant: str | None, sku: str | None, order: str | None) -> Scope:
        if merchant is not None:
            check_text("merchant", merchant)
        if sku is None and order is None:
            return Scope("everything", books=True) if merchant is None else Scope(f"merchant {merchant}", merchant)
        home = self._home(merchant)
        fields: list[str] = []
        keys: list[str] = []
        if sku is not None:
            fields.append(key_of(home, check_text("sku", sku)))
        if order is not None:
            touched, keys = await here.comparing.fields_of(home, check_text("order", order))
            fields += [name for name in touched if name not in fields]
        name = " ".join([f"merchant {home}", *([f"sku {sku}"] if sku else []), *([f"order {order}"] if order else [])])
        return Scope(name, fields=fields, keys=keys)

    async def _touched(self, here: _Here) -> tuple[Scope, dict[int, dict[int, int]]]:
        """SKUs that have moved since the marks that the last run left; of everything where it left none."""
        fields: list[str] = []
        marks: dict[int, dict[int, int]] = {}
        whole = False
        for partition in here.ground.engine.partitions:
            remembered = await here.register.remembered(f"reconcile:{partition.number}")
            upto = marks[partition.number] = await here.comparing.marks(partition.number)
            if not remembered:
                whole = True
            elif not whole:
                since = {int(epoch): int(applied) for epoch, applied in remembered.items()}
                oldest = min((epoch for epoch in since if epoch), default=0)
                newer = {epoch: applied for epoch, applied in upto.items() if not epoch or epoch >= oldest}
                fields += await here.comparing.touched(partition.number, since, newer)
        return Scope("what was touched", fields=None if whole else fields), marks

    async def _over(self, here: _Here, scope: Scope, progress: Progress | None) -> Comparison:
        async def keep(found: Sequence[Finding], before: Acts) -> list[Discrepancy]:
            kept = await here.sql.record(found, here.teller.letters("found"), before)
            if any(new for _, new in kept):
                await here.teller.deliver()
            return [each for each, _ in kept]

        async def ended(scope: Scope, included: Callable[[Discrepancy], bool], seen: set[int]) -> int:
            return await self._ended(here, scope, included, seen, began)

        newest = await here.register.find(limit=1)
        began = newest[0].number if newest else 0
        run = Run(here.ground, here.comparing, here.register, self.settings, self._reads(), bool(self._writes), keep, ended, progress)
        done = await run.over(scope)
        by_cause = {cause.value: 0 for cause in Cause}
        for found in done.open:
            by_cause[found.cause] += 1
        whole = scope.fields is None and scope.merchant is None
        here.ground.metrics.record(Compared(scope.name.partition(" ")[0], done.skus, done.holds, by_cause if whole else {}, done.seconds))
        return done

    async def _ended(self, here: _Here, scope: Scope, included: Callable[[Discrepancy], bool], seen: set[int], began: int) -> int:
        """Those of the scope that were open before, up to number ``began``, and were not seen any more."""
        gone: list[Discrepancy] = []
        subjects: list[str] | None = None
        if scope.fields is not None and scope.keys is not None and len(scope.fields) + len(scope.keys) <= MOST:
            subjects = _subjects(scope.fields, scope.keys)
        after: int | None = began + 1
        while rows := await here.register.find(state="open", subjects=subjects, limit=MOST, after=after):
            gone += [each for each in map(discrepancy, rows) if each.number not in seen and each.state == "open" and included(each)]
            after = rows[-1].number
        ended = await here.register.gone([each.number for each in gone], here.teller.letters("gone"))
        if ended:
            await here.teller.deliver()
        return len(ended)

    # What was found --------------------------------------------------------------------------------------------------------------

    async def discrepancies(
        self,
        merchant: str | None = None,
        sku: str | None = None,
        order: str | None = None,
        cause: str | None = None,
        state: str | None = "open",
        limit: int = 50,
        after: int | None = None,
    ) -> list[Discrepancy]:
        """Newest first; the next page begins ``after`` the number of the last. ``state`` ``open`` includes those whose correction has
        begun; None: all. ``order``: of the SKUs and reservations that the order has touched, among those that last."""
        here = self._here()
        _check_limit(limit)
        if state is not None and state not in STATES:
            raise InvalidOperation("state", state, f"must be one of {', '.join(STATES)}, or None")
        if cause is not None and cause not in {each.value for each in Cause}:
            raise InvalidOperation("cause", cause, f"must be one of {', '.join(Cause)}")
        subjects: list[str] | None = None
        if order is not None:
            fields, keys = await here.comparing.fields_of(self._home(merchant), check_text("order", order))
            subjects = _subjects(fields, keys)
        rows = await here.register.find(merchant=merchant, sku=sku, kind=cause, state=state, subjects=subjects, limit=limit, after=after)
        return [discrepancy(row) for row in rows]

    async def discrepancy(self, number: int) -> Discrepancy:
        """One, whatever became of it; ``InvalidOperation`` for a number that there is not."""
        return discrepancy(await self._correcting().row(number))

    async def audit(self, limit: int = 50, after: int | None = None) -> list[Audit]:
        """What was done by hand, newest first; the next page begins ``after`` the number of the last."""
        _check_limit(limit)
        return [audit(row) for row in await self._here().register.audits(limit, after)]

    # Correcting ------------------------------------------------------------------------------------------------------------------

    async def propose(self, number: int) -> Correction:
        """Look once more and say what ``correct`` would do; nothing moves. ``why_not`` says why it can't be corrected so."""
        return await self._correcting().propose(number)

    async def correct(self, number: int, reason: str, who: str, confirmed: bool | int = False) -> Discrepancy:
        """Make the correction that ``propose`` shows: a journaled delta, once, on record with who and why.

        ``confirmed``: the units that whoever confirms it has seen, so that what has grown since is not moved unseen; True: as many as
        it moves by now. ``InvalidOperation`` when there is nothing to correct (any more), when it is larger than ``confirm_above``
        and not ``confirmed``, moves another number of units, or can't be looked at now, or when the merchant's daily limit is used
        up. ``StockFrozen`` while Redis does not sell. Safe to repeat: one that was made is answered as it is.
        """
        made = await self._correcting().correct(number, reason, who, confirmed)
        await self._here().teller.deliver()
        return made

    async def undo(self, number: int, reason: str, who: str) -> Discrepancy:
        """The exact inverse of a correction. The next comparison finds the difference again, under a new number."""
        undone = await self._correcting().undo(number, reason, who)
        await self._here().teller.deliver()
        return undone

    def _correcting(self) -> Correcting:
        here = self._here()

        async def look(found: Discrepancy) -> bool:
            fields = [found.name] if found.what in (What.STOCK, What.SERVICE) or (found.what == What.BOOKS and found.merchant) else []
            keys = [found.name] if found.what == What.HOLD else []
            done = await self._over(here, Scope(f"discrepancy {found.number}", fields=fields, keys=keys, single=True), None)
            return found.number in {each.number for each in done.open}

        return Correcting(here.ground, self.settings, self._stock(), self._writes, look, here.teller.letters)

    def _home(self, merchant: str | None) -> str:
        home = merchant if merchant is not None else self._merchant()
        if home is None:
            raise InvalidOperation("merchant", merchant, "must be named: this Inventory has none of its own")
        return home


def _subjects(fields: Sequence[str], keys: Sequence[str]) -> list[str]:
    """All that may be found about these SKUs and reservations."""
    skus = [subject_of(what, name) for what in (What.STOCK, What.SERVICE, What.BOOKS) for name in fields]
    return [*skus, *(subject_of(What.HOLD, key) for key in keys)]


def _check_limit(limit: Any) -> None:
    if type(limit) is not int or not 1 <= limit <= MOST:
        raise InvalidOperation("limit", limit, f"must be a whole number from 1 to {MOST}")
