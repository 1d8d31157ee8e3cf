"""Calls over several partitions: all lines or none, one effect per id, one winner between a late decision and whoever gave up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from inventory_sdk import Line
from inventory_sdk.errors import (
    DurabilityNotReached,
    InsufficientStock,
    OperationConflict,
    OutcomeUnknown,
    Overloaded,
    ReservationClosed,
    ReservationExpired,
)
from inventory_sdk.ledger.protocol import LedgerUnavailable
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.model import PART, Position, Shortage
from inventory_sdk.stock import deciding, spanning
from inventory_sdk.stock.journal import decode
from inventory_sdk.stock.parts import as_replied, call_of, part_key
from inventory_sdk.stock.records import tombstone
from inventory_sdk.stock.resubmit import resubmission
from inventory_sdk.stock.wire import ReplyLost
from inventory_sdk.sync.following import Following
from inventory_sdk.sync.parts import Parts
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.recovery import rebuild
from tests.conftest import sample
from tests.spanning_kit import HOME, Process, World, cart, shops, world_of

PARTITIONS = 4
FIRST, SECOND, THIRD = shops(PARTITIONS)
ALL = [FIRST, SECOND, THIRD]


@pytest.fixture(params=sample(["merchant", "sku"]))
async def world(tmp_path: Path, namespace: str, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with world_of(tmp_path, namespace, partitions=PARTITIONS, partition_by=request.param, stocked=dict.fromkeys(ALL, 5)) as made:
        yield made


async def left(world: World) -> list[int]:
    """Available per shop, once all is at rest and Redis is what the ledger says."""
    for process in world.processes:
        await process.quiet()
    found = await world.check()
    return [found[f"{merchant}/a"] for merchant in ALL]


def operations(name: str, arguments: Sequence[Any]) -> list[list[Any]]:
    return json.loads(arguments[6]) if name == "batch" else []


class Gate:
    """Holds the first script call that decides at home."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.reached, self.go = asyncio.Event(), asyncio.Event()

    def __call__(self, name: str, arguments: Sequence[Any]) -> Any:
        if not self.reached.is_set() and any(op[0] == self.kind and len(op) > 11 for op in operations(name, arguments)):
            self.reached.set()
            return self.go.wait()
        return None


async def test_one_call_holds_in_three_shops_and_its_lines_are_closed_where_they_stand(world: World) -> None:
    stock = world.process().stock
    held = await stock.reserve(cart(*ALL, quantity=3), operation_id="o1", order="42")
    assert [(line.merchant, line.quantity, line.remaining) for line in held.lines] == [(merchant, 3, 2) for merchant in sorted(ALL)]
    assert [position.partition for position in held.positions] == world.positions("o1", *ALL)
    again = await stock.reserve(cart(*ALL, quantity=3), operation_id="o1", order="42")
    assert again.replayed
    assert (again.lines, again.positions) == (held.lines, held.positions)
    known = await stock.status("o1")
    assert known is not None
    assert (known.lines, known.positions) == (held.lines, held.positions)
    sold = await stock.confirm("o1", lines=[Line("a", 1, SECOND)], operation_id="c1")
    assert [(line.merchant, line.quantity, line.remaining) for line in sold.lines] == [(SECOND, 1, 2)]
    await stock.release("o1", lines=[Line("a", 2, THIRD), Line("a", 1)], operation_id="r1")
    reservation = await stock.reservation("o1")
    assert reservation is not None
    assert {line.merchant: line.quantity for line in reservation.held} == {FIRST: 2, SECOND: 2, THIRD: 1}
    await stock.confirm("o1")
    with pytest.raises(ReservationClosed):
        await stock.release("o1")
    assert await left(world) == [3, 2, 4]
    assert [(await world.row(merchant)).sold for merchant in ALL] == [2, 3, 1]
    assert not await world.open_parts()


