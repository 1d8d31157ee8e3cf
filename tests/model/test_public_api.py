"""Promises 1 to 7 of the public API, held against a plain-Python model by a rule machine: everything embedded, with repeated calls,
callers that go away, expiry, and workers that stop and come back.

Hypothesis prints the failing steps and their seed; ``--hypothesis-seed=N`` replays a whole run,
INVENTORY_TEST_EXAMPLES=1000 makes a long night of it.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from inventory_sdk import Inventory, Line, Receipt
from inventory_sdk.errors import (
    InsufficientStock,
    InvalidOperation,
    OperationConflict,
    ReservationClosed,
    ReservationExpired,
    ReservationNotFound,
    UnknownStock,
)
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.model import Layout
from inventory_sdk.stock import deciding
from tests.conftest import required

T = TypeVar("T")

SKUS = ("a", "b", "c")
MERCHANTS = ("m1", "m2")

merchants = st.sampled_from(MERCHANTS)
some_lines = st.lists(st.tuples(st.sampled_from(SKUS), st.integers(1, 6)), min_size=1, max_size=4)
parts = st.lists(st.tuples(st.sampled_from(SKUS), st.integers(1, 3)), min_size=1, max_size=2)
bad_lines = st.sampled_from(
    [
        [],
        [("a", 0)],
        [("a", -1)],
        [("a", True)],
        [("a", 1.0)],
        [("a", 10**9 + 1)],
        [("", 1)],
        [("a\x1f", 1)],
        [("é" * 65, 1)],
        [("a", 10**9), ("a", 1)],
    ]
)


def summed(lines: list[tuple[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for sku, quantity in lines:
        total[sku] += quantity
    return total


def as_lines(lines: list[tuple[str, int]]) -> list[Line]:
    return [Line(sku, quantity) for sku, quantity in lines]


@dataclass
class Hold:
    lines: Counter[str]
    open: Counter[str]
    confirmed: Counter[str] = field(default_factory=Counter)
    released: Counter[str] = field(default_factory=Counter)
    expired: Counter[str] = field(default_factory=Counter)
    state: str = "held"

    def close(self, lines: Counter[str], into: Counter[str], state: str) -> None:
        self.open = self.open - lines
        into.update(lines)
        if not self.open:
            self.state = state


class Shop:
    """The model of one merchant."""

    def __init__(self) -> None:
        self.available: Counter[str] = Counter()
        self.reserved: Counter[str] = Counter()
        self.sold: Counter[str] = Counter()
        self.supplied: Counter[str] = Counter()
        self.written_off: Counter[str] = Counter()
        self.known: set[str] = set()
        self.holds: dict[str, Hold] = {}
        self.done: dict[str, tuple[str, Counter[str], Receipt]] = {}
        self.returnable: dict[str, Counter[str]] = {}
        self.tombstones: set[str] = set()

    def covers(self, lines: Counter[str]) -> bool:
        return all(self.available[sku] >= quantity for sku, quantity in lines.items())

    def take(self, lines: Counter[str], into: Counter[str]) -> None:
        self.available.subtract(lines)
        into.update(lines)


class PublicApi(RuleBasedStateMachine):
    layout: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.inventory = Inventory("memory://", metrics=[NoMetrics()], **self.layout)
        self.shops = {merchant: Shop() for merchant in MERCHANTS}
        self.number = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def new_id(self) -> str:
        self.number += 1
        return f"op-{self.number}"

    @initialize()
    def open_shop(self) -> None:
        self.run(self.inventory.start())
        for merchant in MERCHANTS:
            self.restock(merchant, [("a", 5), ("b", 3)])

    def teardown(self) -> None:
        try:
            if self.run(self._started()):
                self.run(self._agree())
        finally:
            self.run(self.inventory.close())
            self.runner.close()

    async def _started(self) -> bool:
        return self.inventory._here.get(asyncio.get_running_loop()) is not None

    @property
    def stock(self) -> Any:
        return self.inventory.stock

    # Stock enters ------------------------------------------------------------------------------------------------------------

    @rule(merchant=merchants, lines=some_lines)
    def restock(self, merchant: str, lines: list[tuple[str, int]]) -> None:
        shop, name = self.shops[merchant], self.new_id()
        receipt = self.run(self.stock.restock(as_lines(lines), merchant=merchant, operation_id=name))
        total = summed(lines)
        shop.available.update(total)
        shop.supplied.update(total)
        shop.known.update(total)
        shop.done[name] = ("restock", total, receipt)
        assert {line.sku: line.remaining for line in receipt.lines} == {sku: shop.available[sku] for sku in total}

    @rule(merchant=merchants, lines=some_lines, up=st.booleans())
    def adjust(self, merchant: str, lines: list[tuple[str, int]], up: bool) -> None:
        shop, name, total = self.shops[merchant], self.new_id(), summed(lines)
        signed = [Line(sku, quantity if up else -quantity) for sku, quantity in lines]
        work = self.stock.adjust(signed, merchant=merchant, operation_id=name, reason="counted")
        if up:
            self.run(work)
            shop.available.update(total)
            shop.supplied.update(total)
            shop.known.update(total)
        elif self.moves(shop, total, work):
            shop.take(total, shop.written_off)

    @precondition(lambda self: any(shop.returnable for shop in self.shops.values()))
    @rule(data=st.data(), lines=parts)
    def take_back(self, data: st.DataObject, lines: list[tuple[str, int]]) -> None:
        merchant = data.draw(st.sampled_from([name for name, shop in self.shops.items() if shop.returnable]))
        shop = self.shops[merchant]
        of = data.draw(st.sampled_from(sorted(shop.returnable)))
        total, left = summed(lines), shop.returnable[of]
        work = self.stock.take_back(as_lines(lines), of=of, merchant=merchant, operation_id=self.new_id())
        if total - left:
            with pytest.raises(InvalidOperation):
                self.run(work)
            return
        self.run(work)
        shop.returnable[of] = left - total
        shop.sold.subtract(total)
        shop.available.update(total)

    # Takes -------------------------------------------------------------------------------------------------------------------

    def moves(self, shop: Shop, total: Counter[str], work: Coroutine[Any, Any, Receipt]) -> Receipt | None:
        """Runs a take; None where the model says that it can't be covered, and it wasn't."""
        if any(sku not in shop.known for sku in total):
            with pytest.raises(self.unknown(shop, total)):
                self.run(work)
            return None
        if not shop.covers(total):
            with pytest.raises(InsufficientStock) as refusal:
                self.run(work)
            short = {item.sku: (item.requested, item.available) for item in refusal.value.shortages}
            assert short == {sku: (quantity, shop.available[sku]) for sku, quantity in total.items() if shop.available[sku] < quantity}
            return None
        receipt = self.run(work)
        assert not receipt.replayed
        assert {line.sku: line.remaining for line in receipt.lines} == {
            sku: shop.available[sku] - quantity for sku, quantity in total.items()
        }
        return receipt

    @rule(merchant=merchants, lines=some_lines)
    def deduct(self, merchant: str, lines: list[tuple[str, int]]) -> None:
        shop, name, total = self.shops[merchant], self.new_id(), summed(lines)
        receipt = self.moves(shop, total, self.stock.deduct(as_lines(lines), merchant=merchant, operation_id=name))
        if receipt is not None:
            shop.take(total, shop.sold)
            shop.done[name] = ("deduct", total, receipt)
            shop.returnable[name] = total

    @rule(merchant=merchants, lines=some_lines)
    def reserve(self, merchant: str, lines: list[tuple[str, int]]) -> None:
        shop, name, total = self.shops[merchant], self.new_id(), summed(lines)
        receipt = self.moves(shop, total, self.stock.reserve(as_lines(lines), merchant=merchant, operation_id=name, ttl=None))
        if receipt is not None:
            shop.take(total, shop.reserved)
            shop.holds[name] = Hold(total, Counter(total))
            shop.done[name] = ("reserve", total, receipt)

    @rule(merchant=merchants, lines=some_lines, callers=st.integers(2, 5))
    def many_callers_with_one_id(self, merchant: str, lines: list[tuple[str, int]], callers: int) -> None:
        shop, name, total = self.shops[merchant], self.new_id(), summed(lines)

        async def crowd() -> list[Any]:
            calls = [self.stock.deduct(as_lines(lines), merchant=merchant, operation_id=name) for _ in range(callers)]
            return await asyncio.gather(*calls, return_exceptions=True)

        answers = self.run(crowd())
        if any(sku not in shop.known for sku in total):
            assert {type(answer) for answer in answers} <= set(self.unknown(shop, total))
        elif not shop.covers(total):
            assert {type(answer) for answer in answers} == {InsufficientStock}
        else:
            assert sorted(answer.replayed for answer in answers) == [False] + [True] * (callers - 1)
            assert len({(answer.lines, answer.positions) for answer in answers}) == 1
            shop.take(total, shop.sold)
            shop.done[name] = ("deduct", total, answers[0])
            shop.returnable[name] = total

    @rule(merchant=merchants, lines=some_lines, steps=st.integers(0, 40), own_id=st.booleans(), hold=st.booleans())
    def a_caller_goes_away(self, merchant: str, lines: list[tuple[str, int]], steps: int, own_id: bool, hold: bool) -> None:
        shop, total = self.shops[merchant], summed(lines)
        name = self.new_id() if own_id else None

        async def leave() -> tuple[Receipt | None, bool]:
            take = self.stock.reserve if hold else self.stock.deduct
            task = asyncio.ensure_future(take(as_lines(lines), merchant=merchant, operation_id=name))
            for _ in range(steps):
                await asyncio.sleep(0)
            cancelled = task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            await self._quiet(merchant)
            if isinstance(outcome, Receipt):
                return outcome, False
            assert isinstance(outcome, asyncio.CancelledError | InsufficientStock | UnknownStock), (cancelled, outcome)
            return (await self.stock.status(name, merchant=merchant)) if name else None, True

        receipt, _ = self.run(leave())
        if receipt is not None:  # it stands, and can be asked
            assert all(sku in shop.known for sku in total)
            assert shop.covers(total)
            shop.take(total, shop.reserved if hold else shop.sold)
            shop.done[receipt.operation_id] = ("reserve" if hold else "deduct", total, receipt)
            if hold:
                shop.holds[receipt.operation_id] = Hold(total, Counter(total))
            else:
                shop.returnable[receipt.operation_id] = total

    async def _quiet(self, merchant: str) -> None:
        """All that was sent has been answered, and the undos it asked for are done."""
        engine = self.inventory._running().engine
        for partition in engine.partitions:
            with pytest.raises(ReservationNotFound):
                await self.stock.extend(engine.layout.id_at(merchant, "nobody", partition.number), ttl=1, merchant=merchant)
        await self._followed()

    async def _followed(self) -> None:
        """What goes on behind the callers has ended: undos, and parts in other partitions."""
        engine = self.inventory._running().engine
        while engine._background:
            await asyncio.wait(set(engine._background))

    # Repeats -----------------------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(shop.done for shop in self.shops.values()))
    @rule(data=st.data(), other=st.booleans())
    def repeat(self, data: st.DataObject, other: bool) -> None:
        merchant = data.draw(st.sampled_from([name for name, shop in self.shops.items() if shop.done]))
        shop = self.shops[merchant]
        name = data.draw(st.sampled_from(sorted(shop.done)))
        kind, total, first = shop.done[name]
        lines = [Line(sku, quantity) for sku, quantity in sorted(total.items(), reverse=True)]
        if other:
            lines[0] = Line(lines[0].sku, lines[0].quantity + 1)
        call = getattr(self.stock, kind)
        work = call(lines, merchant=merchant, operation_id=name)
        hold = shop.holds.get(name)
        if other:
            with pytest.raises(OperationConflict):
                self.run(work)
        elif hold is not None and hold.state in ("released", "expired"):
            with pytest.raises(ReservationClosed):
                self.run(work)
        else:
            again = self.run(work)
            assert again.replayed
            if kind != "restock":
                assert (again.lines, again.positions) == (first.lines, first.positions)

    @rule(merchant=merchants, lines=bad_lines, kind=st.sampled_from(["reserve", "deduct", "restock", "adjust"]))
    def bad_input_moves_nothing(self, merchant: str, lines: list[tuple[Any, Any]], kind: str) -> None:
        with pytest.raises(InvalidOperation):
            made = [Line(*line) for line in lines]
            if kind == "adjust" and made:
                made = [*made, Line("a", -made[0].quantity)]
            self.run(getattr(self.stock, kind)(made, merchant=merchant, operation_id=self.new_id()))

    # What ends a hold ------------------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(shop.holds for shop in self.shops.values()))
    @rule(data=st.data(), lines=st.none() | parts, confirm=st.booleans())
    def close(self, data: st.DataObject, lines: list[tuple[str, int]] | None, confirm: bool) -> None:
        merchant = data.draw(st.sampled_from([name for name, shop in self.shops.items() if shop.holds]))
        shop = self.shops[merchant]
        name = data.draw(st.sampled_from(sorted(shop.holds)))
        hold = shop.holds[name]
        call = self.stock.confirm if confirm else self.stock.release
        given = as_lines(lines) if lines is not None else None
        operation_id = self.new_id()
        work = call(name, lines=given, merchant=merchant, operation_id=operation_id)
        if hold.state != "held":
            with pytest.raises(ReservationExpired if hold.state == "expired" else ReservationClosed):
                self.run(work)
            return
        total = summed(lines) if lines is not None else Counter(hold.open)
        if total - hold.open:
            with pytest.raises(InvalidOperation):
                self.run(work)
            return
        receipt = self.run(work)
        assert Counter({line.sku: line.quantity for line in receipt.lines}) == total
        again = self.run(call(name, lines=given, merchant=merchant, operation_id=operation_id))
        assert again.replayed
        assert again.lines == receipt.lines
        shop.reserved.subtract(total)
        if confirm:
            hold.close(total, hold.confirmed, "confirmed")
            shop.sold.update(total)
            shop.returnable[name] = shop.returnable.get(name, Counter()) + total
        else:
            hold.close(total, hold.released, "released")
            shop.available.update(total)

    @precondition(lambda self: any(hold.state == "held" for shop in self.shops.values() for hold in shop.holds.values()))
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        held = [(m, n) for m, shop in self.shops.items() for n, hold in shop.holds.items() if hold.state == "held"]
        merchant, name = data.draw(st.sampled_from(held))
        shop = self.shops[merchant]
        hold = shop.holds[name]

        async def run_out() -> None:
            await self.stock.extend(name, ttl=0.001, merchant=merchant)
            upkeep = self.inventory._running().engine.upkeep
            home = self.inventory._running().engine.layout.home(f"{merchant}\x1f{name}")
            while (await self.stock.reservation(name, merchant=merchant)).state == "held":
                await upkeep.expire(home, await upkeep.due_expiries(home, 100))
            await self.parts_follow(merchant, name)

        self.run(run_out())
        total = Counter(hold.open)
        hold.close(total, hold.expired, "expired")
        shop.reserved.subtract(total)
        shop.available.update(total)

    async def parts_follow(self, merchant: str, name: str) -> None:
        """A hold has expired at home; of one partition that is all."""

    def spans(self, merchant: str, name: str) -> bool:
        """Whether the call has stock in other partitions than its home."""
        return False

    def unknown(self, shop: Shop, total: Counter[str]) -> tuple[type[Exception], ...]:
        """What says that a take has stock that nobody knows."""
        return (UnknownStock,)

    @precondition(lambda self: any(hold.state == "expired" for shop in self.shops.values() for hold in shop.holds.values()))
    @rule(data=st.data())
    def reacquire(self, data: st.DataObject) -> None:
        gone = [(m, n) for m, shop in self.shops.items() for n, hold in shop.holds.items() if hold.state == "expired"]
        merchant, name = data.draw(st.sampled_from(gone))
        shop = self.shops[merchant]
        hold = shop.holds[name]
        elsewhere = self.spans(merchant, name)
        work = self.stock.confirm(name, merchant=merchant, operation_id=self.new_id(), reacquire=True)
        if elsewhere:
            with pytest.raises(ReservationExpired):
                self.run(work)
            return
        if not shop.covers(hold.expired):
            with pytest.raises(InsufficientStock):
                self.run(work)
            return
        self.run(work)
        shop.take(hold.expired, shop.sold)
        shop.returnable[name] = shop.returnable.get(name, Counter()) + hold.expired
        hold.confirmed.update(hold.expired)
        hold.expired = Counter()
        hold.state = "confirmed"

    @rule(merchant=merchants, lines=some_lines)
    def release_before_the_reserve_arrives(self, merchant: str, lines: list[tuple[str, int]]) -> None:
        name = self.new_id()
        with pytest.raises(ReservationNotFound):
            self.run(self.stock.release(name, merchant=merchant))
        known = {sku for sku, _ in lines} <= self.shops[merchant].known
        with pytest.raises(ReservationClosed if known else (ReservationClosed, UnknownStock)):
            self.run(self.stock.reserve(as_lines(lines), merchant=merchant, operation_id=name))

    # The worker ------------------------------------------------------------------------------------------------------------------

    @rule()
    def the_worker_stops_and_another_comes(self) -> None:
        async def replace() -> None:
            running = self.inventory._running()
            assert running._worker is not None
            await running._worker.stop()
            running._worker = running.make_worker()
            await running._worker.start()

        self.run(replace())

    @rule()
    def the_ledger_agrees(self) -> None:
        self.run(self._agree())

    async def _agree(self) -> None:
        await self._followed()
        await self.inventory.settled()
        assert await self.inventory.ledger.verify() == []
        for merchant, shop in self.shops.items():
            rows = {row.sku: row for row in await self.inventory.ledger.all_stock(merchant)}
            assert set(rows) == shop.known
            for sku, row in rows.items():
                found = (row.available, row.reserved, row.sold, row.supplied, row.written_off)
                wanted = tuple(counter[sku] for counter in (shop.available, shop.reserved, shop.sold, shop.supplied, shop.written_off))
                assert found == wanted, (merchant, sku)

    @invariant()
    def redis_says_what_the_model_says(self) -> None:
        async def look() -> None:
            await self._followed()
            for merchant, shop in self.shops.items():
                found = await self.stock.levels(sorted(shop.known), merchant=merchant)
                for sku, level in found.items():
                    assert (level.available, level.reserved) == (shop.available[sku], shop.reserved[sku]), (merchant, sku)

        self.run(look())

    @invariant()
    def no_more_is_sold_than_was_supplied(self) -> None:
        for shop in self.shops.values():
            for sku in shop.known:
                parts_of_it = shop.available[sku] + shop.reserved[sku] + shop.sold[sku] + shop.written_off[sku]
                assert parts_of_it == shop.supplied[sku]


class PublicApiBySku(PublicApi):
    """The same where each SKU has a partition of its own, and each id its home."""

    layout: ClassVar[dict[str, Any]] = {"partitions": 4, "partition_by": "sku"}

    def spans(self, merchant: str, name: str) -> bool:
        layout = Layout(4, "sku")
        home = layout.home(f"{merchant}\x1f{name}")
        return any(layout.of(f"{merchant}\x1f{sku}") != home for sku in self.shops[merchant].holds[name].lines)

    def unknown(self, shop: Shop, total: Counter[str]) -> tuple[type[Exception], ...]:
        # Each partition says what is wrong with its own lines.
        short = any(shop.available[sku] < quantity for sku, quantity in total.items() if sku in shop.known)
        return (UnknownStock, InsufficientStock) if short else (UnknownStock,)

    async def parts_follow(self, merchant: str, name: str) -> None:
        engine = self.inventory._running().engine
        await self.inventory.settled()
        await deciding.follow_call(engine, f"{merchant}\x1f{name}", patient=True)

    @precondition(lambda self: any(hold.state == "held" for shop in self.shops.values() for hold in shop.holds.values()))
    @rule(data=st.data(), sku=st.sampled_from(SKUS))
    def an_id_that_something_has_used_closes_nothing(self, data: st.DataObject, sku: str) -> None:
        held = [(m, n) for m, shop in self.shops.items() for n, hold in shop.holds.items() if hold.state == "held" and hold.open[sku]]
        used = [name for shop in self.shops.values() for name in shop.done]
        if not held:
            return
        merchant, name = data.draw(st.sampled_from(held))
        other = data.draw(st.sampled_from(sorted(used)))
        if other in self.shops[merchant].done:
            with pytest.raises(OperationConflict):
                self.run(self.stock.confirm(name, lines=[Line(sku, 1)], merchant=merchant, operation_id=other))


SETTINGS = settings(
    max_examples=int(os.environ.get("INVENTORY_TEST_EXAMPLES", "12" if required() else "4")),
    stateful_step_count=30,
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestPublicApi = PublicApi.TestCase
TestPublicApi.settings = SETTINGS
TestPublicApiBySku = PublicApiBySku.TestCase
TestPublicApiBySku.settings = SETTINGS
