"""Lost replies, late scripts, servers that refuse or forget: one effect, and every caller knows what is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from inventory_sdk import context, errors
from inventory_sdk.model import Line, Receipt, ReceiptLine, key_of
from inventory_sdk.stock import batch
from tests.conftest import service_url
from tests.stock_kit import MERCHANT, Proxy, Shop, lines, on_client, own_redis, plain_client, shop_on, until

pytestmark = pytest.mark.redis
TIMEOUT = 0.15
"""Seconds after which a reply counts as lost in these tests."""


@pytest.fixture
async def shop(namespace: str) -> AsyncIterator[Shop]:
    """Straight on Redis: sees what really happened."""
    async with shop_on("redis", namespace, {"a": 10, "b": 5}) as shop:
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


Act = Callable[[Shop], Awaitable[Any]]
ACTS: dict[str, Act] = {
    "deduct": lambda shop: shop.stock.deduct(lines(a=2, b=1), operation_id="o1"),
    "reserve": lambda shop: shop.stock.reserve(lines(a=2, b=1), operation_id="o1"),
    "adjust": lambda shop: shop.stock.adjust([Line("a", -2)], operation_id="o1"),
    "confirm": lambda shop: shop.stock.confirm("held"),
    "confirm a part": lambda shop: shop.stock.confirm("held", lines=lines(a=1), operation_id="c1"),
    "release": lambda shop: shop.stock.release("held"),
    "extend": lambda shop: shop.stock.extend("held", ttl=600),
    "restock": lambda shop: shop.stock.restock(lines(a=3), operation_id="po"),
    "deduct with a made-up id": lambda shop: shop.stock.deduct(lines(a=1)),
}


async def prepared(shop: Shop) -> list[int]:
    await shop.stock.reserve(lines(a=3, b=1), operation_id="held")
    return [len(await shop.journal()), *await shop.counters("a"), *await shop.counters("b")]


async def effect(shop: Shop, before: list[int]) -> list[int]:
    """Journal entries, and what moved of a and b."""
    after = [len(await shop.journal()), *await shop.counters("a"), *await shop.counters("b")]
    return [new - old for new, old in zip(after, before, strict=True)]


EFFECTS = {
    "deduct": [1, -2, 0, -1, 0],
    "reserve": [1, -2, 2, -1, 1],
    "adjust": [1, -2, 0, 0, 0],
    "confirm": [1, 0, -3, 0, -1],
    "confirm a part": [1, 0, -1, 0, 0],
    "release": [1, 3, -3, 1, -1],
    "extend": [1, 0, 0, 0, 0],
    "restock": [1, 3, 0, 0, 0],
    "deduct with a made-up id": [1, -1, 0, 0, 0],
}


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("act", ACTS)
async def test_a_lost_reply_gives_the_caller_its_first_receipt_and_one_effect(
    shop: Shop, remote: Shop, proxy: Proxy, act: str, times: int
) -> None:
    before = await prepared(shop)
    await remote.engine.partitions[0].known()
    fault = proxy.fault("batch", "lost")
    if times == 2:
        proxy.fault("hello", "lost")
    answer = await ACTS[act](remote)
    assert fault.count == 1
    assert await effect(shop, before) == EFFECTS[act]
    if isinstance(answer, Receipt):
        assert not answer.replayed
        again = await ACTS[act](shop) if "made-up" not in act else None
        assert again is None or again == replace(answer, replayed=True)


async def test_a_lost_reply_to_an_undo_is_still_its_yes(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    receipt = await shop.stock.reserve(lines(a=2), operation_id="o1")
    await remote.engine.partitions[0].known()
    proxy.fault("batch", "lost")
    assert await remote.stock.undo(receipt)
    assert await shop.counters("a") == (10, 0)
    assert len(await shop.journal()) == 2


@pytest.mark.parametrize("what", ["held", "swallowed"])
@pytest.mark.parametrize("act", ACTS)
async def test_a_request_that_never_arrived_is_sent_again_and_a_late_one_refuses_to_run(
    shop: Shop, remote: Shop, proxy: Proxy, act: str, what: Any
) -> None:
    before = await prepared(shop)
    await remote.engine.partitions[0].known()
    fault = proxy.fault("batch", what)
    answer = await ACTS[act](remote)
    assert await effect(shop, before) == EFFECTS[act]
    assert not isinstance(answer, Receipt) or not answer.replayed
    if what == "held":
        fault.go.set()
        await fault.done.wait()
        assert b"late" in fault.replies[0]
        assert await effect(shop, before) == EFFECTS[act]


async def test_who_was_refused_is_not_served_by_its_first_script_that_was_stuck(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    """The connection breaks at once, long before its script can't run any more; then the units come back."""
    await shop.stock.deduct(lines(a=10), operation_id="others")
    await remote.engine.partitions[0].known()
    fault = proxy.fault("batch", "stranded")
    with pytest.raises(errors.InsufficientStock):
        await remote.stock.deduct(lines(a=2), operation_id="o1")
    await shop.stock.restock(lines(a=2), operation_id="po")
    fault.go.set()
    await fault.done.wait()
    assert b"late" in fault.replies[0]
    assert await shop.counters("a") == (2, 0)


