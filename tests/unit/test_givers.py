"""``givers``: a sale at ``queue`` is safe only with the entries that gave back what it sells."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from inventory_sdk.ledger.protocol import Void
from inventory_sdk.metrics.events import Retried
from inventory_sdk.model import Position, key_of
from inventory_sdk.stock import givers
from inventory_sdk.stock.batch import Answered
from tests.stock_kit import MERCHANT, SERVERS, Shop, lines, shop_on, until


class Queue:
    """Confirms what the test lets it confirm; ``sent`` are the sequences in order."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.answers: dict[int, asyncio.Future[None]] = {}
        self.all: list[asyncio.Future[None]] = []
        self.prompt = False

    def publish(self, partition: int, epoch: int, sequence: int, body: str) -> Awaitable[Any]:
        self.sent.append(sequence)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: done.exception())
        self.answers[sequence] = future
        self.all.append(future)
        if self.prompt:
            future.set_result(None)
        return future

    def confirm(self, *sequences: int) -> None:
        for sequence in sequences:
            self.answers[sequence].set_result(None)

    def fail(self, *sequences: int) -> None:
        for sequence in sequences:
            self.answers[sequence].set_exception(OSError("the queue is away"))


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture(params=SERVERS)
async def shop(request: pytest.FixtureRequest, namespace: str, queue: Queue) -> AsyncIterator[Shop]:
    async with shop_on(request.param, namespace, {"a": 10, "b": 10}, publish=queue.publish) as shop:
        yield shop
        for future in queue.all:
            if not future.done():
                future.set_result(None)
        await shop.engine.drain()


async def known(shop: Shop) -> dict[str, str]:
    """What Redis has as givers: sku → sequences."""
    client: Any = shop.client
    found = await client.hgetall(shop.key("givers"))
    return {key.decode().partition("\x1f")[2]: value.decode() for key, value in found.items()}


def asked(shop: Shop) -> list[Answered]:
    """The batches of calls that wanted more than Redis, as they come."""
    batches: list[Answered] = []

    async def reach(engine: Any, position: Position, level: str, key: str, batch: Answered | None) -> None:
        assert batch is not None
        batches.append(batch)

    shop.stock._reach = reach
    return batches


async def given_back(shop: Shop, name: str = "hold", **quantities: int) -> int:
    """A hold, released: the sequence of the release."""
    await shop.stock.reserve(lines(**quantities), operation_id=name)
    return (await shop.stock.release(name)).positions[0].sequence


GIVING: dict[str, Callable[[Shop], Awaitable[Any]]] = {
    "release": lambda shop: shop.stock.release("hold"),
    "a part": lambda shop: shop.stock.release("hold", lines=lines(a=1), operation_id="part"),
    "expire": lambda shop: shop.expire("hold"),
}


@pytest.mark.parametrize("act", GIVING)
async def test_what_gives_back_stands_among_givers_until_it_is_confirmed(shop: Shop, queue: Queue, act: str) -> None:
    await shop.stock.reserve(lines(a=2, b=1), operation_id="hold", ttl=600)
    assert await known(shop) == {}
    await GIVING[act](shop)
    (sequence,) = {int(each) for each in (await known(shop)).values()}
    assert set(await known(shop)) == ({"a"} if act == "a part" else {"a", "b"})
    assert sequence == queue.sent[-1]
    queue.confirm(sequence)
    await shop.engine.drain()
    assert await known(shop) == {}


async def test_an_undo_and_a_void_give_back_too(shop: Shop, queue: Queue) -> None:
    receipt = await shop.stock.deduct(lines(a=1), operation_id="o1")
    await shop.stock.undo(receipt)
    assert await known(shop) == {"a": "2"}
    refused = Void(Position(0, 1, 1), 0, key_of(MERCHANT, "x"), "deduct", "", (key_of(MERCHANT, "b"), 1, 0), False)
    await shop.engine.upkeep.void(0, 1, refused)
    assert await known(shop) == {"a": "2", "b": "3"}


async def test_taking_and_confirming_give_nothing_back(shop: Shop) -> None:
    await shop.stock.reserve(lines(a=2), operation_id="hold")
    await shop.stock.confirm("hold")
    await shop.stock.deduct(lines(a=1, b=1))
    assert await known(shop) == {}


async def test_a_sale_at_queue_learns_what_it_rests_on_and_others_do_not(shop: Shop) -> None:
    first = await given_back(shop, a=2)
    batches = asked(shop)
    await shop.stock.deduct(lines(b=1), durability="queue")
    assert not batches[-1].givers
    await shop.stock.deduct(lines(a=1), durability="database")
    assert not batches[-1].givers
    for sell in (
        lambda: shop.stock.deduct(lines(a=1), operation_id="lone", durability="queue"),
        lambda: shop.stock.deduct(lines(a=1), operation_id="lone", durability="queue"),  # a repeat rests on them as well
        lambda: shop.stock.deduct(lines(a=1, b=1), durability="queue"),
        lambda: shop.stock.reserve(lines(a=1), operation_id="r", durability="queue"),
        lambda: shop.stock.reserve(lines(a=1), operation_id="r", durability="queue"),
        lambda: shop.stock.confirm("r", durability="queue"),
        lambda: shop.stock.confirm("r", durability="queue"),
    ):
        await sell()
        assert batches[-1].givers == [key_of(MERCHANT, "a"), str(first)]


