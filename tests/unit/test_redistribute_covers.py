"""A trigger that a waiting request covers is not written down itself, and is followed by a run all the same.

The random test has several processes' askers and runners on one board; some askers are gone without a word (their process was killed).
INVENTORY_TEST_SEED replays one.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis
from redis.asyncio import Redis

from inventory_sdk import Recalculation, injected
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.redistribute import covers
from inventory_sdk.redistribute.asking import Requests
from inventory_sdk.redistribute.board import Board, Request
from inventory_sdk.redistribute.coalesced import CoalesceAspect, Coalesced
from inventory_sdk.redistribute.covers import Covers, Seen
from inventory_sdk.weave import Order, site_of
from tests.conftest import sample
from tests.redistribution_kit import inventory_of
from tests.stock_kit import until

KEYS = ["a", "b", "c"]


@pytest.fixture(params=["fakeredis", pytest.param("redis", marks=pytest.mark.redis)])
async def client(request: pytest.FixtureRequest, namespace: str, redis_url: str) -> AsyncIterator[Any]:
    client: Any = FakeAsyncRedis() if request.param == "fakeredis" else Redis.from_url(redis_url, protocol=2)
    yield client
    async for key in client.scan_iter(match=f"{namespace}:*"):
        await client.delete(key)
    await client.aclose()


def coalesced(debounce: float, max_wait: float, *, more: bool = False) -> Coalesced:
    inventory = inventory_of()
    decorate = inventory.coalesce(key="shop", debounce=debounce, max_wait=max_wait, name="shops")

    async def recalculate(shop: str, run: Recalculation = injected()) -> None: ...

    async def with_more(shop: str, number: int = 1) -> None: ...

    recalculate = decorate(with_more if more else recalculate)
    site = site_of(recalculate)
    assert site is not None
    aspect = site.find(Order.COALESCE)
    assert isinstance(aspect, CoalesceAspect)
    assert aspect.function is not None
    return aspect.function


class Asker:
    """What one process has: its board and its requests. ``scripts``: the names of those that it ran."""

    def __init__(self, client: Any, namespace: str, debounce: float = 0.0, max_wait: float = 0.0, *, more: bool = False) -> None:
        self.board = Board(client, namespace, "shops")
        self.scripts: list[str] = []
        real = self.board._run

        async def noting(name: str, *more: Any) -> Any:
            self.scripts.append(name)
            return await real(name, *more)

        self.board._run = noting  # type: ignore[method-assign]
        self.woken: list[float] = []
        self.failures: list[BaseException] = []
        self.requests = Requests(coalesced(debounce, max_wait, more=more), self.board, NoMetrics(), self.woken.append, self.failures.append)

    async def fire(self, key: str, trigger: str = "t", arguments: str = "{}") -> bool:
        """Whether it was let go at once."""
        asked = self.requests.fire(key, arguments, trigger)
        if asked is not None:
            await asked
        return asked is None

    def vanish(self) -> None:
        """Its process is killed: nothing of it runs any more, and nothing is written down."""
        requests = self.requests
        for timer in (requests._timer, requests._writer):
            if timer is not None:
                timer.cancel()
        if requests._sender is not None:
            requests._sender.remove_done_callback(requests._ended)
            requests._sender.cancel()
        requests._pending.clear()
        requests._begin = lambda: None  # type: ignore[method-assign]


@pytest.fixture
async def asker(client: Any, namespace: str) -> AsyncIterator[Callable[..., Asker]]:
    made: list[Asker] = []

    def make(debounce: float = 0.0, max_wait: float = 0.0, *, more: bool = False) -> Asker:
        made.append(Asker(client, namespace, debounce, max_wait, more=more))
        return made[-1]

    yield make
    for each in made:
        await each.requests.close()
        assert not each.failures


async def run(board: Board, key: str) -> dict[str, int]:
    """Claim and finish it; the calls that it answered."""
    (claim,) = await board.claim([key], 10)
    assert (await board.finish(claim, "", 0.0, 0.0, 0.0, {}))[0]
    return dict(claim.calls)


async def test_until_its_key_is_due_a_trigger_is_let_go_at_once_and_puts_the_run_off(asker: Callable[..., Asker]) -> None:
    one = asker(debounce=0.2, max_wait=5.0)
    assert not await one.fire("a", "first")
    await asyncio.sleep(0.1)
    last = time.monotonic()
    assert all([await one.fire("a", "second") for _ in range(50)])
    assert one.scripts == ["request"]
    await until(lambda: len(one.scripts) == 2)
    keys, wait = await one.board.peek(1)
    assert not keys
    assert wait is not None
    assert time.monotonic() + wait - last >= 0.19  # 0.2 s after the last, and not after the first
    await asyncio.sleep(wait + 0.01)
    assert await run(one.board, "a") == {"first": 1, "second": 50}


async def test_once_it_is_due_a_look_is_enough_until_somebody_takes_it(asker: Callable[..., Asker]) -> None:
    one, other = asker(), asker()
    await one.fire("a")
    for _ in range(20):
        seen = len(one.scripts)
        assert not await one.fire("a")  # it waits for a look: anybody may have taken the key
        assert len(one.scripts) > seen
    assert one.scripts.count("look") >= 15  # now and then they are counted
    (claim,) = await other.board.claim(["a"], 10)
    await one.fire("a")
    assert one.scripts[-1] == "request"
    assert (await other.board.finish(claim, "", 0, 0, 0, {}))[1] is not None  # it waits for the next run


async def test_what_was_covered_is_counted_and_causes_no_run_once_it_was_answered(asker: Callable[..., Asker]) -> None:
    one = asker()
    await one.fire("a")
    await one.fire("a")
    await run(one.board, "a")
    await until(lambda: one.scripts.count("request") == 2)
    await until(lambda: not one.requests._pending)
    counts = await one.board.counted()
    assert (counts["t"].calls, counts["t"].runs) == (2, 1)
    assert await one.board.peek(1) == ([], None)


async def test_who_is_covered_has_its_part_of_what_the_run_costs(asker: Callable[..., Asker]) -> None:
    one = asker()
    await one.fire("a", "once")
    with suppress(TimeoutError):
        async with asyncio.timeout(0.3):
            while True:
                await one.fire("a", "often")
    calls = await run(one.board, "a")
    assert calls["once"] == 1
    assert calls["often"] >= 5


async def test_nothing_is_covered_where_calls_with_one_key_can_differ(asker: Callable[..., Asker]) -> None:
    one, other = asker(debounce=0.5, max_wait=5.0, more=True), asker(debounce=0.5, max_wait=5.0, more=True)
    for number, who in enumerate((one, other, one, one)):
        assert not await who.fire("a", arguments=f'{{"number": {number}}}')
    assert [*one.scripts, *other.scripts] == ["request"] * 4
    await asyncio.sleep(0.55)
    (claim,) = await one.board.claim(["a"], 10)
    assert claim.arguments == '{"number": 3}'
    assert sum(claim.calls.values()) == 4


async def test_a_debounce_is_kept_also_where_other_processes_have_put_the_run_off(asker: Callable[..., Asker]) -> None:
    one, other = asker(debounce=0.3, max_wait=10.0), asker(debounce=0.3, max_wait=10.0)
    await one.fire("a")
    await asyncio.sleep(0.2)
    await other.fire("a")
    await asyncio.sleep(0.2)  # the board is not due yet, and what ``one`` was told is over
    last = time.monotonic()
    await one.fire("a")
    keys, wait = await one.board.peek(1)
    assert not keys
    assert wait is not None
    assert time.monotonic() + wait - last >= 0.29


async def test_once_max_wait_is_near_a_look_is_enough(asker: Callable[..., Asker]) -> None:
    one = asker(debounce=0.2, max_wait=0.3)
    await one.fire("a")
    async with asyncio.timeout(5):
        while "look" not in one.scripts:
            await one.fire("a")
            await asyncio.sleep(0.005)
    written = one.scripts.count("request")
    assert written <= 8
    for _ in range(20):
        await one.fire("a")
    assert one.scripts.count("request") <= written + 4  # now and then they are counted


async def test_a_cover_that_is_not_there_any_more_is_found_out(asker: Callable[..., Asker], client: Any, namespace: str) -> None:
    """A replica that was behind took over, and others' requests have made up for the versions since."""
    one, other = asker(), asker()
    await one.fire("a")
    await one.fire("a")
    begins = f"{namespace}:redistribute:{{shops}}"
    await client.delete(f"{begins}:key:a")
    await client.zrem(f"{begins}:due", "a")
    for key in "bcd":
        await other.fire(key)
    await one.fire("a")  # by what it knows a waits
    assert one.scripts[-1] == "look"
    await until(lambda: one.scripts.count("request") == 2)
    await until(lambda: not one.requests._pending)
    assert "a" in (await one.board.peek(9))[0]


