"""What Redis must know of single SKUs that arrive, where their merchants' others stay: read by field, back to their last stay in Redis.

A merchant that moves as a whole is read by merchant (``admission.Reading``). One hot SKU can't wait for that: nobody sells it meanwhile.
Its changes are one chain, so what the ledger did while it sold the SKU is the end of that chain: what stands behind its last change
that came from Redis. All before that Redis knows already.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from sqlalchemy import and_, func, or_, select

from inventory_sdk.ledger import rows
from inventory_sdk.ledger.admission import Reading
from inventory_sdk.ledger.decide import APPLIED, CLAIMING, UNDONE
from inventory_sdk.ledger.protocol import OperationRow
from inventory_sdk.model import Kind, split_key


class FieldReading(Reading):
    """See ``protocol.Arrivals``; for fields instead of merchants."""

    async def results(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        kept = [row for row in await self._done_here(claimed=True) if row.at_ms >= since_ms and row.status == APPLIED]
        for at in range(0, len(kept), size):
            yield kept[at : at + size]

    async def forgotten(self, size: int, since_ms: int) -> AsyncIterator[Sequence[OperationRow]]:
        """Takes of an earlier stay in Redis that were undone here: Redis would still answer them."""
        done = await self._done_here()
        here = {row.key for row in done if row.kind != Kind.UNDO}
        keys = sorted({row.reference for row in done if row.kind == Kind.UNDO and row.reference not in here})
        table = self._store.tables.operation
        for at in range(0, len(keys), size):
            part = [split_key(key) for key in keys[at : at + size]]
            query = select(*rows.operation_columns(self._store)).where(
                table.c.partition == self._partition,
                table.c.at_ms >= since_ms,
                table.c.status == UNDONE,
                table.c.claim.is_(None),
                table.c.kind.in_(sorted(CLAIMING)),
                or_(*(and_(table.c.merchant == merchant, table.c.operation_id == name) for merchant, name in part)),
            )
            found = [rows.operation_row(row) for row in await self._connection.execute(query)]
            if found:
                yield found

    async def _done_here(self, claimed: bool = False) -> list[OperationRow]:
        """The ledger's own operations at the end of each field's chain, in order; only those that hold their ids if ``claimed``."""
        change, table = self._store.tables.change, self._store.tables.operation
        found: dict[tuple[int, int], OperationRow] = {}
        for name in self._fields:
            merchant, sku = split_key(name)
            this = (change.c.merchant == merchant, change.c.sku == sku)
            last = select(func.max(change.c.version)).where(*this, change.c.epoch > 0)
            version = (await self._connection.execute(last)).scalar() or 0
            query = (
                select(*rows.operation_columns(self._store))
                .select_from(change)
                .join(
                    table,
                    and_(
                        table.c.partition == change.c.partition,
                        table.c.epoch == change.c.epoch,
                        table.c.seq == change.c.seq,
                        table.c.index == change.c.index,
                    ),
                )
                .where(*this, change.c.version > version, change.c.epoch == 0)
                .order_by(change.c.version)
            )
            if claimed:
                query = query.where(table.c.claim.is_not(None))
            for row in await self._connection.execute(query):
                read = rows.operation_row(row)
                found.setdefault((read.position.sequence, read.index), read)
        return [found[at] for at in sorted(found)]
