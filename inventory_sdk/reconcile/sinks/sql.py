"""The ledger's register: every discrepancy once while it lasts, with the number under which it is shown and corrected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inventory_sdk.ledger.accounts import NewRow
from inventory_sdk.model import split_key
from inventory_sdk.reconcile.model import Cause, Discrepancy, Finding, What, details_of, discrepancy
from inventory_sdk.reconcile.sinks.protocol import Document, SinkAway

if TYPE_CHECKING:
    from inventory_sdk.beside import Ground
    from inventory_sdk.ledger.register import Acts, Letters, Register


class SqlSink:
    """Always there: a correction begins from its rows. The other sinks get what it has numbered."""

    name = "sql"

    def __init__(self) -> None:
        self._register: Register | None = None

    async def start(self, ground: Ground) -> None:
        """The ledger that this Inventory is on."""
        self._register = register_of(ground)

    async def record(
        self, found: Sequence[Finding], letters: Letters | None = None, before: Acts | None = None
    ) -> list[tuple[Discrepancy, bool]]:
        """On record under a number, and whether they are new; one that is open already keeps its number. See ``Register.keep``."""
        assert self._register is not None, "started"
        kept = await self._register.keep([_row(each) for each in found], letters, before)
        return [(discrepancy(row), new) for row, new in kept]

    async def write(self, documents: Sequence[Document]) -> None:
        """What is found is recorded, what is gone is ended. A correction is on record before it is made, and not told here."""
        assert self._register is not None, "started"
        try:
            findings = [_finding(each.discrepancy) for each in documents if each.event == "found"]
            await self.record(findings)
            gone = [_finding(each.discrepancy).subject for each in documents if each.event == "gone"]
            if gone:
                open_ones = await self._register.find(state="open", subjects=gone, limit=len(gone))
                await self._register.gone([row.number for row in open_ones])
        except OSError as error:
            raise SinkAway(str(error)) from error

    async def close(self) -> None:
        """The ledger has a life of its own."""


def register_of(ground: Ground) -> Register:
    """The register of this Inventory's ledger."""
    register: Register = getattr(ground.ledger, "register")  # noqa: B009 - the SQL ledger's, and not in the protocol of all ledgers
    return register


def _row(found: Finding) -> NewRow:
    merchant, name = split_key(found.name) if found.what is not What.PARTITION else ("", found.name)
    sku = name if found.what in (What.STOCK, What.SERVICE) or (found.what is What.BOOKS and merchant) else None
    return NewRow(merchant, sku or None, found.cause.value, found.subject, details_of(found))


def _finding(found: Discrepancy) -> Finding:
    return Finding(What(found.what), found.name, Cause(found.cause), found.available, found.reserved, found.evidence)