async def test_a_refusal_names_the_shortages_of_all_partitions_and_moves_nothing(world: World) -> None:
    process = world.process()
    with pytest.raises(InsufficientStock) as caught:
        await process.stock.deduct([Line("a", 9), Line("a", 7, SECOND), Line("a", 1, THIRD)], operation_id="o1")
    assert set(caught.value.shortages) == {Shortage(FIRST, "a", 9, 5), Shortage(SECOND, "a", 7, 5)}
    with pytest.raises(InsufficientStock):
        await process.stock.deduct([Line("a", 9), Line("a", 1, SECOND)], operation_id="o1")
    assert await left(world) == [5, 5, 5]
    assert not await world.open_parts()
    assert not (await process.stock.deduct(cart(*ALL), operation_id="o1")).replayed, "a refusal is not remembered"


@pytest.mark.parametrize("how", ["reserve", "deduct"])
async def test_the_same_id_from_two_processes_at_once_has_one_effect_also_on_the_last_units(world: World, how: str) -> None:
    for number in range(5):
        takers = [world.process(), world.process()]
        receipts = await asyncio.gather(*[getattr(each.stock, how)(cart(*ALL), operation_id=f"o{number}") for each in takers])
        assert sorted(receipt.replayed for receipt in receipts) == [False, True]
        assert receipts[0].positions == receipts[1].positions
    assert await left(world) == [0, 0, 0]


async def test_an_id_that_was_used_with_other_lines_is_a_conflict_and_nothing_moves(world: World) -> None:
    stock = world.process().stock
    await stock.deduct(cart(FIRST, SECOND), operation_id="o1")
    for other in (cart(FIRST, THIRD), cart(FIRST, SECOND, quantity=2), cart(SECOND), cart(FIRST)):
        with pytest.raises(OperationConflict):
            await stock.deduct(other, operation_id="o1")
    assert await left(world) == [4, 4, 5]


@pytest.mark.parametrize("how", ["reserve", "deduct"])
async def test_a_decision_that_comes_after_its_parts_were_given_up_is_refused_and_made_anew(world: World, how: str) -> None:
    slow = world.process()
    gate = Gate(how)
    slow.on_call = gate
    task = asyncio.create_task(getattr(slow.stock, how)(cart(*ALL), operation_id="o1"))
    await gate.reached.wait()
    await world.resolve()
    assert not await world.open_parts()
    gate.go.set()
    receipt = await task
    assert not receipt.replayed
    assert await left(world) == [4, 4, 4]
    assert len(await world.open_parts()) == (2 if how == "reserve" else 0)


async def test_whoever_gives_up_after_the_decision_finds_it_and_leaves_it(world: World) -> None:
    process = world.process()
    receipt = await process.stock.reserve(cart(FIRST, SECOND), operation_id="o1")
    ((partition, key),) = await world.open_parts()
    part = await deciding.look(process.engine, process.engine.partitions[partition], key)
    assert part is not None
    assert await deciding.give_up(process.engine, f"{FIRST}\x1fo1", [part]) == [part.instance]
    await world.resolve()
    assert await left(world) == [4, 4, 5]
    assert receipt.positions[1] == part.instance.position


async def test_parts_reach_the_level_of_the_call_before_home_decides(world: World) -> None:
    process = world.process()
    decided = False

    def watch(name: str, arguments: Sequence[Any]) -> None:
        nonlocal decided
        decided = decided or any(op[0] == "deduct" for op in operations(name, arguments))

    process.on_call = watch
    process.on_reach = lambda partition, level, key: seen.append((partition, decided))
    seen: list[tuple[int, bool]] = []
    await process.stock.deduct(cart(*ALL), operation_id="o1", durability="queue")
    home, *there = world.positions("o1", *ALL)
    assert sorted(seen[:-1]) == [(number, False) for number in there]
    assert seen[-1] == (home, True)


async def test_parts_that_do_not_reach_the_level_are_given_back_and_nothing_is_decided(world: World) -> None:
    process = world.process()

    def lost(partition: int, level: str, key: str) -> None:
        raise DurabilityNotReached(level, Position(partition, 1, 1), None, None, "the queue is away")

    process.on_reach = lost
    with pytest.raises(Overloaded):
        await process.stock.deduct(cart(*ALL), operation_id="o1", durability="queue")
    assert await left(world) == [5, 5, 5]
    assert await process.stock.status("o1") is None


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("how", ["reserve", "deduct", "adjust"])
async def test_a_caller_that_goes_away_at_the_decision_leaves_what_its_id_says(world: World, how: str, own: bool) -> None:
    process = world.process()
    gate = Gate(how)
    process.on_call = gate
    sign = -1 if how == "adjust" else 1
    call = getattr(process.stock, how)(cart(*ALL, quantity=sign), operation_id="o1" if own else None)
    task = asyncio.create_task(call)
    await gate.reached.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    gate.go.set()
    await process.quiet()
    await world.resolve()
    assert await left(world) == ([4, 4, 4] if own else [5, 5, 5])
    assert (await process.stock.status("o1") is not None) is own


