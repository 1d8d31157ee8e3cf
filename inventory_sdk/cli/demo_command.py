"""``inventory-sdk demo``: a flash sale, or the replay of an orders file, and the proof behind it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inventory_sdk.cli.options import refuse, run

if TYPE_CHECKING:
    from inventory_sdk.cli.demo import FlashSale
    from inventory_sdk.inventory import Inventory


def demo(
    orders: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="Replay this CSV file (or .csv.gz) of orders.")
    ] = None,
    buyers: Annotated[int, typer.Option(min=1, max=1_000_000, help="Buyers of the flash sale.")] = 2000,
    units: Annotated[int, typer.Option(min=1, max=1_000_000_000, help="Units of each of its three SKUs.")] = 100,
    seed: Annotated[int, typer.Option(help="The same seed brings the same buyers.")] = 1,
    redis: Annotated[str | None, typer.Option(help="redis://host:port/db; without it everything is embedded.")] = None,
    queue: Annotated[str | None, typer.Option(help="amqp://…; without it the journal in Redis.")] = None,
    database: Annotated[str | None, typer.Option(help="postgresql+asyncpg://…, mysql+asyncmy://…, sqlite+aiosqlite:///…")] = None,
    namespace: Annotated[
        str, typer.Option(help="What all keys and tables begin with; give the same one to go on after a killed run.")
    ] = "inventory_demo",
) -> None:
    """Sell a few units to many buyers, or replay an orders file, and prove that Redis and the database agree.

    Servers are never taken from the environment here: a demo moves stock.
    """
    from inventory_sdk.cli.demo import FlashSale
    from inventory_sdk.inventory import Inventory

    if redis is None and (queue is not None or database is not None):
        raise refuse("--queue and --database go with --redis; without it everything is embedded")
    if redis is not None and database is None:
        raise refuse("--redis needs --database: the ledger is the truth")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,38}", namespace):
        raise refuse(f"--namespace={namespace!r}: must be letters, digits and underscores, at most 39; tables are named with it")
    inventory = Inventory(
        redis or "memory://", queue=queue, database=database, namespace=namespace, table_prefix=f"{namespace}_", metrics=()
    )
    place = running(inventory, worker=redis is not None)
    if orders is not None:
        run(replayed(place, orders))
    else:
        run(sold(place, FlashSale(buyers=buyers, units=units, seed=seed)))


@asynccontextmanager
async def running(inventory: Inventory, worker: bool) -> AsyncIterator[Inventory]:
    """Started, with its tables, and with a worker where none runs inside already."""
    async with inventory:
        await inventory.create_schema()
        if not worker:
            yield inventory
            return
        async with inventory.worker() as working:
            await working.ready()
            yield inventory


async def sold(place: AbstractAsyncContextManager[Inventory], sale: FlashSale) -> bool:
    from rich.console import Console

    from inventory_sdk.cli import screen
    from inventory_sdk.cli.demo import MERCHANT, flash_sale
    from inventory_sdk.model import key_of
    from inventory_sdk.testing.proof import Expected, prove

    console = Console()
    async with place as inventory:
        with screen.progress(console, f"{sale.buyers:,} buyers", sale.buyers) as advance:
            tally = await flash_sale(
                inventory,
                sale,
                lambda tally: advance(tally.done, f"{tally.sold.total():,} sold, {tally.refused:,} refused"),
            )
        counted = {
            key_of(MERCHANT, sku): Expected(available=supplied - tally.sold[sku], reserved=0, sold=tally.sold[sku], written_off=0)
            for sku, supplied in tally.supplied.items()
        }
        proof = await prove(inventory, counted)
    console.print(screen.sale_table(tally))
    return screen.verdict(console, proof, tally.contradictions, "Redis, the database and what the buyers were told")


async def replayed(place: AbstractAsyncContextManager[Inventory], path: Path) -> bool:
    from rich.console import Console

    from inventory_sdk.cli import screen
    from inventory_sdk.cli.orders import UnreadableOrders, plan, read_orders
    from inventory_sdk.cli.recount import recount
    from inventory_sdk.cli.replay import expected, missing_or_doubled, replay
    from inventory_sdk.testing.proof import prove

    try:
        acts = plan(read_orders(path))
    except UnreadableOrders as error:
        raise refuse(str(error)) from None
    console = Console()
    async with place as inventory:
        with screen.progress(console, path.name, len(acts)) as advance:
            outcome = await replay(inventory, acts, lambda done: advance(done, ""))
        counted = recount(path)
        proof = await prove(inventory, expected(counted))
        differences = await missing_or_doubled(inventory, acts, counted)
    console.print(screen.replay_table(outcome, counted))
    return screen.verdict(console, proof, differences, "Redis, the database and a recount of the file")
