"""An act that closes a reservation under an id of its own takes that id at the id's home first, where every other use of it asks too.

Needed where the id's home is not the reservation's, with ``partition_by="sku"``. Once taken, an id stands for its content: the same
content may come again, another is ``OperationConflict``. It is freed when the act was refused, unless somebody else has joined in
meanwhile: theirs may have been done. A process that dies between the two leaves the id to that content.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.errors import InventoryError, OperationConflict
from inventory_sdk.metrics.events import Retried
from inventory_sdk.model import split_key
from inventory_sdk.stock.answers import refused
from inventory_sdk.stock.batch import CONFLICT, DONE, DONE_LINES, REPLAY

if TYPE_CHECKING:
    from inventory_sdk.stock.engine import Engine

log = logging.getLogger("inventory_sdk.stock")

SUFFIX: Final = "\x1fclaim"


@dataclass(frozen=True, slots=True)
class Claim:
    """An id that this call has taken. ``mark``: the position of its journal entry."""

    key: str
    content: str
    mark: str


async def claim(engine: Engine, key: str, content: str, hold: str = "") -> Claim | None:
    """Take the id ``key`` at its home for this content, an act on the reservation ``hold``; None where it was taken for it before.
    ``OperationConflict``."""
    operation: list[Any] = ["claim", f"{key}{SUFFIX}", content, [], hold, key, 0, "", "", ""]
    answer, batch = await engine.send(engine.home(key), operation)
    if answer[0] == CONFLICT:
        raise OperationConflict(split_key(key)[1])
    if answer[0] == REPLAY:
        return None
    if answer[0] not in (DONE, DONE_LINES):
        raise refused(answer)
    return Claim(key, content, f"{batch.position.epoch}-{batch.position.sequence}")


async def free(engine: Engine, taken: Claim) -> None:
    """Its act was refused: the id may be used for something else, unless somebody has joined in. What fails leaves it taken."""
    extra = json.dumps({"of": "claim", "position": taken.mark})
    operation: list[Any] = [
        "undo", f"{taken.key}\x1funclaim", taken.content, [], "", f"{taken.key}{SUFFIX}", 0, extra, taken.mark, "claim",
    ]  # fmt: skip
    try:
        await engine.send(engine.home(taken.key), operation)
    except InventoryError as error:
        engine.metrics.record(Retried("unclaim", type(error).__name__))
        log.warning("id %r stays taken by an act that was refused: %s", split_key(taken.key)[1], error)
