"""``inventory-sdk reconcile``: compare Redis, the ledger and your own tables while sales go on; show, correct and undo what is found."""

from __future__ import annotations

import getpass
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from inventory_sdk.cli.options import refuse, run
from inventory_sdk.cli.worker import load

if TYPE_CHECKING:
    from rich.console import Console

    from inventory_sdk.inventory import Inventory
    from inventory_sdk.reconcile.model import Comparison, Discrepancy

SHOWN = 50
"""Discrepancies that are listed after a comparison."""


def reconcile(
    target: Annotated[str, typer.Argument(metavar="MODULE:INVENTORY", help="Where your Inventory is, e.g. shop.stock:inventory")],
    merchant: Annotated[str | None, typer.Option(help="Only this merchant's stock.")] = None,
    sku: Annotated[str | None, typer.Option(help="Only this SKU (of --merchant, or of the Inventory's own).")] = None,
    order: Annotated[str | None, typer.Option(help="Only what this order has touched.")] = None,
    touched: Annotated[bool, typer.Option("--touched", help="Only what has moved since the last comparison of this kind.")] = False,
    correct: Annotated[int | None, typer.Option(metavar="NUMBER", help="Correct this discrepancy; without --reason only say how.")] = None,
    undo: Annotated[int | None, typer.Option(metavar="NUMBER", help="Undo the correction of this discrepancy; needs --reason.")] = None,
    reason: Annotated[str | None, typer.Option(help="Why; it is kept with the correction.")] = None,
    who: Annotated[str | None, typer.Option(help="Who; by default the user of this machine.")] = None,
    confirm: Annotated[
        int, typer.Option(metavar="UNITS", min=0, help="The units that it said it would move, where they are too many for one look.")
    ] = 0,
) -> None:
    """Compare, and list what disagrees with its cause. A worker must run. Exit code 1 when anything disagrees or could not be done."""
    if correct is not None and undo is not None:
        raise refuse("--correct and --undo exclude each other")
    if undo is not None and reason is None:
        raise refuse("--undo needs a --reason")
    if reason is not None and correct is None and undo is None:
        raise refuse("--reason goes with --correct or --undo")
    if (correct is not None or undo is not None) and (touched or merchant is not None or sku is not None or order is not None):
        raise refuse("--correct and --undo name the discrepancy by its number: leave the scope out")
    inventory = load(target)
    if undo is not None:
        run(undone(inventory, undo, str(reason), who or getpass.getuser()))
    elif correct is not None and reason is None:
        run(proposed(inventory, correct))
    elif correct is not None:
        run(corrected(inventory, correct, str(reason), who or getpass.getuser(), confirm))
    else:
        run(compared(inventory, merchant, sku, order, touched))


async def compared(inventory: Inventory, merchant: str | None, sku: str | None, order: str | None, touched: bool) -> bool:
    """Compare under a progress bar and print what was found; False when anything disagrees."""
    from rich.console import Console

    from inventory_sdk.cli.screen import Advance, progress
    from inventory_sdk.errors import InventoryError

    console = Console()
    async with inventory:
        try:
            with ExitStack() as shown:
                bars: list[Advance] = []

                def advance(looked: int, total: int) -> None:
                    if not bars:  # how many SKUs there are is known with the first stride
                        bars.append(shown.enter_context(progress(console, "comparing", total)))
                    bars[0](looked, "")

                done = await inventory.reconciler.run(merchant, sku, order, advance, touched=touched)
        except InventoryError as error:
            typer.echo(f"FAILED  {error}")
            return False
    show(console, done)
    return done.clean


async def proposed(inventory: Inventory, number: int) -> bool:
    """Print what a correction would do; False when it can't be made."""
    from inventory_sdk.errors import InventoryError

    async with inventory:
        try:
            found = await inventory.reconciler.propose(number)
        except InventoryError as error:
            typer.echo(f"FAILED  {error}")
            return False
    for step in found.steps:
        typer.echo(f"WOULD   {step}")
    if found.why_not:
        typer.echo(f"FAILED  {number} can't be corrected: {found.why_not}")
    elif found.needs_confirmation:
        typer.echo(f"        {found.units} units: --confirm {found.units} is needed besides --reason")
    else:
        typer.echo("        nothing was done; give a --reason to do it")
    return not found.why_not


async def corrected(inventory: Inventory, number: int, reason: str, who: str, confirm: int) -> bool:
    """Correct and say so; False when it was refused."""
    from inventory_sdk.errors import InventoryError

    async with inventory:
        try:
            made = await inventory.reconciler.correct(number, reason=reason, who=who, confirmed=confirm)
        except InventoryError as error:
            typer.echo(f"FAILED  {error}")
            return False
    typer.echo(f"OK      {described(made)} is {made.state}")
    return True


async def undone(inventory: Inventory, number: int, reason: str, who: str) -> bool:
    """Undo and say so; False when it was refused."""
    from inventory_sdk.errors import InventoryError

    async with inventory:
        try:
            made = await inventory.reconciler.undo(number, reason=reason, who=who)
        except InventoryError as error:
            typer.echo(f"FAILED  {error}")
            return False
    typer.echo(f"OK      the correction of {described(made)} is {made.state}")
    return True


def described(found: Discrepancy) -> str:
    """One line; names as JSON has them, so that a hostile one can't write on the terminal."""
    named = {"merchant": found.merchant, "sku": found.sku, "reservation": found.reservation}
    where = ", ".join(f"{name} {json.dumps(value)}" for name, value in named.items() if value)
    return f"{found.number}  {found.cause}: {found.what} {where}, {found.available:+d} available, {found.reserved:+d} reserved"


def show(console: Console, done: Comparison) -> None:
    """What a comparison came to."""
    looked = [(done.skus, "SKUs in Redis"), (done.direct, "sold by the database"), (done.absent, "not in Redis now")]
    looked += [(done.service, "in your own tables"), (done.holds, "reservations")]
    shown = ", ".join(f"{count:,} {what}" for count, what in looked if count) or "nothing"
    lines = [f"{json.dumps(done.scope)}: compared {shown} in {done.seconds:.1f} s"]
    lines += [f"  {described(found)}" for found in done.open[:SHOWN]]
    if len(done.open) > SHOWN:
        lines.append(f"  … and {len(done.open) - SHOWN:,} more")
    if done.moving:
        lines.append(f"  {len(done.moving):,} SKUs were changing hands: compare them again")
    lines += [f"  partition {partition} is being recovered: compare it again" for partition in done.unopened]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if done.clean:
        console.print("[bold green]EQUAL[/]  to the unit, while sales went on", highlight=False)
    else:
        console.print(
            f"[bold red]NOT EQUAL[/]  {len(done.open):,} discrepancies; --correct NUMBER says what would be done", highlight=False
        )
