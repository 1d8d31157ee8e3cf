"""The register of discrepancies: what was found, what became of it, who did what, and what a sink could not take."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, func, insert, or_, select, update

from inventory_sdk.ledger.accounts import AnotherState, AuditRow, NewRow, OverLimit, Row
from inventory_sdk.ledger.apply import call_writes
from inventory_sdk.ledger.engines import Engines
from inventory_sdk.ledger.protocol import WritesStock
from inventory_sdk.ledger.store import Store, clean, dumps
from inventory_sdk.model import Movement

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["Acts", "AnotherState", "Letters", "OverLimit", "Register"]

OPEN: Final = "open"
CORRECTING: Final = "correcting"
UNDOING: Final = "undoing"
LIVE: Final = (OPEN, CORRECTING)
"""States in which the subject is taken."""
CHUNK: Final = 500
LIMITS: Final = "reconcile:limits"
"""The setting whose row is locked while a correction is held against its limit: two at once would each be within it."""
NEW: Final = "reconcile:new"
"""The setting whose row is locked while new discrepancies are kept: of two that find the same, one has found it first."""

Letters = Callable[[Row], Sequence[tuple[str, Mapping[str, Any]]]]
"""(sink, document) of what has become of a row: they are kept in its transaction, so that whoever dies afterwards has told it."""


@dataclass(frozen=True, slots=True)
class Acts:
    """What people do, as it stood before a look: the newest act, and what (merchant, SKU) is being corrected or undone."""

    newest: int
    under_way: frozenset[tuple[str, str | None]]


def _now() -> int:
    return time.time_ns() // 1_000_000


class Register:
    """Every method is one transaction, and safe to repeat."""

    def __init__(self, engines: Engines, store: Store) -> None:
        self._engines = engines
        self._store = store
        self._table = store.tables.discrepancy

    # Discrepancies -------------------------------------------------------------------------------------------------------------

    async def keep(self, found: Sequence[NewRow], letters: Letters | None = None, before: Acts | None = None) -> list[tuple[Row, bool]]:
        """A row for each, and whether it is new. One that is open already is brought up to date; one that is being corrected stays.
        ``before``: how acts stood before the look. What was acted on since then is left out: the look may not have seen it."""
        table, kept = self._table, []
        for start in range(0, len(found), CHUNK):
            part = found[start : start + CHUNK]
            async with self._engines.write() as connection:
                known = await self._by_subject(connection, [each.subject for each in part])
                if len(known) < len({each.subject for each in part}):
                    await self._alone(connection, NEW)
                    known = await self._by_subject(connection, [each.subject for each in part])
                acted = await self._acted_since(connection, before, part) if before is not None else set()
                part = [each for each in part if each.subject in known or (each.merchant, each.sku) not in acted]
                for each in part:
                    row = known.get(each.subject)
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
                now = [(after[each.subject], each.subject not in known) for each in part if each.subject in after]
                await self._post(connection, letters, [row for row, new in now if new])
                kept += now
        return kept

    async def acts(self) -> Acts:
        """As they stand now."""
        audit, table = self._store.tables.audit, self._table
        async with self._engines.read() as connection:
            # Asked first: an act that begins in between is newer, and one that has begun before is under way, or done.
            newest = (await connection.execute(select(func.coalesce(func.max(audit.c.number), 0)))).scalar_one()
            under_way = await connection.execute(select(table.c.merchant, table.c.sku).where(table.c.state.in_((CORRECTING, UNDOING))))
            return Acts(int(newest), frozenset((merchant, sku) for merchant, sku in under_way))

    async def _acted_since(self, connection: AsyncConnection, before: Acts, found: Sequence[NewRow]) -> set[tuple[str, str | None]]:
        audit = self._store.tables.audit
        merchants = {each.merchant for each in found}
        where = (audit.c.number > before.newest, audit.c.merchant.in_(merchants), audit.c.kind.in_(("correct", "undo")))
        query = select(audit.c.merchant, audit.c.sku).where(*where)
        return {(merchant, sku) for merchant, sku in await connection.execute(query)} | before.under_way

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

    async def gone(self, numbers: Sequence[int], letters: Letters | None = None) -> list[Row]:
        """These were looked at and are no more; those of them that were still open, as they are now."""
        table, ended = self._table, []
        for start in range(0, len(numbers), CHUNK):
            async with self._engines.write() as connection:
                where = (table.c.number.in_(numbers[start : start + CHUNK]), table.c.state == OPEN)
                locked = await connection.execute(select(*self._columns()).where(*where).order_by(table.c.number).with_for_update())
                values: dict[str, Any] = {"state": "gone", "subject": None, "resolved_ms": _now()}
                now = [replace(_row(row), **values) for row in locked]
                if now:
                    await connection.execute(update(table).where(table.c.number.in_([row.number for row in now])).values(**values))
                await self._post(connection, letters, now)
                ended += now
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
        limit: tuple[int, int] | None = None,
        letters: Letters | None = None,
    ) -> Row:
        """From one of ``begins`` to ``ends``, with a row of audit (``kind``, ``actor``, ``operation_id``, ``details``, ``units``) and,
        for the service's own tables, a call of ``writes``: all or nothing. ``limit``: most units of the merchant's corrections, and
        since when (ms) they count. ``AnotherState`` where it stands elsewhere, ``OverLimit``."""
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
            if limit is not None and audit is not None:
                await self._within(connection, row.merchant, audit.get("units", 0), *limit)
            if audit is not None:
                await self._note(connection, row.merchant, row.sku, audit)
            if movements:
                await call_writes(connection, writes, movements)
            turned = replace(row, state=ends, details=now, subject=subject, resolved_ms=resolved_ms)
            await self._post(connection, letters, [turned])
            return turned

    async def _alone(self, connection: AsyncConnection, name: str) -> None:
        """Until the end of the transaction nobody else is here."""
        setting = self._store.tables.setting
        await self._store.insert_if_absent(connection, setting, {"name": name, "value": "{}"})
        await connection.execute(select(setting.c.value).where(setting.c.name == name).with_for_update())

    async def _within(self, connection: AsyncConnection, merchant: str, units: int, most: int, since_ms: int) -> None:
        await self._alone(connection, LIMITS)
        spent = await self._spent(connection, merchant, since_ms)
        if spent + units > most:
            raise OverLimit(spent + units)

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
        async with self._engines.read() as connection:
            return await self._spent(connection, merchant, since_ms)

    async def _spent(self, connection: AsyncConnection, merchant: str, since_ms: int) -> int:
        table = self._store.tables.audit
        mine = (table.c.merchant == merchant, table.c.created_ms >= since_ms)
        # What was refused after all names its correction: it comes later, so it may not count for less than nothing on its own.
        refused = select(table.c.operation_id).where(*mine, table.c.kind == "refused", table.c.operation_id.is_not(None))
        counted = or_(table.c.operation_id.is_(None), table.c.operation_id.not_in(refused))
        query = select(func.coalesce(func.sum(table.c.units), 0)).where(*mine, table.c.units > 0, counted)
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
        """Keep documents for a sink."""
        async with self._engines.write() as connection:
            await self._insert_letters(connection, [(sink, each) for each in documents])

    async def _post(self, connection: AsyncConnection, letters: Letters | None, changed: Sequence[Row]) -> None:
        if letters is not None:
            await self._insert_letters(connection, [letter for row in changed for letter in letters(row)])

    async def _insert_letters(self, connection: AsyncConnection, letters: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        values = [{"sink": sink, "document": dumps(document), "created_ms": _now()} for sink, document in letters]
        if values:
            await connection.execute(insert(self._store.tables.letter), values)

    async def letters(self, sink: str, limit: int, after: int = 0) -> list[tuple[int, int, dict[str, Any]]]:
        """The oldest that wait for this sink, behind number ``after``: (number, Unix ms, document)."""
        table = self._store.tables.letter
        columns = (table.c.number, table.c.created_ms, table.c.document)
        query = select(*columns).where(table.c.sink == sink, table.c.number > after).order_by(table.c.number).limit(limit)
        async with self._engines.read() as connection:
            return [(number, at_ms, _parsed(document)) for number, at_ms, document in await connection.execute(query)]

    async def delivered(self, numbers: Sequence[int], aside: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> None:
        """They have arrived, or (sink, document) are kept ``aside`` in their place."""
        table = self._store.tables.letter
        if numbers:
            async with self._engines.write() as connection:
                await self._insert_letters(connection, aside)
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
