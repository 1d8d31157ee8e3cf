"""Where the time goes: CPU microseconds per operation in each process, and in each phase of the batch script.

CPU time is steadier than throughput on a busy machine; the sum over all processes divided by the number of cores bounds the
durable rate. Servers are seen through /proc, so they must run on this machine to be counted. Measures the first of ``--callers``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from statistics import median
from typing import Any, Final

from redis.asyncio import Redis

from benchmarks.cpu import Spent
from benchmarks.load import WARM_UP, finish, put, report
from benchmarks.options import Options, parse
from benchmarks.stand import MERCHANT, Stand, stand
from inventory_sdk.model import fingerprint, key_of
from inventory_sdk.stock.batch import new_nonce
from inventory_sdk.stock.partition import KEY_NAMES
from inventory_sdk.stock.wire import script

MARKS: Final = (
    ("checks", "-- The partition: open"),
    ("parse the batch", "local ops = cjson.decode"),
    ("bulk reads", "-- Bulk reads"),
    ("decisions", "-- What the decisions will write"),
    ("journal and writes", "-- Bulk writes"),
)
"""Lines of batch.lua at which a phase begins."""
BATCH: Final = 256
ROUNDS: Final = 300


async def phases(url: str, name: str) -> dict[str, float] | None:
    """Microseconds per operation of each phase, on full batches of deducts; None where batch.lua has other landmarks.

    The script is timed from within, on keys of its own; the middle round counts, since Redis may be put aside by the machine."""
    text = script("batch").text
    cuts = [text.find(f"\n{mark}") for _, mark in MARKS]
    if -1 in cuts or cuts != sorted(cuts):
        return None
    timed, at = "local clocks = {}\n", 0
    for cut in cuts:
        timed += text[at:cut] + "\nclocks[#clocks + 1] = redis.call('TIME')\n"
        at = cut
    head, found, tail = text[at:].rpartition("\nreturn ")
    if not found:
        return None
    timed += f"{head}\nclocks[#clocks + 1] = redis.call('TIME')\nlocal spent = {{}}\n"
    timed += "for i = 2, #clocks do local a, b = clocks[i - 1], clocks[i] spent[i - 1] = (b[1] - a[1]) * 1e6 + b[2] - a[2] end\n"
    timed += "local reply = " + tail.rstrip() + "\nreply[#reply + 1] = spent\nreturn reply\n"
    keys = [f"{{{name}phases:0}}:{key}" for key in KEY_NAMES]
    client: Any = Redis.from_url(url, protocol=2)
    rounds: list[list[int]] = []
    try:
        run_id = (await client.info("server"))["run_id"]
        meta = {"epoch": "1", "seq": "0", "state": "open", "run_id": run_id, "window": "0"}
        await client.hset(keys[0], mapping=meta)
        field = key_of(MERCHANT, "hot")
        await client.hset(keys[1], field, 10**9)
        lines = [field, 1]
        mark = fingerprint("deduct", "", lines)
        call = client.register_script(timed)
        for round_ in range(ROUNDS + 20):
            ops = [["deduct", key_of(MERCHANT, f"o-{round_}-{n}"), mark, lines, "", "", 0, "", "", ""] for n in range(BATCH)]
            now = int(time.time() * 1000) + 60_000
            reply = await call(keys, ["1", run_id, str(now), new_nonce(), "0", "1", json.dumps(ops, separators=(",", ":"))])
            if reply[0] != b"ok":
                raise RuntimeError(f"the timed script answered {reply[0]!r}")
            if round_ >= 20:
                rounds.append(reply[-1])
    finally:
        await client.unlink(*keys)
        await client.aclose()
    return {what: round(median(spent) / BATCH, 2) for (what, _), spent in zip(MARKS, zip(*rounds, strict=True), strict=True)}


async def stage(here: Stand, durability: str, callers: int, seconds: float) -> dict[str, Any]:
    """CPU microseconds per operation by process, from the first call until PostgreSQL has everything."""
    call = here.selling(durability)
    await put(call, callers, WARM_UP)
    await here.settle()
    spent = Spent({os.getpid(): "client", here.worker_pid: "worker"})
    durable = await here.durable(call, callers, seconds)
    by_part = spent.seconds()
    micros = {part: round(seconds / durable.load.operations * 1e6, 2) for part, seconds in by_part.items()}
    ours = sum(value for part, value in micros.items() if part != "other")
    cores = os.cpu_count() or 1
    report(f"{durability}, {callers} callers", durable.load, f"in PostgreSQL {durable.tps:,.0f}/s")
    for part, value in micros.items():
        print(f"    {part:<12} {value:>8.2f} µs/operation")
    print(f"    {'sum':<12} {ours:>8.2f} µs/operation, so at most {cores / ours * 1e6:,.0f}/s on {cores} cores")
    return {
        **durable.load.figures(),
        "durable_tps": round(durable.tps),
        "cpu_us_per_operation": micros,
        "sum_us": round(ours, 2),
        "bound_tps": round(cores / ours * 1e6),
    }


async def main(options: Options) -> None:
    """Phases of the script, then whole loads."""
    result: dict[str, Any] = {"benchmark": "stages", "seconds": options.seconds}
    wrong: list[str] = []
    result["script_us_per_operation"] = await phases(options.redis, options.name)
    for what, micros in (result["script_us_per_operation"] or {}).items():
        print(f"script, {what:<20} {micros:>8.2f} µs/operation")
    callers = options.callers[0]
    async with stand(options) as (here, _):
        for durability in ("redis", "queue"):
            result[durability] = await stage(here, durability, callers, options.seconds)
        wrong += await here.check()
    finish(result, wrong)


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("stages reads /proc: it needs Linux")
    asyncio.run(main(parse(__doc__, callers="256")))
