"""Live reservations: Redis against itself (does anything end them?) and against the ledger (are they there?)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.beside import Ground
from inventory_sdk.ledger.protocol import ReservationRow
from inventory_sdk.model import Position
from inventory_sdk.reconcile.comparing import PATIENCE
from inventory_sdk.reconcile.model import Cause, Finding, What
from inventory_sdk.reconcile.redis_side import Holds, read_holds, remembered
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.records import RS

if TYPE_CHECKING:
    from inventory_sdk.ledger.comparing import Comparing

PAGE: Final = 500
LATE_MS: Final = 1000
"""A hold that ends so much later than its record says has lost its time."""


class HoldLook:
    """Looks at reservations of one Inventory in one event loop."""

    def __init__(self, ground: Ground, comparing: Comparing) -> None:
        self._ground = ground
        self._comparing = comparing

    async def pages(self, partition: Partition, merchant: str | None) -> AsyncIterator[list[ReservationRow]]:
        """All that the ledger believes to be held."""
        after: str | None = None
        while rows := await self._comparing.held(partition.number, after, PAGE, merchant):
            yield rows
            after = rows[-1].key

    async def look(self, partition: Partition, rows: Sequence[ReservationRow]) -> list[Finding] | None:
        """What is wrong with these; None while the partition is not open."""
        rows = await self._in_redis(rows)
        if not rows:
            return []
        holds = await read_holds(partition, [row.key for row in rows])
        if holds.state != "open":
            return None
        found: list[Finding] = []
        absent: list[ReservationRow] = []
        for row, record, due in zip(rows, holds.records, holds.due, strict=True):
            if record is None:
                absent.append(row)
            elif (evidence := unending(record, due)) is not None:
                found.append(Finding(What.HOLD, row.key, Cause.EXPIRY_LOST, evidence=evidence | {"order": row.order}))
        if absent:
            found += await self._absent(partition, holds, absent)
        return found

    async def _in_redis(self, rows: Sequence[ReservationRow]) -> list[ReservationRow]:
        """Without those that the ledger runs, and those that ``reads_stock`` handed over (they come with their stock)."""
        fields = {row.lines[at] for row in rows for at in range(0, len(row.lines), 5)}
        elsewhere = {place.field for place in await self._comparing.places(sorted(fields)) if place.admission != "redis"}
        return [row for row in rows if row.position.epoch and not any(row.lines[at] in elsewhere for at in range(0, len(row.lines), 5))]

    async def _absent(self, partition: Partition, holds: Holds, rows: Sequence[ReservationRow]) -> list[Finding]:
        """Not in Redis: closed, and the ledger about to hear of it, or lost."""
        position = Position(partition.number, holds.epoch, holds.sequence)
        await self._ground.watermark.reached(position, PATIENCE)
        now = {row.key: row for row in await self._comparing.holds([row.key for row in rows])}
        # The ledger has all that Redis had done when it was asked: what is held here was not closed there.
        lost = [row for row in rows if row.key in now and now[row.key].state == "held" and now[row.key].position == row.position]
        if not lost:
            return []
        again = await read_holds(partition, [row.key for row in lost])
        if again.state != "open" or again.epoch != holds.epoch:
            return []
        lost = [row for row, record in zip(lost, again.records, strict=True) if record is None]
        known = await remembered(partition, [row.key for row in lost])
        return [
            Finding(
                What.HOLD,
                row.key,
                Cause.MANUAL_REDIS if there else Cause.WENT_BACK,
                evidence={"record": "missing", "order": row.order, "reserve_remembered": there},
            )
            for row, there in zip(lost, known, strict=True)
        ]


def unending(record: str, due: int | None) -> dict[str, Any] | None:
    """Why nothing ends this hold in time; None where something does, or nothing should."""
    state, position, _, ends, *_ = record.split(RS)
    if state == "p":
        return {"state": "p", "position": position, "expiry": "missing"} if due is None else None
    if state != "h" or ends == "0":
        return None
    if due is None:
        return {"state": "h", "position": position, "expires_at": int(ends), "expiry": "missing"}
    if due > int(ends) + LATE_MS:
        return {"state": "h", "position": position, "expires_at": int(ends), "expiry": due}
    return None
