"""What redistribution may use of a process, and what makes way when the CPU runs short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import check_text

LAST: Final = "core"
"""The lane that is slowed after all others."""


@dataclass(frozen=True, slots=True)
class RedistributionPolicy:
    """Per process and event loop. Times are in seconds; ``InvalidOperation`` for what can't be.

    ``max_concurrency``: calculations that run at once, each in a process of its own with ``executor="process"``, which runs with
    ``nice`` so much weaker; None: two, or one where there are not three CPUs, so that one is left. ``cpu_budget``: the share of the
    CPUs that this process may use which all calculations together get on the average (0.25: a quarter); None: no limit. ``cpu`` and
    ``lag``: the CPU share in use (of the container, or of the machine) and the lateness of the event loop above which something is
    slowed: redistribution first, then the lanes of ``slows`` in this order, ``"core"`` only as the last one; a lane that is not named
    is never slowed. Nothing goes below the share ``floor``. ``lease``: after so long without a sign, a runner's keys are somebody
    else's.
    """

    max_concurrency: int | None = None
    cpu_budget: float | None = None
    cpu: float = 0.85
    lag: float = 0.05
    slows: tuple[str, ...] = ()
    floor: float = 0.1
    lease: float = 10.0
    nice: int = 10

    def __post_init__(self) -> None:
        if self.max_concurrency is not None and (type(self.max_concurrency) is not int or not 1 <= self.max_concurrency <= 64):
            raise InvalidOperation("max_concurrency", self.max_concurrency, "must be a whole number from 1 to 64, or None")
        if type(self.nice) is not int or not 0 <= self.nice <= 19:
            raise InvalidOperation("nice", self.nice, "must be a whole number from 0 to 19")
        check_share("cpu_budget", self.cpu_budget)
        for name in ("cpu", "floor"):
            if getattr(self, name) is None:
                raise InvalidOperation(name, None, "must be a share, more than 0 and at most 1")
            check_share(name, getattr(self, name))
        check_seconds("lag", self.lag, 0.001, 10.0)
        check_seconds("lease", self.lease, 0.1, 600.0)
        if isinstance(self.slows, str) or not all(isinstance(name, str) for name in self.slows):
            raise InvalidOperation("slows", self.slows, "must be a tuple of the names of lanes")
        object.__setattr__(self, "slows", tuple(self.slows))
        for name in self.slows:
            check_text("slows", name)
        if LAST in self.slows[:-1] or len(set(self.slows)) != len(self.slows):
            raise InvalidOperation("slows", self.slows, f"must name each lane once, and {LAST!r} only as the last one")

    def concurrency(self, cpus: float) -> int:
        """Calculations that run at once, where there are so many CPUs."""
        return self.max_concurrency or (2 if cpus >= 3 else 1)


def check_share(field: str, value: object) -> None:
    """``InvalidOperation`` unless None, or more than 0 and at most 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1):
        raise InvalidOperation(field, value, "must be a share, more than 0 and at most 1")


def check_seconds(field: str, value: object, least: float, most: float) -> None:
    """``InvalidOperation`` unless within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise InvalidOperation(field, value, f"must be seconds, from {least:g} to {most:g}")
