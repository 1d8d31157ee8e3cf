"""What other services hear of an applied entry: the journal entry as it was, and which of its operations the ledger refused.

    {"v": 1, "refused": {"3": "insufficient"}, "entry": {…the journal entry…}}

``refused`` maps the index of an operation in the entry to the reason (docs/reference/journal.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from inventory_sdk.model import JournalEntry
from inventory_sdk.stock.journal import UnreadableEntry, decode

VERSION: Final = 1


class Announcement(NamedTuple):
    """An applied entry; ``refused``: operation index → ``duplicate``, ``insufficient`` or ``closed``."""

    entry: JournalEntry
    refused: Mapping[int, str]


def announcement(body: str, refused: Mapping[int, str]) -> str:
    """The announcement's text; ``body`` is the journal entry's text and goes in as it is."""
    reasons = json.dumps({str(index): refused[index] for index in sorted(refused)}, separators=(",", ":"))
    return f'{{"v":{VERSION},"refused":{reasons},"entry":{body}}}'


def read_announcement(partition: int, epoch: int, sequence: int, text: str | bytes) -> Announcement:
    """The inverse of ``announcement``; ``UnreadableEntry`` for another version or something else altogether."""
    where = f"announcement {partition}/{epoch}-{sequence}"
    try:
        raw: dict[str, Any] = json.loads(text)
        if raw["v"] != VERSION:
            raise UnreadableEntry(f"{where} has format version {raw['v']}, this release reads {VERSION}")
        refused = {int(index): str(reason) for index, reason in raw["refused"].items()}
        entry = json.dumps(raw["entry"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableEntry(f"{where} can't be read: {error!r}") from error
    return Announcement(decode(partition, epoch, sequence, entry), refused)
