"""Templates: where they are, what they may call, and how a page is made of one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse

from inventory_sdk.ledger.pages import Counters
from inventory_sdk.model import SEPARATOR, Kind, split_key
from inventory_sdk.web.admin import charts
from inventory_sdk.web.admin.door import form_token, path_of, root_of
from inventory_sdk.web.admin.names import visible

if TYPE_CHECKING:
    from starlette.requests import Request

    from inventory_sdk.ledger.protocol import OperationRow
    from inventory_sdk.web.admin.auth import Auth, User

MINUTE: Final = 60
HOUR: Final = 3600
DAY: Final = 86_400
COUNTERS: Final = Counters._fields


class Renderer:
    """``nav``: (path, title) of the pages that this inventory has."""

    def __init__(self, auth: Auth, nav: Any) -> None:
        self._auth = auth
        self._nav = nav
        self._env = Environment(
            loader=PackageLoader("inventory_sdk.web.admin"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._env.filters |= {
            "name": visible,
            "at": moment,
            "ago": ago,
            "count": count,
            "signed": signed,
            "document": document,
            "brief": brief,
            "told": told,
            "moves": moves,
        }
        self._env.globals |= {"chart": charts, "split": split_key, "separator": SEPARATOR}

    def page(self, request: Request, template: str, status: int = 200, **facts: Any) -> HTMLResponse:
        """``template`` with what every page has: who asks, where links go, the token of its forms."""
        user: User | None = request.scope.get("state", {}).get("user")
        root = root_of(request.scope)

        def link(path: str, **query: Any) -> str:
            asked = {name: value for name, value in query.items() if value not in (None, "")}
            return root + path + (f"?{urlencode(asked)}" if asked else "")

        body = self._env.get_template(template).render(
            user=user,
            here=path_of(request.scope),
            nav=self._nav() if user is not None else (),
            link=link,
            token=form_token(self._auth, user) if user is not None else "",
            **facts,
        )
        return HTMLResponse(body, status)


def moment(at_ms: int) -> str:
    """UTC to the millisecond: what a log has."""
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    except (ValueError, OverflowError, OSError):
        return str(at_ms)


def ago(seconds: float | None) -> str:
    """``3.2 s``, ``4 min``, ``7 h``, ``12 days``."""
    if seconds is None:
        return "never"
    if seconds < MINUTE:
        return f"{max(seconds, 0):.1f} s" if seconds >= 0.05 else "0 s"
    for limit, size, unit in ((HOUR, MINUTE, "min"), (2 * DAY, HOUR, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / DAY:.0f} days"


def count(number: float) -> str:
    """1234567 as ``1 234 567``, with spaces that don't break."""
    return f"{number:,}".replace(",", "\u202f")


def signed(number: int) -> str:
    """``+3``, ``−2``, ``0``."""
    return f"+{count(number)}" if number > 0 else f"\u2212{count(-number)}" if number < 0 else "0"


def moves(row: OperationRow) -> list[tuple[str, str, str]]:
    """(merchant, sku, how many) of an operation's lines; where they are deltas of Redis (``void``, ``correct``), that of available."""
    deltas = row.kind in (Kind.VOID, Kind.CORRECT)
    step = 3 if deltas else 2
    flat = row.lines
    return [(*split_key(flat[at]), signed(flat[at + 1]) if deltas else count(flat[at + 1])) for at in range(0, len(flat), step)]


def document(value: Any) -> Any:
    """Anything a controller answers as plain dicts, lists and text, for the templates to lay out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: document(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {visible(str(key)): document(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [document(each) for each in value]
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return round(value, 3)
    if value is None or isinstance(value, bool | int):
        return value
    return visible(str(value))


def told(evidence: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison's evidence with its numbers named: it has balances as plain lists, and operations by their keys."""
    return {name: _named(value) for name, value in evidence.items()}


def _named(value: Any) -> Any:
    if isinstance(value, Mapping):
        parts: dict[str, Any] = {}
        for name, each in value.items():
            if name == "operation" and isinstance(each, str) and SEPARATOR in each:
                parts["merchant"], parts[name] = split_key(each)
            else:
                parts[name] = _named(each)
        return parts
    if isinstance(value, list | tuple):
        if len(value) in (2, len(COUNTERS)) and all(type(each) is int for each in value):
            return dict(zip(COUNTERS, value, strict=False))
        return [_named(each) for each in value]
    return value


def brief(value: Any) -> str:
    """What ``document`` made, in a few words for a cell of a table: ``m1, m2``, ``region: eu``, ``yes``, ``none``."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {brief(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(brief, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def pretty(text: str) -> str:
    """JSON as a person reads it; anything else as it is."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except ValueError:
        return text
