"""A structured log: one line of JSON per document."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from inventory_sdk.reconcile.sinks.protocol import Document

if TYPE_CHECKING:
    from inventory_sdk.beside import Ground


class LogSink:
    """``logger``: a name, ``inventory_sdk.discrepancies`` by default. What is found is a warning, what has ended is information."""

    name = "log"

    def __init__(self, logger: str = "inventory_sdk.discrepancies") -> None:
        self._log = logging.getLogger(logger)

    async def start(self, ground: Ground) -> None:
        """Nothing to begin."""

    async def write(self, documents: Sequence[Document]) -> None:
        """ASCII, so that a hostile name can't break the line or the terminal."""
        for each in documents:
            level = logging.WARNING if each.event == "found" else logging.INFO
            self._log.log(level, "%s", json.dumps(each.fields(), separators=(",", ":"), sort_keys=True))

    async def close(self) -> None:
        """Nothing to end."""
