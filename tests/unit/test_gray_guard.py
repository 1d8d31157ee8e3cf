"""The guard: on figures of both sides over one window it takes back a merchant first, then the link, and pauses where it can't tell."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from gray_kit import Places, Record, forget, ground, links, watch_of

from inventory_sdk.gray.guard import GuardJob, judge
from inventory_sdk.gray.links import GrayLinks
from inventory_sdk.gray.rules import Guard, Rules
from inventory_sdk.gray.samples import MOST_MERCHANTS, Samples, Tally

GUARD = Guard(interval=60, minimum_samples=100, error_ratio=2, error_floor=0.01, latency_ratio=1.5, max_merchants=3)
RULES = Rules("checkout", 4, percentage=10.0, guard=GUARD)
WHO: dict[str, Any] = {"who": "eva", "why": "try"}


def window(stable: tuple[int, int, float], **merchants: tuple[int, int, float]) -> Samples:
    """(calls, errors, mean milliseconds) of the stable side and of each candidate merchant."""
    made = Samples()
    made.sides["stable"] = Tally(stable[0], stable[1], stable[0] * stable[2] / 1e3)
    for merchant, (calls, errors, mean) in merchants.items():
        made.merchants[merchant] = Tally(calls, errors, calls * mean / 1e3)
        total = made.sides["candidate"]
        made.sides["candidate"] = Tally(total.calls + calls, total.errors + errors, total.seconds + calls * mean / 1e3)
    return made


@pytest.mark.parametrize(
    ("said", "verdict", "taken"),
    [
        (window((1000, 1, 10)), "idle", []),
        (window((1000, 1, 10), m1=(200, 0, 11)), "passed", []),
        (window((1000, 1, 10), m1=(99, 99, 11)), "inconclusive", []),
        (window((99, 1, 10), m1=(900, 900, 11)), "inconclusive", []),
        (window((1000, 1, 10), m1=(60, 1, 10), m2=(60, 0, 10)), "passed", []),
        # one merchant is taken back, the others stay
        (window((1000, 1, 10), m1=(200, 20, 10), m2=(200, 1, 10)), "merchants", ["m1"]),
        (window((1000, 1, 10), m1=(200, 0, 16), m2=(200, 0, 10)), "merchants", ["m1"]),
        # too few calls of any merchant alone, but together they tell
        (window((1000, 1, 10), m1=(60, 9, 10), m2=(60, 9, 10)), "link", []),
        # a merchant and, without it, the others as well
        (window((1000, 1, 10), m1=(200, 50, 10), m2=(60, 9, 10), m3=(60, 9, 10)), "link", []),
        (window((1000, 1, 10), m1=(200, 50, 10), m2=(200, 50, 10), m3=(200, 50, 10)), "link", []),
        # as many errors as the ratio and the floor allow, and not one more
        (window((1000, 100, 10), m1=(200, 40, 10)), "passed", []),
        (window((1000, 100, 10), m1=(200, 41, 10)), "merchants", ["m1"]),
        (window((1000, 0, 10), m1=(200, 2, 10)), "passed", []),
        (window((1000, 0, 10), m1=(200, 3, 10)), "merchants", ["m1"]),
        (window((1000, 0, 10), m1=(200, 0, 15)), "passed", []),
    ],
)
def test_what_a_window_means(said: Samples, verdict: str, taken: list[str]) -> None:
    finding = judge(RULES, GUARD, said)
    assert (finding.verdict, sorted(finding.merchants)) == (verdict, taken)
    assert finding.why


def test_merchants_that_were_taken_back_before_count_towards_the_link_and_not_into_its_figures() -> None:
    taken = Rules("checkout", 4, percentage=10.0, guard=GUARD, taken_back=("old-1", "old-2"))
    late = window((1000, 1, 10), **{"old-1": (300, 300, 10)}, m1=(200, 0, 10))
    assert judge(taken, GUARD, late).verdict == "passed"
    assert judge(taken, GUARD, window((1000, 1, 10), m1=(200, 90, 10), m2=(200, 0, 10))).verdict == "link"
    assert judge(taken, GUARD, window((1000, 1, 10), **{"old-1": (300, 300, 10)})).verdict == "idle"


def test_counts_survive_the_way_through_redis_and_merchants_are_bounded() -> None:
    made = Samples()
    for number in range(MOST_MERCHANTS + 5):
        made.add("candidate", f"m:{number}", 0.001, number % 2 == 0)
    made.add("stable", "m1", 0.25, False)
    back = Samples.of(made.counts())
    assert len(back.merchants) == MOST_MERCHANTS
    assert back.sides["candidate"].calls == MOST_MERCHANTS + 5
    assert back.sides["stable"] == Tally(1, 0, 0.25)
    assert back.merchants["m:0"] == Tally(1, 1, 0.001)


class House:
    """One link under guard, with windows as the test says."""

    def __init__(self, here: GrayLinks, metrics: Record) -> None:
        self.links = here
        self.metrics = metrics
        self.told: list[Any] = []
        self.store = watch_of(here).store
        tell = ground(None, "", metrics, self.told).tell
        self.job = GuardJob(self.store, lambda: watch_of(here).rules, metrics, tell)

    async def pass_window(self, number: int, samples: Samples) -> str | None:
        await self.store.count("checkout", GUARD.interval, number, samples.counts())
        finding = await self.job.look("checkout", GUARD, (number + 1) * GUARD.interval + 3)
        return None if finding is None else finding.verdict


@pytest.fixture(params=["fakeredis", pytest.param("redis", marks=pytest.mark.redis)])
async def house(request: pytest.FixtureRequest, redis_url: str, namespace: str) -> AsyncIterator[House]:
    places = Places(redis_url if request.param == "redis" else None)
    metrics = Record()
    async with links(places, namespace, metrics) as here:
        await here.set("checkout", percentage=10, guard=GUARD, **WHO)
        yield House(here, metrics)
    await forget(places, namespace)


GOOD = window((1000, 1, 10), m1=(200, 0, 10), m2=(200, 0, 10))
BAD_M1 = window((1000, 1, 10), m1=(200, 50, 10), m2=(200, 0, 10))
BAD = window((1000, 1, 10), m2=(60, 20, 10), m3=(60, 20, 10))
FEW = window((1000, 1, 10), m1=(3, 0, 10))


async def test_a_merchant_is_taken_back_first_and_the_link_only_when_the_others_fail_too(house: House) -> None:
    assert await house.pass_window(100, BAD_M1) == "merchants"
    rules = await house.links.show("checkout")
    assert (rules.taken_back, rules.killed) == (("m1",), False)
    (change, *_) = await house.links.history("checkout")
    assert (change.who, change.changes) == ("guard", {"taken_back": [[], ["m1"]]})
    assert "merchant m1: candidate 50 of 200 failed (25.00%)" in change.why
    assert "stable 1 of 1000" in change.why
    assert await house.pass_window(101, BAD) == "link"
    assert (await house.links.show("checkout")).killed
    (change, *_) = await house.links.history("checkout")
    assert "beyond single merchants" in change.why
    assert [(name, facts["merchants"], facts["killed"]) for name, facts in house.told] == [
        ("gray_taken_back", ["m1"], False),
        ("gray_taken_back", [], True),
    ]
    assert await house.pass_window(102, BAD) is None  # nothing to guard any more


async def test_a_window_is_judged_once_and_not_before_everybody_has_reported(house: House) -> None:
    await house.store.count("checkout", GUARD.interval, 100, BAD_M1.counts())
    assert await house.job.look("checkout", GUARD, 101 * GUARD.interval + 1) is None
    assert await house.pass_window(100, Samples()) == "merchants"
    assert await house.pass_window(100, Samples()) is None


async def test_too_few_calls_pause_the_rollout_and_a_good_window_lifts_that_pause(house: House) -> None:
    assert await house.pass_window(100, FEW) == "inconclusive"
    assert (await house.links.show("checkout")).paused
    with pytest.raises(ValueError, match="paused"):
        await house.links.set("checkout", percentage=20, **WHO)
    assert await house.pass_window(101, FEW) == "inconclusive"
    assert len(await house.links.history("checkout")) == 2
    assert await house.pass_window(102, GOOD) == "passed"
    assert not (await house.links.show("checkout")).paused
    assert (await house.links.history("checkout"))[0].changes == {"paused": [True, False]}


async def test_the_guard_does_not_lift_a_persons_pause(house: House) -> None:
    await house.links.set("checkout", paused=True, **WHO)
    assert await house.pass_window(100, GOOD) == "passed"
    assert (await house.links.show("checkout")).paused


async def test_that_rules_passed_is_noted_once_for_each_version(house: House) -> None:
    for number in (100, 101, 102):
        assert await house.pass_window(number, GOOD) == "passed"
    changes = await house.links.history("checkout")
    assert [(change.who, change.version) for change in changes] == [("guard", 1), ("eva", 1)]
    assert changes[0].why.startswith("passed: candidate 0 of 400 failed")
    await house.links.set("checkout", percentage=20, **WHO)
    assert await house.pass_window(103, GOOD) == "passed"
    assert len(await house.links.history("checkout")) == 4


async def test_two_workers_that_look_at_the_same_window_act_once(house: House) -> None:
    second = GuardJob(house.store, dict, house.metrics, ground(None, "", house.metrics, house.told).tell)
    assert await house.pass_window(100, BAD_M1) == "merchants"
    found = await second.look("checkout", GUARD, 101 * GUARD.interval + 3)
    assert found is not None
    assert found.verdict == "passed"
    assert (await house.links.show("checkout")).taken_back == ("m1",)


async def test_calls_of_all_processes_come_together_in_one_window(house: House) -> None:
    watch = watch_of(house.links)
    for _ in range(3):
        watch.count("checkout", "candidate", "m1", 0.5, True)
        await watch.flush()
    watch.count("elsewhere", "stable", "m1", 0.5, True)
    await watch.flush()
    now = await house.store.now()
    counts = {**await house.store.counted("checkout", 60, int(now // 60) - 1), **await house.store.counted("checkout", 60, int(now // 60))}
    assert sum(value for name, value in counts.items() if name == "candidate\x1fm1\x1fcalls") in (1, 2, 3)
    assert await house.store.counted("elsewhere", 60, int(now // 60)) == {}
