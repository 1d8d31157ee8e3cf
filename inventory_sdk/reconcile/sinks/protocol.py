"""Where discrepancies are told. A sink is one file and one run of the contract suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from inventory_sdk.errors import InventoryError
from inventory_sdk.reconcile.model import Discrepancy

if TYPE_CHECKING:
    from inventory_sdk.beside import Ground

Event = Literal["found", "gone", "corrected", "undone"]
EVENTS: Final[tuple[Event, ...]] = ("found", "gone", "corrected", "undone")


class SinkAway(InventoryError):
    """The sink could not take these documents now; they are kept and sent again."""


class SinkRefused(InventoryError):
    """The sink has taken the others, and will never take the documents of these ``ids``: they are kept aside, by name."""

    def __init__(self, ids: Sequence[str], why: str) -> None:
        super().__init__(f"{len(ids)} documents were refused for good, {ids[0]!r} first: {why}")
        self.ids = tuple(ids)


@dataclass(frozen=True, slots=True)
class Document:
    """One thing that happened to one discrepancy. ``id`` is the same however often it is sent. ``at_ms``: Unix milliseconds."""

    id: str
    at_ms: int
    event: Event
    namespace: str
    discrepancy: Discrepancy

    def fields(self) -> dict[str, Any]:
        """As JSON has it; ``evidence`` and ``correction`` are objects."""
        found = self.discrepancy
        return {
            "id": self.id,
            "at_ms": self.at_ms,
            "event": self.event,
            "namespace": self.namespace,
            "number": found.number,
            "what": found.what,
            "name": found.name,
            "merchant": found.merchant,
            "sku": found.sku,
            "reservation": found.reservation,
            "cause": found.cause,
            "available": found.available,
            "reserved": found.reserved,
            "state": found.state,
            "found_ms": found.found_ms,
            "resolved_ms": found.resolved_ms,
            "evidence": dict(found.evidence),
            "correction": None if found.correction is None else dict(found.correction),
        }


def document(values: Mapping[str, Any]) -> Document:
    """The inverse of ``Document.fields``."""
    names = (
        "number", "what", "name", "merchant", "sku", "reservation", "cause", "available", "reserved", "evidence", "state", "found_ms",
        "resolved_ms", "correction",
    )  # fmt: skip
    return Document(
        values["id"], values["at_ms"], values["event"], values["namespace"], Discrepancy(**{name: values[name] for name in names})
    )


class Sink(Protocol):
    """Takes documents. Its connections belong to the event loop that ``start`` ran in."""

    @property
    def name(self) -> str:
        """Fixed, for letters and metrics."""
        ...

    async def start(self, ground: Ground) -> None:
        """Get ready; does not wait for a server that is away."""
        ...

    async def write(self, documents: Sequence[Document]) -> None:
        """All of them, each once however often it is sent. ``SinkAway`` when that is not possible now: nothing is half taken that a
        repeat would not put right. ``SinkRefused`` when all are taken but those that it names."""
        ...

    async def close(self) -> None:
        """End what ``start`` began."""
        ...