async def test_a_batch_waits_for_its_own_givers_and_publishes_the_strangers_from_the_journal(
    shop: Shop, queue: Queue, namespace: str
) -> None:
    mine = await given_back(shop, "h1", a=1)
    engine, view = shop.engine, shop.engine.partitions[0]
    assert engine.givers is not None
    # Another process gave it: this one has only the journal.
    stranger = givers.Givers(queue.publish, engine.in_background, shop.metrics)
    confirming = asyncio.create_task(stranger.confirm(view, 1, [key_of(MERCHANT, "a"), str(mine)]))
    await until(lambda: queue.sent.count(mine) == 2)
    assert not confirming.done()
    queue.confirm(mine)
    assert await confirming == 0
    own = asyncio.create_task(engine.givers.confirm(view, 1, [key_of(MERCHANT, "a"), str(mine)]))
    await asyncio.sleep(0)
    assert not own.done()
    assert queue.sent.count(mine) == 2


async def test_a_failed_confirm_fails_the_sale_and_the_next_one_publishes_anew(shop: Shop, queue: Queue) -> None:
    gave = await given_back(shop, a=1)
    queue.fail(gave)
    await shop.engine.drain()
    assert await known(shop) == {"a": str(gave)}
    view = shop.engine.partitions[0]
    assert shop.engine.givers is not None
    first = asyncio.create_task(shop.engine.givers.confirm(view, 1, [key_of(MERCHANT, "a"), str(gave)]))
    await until(lambda: queue.sent.count(gave) == 2)
    queue.fail(gave)
    with pytest.raises(OSError, match="the queue is away"):
        await first
    queue.prompt = True
    assert await shop.engine.givers.confirm(view, 1, [key_of(MERCHANT, "a"), str(gave)]) == 0
    await shop.engine.drain()
    assert await known(shop) == {}


async def test_too_many_givers_and_trimmed_ones_are_left_to_the_ledger(shop: Shop, queue: Queue) -> None:
    view = shop.engine.partitions[0]
    assert shop.engine.givers is not None
    a = key_of(MERCHANT, "a")
    many = ",".join(map(str, range(1, givers.MOST + 2)))
    assert await shop.engine.givers.confirm(view, 1, [a, many]) == givers.MOST + 1
    assert await shop.engine.givers.confirm(view, 1, [a, "*700", key_of(MERCHANT, "b"), "900"]) == 900
    assert queue.sent == []
    assert await shop.engine.givers.confirm(view, 1, [a, "55"]) == 55  # not in the journal


async def test_beyond_256_a_field_only_remembers_the_last_one(shop: Shop, queue: Queue) -> None:
    client: Any = shop.client
    field = key_of(MERCHANT, "a")
    await client.hset(shop.key("givers"), field, ",".join(map(str, range(1000, 1000 + givers.MOST - 1))))
    last = await given_back(shop, "h1", a=1)
    assert (await known(shop))["a"].endswith(f",{last}")
    last = await given_back(shop, "h2", a=1)
    assert await known(shop) == {"a": f"*{last}"}
    queue.confirm(*queue.answers)
    await shop.engine.drain()
    assert await known(shop) == {"a": f"*{last}"}
    await shop.engine.upkeep.trim(0, 1, last - 1)
    assert await known(shop) == {"a": f"*{last}"}
    await shop.engine.upkeep.trim(0, 1, last)
    assert await known(shop) == {}


async def test_what_the_ledger_has_applied_leaves_and_the_rest_stays(shop: Shop) -> None:
    first = await given_back(shop, "h1", a=1)
    second = await given_back(shop, "h2", a=1)
    assert await known(shop) == {"a": f"{first},{second}"}
    await shop.engine.upkeep.trim(0, 1, first)
    assert await known(shop) == {"a": str(second)}
    await shop.engine.upkeep.trim(0, 2, second)  # another epoch says nothing about this one
    assert await known(shop) == {"a": str(second)}


async def test_redis_away_when_givers_are_safe_is_counted_and_left_to_the_worker(shop: Shop, queue: Queue) -> None:
    gave = await given_back(shop, a=1)
    run = shop.engine.wire.run

    async def away(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "given":
            raise givers.RedisError("gone")
        return await run(name, *arguments, **options)

    shop.engine.wire.run = away  # type: ignore[method-assign]
    queue.confirm(gave)
    await shop.engine.drain()
    assert Retried("givers", "RedisError") in shop.metrics.events
    assert await known(shop) == {"a": str(gave)}
    shop.engine.wire.run = run  # type: ignore[method-assign]
    await shop.engine.upkeep.trim(0, 1, gave)
    assert await known(shop) == {}


async def test_without_a_queue_nothing_is_remembered(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {"a": 10}) as shop:
        await given_back(shop, a=2)
        assert await known(shop) == {}
        assert shop.engine.givers is None


def test_runs_of_consecutive_numbers_become_one_read() -> None:
    assert givers._runs([]) == []
    assert givers._runs([4]) == [(4, 4)]
    assert givers._runs([1, 2, 3, 7, 9, 10]) == [(1, 3), (7, 7), (9, 10)]