@pytest.mark.parametrize("then", ["sold out", "no server"])
async def test_where_redis_can_not_say_who_it_is_a_lost_reply_is_never_a_refusal(
    namespace: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal that was asked afterwards may be another server's, so that nobody may say that nothing moved."""
    monkeypatch.setattr(batch, "GIVE_UP", 1.0)
    with own_redis("--user", "default", "on", "nopass", "~*", "&*", "+@all", "-info") as url:
        async with (
            shop_on(url, namespace, {"a": 10}) as there,
            Proxy(url) as proxy,
            plain_client(proxy.url) as client,
            on_client(client, namespace, ledger=there.ledger, redis_timeout=TIMEOUT) as remote,
        ):
            assert (await remote.engine.partitions[0].hello()).run_id_kept
            assert remote.engine.partitions[0].run_id == ""
            await there.stock.deduct(lines(a=10), operation_id="others")
            proxy.fault("batch", "swallowed", 1 if then == "sold out" else None)
            with pytest.raises(errors.OutcomeUnknown):
                await remote.stock.deduct(lines(a=2), operation_id="o1")
            assert await there.counters("a") == (0, 0)


async def test_a_held_request_released_in_time_has_one_effect_too(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    before = await prepared(shop)
    await remote.engine.partitions[0].known()
    fault = proxy.fault("batch", "held")
    task = asyncio.create_task(ACTS["deduct"](remote))
    await fault.happened.wait()
    fault.go.set()
    assert not (await task).replayed
    assert await effect(shop, before) == EFFECTS["deduct"]


async def test_of_a_batch_with_refusals_each_caller_gets_its_own_answer_after_a_lost_reply(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    await remote.stock.deduct(lines(b=1), operation_id="known")
    await shop.stock.reserve(lines(a=1), operation_id="r1")
    proxy.fault("batch", "lost")
    stock = remote.stock
    answers = await asyncio.gather(
        stock.deduct(lines(a=100), operation_id="short"),
        stock.deduct(lines(a=2), operation_id="o1"),
        stock.deduct(lines(a=2), operation_id="o1"),
        stock.deduct(lines(b=1), operation_id="known"),
        stock.confirm("r1"),
        stock.confirm("nope"),
        stock.deduct(lines(b=2), operation_id="known"),
        return_exceptions=True,
    )
    assert isinstance(answers[0], errors.InsufficientStock)
    assert isinstance(answers[1], Receipt)
    assert isinstance(answers[2], Receipt)
    assert [answers[1].replayed, answers[2].replayed] == [False, True]
    assert isinstance(answers[3], Receipt)
    assert answers[3].replayed
    assert isinstance(answers[4], Receipt)
    assert isinstance(answers[5], errors.ReservationNotFound)
    assert isinstance(answers[6], errors.OperationConflict)
    assert (await shop.counters("a"), await shop.counters("b")) == ((7, 0), (4, 0))


@pytest.mark.parametrize("first", ["short", "other kind"])
async def test_a_refused_operation_does_not_get_the_receipt_of_an_accepted_one_of_the_same_id(
    shop: Shop, remote: Shop, proxy: Proxy, first: str
) -> None:
    await remote.engine.partitions[0].known()
    stock = remote.stock
    refused = stock.deduct(lines(a=100), operation_id="o1") if first == "short" else stock.reserve(lines(a=11), operation_id="o1")
    proxy.fault("batch", "lost")
    answers = await asyncio.gather(refused, stock.deduct(lines(a=2), operation_id="o1"), return_exceptions=True)
    assert isinstance(answers[0], errors.InsufficientStock | errors.OperationConflict), answers[0]
    assert isinstance(answers[1], Receipt)
    assert answers[1].lines == (ReceiptLine(MERCHANT, "a", 2, 8),)
    assert await shop.counters("a") == (8, 0)


async def test_a_take_behind_its_own_undo_in_one_batch_is_found_again_after_a_lost_reply(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    receipt = await remote.stock.deduct(lines(a=2), operation_id="o1")
    proxy.fault("batch", "lost")
    undone, again = await asyncio.gather(remote.stock.undo(receipt), remote.stock.deduct(lines(a=3), operation_id="o1"))
    assert undone is True
    assert not again.replayed
    assert await shop.counters("a") == (7, 0)


@pytest.mark.parametrize("change", ["epoch", "run_id", "emptied"])
async def test_a_reply_lost_while_redis_became_another_ends_in_outcome_unknown(shop: Shop, remote: Shop, proxy: Proxy, change: str) -> None:
    await remote.engine.partitions[0].known()
    fault = proxy.fault("batch", "lost")
    task = asyncio.create_task(ACTS["deduct"](remote))
    await fault.done.wait()
    if change == "epoch":
        await shop.open(epoch=2)
    elif change == "run_id":
        await shop.client.hset(shop.key("meta"), "run_id", "f" * 40)
    else:
        await shop.wipe()
    with pytest.raises(errors.OutcomeUnknown) as caught:
        await task
    assert caught.value.operation_id == "o1"
    if change == "epoch":  # safe to repeat with the same id, through the new epoch
        await ACTS["deduct"](remote)


async def test_an_error_while_asking_after_a_lost_reply_leaves_the_outcome_unknown(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    await remote.engine.partitions[0].known()
    fault = proxy.fault("batch", "lost")
    task = asyncio.create_task(ACTS["deduct"](remote))
    await fault.done.wait()
    await shop.client.delete(shop.key("journal"))
    await shop.client.set(shop.key("journal"), "the question about the journal is answered with an error now")
    with pytest.raises(errors.OutcomeUnknown):  # it did move, so nobody may say that nothing moved
        await task


async def test_a_redis_that_went_back_behind_what_was_seen_ends_in_outcome_unknown(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    for n in range(3):
        await remote.stock.deduct(lines(a=1), operation_id=f"before{n}")
    fault = proxy.fault("batch", "lost")
    task = asyncio.create_task(ACTS["deduct"](remote))
    await fault.done.wait()
    await shop.client.hset(shop.key("meta"), "seq", 1)
    with pytest.raises(errors.OutcomeUnknown):
        await task


async def test_a_cancelled_caller_of_a_made_up_id_is_undone_though_the_reply_was_lost(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    await remote.engine.partitions[0].known()
    fault = proxy.fault("batch", "lost")
    task = asyncio.create_task(remote.stock.deduct(lines(a=4)))
    await fault.done.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await remote.engine.close()
    assert [entry.operations[0].kind for entry in await shop.journal()] == ["deduct", "undo"]
    assert await shop.counters("a") == (10, 0)


# Servers that refuse -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "GIVE_UP", 0.3)


EVERYTHING: dict[str, Act] = {
    **ACTS,
    "level": lambda shop: shop.stock.level("a"),
    "status": lambda shop: shop.stock.status("o1"),
    "reservation": lambda shop: shop.stock.reservation("held"),
    "load": lambda shop: shop.stock.deduct(lines(cold=1)),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("knowing", [True, False], ids=["known before", "new process"])
@pytest.mark.parametrize("act", EVERYTHING)
async def test_a_refused_connection_is_overloaded_and_moves_nothing(
    shop: Shop, remote: Shop, proxy: Proxy, act: str, knowing: bool
) -> None:
    shop.ledger.stocked(cold=5)
    await prepared(shop)
    if knowing:
        await remote.engine.partitions[0].known()
    await remote.engine.wire.close()
    await proxy.refuse()
    before = await shop.snapshot()
    async with asyncio.timeout(10):
        with pytest.raises(errors.Overloaded) as caught:
            await EVERYTHING[act](remote)
    assert caught.value.retry_after > 0
    assert await shop.snapshot() == before


@pytest.mark.usefixtures("impatient")
async def test_a_connection_that_died_and_can_not_be_replaced_leaves_the_outcome_unknown(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    await remote.stock.deduct(lines(a=1))
    await proxy.refuse()
    proxy.cut()
    with pytest.raises(errors.OutcomeUnknown) as caught:
        await ACTS["deduct"](remote)
    assert caught.value.operation_id == "o1"
    assert await shop.counters("a") == (9, 0)


@pytest.mark.usefixtures("impatient")
async def test_requests_that_never_get_through_end_when_patience_ends(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    await remote.engine.partitions[0].known()
    proxy.fault("batch", "swallowed", times=None)
    with pytest.raises((errors.OutcomeUnknown, errors.Overloaded)):
        async with asyncio.timeout(10):
            await ACTS["deduct"](remote)
    assert await shop.journal() == []


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("script", ["read", "load"])
async def test_a_question_without_an_answer_is_an_error_of_the_public_tree(shop: Shop, remote: Shop, proxy: Proxy, script: str) -> None:
    shop.ledger.stocked(cold=5)
    await remote.engine.partitions[0].known()
    proxy.fault(script, "swallowed", times=None)
    with pytest.raises((errors.Overloaded, errors.OutcomeUnknown)) as caught:
        async with asyncio.timeout(10):
            await (remote.stock.level("a") if script == "read" else remote.stock.deduct(lines(cold=1), operation_id="o1"))
    assert getattr(caught.value, "operation_id", "o1") == "o1"
    assert await shop.journal() == []


async def test_a_load_whose_reply_was_lost_is_done_again_for_its_callers(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    shop.ledger.stocked(cold=5)
    await remote.engine.partitions[0].known()
    proxy.fault("load", "lost")
    receipt = await remote.stock.deduct(lines(cold=1), operation_id="o1")
    assert receipt.lines[0].remaining == 4


async def test_a_late_load_writes_nothing(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    shop.ledger.stocked(cold=5)
    await remote.engine.partitions[0].known()
    fault = proxy.fault("load", "held")
    with suppress(errors.InventoryError):
        await remote.stock.deduct(lines(cold=1), operation_id="o1")
    await shop.client.hdel(shop.key("available"), key_of(MERCHANT, "cold"))
    fault.go.set()
    await fault.done.wait()
    assert fault.replies == [b":0\r\n"]
    assert not await shop.client.hexists(shop.key("available"), key_of(MERCHANT, "cold"))


async def test_a_freeze_whose_reply_was_lost_is_simply_asked_again(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    proxy.fault("freeze", "lost")
    await remote.engine.upkeep.freeze(0, 2)
    assert (await shop.engine.upkeep.journal_state(0)).epoch == 2


async def test_connections_that_the_server_closed_while_idle_are_replaced_without_a_retry(
    shop: Shop, remote: Shop, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    await remote.stock.level("a")
    proxy.cut()
    monkeypatch.setattr("inventory_sdk.stock.wire.IDLE_BEFORE_PROBE", 0.0)
    await asyncio.sleep(0)
    await until(lambda: not proxy._tasks)
    assert not (await remote.stock.deduct(lines(a=1))).replayed


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_accepts_and_says_nothing_does_not_hold_callers_for_ever(namespace: str) -> None:
    over = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = plain_client(f"redis://127.0.0.1:{port}/0", socket_timeout=None, socket_connect_timeout=None)
    try:
        async with on_client(client, namespace, redis_timeout=TIMEOUT) as shop:
            try:
                with pytest.raises(errors.Overloaded):
                    async with asyncio.timeout(10):
                        await shop.stock.deduct(lines(a=1))
            finally:
                over.set()  # else closing would wait for the same connection
    finally:
        await client.aclose()
        server.close()
        await server.wait_closed()


# Servers of one's own ------------------------------------------------------------------------------------------------------------


async def test_a_script_cache_that_was_flushed_is_filled_again(namespace: str) -> None:
    with own_redis() as url:
        async with shop_on(url, namespace, {"a": 5}) as shop:
            first = await shop.stock.deduct(lines(a=1), operation_id="o1")
            await shop.client.script_flush()
            assert await shop.stock.deduct(lines(a=1), operation_id="o1") == replace(first, replayed=True)
            await shop.client.script_flush()
            assert await shop.counters("a") == (4, 0)


async def test_a_restarted_server_freezes_the_partition_whatever_it_remembers(namespace: str) -> None:
    with own_redis() as url:
        async with shop_on(url, namespace, {"a": 5}) as shop:
            await shop.stock.deduct(lines(a=1), operation_id="o1")
            await shop.client.flushall()
            with pytest.raises(errors.StockFrozen):
                await shop.stock.deduct(lines(a=1))
            assert await shop.client.dbsize() == 0
            assert shop.refusals == [(0, "missing")]


async def test_a_full_redis_refuses_takes_and_moves_nothing(namespace: str) -> None:
    with own_redis() as url:
        async with shop_on(url, namespace, {"a": 5}) as shop:
            await shop.stock.deduct(lines(a=1))
            before = await shop.snapshot()
            await shop.client.config_set("maxmemory", "1mb")
            with pytest.raises(errors.JournalFull):
                await shop.stock.deduct(lines(a=1))
            await shop.client.config_set("maxmemory", "0")
            assert await shop.snapshot() == before


@pytest.mark.usefixtures("impatient")
async def test_a_replica_executes_nothing_and_the_caller_is_overloaded(namespace: str) -> None:
    with own_redis() as url:
        async with shop_on(url, namespace, {"a": 5}) as shop:
            await shop.stock.deduct(lines(a=1))
            before = await shop.snapshot()
            await shop.client.execute_command("REPLICAOF", "127.0.0.1", "1")  # a primary that can't be reached: nothing is replaced
            with pytest.raises(errors.Overloaded):
                await shop.stock.deduct(lines(a=1))
            await shop.client.execute_command("REPLICAOF", "NO", "ONE")
            assert await shop.snapshot() == before


async def test_a_server_busy_with_an_endless_script_moves_nothing(namespace: str) -> None:
    with own_redis("--busy-reply-threshold", "50") as url:
        async with shop_on(url, namespace, {"a": 5}) as shop:
            await shop.stock.deduct(lines(a=1))
            blocker, killer = plain_client(url), plain_client(url)
            endless = asyncio.create_task(blocker.eval("while true do end", 0))

            async def busy() -> bool:
                try:
                    return not await killer.ping()
                except ResponseError:
                    return True

            async with asyncio.timeout(10):
                while not await busy():
                    await asyncio.sleep(0.01)
            with pytest.raises(errors.InventoryError):
                await shop.stock.deduct(lines(a=1), operation_id="o1")
            await killer.script_kill()
            with pytest.raises(ResponseError):
                await endless
            await blocker.aclose()
            await killer.aclose()
            assert await shop.counters("a") == (4, 0)
            assert not (await shop.stock.deduct(lines(a=1), operation_id="o1")).replayed


async def test_scripts_touch_declared_keys_only(namespace: str) -> None:
    """What MONITOR shows of the commands inside scripts, against the keys that their EVALSHA declared."""
    with own_redis() as url:
        client = plain_client(url)
        seen: list[dict[str, Any]] = []
        async with client.monitor() as monitor:

            async def watch() -> None:
                while True:
                    seen.append(await monitor.next_command())

            watching = asyncio.create_task(watch())
            async with shop_on(url, namespace, {"a": 50, "b": 50}) as shop:
                stock = shop.stock
                receipt = await stock.reserve(lines(a=2, b=1), operation_id="r1")
                await asyncio.gather(
                    stock.confirm("r1"), stock.deduct(lines(a=1), operation_id="d1"), stock.release("nope"), return_exceptions=True
                )
                await stock.reserve(lines(a=2), operation_id="r2")
                await shop.expire("r2")
                await stock.confirm("r2", reacquire=True)
                await stock.restock(lines(b=1))
                await stock.undo(receipt)
                await stock.level("a")
                await shop.engine.upkeep.rotate(0)
                await shop.engine.upkeep.trim(0, 1, 3)
                shop.ledger.stocked(cold=1)
                await stock.deduct(lines(cold=1))
                await shop.open(epoch=2)
                await shop.client.ping()
            await until(lambda: any("PING" in line["command"].upper() for line in seen))
            watching.cancel()
            await asyncio.wait([watching])
        await client.aclose()
    declared: set[str] = set()
    inside = 0
    for line in seen:
        words = line["command"].split(" ")
        if words[0].upper() in ("EVALSHA", "EVAL"):
            text = line["command"]
            declared = {word for word in text.split(" ") if word.startswith(f"{{{namespace}:")}
        elif line.get("client_type") == "lua" and words[0].upper() not in ("TIME", "INFO"):
            inside += 1
            keys = [word for word in words[1:] if word.startswith("{")]
            assert keys, words
            if words[0].upper() != "DEL":
                keys = keys[:1]
            assert set(keys) <= declared, words
    assert inside > 50


@pytest.mark.parametrize("protocol", [2, 3])
async def test_either_protocol_of_redis_will_do(namespace: str, protocol: int) -> None:
    with own_redis() as url:
        client = plain_client(url, protocol=protocol)
        try:
            async with on_client(client, namespace) as shop:
                shop.ledger.stocked(a=5)
                await shop.open()
                await shop.stock.reserve(lines(a=2), operation_id="r1")
                await shop.expire("r1")
                assert [entry.operations[0].kind for entry in await shop.journal()] == ["reserve", "expire"]
                assert await shop.counters("a") == (5, 0)
        finally:
            await client.aclose()


# Loops and connections -----------------------------------------------------------------------------------------------------------


def test_two_event_loops_one_after_the_other_leave_no_task_and_no_connection(namespace: str) -> None:
    with own_redis() as url:

        async def once(epoch: int) -> int:
            async with shop_on(url, namespace, {"a": 50}) as shop:
                await shop.open(epoch=epoch)
                await asyncio.gather(*(shop.stock.deduct(lines(a=1)) for _ in range(20)))
                for lane in ("core", "batch", "sync"):
                    await shop.run(["deduct", key_of(MERCHANT, lane), "f", [key_of(MERCHANT, "a"), 1], "", "", 0, "", "", ""], lane=lane)
                left = (await shop.counters("a"))[0]
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return left

        assert [asyncio.run(once(2)), asyncio.run(once(2))] == [27, 27]

        async def connections() -> int:
            client: Redis = plain_client(url)
            try:
                async with asyncio.timeout(5):
                    while (await client.info("clients"))["connected_clients"] > 1:
                        await asyncio.sleep(0.01)
                return (await client.info("clients"))["connected_clients"]
            finally:
                await client.aclose()

        assert asyncio.run(connections()) == 1


async def test_lanes_have_batches_of_their_own_and_do_not_wait_for_each_other(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    await remote.engine.partitions[0].known()
    fault = proxy.fault("batch", "held")

    async def bulk() -> Receipt:
        context.lane.set("batch")
        return await remote.stock.deduct(lines(a=1), operation_id="bulk")

    slow = asyncio.create_task(bulk())
    await fault.happened.wait()
    assert (await remote.stock.deduct(lines(b=1), operation_id="core")).lines[0].remaining == 4
    assert not slow.done()
    fault.go.set()
    await slow


async def test_while_one_call_is_in_flight_the_next_batch_gathers(shop: Shop, remote: Shop, proxy: Proxy) -> None:
    await remote.engine.partitions[0].known()
    fault = proxy.fault("batch", "held")
    first = asyncio.create_task(remote.stock.deduct(lines(a=1), operation_id="first"))
    await fault.happened.wait()
    others = [asyncio.create_task(remote.stock.deduct(lines(a=1), operation_id=f"o{n}")) for n in range(5)]
    await asyncio.sleep(0)
    fault.go.set()
    await asyncio.gather(first, *others)
    assert [len(entry.operations) for entry in await shop.journal()] == [1, 5]


async def test_an_answer_that_took_long_does_not_spoil_the_time_that_is_known(shop: Shop, remote: Shop) -> None:
    partition = remote.engine.partitions[0]
    await remote.stock.deduct(lines(a=1))
    seconds, microseconds = await shop.client.time()
    known = partition.not_after() - int(TIMEOUT * 1000)
    assert known <= seconds * 1000 + microseconds // 1000 + 50
