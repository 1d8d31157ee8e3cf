"""The decorators keep the types of what they decorate, for both type checkers; each file beside this one says what and how."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(path for path in HERE.glob("*.py") if not path.name.startswith("test_"))


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_mypy_strict_agrees(path: Path) -> None:
    pytest.importorskip("mypy")
    # Silent: the package's own errors belong to its own check.
    run("mypy", "--strict", "--warn-unused-ignores", "--follow-imports=silent", str(path))


def test_basedpyright_agrees() -> None:
    pytest.importorskip("basedpyright")
    run("basedpyright", "--project", str(HERE / "pyrightconfig.json"), "--pythonpath", sys.executable)
