"""``python -m tests.model.simulator``: many seeds, one seed with its story, or a long night. See docs/explanation/simulator.md."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import count, islice

from tests.model.simulator.mutations import MUTATIONS, switched_off
from tests.model.simulator.run import Result, run_seed

SHARE = 10
"""Seeds per errand of a child process."""


@dataclass
class Sum:
    """What many seeds come to."""

    seeds: int = 0
    calls: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    tolerated: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[int, str]] = field(default_factory=list)

    def add(self, result: Result) -> None:
        self.seeds += 1
        self.calls += result.calls
        self.outcomes += result.outcomes
        self.injected += result.injected
        self.tolerated += result.tolerated
        if result.violation is not None:
            self.failed.append((result.seed, result.violation))


def errand(first: int, seeds: int, mutation: str | None) -> list[Result]:
    """Some seeds in one child; garbage is collected between them, not in the middle of their work."""
    gc.disable()
    with switched_off(mutation):
        results = [run_seed(seed) for seed in range(first, first + seeds)]
    gc.collect()
    return results


def many(first: int, seeds: int | None, until: float, jobs: int, mutation: str | None = None, stop_at_failure: bool = False) -> Sum:
    """``seeds`` seeds (None: as many as there is time for) on ``jobs`` processes, until ``until`` (time.monotonic)."""
    total = Sum()
    starts: Iterator[int] = count(first, SHARE) if seeds is None else iter(range(first, first + seeds, SHARE))
    with ProcessPoolExecutor(jobs) as pool:
        pending = [pool.submit(errand, at, _share(at, first, seeds), mutation) for at in islice(starts, jobs * 2)]
        while pending:
            for result in pending.pop(0).result():
                total.add(result)
                if result.violation is not None and mutation is None:
                    sys.stdout.write(f"seed {result.seed}: {result.violation[:300]}\n")
                    sys.stdout.flush()
            if stop_at_failure and total.failed:
                for future in pending:
                    future.cancel()
                break
            if time.monotonic() < until:
                pending += [pool.submit(errand, at, _share(at, first, seeds), mutation) for at in islice(starts, 1)]
    return total


def _share(at: int, first: int, seeds: int | None) -> int:
    return SHARE if seeds is None else min(SHARE, first + seeds - at)


def told(total: Sum, seconds: float) -> list[str]:
    """The summary, in lines."""
    lines = [f"{total.seeds} seeds, {total.calls} calls in {seconds:.0f} s, {len(total.failed)} seeds failed"]
    for title, counts in (("answers", total.outcomes), ("faults", total.injected), ("tolerated", total.tolerated)):
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{name} {number}" for name, number in sorted(counts.items())))
    for seed, why in total.failed[:20]:
        lines.append(f"seed {seed}: {why[:300]}")
        lines.append(f"  replay: python -m tests.model.simulator --seed {seed}")
    return lines


def summary(total: Sum, seconds: float) -> str:
    """The last line, for machines."""
    faults = {name: number for name, number in sorted(total.injected.items()) if not name.startswith("retried ")}
    return json.dumps(
        {
            "seeds": total.seeds,
            "calls": total.calls,
            "faults": sum(faults.values()),
            "faults_by_kind": faults,
            "tolerated": dict(total.tolerated),
            "failed": [seed for seed, _ in total.failed],
            "seconds": round(seconds, 1),
        }
    )


def one(seed: int, mutation: str | None) -> int:
    """A seed with its story; twice, because a seed that differs from itself proves nothing."""
    with switched_off(mutation):
        result = run_seed(seed, tracing=True)
        again = run_seed(seed)
    sys.stdout.write("\n".join(result.lines) + "\n")
    if again.digest != result.digest:
        sys.stdout.write("NOT DETERMINISTIC: the second run of this seed was another one\n")
    sys.stdout.write(f"seed {seed}: {result.violation or 'every promise kept'}\n")
    total = Sum()
    total.add(result)
    sys.stdout.write(summary(total, 0.0) + "\n")
    return 1 if result.violation else 0


def prove(limit: int, jobs: int) -> int:
    """Switch each mechanism off and look how many seeds it takes to notice; the rows of the table in the docs."""
    missed = 0
    for name, mutation in MUTATIONS.items():
        total = many(0, limit, time.monotonic() + 3600, jobs, name, stop_at_failure=True)
        if total.failed:
            seed, why = min(total.failed)
            sys.stdout.write(f"| {name} | {mutation.what} | {seed + 1} | {why[:160]} |\n")
        else:
            missed += 1
            sys.stdout.write(f"| {name} | {mutation.what} | not in {total.seeds} | |\n")
        sys.stdout.flush()
    return missed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.model.simulator", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds (default 1000)")
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--seed", type=int, help="one seed, with its story")
    parser.add_argument("--hours", type=float, help="as many seeds as fit into these hours")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per processor)")
    parser.add_argument("--switch-off", choices=sorted(MUTATIONS), help="run with this mechanism of the SDK switched off")
    parser.add_argument("--prove", action="store_true", help="switch off each mechanism in turn, until a seed notices")
    chosen = parser.parse_args(arguments)
    if chosen.seed is not None:
        return one(chosen.seed, chosen.switch_off)
    if chosen.prove:
        return prove(chosen.seeds, chosen.jobs)
    begun = time.monotonic()
    until = begun + (chosen.hours * 3600 if chosen.hours is not None else 1e9)
    seeds = None if chosen.hours is not None else chosen.seeds
    total = many(chosen.first, seeds, until, chosen.jobs, chosen.switch_off, stop_at_failure=chosen.switch_off is not None)
    seconds = time.monotonic() - begun
    sys.stdout.write("\n".join(told(total, seconds)) + "\n" + summary(total, seconds) + "\n")
    return 1 if total.failed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of strings must have the same order in every run of a seed.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.model.simulator", *sys.argv[1:]])
    raise SystemExit(main())