@pytest.mark.parametrize("how", ["reserve", "deduct", "adjust", "confirm", "release", "confirm some", "release some"])
async def test_home_whose_reply_was_lost_answers_all_lines_from_its_journal(world: World, how: str) -> None:
    process = world.process()
    kind, _, some = how.partition(" ")
    if kind in ("confirm", "release"):
        await process.stock.reserve(cart(*ALL, quantity=2), operation_id="o1")
        await process.quiet()
    run, lost = process.engine.wire.run, list[str]()

    async def losing(name: str, keys: Sequence[str], arguments: Sequence[Any], *behind: Any) -> Any:
        answer = await run(name, keys, arguments, *behind)
        if not lost and any(op[0] == kind and not call_of(op[1]) for op in operations(name, arguments)):
            lost.append(kind)
            raise ReplyLost("cut off")
        return answer

    process.engine.wire.run = losing  # type: ignore[method-assign]
    process.engine.wire.timeout = 0.05  # type: ignore[misc]
    if kind in ("confirm", "release"):
        lines = cart(FIRST, SECOND) if some else None
        receipt = await getattr(process.stock, kind)("o1", lines=lines, operation_id="c1")
    else:
        receipt = await getattr(process.stock, kind)(cart(*ALL, quantity=-1 if kind == "adjust" else 1), operation_id="o1")
    assert lost == [kind]
    wanted = [FIRST, SECOND] if some else ALL
    assert sorted(line.merchant for line in receipt.lines) == sorted(wanted)
    assert not receipt.replayed
    found = await left(world)
    assert {line.merchant: line.remaining for line in receipt.lines} == {each: found[ALL.index(each)] for each in wanted}


