"""Making the tables, and saying what is missing or wrong with those that are there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, inspect, text

from inventory_sdk.ledger.schema import Key
from inventory_sdk.ledger.store import Store

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection


async def create(connection: AsyncConnection, store: Store) -> None:
    """Create what is not there. Several processes may start at once: they queue on a lock named after the prefix, because no
    database's "if not exists" is safe against another one at the same moment."""
    name = f"{store.tables.prefix}schema"
    if store.dialect == "postgresql":
        await connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": name})
        await connection.run_sync(store.tables.metadata.create_all, tables=list(store.tables.all()))
    elif store.dialect in ("mysql", "mariadb"):
        await connection.execute(text("SELECT GET_LOCK(:name, 60)"), {"name": name})
        try:
            await connection.run_sync(store.tables.metadata.create_all, tables=list(store.tables.all()))
        finally:
            await connection.execute(text("SELECT RELEASE_LOCK(:name)"), {"name": name})
    else:
        await connection.run_sync(store.tables.metadata.create_all, tables=list(store.tables.all()))


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
    there = set(inspector.get_table_names())
    wrong: list[str] = []
    for table in store.tables.all():
        if table.name not in there:
            wrong.append(f"table {table.name} is missing: run create_schema(), or `inventory-sdk schema`")
            continue
        columns: dict[str, Any] = {column["name"]: column for column in inspector.get_columns(table.name)}
        for column in table.columns:
            found = columns.get(column.name)
            if found is None:
                wrong.append(f"table {table.name} has no column {column.name}")
            elif isinstance(column.type, Key):
                wrong += _compares(store, table.name, column.name, found["type"])
        if table is store.tables.operation:
            unique: list[Any] = [index["column_names"] for index in inspector.get_indexes(table.name) if index["unique"]]
            unique += [constraint["column_names"] for constraint in inspector.get_unique_constraints(table.name)]
            if ["claim"] not in unique:
                wrong.append(f"table {table.name}: claim must be unique")
        primary = set(inspector.get_pk_constraint(table.name)["constrained_columns"])
        if primary != {column.name for column in table.primary_key}:
            wrong.append(f"table {table.name}: its primary key is {', '.join(sorted(primary)) or 'missing'}")
        if store.dialect in ("mysql", "mariadb"):
            engine = inspector.get_table_options(table.name).get(f"{store.dialect}_engine", "InnoDB")
            if engine != "InnoDB":
                wrong.append(f"table {table.name} is on {engine}: only InnoDB has transactions")
    return wrong


def _compares(store: Store, table: str, column: str, found: Any) -> list[str]:
    if store.dialect == "postgresql" and getattr(found, "collation", None) != "C":
        return [f'table {table}, column {column}: must have COLLATE "C", keys are compared as bytes']
    if store.dialect in ("mysql", "mariadb") and "BINARY" not in str(found).upper():
        return [f"table {table}, column {column}: must be VARBINARY, keys are compared as bytes"]
    return []
