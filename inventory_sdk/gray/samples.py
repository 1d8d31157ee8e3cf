"""What calls through links did, counted in this process and handed on once a second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from inventory_sdk.gray.decision import CANDIDATE, STABLE

MOST_MERCHANTS: Final = 1_000
"""Of one link in one second, counted by themselves; the others only in the sum."""
MARK: Final = "\x1f"


@dataclass(slots=True)
class Tally:
    """Calls, those that failed among them, and the seconds they took together."""

    calls: int = 0
    errors: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, failed: bool) -> None:
        self.calls += 1
        self.errors += failed
        self.seconds += seconds

    @property
    def error_share(self) -> float:
        return self.errors / self.calls

    @property
    def mean(self) -> float:
        """Seconds per call."""
        return self.seconds / self.calls

    def without(self, other: Tally) -> Tally:
        return Tally(self.calls - other.calls, self.errors - other.errors, max(0.0, self.seconds - other.seconds))


class Samples:
    """Both sides of one link, and the candidate's merchants."""

    __slots__ = ("merchants", "sides")

    def __init__(self) -> None:
        self.sides = {STABLE: Tally(), CANDIDATE: Tally()}
        self.merchants: dict[str, Tally] = {}

    def add(self, variant: str, merchant: str, seconds: float, failed: bool) -> None:
        self.sides[variant].add(seconds, failed)
        if variant == CANDIDATE:
            tally = self.merchants.get(merchant)
            if tally is None:
                if len(self.merchants) >= MOST_MERCHANTS:
                    return
                tally = self.merchants[merchant] = Tally()
            tally.add(seconds, failed)

    def counts(self) -> dict[str, int]:
        """As a window in Redis adds them up: ``variant ␟ merchant ␟ calls|errors|us``, whole microseconds."""
        found: dict[str, int] = {}
        rows = [(variant, "", tally) for variant, tally in self.sides.items()]
        rows += [(CANDIDATE, merchant, tally) for merchant, tally in self.merchants.items()]
        for variant, merchant, tally in rows:
            for name, value in (("calls", tally.calls), ("errors", tally.errors), ("us", round(tally.seconds * 1e6))):
                if value:
                    found[f"{variant}{MARK}{merchant}{MARK}{name}"] = value
        return found

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> Samples:
        """The counterpart of ``counts``."""
        made = cls()
        for field, value in counts.items():
            variant, merchant, name = field.split(MARK)
            tally = made.merchants.setdefault(merchant, Tally()) if merchant else made.sides[variant]
            if name == "us":
                tally.seconds += value / 1e6
            else:
                setattr(tally, name, value)
        return made
