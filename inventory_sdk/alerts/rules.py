"""What can be watched. A rule counts by subject (a merchant, a SKU, a lane) in every process; one worker judges the sums.

A rule of one's own is a class with these members; ``name`` must be unique among those that are watched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.metrics.events import Applied, Behind, Event, Happened, LaneUsed
from inventory_sdk.model import LEDGER_DELTAS, NO_DELTAS, JournalEntry, split_key

Severity = Literal["info", "warning", "critical"]
BUCKET: Final = 10
"""Seconds that are counted together."""
MAX_WINDOW: Final = 3600.0


class Count(NamedTuple):
    """So many of something about a subject; ``part`` names what."""

    subject: str
    part: str
    number: int


class Sums(NamedTuple):
    """One subject's counts over the rule's window. ``seconds``: from its first count within the window until now."""

    parts: Counter[str]
    seconds: float


class Finding(NamedTuple):
    """What is wrong with one subject now. ``message`` is for people, ``value`` what was measured."""

    subject: str
    value: float
    message: str


Available = Callable[[str], Awaitable[int | None]]
"""Field (merchant and SKU) → units available now; None where it can't be said."""


class Rule(Protocol):
    """``hold``: seconds for which something must be found without a break before it fires; ``window``: seconds over which is summed."""

    @property
    def name(self) -> str: ...
    @property
    def severity(self) -> Severity: ...
    @property
    def hold(self) -> float: ...
    @property
    def window(self) -> float: ...

    def on_event(self, event: Event) -> Iterable[Count]:
        """What one event of the SDK counts for it."""
        ...

    def on_answer(self, merchant: str, accepted: bool) -> Iterable[Count]:
        """What one take counts for it, in the process of its caller."""
        ...

    def on_applied(self, entry: JournalEntry) -> Iterable[Count]:
        """What one journal entry counts for it, in the worker that applied it."""
        ...

    async def judge(self, sums: Mapping[str, Sums], available: Available) -> Sequence[Finding]:
        """What is wrong now, over all processes."""
        ...


