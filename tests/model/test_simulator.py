"""The simulator itself: many seeds within CI's time, the same story for the same seed, and that it notices what is taken away."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import required, sample
from tests.model.simulator.mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 45 if required() else 6
"""CI takes its time; who runs the tests without servers is not to wait for it."""


def simulator(*arguments: str, code: int = 0) -> list[str]:
    """The lines that the command prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.simulator", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout[-8000:]
    return done.stdout.splitlines()


def test_every_promise_holds_in_as_many_seeds_as_fit(capsys: pytest.CaptureFixture[str]) -> None:
    lines = simulator("--hours", str(SECONDS / 3600))
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines[:3]) + "\n")
    summary = json.loads(lines[-1])
    assert summary["failed"] == []
    assert summary["seeds"] >= 20
    assert summary["faults"] > summary["seeds"]


def test_a_seed_tells_the_same_story_in_every_process() -> None:
    first, second = simulator("--seed", "7"), simulator("--seed", "7")
    assert first == second
    assert not any("NOT DETERMINISTIC" in line for line in first)
    assert any("journal" in line for line in first)


@pytest.mark.parametrize(("mechanism", "seeds"), sample([("cover", 40), ("results", 60), ("givers", 60)]))
def test_a_mechanism_that_is_switched_off_is_noticed(mechanism: str, seeds: int) -> None:
    lines = simulator("--switch-off", mechanism, "--seeds", str(seeds), code=1)
    assert json.loads(lines[-1])["failed"]
    assert any("replay: python -m tests.model.simulator --seed" in line for line in lines)


def test_the_document_says_of_each_mechanism_what_became_of_it() -> None:
    text = (ROOT / "docs" / "explanation" / "simulator.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (\d+|not in \d+)[^|]* \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == list(MUTATIONS)
