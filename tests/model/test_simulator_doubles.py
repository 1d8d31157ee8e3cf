"""The simulator's doubles against the real ones: what was said and done in random seeds is said and done once more, on a real Redis
and on SQLite."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.model import Position
from tests.model.simulator.ledger import Database
from tests.model.simulator.redis import ScriptCall, runtime
from tests.model.simulator.run import Run, plan_of, play
from tests.stock_kit import plain_client

SEEDS = (*range(9000, 9004), 9048, 9078, 9114, 9143)
"""The last ones repeat ids that Redis has forgotten, or fork: their ledgers refuse."""


@pytest.fixture(scope="module")
def played() -> list[Run]:
    """Some seeds' worlds after their end, with all that their scripts were told."""
    runs = []
    for seed in SEEDS:
        run = Run(plan_of(seed), tracing=False)
        run.world.scripts = []
        assert play(run) is None
        runs.append(run)
    return runs


def _steady(text: bytes) -> bytes:
    """The script with the simulation's clock and server, which come as its last argument."""
    steady = re.sub(rb"(redis\.)?call\('TIME'\)", rb"cjson.decode(ARGV[#ARGV])", text)
    steady = steady.replace(b"redis.pcall('INFO', 'memory')", b"''").replace(b"unpack(ARGV, 8)", b"unpack(ARGV, 8, #ARGV - 1)")
    return steady.replace(b"redis.pcall('INFO', 'server')", b"('run_id:' .. cjson.decode(ARGV[#ARGV])[3])")


async def _say(client: Redis, call: ScriptCall, namespace: str) -> Any:
    keys = [key.replace(b"{sim:", b"{" + namespace.encode() + b":") for key in call.keys]
    clock = f'["{call.now_ms // 1000}","{call.now_ms % 1000 * 1000}","{call.run_id}"]'
    try:
        return await client.eval(_steady(call.text).decode(), len(keys), *keys, *call.arguments, clock)  # type: ignore[misc]
    except ResponseError as error:
        return error


@pytest.mark.redis
async def test_the_small_redis_answers_as_a_real_one(played: list[Run], redis_url: str, namespace: str) -> None:
    client = plain_client(redis_url)
    compared = 0
    try:
        for number, run in enumerate(played):
            calls = run.world.scripts or []
            # One server's life: what a failover does to a state, no real Redis can be told.
            first = [call for call in calls if call.life == "run0001.0"]
            place = f"{namespace}{number}"
            for call in first:
                answer = await _say(client, call, place)
                if isinstance(call.answer, Exception):
                    assert isinstance(answer, Exception), (call, answer)
                    continue
                assert answer == call.answer, f"seed {run.plan.seed}: {call.arguments}"
                compared += 1
            if all(call.life == "run0001.0" for call in calls) and "redis_flushed" not in run.world.injected:
                await _same_keys(client, run, place)
    finally:
        async for key in client.scan_iter(match=f"{{{namespace}*"):
            await client.delete(key)
        await client.aclose()
    assert compared > 1000


async def _same_keys(client: Any, run: Run, place: str) -> None:
    state, call = run.world.redis.state, runtime().out[b"command"]

    def asked(*words: str) -> Any:
        return runtime().plain(call(state, 0, 0, b"", False, *[word.encode() for word in words])[1])

    for partition in range(run.plan.partitions):
        for name in ("available", "reserved", "results:0", "results:1", "reservations", "givers"):
            flat = asked("HGETALL", f"{{sim:{partition}}}:{name}")
            assert dict(zip(flat[::2], flat[1::2], strict=True)) == await client.hgetall(f"{{{place}:{partition}}}:{name}")
        journal = [
            (key, dict(zip(flat[::2], flat[1::2], strict=True))) for key, flat in asked("XRANGE", f"{{sim:{partition}}}:journal", "-", "+")
        ]
        assert journal == await client.xrange(f"{{{place}:{partition}}}:journal")


def test_the_ledger_in_memory_decides_as_the_one_in_sql(played: list[Run], tmp_path: Path) -> None:
    asyncio.run(_same_ledgers(played, tmp_path))


async def _same_ledgers(played: list[Run], tmp_path: Path) -> None:
    refusals = 0
    for run in played:
        database = run.world.database
        ledger = SqlLedger(f"sqlite+aiosqlite:///{tmp_path}/{run.plan.seed}.db")
        await ledger.start()
        await ledger.create_schema()
        try:
            for method, arguments, wanted in database.log:
                if method == "open":
                    async with ledger.rebuilding(*arguments) as rebuilding:
                        await rebuilding.extend(wanted)
                        await rebuilding.open()
                    continue
                found = await getattr(ledger, method)(*arguments)
                if wanted is not None:
                    assert found == wanted, f"seed {run.plan.seed}: {method}{arguments}"
                    refusals += len(getattr(found, "refusals", ()))
            await _same_rows(ledger, database)
            assert await ledger.verify() == []
        finally:
            await ledger.close()
    assert refusals > 0, "no seed refused anything: choose others"


async def _same_rows(ledger: SqlLedger, database: Database) -> None:
    tables = database.tables
    assert {(row.merchant, row.sku): _numbers(row) for row in await ledger.all_stock()} == {
        (row.merchant, row.sku): row.after() for row in tables.stock.values()
    }
    for place in {place[:3] for place in tables.operations}:
        found = [(row.index, row.key, row.kind, row.lines, row.status, row.kept) for row in await ledger.operations_at([Position(*place)])]
        wanted = [
            (p[3], f"{row[4]}\x1f{row[5]}", row[7], row[13], row[14]) for p, row in sorted(tables.operations.items()) if p[:3] == place
        ]
        assert [(index, key, kind, status, kept) for index, key, kind, _, status, kept in found] == wanted
    for key, hold in tables.holds.items():
        row = await ledger.reservation(key)
        assert row is not None
        flat = tuple(value for name in sorted(hold.lines) for value in (name, *hold.lines[name]))
        assert (row.state, row.lines, row.expires_at, row.pinned) == (hold.state, flat, hold.expires_at, hold.pinned)
    for partition, epochs in tables.epochs.items():
        assert [(row.epoch, row.state, row.applied) for row in await ledger.epochs(partition)] == [
            (epoch, *epochs[epoch]) for epoch in sorted(epochs) if epoch and epochs[epoch][0] != "closed"
        ]
        newest = max(epochs)
        assert len(await ledger.pending_voids(partition, newest)) == sum(
            void[5] == "pending" for place, void in tables.voids.items() if place[:2] == (partition, newest)
        )


def _numbers(row: Any) -> tuple[int, ...]:
    return (row.available, row.reserved, row.sold, row.supplied, row.written_off, row.version)
