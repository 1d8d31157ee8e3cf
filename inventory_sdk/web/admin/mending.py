"""What needs a person: discrepancies, gray links, later-functions that failed; and what persons did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inventory_sdk.errors import InventoryError
from inventory_sdk.web.admin.acting import Act, Acting, filled, reason, who, whole
from inventory_sdk.web.admin.controllers import GrayLinks, Reconciler, controllers_of
from inventory_sdk.web.admin.looking import fact, rows_of
from inventory_sdk.web.admin.render import Renderer

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

SIZE: Final = 50
FILTERS: Final = ("merchant", "sku", "order", "cause")


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
        answer = await self._reconciler().discrepancies(**filters, state=state, limit=SIZE, after=cursor)
        rows = rows_of(answer)
        following = rows[-1].number if len(rows) == SIZE else None
        said = await self._acting.said(request)
        return self._renderer.page(
            request, "discrepancies.html", rows=rows, filters={name: filters.get(name, "") for name in FILTERS}, state=state,
            following=following, said=said,
        )  # fmt: skip

    async def _discrepancy(self, request: Request) -> Response:
        raw = request.query_params.get("number", "")
        if not raw.isdecimal() or len(raw) > 18:
            raise HTTPException(404)
        reconciler, number = self._reconciler(), int(raw)
        proposal = await fact(lambda: reconciler.propose(number))
        said = await self._acting.said(request)
        return self._renderer.page(request, "discrepancy.html", number=number, proposal=proposal, said=said)

    async def _correct(self, request: Request) -> Response:
        reconciler, number, why = self._reconciler(), whole(request, "number"), reason(request)
        confirmed = request.scope["state"]["form"].get("confirmed") == "yes"

        async def do() -> Any:
            await reconciler.correct(number, reason=why, who=who(request).name, confirmed=confirmed)

        act = Act("correct", details={"discrepancy": number, "why": why, "confirmed": confirmed})
        return await self._acting.does(request, act, do, "/discrepancy", number=str(number))

    async def _undo(self, request: Request) -> Response:
        reconciler, number, why = self._reconciler(), whole(request, "number"), reason(request)

        async def do() -> Any:
            await reconciler.undo(number, reason=why, who=who(request).name)

        act = Act("undo_correction", details={"discrepancy": number, "why": why})
        return await self._acting.does(request, act, do, "/discrepancy", number=str(number))

    # Gray links -----------------------------------------------------------------------------------------------------------------

    def _gray(self) -> GrayLinks:
        found = controllers_of(self._inventory).gray_links
        if found is None:
            raise HTTPException(404)
        return found

    async def _links(self, request: Request) -> Response:
        gray = self._gray()
        shown: dict[str, Any] = {name: await fact(lambda name=name: gray.show(name)) for name in gray.links()}  # type: ignore[misc]
        return self._renderer.page(request, "links.html", links=shown, said=await self._acting.said(request))

    async def _link(self, request: Request) -> Response:
        gray, link = self._gray(), request.query_params.get("link", "")
        if link not in gray.links():
            raise HTTPException(404)
        shown = await fact(lambda: gray.show(link))
        history = await fact(lambda: gray.history(link, limit=SIZE))
        said = await self._acting.said(request)
        return self._renderer.page(request, "link.html", link_name=link, shown=shown, history=history, said=said)

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
        page = await pages.dead_tasks(limit=SIZE, before=before)
        pending, dead = await pages.waiting_tasks()
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
        page = await self._inventory.ledger.pages.audit(limit=SIZE, before=before)
        return self._renderer.page(request, "audit.html", page=page)
