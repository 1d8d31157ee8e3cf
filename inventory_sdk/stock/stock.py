"""The stock API: what a user calls. Takes and what ends a hold go to Redis; what enters goes through the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Final, Literal

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import Kind, Line, Position, Receipt, Reservation, StockLevel, check_text, check_ttl, key_of
from inventory_sdk.stock import handover, reading
from inventory_sdk.stock.acts import Acts, ttl_ms
from inventory_sdk.stock.answers import public_kind, receipt
from inventory_sdk.stock.engine import Engine
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.parts import Instance, merged
from inventory_sdk.stock.spanning import receipt_of

Durability = Literal["redis", "replica", "aof", "queue", "database"]
DEFAULT_TTL: Final = 900.0


class Stock(Acts):
    """Stock of one Inventory. Times are in seconds; ``merchant`` falls back to the request's and then to the Inventory's."""

    # Takes ---------------------------------------------------------------------------------------------------------------

    async def reserve(
        self,
        lines: Sequence[Line],
        *,
        merchant: str | None = None,
        operation_id: str | None = None,
        order: str | None = None,
        ttl: float | None = DEFAULT_TTL,
        durability: Durability | None = None,
    ) -> Receipt:
        """Hold all lines, or none; the reservation is named by the operation id.

        ``ttl`` in seconds; None holds until it is closed and needs an ``operation_id`` of your own. A repeat of a hold that is
        still there answers the first receipt. Raises ``InsufficientStock``, ``UnknownStock``, ``OperationConflict``,
        ``ReservationClosed``, ``OutcomeUnknown``, ``Overloaded``.
        """
        return await self._take("reserve", lines, merchant, operation_id, order, ttl, durability, "")

    async def deduct(
        self,
        lines: Sequence[Line],
        *,
        merchant: str | None = None,
        operation_id: str | None = None,
        order: str | None = None,
        durability: Durability | None = None,
    ) -> Receipt:
        """Sell all lines at once, or none. Raises as ``reserve`` does, except ``ReservationClosed``."""
        return await self._take("deduct", lines, merchant, operation_id, order, None, durability, "")

    async def adjust(
        self,
        lines: Sequence[Line],
        *,
        merchant: str | None = None,
        operation_id: str | None = None,
        reason: str | None = None,
        order: str | None = None,
        durability: Durability | None = None,
    ) -> Receipt:
        """Correct a count. Negative quantities write off and need that much available; positive ones supply.

        All quantities of one call have the same sign.
        """
        receipt = await self.submit(
            Kind.ADJUST,
            merchant=merchant,
            operation_id=operation_id,
            lines=lines,
            order=order,
            reason=reason,
            durability=durability,
        )
        if len(receipt.positions) > 1 and receipt.positions[0].epoch:
            # No function runs with it in hand: nothing will undo it.
            self._engine().in_background(self.keep(receipt), f"keeping of {receipt.operation_id}")
        return receipt

    # What ends or changes a hold -------------------------------------------------------------------------------------------

    async def confirm(
        self,
        reservation: str,
        *,
        lines: Sequence[Line] | None = None,
        operation_id: str | None = None,
        merchant: str | None = None,
        durability: Durability | None = None,
        reacquire: bool = False,
    ) -> Receipt:
        """Reserved → sold: all that is still open, or the part in ``lines``.

        ``ReservationExpired`` when its time ran out; with ``reacquire=True`` (of the whole) it is taken again if it is there.
        """
        return await self._close(Kind.CONFIRM, reservation, lines, operation_id, merchant, durability, None, "r" if reacquire else "")

    async def release(
        self,
        reservation: str,
        *,
        lines: Sequence[Line] | None = None,
        operation_id: str | None = None,
        merchant: str | None = None,
        durability: Durability | None = None,
    ) -> Receipt:
        """Reserved → available: all that is still open, or the part in ``lines``.

        A full release of an unknown reservation raises ``ReservationNotFound`` and closes that name, so that a reserve arriving
        late takes nothing.
        """
        return await self._close(Kind.RELEASE, reservation, lines, operation_id, merchant, durability, None, "")

    async def extend(self, reservation: str, *, ttl: float | None, merchant: str | None = None) -> None:
        """The hold now ends ``ttl`` seconds from now (by Redis' clock); None: when it is closed."""
        check_ttl(ttl)
        await self._change(Kind.EXTEND, reservation, self._merchant(merchant), ttl_ms(ttl))

    # What enters through the ledger ----------------------------------------------------------------------------------------

    async def restock(
        self,
        lines: Sequence[Line],
        *,
        merchant: str | None = None,
        operation_id: str | None = None,
        order: str | None = None,
        reason: str | None = None,
    ) -> Receipt:
        """New units, for sale when this returns. One SQL transaction and one credit; at most ``max_lines`` lines."""
        return await self.submit(Kind.RESTOCK, merchant=merchant, operation_id=operation_id, lines=lines, order=order, reason=reason)

    async def restock_many(
        self, lines: Iterable[Line], *, merchant: str | None = None, operation_id: str, order: str | None = None
    ) -> list[Receipt]:
        """Any number of lines, in operations of at most ``max_lines``. Each part has an id derived from yours, so a repeat after a
        failure goes on where it stopped; the list of lines must then be the same."""
        check_text("operation_id", operation_id)
        home = self._merchant(merchant)
        if order is not None:
            check_text("order", order)
        flat = self._flat(list(lines), home, +1, bulk=True)
        receipts: list[Receipt] = []
        for part, start in enumerate(range(0, len(flat), self._max_lines * 2)):
            piece = flat[start : start + self._max_lines * 2]
            key = key_of(home, f"{operation_id}\x1f{part}")
            receipts.append(await self._enter(Kind.RESTOCK, home, key, piece, order or "", "", {}))
        return receipts

    async def take_back(
        self,
        lines: Sequence[Line],
        *,
        of: str,
        merchant: str | None = None,
        operation_id: str | None = None,
        order: str | None = None,
        reason: str | None = None,
    ) -> Receipt:
        """Sold → available, at most what operation (or reservation) ``of`` sold and has not taken back yet."""
        return await self.submit(
            Kind.TAKE_BACK, merchant=merchant, operation_id=operation_id, lines=lines, order=order, of=of, reason=reason
        )

    # Questions -------------------------------------------------------------------------------------------------------------

    async def level(self, sku: str, *, merchant: str | None = None) -> StockLevel:
        """What Redis says now of one SKU; ``UnknownStock`` if the ledger does not have it."""
        return (await self.levels([sku], merchant=merchant))[sku]

    async def levels(self, skus: Sequence[str], *, merchant: str | None = None) -> dict[str, StockLevel]:
        """Levels of several SKUs of one merchant, one consistent reading (of each partition, with ``partition_by="sku"``)."""
        home = self._merchant(merchant)
        for sku in skus:
            check_text("sku", sku)
        engine = self._engine()
        return await reading.levels(engine, home, skus)

    async def reservation(self, reservation: str, *, merchant: str | None = None) -> Reservation | None:
        """A hold and what became of it; older closed ones are asked of the ledger."""
        check_text("reservation", reservation)
        home = self._merchant(merchant)
        engine = self._engine()
        return await reading.reservation(engine, key_of(home, reservation))

    async def status(self, operation_id: str, *, merchant: str | None = None) -> Receipt | None:
        """The first receipt of an operation, from Redis, the journal or the ledger; None if it is not known to have moved anything."""
        check_text("operation_id", operation_id)
        home = self._merchant(merchant)
        engine = self._engine()
        found = await reading.status(engine, key_of(home, operation_id))
        if found is None:
            return None
        kind, position, order, flat, remaining, parts = found
        level = "redis" if position.epoch else "database"
        if parts:
            signed = -1 if kind == Kind.ADJUST and position.epoch else 1
            all_lines, left = merged(flat, remaining, parts)
            positions = (position, *(Instance(part[0], part[1]).position for part in parts if part[1]))
            return receipt_of(operation_id, kind, home, order, all_lines, left, positions, level, True, signed)
        return receipt(operation_id, public_kind(kind), home, order, flat, remaining, position, level, True)

    # Who sells it -----------------------------------------------------------------------------------------------------------

    async def adopt(self, merchant: str, *, skus: Sequence[str] | None = None) -> int:
        """From now on Redis sells this merchant's stock; how many SKUs went there (0: it did already).

        ``skus``: only these, while its others, and its new ones, stay where they are.

        Safe to repeat, also after a process died half-way, and while others sell: they get ``StockFrozen`` for the moment that it
        takes. Raises ``StockFrozen`` while the partition is being recovered, ``InvalidOperation`` while a reservation joins this
        stock with other stock that stays on the database.
        """
        home = check_text("merchant", merchant)
        engine = self._engine()
        fields = _fields(home, skus)
        partition = _handing(engine, home)
        return await self._handed(engine, handover.adopt(engine, partition, home, fields), f"adopt {home}")

    async def withdraw(self, merchant: str, *, skus: Sequence[str] | None = None) -> int:
        """From now on the database sells this merchant's stock, under row locks; how many SKUs went there (0: it did already).

        ``skus``: only these, while its others, and its new ones, stay where they are.

        This drains: Redis refuses (``StockFrozen``) from the start, and the database sells once it has applied all that Redis did,
        for which a worker must run. Safe to repeat, also after a process died half-way. ``DurabilityNotReached`` when the ledger
        does not catch up and ``InvalidOperation`` while a reservation joins this stock with other stock that stays in Redis: Redis then
        sells on. ``StockFrozen`` while the partition is being recovered.
        """
        home = check_text("merchant", merchant)
        fields = _fields(home, skus)
        engine = self._engine()
        partition = _handing(engine, home)

        async def settled(position: Position) -> None:
            await self._reach(engine, position, "settled", "", None)

        return await self._handed(engine, handover.withdraw(engine, partition, home, settled, fields), f"withdraw {home}")

    async def _handed(self, engine: Engine, work: Coroutine[Any, Any, int], name: str) -> int:
        # A caller who goes away half-way must not leave a merchant that nobody sells.
        return await asyncio.shield(engine.in_background(work, name))

    async def frozen(self, *, limit: int = 1000) -> list[reading.FrozenStock]:
        """SKUs that sell nothing until ``reopen`` has compared them, of all merchants, at most ``limit``."""
        return await reading.frozen(self._engine(), limit)

    async def reopen(self, sku: str, *, merchant: str | None = None) -> None:
        """Unfreeze a SKU that a refusal of the ledger froze, after comparing Redis and ledger; ``QuantityMismatch`` if they differ."""
        check_text("sku", sku)
        home = self._merchant(merchant)
        engine = self._engine()
        field = key_of(home, sku)

        async def settled(position: Position) -> None:
            await self._reach(engine, position, "settled", "", None)

        await reading.reopen(engine, engine.place(field), field, settled)


def _handing(engine: Engine, merchant: str) -> Partition:
    if engine.layout.apart:
        why = "with partition_by='sku' stock is admitted in Redis: a handover moves one partition, and a merchant has several"
        raise InvalidOperation("merchant", merchant, why)
    return engine.place(key_of(merchant, ""))


def _fields(merchant: str, skus: Sequence[str] | None) -> list[str] | None:
    if skus is None:
        return None
    if isinstance(skus, str) or not skus:
        raise InvalidOperation("skus", skus, "must be a list of at least one SKU, or None: all of the merchant's")
    return [key_of(merchant, check_text("sku", sku)) for sku in skus]
