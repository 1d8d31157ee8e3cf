from typing import Any

import httpx
import pytest


def items(**quantities: int) -> list[dict[str, Any]]:
    return [{"product_id": product_id, "quantity": quantity} for product_id, quantity in quantities.items()]


async def place(client: httpx.AsyncClient, order_id: str, **quantities: int) -> httpx.Response:
    return await client.post("/orders", json={"id": order_id, "items": items(**quantities)})


async def available(client: httpx.AsyncClient, product_id: str) -> int:
    answer = await client.get(f"/products/{product_id}")
    return int(answer.json()["available"])


async def test_an_order_holds_its_items_until_it_is_paid(client: httpx.AsyncClient, books: Any) -> None:
    placed = await place(client, "o1", mug=2, tee=1)
    assert (placed.status_code, placed.json()) == (201, {"id": "o1", "status": "placed"})
    assert await available(client, "mug") == 3
    assert await books.stock("mug") == (3, 2, 0)
    paid = await client.post("/orders/o1/pay")
    assert paid.json()["status"] == "paid"
    assert await books.stock("mug") == (3, 0, 2)
    assert await books.stock("tee") == (1, 0, 1)


async def test_an_order_of_too_many_is_refused_whole(client: httpx.AsyncClient, books: Any) -> None:
    refused = await place(client, "o1", mug=1, tee=3)
    assert refused.status_code == 409
    assert "tee" in refused.json()["detail"]
    assert await books.stock("mug") == (5, 0, 0)
    assert (await client.get("/orders/o1")).status_code == 404


async def test_what_the_shop_does_not_have_is_refused(client: httpx.AsyncClient) -> None:
    assert (await place(client, "o1", hat=1)).status_code == 409


async def test_a_product_that_does_not_exist_is_not_found(client: httpx.AsyncClient) -> None:
    assert (await client.get("/products/hat")).status_code == 404


async def test_the_last_unit_is_sold_once(client: httpx.AsyncClient) -> None:
    assert (await place(client, "o1", tee=2)).status_code == 201
    assert (await place(client, "o2", tee=1)).status_code == 409
    assert await available(client, "tee") == 0


async def test_an_order_that_is_sent_again_is_placed_once(client: httpx.AsyncClient, books: Any) -> None:
    for _ in range(2):
        again = await place(client, "o1", mug=2)
        assert again.json() == {"id": "o1", "status": "placed"}
    assert await books.stock("mug") == (3, 2, 0)


async def test_paying_twice_sells_once(client: httpx.AsyncClient, books: Any) -> None:
    await place(client, "o1", mug=2)
    for _ in range(2):
        assert (await client.post("/orders/o1/pay")).status_code == 200
    assert await books.stock("mug") == (3, 0, 2)


async def test_a_cancelled_order_gives_its_items_back(client: httpx.AsyncClient, books: Any) -> None:
    await place(client, "o1", mug=2)
    assert (await client.post("/orders/o1/cancel")).json()["status"] == "cancelled"
    assert await books.stock("mug") == (5, 0, 0)
    assert (await client.post("/orders/o1/pay")).status_code == 409


async def test_a_paid_order_is_not_cancelled(client: httpx.AsyncClient, books: Any) -> None:
    await place(client, "o1", mug=2)
    await client.post("/orders/o1/pay")
    assert (await client.post("/orders/o1/cancel")).status_code == 409
    assert await books.stock("mug") == (3, 0, 2)


@pytest.mark.parametrize("path", ["/orders/none", "/orders/none/pay", "/orders/none/cancel"])
async def test_an_order_that_does_not_exist_is_not_found(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.request("GET" if path == "/orders/none" else "POST", path)).status_code == 404


async def test_what_comes_back_is_on_the_shelf_again(client: httpx.AsyncClient, books: Any) -> None:
    await place(client, "o1", mug=3)
    await client.post("/orders/o1/pay")
    for _ in range(2):
        slip = {"id": "r1", "items": items(mug=1)}
        assert (await client.post("/orders/o1/returns", json=slip)).status_code == 200
    assert await available(client, "mug") == 3
    assert await books.stock("mug") == (3, 0, 2)


async def test_more_than_was_sold_does_not_come_back(client: httpx.AsyncClient, books: Any) -> None:
    await place(client, "o1", mug=1)
    slip = {"id": "r1", "items": items(mug=1)}
    assert (await client.post("/orders/o1/returns", json=slip)).status_code == 409
    await client.post("/orders/o1/pay")
    assert (await client.post("/orders/o1/returns", json={"id": "r2", "items": items(mug=2)})).status_code == 409
    assert await books.stock("mug") == (4, 0, 1)


async def test_a_delivery_is_for_sale_at_once_and_only_once(client: httpx.AsyncClient, books: Any) -> None:
    for _ in range(2):
        assert (await client.post("/deliveries", json={"id": "d1", "items": items(tee=10)})).status_code == 204
    assert await available(client, "tee") == 12
    assert (await place(client, "o1", tee=12)).status_code == 201
    assert await books.stock("tee") == (0, 12, 0)


async def test_the_till_and_the_orders_sell_from_one_shelf(client: httpx.AsyncClient, books: Any) -> None:
    for _ in range(2):
        assert (await client.post("/sales", json={"id": "s1", "items": items(tee=2)})).status_code == 204
    assert (await place(client, "o1", tee=1)).status_code == 409
    assert (await client.post("/sales", json={"id": "s2", "items": items(tee=1)})).status_code == 409
    assert await books.stock("tee") == (0, 0, 2)


async def test_accounting_sees_every_change(client: httpx.AsyncClient, books: Any) -> None:
    await place(client, "o1", mug=2)
    await client.post("/orders/o1/pay")
    await client.post("/orders/o1/returns", json={"id": "r1", "items": items(mug=1)})
    await client.post("/deliveries", json={"id": "d1", "items": items(mug=4)})
    await client.post("/sales", json={"id": "s1", "items": items(mug=3)})
    await place(client, "o2", mug=1)
    await client.post("/orders/o2/cancel")
    assert sorted(await books.changes("mug")) == [
        ("confirm", "o1", 2),
        ("deduct", "s1", 3),
        ("release", "o2", 1),
        ("reserve", "o1", 2),
        ("reserve", "o2", 1),
        ("restock", "d1", 4),
        ("take_back", "r1", 1),
    ]
