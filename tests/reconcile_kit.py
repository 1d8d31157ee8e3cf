"""A shop whose sides can be set against each other, for the tests of comparison."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from inventory_sdk import Inventory, Line, Movement, OpeningBalance
from inventory_sdk.model import key_of
from inventory_sdk.reconcile.model import Discrepancy, Reconcile

QUIET = {"every": None, "whole_every": None, "settle": 0.01}
"""Nothing compares by itself."""


class Shop:
    """An embedded Inventory with SKUs a and b of ten units each; ``own`` is the service's table, if it has one."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.own: dict[str, int] = {}
        self.listed: dict[str, list[tuple[str, int]]] = {}

    @property
    def ledger(self) -> Any:
        return self.inventory.ledger

    @property
    def engine(self) -> Any:
        return self.inventory._running().engine

    def key(self, what: str, merchant: str = "default") -> str:
        return str(self.engine.home(merchant).key(what))

    async def by_hand(self, sku: str, available: int = 0, reserved: int = 0) -> None:
        """Change Redis' counters past every script."""
        client: Any = self.engine.wire.client
        for what, units in (("available", available), ("reserved", reserved)):
            if units:
                await client.hincrby(self.key(what), key_of("default", sku), units)

    async def found(self, **scope: Any) -> list[tuple[str, str | None, str, int, int]]:
        """(what, SKU or reservation, cause, available, reserved) of all that a comparison sees."""
        done = await self.inventory.reconciler.run(**scope)
        return [(each.what, each.sku or each.reservation, each.cause, each.available, each.reserved) for each in done.open]

    async def one(self, **scope: Any) -> Discrepancy:
        (each,) = (await self.inventory.reconciler.run(**scope)).open
        return each

    async def sides(self, sku: str = "a") -> tuple[tuple[int, int], tuple[int, int]]:
        """(available, reserved) in Redis and, once it has caught up, in the ledger."""
        await self.inventory.settled()
        level = await self.inventory.stock.level(sku)
        (row,) = await self.ledger.stock([key_of("default", sku)])
        return (level.available, level.reserved), (row.available, row.reserved)


@asynccontextmanager
async def shop(*, own: bool = False, writes: bool = False, **more: Any) -> AsyncIterator[Shop]:
    """``own``: with ``reads_stock``; ``writes``: with ``writes_stock`` too. ``more`` is for the Inventory, or for ``Reconcile``."""
    names = Reconcile.__dataclass_fields__
    settings = Reconcile(**{**QUIET, **{name: more.pop(name) for name in list(more) if name in names}})
    inventory = Inventory("memory://", **{"metrics": [], "reconcile": settings, **more})
    made = Shop(inventory)
    if own:

        @inventory.reads_stock
        async def read(merchant: str, skus: Sequence[str], session: Any) -> Iterable[OpeningBalance]:
            return [OpeningBalance(sku, made.own[sku], made.listed.get(sku, [])) for sku in skus if sku in made.own]

    if writes:

        @inventory.writes_stock
        async def write(moves: Sequence[Movement], session: Any) -> None:
            for move in moves:
                made.own[move.sku] = made.own.get(move.sku, 0) + move.available

    async with inventory:
        await inventory.stock.restock([Line("a", 10), Line("b", 10)], operation_id="po")
        if own and not writes:
            made.own = {"a": 10, "b": 10}
        yield made
