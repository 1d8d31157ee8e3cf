"""The journal entry as text. The batch script writes it, the queue carries it, the worker reads it.

    {"v": 1, "n": nonce, "t": Redis milliseconds, "ops": [[kind, key, fingerprint, lines, remaining, order, reference,
     expires_at, extra], …]}

Lua's cjson prints an empty list as ``{}``; readers take both.
"""

from __future__ import annotations

import json
from typing import Any, Final

from inventory_sdk.errors import InventoryError
from inventory_sdk.model import JournalEntry, JournalOperation

VERSION: Final = 1


class UnreadableEntry(InventoryError):
    """A journal entry that this version can't read: a poison message, or one from a newer release."""


def decode(partition: int, epoch: int, sequence: int, body: str | bytes) -> JournalEntry:
    """The entry behind ``body``; ``UnreadableEntry`` names its position otherwise."""
    try:
        raw: dict[str, Any] = json.loads(body)
        if raw["v"] != VERSION:
            raise UnreadableEntry(
                f"journal entry {partition}/{epoch}-{sequence} has format version {raw['v']}, this release reads {VERSION}"
            )
        operations = tuple([_operation(values) for values in raw["ops"]])
        return JournalEntry(partition, epoch, sequence, raw["n"], int(raw["t"]), operations)
    except (ValueError, LookupError, TypeError) as error:
        raise UnreadableEntry(f"journal entry {partition}/{epoch}-{sequence} can't be read: {error!r}") from error


def _operation(values: list[Any]) -> JournalOperation:
    values[3], values[4], values[7] = values[3] or [], values[4] or [], int(values[7])
    return JournalOperation._make(values)


def encode(nonce: str, at_ms: int, operations: list[list[Any]]) -> str:
    """What the script would write: for tests and tools."""
    return json.dumps({"v": VERSION, "n": nonce, "t": at_ms, "ops": operations}, separators=(",", ":"), ensure_ascii=False)
