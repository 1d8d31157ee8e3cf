"""Rules in Redis: one document per link, replaced by compare-and-set, said in a history, pushed, and never made older."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gray_kit import Places, Record, forget, links, until, watch_of

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.gray import snapshot
from inventory_sdk.gray.links import change
from inventory_sdk.gray.rules import Rules
from inventory_sdk.gray.store import RulesChanged, RulesUnavailable
from inventory_sdk.metrics import GrayRulesRead

WHO: dict[str, Any] = {"who": "eva", "why": "first merchants"}


@pytest.fixture(params=["fakeredis", pytest.param("redis", marks=pytest.mark.redis)])
async def places(request: pytest.FixtureRequest, redis_url: str, namespace: str) -> AsyncIterator[Places]:
    made = Places(redis_url if request.param == "redis" else None)
    yield made
    await forget(made, namespace)


async def test_a_change_is_a_new_version_and_stands_in_the_history(places: Places, namespace: str) -> None:
    async with links(places, namespace) as here:
        assert await here.show("checkout") == Rules("checkout")
        first = await here.set("checkout", percentage=1, allow=["m1"], **WHO)
        second = await here.set("checkout", percentage=2.5, who="max", why="looks good")
        assert (first.version, second.version, second.allow) == (1, 2, ("m1",))
        assert await here.show("checkout") == second
        newest, oldest = await here.history("checkout")
        assert (newest.version, newest.who, newest.why, newest.changes) == (2, "max", "looks good", {"percentage": [1.0, 2.5]})
        assert (oldest.version, oldest.who, oldest.changes["allow"]) == (1, "eva", [[], ["m1"]])
        assert newest.at_ms >= oldest.at_ms > 1_600_000_000_000
        assert [each.version for each in await here.history("checkout", limit=1)] == [2]
        assert here.links() == ["checkout"]


async def test_a_change_of_rules_that_somebody_else_has_changed_is_refused(places: Places, namespace: str) -> None:
    async with links(places, namespace) as here:
        await here.set("checkout", percentage=1, **WHO)
        await here.set("checkout", percentage=2, version=1, **WHO)
        with pytest.raises(RulesChanged) as caught:
            await here.set("checkout", percentage=3, version=1, **WHO)
        assert caught.value.rules.percentage == 2
        assert (await here.show("checkout")).version == 2


async def test_changes_at_the_same_moment_are_all_made(places: Places, namespace: str) -> None:
    async with links(places, namespace) as one, links(places, namespace) as two:
        fields: list[dict[str, Any]] = [{"percentage": 5}, {"allow": ["m1"]}, {"deny": ["m2"]}, {"where": {"region": ["eu"]}}]
        await asyncio.gather(*(here.set("checkout", **each, **WHO) for here, each in zip((one, two, one, two), fields, strict=True)))
        rules = await one.show("checkout")
        assert (rules.version, rules.percentage, rules.allow, rules.deny, rules.where) == (4, 5, ("m1",), ("m2",), {"region": ("eu",)})


async def test_what_cannot_be_changes_nothing(places: Places, namespace: str) -> None:
    async with links(places, namespace) as here:
        await here.set("checkout", percentage=1, **WHO)
        for bad in ({"percentage": 101}, {"colour": "red"}):
            with pytest.raises(InvalidOperation):
                await here.set("checkout", **bad, **WHO)
        with pytest.raises(InvalidOperation, match="why"):
            await here.kill("checkout", who="eva", why="")
        assert len(await here.history("checkout")) == 1


async def test_a_change_is_pushed_to_other_processes(places: Places, namespace: str) -> None:
    async with links(places, namespace) as one, links(places, namespace) as two:
        for watch in (watch_of(one), watch_of(two)):
            while (await watch.ground.client.pubsub_numsub(watch.store.channel))[0][1] < 2:
                await asyncio.sleep(0.005)
            watch._tasks[1].cancel()  # the poll: it would find the change as well, only later
        await one.set("checkout", percentage=100, **WHO)
        await until(lambda: two.decide("checkout", "m1").variant == "candidate")
        await two.kill("checkout", who="max", why="errors")
        await until(lambda: one.decide("checkout", "m1").reason == "killed")
        await one.restore("checkout", who="max", why="fixed")
        await until(lambda: two.decide("checkout", "m1").reason == "percentage")


async def test_a_process_that_starts_later_knows_the_rules_at_once(places: Places, namespace: str) -> None:
    async with links(places, namespace) as one:
        await one.set("checkout", percentage=100, **WHO)
    async with links(places, namespace) as two:
        assert two.decide("checkout", "m1").reason == "percentage"


async def test_older_rules_that_arrive_late_change_nothing(places: Places, namespace: str) -> None:
    async with links(places, namespace) as here:
        old = await here.set("checkout", percentage=100, **WHO)
        killed = await here.kill("checkout", **WHO)
        newer = replace(killed, version=9, percentage=3.0)
        watch = watch_of(here)
        for pushed in (old, newer, killed, old):
            await watch._pushed(pushed.text().encode())
        assert here.known("checkout") == newer
        await watch.load()  # Redis is behind now: it does not win, it is told
        assert here.known("checkout") == newer
        assert await here.show("checkout") == newer


async def test_rules_that_redis_forgot_are_given_back(places: Places, namespace: str) -> None:
    metrics = Record()
    async with links(places, namespace, metrics) as here:
        killed = await here.set("checkout", percentage=10, killed=True, **WHO)
        await forget(places, namespace)
        await watch_of(here).load()
        assert await here.show("checkout") == killed
        assert "lost" in (await here.history("checkout"))[0].why
        assert metrics.named("gray_brought_back")


async def test_after_redis_went_back_in_time_a_change_is_above_all_that_was_known(places: Places, namespace: str) -> None:
    async with links(places, namespace) as here, links(places, namespace) as other:
        for percentage in (1, 2, 3):
            await here.set("checkout", percentage=percentage, **WHO)
        await until(lambda: other.known("checkout").version == 3)
        await forget(places, namespace)
        killed = await here.kill("checkout", **WHO)
        assert (killed.version, killed.percentage) == (4, 3)
        await until(lambda: other.decide("checkout", "m1").reason == "killed")


async def test_two_documents_of_one_version_end_in_the_one_that_redis_has(places: Places, namespace: str) -> None:
    async with links(places, namespace) as here:
        lost = await here.set("checkout", percentage=1, **WHO)
        kept = replace(lost, percentage=7.0)
        await watch_of(here)._pushed(kept.text().encode())
        assert here.known("checkout") == lost
        client = places.client()
        await client.hset(watch_of(here).store._key("rules"), "checkout", kept.text())
        await client.aclose()
        await client.connection_pool.disconnect()
        await watch_of(here).load()
        assert here.known("checkout") == kept


@pytest.mark.parametrize("bad", [b"{", b'{"format": 3}', b'{"format":1,"link":"other","version":9}'])
async def test_a_bad_document_never_takes_effect(places: Places, namespace: str, bad: bytes) -> None:
    metrics = Record()
    async with links(places, namespace, metrics) as here:
        rules = await here.set("checkout", percentage=1, **WHO)
        client = places.client()
        await client.hset(watch_of(here).store._key("rules"), "checkout", bad)
        await watch_of(here)._pushed(b"{nonsense")
        await watch_of(here).load()
        assert here.known("checkout") == rules
        assert here.links() == ["checkout"]
        assert len(metrics.named("gray_unreadable")) >= 2
        assert await client.hget(watch_of(here).store._key("rules"), "checkout") == bad
        await client.aclose()
        await client.connection_pool.disconnect()


async def test_nothing_known_is_stable(places: Places, namespace: str) -> None:
    async with links(places, namespace) as here:
        assert here.decide("checkout", "m1") == ("stable", 0, "unknown")
        assert here.decide("checkout") == ("stable", 0, "no_merchant")


async def test_whom_the_percentage_reached_stays_when_it_is_lowered(places: Places, namespace: str) -> None:
    async with links(places, namespace) as one, links(places, namespace) as two:
        await one.set("checkout", percentage=50, keep_exposed=True, **WHO)
        await until(lambda: two.known("checkout").version == 1)
        exposed = {f"m{number}" for number in range(40) if one.decide("checkout", f"m{number}").variant == "candidate"}
        assert 0 < len(exposed) < 40
        await until(lambda: not watch_of(one)._coming)
        await watch_of(one).flush()
        await one.set("checkout", percentage=0, who="eva", why="no new ones")
        await until(lambda: two.known("checkout").version == 2)
        for here in (one, two):
            assert {
                merchant for merchant in map("m{}".format, range(40)) if here.decide("checkout", merchant).reason == "pinned"
            } == exposed
        async with links(places, namespace) as later:
            assert {
                merchant for merchant in map("m{}".format, range(40)) if later.decide("checkout", merchant).reason == "pinned"
            } == exposed
        await one.kill("checkout", **WHO)
        assert one.decide("checkout", min(exposed)).reason == "killed"


async def test_the_last_rules_are_on_disk_for_a_start_without_redis(places: Places, namespace: str, tmp_path: Path) -> None:
    path = tmp_path / "gray.json"
    async with links(places, namespace, snapshot=path) as here:
        await here.set("checkout", percentage=100, **WHO)
        rules = await here.kill("checkout", **WHO)
        await until(lambda: path.exists() and snapshot.load(path) == [rules])
    nowhere = Places("redis://127.0.0.1:1/0")
    async with links(nowhere, namespace, snapshot=path) as here:
        assert here.decide("checkout", "m1").reason == "killed"
        assert here.known("checkout") == rules
        with pytest.raises(RulesUnavailable):
            await here.kill("checkout", **WHO)
    assert os.listdir(tmp_path) == ["gray.json"]


async def test_a_snapshot_never_beats_newer_rules(places: Places, namespace: str, tmp_path: Path) -> None:
    path = tmp_path / "gray.json"
    snapshot.write(path, [Rules("checkout", 1, percentage=100.0), Rules("gone", 4, percentage=3.0)])
    async with links(places, namespace) as one:
        await one.set("checkout", percentage=1, **WHO)
        await one.set("checkout", percentage=2, **WHO)
    async with links(places, namespace, snapshot=path) as here:
        assert here.known("checkout").percentage == 2
        assert here.links() == ["checkout", "gone"]


async def test_a_snapshot_that_cannot_be_read_is_said_and_nothing_more(places: Places, namespace: str, tmp_path: Path) -> None:
    path = tmp_path / "gray.json"
    path.write_text('[{"format": 1, "link": "checkout", "version": 1, "percentage": 400}]')
    metrics = Record()
    async with links(places, namespace, metrics, snapshot=path) as here:
        assert here.decide("checkout", "m1").reason == "unknown"
        assert metrics.named("gray_snapshot_failed")


async def test_without_redis_a_process_starts_and_is_stable(namespace: str) -> None:
    metrics = Record()
    async with links(Places("redis://127.0.0.1:1/0"), namespace, metrics) as here:
        assert here.decide("checkout", "m1") == ("stable", 0, "unknown")
        assert metrics.named("gray")


async def test_the_command_changes_above_what_is_there_without_any_process(places: Places, namespace: str) -> None:
    async with links(places, namespace) as here:
        store = watch_of(here).store
        made = await change(store, "checkout", who="cli", why="try", percentage=4)
        assert made.version == 1
        await until(lambda: here.known("checkout") == made)


async def test_a_cancelled_change_was_made_or_not_and_the_next_one_goes_on(places: Places, namespace: str) -> None:
    async with links(places, namespace) as here:
        for _ in range(20):
            task = asyncio.ensure_future(here.set("checkout", percentage=5, **WHO))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        rules = await here.set("checkout", percentage=6, **WHO)
        assert await here.show("checkout") == rules
        assert [each.version for each in await here.history("checkout")] == list(range(rules.version, 0, -1))


def ages(metrics: Record) -> list[float]:
    return [event.age_seconds for event in metrics.events if isinstance(event, GrayRulesRead)]


async def test_the_age_of_the_rules_grows_while_redis_can_not_be_read_and_begins_anew_then(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Record()
    async with links(Places(None), namespace, metrics) as here:
        watch = watch_of(here)
        watch._tell_age()
        assert ages(metrics) == []  # without a link there are no rules to be old
        await here.set("checkout", percentage=5, **WHO)
        began = time.monotonic()
        await watch.load()

        async def away() -> None:
            raise RulesUnavailable

        with monkeypatch.context() as patch:
            patch.setattr(watch.store, "load", away)
            for _ in range(2):
                watch._read_at -= 30  # half a minute passes
                with pytest.raises(RulesUnavailable):
                    await watch.load()
            watch._tell_age()
            assert 60 <= ages(metrics)[-1] <= 60 + time.monotonic() - began
        await watch.load()
        watch._tell_age()
        assert 0 <= ages(metrics)[-1] <= time.monotonic() - began


async def test_the_age_is_told_by_itself_and_before_what_may_hang(namespace: str) -> None:
    metrics = Record()
    async with links(Places(None), namespace, metrics) as here:
        watch = watch_of(here)

        async def hang() -> None:
            await asyncio.Event().wait()

        watch.flush = hang  # type: ignore[method-assign]
        try:
            await here.set("checkout", percentage=5, **WHO)
            await until(lambda: ages(metrics))
        finally:
            watch.flush = lambda: asyncio.sleep(0)  # type: ignore[method-assign, assignment]
