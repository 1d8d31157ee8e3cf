"""The decision: which side of a link a merchant is on. A pure function of the rules, the same in every process and language.

    bucket = first 8 bytes of SHA-256(UTF-8 of link ␟ merchant) as a big-endian number, modulo 10,000     (␟ is U+001F)

A merchant is on the candidate by percentage when its bucket is below percentage × 100. So each bucket is 0.01 %, raising the
percentage never moves a merchant back, and the link's name in the hash makes the cohorts of two links independent.

The first that applies decides: killed → stable; denied (or taken back by the guard) → stable; allowed → candidate; pinned (exposed
before, with ``keep_exposed``) → candidate; bucket below the percentage, with attributes that fit → candidate; else stable.
``tests/gray_vectors.json`` has cases for other languages.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from hashlib import sha256
from typing import Any, Final, NamedTuple

from inventory_sdk.context import Side
from inventory_sdk.gray.rules import STEPS, Rules

STABLE: Final = "stable"
CANDIDATE: Final = "candidate"
VARIANTS: Final = (STABLE, CANDIDATE)


class Decision(NamedTuple):
    """``reason``: killed, denied, allowed, pinned, percentage, or stable (nothing else applied); carried: decided where the request came
    from; unknown: no rules are known; no_merchant: nobody named one."""

    variant: str
    version: int
    reason: str


def bucket(link: str, merchant: str) -> int:
    """0 to 9,999."""
    return int.from_bytes(sha256(f"{link}\x1f{merchant}".encode()).digest()[:8], "big") % STEPS


class Decider:
    """One version of a link's rules, ready for many decisions.

    ``exposed``: merchants whom the percentage has reached once (asked with ``keep_exposed`` only). ``attributes``: what a merchant is
    like, asked where the rules have ``where``.
    """

    __slots__ = ("_allow", "_deny", "_exposed", "_prefix", "_steps", "_where", "answers", "attributes", "rules", "sides", "version")

    def __init__(
        self, rules: Rules, exposed: Container[str] = (), attributes: Callable[[str], Mapping[str, Any]] = lambda merchant: {}
    ) -> None:
        self.rules = rules
        self.version = rules.version
        self.attributes = attributes
        self._allow = frozenset(rules.allow)
        self._deny = frozenset((*rules.deny, *rules.taken_back))
        self._exposed = exposed if rules.keep_exposed else ()
        self._prefix = f"{rules.link}\x1f".encode()
        self._steps = rules.steps
        self._where = [(name, frozenset(values)) for name, values in rules.where.items()]
        self.answers = {
            reason: Decision(CANDIDATE if reason in ("allowed", "pinned", "percentage") else STABLE, rules.version, reason)
            for reason in ("killed", "denied", "allowed", "pinned", "percentage", "stable")
        }
        self.sides = {variant: Side(variant, rules.version) for variant in VARIANTS}

    def __call__(self, merchant: str) -> Decision:
        """Where the merchant is, and why."""
        return self.answers[self._reason(merchant)]

    def stops(self, merchant: str) -> bool:
        """Whether nothing that was decided before may put the merchant on the candidate."""
        return self.rules.killed or merchant in self._deny

    def _reason(self, merchant: str) -> str:
        if self.rules.killed:
            return "killed"
        if merchant in self._deny:
            return "denied"
        if merchant in self._allow:
            return "allowed"
        if merchant in self._exposed:
            return "pinned"
        steps = self._steps
        # bucket(), with the link's half made once.
        if steps and int.from_bytes(sha256(self._prefix + merchant.encode()).digest()[:8], "big") % STEPS < steps and self._fits(merchant):
            return "percentage"
        return "stable"

    def _fits(self, merchant: str) -> bool:
        if not self._where:
            return True
        known = self.attributes(merchant)
        return all(str(known.get(name, "")) in values for name, values in self._where)
