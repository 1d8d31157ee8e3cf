"""Sentinel: the master dies, hangs or is told to step down while callers and a worker sell; then everything is counted."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel

from inventory_sdk.cli.doctor import Deployment, Finding, examine
from inventory_sdk.redis_urls import NewestMaster
from tests.selling_kit import PARTITIONS, Sellers, counted, only_tails_are_missing, shop
from tests.servers_kit import Watched, redis_under_sentinel
from tests.stock_kit import Recorded, until


@pytest.fixture
def watched() -> Iterator[Watched]:
    with redis_under_sentinel() as watched:
        yield watched


def everywhere(sellers: Sellers, epoch: int) -> bool:
    return all(max(sellers.epochs(partition), default=0) >= epoch for partition in range(PARTITIONS))


@pytest.mark.parametrize("how", ["killed", "hanging"])
async def test_a_master_that_is_gone_is_followed_by_its_replica_and_all_is_accounted_for(
    watched: Watched, tmp_path: Path, namespace: str, how: str
) -> None:
    async with shop(watched.url, tmp_path, namespace, Recorded()) as inventory, Sellers(inventory).selling() as sellers:
        await until(lambda: len(sellers.receipts) > 60 and everywhere(sellers, 1), 20)
        if how == "killed":
            watched.primary.kill()
        else:
            watched.primary.signal(signal.SIGSTOP)
        await until(lambda: everywhere(sellers, 2), 40)
        watched.primary.signal(signal.SIGCONT)  # what hung in its sockets finds that its time is over
        before = len(sellers.receipts)
        await until(lambda: len(sellers.receipts) > before + 60, 20)
        sellers.stopping = True
        await asyncio.sleep(0)
        done = dict(sellers.receipts)
        missing = await counted(inventory, done)
        only_tails_are_missing(done, missing)
        assert {done[key].positions[0].epoch for key in missing} <= {1}
        assert inventory._running().engine.wire._guide.route.address("") == ("127.0.0.1", watched.replica.port)  # type: ignore[attr-defined]


async def test_a_ready_client_of_a_sentinel_serves_as_its_url_does(watched: Watched, tmp_path: Path, namespace: str) -> None:
    sentinel = Sentinel([("127.0.0.1", each.port) for each in watched.sentinels])
    given = sentinel.master_for(watched.service)
    async with shop(given, tmp_path, namespace, Recorded()) as inventory, Sellers(inventory).selling() as sellers:
        await until(lambda: everywhere(sellers, 1), 20)
        sellers.stopping = True
    await given.aclose()
    await sentinel.aclose()


async def test_what_was_learnt_of_a_newer_failover_is_not_unlearnt(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = NewestMaster([("h", 1), ("h", 2)], {})
    answers = [{"s": {"ip": "old", "port": 1, "config-epoch": 4}}, {"s": {"ip": "new", "port": 2, "config-epoch": 5}}]

    async def old() -> object:
        return answers[0]

    async def new() -> object:
        return answers[1]

    monkeypatch.setattr(asked.sentinels[0], "sentinel_masters", old)
    monkeypatch.setattr(asked.sentinels[1], "sentinel_masters", new)
    assert await asked.discover_master("s") == ("new", 2)
    monkeypatch.setattr(asked.sentinels[1], "sentinel_masters", old)
    with pytest.raises(MasterNotFoundError, match="configuration 4, 5 was seen"):
        await asked.discover_master("s")
    with pytest.raises(MasterNotFoundError, match="watches 's'"):
        await asked.discover_master("another")
    await asked.aclose()


async def test_doctor_counts_sentinels_and_names_a_dead_one_and_a_missing_fence(watched: Watched, tmp_path: Path, namespace: str) -> None:
    async def found() -> dict[str, Finding]:
        deployment = Deployment(watched.url, None, f"sqlite+aiosqlite:///{tmp_path}/stock.db", namespace, 1, None)
        return {finding.subject: finding async for finding in examine(deployment)}

    well = await found()
    assert well["sentinel"].state.startswith("3 of 3 answer, 3 know each other, quorum 2, 1 replicas")
    assert well["sentinel"].advice == ""
    assert well["sentinel fence"].advice.startswith("set it to 1")
    watched.sentinels[0].kill()
    assert "1 of those in the URL do not answer" in (await found())["sentinel"].advice
