"""Real processes and servers, killed, hung, cut off and set back while callers sell. Every test ends with a count to the unit
(``auditor``): nothing oversold, nothing doubled, nothing that was acknowledged is missing unless its level allows that and the
ledger names it. The seed is printed; INVENTORY_TEST_FAULT_SEED replays its schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import breaking
from tests.faults.stand import stand
from tests.servers_kit import PostgresServer, RedisServer, redis_with_replica

pytestmark = [pytest.mark.faults, pytest.mark.amqp]

LOSSY = {"acts": {"deduct": 5, "reserve": 3, "restock": 0.5}, "skus": {"ample": 3, "wide": 2}}
"""Where Redis loses what it had: enough stock for all, so that units given back by an entry that was lost aren't missing later."""


async def test_workers_that_are_killed_lose_and_double_nothing(
    redis: RedisServer, postgres: PostgresServer, amqp_url: str, folder: Path, namespace: str
) -> None:
    async with stand(redis.url, amqp_url, postgres.url, folder, namespace) as here:
        await here.open()
        await here.attack({"kill_worker": breaking.kill_worker})
        await here.settled()


async def test_callers_that_are_killed_in_the_middle_of_a_call_leave_all_of_it_or_nothing(
    redis: RedisServer, postgres: PostgresServer, amqp_url: str, folder: Path, namespace: str
) -> None:
    async with stand(redis.url, amqp_url, postgres.url, folder, namespace) as here:
        await here.open()
        await here.attack({"kill_caller": breaking.kill_caller})
        await here.settled()


async def test_without_rabbitmq_killed_workers_and_callers_lose_nothing_that_redis_keeps(
    redis: RedisServer, postgres: PostgresServer, folder: Path, namespace: str
) -> None:
    async with stand(redis.url, None, postgres.url, folder, namespace, levels=("redis", "database")) as here:
        await here.open()
        await here.attack({"kill_worker": breaking.kill_worker, "kill_caller": breaking.kill_caller})
        await here.settled()


async def test_rabbitmq_that_breaks_hangs_and_swallows_confirms_costs_time_and_no_units(
    redis: RedisServer, postgres: PostgresServer, amqp_url: str, folder: Path, namespace: str
) -> None:
    async with stand(redis.url, amqp_url, postgres.url, folder, namespace) as here:
        await here.open()
        faults = {"cut": breaking.cut_queue, "mute": breaking.mute_queue, "hold": breaking.hold_queue, "refuse": breaking.refuse_queue}
        await here.attack(faults)
        await here.settled()


async def test_postgresql_that_restarts_crashes_and_loses_replies_of_commits_has_everything_once(
    redis: RedisServer, postgres: PostgresServer, amqp_url: str, folder: Path, namespace: str
) -> None:
    async with stand(redis.url, amqp_url, postgres.url, folder, namespace) as here:
        await here.open()
        restart = breaking.restart_postgres(postgres)
        await here.attack({"restart": restart, "cut": breaking.cut_database, "mute": breaking.mute_database})
        await here.settled()


async def test_processes_and_redis_that_hang_and_go_on_do_nothing_twice_and_nothing_late(
    redis: RedisServer, postgres: PostgresServer, amqp_url: str, folder: Path, namespace: str
) -> None:
    async with stand(redis.url, amqp_url, postgres.url, folder, namespace) as here:
        await here.open()
        faults = {
            "pause_process": breaking.pause_process,
            "pause_redis": breaking.pause_redis(redis),
            "cut_redis": breaking.cut_redis,
            "mute_redis": breaking.mute_redis,
        }
        await here.attack(faults)
        await here.settled()


async def test_scripts_that_were_stuck_in_dead_connections_take_nothing_that_their_callers_were_refused(
    redis: RedisServer, postgres: PostgresServer, amqp_url: str, folder: Path, namespace: str
) -> None:
    acts = {"deduct": 6, "reserve": 3, "restock": 2}
    # So little stock that calls are refused all the time, and units that come back which a late script could take.
    async with stand(redis.url, amqp_url, postgres.url, folder, namespace, acts=acts, skus={"scarce": 2}, scarce=10) as here:
        await here.open(sellers=12)
        await here.attack({"strand_redis": breaking.strand_redis}, gap=1000.0)
        await here.settled()


async def test_redis_that_crashes_and_comes_back_from_its_file_has_lost_nothing(
    redis: RedisServer, postgres: PostgresServer, amqp_url: str, folder: Path, namespace: str
) -> None:
    async with stand(redis.url, amqp_url, postgres.url, folder, namespace) as here:
        await here.open()
        await here.attack({"crash": breaking.crash_redis(redis)}, gap=2.0)
        await here.settled()


async def test_redis_that_is_flushed_loses_only_what_its_level_allows_and_names_it(
    redis: RedisServer, postgres: PostgresServer, amqp_url: str, folder: Path, namespace: str
) -> None:
    async with stand(redis.url, amqp_url, postgres.url, folder, namespace, **LOSSY) as here:
        await here.open()
        await here.attack({"flush": breaking.flush_redis(redis)}, gap=2.0)
        await here.settled(loses=("redis",))


async def test_a_promoted_replica_that_was_behind_loses_only_what_its_level_allows_and_names_it(
    postgres: PostgresServer, amqp_url: str, folder: Path, namespace: str
) -> None:
    with redis_with_replica() as (primary, replica):
        async with stand(primary.url, amqp_url, postgres.url, folder, namespace, **LOSSY) as here:
            await here.open()
            await here.attack({"fail_over": breaking.fail_over(primary, replica)}, gap=1000.0)
            await here.settled(loses=("redis",))


async def test_everything_at_once_is_still_exact(
    redis: RedisServer, postgres: PostgresServer, amqp_url: str, folder: Path, namespace: str
) -> None:
    async with stand(redis.url, amqp_url, postgres.url, folder, namespace, **LOSSY) as here:
        await here.open()
        faults = {
            "kill_worker": breaking.kill_worker,
            "kill_caller": breaking.kill_caller,
            "pause_process": breaking.pause_process,
            "cut_queue": breaking.cut_queue,
            "mute_queue": breaking.mute_queue,
            "refuse_queue": breaking.refuse_queue,
            "restart_postgres": breaking.restart_postgres(postgres),
            "mute_database": breaking.mute_database,
            "crash_redis": breaking.crash_redis(redis),
            "mute_redis": breaking.mute_redis,
            "flush_redis": breaking.flush_redis(redis),
        }
        await here.attack(faults)
        await here.settled(loses=("redis",))
