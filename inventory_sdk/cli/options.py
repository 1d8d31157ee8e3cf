"""The options that several commands share, and how a command ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any

import typer

RedisUrl = Annotated[str | None, typer.Option("--redis", envvar="INVENTORY_REDIS_URL", help="redis://host:port/db")]
QueueUrl = Annotated[str | None, typer.Option("--queue", envvar="INVENTORY_QUEUE_URL", help="amqp://… (without: the journal in Redis)")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database", envvar="INVENTORY_DATABASE_URL", help="postgresql+asyncpg://…, mysql+asyncmy://…")
]
Namespace = Annotated[str, typer.Option("--namespace", envvar="INVENTORY_NAMESPACE", help="What all keys begin with.")]


TablePrefix = Annotated[str, typer.Option("--prefix", help="What the ledger's tables are named with.")]


def refuse(message: str) -> typer.Exit:
    """Says what is wrong on standard error; raise the result."""
    typer.echo(f"inventory-sdk: {message}", err=True)
    return typer.Exit(1)


def run(work: Coroutine[Any, Any, bool]) -> None:
    """Run to its end; exit code 1 when it answers False."""
    if not asyncio.run(work):
        raise typer.Exit(1)
