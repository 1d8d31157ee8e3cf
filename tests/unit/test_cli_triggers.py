"""``inventory-sdk triggers``: what each place that causes a recalculation did."""

from __future__ import annotations

from typing import Any

import pytest
from fakeredis import FakeAsyncRedis

from inventory_sdk.cli.triggers import listed
from tests.redistribution_kit import inventory_of
from tests.stock_kit import until


async def test_triggers_are_listed_the_dearest_first_and_nothing_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    redis = FakeAsyncRedis()
    runs: list[str] = []

    def shop() -> tuple[Any, Any]:
        inventory = inventory_of(redis, database="sqlite+aiosqlite://")

        @inventory.coalesce(key="shop", debounce=0, name="shops")
        async def recalculate(shop: str) -> None:
            runs.append(shop)
            for _ in range(100_000):
                pass

        @inventory.trigger("paid", runs=recalculate)
        async def paid(shop: str) -> None: ...

        @inventory.trigger("never", runs=recalculate)
        async def never(shop: str) -> None: ...

        return inventory, paid

    inventory, paid = shop()
    async with inventory:
        await paid("a")
        while not any(each.runs for each in await inventory.redistribution.counted()):
            await until(lambda: runs)
    other, paid = shop()
    other.redistribution.runs_here = False
    async with other:
        await paid("b")
    assert await listed(shop()[0])
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["trigger", "calls", "runs", "CPU", "s", "CPU"]
    assert first.split()[:3] == ["paid", "2", "1"]
    assert "100.0" in first
    assert first.split()[-1].endswith("paid")
    assert second.split()[:5] == ["never", "0", "0", "0.00", "0.0"]
    assert runs == ["a"]


async def test_without_a_coalesced_function_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert await listed(inventory_of())
    assert "no function is coalesced" in capsys.readouterr().out


async def test_a_redis_that_does_not_answer_is_a_failure(unused_tcp_port: int, capsys: pytest.CaptureFixture[str]) -> None:
    inventory = inventory_of(f"redis://127.0.0.1:{unused_tcp_port}/0", database="sqlite+aiosqlite://")

    @inventory.coalesce(key="shop")
    async def recalculate(shop: str) -> None: ...

    assert not await listed(inventory)
    assert "FAILED" in capsys.readouterr().out
