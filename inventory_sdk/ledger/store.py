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

MADE: Final = "made"
PENDING: Final = "pending"

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
