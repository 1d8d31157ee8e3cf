"""The drill on real servers: every promise holds, it says so, it leaves nothing behind, and it can say otherwise."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from redis.asyncio import Redis
from sqlalchemy import inspect, text
from sqlalchemy.ext.asyncio import create_async_engine
from typer.testing import CliRunner

from inventory_sdk import Inventory, Line
from inventory_sdk.cli.app import app
from inventory_sdk.errors import DurabilityNotReached
from inventory_sdk.testing import drill, faults


async def left_behind(redis_url: str, database: str) -> list[str]:
    client = Redis.from_url(redis_url)
    keys = [key.decode() async for key in client.scan_iter(match="*drill*", count=1000)]
    await client.aclose()
    engine = create_async_engine(database)
    async with engine.connect() as connection:
        names = await connection.run_sync(lambda plain: inspect(plain).get_table_names())
    await engine.dispose()
    return keys + [name for name in names if name.startswith("drill")]


@pytest.mark.redis
@pytest.mark.amqp
@pytest.mark.postgresql
def test_every_promise_holds_on_the_real_servers_and_nothing_is_left(redis_url: str, amqp_url: str, postgresql_url: str) -> None:
    command = ["doctor", "--drill", "--redis", redis_url, "--queue", amqp_url, "--database", postgresql_url]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert [line.split(":")[0] for line in result.output.splitlines() if line.startswith("HELD")] == [
        f"HELD    {subject}" for subject, _ in drill.DRILLS
    ]
    assert result.output.endswith("every promise held, to the unit\n")
    assert asyncio.run(left_behind(redis_url, postgresql_url)) == []


@pytest.mark.redis
def test_without_a_queue_the_drill_passes_it_by(redis_url: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--drill", "--redis", redis_url, "--database", f"sqlite+aiosqlite:///{tmp_path}/l.db"])
    assert result.exit_code == 0, result.output
    assert "HELD    queue away: no queue is configured" in result.output


@pytest.mark.redis
async def test_a_sale_that_the_ledger_does_not_have_is_a_broken_promise(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forgetful(stand: drill.Stand) -> str:
        await stand.sell(3)
        await stand.inventory.settled()
        async with stand.inventory.ledger.engine.begin() as connection:  # type: ignore[attr-defined]
            table = stand.inventory.ledger.tables.operation.name  # type: ignore[attr-defined]
            await connection.execute(text(f"UPDATE {table} SET claim = NULL WHERE kind = 'deduct'"))
        return "the ledger forgot"

    monkeypatch.setattr(drill, "DRILLS", (("amnesia", forgetful), ("never reached", forgetful)))
    findings = [finding async for finding in drill.run(redis_url, None, f"sqlite+aiosqlite:///{tmp_path}/l.db")]
    assert len(findings) == 1
    assert "3 acknowledged sales are not in the ledger" in findings[0].wrong


@pytest.mark.redis
@pytest.mark.amqp
@pytest.mark.postgresql
async def test_without_its_queue_a_sale_stands_and_says_that_it_is_not_confirmed(
    swept: str, redis_url: str, amqp_url: str, postgresql_url: str
) -> None:
    inventory = Inventory(redis_url, queue=amqp_url, database=postgresql_url, namespace=swept, table_prefix=f"{swept}_", metrics=[])
    async with inventory:
        await inventory.create_schema()
        await inventory.stock.restock([Line("a", 10)], operation_id="first")
        with faults.queue_away(inventory) as fault, pytest.raises(DurabilityNotReached):
            await inventory.stock.deduct([Line("a", 1)], operation_id="o1")
        assert fault.met
        assert (await inventory.stock.deduct([Line("a", 1)], operation_id="o1")).replayed