@pytest.mark.parametrize("committed", [False, True])
async def test_what_enters_several_partitions_enters_once_whatever_the_database_did_meanwhile(
    world: World, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    process = world.process()
    real, left_to_fail = world.ledger.enter_parts, ["deadlock", "disconnected"]

    async def enter_parts(parts: Any, writes: Any = ()) -> Any:
        if left_to_fail:
            if committed:
                await real(parts, writes)
            raise LedgerUnavailable(left_to_fail.pop(0), ConnectionResetError("gone"))
        return await real(parts, writes)

    monkeypatch.setattr(world.ledger, "enter_parts", enter_parts)
    receipt = await process.stock.restock(cart(*ALL, quantity=2), operation_id="r1")
    assert receipt.replayed is committed
    assert await left(world) == [7, 7, 7]


async def test_a_credit_that_redis_refuses_leaves_a_restock_over_partitions_unknown_and_safe_to_repeat(world: World) -> None:
    process = world.process()

    def refuse(name: str, arguments: Sequence[Any]) -> None:
        if any(op[0] == "credit" for op in operations(name, arguments)):
            raise ResponseError("ERR no room for the entry")

    process.on_call = refuse
    with pytest.raises(OutcomeUnknown) as caught:
        await process.stock.restock(cart(*ALL, quantity=2), operation_id="r1")
    assert caught.value.operation_id == "r1"
    process.on_call = None
    assert (await process.stock.restock(cart(*ALL, quantity=2), operation_id="r1")).replayed
    assert await left(world) == [7, 7, 7]


async def test_an_undo_at_home_stands_though_its_parts_can_not_be_reached(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    process = world.process()
    receipt = await process.stock.reserve(cart(*ALL), operation_id="o1")
    await process.quiet()
    hget = process.client.hget

    def away(*_: Any, **__: Any) -> Any:
        raise RedisConnectionError("connection reset by peer")

    monkeypatch.setattr(process.client, "hget", away)
    assert await process.stock.undo(receipt)
    monkeypatch.setattr(process.client, "hget", hget)
    await world.resolve()
    assert await left(world) == [5, 5, 5]


async def test_a_repeat_beyond_the_window_leaves_no_hold_at_a_home_without_lines(world: World) -> None:
    process = world.process()
    await process.stock.reserve(cart(SECOND, THIRD), operation_id="o1")
    await process.stock.confirm("o1")
    await process.quiet()
    await world.apply()
    client: Any = process.client
    for partition in process.engine.partitions:
        await client.delete(partition.key("results:0"), partition.key("results:1"))
    await process.stock.reserve(cart(SECOND, THIRD), operation_id="o1")
    await process.quiet()
    home = process.engine.home(f"{HOME}\x1fo1")
    assert await client.hexists(home.key("reservations"), f"{HOME}\x1fo1")
    upkeep = process.engine.upkeep
    for partition in process.engine.partitions:
        row = await world.ledger.partition(partition.number)
        assert row is not None
        entries = await upkeep.read_journal(partition.number, row.epoch, row.applied, None, 1000)
        if entries:
            await world.ledger.apply(partition.number, row.epoch, [decode(partition.number, row.epoch, *entry) for entry in entries])
        for void in await world.ledger.pending_voids(partition.number, row.epoch):
            await upkeep.void(partition.number, row.epoch, void)
    assert not await client.hexists(home.key("reservations"), f"{HOME}\x1fo1")
    assert await left(world) == [5, 4, 4]


async def test_home_s_late_decision_is_taken_up_with_all_of_its_lines_or_refused(world: World) -> None:
    process = world.process()
    await process.stock.reserve(cart(*ALL), operation_id="o1")
    home = process.engine.home(f"{HOME}\x1fo1")
    _, body = (await process.engine.upkeep.read_journal(home.number, 1, 0, None, 100))[-1]
    late = next(each for each in decode(home.number, 1, 9, body).operations if each.operation_id == "o1")
    again = resubmission(late, 0)
    assert again is not None
    parts = json.loads(late.extra)["parts"]
    assert again[3] == as_replied(late)[1]
    assert len(again[3]) == 6
    assert again[10] == [[number, mark] for number, mark, _, _ in parts]
    # Where a part was given up since, there is no such call any more.
    await process.quiet()
    assert await process.stock.release("o1")
    other = await process.stock.reserve(cart(*ALL), operation_id="o2")
    await process.stock.undo(other)
    home = process.engine.home(f"{HOME}\x1fo2")
    entries = await process.engine.upkeep.read_journal(home.number, 1, 0, None, 100)
    found = [each for sequence, text in entries for each in decode(home.number, 1, sequence, text).operations]
    gone = next(each for each in found if each.operation_id == "o2" and each.kind == "reserve")
    refused = await process.engine.upkeep.resubmit(home.number, 1, gone, 0)
    assert refused == "closed"
    assert await left(world) == [5, 5, 5]


async def test_a_part_that_has_given_back_what_home_has_forgotten_gives_back_only_the_rest(world: World) -> None:
    """Home's Redis went back behind a release that the part had followed: then home decides on those units once more."""
    process = world.process()
    held = await process.stock.reserve(cart(FIRST, SECOND, quantity=3), operation_id="o1")
    await process.quiet()
    home = world.home("o1")
    number, merchant = next((world.place(each), each) for each in (FIRST, SECOND) if world.place(each) != home)
    mark = next(f"{position.epoch}-{position.sequence}" for position in held.positions if position.partition == number)
    key, field = part_key(f"{HOME}\x1fo1", number), f"{merchant}\x1fa"

    async def follow(*target: int) -> Any:
        operation = ["follow", f"{key}\x1ffollow", "", [], "", key, 0, "", mark, "", [field, *target]]
        answer, _ = await process.engine.send(process.engine.partitions[number], operation)
        return answer[0]

    assert await follow(0, 2, 0) == 0
    assert await process.level(merchant) == (4, 1)
    assert await follow(2, 0, 1) == 9, "one is open, and nobody sells what is gone"
    assert await process.level(merchant) == (4, 1)
    assert await follow(1, 0, 2) == 0
    assert await process.level(merchant) == (4, 0)
    await world.apply()
    row = await world.row(merchant)
    assert (row.available, row.reserved, row.sold) == (4, 0, 1)


async def test_a_late_part_is_nobody_s_and_not_taken_up_again(world: World) -> None:
    process = world.process()
    await process.stock.reserve(cart(*ALL), operation_id="o1")
    await process.quiet()
    there = process.engine.partitions[next(place for place in map(world.place, ALL) if place != world.home("o1"))]
    entries = await process.engine.upkeep.read_journal(there.number, 1, 0, None, 100)
    found = [each for _, body in entries for each in decode(there.number, 1, 9, body).operations]
    late = next(each for each in found if PART in each.key and each.kind == "reserve")
    assert await process.stock.release("o1")
    await process.quiet()
    assert await process.engine.upkeep.resubmit(there.number, 1, late, 0) == "part"
    assert await left(world) == [5, 5, 5]
    assert not await world.open_parts()


async def test_where_one_part_can_not_follow_the_others_are_waited_for(world: World) -> None:
    process = world.process()
    await process.stock.reserve(cart(*ALL), operation_id="o1")
    await process.quiet()
    followed: list[str] = []
    both, go = asyncio.Event(), asyncio.Event()

    def on_call(name: str, arguments: Sequence[Any]) -> Any:
        followed.extend(op[1] for op in operations(name, arguments) if op[0] == "follow")
        if len(followed) == 1:
            raise RuntimeError("broken on purpose")
        if len(followed) == 2 and not both.is_set():
            both.set()
            return go.wait()
        return None

    process.on_call = on_call
    confirming = asyncio.create_task(process.stock.confirm("o1"))
    await both.wait()
    done, _ = await asyncio.wait([confirming], timeout=0.1)
    assert not done, "a task goes on that nobody waits for"
    go.set()
    await confirming
    await process.quiet()
    await world.resolve()
    assert await left(world) == [4, 4, 4]


async def test_parts_expire_with_their_home_and_not_before(world: World) -> None:
    process = world.process()
    await process.stock.reserve(cart(*ALL), operation_id="o1")
    await process.quiet()
    await world.resolve()
    assert len(await world.open_parts()) == 2, "an overdue part asks home, and home holds"
    home = process.engine.partitions[world.home("o1")]
    client: Any = process.client
    await client.zadd(home.key("expiry"), {f"{HOME}\x1fo1": 1}, xx=True)
    assert (await process.engine.upkeep.expire(home.number, [f"{HOME}\x1fo1"])).keys
    await world.resolve()
    assert await left(world) == [5, 5, 5]
    assert not await world.open_parts()
    with pytest.raises(ReservationExpired):
        await process.stock.confirm("o1")


async def test_what_enters_several_partitions_enters_all_of_them_or_none(world: World) -> None:
    stock = world.process().stock
    sale = await stock.deduct(cart(*ALL, quantity=2), operation_id="o1")
    back = await stock.take_back(cart(FIRST, THIRD), of="o1", operation_id="b1")
    assert [(line.merchant, line.remaining) for line in back.lines] == [(FIRST, 4), (THIRD, 4)]
    with pytest.raises(ValueError, match="can still come back"):
        await stock.take_back([Line("a", 2, SECOND), Line("a", 2, THIRD)], of="o1", operation_id="b2")
    assert sale.kind == "deduct"
    assert await left(world) == [4, 3, 4]
    first = await stock.restock(cart(*ALL, quantity=10), operation_id="r1")
    again = await stock.restock(cart(*ALL, quantity=10), operation_id="r1")
    assert (first.replayed, again.replayed, again.positions) == (False, True, first.positions)
    assert await left(world) == [14, 13, 14]


@pytest.mark.parametrize("which", [FIRST, SECOND])
async def test_a_rebuilt_partition_knows_its_parts_and_its_decisions(world: World, which: str) -> None:
    process = world.process()
    held = await process.stock.reserve(cart(*ALL, quantity=2), operation_id="o1")
    await process.stock.confirm("o1", lines=[Line("a", 1, SECOND)], operation_id="c1")
    await process.quiet()
    await world.apply()
    number = world.home("o1") if which == FIRST else world.place(which)
    raised = await world.ledger.raise_epoch(number, 1)
    assert raised is not None
    await rebuild(process.engine.upkeep, world.ledger, MemoryQueue(), raised)
    fresh: Process = world.process()
    await world.resolve()
    assert len(await world.open_parts()) == 2
    again = await fresh.stock.reserve(cart(*ALL, quantity=2), operation_id="o1")
    assert again.replayed
    assert (again.positions, again.lines) == (held.positions, held.lines)
    await fresh.stock.release("o1")
    await world.resolve()
    assert await left(world) == [5, 4, 5]
    assert not await world.open_parts()


async def test_a_rebuilt_home_does_not_undo_what_its_parts_have_sold(world: World) -> None:
    process = world.process()
    sale = await process.stock.deduct(cart(*ALL), operation_id="o1")
    await process.quiet()
    await world.apply()
    number = world.home("o1")
    raised = await world.ledger.raise_epoch(number, 1)
    assert raised is not None
    await rebuild(process.engine.upkeep, world.ledger, MemoryQueue(), raised)
    assert not await world.process().stock.undo(sale)
    assert await left(world) == [4, 4, 4]


async def test_parts_follow_the_ledger_where_home_has_but_a_late_tombstone(world: World) -> None:
    process = world.process()
    held = await process.stock.reserve(cart(*ALL), operation_id="o1")
    await process.quiet()

    def stays(name: str, arguments: Sequence[Any]) -> None:
        if any(op[0] == "follow" for op in operations(name, arguments)):
            raise RedisConnectionError("cut off")

    process.on_call = stays
    await process.stock.release("o1")
    await process.quiet()
    assert len(await world.open_parts()) == 2
    await world.apply()
    home = process.engine.home(f"{HOME}\x1fo1")
    client: Any = process.client
    for window in ("results:0", "results:1"):
        if await client.hexists(home.key(window), f"{HOME}\x1fo1\x1f"):
            await client.hset(home.key(window), f"{HOME}\x1fo1\x1f", tombstone(f"1-{held.positions[0].sequence + 9}"))
    process.on_call = None
    await world.resolve()
    assert not await world.open_parts()
    assert await left(world) == [5, 5, 5]


async def test_what_redis_has_forgotten_is_asked_of_the_ledger_only_once_it_has_applied_homes_journal(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deciding, "WATERMARK_WAIT", 0.05)
    process = world.process()
    await process.stock.reserve(cart(FIRST, SECOND), operation_id="o1")
    await process.quiet()
    home, client = process.engine.home(f"{FIRST}\x1fo1"), process.client
    for name in ("results:0", "results:1"):
        await client.hdel(home.key(name), f"{FIRST}\x1fo1")
    ((partition, key),) = await world.open_parts()
    upkeep = process.engine.upkeep
    assert await upkeep.resolve_part(partition, key) is False
    await world.apply()
    assert await upkeep.resolve_part(partition, key) is True
    assert await world.open_parts() == [(partition, key)]
    assert await left(world) == [4, 4, 5]


@pytest.mark.parametrize("how", ["deduct", "undone"])
async def test_parts_whose_caller_died_follow_behind_the_ledger(world: World, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    async def dead(*_: Any) -> None: ...

    monkeypatch.setattr(spanning, "finish", dead)
    process = world.process()
    if how == "deduct":
        await process.stock.deduct(cart(*ALL), operation_id="o1")
    else:
        receipt = await process.stock.reserve(cart(*ALL), operation_id="o1")
        with monkeypatch.context() as gone:
            gone.setattr(deciding, "look", dead)  # home undoes it, and then the process finds no part any more
            assert await process.stock.undo(receipt)
    assert len(await world.open_parts()) == 2
    await world.apply()
    parts = Parts(process.engine.upkeep, world.ledger, MemoryQueue(), NoMetrics(), lambda *_: None, asyncio.Event())
    following = Following(parts)
    number = world.home("o1")
    rows = await process.engine.upkeep.read_journal(number, 1, 0, None, 1000)
    following.applied([decode(number, 1, sequence, body) for sequence, body in rows])
    task = asyncio.create_task(following.run())
    async with asyncio.timeout(20):
        while await world.open_parts():
            await asyncio.sleep(0.01)
    parts.stopping.set()
    following.due.set()
    await task
    assert await left(world) == ([4, 4, 4] if how == "deduct" else [5, 5, 5])
