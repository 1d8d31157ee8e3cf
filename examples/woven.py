"""Stock for code that one can't edit: python examples/woven.py"""

import asyncio

from third_party_shop.checkout import Basket, CardDeclined, Checkout

from inventory_sdk import InsufficientStock, Inventory, Line

inventory = Inventory("memory://")

unweave = inventory.weave(
    "third_party_shop.checkout:Checkout.submit",
    inventory.deducts(run="now", operation_id="basket-{basket.number}", lines="basket.lines"),
)


async def main() -> None:
    checkout = Checkout()
    async with inventory:
        await inventory.stock.restock([Line("book", 3)], operation_id="delivery")
        print(await checkout.submit(Basket(1, {"book": 2}), "visa"))
        try:
            await checkout.submit(Basket(2, {"book": 1}), "stolen")
        except CardDeclined:
            print("card declined,", (await inventory.stock.level("book")).available, "book left")
        try:
            await checkout.submit(Basket(3, {"book": 2}), "visa")
        except InsufficientStock as short:
            print(f"order 3 refused: {short}")
        print("orders:", checkout.orders)


if __name__ == "__main__":
    asyncio.run(main())
