"""An hour of load, shortened: nothing grows that should not, and the books agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.endurance import CAP, Sample, grown

ROOT = Path(__file__).resolve().parents[2]
SECONDS = os.environ.get("INVENTORY_TEST_ENDURANCE_SECONDS", "12")


@pytest.mark.redis
@pytest.mark.amqp
@pytest.mark.postgresql
def test_under_load_memory_journal_and_lag_stay_bounded(redis_url: str, amqp_url: str, postgresql_url: str) -> None:
    servers = ["--redis", redis_url, "--queue", amqp_url, "--database", postgresql_url]
    command = [sys.executable, "-m", "benchmarks.endurance", "--seconds", SECONDS, *servers]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["wrong"] == []
    assert result["operations"] > 500
    assert result["journal_most"] <= CAP


def samples(**grows: float) -> list[Sample]:
    """A quarter of warming up, then a straight line for what is named."""
    level = {"caller": 80.0, "worker": 80.0, "redis": 3.0, "journal": 2000, "lag": 50}
    found = []
    for at in range(40):
        now = {name: value + grows.get(name, 0) * max(0, at - 10) for name, value in level.items()}
        found.append(Sample(at=at, **now))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", ["caller", "worker", "redis", "journal", "lag"])
def test_what_grows_is_found_and_what_warms_up_is_not(name: str) -> None:
    assert grown(samples()) == []
    (wrong,) = grown(samples(**{name: 200.0}))
    assert wrong.startswith(f"{name} grew")
