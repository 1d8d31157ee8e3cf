"""``inventory-sdk repartition``: another number of partitions, or another way to tell them apart, while nobody sells."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from inventory_sdk.cli.options import DatabaseUrl, Namespace, QueueUrl, RedisUrl, TablePrefix, refuse, run


def repartition(
    partitions: Annotated[int, typer.Option(min=1, max=4096, help="How many there shall be.")],
    redis: RedisUrl = None,
    queue: QueueUrl = None,
    database: DatabaseUrl = None,
    namespace: Namespace = "inventory",
    prefix: TablePrefix = "inventory_",
    partition_by: Annotated[Literal["merchant", "sku"] | None, typer.Option(help="How stock is told apart; without: as it is.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it. Without: look, and say what would be done.")] = False,
) -> None:
    """Change partitions and partition_by of a stock. Offline: stop all callers, let the workers apply the journal, stop them.

    Without --yes nothing is changed. Interrupted, it is run again, with the same options."""
    if redis is None or database is None:
        raise refuse("name the stock: --redis and --database (and --queue, where there is one)")
    run(changed(redis, queue, database, namespace, prefix, partitions, partition_by, yes))


async def changed(
    redis: str, queue_url: str | None, database: str, namespace: str, prefix: str, partitions: int, by: str | None, really: bool
) -> bool:
    """Print what there is to do, do it if ``really``, and say how it went; False where something is in the way."""
    from inventory_sdk.errors import InventoryError
    from inventory_sdk.ledger.sql import SqlLedger
    from inventory_sdk.model import Layout
    from inventory_sdk.redis_urls import close_client
    from inventory_sdk.servers import Servers
    from inventory_sdk.sync.queues import from_url
    from inventory_sdk.sync.repartition import Repartition, engine_for

    ledger = SqlLedger(database, prefix)
    client = Servers(redis, queue_url, database, embedded=False).make_client()
    queue = from_url(queue_url, namespace, client_factory=lambda: client, partitions=partitions)
    try:
        await ledger.start()
        await queue.start()
        old = await ledger.layout()
        if old is None:
            typer.echo("FAILED  this ledger has no stock yet: start with the partitions and partition_by that you want")
            return False
        new = Layout(partitions, by or old.layout.by)
        engine = engine_for(client, ledger, namespace, old, new)

        async def said(step: str) -> None:
            typer.echo(f"        {step}")

        try:
            change = Repartition(engine, ledger, queue, new, said)
            plan = await change.plan()
            if plan.nothing:
                typer.echo(f"OK      partitions: {new}, as they are")
                return True
            typer.echo(f"        partitions: {plan.old.layout} to {new}{', begun before' if plan.turned or plan.old.begun else ''}")
            for obstacle in plan.obstacles:
                typer.echo(f"FAILED  {obstacle}")
            if plan.obstacles:
                return False
            if not really:
                typer.echo("OK      nothing is in the way; with --yes it is done")
                return True
            counts = await change.run()
        finally:
            await engine.close()
        if counts is not None:
            typer.echo(f"        {counts.skus} SKUs changed their partition, {counts.reservations} live reservations were written anew")
        typer.echo(f"OK      partitions: {new}. Start workers and callers with partitions={partitions}, partition_by={new.by!r}")
        return True
    except InventoryError as error:
        typer.echo(f"FAILED  {error}")
        return False
    finally:
        await queue.close()
        await close_client(client)
        await ledger.close()
