"""What the shop could not do, or could not test, before."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from shop.inventory import inventory
from shop.models import Paper
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from inventory_sdk import Overloaded

from .test_shop import available, items, place


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """The worker does some things in its own time; a failing test waits for ten seconds."""
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.02)


async def test_fifty_buyers_at_once_get_five_mugs(client: httpx.AsyncClient, books: Any) -> None:
    answers = await asyncio.gather(*[place(client, f"o{number}", mug=1) for number in range(50)])
    assert sorted(answer.status_code for answer in answers) == [201] * 5 + [409] * 45
    assert await books.stock("mug") == (0, 5, 0)
    assert await inventory.ledger.verify() == []


async def test_an_order_id_with_other_items_is_refused(client: httpx.AsyncClient, books: Any) -> None:
    await place(client, "o1", mug=2)
    assert (await place(client, "o1", mug=3)).status_code == 409
    assert await books.stock("mug") == (3, 2, 0)


async def test_a_buyer_who_hangs_up_while_the_order_is_written_leaves_nothing_held(
    client: httpx.AsyncClient, books: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = asyncio.Event()

    async def stuck(*_: Any) -> None:
        writing.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        patch.setattr(AsyncSession, "get", stuck)
        request = asyncio.create_task(place(client, "o1", tee=2))
        await writing.wait()
        assert (await inventory.stock.level("tee")).available == 0
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    assert await available(client, "tee") == 2
    assert (await place(client, "o1", tee=2)).status_code == 201
    assert await books.stock("tee") == (0, 2, 0)


async def test_an_order_that_the_database_refuses_leaves_nothing_held(client: httpx.AsyncClient, books: Any) -> None:
    # The same product twice has one stock line, but two rows with one key.
    with pytest.raises(IntegrityError):
        await client.post("/orders", json={"id": "o1", "items": items(mug=1) + items(mug=2)})
    assert await available(client, "mug") == 5
    assert await books.stock("mug") == (5, 0, 0)


async def test_an_order_that_is_not_paid_in_time_expires(client: httpx.AsyncClient, books: Any) -> None:
    await place(client, "o1", mug=2)
    await inventory.stock.extend("o1", ttl=0.01)

    async def expired() -> bool:
        return bool((await client.get("/orders/o1")).json()["status"] == "expired")

    await until(expired)
    assert await available(client, "mug") == 5
    assert await books.stock("mug") == (5, 0, 0)
    assert (await client.post("/orders/o1/pay")).status_code == 409


async def test_a_till_sale_is_booked_by_the_worker(client: httpx.AsyncClient, engine: AsyncEngine) -> None:
    await client.post("/sales", json={"id": "s1", "items": items(mug=1)})
    assert await available(client, "mug") == 4

    async def booked() -> bool:
        async with AsyncSession(engine) as session:
            return await session.scalar(select(Paper.kind).where(Paper.id == "s1")) == "sale"

    await until(booked)


async def test_a_shop_that_is_overloaded_says_when_to_come_back(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*_: Any, **__: Any) -> None:
        raise Overloaded("the journal is full", retry_after=2.5)

    monkeypatch.setattr(inventory.stock, "submit", full)
    answer = await place(client, "o1", mug=1)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "3")
