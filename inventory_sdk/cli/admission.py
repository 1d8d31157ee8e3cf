"""``inventory-sdk admission``: who sells a merchant's stock, Redis or the database, and handing it over."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from inventory_sdk.cli.options import run
from inventory_sdk.cli.worker import load

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

Action = Annotated[Literal["adopt", "withdraw", "show"], typer.Argument(help="adopt: Redis sells. withdraw: the database sells.")]


def admission(
    action: Action,
    target: Annotated[str, typer.Argument(metavar="MODULE:INVENTORY", help="Where your Inventory is, e.g. shop.stock:inventory")],
    merchant: Annotated[str, typer.Option(help="Whose stock.")],
    sku: Annotated[
        list[str] | None, typer.Option(help="Only this SKU; may be given several times. Without: all of the merchant's.")
    ] = None,
) -> None:
    """Say who sells a merchant's stock, or change it with sales going on. Safe to repeat; withdraw needs a running worker."""
    run(handed_over(load(target), action, merchant, sku or None))


async def handed_over(inventory: Inventory, action: str, merchant: str, skus: list[str] | None = None) -> bool:
    """Print what was done and how things stand; False when an SDK error stopped it."""
    from inventory_sdk.errors import InventoryError
    from inventory_sdk.model import key_of

    async with inventory:
        try:
            if action != "show":
                call = inventory.stock.adopt if action == "adopt" else inventory.stock.withdraw
                typer.echo(f"OK      {await call(merchant, skus=skus)} SKUs went over")
        except InventoryError as error:
            typer.echo(f"FAILED  {error}")
            return False
        finally:
            named = None if skus is None else [key_of(merchant, sku) for sku in skus]
            rows = Counter(row.admission for row in await inventory.ledger.admission(merchant, named))
            new = (await inventory.ledger.places([], merchant))[""]
            shown = ", ".join(f"{count} SKUs {where}" for where, count in sorted(rows.items())) or "no SKU yet"
            typer.echo(f"        merchant {merchant}: {shown}; new ones {new}")
    return True
