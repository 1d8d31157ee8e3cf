"""Calculations in processes: their results and errors come back, one that never ends is killed, and none is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from inventory_sdk import Inventory, RecalculationCutOff, RecalculationFailed, RedistributionPolicy
from tests import redistribution_kit as kit
from tests.redistribution_kit import UNSLOWED


@pytest.fixture
async def far() -> AsyncIterator[Inventory]:
    async with kit.far.replaced() as inventory:
        yield inventory


def children(inventory: Inventory) -> list[Any]:
    return inventory.redistribution._now()._runner._pool._idle


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "zombie" not in Path(f"/proc/{pid}/status").read_text()


async def test_results_come_back_by_key_from_processes_that_are_kept_and_end_with_us() -> None:
    async with kit.far.replaced() as inventory:
        answers = await asyncio.gather(*(kit.add(f"s{number}", [number, 1]) for number in range(6)))
        assert [answer["sum"] for answer in answers] == [1, 2, 3, 4, 5, 6]
        pids = {answer["pid"] for answer in answers}
        assert os.getpid() not in pids
        assert len(pids) <= UNSLOWED.concurrency(inventory.redistribution.governor.cpus)
        counts = {each.function: each for each in await inventory.redistribution.counted()}
        assert (counts["far-add"].calls, counts["far-add"].runs) == (6, 6)
        assert counts["far-add"].cpu_seconds > 0
    assert not any(alive(pid) for pid in pids)


async def test_a_calculation_is_weaker_than_all_other_sessions_too(far: Inventory) -> None:
    found = await kit.weakness("s")
    assert found["session"] == found["pid"]
    assert found["nice"] == min(19, os.nice(0) + UNSLOWED.nice)
    if kit.autogroup() is not None:
        assert found["group"].split()[-1] == str(found["nice"])


async def test_a_calculation_that_never_ends_is_killed_and_reported(far: Inventory) -> None:
    told: list[Any] = []
    far.on("recalculation_cut_off")(told.append)
    try:
        with pytest.raises(RecalculationCutOff, match=r"not done within 0\.3 s"):
            await kit.forever("s")
        assert children(far) == []
        while not told:
            await asyncio.sleep(0.01)
        assert told[0]["function"] == "far-forever"
        counts = {each.function: each for each in await far.redistribution.counted()}
        assert counts["far-forever"].cpu_seconds > 0
        assert (await kit.add("s", [1]))["sum"] == 1
    finally:
        far._hooks.handlers.clear()


async def test_what_a_process_raises_or_dies_of_reaches_the_caller(far: Inventory) -> None:
    with pytest.raises(RecalculationFailed, match="ValueError: no shop x") as failed:
        await kit.failing("x")
    assert isinstance(failed.value.__cause__, ValueError)
    with pytest.raises(RecalculationFailed, match="Odd can't be pickled"):
        await kit.failing("odd")
    with pytest.raises(RecalculationFailed, match="it ended with exit code 7"):
        await kit.failing("dies")
    with pytest.raises(RecalculationFailed, match="no shop y"):
        await kit.failing("y")


async def test_closing_during_a_run_kills_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []
    real = asyncio.create_subprocess_exec

    async def spying(*arguments: Any, **options: Any) -> Any:
        process = await real(*arguments, **options)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spying)
    async with kit.far.replaced():
        waiting = asyncio.create_task(kit.forever("s"))
        while not pids:
            await asyncio.sleep(0.01)
    waiting.cancel()
    await asyncio.wait({waiting})
    assert not any(alive(pid) for pid in pids)


async def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    program = """
import asyncio, os, sys
from inventory_sdk.redistribute.pool import Child
async def main():
    child = await Child.start(0)
    print(child._process.pid, flush=True)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    import sys

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    pid = int(output)
    async with asyncio.timeout(30):
        while alive(pid):
            await asyncio.sleep(0.01)


async def test_a_key_with_a_budget_rests_and_so_does_the_whole_function() -> None:
    inventory = kit.inventory_of(redistribution=RedistributionPolicy(cpu=1.0, lag=10, cpu_budget=1.0))
    spent = 0.0

    def burn() -> None:
        import time

        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass

    @inventory.coalesce(key="shop", debounce=0, cpu_budget=0.05, name="function")
    async def of_all(shop: str) -> None:
        burn()

    @inventory.coalesce(key="shop", debounce=0, key_cpu_budget=0.001, name="key")
    async def of_one(shop: str) -> None:
        burn()

    async with inventory:
        now = inventory.redistribution._now()
        cpus = inventory.redistribution.governor.cpus
        await of_all("a")
        desk = now.desks["function"]
        assert desk.budget is not None
        assert 0.5 < desk.budget.wait() * 0.05 * cpus / 0.05 < 10
        await of_one("a")
        (first, second), _ = await now.desks["key"].board.request([kit_request("a"), kit_request("b")], 0, 0)
        assert first.version > spent
        assert second.due == 0
        assert first.due is not None
        assert first.due * 0.001 * cpus > 0.01


def kit_request(key: str) -> Any:
    from inventory_sdk.redistribute.board import Request

    return Request(key, f'{{"shop": "{key}"}}', False, {"t": 1}, "t")
