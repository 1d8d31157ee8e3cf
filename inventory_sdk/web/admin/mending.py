"""What needs a person: discrepancies, gray links, later-functions that failed; and what persons did."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from inventory_sdk.errors import InvalidOperation, InventoryError
from inventory_sdk.ledger.register import AnotherState
from inventory_sdk.web.admin.acting import Act, Acting, filled, reason, who, whole
from inventory_sdk.web.admin.controllers import GrayLinks, Reconciler, controllers_of
from inventory_sdk.web.admin.door import root_of
from inventory_sdk.web.admin.looking import Fact, fact, of_ledger
from inventory_sdk.web.admin.render import Renderer

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

SIZE: Final = 50
FILTERS: Final = ("merchant", "sku", "order", "cause")
STATES: Final = ("open", "corrected", "undone", "gone")
CAUSES: Final = {
    "went_back": ("Redis went back", "Redis does not remember operations that the ledger has, and their units are the difference."),
    "service_table": ("Service’s table written directly", "Redis and ledger agree; the service’s own table was changed past the SDK."),
    "missing_journal": (
        "Journal entries missing",
        "Entries below the watermark left nothing in the ledger; what they moved is the difference.",
    ),
    "rejected": ("Refused, not taken back", "The ledger refused an accepted operation, and what takes it back never reached Redis."),
    "expiry_lost": ("Expiry lost", "A reservation in Redis that nothing will end: it is not in the list of those that run out."),
    "manual_redis": ("Changed by hand in Redis", "Nothing that was journaled explains the difference."),
    "ledger_books": ("Ledger changed past its rows", "The ledger’s own books don’t close: a row was changed past its change rows."),
}
"""By the reconciler's word: what a cause is called, and what it means."""


