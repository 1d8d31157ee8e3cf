"""What every room of the ledger needs to reach the rows: the tables, and this database's way with many of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Table
from sqlalchemy.dialects import mysql, postgresql, sqlite

from inventory_sdk.ledger.dialects import Bulk
from inventory_sdk.ledger.schema import Tables

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

OPEN: Final = "open"
"""The newest epoch; takes are applied, SQL-first operations may enter."""
REBUILDING: Final = "rebuilding"
"""The newest epoch, while Redis is filled."""
DRAINING: Final = "draining"
"""An older epoch whose last entries are still applied."""
CLOSED: Final = "closed"
LEDGER: Final = "ledger"
"""Epoch 0: SQL-first operations."""

REDIS: Final = "redis"
"""Admission: Redis sells it."""
ARRIVING: Final = "arriving"
"""Nobody sells it until Redis has been given its balances, holds and results."""
DATABASE: Final = "database"
"""The ledger sells it, under row locks."""

MADE: Final = "made"
PENDING: Final = "pending"

_NOW_MS: Final = {
    "postgresql": "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint",
    "mysql": "SELECT FLOOR(UNIX_TIMESTAMP(SYSDATE(3)) * 1000)",
    "mariadb": "SELECT FLOOR(UNIX_TIMESTAMP(SYSDATE(3)) * 1000)",
    "sqlite": "SELECT CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)",
}

_ENCODE: Final = json.JSONEncoder(separators=(",", ":")).encode


def dumps(value: Any) -> str:
    """Compact JSON in ASCII, which survives any connection charset."""
    return _ENCODE(value)


def clean(text: str) -> str:
    """Free text (a reason, an error) that every database takes: PostgreSQL refuses NUL, no driver encodes a lone surrogate,
    and a journal entry that can't be stored would hold the worker for ever."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


@dataclass(frozen=True, slots=True)
class Store:
    """Tables and bulk statements."""

    tables: Tables
    bulk: Bulk
    dialect: str
    admission: str = REDIS
    """Of merchants that the ledger sees for the first time."""

    async def now_ms(self, connection: AsyncConnection) -> int:
        """The database's clock, in milliseconds since 1970."""
        return int((await connection.exec_driver_sql(_NOW_MS[self.dialect])).scalar_one())

    async def insert_if_absent(self, connection: AsyncConnection, table: Table, values: dict[str, Any]) -> None:
        """Waits for an open transaction that inserted the same key; afterwards the row is there, this one or the other."""
        statement: Any
        if self.dialect == "postgresql":
            statement = postgresql.insert(table).values(**values).on_conflict_do_nothing()
        elif self.dialect == "sqlite":
            statement = sqlite.insert(table).values(**values).on_conflict_do_nothing()
        else:
            # Not INSERT IGNORE, which would turn every other error into a warning too.
            first = table.primary_key.columns.values()[0]
            statement = mysql.insert(table).values(**values).on_duplicate_key_update({first.name: first})
        await connection.execute(statement)
