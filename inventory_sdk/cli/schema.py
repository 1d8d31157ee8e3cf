"""``inventory-sdk schema``: create the ledger's tables, print them for review, or check them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from inventory_sdk.cli.options import DatabaseUrl, TablePrefix, refuse, run

if TYPE_CHECKING:
    from inventory_sdk.ledger.protocol import Ledger


def schema(
    database: DatabaseUrl = None,
    prefix: TablePrefix = "inventory_",
    sql: Annotated[bool, typer.Option("--sql", help="Print the statements, touch nothing.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Say what is missing or wrong, change nothing.")] = False,
) -> None:
    """Create the ledger's tables in --database, as far as they are missing."""
    if database is None:
        raise refuse("no database: give --database or set INVENTORY_DATABASE_URL")
    if sql and check:
        raise refuse("--sql and --check exclude each other")
    if sql:
        print_statements(database, prefix)
        return
    from inventory_sdk.ledger.sql import SqlLedger

    ledger = SqlLedger(database, prefix)
    run(checked(ledger) if check else created(ledger))


def print_statements(database: str, prefix: str) -> None:
    """The DDL in the database's own dialect, without connecting to it."""
    from sqlalchemy.engine import make_url

    from inventory_sdk.ledger.ddl import statements

    for made in statements(prefix, make_url(database).drivername).values():
        for statement in made:
            typer.echo(f"{statement};\n")


async def created(ledger: Ledger) -> bool:
    await ledger.start()
    try:
        await ledger.create_schema()
        return _said(await ledger.check_schema())
    finally:
        await ledger.close()


async def checked(ledger: Ledger) -> bool:
    await ledger.start()
    try:
        return _said(await ledger.check_schema())
    finally:
        await ledger.close()


def _said(wrong: list[str]) -> bool:
    for what in wrong:
        typer.echo(f"CHANGE  {what}")
    if not wrong:
        typer.echo("OK      schema: every table is there")
    return not wrong
