"""How much CPU there is for this process, and how much of it is in use: from cgroup files (v2 and v1) and ``/proc``, no library.

Two shares are read and the larger one counts. The container's: what its processes used of its quota; above it they are throttled,
however idle the machine is. The machine's: when that is full, a container below its quota waits as well.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path("/")
TICKS: Final = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Reading(NamedTuple):
    """Seconds that only go up. ``group``: CPU seconds of the container; ``busy`` of ``total``: the machine's, all CPUs together."""

    at: float
    group: float | None
    busy: float
    total: float


@dataclass(frozen=True, slots=True)
class Group:
    """Where a control group says what it used and may use."""

    usage: Path
    version: int
    quota: float | None
    """CPUs that it may use; None: all there are."""


class CpuWatch:
    """Reads, and says what was in use between two readings. ``root`` is for tests."""

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._group = find_group(root)
        self.cpus = cpus_of(self._group)
        """CPUs that this process may use, a part of one included."""
        self._last = self._read()

    def share(self) -> float | None:
        """The share in use since the last call, from 0 to 1; None where the system does not say, or no time has passed."""
        now, last = self._read(), self._last
        if now.at <= last.at:
            return None
        self._last = now
        shares = []
        if now.group is not None and last.group is not None:
            shares.append((now.group - last.group) / (now.at - last.at) / self.cpus)
        if now.total > last.total:
            shares.append((now.busy - last.busy) / (now.total - last.total))
        return min(1.0, max(0.0, *shares)) if shares else None

    def _read(self) -> Reading:
        busy, total = _machine(self._root)
        return Reading(time.monotonic(), None if self._group is None else _used(self._group), busy, total)


def find_group(root: Path = ROOT) -> Group | None:
    """The control group of this process that counts CPU: v2 where it does, else v1's ``cpuacct``; None where there is none."""
    paths: dict[str, str] = {}
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            paths[name] = path.lstrip("/")
    mount = root / "sys/fs/cgroup"
    # Within a container its group is mounted as the root, and the path that /proc tells is the host's.
    for base in (mount / paths.get("", ""), mount):
        if "usage_usec" in (_text(base / "cpu.stat") or ""):
            return Group(base / "cpu.stat", 2, _quota_v2(mount, base))
    for base in (mount / "cpuacct" / paths.get("cpuacct", ""), mount / "cpuacct", mount / "cpu,cpuacct"):
        if (_text(base / "cpuacct.usage") or "").strip().isdigit():
            quota = next(filter(None, (_quota_v1(mount, paths.get("cpu", "")), _quota_v1(mount, ""))), None)
            return Group(base / "cpuacct.usage", 1, quota)
    return None


def cpus_of(group: Group | None) -> float:
    """CPUs that this process may use."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return float(there) if group is None or group.quota is None else min(float(there), group.quota)


def _quota_v2(mount: Path, base: Path) -> float | None:
    """The tightest of the group and of those above it."""
    found = []
    while True:
        words = (_text(base / "cpu.max") or "").split()
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
            found.append(int(words[0]) / int(words[1]))
        if base == mount or mount not in base.parents:
            return min(found, default=None)
        base = base.parent


def _quota_v1(mount: Path, path: str) -> float | None:
    for folder in (mount / "cpu" / path, mount / "cpu,cpuacct" / path):
        quota, period = (_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
        if quota.strip().isdigit() and period.strip().isdigit() and int(quota) > 0:  # -1: no limit
            return int(quota) / int(period)
    return None


def _used(group: Group) -> float | None:
    text = _text(group.usage)
    if text is None:
        return None
    if group.version == 1:
        return int(text) / 1e9
    return next((int(line.split()[1]) / 1e6 for line in text.splitlines() if line.startswith("usage_usec ")), None)


def _machine(root: Path) -> tuple[float, float]:
    """(busy, total) seconds of all CPUs; (0, 0) where there is no ``/proc``."""
    words = (_text(root / "proc/stat") or "").partition("\n")[0].split()
    if len(words) < 8 or words[0] != "cpu":
        return 0.0, 0.0
    numbers = [int(word) / TICKS for word in words[1:9]]  # user nice system idle iowait irq softirq steal
    return sum(numbers) - numbers[3] - numbers[4], sum(numbers)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
