"""CPU seconds by process, from /proc: what the servers on this machine spend while a load runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

TICKS: Final = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
SERVERS: Final = {"redis-server": "redis", "postgres": "postgresql", "beam.smp": "rabbitmq"}


def _processes() -> Iterator[tuple[int, str, float]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since the folder was listed
        name = text[text.index("(") + 1 : text.rindex(")")]
        fields = text[text.rindex(")") + 2 :].split()
        yield int(folder.name), name, (int(fields[11]) + int(fields[12])) / TICKS


class Spent:
    """CPU seconds since it was made. ``own``: processes to be told apart, {pid: name}."""

    def __init__(self, own: dict[int, str]) -> None:
        self._own = own
        self._before = {pid: seconds for pid, _, seconds in _processes()}

    def seconds(self) -> dict[str, float]:
        """By part; ``other`` is what else ran on the machine (a kernel thread, a neighbour), which makes a reading doubtful."""
        spent = dict.fromkeys([*self._own.values(), *SERVERS.values(), "other"], 0.0)
        for pid, name, seconds in _processes():
            part = self._own.get(pid) or SERVERS.get(name, "other")
            spent[part] += seconds - self._before.get(pid, 0.0)
        return spent
