"""A shop in one file, without any server: python examples/plain_asyncio.py"""

import asyncio

from inventory_sdk import InsufficientStock, Inventory, Line, Receipt, injected

inventory = Inventory("memory://")


@inventory.reserves(run="now", operation_id="order_id", sku="ticket", quantity="count", ttl=900, raises={InsufficientStock: LookupError})
async def book(order_id: str, ticket: str, count: int, receipt: Receipt = injected()) -> str:
    return f"{order_id}: {count} × {ticket}, {receipt.lines[0].remaining} left{' (again)' if receipt.replayed else ''}"


@inventory.confirms(run="now", reservation="order_id")
async def pay(order_id: str) -> str:
    return f"{order_id}: paid"


async def main() -> None:
    async with inventory:
        await inventory.stock.restock([Line("concert", 10)], operation_id="first-row")
        print(await book("o1", "concert", 4))
        print(await book("o1", "concert", 4))  # a retry: answered, not taken twice
        print(await pay("o1"))
        rush = await asyncio.gather(*[book(f"rush-{n}", "concert", 1) for n in range(100)], return_exceptions=True)
        print(f"rush: {sum(isinstance(answer, str) for answer in rush)} of {len(rush)} got one")
        await inventory.settled()
        print("books:", await inventory.ledger.verify() or "in order", await inventory.stock.level("concert"))


if __name__ == "__main__":
    asyncio.run(main())
