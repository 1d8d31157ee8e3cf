"""A service of classes: methods, a classmethod, work for later: python examples/warehouse.py"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk import Inventory, Line, Movement, Receipt, injected

inventory = Inventory("memory://", merchant=None)
letters: list[str] = []
book: list[str] = []


@dataclass(frozen=True)
class Parcel:
    number: str
    shop: str
    contents: dict[str, int] = field(default_factory=dict)


class Warehouse:
    """One shop's. Where the stock is said to be lies in the arguments, or in ``self``."""

    def __init__(self, shop: str) -> None:
        self.shop = shop
        self.packed: list[str] = []

    @classmethod
    def of(cls, session: AsyncSession) -> Self:
        """How the worker makes one for ``notify``."""
        return cls("by the worker")

    @inventory.reserves(
        run="now", merchant="self.shop", operation_id="parcel.number", lines="parcel.contents", ttl=60, order="{self.shop}/{parcel.number}"
    )
    async def pack(self, parcel: Parcel, receipt: Receipt = injected()) -> str:
        self.packed.append(parcel.number)
        return f"{parcel.number} holds {', '.join(f'{line.quantity} {line.sku}' for line in receipt.lines)}"

    @inventory.confirms(run="later", name="notify", merchant="shop", reservation="number")
    async def notify(self, shop: str, number: str) -> None:
        letters.append(f"{shop}: {number} is on its way, says the one made {self.shop}")

    @inventory.releases(run="now", merchant="parcel.shop", reservation=lambda parcel: parcel.number)
    @classmethod
    async def unpack(cls, parcel: Parcel) -> str:
        return f"{parcel.number} unpacked"


inventory.provides(Warehouse)(Warehouse.of)


@inventory.writes_stock
async def keep_books(moves: Sequence[Movement], session: AsyncSession) -> None:
    book.extend(f"{move.merchant}: {move.kind} {move.quantity} {move.sku}" for move in moves)


async def main() -> None:
    async with inventory:
        await inventory.stock.restock([Line("lamp", 2), Line("rug", 1)], merchant="north", operation_id="delivery")
        north = Warehouse("north")
        one, two = Parcel("p1", "north", {"lamp": 1, "rug": 1}), Parcel("p2", "north", {"lamp": 1})
        print(await north.pack(one))
        print(await north.pack(two))
        print(await Warehouse.unpack(two))
        receipt = await north.notify("north", "p1")  # answered at once; the letter is the worker's
        print(f"{receipt.kind} of {len(receipt.lines)} lines")
        await inventory.settled()
        async with asyncio.timeout(10):
            while not letters:
                await asyncio.sleep(0.01)
    print(*letters, *book, sep="\n")


if __name__ == "__main__":
    asyncio.run(main())
