"""Statements over many rows at once, in each database's own way.

One statement per table and batch, whatever its size: PostgreSQL takes arrays (``unnest``), MySQL and MariaDB one long VALUES or
UNION, SQLite ``executemany`` (no server, so no round trip). They go to the driver as they are: SQLAlchemy's per-row parameter
processing would cost more than the database does.

Names in the statements are those of our own tables, quoted; values always travel as parameters (hence the ignored S608).
A write that touched another number of rows than it was given raises ``QuantityMismatch``: nothing is taken on trust.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

from sqlalchemy import BigInteger, Boolean, Dialect, Integer, Table
from sqlalchemy.exc import DBAPIError, IntegrityError

from inventory_sdk.errors import InventoryError, QuantityMismatch
from inventory_sdk.ledger.schema import Key

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

Row = tuple[Any, ...]
Lock = Literal["", "update", "share"]

KNOWN: Final = "the ledger runs on postgresql, mysql (MariaDB) and sqlite"

COPIED: Final = 32
"""Rows from which COPY is worth its round trip. Its binary rows cost asyncpg a third of what the same arrays do."""

CHUNK: Final = 500
"""Rows per statement where a statement grows with its rows."""


class Bulk(ABC):
    """How one database reads and writes many rows in one statement. Keys are tuples, one value per key column."""

    def __init__(self, dialect: Dialect) -> None:
        self._quote = dialect.identifier_preparer.quote
        # One cache per instance: an lru_cache on the methods would keep every ledger of the process alive.
        self._sql = lru_cache(maxsize=256)(self._compose)

    @abstractmethod
    def _compose(self, what: str, table: Table, keys: Row, columns: Row, option: Any, count: int) -> str: ...

    @abstractmethod
    async def insert(self, connection: AsyncConnection, table: Table, columns: Row, rows: Sequence[Sequence[Any]]) -> None:
        """All rows or an error."""

    @abstractmethod
    async def update(
        self, connection: AsyncConnection, table: Table, keys: Row, columns: Row, rows: Sequence[Row], add: bool = False
    ) -> None:
        """Rows are key values followed by column values; ``add`` adds them to what is there. Every row must exist."""

    async def add(self, connection: AsyncConnection, table: Table, keys: Row, columns: Row, rows: Sequence[Row], names: Row) -> list[Row]:
        """``update`` with ``add``, and what stands there afterwards: ``names`` of these rows, in any order."""
        await self.update(connection, table, keys, columns, rows, add=True)
        return await self.select(connection, table, names, keys, [row[: len(keys)] for row in rows])

    @abstractmethod
    async def select(
        self, connection: AsyncConnection, table: Table, columns: Row, keys: Row, values: Iterable[Row], lock: Lock = ""
    ) -> list[Row]:
        """The rows that exist; with a lock, taken and answered in order of their keys."""

    @abstractmethod
    async def delete(self, connection: AsyncConnection, table: Table, keys: Row, values: Sequence[Row]) -> None:
        """Every row must exist."""

    def _names(self, columns: Iterable[str], alias: str = "") -> str:
        return ", ".join(alias + self._quote(name) for name in columns)

    def _equal(self, keys: Iterable[str], left: str = "t.", right: str = "d.") -> str:
        return " AND ".join(f"{left}{self._quote(name)} = {right}{self._quote(name)}" for name in keys)


def _counted(table: Table, asked: int, found: int) -> None:
    if asked != found:
        raise QuantityMismatch([(f"rows of {table.name}", asked, found)])


class PostgresqlBulk(Bulk):
    """One array per column."""

    @staticmethod
    def _array(table: Table, column: str) -> str:
        kind = table.c[column].type
        if isinstance(kind, Boolean):
            return "boolean[]"
        if isinstance(kind, BigInteger):
            return "bigint[]"
        return "integer[]" if isinstance(kind, Integer) else "text[]"

    def _unnest(self, table: Table, columns: Row) -> str:
        arrays = ", ".join(f"${at}::{self._array(table, name)}" for at, name in enumerate(columns, 1))
        return f"unnest({arrays}) AS d({self._names(columns)})"

    def _compose(self, what: str, table: Table, keys: Row, columns: Row, option: Any, count: int) -> str:
        name = self._quote(table.name)
        if what == "insert":
            named = self._names(columns)
            return f"INSERT INTO {name} ({named}) SELECT {named} FROM {self._unnest(table, columns)}"  # noqa: S608
        source = self._unnest(table, keys)
        if what == "delete":
            return f"DELETE FROM {name} AS t USING {source} WHERE {self._equal(keys)}"  # noqa: S608
        if what == "update":
            plus = "t.{0} + d.{0}" if option else "d.{0}"
            setting = ", ".join(f"{self._quote(c)} = {plus.format(self._quote(c))}" for c in columns)
            changed = f"UPDATE {name} AS t SET {setting} FROM {self._unnest(table, keys + columns)} WHERE {self._equal(keys)}"  # noqa: S608
            return f"{changed} RETURNING {self._names(option, 't.')}" if isinstance(option, tuple) else changed
        chosen = f"SELECT {self._names(columns, 't.')} FROM {name} AS t"  # noqa: S608
        if len(keys) == 1:
            chosen += f" WHERE t.{self._quote(keys[0])} = ANY($1::{self._array(table, keys[0])})"
        else:
            chosen += f" JOIN {source} ON {self._equal(keys)}"
        if not option:
            return chosen
        return f"{chosen} ORDER BY {self._names(keys, 't.')} FOR {option.upper()} OF t"

    async def insert(self, connection: AsyncConnection, table: Table, columns: Row, rows: Sequence[Sequence[Any]]) -> None:
        if len(rows) < COPIED:
            if rows:
                sql = self._sql("insert", table, (), columns, None, 0)
                done = await connection.exec_driver_sql(sql, tuple(zip(*rows, strict=True)))
                _counted(table, len(rows), done.rowcount)
            return
        import asyncpg

        raw = await connection.get_raw_connection()
        driver: Any = raw.driver_connection
        try:
            done = await driver.copy_records_to_table(table.name, records=rows, columns=columns)
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            kind = IntegrityError if isinstance(error, asyncpg.IntegrityConstraintViolationError) else DBAPIError
            raise kind(f"COPY {table.name}", None, error) from error
        _counted(table, len(rows), int(done.rpartition(" ")[2]))

    async def update(
        self, connection: AsyncConnection, table: Table, keys: Row, columns: Row, rows: Sequence[Row], add: bool = False
    ) -> None:
        if rows:
            sql = self._sql("update", table, keys, columns, add, 0)
            done = await connection.exec_driver_sql(sql, tuple(zip(*rows, strict=True)))
            _counted(table, len(rows), done.rowcount)

    async def select(
        self, connection: AsyncConnection, table: Table, columns: Row, keys: Row, values: Iterable[Row], lock: Lock = ""
    ) -> list[Row]:
        asked = list(values)
        if not asked:
            return []
        sql = self._sql("select", table, keys, columns, lock, 0)
        found = await connection.exec_driver_sql(sql, tuple(zip(*asked, strict=True)))
        return [tuple(row) for row in found]

    async def delete(self, connection: AsyncConnection, table: Table, keys: Row, values: Sequence[Row]) -> None:
        if values:
            sql = self._sql("delete", table, keys, (), None, 0)
            done = await connection.exec_driver_sql(sql, tuple(zip(*values, strict=True)))
            _counted(table, len(values), done.rowcount)

    async def add(self, connection: AsyncConnection, table: Table, keys: Row, columns: Row, rows: Sequence[Row], names: Row) -> list[Row]:
        sql = self._sql("update", table, keys, columns, names, 0)
        done = await connection.exec_driver_sql(sql, tuple(zip(*rows, strict=True)))
        found = [tuple(row) for row in done]
        _counted(table, len(rows), len(found))
        return found


class _ChunkedBulk(Bulk):
    """What MySQL and SQLite share: statements that list their rows."""

    mark: ClassVar[str]
    locks: ClassVar[dict[str, str]]

    def _pairs(self, keys: Row, count: int) -> str:
        if len(keys) == 1:
            return f"{self._names(keys)} IN ({', '.join([self.mark] * count)})"
        one = f"({', '.join([self.mark] * len(keys))})"
        return f"({self._names(keys)}) IN ({self._listed(one, count)})"

    def _listed(self, one: str, count: int) -> str:
        return ", ".join([one] * count)

    def _compose(self, what: str, table: Table, keys: Row, columns: Row, option: Any, count: int) -> str:
        name = self._quote(table.name)
        if what == "insert":
            return f"INSERT INTO {name} ({self._names(columns)}) VALUES ({', '.join([self.mark] * len(columns))})"  # noqa: S608
        if what == "delete":
            return f"DELETE FROM {name} WHERE {self._pairs(keys, count)}"  # noqa: S608
        if what == "update":
            return self._update_sql(table, keys, columns, option, count)
        chosen = f"SELECT {self._names(columns)} FROM {name} WHERE {self._pairs(keys, count)}"  # noqa: S608
        return f"{chosen} ORDER BY {self._names(keys)}{self.locks[option]}" if option else chosen

    @abstractmethod
    def _update_sql(self, table: Table, keys: Row, columns: Row, add: bool, count: int) -> str: ...

    def _stored(self, table: Table, columns: Row, rows: Iterable[Sequence[Any]]) -> list[Row]:
        return [tuple(row) for row in rows]

    def _read(self, table: Table, columns: Row, rows: Iterable[Sequence[Any]]) -> list[Row]:
        return [tuple(row) for row in rows]

    async def insert(self, connection: AsyncConnection, table: Table, columns: Row, rows: Sequence[Sequence[Any]]) -> None:
        if rows:
            sql = self._sql("insert", table, (), columns, None, 0)
            done = await connection.exec_driver_sql(sql, self._stored(table, columns, rows))
            _counted(table, len(rows), done.rowcount)

    async def select(
        self, connection: AsyncConnection, table: Table, columns: Row, keys: Row, values: Iterable[Row], lock: Lock = ""
    ) -> list[Row]:
        asked = sorted(values)
        found: list[Row] = []
        for at in range(0, len(asked), CHUNK):
            part = self._stored(table, keys, asked[at : at + CHUNK])
            sql = self._sql("select", table, keys, columns, lock, len(part))
            rows = await connection.exec_driver_sql(sql, tuple(chain.from_iterable(part)))
            found += self._read(table, columns, rows)
        return found

    async def delete(self, connection: AsyncConnection, table: Table, keys: Row, values: Sequence[Row]) -> None:
        for at in range(0, len(values), CHUNK):
            part = self._stored(table, keys, values[at : at + CHUNK])
            sql = self._sql("delete", table, keys, (), None, len(part))
            done = await connection.exec_driver_sql(sql, tuple(chain.from_iterable(part)))
            _counted(table, len(part), done.rowcount)


class MysqlBulk(_ChunkedBulk):
    """MySQL and MariaDB. Keys travel as bytes."""

    mark = "%s"
    locks: ClassVar[dict[str, str]] = {"": "", "update": " FOR UPDATE", "share": " LOCK IN SHARE MODE"}

    def _update_sql(self, table: Table, keys: Row, columns: Row, add: bool, count: int) -> str:
        names = keys + columns
        first = "SELECT " + ", ".join(f"%s AS {self._quote(name)}" for name in names)
        more = " UNION ALL SELECT " + ", ".join(["%s"] * len(names))
        plus = "t.{0} + d.{0}" if add else "d.{0}"
        setting = ", ".join(f"t.{self._quote(c)} = {plus.format(self._quote(c))}" for c in columns)
        source = f"({first}{more * (count - 1)}) AS d"
        return f"UPDATE {self._quote(table.name)} AS t JOIN {source} ON {self._equal(keys)} SET {setting}"  # noqa: S608

    @staticmethod
    def _keys(table: Table, columns: Row) -> list[bool]:
        return [isinstance(table.c[name].type, Key) for name in columns]

    def _stored(self, table: Table, columns: Row, rows: Iterable[Sequence[Any]]) -> list[Row]:
        keys = self._keys(table, columns)
        return [
            tuple([value.encode() if key and value is not None else value for key, value in zip(keys, row, strict=True)]) for row in rows
        ]

    def _read(self, table: Table, columns: Row, rows: Iterable[Sequence[Any]]) -> list[Row]:
        return [tuple([value.decode() if isinstance(value, bytes) else value for value in row]) for row in rows]

    async def update(
        self, connection: AsyncConnection, table: Table, keys: Row, columns: Row, rows: Sequence[Row], add: bool = False
    ) -> None:
        for at in range(0, len(rows), CHUNK):
            part = self._stored(table, keys + columns, rows[at : at + CHUNK])
            sql = self._sql("update", table, keys, columns, add, len(part))
            done = await connection.exec_driver_sql(sql, tuple(chain.from_iterable(part)))
            _counted(table, len(part), done.rowcount)


class SqliteBulk(_ChunkedBulk):
    """SQLite. It has no row locks: a writer holds the database (``BEGIN IMMEDIATE``)."""

    mark = "?"
    locks: ClassVar[dict[str, str]] = {"": "", "update": "", "share": ""}

    def _listed(self, one: str, count: int) -> str:
        return "VALUES " + ", ".join([one] * count)

    def _update_sql(self, table: Table, keys: Row, columns: Row, add: bool, count: int) -> str:
        setting = ", ".join(f"{self._quote(c)} = {self._quote(c) + ' + ?' if add else '?'}" for c in columns)
        condition = " AND ".join(f"{self._quote(name)} = ?" for name in keys)
        return f"UPDATE {self._quote(table.name)} SET {setting} WHERE {condition}"  # noqa: S608

    async def update(
        self, connection: AsyncConnection, table: Table, keys: Row, columns: Row, rows: Sequence[Row], add: bool = False
    ) -> None:
        if rows:
            width = len(keys)
            sql = self._sql("update", table, keys, columns, add, 0)
            done = await connection.exec_driver_sql(sql, [row[width:] + row[:width] for row in rows])
            _counted(table, len(rows), done.rowcount)


def bulk_for(dialect: Dialect) -> Bulk:
    """The way of this database; ``InventoryError`` for one that the ledger doesn't know."""
    kinds: dict[str, type[Bulk]] = {
        "postgresql": PostgresqlBulk,
        "mysql": MysqlBulk,
        "mariadb": MysqlBulk,
        "sqlite": SqliteBulk,
    }
    kind = kinds.get(dialect.name)
    if kind is None:
        raise InventoryError(f"database {dialect.name!r}: {KNOWN}")
    if dialect.name == "postgresql" and dialect.driver != "asyncpg":
        raise InventoryError(f"driver {dialect.driver!r}: the ledger needs postgresql+asyncpg")
    return kind(dialect)