class Mending:
    """Pages and forms; a page whose controller the inventory lacks is not there."""

    def __init__(self, inventory: Inventory, renderer: Renderer, acting: Acting) -> None:
        self._inventory = inventory
        self._renderer = renderer
        self._acting = acting

    def routes(self) -> list[Route]:
        return [
            Route("/discrepancies", self._discrepancies),
            Route("/discrepancy", self._discrepancy),
            Route("/discrepancy/correct", self._correct, methods=["POST"]),
            Route("/discrepancy/undo", self._undo, methods=["POST"]),
            Route("/links", self._links),
            Route("/link", self._link),
            Route("/link/kill", self._kill, methods=["POST"]),
            Route("/link/restore", self._restore, methods=["POST"]),
            Route("/later", self._later),
            Route("/later/retry", self._retry, methods=["POST"]),
            Route("/triggers", self._triggers),
            Route("/audit", self._audit),
        ]

    # Discrepancies --------------------------------------------------------------------------------------------------------------

    def _reconciler(self) -> Reconciler:
        found = controllers_of(self._inventory).reconciler
        if found is None:
            raise HTTPException(404)
        return found

    async def _discrepancies(self, request: Request) -> Response:
        asked = request.query_params
        filters = {name: asked[name].strip() for name in FILTERS if asked.get(name, "").strip()}
        state = asked.get("state", "open")
        after = asked.get("after", "")
        cursor = int(after) if after.isdecimal() and len(after) <= 18 else None
        reconciler = self._reconciler()
        rows = await of_ledger(lambda: reconciler.discrepancies(**filters, state=state, limit=SIZE, after=cursor))
        return self._renderer.page(
            request,
            "discrepancies.html",
            rows=rows,
            filters={name: filters.get(name, "") for name in FILTERS},
            state=state,
            states=STATES,
            causes=CAUSES,
            following=rows[-1].number if len(rows) == SIZE else None,
        )

    async def _discrepancy(self, request: Request) -> Response:
        raw = request.query_params.get("number", "")
        if not raw.isdecimal() or len(raw) > 18:
            raise HTTPException(404)
        reconciler, number = self._reconciler(), int(raw)
        try:
            found = await of_ledger(lambda: reconciler.discrepancy(number))
        except InvalidOperation:
            raise HTTPException(404) from None
        proposal: Fact[Any] = Fact(None)
        if found.state in ("open", "correcting"):
            proposal = await fact(lambda: reconciler.propose(number))
        return self._renderer.page(request, "discrepancy.html", found=found, proposal=proposal, causes=CAUSES)

    async def _correct(self, request: Request) -> Response:
        # Not through Acting: the reconciler writes the act down in the transaction that begins it. What it refuses, it says.
        reconciler, number, why = self._reconciler(), whole(request, "number"), reason(request)
        confirmed = request.scope["state"]["form"].get("confirmed") == "yes"
        seen = whole(request, "available", signed=True), whole(request, "reserved", signed=True)
        try:
            would = await reconciler.propose(number)
            if would.why_not or (would.available, would.reserved) == seen:
                await reconciler.correct(number, reason=why, who=who(request).name, confirmed=confirmed)
            elif not await self._begun(number):
                return self._seen_otherwise(request, number)
        except AnotherState:
            pass  # the form was sent twice, or somebody was faster: the page says who
        except InvalidOperation:
            if not await self._begun(number):
                raise
        return RedirectResponse(f"{root_of(request.scope)}/discrepancy?number={number}", 303)

    async def _begun(self, number: int) -> bool:
        """Somebody has corrected it, or is about to: what this one found was in the middle of that."""
        return (await self._reconciler().discrepancy(number)).state in ("correcting", "corrected")

    async def _undo(self, request: Request) -> Response:
        number, why = whole(request, "number"), reason(request)
        with contextlib.suppress(AnotherState):
            await self._reconciler().undo(number, reason=why, who=who(request).name)
        return RedirectResponse(f"{root_of(request.scope)}/discrepancy?number={number}", 303)

    def _seen_otherwise(self, request: Request, number: int) -> Response:
        """A person confirms what stood on the page, not what has become of it."""
        what, why = (
            "Nothing was done",
            f"Discrepancy {number} is not what it was: it has changed since you looked. Look again, then decide.",
        )
        back = ("/discrepancy", {"number": number}, f"To discrepancy {number}")
        return self._renderer.page(request, "refused.html", 409, what=what, why=why, status_code=409, back=back)

    # Gray links -----------------------------------------------------------------------------------------------------------------

    def _gray(self) -> GrayLinks:
        found = controllers_of(self._inventory).gray_links
        if found is None:
            raise HTTPException(404)
        return found

    async def _links(self, request: Request) -> Response:
        gray = self._gray()
        names = gray.links()
        links = dict(zip(names, await asyncio.gather(*[self._rules(gray, name) for name in names]), strict=True))
        return self._renderer.page(request, "links.html", links=links)

    async def _rules(self, gray: GrayLinks, link: str) -> tuple[Any, str]:
        """The rules as they stand, or those that this process goes by and why it can't ask."""
        shown = await fact(lambda: gray.show(link))
        return (gray.known(link), shown.trouble) if shown.trouble else (shown.value, "")

    async def _link(self, request: Request) -> Response:
        gray, link = self._gray(), request.query_params.get("link", "")
        if link not in gray.links():
            raise HTTPException(404)
        (rules, trouble), history = await asyncio.gather(self._rules(gray, link), fact(lambda: gray.history(link, limit=SIZE)))
        said = await self._acting.said(request)
        return self._renderer.page(request, "link.html", rules=rules, trouble=trouble, history=history, said=said)

    async def _kill(self, request: Request) -> Response:
        gray, link, why = self._gray(), filled(request, "link"), reason(request)

        async def do() -> str:
            await gray.kill(link, who=who(request).name, why=why)
            return "nobody takes the new way any more"

        return await self._acting.does(request, Act("kill", details={"link": link, "why": why}), do, "/link", link=link)

    async def _restore(self, request: Request) -> Response:
        gray, link, why = self._gray(), filled(request, "link"), reason(request)

        async def do() -> str:
            await gray.restore(link, who=who(request).name, why=why)
            return "its rules count again"

        return await self._acting.does(request, Act("restore", details={"link": link, "why": why}), do, "/link", link=link)

    # Later-functions ---------------------------------------------------------------------------------------------------------------

    async def _later(self, request: Request) -> Response:
        pages = self._inventory.ledger.pages
        raw = request.query_params.get("before", "")
        before = int(raw) if raw.isdecimal() and len(raw) <= 18 else None
        page = await of_ledger(lambda: pages.dead_tasks(limit=SIZE, before=before))
        pending, dead = await of_ledger(pages.waiting_tasks)
        said = await self._acting.said(request)
        return self._renderer.page(request, "later.html", page=page, pending=pending, dead=dead, said=said)

    async def _retry(self, request: Request) -> Response:
        pages, number, why = self._inventory.ledger.pages, whole(request, "number"), reason(request)
        form: Mapping[str, str] = request.scope["state"]["form"]

        async def do() -> str:
            if not await pages.retry_task(number):
                raise InventoryError(f"task {number} is not waiting for a person: somebody has retried it, or it was done")
            return "it is due now; a worker runs it, and if it fails again it comes back here"

        act = Act("retry", merchant=form.get("merchant", "")[:128], details={"task": number, "why": why})
        return await self._acting.does(request, act, do, "/later")

    # Numbers, and what was done ----------------------------------------------------------------------------------------------------

    async def _triggers(self, request: Request) -> Response:
        redistribution = controllers_of(self._inventory).redistribution
        if redistribution is None:
            raise HTTPException(404)
        rows = sorted(redistribution.triggers(), key=lambda row: -float(getattr(row, "cpu_seconds", 0.0)))
        return self._renderer.page(request, "triggers.html", rows=rows)

    async def _audit(self, request: Request) -> Response:
        raw = request.query_params.get("before", "")
        before = int(raw) if raw.isdecimal() and len(raw) <= 18 else None
        page = await of_ledger(lambda: self._inventory.ledger.pages.audit(limit=SIZE, before=before))
        return self._renderer.page(request, "audit.html", page=page)
