"""The rules of a link as plain data, and the door at which bad ones are refused.

A link has one document, which only ever is replaced by a newer version of itself:

    {"format": 1, "link": "fast-allocation", "version": 7, "percentage": 12.5, "killed": false, "paused": false,
     "keep_exposed": false, "allow": ["m1"], "deny": [], "taken_back": [], "where": {"region": ["eu"]}, "guard": {…} or null}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from decimal import Decimal
from typing import Any, Final

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import check_text

FORMAT: Final = 1
STEPS: Final = 10_000
"""Steps of 0.01 % in the whole."""
MAX_MERCHANTS: Final = 10_000
"""In each of the two lists."""
MAX_VALUES: Final = 1_000
MAX_TEXT: Final = 500
MAX_VERSION: Final = 10**15 - 1
LINK: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Guard:
    """When a candidate is taken back by itself. Both sides are compared over the same ``interval`` (seconds), once each has had
    ``minimum_samples`` calls; until then the rollout is paused.

    Too many errors: a share above ``error_floor`` and above ``error_ratio`` times the stable side's. Too slow: a mean time above
    ``latency_ratio`` times the stable side's. A merchant that fails is taken back alone; after ``max_merchants`` of them, or when the
    others together fail, the whole link is.
    """

    interval: float = 60.0
    minimum_samples: int = 100
    error_ratio: float = 2.0
    error_floor: float = 0.01
    latency_ratio: float = 1.5
    max_merchants: int = 3


@dataclass(frozen=True, slots=True)
class Rules:
    """One version of a link's rules. ``percentage``: 0 to 100 in steps of 0.01, of the merchants that fit ``where`` (attribute →
    allowed values; empty: all). ``killed``: stable for everybody, at once. ``paused``: the percentage may not be raised.
    ``keep_exposed``: a merchant whom the percentage has once reached stays on the candidate when it is lowered. ``version`` 0: nobody
    has ever set it. ``taken_back``: whom the guard denied."""

    link: str
    version: int = 0
    percentage: float = 0.0
    killed: bool = False
    paused: bool = False
    keep_exposed: bool = False
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    taken_back: tuple[str, ...] = ()
    where: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    guard: Guard | None = None

    @property
    def steps(self) -> int:
        """The percentage in steps of 0.01 %."""
        return round(self.percentage * 100)

    def document(self) -> dict[str, Any]:
        """JSON-able, as it is stored."""
        return {"format": FORMAT, **asdict(self)}

    def text(self) -> str:
        """The document as it is stored."""
        return json.dumps(self.document(), separators=(",", ":"), ensure_ascii=False)


CHANGEABLE: Final = frozenset(each.name for each in fields(Rules)) - {"link", "version"}


def check_link(name: object) -> str:
    """The name, if it can be one: it travels in headers and in keys."""
    if not isinstance(name, str) or not LINK.fullmatch(name):
        raise InvalidOperation("link", name, "must be 1 to 64 of a–z, 0–9, '.', '_' and '-', and begin with a letter or digit")
    return name


def changed(rules: Rules, **changes: Any) -> Rules:
    """The next rules, checked, still with the old version. ``InvalidOperation`` names the field that can't be."""
    made: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in CHANGEABLE:
            raise InvalidOperation("change", name, f"is not a field of the rules; there are {', '.join(sorted(CHANGEABLE))}")
        made[name] = _CHECKS[name](name, value)
    found = replace(rules, **made)
    both = set(found.allow) & set(found.deny)
    if both:
        raise InvalidOperation("allow", min(both), "is denied as well: take it from one of the two lists")
    if found.steps > rules.steps and rules.paused and found.paused:
        why = f"is more than {rules.percentage:g}, and the rollout is paused: see its history, and say paused=False if it may go on"
        raise InvalidOperation("percentage", found.percentage, why)
    return found


def read(text: str | bytes) -> Rules:
    """The rules behind a stored document; ``InvalidOperation`` for any that this release would not have stored."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise InvalidOperation("rules", text[:100], f"are not JSON: {error}") from error
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise InvalidOperation("format", raw.get("format") if isinstance(raw, dict) else raw, f"of the rules must be {FORMAT}")
    link = check_link(raw.pop("link", None))
    version = raw.pop("version", None)
    if type(version) is not int or not 1 <= version <= MAX_VERSION:
        raise InvalidOperation("version", version, "must be a whole number from 1")
    return changed(Rules(link, version), **raw)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidOperation(name, value, "must be true or false")
    return value


def _percentage(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not 0 <= value <= 100:
        raise InvalidOperation(name, value, "must be a number from 0 to 100")
    steps = round(value * 100)
    if abs(float(value) * 100 - steps) > 1e-6:
        raise InvalidOperation(name, value, "must be in steps of 0.01")
    return steps / 100


def _merchants(name: str, value: object) -> tuple[str, ...]:
    found = _texts(name, value)
    if len(found) > MAX_MERCHANTS:
        raise InvalidOperation(name, f"{len(found)} merchants", f"must be at most {MAX_MERCHANTS}: use where= with an attribute")
    return found


def _texts(name: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InvalidOperation(name, value, "must be a list of names")
    return tuple(sorted({check_text(name, each) for each in value}))


def _where(name: str, value: object) -> dict[str, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        raise InvalidOperation(name, value, "must be attributes and their allowed values, such as {'region': ['eu']}")
    made = {check_text(name, key): _texts(f"{name}[{key!r}]", values) for key, values in sorted(value.items())}
    if sum(map(len, made.values())) > MAX_VALUES:
        raise InvalidOperation(name, f"{sum(map(len, made.values()))} values", f"must be at most {MAX_VALUES}")
    return made


def _guard(name: str, value: object) -> Guard | None:
    if value is None:
        return None
    if isinstance(value, Guard):
        value = asdict(value)
    known = {each.name for each in fields(Guard)}
    if not isinstance(value, Mapping) or not set(value) <= known:
        raise InvalidOperation(name, value, f"must be a Guard, or a mapping of {', '.join(sorted(known))}")
    guard = Guard(**value)
    for key, low, high in (
        ("interval", 1.0, 86_400.0),
        ("minimum_samples", 1, 10**9),
        ("error_ratio", 1.0, 1e6),
        ("error_floor", 0.0, 1.0),
        ("latency_ratio", 1.0, 1e6),
        ("max_merchants", 1, MAX_MERCHANTS),
    ):
        given = getattr(guard, key)
        whole = isinstance(low, int)
        if isinstance(given, bool) or not isinstance(given, int if whole else int | float) or not low <= given <= high:
            kind = "a whole number" if whole else "a number"
            raise InvalidOperation(f"guard.{key}", given, f"must be {kind} from {low:g} to {high:g}")
    return guard


_CHECKS: Final[Mapping[str, Any]] = {
    "percentage": _percentage,
    "killed": _flag,
    "paused": _flag,
    "keep_exposed": _flag,
    "allow": _merchants,
    "deny": _merchants,
    "taken_back": _merchants,
    "where": _where,
    "guard": _guard,
}


def check_note(name: str, value: object) -> str:
    """Who did it, or why: every change has both."""
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_TEXT:
        raise InvalidOperation(name, value, f"must be a text of 1 to {MAX_TEXT} characters: the history has to say it")
    return value.strip()


def difference(old: Rules, new: Rules) -> dict[str, list[Any]]:
    """What changed: field → [before, after], JSON-able."""
    before, after = old.document(), new.document()
    return {name: [before[name], after[name]] for name in sorted(CHANGEABLE) if before[name] != after[name]}
