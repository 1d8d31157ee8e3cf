"""The CPU governor: who is slowed first, who last, how far, and how it recovers; budgets; where CPU figures come from."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from inventory_sdk import RedistributionPolicy
from inventory_sdk.metrics import Governed, NoMetrics
from inventory_sdk.redistribute.budget import Budget
from inventory_sdk.redistribute.cpu import CpuWatch, cpus_of, find_group
from inventory_sdk.redistribute.governor import Governor
from inventory_sdk.redistribute.meter import Meter, metered
from tests.stock_kit import Recorded


@dataclass
class Watch:
    now: float | None = 0.0
    cpus: float = 4.0

    def share(self) -> float | None:
        return self.now


@dataclass
class Load:
    peak: int = 0
    ended: int = 0
    service_seconds: float = 0.0
    declared: int = 100


class Lanes:
    def __init__(self, *names: str) -> None:
        self.loads = {name: Load() for name in names}
        self.slots = dict.fromkeys(names, 100)

    def load(self, name: str) -> Load:
        return self.loads[name]

    def narrow(self, name: str, slots: int) -> None:
        self.slots[name] = slots


POLICY = RedistributionPolicy(slows=("sync", "batch", "core"), floor=0.2)


def governed(*, policy: RedistributionPolicy = POLICY) -> tuple[Governor, Watch, Lanes]:
    watch, lanes = Watch(), Lanes("sync", "batch", "core")
    return Governor(policy, lanes, watch, NoMetrics()), watch, lanes


def ticks(governor: Governor, count: int, late: float = 0.0) -> None:
    for _ in range(count):
        governor.tick(0.25, late)


def test_redistribution_is_slowed_first_then_the_lanes_in_their_order_and_core_last() -> None:
    governor, watch, _ = governed()
    watch.now = 1.0
    began: list[str] = []
    for _ in range(100):
        governor.tick(0.25, 0.0)
        shares = governor.state().shares
        began += [name for name, share in shares.items() if share < 1 and name not in began]
        slowed = [share for share in shares.values() if share < 1]
        assert all(share == 0.2 for share in slowed[:-1])  # the next begins when those before it are at the floor
    assert began == ["redistribution", "sync", "batch", "core"]
    assert governor.state().shares == dict.fromkeys(began, 0.2)


def test_it_recovers_in_the_other_order_and_more_gently() -> None:
    governor, watch, lanes = governed()
    watch.now = 1.0
    ticks(governor, 100)
    watch.now = 0.1
    done: list[str] = []
    count = 0
    while len(done) < 4:
        governor.tick(0.25, 0.0)
        count += 1
        done += [name for name, share in governor.state().shares.items() if share == 1 and name not in done]
        assert count < 200
    assert done == ["core", "batch", "sync", "redistribution"]
    assert count > 4 * 14
    assert lanes.slots == {"sync": 100, "batch": 100, "core": 100}


def test_between_the_thresholds_nothing_changes() -> None:
    governor, watch, _ = governed()
    watch.now = 1.0
    ticks(governor, 12)
    before = governor.state().shares
    watch.now = 0.8
    ticks(governor, 3)  # the average comes down from 1 to between the two
    settled = governor.state().shares
    ticks(governor, 50)
    assert governor.state().shares == settled
    assert settled["redistribution"] <= before["redistribution"] < 1


def test_one_peak_is_not_yet_a_shortage_and_an_unknown_share_is_none() -> None:
    governor, watch, _ = governed()
    watch.now = 1.0
    ticks(governor, 2)
    assert governor.share == 1.0
    watch.now = None
    ticks(governor, 20)
    assert governor.share == 1.0


def test_a_late_event_loop_slows_as_a_full_cpu_does() -> None:
    governor, _, _ = governed()
    ticks(governor, 20, late=0.2)
    assert governor.share < 0.5
    assert governor.state().lag == pytest.approx(0.2, abs=0.01)
    ticks(governor, 100)
    assert governor.share == 1.0


def test_a_lane_that_is_not_named_is_never_slowed() -> None:
    governor, watch, lanes = governed(policy=RedistributionPolicy(slows=()))
    watch.now = 1.0
    ticks(governor, 100)
    assert governor.share == 0.1
    assert lanes.slots == {"sync": 100, "batch": 100, "core": 100}


def test_cpu_alone_never_takes_the_slots_that_a_lanes_work_needs() -> None:
    governor, watch, lanes = governed()
    core = lanes.loads["core"]

    def call(rate: float, seconds: float, peak: int) -> None:
        core.ended += round(rate * 0.25)
        core.service_seconds, core.peak = seconds, peak
        governor.tick(0.25, 0.0)

    for _ in range(20):
        call(400, 0.01, 30)
    watch.now = 1.0  # a neighbour's
    for _ in range(100):
        call(400, 0.02, 60)  # the same work, slower: what is in flight beyond 30 waits for CPU
    assert governor.state().shares["core"] == 0.2
    assert lanes.slots["core"] == 30  # and not 20
    for _ in range(10):
        call(2400, 0.02, 60)  # more calls than ever: 2400 a second of 0.01 s at best, with room for as many again
    assert lanes.slots["core"] == 48


def test_from_a_lane_whose_needs_are_not_known_nothing_is_taken() -> None:
    governor, watch, lanes = governed()
    watch.now = 1.0  # since before the first look
    ticks(governor, 100)
    assert governor.state().shares["core"] == 0.2
    assert lanes.slots["core"] == 100


def test_never_below_the_floor_or_one_slot() -> None:
    governor, watch, lanes = governed(policy=RedistributionPolicy(slows=("core",), floor=0.05))
    lanes.loads["core"].declared = 4
    ticks(governor, 1)
    watch.now = 1.0
    ticks(governor, 200)
    assert lanes.slots["core"] == 1


async def test_what_was_slowed_is_given_back_at_the_end() -> None:
    governor, watch, lanes = governed()
    ticks(governor, 1)
    watch.now = 1.0
    ticks(governor, 100)
    assert lanes.slots["core"] == 20
    task = asyncio.create_task(governor.run())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert lanes.slots == {"sync": 100, "batch": 100, "core": 100}


def test_the_metrics_are_told_once_a_second() -> None:
    recorded = Recorded()
    governor = Governor(POLICY, Lanes("sync", "batch", "core"), Watch(0.5), recorded)
    ticks(governor, 8)
    events = [event for event in recorded.events if isinstance(event, Governed)]
    assert len(events) == 2
    assert events[-1].shares == {"redistribution": 1.0, "sync": 1.0, "batch": 1.0, "core": 1.0}
    assert 0.4 < events[-1].cpu < 0.5


def test_a_budget_is_a_debt_that_is_paid_off_and_never_a_saving() -> None:
    now = [0.0]
    budget = Budget(0.5, clock=lambda: now[0])
    assert budget.wait() == 0
    budget.charge(1.0)
    assert budget.wait() == 2.0
    now[0] = 1.0
    budget.charge(0.25)
    assert budget.wait() == pytest.approx(1.5)
    now[0] = 1000.0
    assert budget.wait() == 0
    budget.charge(1.0)
    assert budget.wait() == 2.0


async def test_the_meter_counts_a_coroutines_own_steps_and_nobody_elses() -> None:
    meter, other = Meter(), Meter()

    async def burn(seconds: float) -> str:
        for _ in range(5):
            until = time.thread_time() + seconds / 5
            while time.thread_time() < until:
                pass
            await asyncio.sleep(0)
        return "burnt"

    assert await asyncio.gather(metered(burn(0.05), meter), metered(burn(0.0), other)) == ["burnt", "burnt"]
    assert meter.cpu_seconds >= 0.05
    assert other.cpu_seconds < 0.05


async def test_errors_and_cancellation_go_through_the_meter() -> None:
    story: list[str] = []

    async def fails() -> None:
        await asyncio.sleep(0)
        raise ValueError("x")

    async def hangs() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            story.append("ended")

    with pytest.raises(ValueError, match="x"):
        await metered(fails(), Meter())

    async def within() -> None:
        await metered(hangs(), Meter())

    task = asyncio.create_task(within())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert story == ["ended"]


# Where the figures come from ----------------------------------------------------------------------------------------------------------


def machine(root: Path, busy: int, idle: int) -> None:
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text(f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 0 0 0 0\n")


def group_v2(root: Path, path: str, used_us: int, quota: str) -> None:
    for folder, name, text in (
        ("proc/self", "cgroup", f"0::/{path}\n"),
        (f"sys/fs/cgroup/{path}", "cpu.stat", f"usage_usec {used_us}\nuser_usec 1\n"),
        (f"sys/fs/cgroup/{path}", "cpu.max", quota),
    ):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / name).write_text(text)


def test_v2_counts_the_groups_use_against_its_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0]
    monkeypatch.setattr("inventory_sdk.redistribute.cpu.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    machine(tmp_path, 100, 900)
    group_v2(tmp_path, "pod/app", 0, "150000 100000\n")
    watch = CpuWatch(tmp_path)
    assert watch.cpus == 1.5
    clock[0] = 12.0
    machine(tmp_path, 200, 1700)
    group_v2(tmp_path, "pod/app", 2_400_000, "150000 100000\n")  # 2.4 of the 3 CPU seconds that it may have in 2 s
    assert watch.share() == pytest.approx(0.8)
    clock[0] = 14.0
    machine(tmp_path, 2000, 1900)  # the machine is full: 1800 of 2000
    assert watch.share() == pytest.approx(0.9)
    assert watch.share() is None  # no time has passed


def test_a_quota_above_the_group_counts_as_well(tmp_path: Path) -> None:
    group_v2(tmp_path, "pod/app", 0, "max 100000\n")
    (tmp_path / "sys/fs/cgroup/pod/cpu.max").write_text("50000 100000\n")
    group = find_group(tmp_path)
    assert group is not None
    assert (group.version, group.quota, cpus_of(group)) == (2, 0.5, 0.5)


def test_within_a_container_the_group_is_the_root_of_what_is_mounted(tmp_path: Path) -> None:
    group_v2(tmp_path, "", 0, "max 100000\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/kubepods/pod1/app\n")
    group = find_group(tmp_path)
    assert group is not None
    assert (group.version, group.quota) == (2, None)


def test_v1_counts_nanoseconds_against_quota_and_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("inventory_sdk.redistribute.cpu.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    for folder, name, text in (
        ("proc/self", "cgroup", "3:cpuacct,cpu:/box\n0::/\n"),
        ("sys/fs/cgroup/cpuacct/box", "cpuacct.usage", "0\n"),
        ("sys/fs/cgroup/cpu/box", "cpu.cfs_quota_us", "200000\n"),
        ("sys/fs/cgroup/cpu/box", "cpu.cfs_period_us", "100000\n"),
    ):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).write_text(text)
    watch = CpuWatch(tmp_path)
    assert watch.cpus == 2.0
    clock[0] = 1.0
    (tmp_path / "sys/fs/cgroup/cpuacct/box/cpuacct.usage").write_text(f"{10**9}\n")
    assert watch.share() == pytest.approx(0.5)
    (tmp_path / "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us").write_text("-1\n")
    group = find_group(tmp_path)
    assert group is not None
    assert group.quota is None


def test_a_system_that_says_nothing_slows_nothing(tmp_path: Path) -> None:
    watch = CpuWatch(tmp_path)
    assert watch.cpus >= 1
    assert watch.share() is None


def test_this_machine_says_something() -> None:
    watch = CpuWatch()
    until = time.monotonic() + 0.05
    while time.monotonic() < until:
        pass
    share = watch.share()
    assert share is None or 0 <= share <= 1


def test_one_cpu_is_left_where_there_are_few() -> None:
    assert [RedistributionPolicy().concurrency(cpus) for cpus in (0.5, 1.0, 2.0, 3.0, 64.0)] == [1, 1, 1, 2, 2]
    assert RedistributionPolicy(max_concurrency=5).concurrency(1.0) == 5
