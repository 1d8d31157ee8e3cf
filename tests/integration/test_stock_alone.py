"""A caller who is alone is sent in its own turn of the event loop: whatever happens then, one effect, and nothing is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis import Redis as BlockingRedis

from inventory_sdk import context
from inventory_sdk.errors import OutcomeUnknown, StockFrozen
from inventory_sdk.model import Line, key_of
from inventory_sdk.stock.batch import Batcher
from inventory_sdk.stock.wire import Limits, Wire
from tests.conftest import service_url
from tests.stock_kit import MERCHANT, Proxy, Shop, lines, on_client, plain_client, shop_on, until

pytestmark = pytest.mark.redis
TIMEOUT = 0.2


@pytest.fixture
async def shop(namespace: str) -> AsyncIterator[Shop]:
    async with shop_on("redis", namespace, {"a": 10}) as shop:
        yield shop


@pytest.fixture
async def proxy(shop: Shop) -> AsyncIterator[Proxy]:
    async with Proxy(service_url("redis")) as proxy:
        yield proxy


@pytest.fixture
async def remote(shop: Shop, proxy: Proxy) -> AsyncIterator[Shop]:
    """The same stock, through the proxy."""
    client = plain_client(proxy.url)
    try:
        async with on_client(client, shop.settings.namespace, ledger=shop.ledger, redis_timeout=TIMEOUT) as remote:
            yield remote
    finally:
        await client.aclose()


async def alone(shop: Shop) -> Batcher:
    """Warm: the next caller is the only one, on a connection that was used a moment ago."""
    for n in range(2):
        await shop.stock.deduct(lines(a=1), operation_id=f"warm-{n}")
    return shop.engine.batcher(shop.engine.partitions[0], context.lane.get())


def take(name: str, quantity: int = 1) -> list[Any]:
    return ["deduct", key_of(MERCHANT, name), f"d{name}", [key_of(MERCHANT, "a"), quantity], "", "", 0, "", "", ""]


def wire(shop: Shop) -> Wire:
    found = shop.engine.wire
    assert isinstance(found, Wire)
    return found


async def test_redis_has_it_before_the_event_loop_comes_round(shop: Shop) -> None:
    batcher = await alone(shop)
    answer = batcher.submit(take("o1"))
    with BlockingRedis.from_url(service_url("redis")) as client:
        until_then = time.monotonic() + 5
        while client.hget(shop.key("available"), key_of(MERCHANT, "a")) != b"7":
            assert time.monotonic() < until_then, "it waits for the event loop"
    (code, left), _ = await answer
    assert (code, left) == (0, 7)


async def test_who_comes_in_the_meantime_goes_in_one_batch(shop: Shop) -> None:
    batcher = await alone(shop)
    await asyncio.gather(*(batcher.submit(take(f"o{n}")) for n in range(5)))
    assert [batch.operations for batch in shop.metrics.batches()][-2:] == [1, 4]
    await asyncio.gather(*(batcher.submit(take(f"p{n}")) for n in range(3)))
    assert shop.metrics.batches()[-1].operations == 3, "after a batch of several nobody is taken to be alone"
    assert await shop.counters("a") == (0, 0)


async def test_a_caller_cancelled_in_the_very_turn_is_undone(shop: Shop) -> None:
    await alone(shop)
    task = asyncio.create_task(shop.stock.deduct(lines(a=1)))
    await asyncio.sleep(0)  # it has been sent
    assert task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await shop.engine.drain()
    assert await shop.counters("a") == (8, 0)
    assert [entry.operations[0].kind for entry in await shop.journal()][-2:] == ["deduct", "undo"]
    assert not wire(shop)._busy


async def test_a_caller_cancelled_in_the_very_turn_with_an_id_of_its_own_can_ask(shop: Shop) -> None:
    await alone(shop)
    task = asyncio.create_task(shop.stock.deduct(lines(a=1), operation_id="mine"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await shop.stock.deduct(lines(a=1), operation_id="mine")).replayed
    assert await shop.counters("a") == (7, 0)


@pytest.mark.parametrize("what", ["lost", "swallowed"])
async def test_a_reply_that_does_not_come(shop: Shop, remote: Shop, proxy: Proxy, what: Any) -> None:
    await alone(remote)
    fault = proxy.fault("batch", what)
    receipt = await remote.stock.deduct(lines(a=1), operation_id="o1")
    assert fault.count == 1
    assert not receipt.replayed
    assert await shop.counters("a") == (7, 0)
    assert not wire(remote)._busy


async def test_a_script_that_runs_late_does_nothing(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    await alone(remote)
    fault = proxy.fault("batch", "held")
    receipt = await remote.stock.deduct(lines(a=1), operation_id="o1")
    fault.go.set()
    await fault.done.wait()
    assert fault.replies[0].split(b"\r\n")[1].startswith(b"late")
    assert not receipt.replayed
    assert await shop.counters("a") == (7, 0)


async def test_a_connection_that_was_closed_meanwhile(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    await alone(remote)
    proxy.cut()
    receipt = await remote.stock.deduct(lines(a=1), operation_id="o1")
    assert not receipt.replayed
    assert await shop.counters("a") == (7, 0)
    assert not wire(remote)._busy


async def test_the_epoch_has_changed_meanwhile(shop: Shop) -> None:
    await alone(shop)
    await shop.client.hset(shop.key("meta"), mapping={"epoch": "2", "seq": "0"})
    receipt = await shop.stock.deduct(lines(a=1), operation_id="o1")
    assert (receipt.positions[0].epoch, receipt.positions[0].sequence) == (2, 1)


async def test_the_partition_has_closed_meanwhile(shop: Shop) -> None:
    await alone(shop)
    await shop.client.hset(shop.key("meta"), "state", "rebuilding")
    with pytest.raises(StockFrozen):
        await shop.stock.deduct(lines(a=1), operation_id="o1")
    await shop.client.hset(shop.key("meta"), "state", "open")
    assert await shop.counters("a") == (8, 0)


async def test_a_batch_that_is_stopped_before_it_began_leaves_nobody_waiting(shop: Shop) -> None:
    """As at the end of ``asyncio.run``, which cancels every task."""
    batcher = await alone(shop)
    answer = batcher.submit(take("o1"))
    task = batcher._task
    assert task is not None
    task.cancel()
    with pytest.raises(OutcomeUnknown):
        await answer
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: batcher._task is None)
    assert (await shop.stock.deduct([Line("a", 1)], operation_id="o2")).operation_id == "o2"


# Limits -----------------------------------------------------------------------------------------------------------------------


async def test_limits_end_what_takes_too_long_and_nothing_else() -> None:
    limits = Limits(0.05)

    async def short() -> str:
        with limits.limit():
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)  # no longer limited
        return "done"

    async def long() -> None:
        with limits.limit():
            await asyncio.sleep(60)

    answers = await asyncio.gather(short(), long(), short(), long(), return_exceptions=True)
    assert [type(answer) for answer in answers] == [str, TimeoutError, str, TimeoutError]
    assert not limits.waiting
    await asyncio.sleep(0.1)
    with pytest.raises(TimeoutError):
        await long()
    limits.close()


async def test_who_is_cancelled_when_its_time_is_over_is_cancelled() -> None:
    limits = Limits(0.02)
    began = asyncio.Event()

    async def long() -> None:
        with limits.limit():
            began.set()
            await asyncio.sleep(60)

    task = asyncio.create_task(long())
    await began.wait()
    limits.waiting[0].expire()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    limits.close()
