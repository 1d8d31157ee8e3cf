"""One hot SKU, five ways, in one run: what users have today, and ours.

row_lock     SELECT … FOR UPDATE, UPDATE, change log, commit: SQLAlchemy and asyncpg, pool of 64
redis_lock   redis-py's Lock around GET and SET
lua_call     one EVALSHA per operation (check and decrement; no operation id, no journal)
accepted     ours at durability "redis", published to RabbitMQ too; the worker is stopped meanwhile and applies it afterwards
durable      the same with the worker in a second process, counted until everything is in PostgreSQL
queue        ours at durability "queue": answered once RabbitMQ has confirmed, the worker applying meanwhile
single       one caller: ours on Redis alone (queue=None) and with RabbitMQ, beside one plain Lua call
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from benchmarks.load import WARM_UP, finish, put, report
from benchmarks.options import Options, parse
from benchmarks.rivals import LuaCall, RedisLock, Rival, in_redis, row_lock
from benchmarks.stand import Stand, alone, stand

Figures = dict[str, Any]


async def rival(name: str, one: Rival, options: Options, result: Figures, wrong: list[str]) -> None:
    """Every concurrency of one variant."""
    for callers in options.callers:
        await put(one.call, callers, WARM_UP)
        load = await put(one.call, callers, options.seconds)
        report(f"{name}, {callers} callers", load)
        result.setdefault(name, {})[str(callers)] = load.figures()
    wrong += await one.check()


async def ours(here: Stand, options: Options, result: Figures) -> None:
    """What is accepted, and what is durable: at ``redis`` and ``queue`` until the callers are answered, and until PostgreSQL has it."""
    call = here.selling("redis")
    for callers in options.callers:
        await put(call, callers, WARM_UP)
        load = await here.accepted(call, callers, options.seconds)
        report(f"accepted, {callers} callers", load)
        result.setdefault("accepted", {})[str(callers)] = load.figures()
    for name, durability in (("durable", "redis"), ("queue", "queue")):
        call = here.selling(durability)
        for callers in options.callers:
            await put(call, callers, WARM_UP)
            durable = await here.durable(call, callers, options.seconds)
            note = f"in PostgreSQL {durable.tps:,.0f}/s"
            report(f"{name}, {callers} callers", durable.load, note)
            if name == "queue":
                result.setdefault(name, {})[str(callers)] = durable.load.figures()
            result.setdefault("durable" if name == "durable" else "queue_durable", {})[str(callers)] = {
                **durable.load.figures(),
                "tps": round(durable.tps),
                "operations": durable.load.operations,
                "settled_s": round(durable.settled, 3),
            }


async def single(here: Stand, lua: Rival, options: Options, result: Figures) -> None:
    """One caller, ours and one plain Lua call in turn, so that a busy moment of the machine hits both."""
    turns = 5
    async with alone(options) as lone:
        await _in_turn(
            turns, {"lua_call": lua.call, "ours": lone.selling("redis")}, lambda: asyncio.sleep(0), options, result, "ratio_single"
        )
    calls = {"lua_call": lua.call, "ours_and_rabbitmq": here.selling("redis")}
    await _in_turn(turns, calls, here.settle, options, result, "ratio_single_with_queue")


async def _in_turn(
    turns: int, calls: dict[str, Any], between: Callable[[], Awaitable[None]], options: Options, result: Figures, ratio: str
) -> None:
    await between()
    for call in calls.values():
        await put(call, 1, WARM_UP / 2)
    loads: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            loads[name].append(await put(call, 1, options.seconds / turns / 2))
            await between()
    # The middle one of the turns by its p50.
    middle = {name: sorted(turn, key=lambda load: load.p50)[turns // 2] for name, turn in loads.items()}
    for name, load in middle.items():
        report(f"{name}, 1 caller", load)
    result.setdefault("single", {}).update({name: load.figures() for name, load in middle.items()})
    theirs, ours = (middle[name].p50 for name in calls)
    result[ratio] = round(ours / theirs, 2)


async def main(options: Options) -> None:
    """All of it; the last line is the JSON object."""
    result: Figures = {"benchmark": "hot_sku", "seconds": options.seconds}
    wrong: list[str] = []
    async with row_lock(options.database, options.name) as rows:
        await rival("row_lock", rows, options, result, wrong)
    async with in_redis(options.redis, options.name, RedisLock) as lock:
        await rival("redis_lock", lock, options, result, wrong)
    async with in_redis(options.redis, options.name, LuaCall) as lua:
        await rival("lua_call", lua, options, result, wrong)
        async with stand(options) as (here, _):
            await single(here, lua, options, result)
            await ours(here, options, result)
            print(f"checking the books over {here.sold:,} operations …", flush=True)
            wrong += await here.check()
    most = str(max(options.callers))
    theirs = result["row_lock"][most]
    result["ratio_accepted"] = round(result["accepted"][most]["tps"] / theirs["tps"], 1)
    result["ratio_durable"] = round(result["durable"][most]["tps"] / theirs["tps"], 1)
    result["ratio_p99"] = round(result["accepted"][most]["p99_ms"] / theirs["p99_ms"], 5)
    finish(result, wrong)


if __name__ == "__main__":
    asyncio.run(main(parse(__doc__)))