def check(rule: Rule | Counting) -> None:
    """``InvalidOperation`` for one that can't be watched."""
    if not rule.name or not rule.name.isidentifier():
        raise InvalidOperation("name", rule.name, "of a rule must be a word, like stock_out")
    if not 0 <= rule.hold <= MAX_WINDOW:
        raise InvalidOperation("hold", rule.hold, f"of rule {rule.name} must be from 0 to {MAX_WINDOW:g} seconds")
    if not BUCKET <= rule.window <= MAX_WINDOW:
        raise InvalidOperation("window", rule.window, f"of rule {rule.name} must be from {BUCKET} to {MAX_WINDOW:g} seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counting:
    """What rules have in common: they count nothing where they say nothing else."""

    name: str = ""
    severity: Severity = "warning"
    hold: float = 0.0
    window: float = 60.0

    def __post_init__(self) -> None:
        check(self)

    def on_event(self, event: Event) -> Iterable[Count]:
        """Nothing."""
        return ()

    def on_answer(self, merchant: str, accepted: bool) -> Iterable[Count]:
        """Nothing."""
        return ()

    def on_applied(self, entry: JournalEntry) -> Iterable[Count]:
        """Nothing."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StockOut(Counting):
    """A SKU that is sold in Redis is out within ``minutes`` at the rate of the window. ``at_least``: units that must have left in it."""

    name: str = "stock_out"
    window: float = 300.0
    minutes: float = 10.0
    at_least: int = 10
    most: int = 50
    """The fastest SKUs that are looked at in one round."""

    def on_applied(self, entry: JournalEntry) -> Iterator[Count]:
        """Units that left, less those that came back."""
        for operation in entry.operations:
            each = LEDGER_DELTAS.get(operation.kind, NO_DELTAS).available
            if each:
                for field, quantity in zip(operation.lines[::2], operation.lines[1::2], strict=True):
                    yield Count(field, "left", -each * quantity)

    async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
        """The fastest first."""
        rates = {
            field: seen.parts["left"] / max(seen.seconds, 2 * BUCKET) for field, seen in sums.items() if seen.parts["left"] >= self.at_least
        }
        found: list[Finding] = []
        for field in sorted(rates, key=lambda each: -rates[each])[: self.most]:
            left = await available(field)
            if left is None:
                continue
            minutes = max(0, left) / rates[field] / 60
            if minutes <= self.minutes:
                merchant, sku = split_key(field)
                when = f"in {minutes:.1f} minutes" if left > 0 else "now"
                rate = rates[field] * 60
                found.append(
                    Finding(field, minutes, f"{sku!r} of merchant {merchant!r} is out {when}: {left} left, {rate:.0f} a minute leave")
                )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalRatio(Counting):
    """More than ``above`` of a merchant's takes are refused (1: all of them). ``at_least``: takes of the window that make it worth
    saying."""

    name: str = "refusal_ratio"
    above: float = 0.5
    at_least: int = 50

    def on_answer(self, merchant: str, accepted: bool) -> Iterator[Count]:
        """One take."""
        yield Count(merchant, "accepted" if accepted else "refused", 1)

    async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
        """By merchant."""
        return _ratios(
            sums, "refused", "accepted", self.above, self.at_least, "{share:.0%} of the takes of merchant {subject!r} are refused"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowMismatch(Counting):
    """More than ``above`` of the answers that were compared with a shadow's differ; ``alerts.compared(subject, same=…)`` counts them."""

    name: str = "shadow_mismatch"
    window: float = 300.0
    above: float = 0.0
    at_least: int = 20

    async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
        """By what was compared."""
        return _ratios(
            sums, "different", "same", self.above, self.at_least, "{share:.2%} of the answers of {subject!r} differ from its shadow's"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift(Counting):
    """Redis and the ledger disagreed: the ledger rejected what Redis had accepted, or a comparison found a difference."""

    name: str = "drift"
    severity: Severity = "critical"
    window: float = 600.0

    def on_event(self, event: Event) -> Iterator[Count]:
        """Rejections by partition; what comparisons found, by cause."""
        if isinstance(event, Applied) and event.rejected:
            yield Count(f"partition {event.partition}", "rejected", event.rejected)
        elif isinstance(event, Happened) and event.name == "drift":
            yield Count(event.labels.get("reason", "compared"), "found", 1)

    async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
        """Any at all."""
        found: list[Finding] = []
        for subject, seen in sums.items():
            number = sum(seen.parts.values())
            if number:
                found.append(Finding(subject, number, f"Redis and ledger disagreed {number} times within {self.window:.0f} s ({subject})"))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Queueing(Counting):
    """Calls wait in a line (of a lane, of a hot SKU) for longer than ``seconds``; ``at_least`` of them within the window."""

    name: str = "queueing"
    seconds: float = 5.0
    at_least: int = 1

    def on_event(self, event: Event) -> Iterator[Count]:
        """Waits that were too long, by line."""
        waits: Sequence[float] = getattr(event, "waits", ())
        long = sum(wait > self.seconds for wait in waits)
        if long:
            yield Count(f"lane {event.lane}" if isinstance(event, LaneUsed) else "hot SKUs", "long", long)

    async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
        """By line."""
        return [
            Finding(subject, seen.parts["long"], f"{seen.parts['long']} calls waited longer than {self.seconds:g} s for {subject}")
            for subject, seen in sums.items()
            if seen.parts["long"] >= self.at_least
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerBehind(Counting):
    """What Redis accepted waits longer than ``seconds`` for the ledger."""

    name: str = "ledger_behind"
    window: float = 20.0
    seconds: float = 30.0

    def on_event(self, event: Event) -> Iterator[Count]:
        """Looks at the journal that found it so."""
        if isinstance(event, Behind) and event.seconds > self.seconds:
            yield Count(f"partition {event.partition}", "late", 1)

    async def judge(self, sums: Mapping[str, Sums], available: Available) -> list[Finding]:
        """By partition."""
        return [
            Finding(subject, seen.parts["late"], f"the ledger is more than {self.seconds:g} s behind in {subject}")
            for subject, seen in sums.items()
            if seen.parts["late"]
        ]


def _ratios(sums: Mapping[str, Sums], bad: str, good: str, above: float, at_least: int, message: str) -> list[Finding]:
    found: list[Finding] = []
    for subject, seen in sums.items():
        wrong, all_of_it = seen.parts[bad], seen.parts[bad] + seen.parts[good]
        if all_of_it >= at_least and wrong / all_of_it > above:
            share: Any = wrong / all_of_it
            found.append(Finding(subject, share, f"{message.format(share=share, subject=subject)} ({wrong} of {all_of_it})"))
    return found
