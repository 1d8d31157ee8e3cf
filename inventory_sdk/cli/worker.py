"""``inventory-sdk worker module:inventory``: apply the journal to the ledger until told to stop."""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated, Final

import typer

from inventory_sdk.cli.options import refuse, run

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

log = logging.getLogger("inventory_sdk.worker")

COLLECT_AFTER: Final = 50_000
"""Objects after which Python looks for garbage, 700 unless told: a batch is thousands of lists that live until its commit."""


def worker(
    target: Annotated[str, typer.Argument(metavar="MODULE:INVENTORY", help="Where your Inventory is, e.g. shop.stock:inventory")],
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "INFO",
    variant: Annotated[str | None, typer.Option(help="stable or candidate: later-functions of this side only.")] = None,
) -> None:
    """Apply what Redis accepted to the database, until SIGTERM or SIGINT; a second signal ends it at once."""
    level = logging.getLevelNamesMapping().get(log_level.upper())
    if level is None:
        raise refuse(f"--log-level={log_level!r}: must be DEBUG, INFO, WARNING or ERROR")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    inventory = load(target)
    spare_collector()
    run(serve(inventory, variant))


def load(target: str) -> Inventory:
    """The Inventory behind ``module:name``; exits with a message that names what is wrong."""
    from inventory_sdk.inventory import Inventory

    module_name, colon, path = target.partition(":")
    if not (module_name and colon and path):
        raise refuse(f"{target!r}: must be MODULE:INVENTORY, such as shop.stock:inventory")
    if os.getcwd() not in sys.path:  # a console script does not have the working directory there, python -m does
        sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise refuse(f"{target!r}: there is no module {error.name!r}") from None
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise refuse(f"{target!r}: {module_name} has no {path!r}") from None
    if not isinstance(found, Inventory):
        raise refuse(f"{target!r}: is a {type(found).__name__}, not an Inventory")
    return found


def spare_collector() -> None:
    """For a process that does nothing else: what was imported stays, so Python's garbage collector need not look at it again, nor
    so often at all. It took a quarter of the worker's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, 20, 20)


async def serve(inventory: Inventory, variant: str | None = None) -> bool:
    """Run the worker until a signal. The first one ends it gracefully: the batch in hand is finished; a second one cancels,
    which is safe because what was not acknowledged comes again."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    work = asyncio.ensure_future(until(inventory, stop, variant))

    def told(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("%s again: leaving at once", number.name)
            work.cancel()
        else:
            log.info("%s: finishing what is in hand", number.name)
            stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told, number)
    try:
        await asyncio.wait({work})
        if work.cancelled():
            return False
        work.result()
        return True
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
        work.cancel()


async def until(inventory: Inventory, stop: asyncio.Event, variant: str | None = None) -> None:
    """Until ``stop``, or until a task of the worker dies, which is raised: whoever supervises the process starts it anew."""
    async with inventory.worker(variant=variant) as working:
        log.info("worker %s has started; where another one is active it stands by", working.name)
        asked = asyncio.ensure_future(stop.wait())
        try:
            for step, said in ((working.ready, "is running"), (working.wait, "has stopped")):
                going = asyncio.ensure_future(step())
                try:
                    await asyncio.wait({going, asked}, return_when=asyncio.FIRST_COMPLETED)
                    if not going.done():
                        break
                    going.result()
                    log.info("worker %s %s", working.name, said)
                finally:
                    going.cancel()
                    await asyncio.wait({going})
        finally:
            asked.cancel()
    log.info("worker has ended")
