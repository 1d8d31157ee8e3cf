"""What is wrong now, since when, and who was told: the state of all alerts, as data that Redis keeps between two rounds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from inventory_sdk.alerts.rules import Finding, Rule


@dataclass(frozen=True, slots=True)
class Alert:
    """What sinks are told. ``since``: when it was first found, ``at``: when this was said; both seconds since 1970."""

    rule: str
    subject: str
    state: Literal["firing", "resolved"]
    severity: str
    message: str
    value: float
    since: float
    at: float

    def document(self) -> dict[str, Any]:
        """As JSON holds it. The subject of a SKU is split: ``merchant``, ``sku``."""
        found = {name: getattr(self, name) for name in ("rule", "subject", "state", "severity", "message", "value", "since", "at")}
        merchant, joined, sku = self.subject.partition("\x1f")
        return {**found, "subject": f"{merchant}/{sku}", "merchant": merchant, "sku": sku} if joined else found


@dataclass(frozen=True, slots=True)
class Silence:
    """Nobody is told of what matches until then, if it was made (``since``) before; both seconds since 1970. ``rule``, ``subject``: None
    matches all; a SKU's subject is ``merchant/sku``. With a clock that went back behind its beginning it is not in force: better told
    twice than silent for too long."""

    number: str
    rule: str | None
    subject: str | None
    until: float
    who: str
    why: str
    since: float = 0.0

    def covers(self, rule: str, subject: str, now: float) -> bool:
        """Whether it is about this, now."""
        return (
            self.since <= now < self.until and self.rule in (None, rule) and self.subject in (None, subject, subject.replace("\x1f", "/"))
        )

    def text(self) -> str:
        """As Redis keeps it."""
        return json.dumps([self.rule, self.subject, self.until, self.who, self.why, self.since])

    @classmethod
    def read(cls, number: str, text: str | bytes) -> Silence:
        """What ``text`` wrote."""
        return cls(number, *json.loads(text))


@dataclass(frozen=True, slots=True)
class Standing:
    """One subject of one rule. ``firing``: it was found for long enough. ``told``: the sinks that know that it fires; ``owed``: those
    that don't know yet that it is over (``over``)."""

    rule: str
    subject: str
    severity: str
    since: float
    value: float
    message: str
    firing: bool = False
    over: bool = False
    told: tuple[str, ...] = field(default=())

    @property
    def key(self) -> str:
        """Its name among all."""
        return f"{self.rule}\x1f{self.subject}"

    def text(self) -> str:
        """As Redis keeps it."""
        rest = [self.rule, self.subject, self.severity, self.since, self.value, self.message, self.firing, self.over, self.told]
        return json.dumps(rest)

    @classmethod
    def read(cls, text: str | bytes) -> Standing:
        """What ``text`` wrote."""
        *facts, told = json.loads(text)
        return replace(cls(*facts), told=tuple(told))

    def alert(self, at: float) -> Alert:
        """What a sink is told of it."""
        state: Literal["firing", "resolved"] = "resolved" if self.over else "firing"
        return Alert(self.rule, self.subject, state, self.severity, self.message, self.value, self.since, at)


def judged(before: Mapping[str, Standing], rule: Rule, findings: Iterable[Finding], now: float) -> dict[str, Standing]:
    """One rule's standings after a round: found anew, found still, over. What never fired and is not found any more is forgotten;
    what fired stays, ``over``, until those who were told know. Time in which nobody judged counts as time in which it was found."""
    after: dict[str, Standing] = {}
    for subject, value, message in findings:
        known = before.get(f"{rule.name}\x1f{subject}")
        # A clock that went back must not make what was found earlier begin later.
        since = now if known is None or known.over else min(known.since, now)
        told = () if known is None else known.told  # one that comes back before its end was told is still the same to those
        firing = now - since >= rule.hold or (known is not None and known.firing and not known.over)
        standing = Standing(rule.name, str(subject), str(rule.severity), since, float(value), str(message), firing, False, told)
        after[standing.key] = standing
    for key, known in before.items():
        if known.rule == rule.name and key not in after and known.told:
            after[key] = replace(known, over=True)
    return after


def to_tell(standing: Standing, sinks: Iterable[str], silences: Iterable[Silence], now: float) -> list[str]:
    """The sinks that must hear of it now. Silence keeps beginnings back, not ends of what was told."""
    if standing.over:
        return [sink for sink in sinks if sink in standing.told]
    if not standing.firing or any(silence.covers(standing.rule, standing.subject, now) for silence in silences):
        return []
    return [sink for sink in sinks if sink not in standing.told]
