"""The register of discrepancies: what was found, what became of it, who did what, and what a sink could not take."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, func, insert, select, update

from inventory_sdk.errors import InventoryError
from inventory_sdk.ledger.accounts import AuditRow, NewRow, Row
from inventory_sdk.ledger.apply import call_writes
from inventory_sdk.ledger.engines import Engines
from inventory_sdk.ledger.protocol import WritesStock
from inventory_sdk.ledger.store import Store, clean, dumps
from inventory_sdk.model import Movement

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

OPEN: Final = "open"
CORRECTING: Final = "correcting"
LIVE: Final = (OPEN, CORRECTING)
"""States in which the subject is taken."""
CHUNK: Final = 500


class AnotherState(InventoryError):
    """The discrepancy is not in the state that this act begins from."""


def _now() -> int:
    return time.time_ns() // 1_000_000


class Register:
    """Every method is one transaction, and safe to repeat."""

    def __init__(self, engines: Engines, store: Store) -> None:
        self._engines = engines
        self._store = store
        self._table = store.tables.discrepancy

    # Discrepancies -------------------------------------------------------------------------------------------------------------

    async def keep(self, found: Sequence[NewRow]) -> list[tuple[Row, bool]]:
        """A row for each, and whether it is new. One that is open already is brought up to date; one that is being corrected stays."""
        table, kept = self._table, []
        for start in range(0, len(found), CHUNK):
            part = found[start : start + CHUNK]
            async with self._engines.write() as connection:
                before = await self._by_subject(connection, [each.subject for each in part])
                for each in part:
                    row = before.get(each.subject)
                    if row is None:
                        values = {
                            "merchant": each.merchant, "sku": each.sku, "kind": each.kind, "state": OPEN, "subject": each.subject,
                            "details": dumps(each.details), "created_ms": _now(),
                        }  # fmt: skip
                        await self._store.insert_if_absent(connection, table, values)
                    elif row.state == OPEN and (row.kind, row.details) != (each.kind, each.details):
                        changed = update(table).where(table.c.number == row.number, table.c.state == OPEN)
                        await connection.execute(changed.values(kind=each.kind, details=dumps(each.details)))
                after = await self._by_subject(connection, [each.subject for each in part])
                kept += [(after[each.subject], each.subject not in before) for each in part if each.subject in after]
        return kept

    async def _by_subject(self, connection: AsyncConnection, subjects: Sequence[str]) -> dict[str, Row]:
        found = await connection.execute(select(*self._columns()).where(self._table.c.subject.in_(subjects)))
        return {str(row.subject): row for row in map(_row, found)}

    def _columns(self) -> list[Any]:
        names = ("number", "merchant", "sku", "kind", "subject", "state", "details", "created_ms", "resolved_ms")
        return [self._table.c[name] for name in names]

    async def find(
        self,
        *,
        merchant: str | None = None,
        sku: str | None = None,
        kind: str | None = None,
        state: str | None = None,
        subjects: Sequence[str] | None = None,
        limit: int = 50,
        after: int | None = None,
    ) -> list[Row]:
        """Newest first, those with a smaller number than ``after``."""
        table = self._table
        query = select(*self._columns())
        for column, value in ((table.c.merchant, merchant), (table.c.sku, sku), (table.c.kind, kind)):
            if value is not None:
                query = query.where(column == value)
        if state is not None:
            query = query.where(table.c.state.in_(LIVE) if state == OPEN else table.c.state == state)
        if subjects is not None:
            query = query.where(table.c.subject.in_(list(subjects)))
        if after is not None:
            query = query.where(table.c.number < after)
        async with self._engines.read() as connection:
            return [_row(row) for row in await connection.execute(query.order_by(table.c.number.desc()).limit(limit))]

    async def counted(self) -> dict[str, int]:
        """How many are open, by kind."""
        table = self._table
        query = select(table.c.kind, func.count()).where(table.c.state.in_(LIVE)).group_by(table.c.kind)
        async with self._engines.read() as connection:
            return {str(kind): int(number) for kind, number in await connection.execute(query)}

    async def get(self, number: int) -> Row | None:
        """The row of this number."""
        async with self._engines.read() as connection:
            return await self._get(connection, number)

    async def _get(self, connection: AsyncConnection, number: int) -> Row | None:
        row = (await connection.execute(select(*self._columns()).where(self._table.c.number == number))).first()
        return None if row is None else _row(row)

    async def gone(self, numbers: Sequence[int]) -> int:
        """These open ones were looked at and are no more; how many."""
        table, ended = self._table, 0
        async with self._engines.write() as connection:
            for start in range(0, len(numbers), CHUNK):
                where = (table.c.number.in_(numbers[start : start + CHUNK]), table.c.state == OPEN)
                done = await connection.execute(update(table).where(*where).values(state="gone", subject=None, resolved_ms=_now()))
                ended += done.rowcount
        return ended

    async def turn(
        self,
        number: int,
        begins: Sequence[str],
        ends: str,
        details: Mapping[str, Any],
        audit: Mapping[str, Any] | None = None,
        writes: Sequence[WritesStock] = (),
        movements: Sequence[Movement] = (),
    ) -> Row:
        """From one of ``begins`` to ``ends``, with a row of audit (``kind``, ``actor``, ``operation_id``, ``details``, ``units``) and,
        for the service's own tables, a call of ``writes``: all or nothing. ``AnotherState`` where it stands elsewhere."""
        table = self._table
        async with self._engines.write() as connection:
            locked = select(table.c.state).where(table.c.number == number).with_for_update()
            state = (await connection.execute(locked)).scalar()
            if state not in begins:
                raise AnotherState(f"discrepancy {number} is {state or 'unknown'}, not {' or '.join(begins)}")
            row = await self._get(connection, number)
            assert row is not None
            now = {**row.details, **details}
            subject, resolved_ms = (row.subject, row.resolved_ms) if ends in LIVE else (None, _now())
            values = {"state": ends, "details": dumps(now), "subject": subject, "resolved_ms": resolved_ms}
            await connection.execute(update(table).where(table.c.number == number).values(**values))
            if audit is not None:
                await self._note(connection, row.merchant, row.sku, audit)
            if movements:
                await call_writes(connection, writes, movements)
            return replace(row, state=ends, details=now, subject=subject, resolved_ms=resolved_ms)

    # Audit -----------------------------------------------------------------------------------------------------------------------

    async def _note(self, connection: AsyncConnection, merchant: str, sku: str | None, audit: Mapping[str, Any]) -> None:
        values = {
            "merchant": merchant, "sku": sku, "kind": audit["kind"], "actor": audit["actor"], "operation_id": audit.get("operation_id"),
            "details": dumps(audit["details"]), "units": audit.get("units", 0), "created_ms": _now(),
        }  # fmt: skip
        await connection.execute(insert(self._store.tables.audit).values(**values))

    async def audits(self, limit: int, after: int | None = None) -> list[AuditRow]:
        """Newest first, those with a smaller number than ``after``."""
        table = self._store.tables.audit
        names = ("number", "merchant", "sku", "kind", "actor", "operation_id", "details", "created_ms")
        query = select(*(table.c[name] for name in names)).order_by(table.c.number.desc()).limit(limit)
        if after is not None:
            query = query.where(table.c.number < after)
        async with self._engines.read() as connection:
            found = (await connection.execute(query)).mappings()
            return [AuditRow(**{**row, "details": _parsed(row["details"])}) for row in found]

    async def spent(self, merchant: str, since_ms: int) -> int:
        """Units that corrections of a merchant have moved since then."""
        table = self._store.tables.audit
        query = select(func.coalesce(func.sum(table.c.units), 0)).where(table.c.merchant == merchant, table.c.created_ms >= since_ms)
        async with self._engines.read() as connection:
            return int((await connection.execute(query)).scalar_one())

    # What a run remembers ----------------------------------------------------------------------------------------------------------

    async def remembered(self, name: str) -> dict[str, Any]:
        """What was remembered under this name; empty if nothing was."""
        table = self._store.tables.setting
        async with self._engines.read() as connection:
            text = (await connection.execute(select(table.c.value).where(table.c.name == name))).scalar()
        return _parsed(text) if text else {}

    async def remember(self, name: str, value: Mapping[str, Any]) -> None:
        """From now on."""
        table = self._store.tables.setting
        async with self._engines.write() as connection:
            await self._store.insert_if_absent(connection, table, {"name": name, "value": dumps(value)})
            await connection.execute(update(table).where(table.c.name == name).values(value=dumps(value)))

    # Letters -----------------------------------------------------------------------------------------------------------------------

    async def post(self, sink: str, documents: Sequence[Mapping[str, Any]]) -> None:
        """Keep what a sink could not take."""
        values = [{"sink": sink, "document": dumps(each), "created_ms": _now()} for each in documents]
        if values:
            async with self._engines.write() as connection:
                await connection.execute(insert(self._store.tables.letter), values)

    async def letters(self, sink: str, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """The oldest that wait for this sink."""
        table = self._store.tables.letter
        query = select(table.c.number, table.c.document).where(table.c.sink == sink).order_by(table.c.number).limit(limit)
        async with self._engines.read() as connection:
            return [(number, _parsed(document)) for number, document in await connection.execute(query)]

    async def delivered(self, numbers: Sequence[int]) -> None:
        """They have arrived."""
        table = self._store.tables.letter
        if numbers:
            async with self._engines.write() as connection:
                await connection.execute(delete(table).where(table.c.number.in_(list(numbers))))


def _parsed(text: str) -> dict[str, Any]:
    """JSON where it is ours; other rooms write plain words."""
    try:
        value = json.loads(text)
    except ValueError:
        return {"text": clean(text)}
    return value if isinstance(value, dict) else {"text": text}


def _row(row: Any) -> Row:
    number, merchant, sku, kind, subject, state, details, created_ms, resolved_ms = row
    return Row(number, merchant, sku, kind, subject, state, _parsed(details), created_ms, resolved_ms)
