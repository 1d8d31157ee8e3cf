"""The journal: one entry per script call, first of all writes, without gaps; full stops takes only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from inventory_sdk import errors
from inventory_sdk.ledger.protocol import Void
from inventory_sdk.model import Line, Position, key_of
from tests.stock_kit import MERCHANT, SERVERS, Shop, lines, shop_on


@pytest.fixture(params=SERVERS)
async def shop(request: pytest.FixtureRequest, namespace: str) -> AsyncIterator[Shop]:
    async with shop_on(request.param, namespace, {"a": 100, "b": 50}) as shop:
        yield shop


async def test_every_script_call_that_accepts_something_is_one_entry_without_gaps(shop: Shop) -> None:
    stock = shop.stock
    for n in range(4):
        await asyncio.gather(*(stock.deduct(lines(a=1), operation_id=f"{n}-{k}") for k in range(n + 1)))
        with pytest.raises(errors.InsufficientStock):
            await stock.deduct(lines(a=1000))
        await asyncio.gather(*(stock.deduct(lines(a=1), operation_id=f"{n}-{k}") for k in range(n + 1)))
    journal = await shop.journal()
    sent = [sum(batch.accepted.values()) for batch in shop.metrics.batches() if batch.accepted]
    assert sum(sent) == 10
    assert [(entry.epoch, entry.sequence, len(entry.operations)) for entry in journal] == [(1, n, took) for n, took in enumerate(sent, 1)]
    assert len({entry.nonce for entry in journal}) == len(sent)
    state = await shop.engine.upkeep.journal_state(0)
    assert (state.epoch, state.sequence, state.oldest_kept_sequence, state.state) == (1, len(sent), 1, "open")
    assert (await stock.level("a")).sequence == len(sent)


async def test_an_entry_says_all_that_the_ledger_needs(shop: Shop) -> None:
    receipt = await shop.stock.reserve(lines(b=2, a=1), operation_id="r1", order="77", ttl=60)
    await shop.stock.adjust([Line("a", -3)], operation_id="w1", reason="damaged")
    await shop.stock.confirm("r1", lines=lines(a=1), operation_id="c1")
    first, second, third = [entry.operations[0] for entry in await shop.journal()]
    a, b = key_of(MERCHANT, "a"), key_of(MERCHANT, "b")
    assert (first.kind, first.key, first.lines, first.remaining, first.order) == (
        "reserve",
        key_of(MERCHANT, "r1"),
        [a, 1, b, 2],
        [99, 48],
        "77",
    )
    assert receipt.positions == (Position(0, 1, 1),)
    assert (second.kind, second.lines, second.remaining, second.extra) == ("adjust", [a, 3], [96], '{"reason":"damaged"}')
    assert (third.kind, third.reference, third.lines, third.order) == ("confirm", key_of(MERCHANT, "r1"), [a, 1], "77")


async def test_refused_and_replayed_operations_write_nothing(shop: Shop) -> None:
    stock = shop.stock
    receipt = await stock.deduct(lines(a=1), operation_id="o1")
    await stock.reserve(lines(a=2), operation_id="r1")
    await stock.confirm("r1", lines=lines(a=1), operation_id="c1")
    await stock.undo(receipt)
    await stock.reserve(lines(a=2), operation_id="r2")
    await stock.release("r2")
    before = await shop.snapshot()
    answers = await asyncio.gather(
        stock.deduct(lines(a=1000)),
        stock.deduct(lines(a=1), operation_id="r1"),
        stock.deduct(lines(zzz=1)),
        stock.reserve(lines(a=2), operation_id="r1"),
        stock.reserve(lines(a=2), operation_id="r2"),
        stock.confirm("r1", lines=lines(a=1), operation_id="c1"),
        stock.confirm("r1", lines=lines(a=2), operation_id="c2"),
        stock.confirm("r2"),
        stock.release("r2"),
        stock.extend("r2", ttl=1),
        stock.undo(receipt),
        stock.keep(receipt),
        return_exceptions=True,
    )
    assert [type(answer).__name__ for answer in answers] == [
        "InsufficientStock", "OperationConflict", "UnknownStock", "Receipt", "ReservationClosed", "Receipt", "InvalidOperation",
        "ReservationClosed", "Receipt", "ReservationClosed", "bool", "bool",
    ]  # fmt: skip
    assert await shop.snapshot() == before


async def raw(shop: Shop, kind: str) -> list[Any]:
    """One operation of this kind that would be accepted."""
    a, held = key_of(MERCHANT, "a"), key_of(MERCHANT, "held")
    mark = (await shop.client.hget(shop.key("reservations"), held)).decode().split("\x1e")
    operations: dict[str, list[Any]] = {
        "deduct": ["deduct", key_of(MERCHANT, "x"), "f", [a, 1], "", "", 0, "", "", ""],
        "adjust": ["adjust", key_of(MERCHANT, "x"), "f", [a, 1], "", "", 0, "", "", ""],
        "reserve": ["reserve", key_of(MERCHANT, "x"), "f", [a, 1], "", "", 60_000, "", "", ""],
        "confirm": ["confirm", key_of(MERCHANT, "x"), "f", [], "", held, 0, "", "", ""],
        "release": ["release", key_of(MERCHANT, "x"), "f", [], "", held, 0, "", "", ""],
        "tombstone": ["release", key_of(MERCHANT, "x"), "f", [], "", key_of(MERCHANT, "nope"), 0, "", "", "t"],
        "extend": ["extend", key_of(MERCHANT, "x"), "", [], "", held, 60_000, "", "", ""],
        "pin": ["pin", key_of(MERCHANT, "x"), "", [], "", held, 1, "", "60000", ""],
        "expire": ["expire", f"{held}\x1fexpire", "", [], "", key_of(MERCHANT, "due"), 0, "", "", ""],
        "undo": ["undo", f"{held}\x1fundo", mark[2] or f"r2 {a}", [a, 2], "", held, 0, "", mark[1], "reserve"],
        "keep": ["keep", f"{held}\x1fkeep", "", [], "", held, 0, "", mark[1], ""],
        "claim": ["claim", f"{key_of(MERCHANT, 'x')}\x1fclaim", "f", [], held, key_of(MERCHANT, "x"), 0, "", "", ""],
        "credit": ["credit", key_of(MERCHANT, "\x1fcredit\x1f0-9"), "credit", [a, 1], "", key_of(MERCHANT, "po"), 0, "", "", ""],
        "void": ["void", key_of(MERCHANT, "\x1fvoid\x1f1-1-0"), "void", [a, 2, -2], "", held, 0, "", mark[1], "f"],
        "correct": ["correct", key_of(MERCHANT, "\x1fcorrect\x1f1"), "correct", [a, 1, 0], "", "", 0, "", "", ""],
    }
    return operations[kind]


KINDS = [
    "deduct", "adjust", "reserve", "confirm", "release", "tombstone", "extend", "pin", "expire", "undo", "keep", "credit", "void",
    "correct", "claim",
]  # fmt: skip


@pytest.fixture
async def holding(shop: Shop) -> Shop:
    await shop.stock.reserve(lines(a=2), operation_id="held")
    await shop.stock.reserve(lines(a=2), operation_id="due")
    await shop.make_due("due")
    return shop


@pytest.mark.parametrize("kind", KINDS)
async def test_each_kind_is_accepted_and_journaled_once(holding: Shop, kind: str) -> None:
    (answer,) = await holding.run(await raw(holding, kind))
    assert answer[0] in (0, -1)
    journal = await holding.journal()
    assert [operation.kind for operation in journal[-1].operations] == [kind]
    assert len(journal) == 3


@pytest.mark.parametrize("kind", KINDS)
async def test_when_the_journal_refuses_the_entry_nothing_at_all_moves(holding: Shop, kind: str) -> None:
    operation = await raw(holding, kind)
    await holding.client.xadd(holding.key("journal"), {"b": "a later entry"}, id="1-1000000")
    before = await holding.snapshot()
    with pytest.raises(errors.InventoryError, match="nothing moved"):
        await holding.run(["deduct", key_of(MERCHANT, "along"), "f", [key_of(MERCHANT, "b"), 1], "", "", 0, "", "", ""], operation)
    assert await holding.snapshot() == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capped", [True, False])
async def test_a_journal_of_another_type_stops_everything(request: pytest.FixtureRequest, namespace: str, kind: str, capped: bool) -> None:
    async with shop_on("fakeredis", namespace, {"a": 100, "b": 50}, journal_cap=1000 if capped else 0) as shop:
        await shop.stock.reserve(lines(a=2), operation_id="held")
        await shop.stock.reserve(lines(a=2), operation_id="due")
        await shop.make_due("due")
        operation = await raw(shop, kind)
        await shop.client.delete(shop.key("journal"))
        await shop.client.set(shop.key("journal"), "not a stream")
        before = await shop.snapshot()
        with pytest.raises(errors.InventoryError, match="nothing moved"):
            await shop.run(operation)
        assert await shop.snapshot() == before


TOUCHED = ["meta", "available", "reserved", "frozen", "results:0", "results:1", "reservations", "expiry", "journal"]


@pytest.mark.parametrize("name", TOUCHED)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_key_of_another_type_is_found_before_anything_is_written(holding: Shop, kind: str, name: str) -> None:
    operation = await raw(holding, kind)
    await holding.client.delete(holding.key(name))
    await holding.client.set(holding.key(name), "another type")
    before = await holding.snapshot()
    try:
        await holding.run(operation)
    except errors.InventoryError:
        assert await holding.snapshot() == before  # else this kind does not need that key


async def test_at_the_cap_takes_stop_and_what_ends_a_hold_goes_on(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {"a": 100}, journal_cap=6) as shop:
        stock = shop.stock
        kept = await stock.deduct(lines(a=1), operation_id="o1")
        undone = await stock.deduct(lines(a=1), operation_id="o2")
        for name in ("r1", "r2", "r3", "r4"):
            await stock.reserve(lines(a=4), operation_id=name)
        await shop.make_due("r4")
        before = await shop.snapshot()
        for take in (stock.deduct(lines(a=1)), stock.reserve(lines(a=1)), stock.adjust([Line("a", -1)])):
            with pytest.raises(errors.JournalFull) as caught:
                await take
            assert caught.value.retry_after > 0
        assert await shop.snapshot() == before
        assert (await stock.deduct(lines(a=1), operation_id="o1")).replayed
        assert (await stock.reserve(lines(a=4), operation_id="r1")).replayed
        with pytest.raises(errors.OperationConflict):
            await stock.deduct(lines(a=2), operation_id="o1")
        await stock.confirm("r1")
        await stock.release("r2", lines=lines(a=1), operation_id="b1")
        await stock.extend("r3", ttl=60)
        assert (await shop.engine.upkeep.expire(0, [key_of(MERCHANT, "r4")])).keys
        assert await stock.undo(undone)
        assert await stock.keep(kept)
        await stock.restock(lines(a=1), operation_id="po")
        await shop.engine.upkeep.void(0, 1, Void(Position(0, 1, 1), 0, "", "deduct", "", (key_of(MERCHANT, "a"), 1, 0), False))
        with pytest.raises(errors.JournalFull):
            await stock.confirm("r4", reacquire=True)
        with pytest.raises(errors.ReservationNotFound):
            await stock.release("unknown")


async def test_room_in_the_journal_lets_takes_through_again(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {"a": 100}, journal_cap=2) as shop:
        await shop.stock.deduct(lines(a=1))
        await shop.stock.deduct(lines(a=1))
        with pytest.raises(errors.JournalFull):
            await shop.stock.deduct(lines(a=1), operation_id="o1")
        await shop.client.xtrim(shop.key("journal"), maxlen=1, approximate=False)
        assert not (await shop.stock.deduct(lines(a=1), operation_id="o1")).replayed


async def test_what_was_journaled_is_handed_to_the_publisher_once_with_its_body(namespace: str) -> None:
    published: list[tuple[int, int, int, str]] = []

    def publish(partition: int, epoch: int, sequence: int, body: str) -> asyncio.Future[None]:
        published.append((partition, epoch, sequence, body))
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    async with shop_on("fakeredis", namespace, {"a": 100}, publish=publish) as shop:
        await asyncio.gather(*(shop.stock.deduct(lines(a=1), operation_id=f"o{n}") for n in range(3)))
        await shop.stock.deduct(lines(a=1), operation_id="o0")
        with pytest.raises(errors.InsufficientStock):
            await shop.stock.deduct(lines(a=1000))
        assert published == [(0, 1, sequence, body) for sequence, body in await shop.engine.upkeep.read_journal(0, 1, 0, None, 10)]
        assert len(published) == 1


async def test_reading_the_journal_ends_where_it_was_asked_to(shop: Shop) -> None:
    for n in range(5):
        await shop.stock.deduct(lines(a=1), operation_id=f"o{n}")
    read = shop.engine.upkeep.read_journal
    assert [sequence for sequence, _ in await read(0, 1, 1, 4, 10)] == [2, 3, 4]
    assert [sequence for sequence, _ in await read(0, 1, 1, None, 2)] == [2, 3]
    assert await read(0, 1, 5, None, 10) == []
    assert await read(0, 2, 0, None, 10) == []


async def test_512_operations_ride_in_one_entry_and_a_bulk_call_rides_alone(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {f"s{n:03}": 1000 for n in range(512)}) as shop:
        await shop.stock.deduct(lines(s000=1))
        many = [Line(f"s{n:03}", 1) for n in range(512)]
        await asyncio.gather(*(shop.stock.deduct(lines(s000=1)) for _ in range(600)), *(shop.stock.deduct(many) for _ in range(3)))
        sizes = [len(entry.operations) for entry in await shop.journal()]
        assert sum(sizes) == 604
        assert max(sizes) <= 512
        for entry in await shop.journal():
            assert sum(len(operation.lines) // 2 for operation in entry.operations) <= 1024


async def test_applied_entries_do_not_fill_the_journal_and_others_are_never_trimmed(namespace: str) -> None:
    async with shop_on("fakeredis", namespace, {"a": 100}, journal_cap=6) as shop:
        for number in range(6):
            await shop.stock.deduct(lines(a=1), operation_id=f"o{number}")
        with pytest.raises(errors.JournalFull):
            await shop.stock.deduct(lines(a=1))
        await shop.engine.upkeep.trim(0, 1, 2)
        assert [entry.sequence for entry in await shop.journal()] == [3, 4, 5, 6]
        await shop.stock.deduct(lines(a=1))
        await shop.engine.upkeep.trim(0, 1, 4)
        assert [entry.sequence for entry in await shop.journal()] == [5, 6, 7]
        # Below half of the cap the ten minutes of a ledger that may go back are kept again.
        await shop.engine.upkeep.trim(0, 1, 7)
        assert len(await shop.journal()) == 3