async def test_a_run_that_came_earlier_than_the_clock_said_is_followed_by_another(
    asker: Callable[..., Asker], client: Any, namespace: str
) -> None:
    """The clock of Redis is put forward, or goes faster."""
    one = asker(debounce=0.2, max_wait=1.0)
    await one.fire("a")
    await client.zadd(f"{namespace}:redistribute:{{shops}}:due", {"a": 0})
    await run(one.board, "a")
    assert await one.fire("a")
    await until(lambda: one.scripts.count("request") == 2)
    await asyncio.sleep(0.25)
    assert (await one.board.peek(1))[0] == ["a"]


async def test_a_redis_that_forgot_all_gets_what_it_covered(
    asker: Callable[..., Asker], client: Any, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = asker(debounce=0.1, max_wait=1.0)
    await one.fire("a")
    async for key in client.scan_iter(match=f"{namespace}:*"):
        await client.delete(key)
    assert await one.fire("a")
    await asyncio.sleep(0.2)
    assert (await one.board.peek(1))[0] == ["a"]
    async for key in client.scan_iter(match=f"{namespace}:*"):
        await client.delete(key)
    await one.fire("a")  # the look sees it
    assert (await one.board.answered(["a"]))[0].known


async def test_nothing_covers_while_nobody_knows_what_was_claimed() -> None:
    seen = Covers()

    def wrote(*keys: str) -> None:
        for key in keys:
            seen.wrote(key, 1, time.monotonic(), 0.0, True)

    seen.saw(Seen(3, 10, ()))
    wrote("a", "b")
    seen.saw(Seen(4, 11, ["a"]))
    assert (seen.waits("a"), seen.waits("b")) == (0, 1)
    for gone in (Seen(4, 13, ["x"]), Seen(4, 5, ()), Seen(1, 5, ())):
        wrote("a", "b")
        seen.saw(gone)  # more claims than are listed; a board that went back
        assert not seen.waits("b")
    wrote("a")
    seen.wrote("a", 2, time.monotonic(), None, False)  # it is being calculated
    assert not seen.waits("a")
    seen.close()
    wrote("a")
    assert not seen.waits("a")


async def test_claims_that_an_older_version_made_are_not_taken_for_others(client: Any, namespace: str) -> None:
    board = Board(client, namespace, "shops")
    for key in "abc":
        await board.request([Request(key, "{}", False, {"t": 1}, "t")], 0, 0)
    await board.claim(["a"], 10)
    assert await board.look(0) == Seen(3, 1, ["a"])
    await client.hincrby(f"{namespace}:redistribute:{{shops}}:counts", "fence", 1)  # as one does that keeps no list
    assert await board.look(1) == Seen(3, 2, ())
    await board.claim(["c"], 10)
    assert await board.look(2) == Seen(3, 3, ["c"])
    assert await board.look(0) == Seen(3, 3, ())


async def test_every_trigger_that_returned_is_followed_by_a_run_whoever_vanishes(
    client: Any, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(covers, "LEAD", 0.005)
    monkeypatch.setattr("inventory_sdk.redistribute.asking.TOGETHER", 0.01)
    given = os.environ.get("INVENTORY_TEST_SEED")
    for seed in [int(given)] if given else [random.randrange(2**32) for _ in sample(range(30))]:
        print(f"INVENTORY_TEST_SEED={seed}")  # noqa: T201  # replays a failure
        await asyncio.wait_for(_storm(client, f"{namespace}:{seed}", random.Random(seed)), 30)


async def _storm(client: Any, namespace: str, dice: random.Random) -> None:
    debounce, max_wait = dice.choice([(0.0, 0.0), (0.01, 0.03), (0.03, 0.05)])
    askers = [Asker(client, namespace, debounce, max_wait) for _ in range(3)]
    board = Board(client, namespace, "shops")
    returned: dict[str, float] = {}  # by key: when the last trigger began that returned
    began: dict[str, float] = {}
    fired: Counter[str] = Counter()
    vanished: list[Asker] = []
    asking = taking = True

    async def ask(number: int) -> None:
        while asking:
            one, key, at = askers[number], dice.choice(KEYS), time.monotonic()
            fired["t"] += 1
            asked = one.requests.fire(key, "{}", "t")
            while asked is not None and not asked.done() and one not in vanished:
                await asyncio.wait({asked}, timeout=0.01)
            if one not in vanished:
                returned[key] = max(returned.get(key, 0.0), at)
            await asyncio.sleep(dice.choice([0.0, 0.0, 0.001, 0.004]))

    async def take() -> None:
        while taking or (await board.peek(1)) != ([], None):
            keys, _ = await board.peek(len(KEYS))
            dice.shuffle(keys)
            for claim in await board.claim(keys[:1], 10):
                began[claim.key] = time.monotonic()
                await asyncio.sleep(dice.choice([0.0, 0.002, 0.01]))
                await board.finish(claim, "", debounce, max_wait, 0.0, {})
            await asyncio.sleep(dice.choice([0.0, 0.001, 0.01]))

    async def vanish() -> None:
        for _ in range(4):
            await asyncio.sleep(dice.uniform(0.01, 0.04))
            number = dice.randrange(3)
            gone, askers[number] = askers[number], Asker(client, namespace, debounce, max_wait)
            vanished.append(gone)
            gone.vanish()

    tasks = [asyncio.create_task(each) for each in (ask(0), ask(1), ask(2), take(), take(), vanish())]
    await tasks[-1]
    asking = False
    await asyncio.wait(tasks[:3])
    for one in askers:
        await one.requests.close()
    taking = False
    await asyncio.gather(*tasks)
    assert not [failure for one in askers for failure in one.failures]
    late = {key: (at, began.get(key)) for key, at in returned.items() if began.get(key, 0.0) < at}
    assert not late, f"no run began after the last trigger: {late}"
    counted = (await board.counted())["t"].calls
    assert counted <= fired["t"]
    async for key in client.scan_iter(match=f"{namespace}:*"):
        await client.delete(key)
