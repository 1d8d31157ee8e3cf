"""Build the wheel and use it as a stranger would: every file of the package is in it, it imports bare, its demo runs.

Two fresh environments: one without extras (the import works, and the command names the extra it lacks), one with
``[embedded,cli]`` (the demo runs, from a directory that does not hold the sources).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "inventory_sdk"


def run(*command: str | Path, cwd: Path, code: int = 0) -> str:
    """Standard output and error of the command, run away from the sources; stops the check on any other exit code."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    words = [str(part) for part in command]
    done = subprocess.run(  # noqa: S603  (our own commands)
        words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != code:
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}, expected {code}\n{done.stdout}")
    return done.stdout


def environment(place: Path, requirement: str) -> Path:
    """The bin directory of a fresh environment that holds ``requirement``."""
    run(sys.executable, "-m", "venv", place, cwd=place.parent)
    run(place / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", requirement, cwd=place.parent)
    return place / "bin"


def missing(wheel: Path) -> list[str]:
    """Files of the package that git would keep and the wheel lacks."""
    packed = set(zipfile.ZipFile(wheel).namelist())
    ours = (path for path in (ROOT / PACKAGE).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sorted(name for path in ours if (name := path.relative_to(ROOT).as_posix()) not in packed)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="inventory-wheel-") as name:
        place = Path(name)
        run(sys.executable, "-m", "build", "--outdir", place / "dist", ROOT, cwd=place)
        (wheel,) = (place / "dist").glob("*.whl")
        if lacking := missing(wheel):
            sys.exit(f"{wheel.name} lacks {', '.join(lacking)}")
        print(f"{wheel.name}: every file of {PACKAGE}/ is in it")

        bare = environment(place / "bare", str(wheel))
        run(bare / "python", "-W", "error", "-c", f"from {PACKAGE} import *", cwd=place)
        told = run(bare / "inventory-sdk", "demo", cwd=place, code=1)
        if f"{PACKAGE}[cli]" not in told:
            sys.exit(f"without its extra, the command does not name it:\n{told}")
        print("without extras: imports, and the command names the extra it lacks")
        shutil.rmtree(place / "bare")

        full = environment(place / "full", f"{wheel}[embedded,cli]")
        print(run(full / "inventory-sdk", "demo", "--buyers", "500", "--units", "50", cwd=place))
        print("with [embedded,cli]: the demo ran")


if __name__ == "__main__":
    main()
