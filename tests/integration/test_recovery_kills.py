"""A recoverer is killed at every step of its way, before the step and after it; another one finishes, and the books are whole.
The real scripts (fakeredis), the real ledger (SQLite), a queue with RabbitMQ's manners."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fakeredis import FakeAsyncRedis

from inventory_sdk import Inventory, Line
from inventory_sdk.metrics import NoMetrics
from inventory_sdk.model import key_of
from tests.conftest import sample

QUICK: dict[str, Any] = {"publish_timeout": 0.02, "first_delay": 0.005, "longest_delay": 0.05, "housekeeping": 0.05, "idle": 0.01}
STEPS = (
    "ledger.raise_epoch", "redis.freeze", "queue.unbind", "redis.read_journal", "ledger.apply 1", "queue.mark",
    "ledger.apply lost", "queue.bind", "ledger.rebuilding", "redis.begin", "redis.balances", "redis.results", "redis.reservations",
    "ledger.open", "redis.open",
)  # fmt: skip


class Killer:
    """Stops whoever makes a step, before or after it, for ever; every other call goes through."""

    def __init__(self, step: str, after: bool) -> None:
        self.step, self.after = step, after
        self.there = asyncio.Event()
        self.armed = False
        self.counts: dict[str, int] = {}

    def wrap(self, owner: Any, name: str, steps: Any, patch: pytest.MonkeyPatch) -> None:
        real = getattr(owner, name)

        async def stepping(*arguments: Any, **named: Any) -> Any:
            mine = self.armed and self.step in steps(*arguments, **named)
            if mine and not self.after:
                await self._stop()
            result = await real(*arguments, **named)
            if mine and self.after:
                await self._stop()
            return result

        patch.setattr(owner, name, stepping)

    async def _stop(self) -> None:
        self.armed = False
        self.there.set()
        await asyncio.Event().wait()

    def count(self, name: str) -> str:
        if self.armed:
            self.counts[name] = self.counts.get(name, 0) + 1
        return f"{name} {self.counts.get(name)}"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", sample(STEPS))
async def test_a_recoverer_that_is_killed_is_followed_by_one_that_finishes(
    step: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, Mapping[str, Any]]] = []
    database = f"sqlite+aiosqlite:///{tmp_path / 'stock.db'}"
    inventory = Inventory(FakeAsyncRedis(), queue="memory://", database=database, merchant="m", metrics=[NoMetrics()])
    for name in ("lost", "recovered", "rejected"):
        inventory.on(name)(lambda facts, name=name: told.append((name, facts)))
    async with inventory:
        await inventory.create_schema()
        stock, running = inventory.stock, inventory._running()
        ledger, queue, engine = inventory.ledger, running.queue, running.engine
        view = engine.partitions[0]
        await stock.restock([Line("a", 100), Line("b", 50)], operation_id="po")
        await stock.reserve([Line("a", 3)], operation_id="held", ttl=600)
        for number in range(4):
            await stock.deduct([Line("a", 1)], operation_id=f"o{number}", durability="queue")
        async with inventory.worker(**QUICK) as worker:
            await worker.ready()
            await inventory.settled()
        # Of these the queue has 8 and 9; entry 7 reaches nobody but Redis.
        real = queue.publish
        monkeypatch.setattr(queue, "publish", _nowhere)
        await stock.deduct([Line("b", 5)], operation_id="only in Redis", durability="redis")
        await running._publisher.close(timeout=0)
        monkeypatch.setattr(queue, "publish", real)
        for number in range(4, 6):
            await stock.deduct([Line("a", 1)], operation_id=f"o{number}", durability="queue")
        journal = view.key("journal")
        await engine.wire.client.xdel(journal, "1-7")
        await engine.wire.client.delete(view.key("meta"), view.key("available"), view.key("reservations"), view.key("worker"))

        killer = Killer(step, after)
        plain = {"ledger.raise_epoch": (ledger, "raise_epoch"), "redis.freeze": (engine.upkeep, "freeze")}
        plain |= {"queue.unbind": (queue, "unbind"), "queue.mark": (queue, "mark"), "queue.bind": (queue, "bind")}
        plain |= {"redis.read_journal": (engine.upkeep, "read_journal")}
        for name, (owner, method) in plain.items():
            killer.wrap(owner, method, lambda *_, name=name, **__: (name,), monkeypatch)

        def applies(*arguments: Any, **_: Any) -> tuple[str, ...]:
            lost = "ledger.apply lost" if len(arguments) > 4 and arguments[4] else ""
            return killer.count("ledger.apply"), lost

        killer.wrap(ledger, "apply", applies, monkeypatch)
        killer.wrap(engine.wire, "run", lambda name, _, arguments: (f"redis.{arguments[2]}",) if name == "rebuild" else (), monkeypatch)
        _watch_opening(ledger, killer, monkeypatch)
        killer.armed = True
        first = running.make_worker(**QUICK, take_over=5.0)
        await first.start()
        async with asyncio.timeout(5):
            await killer.there.wait()
        await first.stop(timeout=0)
        async with inventory.worker(**QUICK, take_over=0.1) as second:
            async with asyncio.timeout(20):
                await second.ready()
                while (row := await ledger.partition(0)) is None or row.state != "open" or row.epoch < 2:
                    await asyncio.sleep(0.01)
                while (await engine.upkeep.journal_state(0)).state != "open":
                    await asyncio.sleep(0.01)
            await inventory.settled()
            assert await ledger.verify() == []
            rows = {row.sku: (row.available, row.reserved, row.sold) for row in await ledger.stock([key_of("m", "a"), key_of("m", "b")])}
            assert rows == {"a": (91, 3, 6), "b": (50, 0, 0)}
            assert {sku: (level.available, level.reserved) for sku, level in (await stock.levels(["a", "b"])).items()} == {
                "a": (91, 3),
                "b": (50, 0),
            }
            assert {facts["sequences"] for name, facts in told if name == "lost"} <= {(7,)}
            again = [await stock.deduct([Line("a", 1)], operation_id=f"o{number}") for number in range(6)]
            assert all(receipt.replayed for receipt in again)
            await stock.confirm("held")
            await inventory.settled()


def _watch_opening(ledger: Any, killer: Killer, patch: pytest.MonkeyPatch) -> None:
    from inventory_sdk.ledger.rebuild import Reading

    for name, step in (("lock", "ledger.rebuilding"), ("open", "ledger.open")):
        real = getattr(Reading, name)

        async def stepping(self: Any, real: Any = real, step: str = step) -> None:
            mine = killer.armed and killer.step == step
            if mine and not killer.after:
                await killer._stop()
            await real(self)
            if mine and killer.after:
                await killer._stop()

        patch.setattr(Reading, name, stepping)


async def _nowhere(*_: Any) -> None:
    await asyncio.Event().wait()
