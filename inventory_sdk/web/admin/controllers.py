"""The inventory's controllers as the pages know them. A page is there where its controller is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory


class GrayLinks(Protocol):
    """``inventory.gray_links``: changes that are rolled out merchant by merchant. ``show`` and ``known`` answer rules, ``history`` who
    changed which of them."""

    def links(self) -> Sequence[str]: ...
    def known(self, link: str) -> Any: ...
    async def show(self, link: str) -> Any: ...
    async def kill(self, link: str, *, who: str, why: str) -> Any: ...
    async def restore(self, link: str, *, who: str, why: str) -> Any: ...
    async def history(self, link: str, *, limit: int = 50) -> Sequence[Any]: ...


class Reconciler(Protocol):
    """``inventory.reconciler``: what differs, why, and how it is mended. It writes its own acts down, in their transactions."""

    async def discrepancies(
        self,
        merchant: str | None = None,
        sku: str | None = None,
        order: str | None = None,
        cause: str | None = None,
        state: str | None = "open",
        limit: int = 50,
        after: int | None = None,
    ) -> Sequence[Any]: ...
    async def discrepancy(self, number: int) -> Any: ...
    async def propose(self, number: int) -> Any: ...
    async def correct(self, number: int, reason: str, who: str, confirmed: bool = False) -> Any: ...
    async def undo(self, number: int, reason: str, who: str) -> Any: ...


class Hotspots(Protocol):
    """``inventory.hotspots``: what everybody wants at once."""

    def top(self, limit: int = 20) -> Sequence[Any]: ...


class Redistribution(Protocol):
    """``inventory.redistribution``: what triggers heavy recalculations, and what they cost."""

    def triggers(self) -> Sequence[Any]: ...


class Alerts(Protocol):
    """``inventory.alerts``: what fires now, and of what nobody is told. ``rules``: the names of what is watched."""

    @property
    def rules(self) -> Sequence[str]: ...
    async def firing(self) -> Sequence[Any]: ...
    async def silences(self) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True)
class Controllers:
    """Those that this inventory has."""

    gray_links: GrayLinks | None
    reconciler: Reconciler | None
    hotspots: Hotspots | None
    redistribution: Redistribution | None
    alerts: Alerts | None


def controllers_of(inventory: Inventory) -> Controllers:
    """Asked each time: an Inventory that was replaced has others."""

    def part(name: str) -> Any:
        return getattr(inventory, name, None)

    return Controllers(part("gray_links"), part("reconciler"), part("hotspots"), part("redistribution"), part("alerts"))
