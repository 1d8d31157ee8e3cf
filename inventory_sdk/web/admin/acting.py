"""What people do here: written down before it is done, and again when its outcome is known."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from inventory_sdk.errors import InvalidOperation, InventoryError, Overloaded
from inventory_sdk.ledger.protocol import LedgerUnavailable
from inventory_sdk.web.admin.door import root_of
from inventory_sdk.web.admin.looking import PATIENCE, fact

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory
    from inventory_sdk.ledger.pages import AuditRow
    from inventory_sdk.web.admin.auth import User

log = logging.getLogger("inventory_sdk.web")

LONGEST_REASON: Final = 500
LONGEST_ACT: Final = 40.0
"""Seconds. Reopening waits for the worker, for half a minute at most."""


@dataclass(frozen=True, slots=True)
class Act:
    """What is about to be done, for the audit."""

    kind: str
    merchant: str = ""
    sku: str = ""
    operation_id: str = ""
    details: Mapping[str, object] = field(default_factory=dict)


class Acting:
    """Does what a form asks for, and sends the browser to the page that says what became of it."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    async def does(self, request: Request, act: Act, do: Callable[[], Awaitable[Any]], back: str, **query: str) -> Response:
        """The row is committed before ``do`` begins. Cancelled or killed in between, it goes on saying ``begun``: nobody knows more."""
        pages = self._inventory.ledger.pages
        number = await self._begun(who(request).name, act)
        limit = asyncio.timeout(LONGEST_ACT)
        try:
            async with limit:
                said = await do()
            outcome = f"done: {said}" if isinstance(said, str) else "done"
        except TimeoutError as error:
            ours = f"unknown: it did not end within {LONGEST_ACT:g} s, and may have been done all the same"
            outcome = ours if limit.expired() else f"failed: {type(error).__name__}: {error}"
        except InventoryError as error:
            outcome = f"failed: {error}"
        except Exception as error:
            log.exception("%s by %s failed", act.kind, who(request).name)
            outcome = f"failed: {type(error).__name__}: {error}"
        try:
            await pages.end_act(number, outcome)
        except InventoryError as error:
            raise InventoryError(f"{act.kind}: {outcome}; but the audit's row {number} could not be completed: {error}") from error
        asked = urlencode({**{name: value for name, value in query.items() if value}, "said": number})
        return RedirectResponse(f"{root_of(request.scope)}{back}?{asked}", 303)

    async def _begun(self, name: str, act: Act) -> int:
        """The number of the audit's row; ``Overloaded`` where it could not be written: then nothing is done."""
        why = "nothing was done, since it could not be written into the audit first: "
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._inventory.ledger.pages.begin_act(
                    name, act.kind, merchant=act.merchant, sku=act.sku, operation_id=act.operation_id, details=act.details
                )
        except TimeoutError as error:
            raise Overloaded(f"{why}the database gave no answer for {PATIENCE:g} s") from error
        except LedgerUnavailable as error:
            raise Overloaded(f"{why}{error}") from error

    async def said(self, request: Request) -> AuditRow | None:
        """What the page before this one did, for the head of this one: only one's own."""
        raw = request.query_params.get("said", "")
        if not raw.isdecimal() or len(raw) > 18:
            return None
        found = await fact(lambda: self._inventory.ledger.pages.audit(limit=1, before=int(raw) + 1))
        rows = found.value.rows if found.value is not None else ()
        return rows[0] if rows and rows[0].number == int(raw) and rows[0].actor == who(request).name else None


def who(request: Request) -> User:
    """The person behind a request that has passed the door."""
    user: User = request.scope["state"]["user"]
    return user


def filled(request: Request, name: str, longest: int = 1024) -> str:
    """A field of the form that must be there; ``InvalidOperation``."""
    form: dict[str, str] = request.scope["state"]["form"]
    value = form.get(name, "").strip()
    if not value or len(value) > longest:
        raise InvalidOperation(name, value, f"must be filled in, with at most {longest} characters")
    return value


def reason(request: Request) -> str:
    """Why somebody does this: required of every act."""
    return filled(request, "why", LONGEST_REASON)


def whole(request: Request, name: str, signed: bool = False) -> int:
    """A number in the form."""
    value = filled(request, name, 18)
    digits = value[1:] if signed and value[0] == "-" else value
    if not (digits.isascii() and digits.isdecimal()):
        raise InvalidOperation(name, value, "must be a whole number")
    return int(value)
