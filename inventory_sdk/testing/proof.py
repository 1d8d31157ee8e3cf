"""Redis, ledger, and what the callers saw: three accounts that must agree to the unit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from inventory_sdk.errors import DurabilityNotReached, UnknownStock
from inventory_sdk.model import StockLevel, key_of, split_key

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

TRIES: Final = 20
PAGE: Final = 256


@dataclass(frozen=True, slots=True)
class Expected:
    """What a third party counted for one SKU; None: it has no opinion on this."""

    available: int | None = None
    reserved: int | None = None
    sold: int | None = None
    written_off: int | None = None
    outgone: int | None = None
    """supplied − available: what has left the shelf for good, however it is called."""


@dataclass(frozen=True, slots=True)
class Proof:
    """``fields`` were compared; ``differences`` are in words, empty when all agree."""

    fields: int
    available: int
    sold: int
    differences: tuple[str, ...]


async def levels(inventory: Inventory, fields: Iterable[str]) -> dict[str, StockLevel]:
    """What Redis says, by field; a SKU that the ledger doesn't know is left out."""
    skus: dict[str, list[str]] = {}
    for field in fields:
        merchant, sku = split_key(field)
        skus.setdefault(merchant, []).append(sku)
    found: dict[str, StockLevel] = {}
    for merchant, all_of_them in skus.items():
        for start in range(0, len(all_of_them), PAGE):
            page = all_of_them[start : start + PAGE]
            while page:
                try:
                    read = await inventory.stock.levels(page, merchant=merchant)
                except UnknownStock as unknown:
                    page = [sku for sku in page if sku != unknown.sku]
                else:
                    found.update((key_of(merchant, sku), level) for sku, level in read.items())
                    break
    return found


async def prove(inventory: Inventory, expected: Mapping[str, Expected], timeout: float = 60.0) -> Proof:
    """Wait until the ledger has applied everything, then compare, and check the ledger's own books.

    ``expected`` has one entry per stock field (``merchant\\x1fsku``). Redis is read before and after the ledger; if it moved in
    between, the comparison is made again. A ledger that does not get there within ``timeout`` seconds is a difference.
    """
    for _ in range(TRIES):
        try:
            await inventory.settled(timeout=timeout)
        except DurabilityNotReached as behind:
            return Proof(0, 0, 0, (f"the ledger has not applied everything: {behind}",))
        before = await levels(inventory, expected)
        rows = {key_of(row.merchant, row.sku): row for row in await inventory.ledger.stock(list(expected))}
        if await levels(inventory, expected) == before:
            break
        await asyncio.sleep(0.1)
    else:
        return Proof(0, 0, 0, ("stock kept moving; stop the other callers and compare again",))

    differences: list[str] = []
    for field, wanted in expected.items():
        name = "/".join(split_key(field))
        row, level = rows.get(field), before.get(field)
        if row is None or level is None:
            differences.append(f"{name}: unknown to {'the ledger' if row is None else 'Redis'}")
            continue
        told = (
            ("available", level.available, row.available, wanted.available),
            ("reserved", level.reserved, row.reserved, wanted.reserved),
            ("sold", None, row.sold, wanted.sold),
            ("written off", None, row.written_off, wanted.written_off),
            ("outgone", None, row.supplied - row.available, wanted.outgone),
        )
        for what, in_redis, in_ledger, counted in told:
            accounts = {"Redis": in_redis, "ledger": in_ledger, "counted": counted}
            if len({account for account in accounts.values() if account is not None}) > 1:
                says = ", ".join(f"{who} {account}" for who, account in accounts.items() if account is not None)
                differences.append(f"{name}: {what}: {says}")
        if row.supplied != row.available + row.reserved + row.sold + row.written_off:
            differences.append(f"{name}: supplied is not available + reserved + sold + written off: {row}")
    differences += await inventory.ledger.verify()
    return Proof(len(expected), sum(row.available for row in rows.values()), sum(row.sold for row in rows.values()), tuple(differences))
