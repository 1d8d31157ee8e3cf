"""``inventory-sdk triggers module:inventory``: what each place that causes a recalculation did, and what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from inventory_sdk.cli.options import run
from inventory_sdk.cli.worker import load

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory


def triggers(
    target: Annotated[str, typer.Argument(metavar="MODULE:INVENTORY", help="Where your Inventory is, e.g. shop.stock:inventory")],
) -> None:
    """List the triggers of coalesced functions, the dearest first: the ones to fix. Counts of all processes; runs nothing itself."""
    run(listed(load(target)))


async def listed(inventory: Inventory) -> bool:
    """Print a line per trigger; False when Redis did not answer."""
    from redis.exceptions import RedisError

    from inventory_sdk.errors import InventoryError

    inventory.redistribution.runs_here = False
    try:
        async with inventory:
            found = await inventory.redistribution.counted()
    except (InventoryError, RedisError, OSError) as error:
        typer.echo(f"FAILED  {error}")
        return False
    if not found:
        typer.echo("no function is coalesced: @inventory.coalesce and @inventory.trigger make them")
        return True
    total = sum(each.cpu_seconds for each in found)
    wide = max(len("trigger"), *(len(each.name) for each in found))
    typer.echo(f"{'trigger':<{wide}} {'calls':>10} {'runs':>8} {'CPU s':>10} {'CPU %':>6}  runs what, from where")
    for each in found:
        part = 100 * each.cpu_seconds / total if total else 0.0
        row = f"{each.name:<{wide}} {each.calls:>10} {each.runs:>8} {each.cpu_seconds:>10.2f} {part:>6.1f}"
        typer.echo(f"{row}  {each.function}, {each.place or 'a place that is no longer in the code'}")
    return True
