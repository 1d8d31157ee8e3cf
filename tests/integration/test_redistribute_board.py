"""The board in Redis, on fakeredis and on a server: who has a key, for how long, and what becomes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis
from redis.asyncio import Redis

from inventory_sdk.redistribute.board import Board, Claim, Counts, Request


@pytest.fixture(params=["fakeredis", pytest.param("redis", marks=pytest.mark.redis)])
async def board(request: pytest.FixtureRequest, namespace: str, redis_url: str) -> AsyncIterator[Board]:
    client: Any = FakeAsyncRedis() if request.param == "fakeredis" else Redis.from_url(redis_url, protocol=2)
    yield Board(client, namespace, "shop:recalculate")
    async for key in client.scan_iter(match=f"{namespace}:*"):
        await client.delete(key)
    await client.aclose()


def asked(key: str, *, by: str = "paid", calls: int = 1, wanted: bool = False, arguments: str = "{}") -> Request:
    return Request(key, arguments, wanted, {by: calls}, by)


async def ask(board: Board, key: str, debounce: float = 0.0, max_wait: float = 0.0, **more: Any) -> tuple[int, float | None]:
    (standing,), _ = await board.request([asked(key, **more)], debounce, max_wait)
    return standing.version, standing.due


async def take(board: Board, key: str, lease: float = 10.0) -> Claim:
    (claim,) = await board.claim([key], lease)
    return claim


async def end(board: Board, claim: Claim, outcome: str = "", rest: float = 0.0, **cpu_us: int) -> tuple[bool, float | None]:
    return await board.finish(claim, outcome, 0.0, 0.0, rest, cpu_us)


async def due(board: Board, count: int = 10) -> list[str]:
    keys, _ = await board.peek(count)
    return keys


async def test_what_was_asked_for_is_due_until_a_run_has_answered_it(board: Board) -> None:
    version, wait = await ask(board, "a", arguments='{"n": 1}')
    assert wait == 0
    assert await due(board) == ["a"]
    claim = await take(board, "a")
    assert (claim.version, claim.arguments, claim.calls, claim.opener, claim.taken_over) == (
        version,
        '{"n": 1}',
        {"paid": 1},
        "paid",
        False,
    )
    assert await due(board) == []
    assert await end(board, claim) == (True, None)
    assert await due(board) == []


async def test_a_key_is_one_runners_only(board: Board) -> None:
    await ask(board, "a")
    claims = await asyncio.gather(*(board.claim(["a"], 10) for _ in range(10)))
    assert sum(len(each) for each in claims) == 1


async def test_requests_that_wait_are_one_run_with_the_last_arguments_and_all_calls(board: Board) -> None:
    await ask(board, "a", by="paid", arguments="1")
    await ask(board, "a", by="returned", calls=3, arguments="2", wanted=True)
    last, _ = await ask(board, "a", by="paid", arguments="3")
    claim = await take(board, "a")
    assert (claim.version, claim.arguments, claim.calls, claim.opener) == (last, "3", {"paid": 2, "returned": 3}, "paid")
    assert claim.wanted


async def test_a_request_during_a_run_waits_for_its_end_and_is_not_lost(board: Board) -> None:
    await ask(board, "a")
    claim = await take(board, "a")
    version, wait = await ask(board, "a", by="returned")
    assert wait is None
    assert await board.claim(["a"], 10) == []
    assert await end(board, claim) == (True, 0.0)
    second = await take(board, "a")
    assert (second.version, second.opener, second.calls) == (version, "returned", {"returned": 1})
    assert second.fence > claim.fence


async def test_a_debounce_is_pushed_and_max_wait_ends_it(board: Board) -> None:
    _, first = await ask(board, "a", debounce=50, max_wait=80)
    assert first == 50
    _, later = await board.peek(10)
    assert later is not None
    assert 40 < later <= 50
    await ask(board, "b", debounce=1.0, max_wait=1.1)
    await asyncio.sleep(0.3)
    _, ended = await ask(board, "b", debounce=1.0, max_wait=1.1)
    assert ended is not None
    assert 0.5 < ended <= 0.8  # 1.1 s after the first one
    assert await board.claim(["a", "b"], 10) == []  # not due yet


async def test_a_call_that_is_written_down_late_counts_from_when_it_was_made_and_makes_no_key_due_earlier(board: Board) -> None:
    late = Request("a", "{}", False, {"paid": 1}, "paid", age=0.2)
    (first,), _ = await board.request([late], 0.5, 5.0)
    assert first.due is not None
    assert 0.25 < first.due <= 0.3
    _, second = await ask(board, "a", 0.5, 5.0)
    assert second is not None
    assert second > 0.4
    (third,), _ = await board.request([late], 0.5, 5.0)
    assert third.due is not None
    assert third.due > 0.4  # somebody was told so


async def test_calls_whose_cover_was_answered_are_only_counted(board: Board) -> None:
    version, _ = await ask(board, "a")
    covered = Request("a", "{}", False, {"paid": 2}, "paid", covered=version)
    (waiting,), _ = await board.request([covered], 0.0, 0.0)
    assert waiting.waits
    claim = await take(board, "a")
    assert claim.calls == {"paid": 3}
    (running,), seen = await board.request([covered], 0.0, 0.0)
    assert not running.waits
    assert list(seen.claimed) == ["a"]
    assert await end(board, claim) == (True, None)
    (nothing,), _ = await board.request([covered], 0.0, 0.0)
    assert not nothing.waits
    assert await due(board) == []
    assert (await board.counted())["paid"] == Counts(calls=7, runs=1)
    (later,), _ = await board.request([Request("a", "{}", False, {"paid": 1}, "paid", covered=claim.version + 1)], 0.0, 0.0)
    assert later.waits  # that cover was never answered: it is lost
    assert await due(board) == ["a"]


async def test_a_process_with_a_shorter_debounce_makes_no_key_due_earlier_than_others_were_told(board: Board) -> None:
    _, told = await ask(board, "a", 1.0, 2.0)
    assert told == 1.0
    _, sooner = await ask(board, "a", 0.0, 0.0)
    assert sooner is not None
    assert sooner > 0.9
    assert await due(board) == []


async def test_a_runner_that_lets_its_lease_run_out_is_replaced_and_has_nothing_to_say_any_more(board: Board) -> None:
    await ask(board, "a", by="paid", wanted=True)
    dead = await take(board, "a", lease=0.02)
    await ask(board, "a", by="returned", arguments="new")
    while not await due(board):
        await asyncio.sleep(0.005)
    heir = await take(board, "a")
    assert heir.taken_over
    assert (heir.calls, heir.opener, heir.arguments, heir.wanted) == ({"paid": 1, "returned": 1}, "paid", "new", True)
    assert await board.renew([dead, heir], 10) == [False, True]
    assert await end(board, dead, '{"result": 0}') == (False, None)
    (standing,) = await board.answered(["a"])
    assert (standing.done, standing.outcome_of) == (0, 0)
    assert (await end(board, heir, '{"result": 1}'))[0]


async def test_a_renewed_lease_does_not_run_out(board: Board) -> None:
    await ask(board, "a")
    claim = await take(board, "a", lease=0.05)
    assert await board.renew([claim], 60) == [True]
    await asyncio.sleep(0.06)
    assert await due(board) == []


async def test_what_is_given_back_is_due_at_once_with_all_that_it_had(board: Board) -> None:
    await ask(board, "a", by="paid", wanted=True, arguments="x")
    claim = await take(board, "a")
    await board.give_back(claim)
    again = await take(board, "a")
    assert (again.arguments, again.calls, again.wanted, again.opener) == ("x", {"paid": 1}, True, "paid")
    await board.give_back(claim)  # the fence says that it is not his
    assert await board.claim(["a"], 10) == []


async def test_an_outcome_stays_until_a_newer_one_that_somebody_wanted(board: Board) -> None:
    version, _ = await ask(board, "a", wanted=True)
    await end(board, await take(board, "a"), '{"result": 5}')
    await ask(board, "a")
    await end(board, await take(board, "a"))
    (standing, unknown) = await board.answered(["a", "b"])
    assert (standing.known, standing.done, standing.outcome_of, standing.outcome) == (True, version + 1, version, '{"result": 5}')
    assert not unknown.known


async def test_a_key_that_rests_is_not_due_before_its_time(board: Board) -> None:
    await ask(board, "a")
    claim = await take(board, "a")
    await ask(board, "a")
    _, wait = await end(board, claim, rest=30)
    assert wait == pytest.approx(30, abs=0.1)
    assert await due(board) == []
    _, wait = await ask(board, "a")
    assert wait is not None
    assert 25 < wait <= 30


async def test_triggers_are_counted_over_all_keys(board: Board) -> None:
    await ask(board, "a", by="paid", calls=4)
    await ask(board, "b", by="returned")
    await end(board, await take(board, "a"), paid=1500)
    await end(board, await take(board, "b"), returned=20)
    assert await board.counted() == {"paid": Counts(4, 1, 1500), "returned": Counts(1, 1, 20)}


async def test_versions_go_on_when_a_key_was_cleaned_away(board: Board) -> None:
    version, _ = await ask(board, "a")
    await end(board, await take(board, "a"))
    await board._client.delete(board._state + "a")
    assert (await ask(board, "a"))[0] > version
    assert (await take(board, "a")).version > version


async def test_a_due_key_whose_state_was_lost_is_dropped(board: Board) -> None:
    await ask(board, "a")
    await board._client.delete(board._state + "a")
    assert await board.claim(["a"], 10) == []
    assert await due(board) == []


async def test_the_longest_overdue_come_first_and_only_as_many_as_one_can_take(board: Board) -> None:
    for key in "cab":
        await ask(board, key)
        await asyncio.sleep(0.002)
    assert await due(board, 2) == ["c", "a"]


async def test_a_key_without_requests_is_forgotten_after_a_while_and_one_with_is_not(board: Board) -> None:
    await ask(board, "a")
    claim = await take(board, "a")
    assert await board._client.pttl(board._state + "a") == -1
    await end(board, claim)
    assert 0 < await board._client.pttl(board._state + "a") <= 60_000
    await ask(board, "a")
    assert await board._client.pttl(board._state + "a") == -1
