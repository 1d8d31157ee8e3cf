"""Making the tables, and saying what is missing or wrong with those that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Inspector, bindparam, inspect, make_url, text
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

from inventory_sdk.ledger.schema import Key, own_tables
from inventory_sdk.ledger.store import Store

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


@cache
def statements(prefix: str, driver: str) -> Mapping[str, Sequence[str]]:
    """By table, in order of creation, what makes it. ``driver``: as in a URL, ``postgresql+asyncpg``."""
    dialect = make_url(f"{driver}://").get_dialect()()
    made: dict[str, Sequence[str]] = {}
    for table in own_tables(prefix).all():
        indexes = sorted(table.indexes, key=lambda index: str(index.name))
        elements: list[ExecutableDDLElement] = [CreateTable(table), *map(CreateIndex, indexes)]
        made[table.name] = [str(each.compile(dialect=dialect)).strip() for each in elements]
    return made


async def create(connection: AsyncConnection, store: Store) -> None:
    """Create what is not there. Several processes may start at once: they queue on a lock named after the prefix, because no
    database's "if not exists" is safe against another one at the same moment."""
    name = f"{store.tables.prefix}schema"
    if store.dialect == "postgresql":
        await connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": name})
        await _create_missing(connection, store)
    elif store.dialect in ("mysql", "mariadb"):
        await connection.execute(text("SELECT GET_LOCK(:name, 60)"), {"name": name})
        try:
            await _create_missing(connection, store)
        finally:
            await connection.execute(text("SELECT RELEASE_LOCK(:name)"), {"name": name})
    else:
        await _create_missing(connection, store)


async def _create_missing(connection: AsyncConnection, store: Store) -> None:
    there = set(await connection.run_sync(lambda sync: inspect(sync).get_table_names()))
    driver = f"{connection.dialect.name}+{connection.dialect.driver}"
    for table, made in statements(store.tables.prefix, driver).items():
        if table not in there:
            for statement in made:
                await connection.exec_driver_sql(statement)


async def check(connection: AsyncConnection, store: Store) -> list[str]:
    """What is missing or wrong, in words."""
    wrong: list[str] = await connection.run_sync(_inspect, store)
    if store.dialect in ("mysql", "mariadb"):
        mode = str((await connection.execute(text("SELECT @@sql_mode"))).scalar())
        if "STRICT" not in mode:
            wrong.append("sql_mode is not strict: too long keys would be cut; set sql_mode=STRICT_TRANS_TABLES")
    return wrong


def _inspect(connection: Connection, store: Store) -> list[str]:
    inspector = inspect(connection)
    there = _tables(connection, inspector, [table.name for table in store.tables.all()])
    wrong: list[str] = []
    for table in store.tables.all():
        if table.name not in there:
            wrong.append(f"table {table.name} is missing: run create_schema(), or `inventory-sdk schema`")
            continue
        columns, primary = there[table.name]
        for column in table.columns:
            if column.name not in columns:
                wrong.append(f"table {table.name} has no column {column.name}")
            elif isinstance(column.type, Key):
                wrong += _compares(store, table.name, column.name, columns[column.name])
        if table is store.tables.operation:
            unique: list[Any] = [index["column_names"] for index in inspector.get_indexes(table.name) if index["unique"]]
            unique += [constraint["column_names"] for constraint in inspector.get_unique_constraints(table.name)]
            if ["claim"] not in unique:
                wrong.append(f"table {table.name}: claim must be unique")
        if primary != {column.name for column in table.primary_key}:
            wrong.append(f"table {table.name}: its primary key is {', '.join(sorted(primary)) or 'missing'}")
        if store.dialect in ("mysql", "mariadb"):
            engine = inspector.get_table_options(table.name).get(f"{store.dialect}_engine", "InnoDB")
            if engine != "InnoDB":
                wrong.append(f"table {table.name} is on {engine}: only InnoDB has transactions")
    return wrong


def _tables(connection: Connection, inspector: Inspector, names: list[str]) -> dict[str, tuple[dict[str, Any], set[str]]]:
    """Of each of these tables that is there: its columns' types by name, and the names of its primary key."""
    if connection.dialect.name == "sqlite":
        # SQLAlchemy asks SQLite several questions per table.
        found: dict[str, tuple[dict[str, Any], set[str]]] = {}
        asked = text(
            "SELECT m.name, c.name, c.type, c.pk FROM sqlite_master m JOIN pragma_table_info(m.name) c "
            "WHERE m.type = 'table' AND m.name IN :names"
        ).bindparams(bindparam("names", expanding=True))
        for table, name, kind, place in connection.execute(asked, {"names": names}):
            columns, primary = found.setdefault(table, ({}, set()))
            columns[name] = kind
            if place:
                primary.add(name)
        return found
    keys = inspector.get_multi_pk_constraint(filter_names=names)
    return {
        str(place[1]): ({column["name"]: column["type"] for column in columns}, set(keys[place]["constrained_columns"]))
        for place, columns in inspector.get_multi_columns(filter_names=names).items()
    }


def _compares(store: Store, table: str, column: str, found: Any) -> list[str]:
    if store.dialect == "postgresql" and getattr(found, "collation", None) != "C":
        return [f'table {table}, column {column}: must have COLLATE "C", keys are compared as bytes']
    if store.dialect in ("mysql", "mariadb") and "BINARY" not in str(found).upper():
        return [f"table {table}, column {column}: must be VARBINARY, keys are compared as bytes"]
    return []
