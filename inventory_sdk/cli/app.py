"""The commands put together. A command's file says what it takes; what it needs is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from inventory_sdk import __version__
from inventory_sdk.cli.admin import admin, admin_user
from inventory_sdk.cli.admission import admission
from inventory_sdk.cli.demo_command import demo
from inventory_sdk.cli.doctor import doctor
from inventory_sdk.cli.gray import gray
from inventory_sdk.cli.monitoring import monitoring
from inventory_sdk.cli.reconcile import reconcile
from inventory_sdk.cli.repartition import repartition
from inventory_sdk.cli.schema import schema
from inventory_sdk.cli.triggers import triggers
from inventory_sdk.cli.worker import worker

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for command in (demo, worker, schema, doctor, admission, monitoring, admin, admin_user, reconcile, repartition, triggers):
    app.command()(command)
app.add_typer(gray, name="gray")


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"inventory_sdk {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")] = False,
) -> None:
    """Exact, fast stock for async Python services."""
