"""``AdminApp``: the management pages as one ASGI app. Routes, life, sign-in, and the page that says no."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from inventory_sdk.errors import InvalidOperation, InventoryError, NotStarted, Overloaded
from inventory_sdk.ledger.protocol import LedgerUnavailable
from inventory_sdk.web.admin.acting import Acting
from inventory_sdk.web.admin.auth import Auth, SignsIn, TooManyTries, User
from inventory_sdk.web.admin.controllers import controllers_of
from inventory_sdk.web.admin.door import Door, root_of
from inventory_sdk.web.admin.finding import Finding
from inventory_sdk.web.admin.looking import PATIENCE, Looking
from inventory_sdk.web.admin.mending import Mending
from inventory_sdk.web.admin.passwords import LEAST_SECRET
from inventory_sdk.web.admin.patience import Patience
from inventory_sdk.web.admin.render import Renderer
from inventory_sdk.web.problem import problem

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

log = logging.getLogger("inventory_sdk.web")

STATIC: Final = Path(__file__).parent / "static"
AGAIN: Final = 5.0
"""Seconds between two attempts to start, and how long one may take."""
LONGEST_START: Final = 10.0


class AdminApp:
    """ASGI. Served alone it starts and closes the inventory and samples all the time; mounted, the app around it does the first."""

    def __init__(self, inventory: Inventory, auth: Auth) -> None:
        secret = getattr(auth, "secret", None)
        if not callable(getattr(auth, "user", None)) or not isinstance(secret, str):
            raise InvalidOperation("auth", auth, "must say who asks, such as PasswordAuth; these pages are never open")
        if len(secret) < LEAST_SECRET:
            raise InvalidOperation("auth.secret", "…", f"must have at least {LEAST_SECRET} characters")
        self._inventory = inventory
        self._auth = auth
        self._renderer = Renderer(auth, self._nav)
        self._looking = Looking(inventory)
        acting = Acting(inventory)
        finding = Finding(inventory, self._renderer, acting)
        mending = Mending(inventory, self._renderer, acting)
        routes: list[Route | Mount] = [
            Mount("/static", StaticFiles(directory=STATIC)),
            Route("/sign-in", self._sign_in_form, methods=["GET"]),
            Route("/sign-in", self._sign_in, methods=["POST"]),
            Route("/sign-out", self._sign_out, methods=["POST"]),
            Route("/", self._overview),
            Route("/overview", self._overview_part),
            *finding.routes(),
            *mending.routes(),
        ]
        handlers: Any = {HTTPException: self._http_error, InventoryError: self._refused, Exception: self._broken}
        starlette = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._life)
        self._trouble = ""
        self._door = Door(Patience(starlette, self._refuse), auth=auth, refuse=self._refuse)

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """ASGI."""
        await self._door(scope, receive, send)

    def _nav(self) -> Sequence[tuple[str, str]]:
        parts = controllers_of(self._inventory)
        pages = [
            ("/", "Overview", True),
            ("/search", "Search", True),
            ("/discrepancies", "Discrepancies", parts.reconciler is not None),
            ("/links", "Gray links", parts.gray_links is not None),
            ("/later", "Failed functions", True),
            ("/frozen", "Frozen stock", True),
            ("/triggers", "Triggers", parts.redistribution is not None),
            ("/audit", "Audit", True),
        ]
        return [(path, title) for path, title, there in pages if there]

    @asynccontextmanager
    async def _life(self, _: Starlette) -> AsyncIterator[None]:
        """A server that is away keeps the inventory from starting, not the pages: they say so, and it is tried again."""
        begun = await self._begun()
        living = asyncio.create_task(self._live(begun), name="inventory admin")
        try:
            yield
        finally:
            living.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await living

    async def _live(self, begun: bool) -> None:
        while not begun:
            await asyncio.sleep(AGAIN)
            try:
                begun = await self._begun()
            except Exception as error:
                self._trouble = f"{type(error).__name__}: {error}"
                log.exception("the inventory can't start")
        try:
            await self._looking.run()
        finally:
            await self._inventory.close()

    async def _begun(self) -> bool:
        """Whether the inventory has started. What can't pass by itself (a wrong setting) is raised."""
        try:
            async with asyncio.timeout(LONGEST_START):
                await self._inventory.start()
        except (Overloaded, RedisError, OSError, TimeoutError) as error:  # TimeoutError is an OSError: it says nothing by itself
            self._trouble = str(error) or f"no answer for {LONGEST_START:g} s"
            log.warning("the inventory can't start, and is tried again in %g s: %s", AGAIN, self._trouble)
            return False
        if self._trouble:
            log.info("the inventory has started")
        self._trouble = ""
        return True

    # The overview ------------------------------------------------------------------------------------------------------------

    async def _overview(self, request: Request) -> Response:
        live = request.query_params.get("live") != "off"
        found = await self._looking.overview()
        return self._renderer.page(request, "overview.html", overview=found, live=live, trouble=self._trouble)

    async def _overview_part(self, request: Request) -> Response:
        return self._renderer.page(request, "overview_part.html", overview=await self._looking.overview(), live=True, trouble=self._trouble)

    # Who comes and goes --------------------------------------------------------------------------------------------------------

    async def _sign_in_form(self, request: Request) -> Response:
        if not isinstance(self._auth, SignsIn):
            return self._refuse(request, 401, "Sign in first", "These pages don't know who you are.")
        return self._renderer.page(request, "sign_in.html", wrong="", name="", back=_back(request.query_params.get("next")))

    async def _sign_in(self, request: Request) -> Response:
        auth = self._auth
        if not isinstance(auth, SignsIn):
            return self._refuse(request, 401, "Sign in first", "These pages don't know who you are.")
        form: dict[str, str] = request.scope["state"]["form"]
        name, back = form.get("name", ""), _back(form.get("next"))
        address = request.client.host if request.client is not None else ""
        status, wrong, headers = 401, "That name and password don't belong together.", {}
        try:
            user = await auth.sign_in(name, form.get("password", ""), address)
        except TooManyTries as error:
            user, status, wrong, headers = None, 429, str(error), {"retry-after": f"{error.retry_after:.0f}"}
        if user is None:
            log.warning("a sign-in to the management pages failed: %r from %s", name[:128], address)
            request.scope["state"]["user"] = None
            page = self._renderer.page(request, "sign_in.html", status, wrong=wrong, name=name[:128], back=back)
            page.headers.update(headers)
            return page
        log.info("%s has signed in to the management pages from %s", user.name, address)
        await self._note_sign_in(user, address)
        root = root_of(request.scope)
        response = RedirectResponse(root + back, 303)
        auth.remember(response, user, path=root or "/", secure=request.url.scheme == "https")
        return response

    async def _note_sign_in(self, user: User, address: str) -> None:
        try:
            pages = self._inventory.ledger.pages
            async with asyncio.timeout(PATIENCE):
                await pages.end_act(await pages.begin_act(user.name, "sign_in", details={"address": address}), "done")
        except (InventoryError, TimeoutError):
            # Who can't be written down may look all the same: at a time like this that is why they come.
            log.warning("the sign-in of %s could not be written to the audit", user.name, exc_info=True)

    async def _sign_out(self, request: Request) -> Response:
        user: User = request.scope["state"]["user"]
        root = root_of(request.scope)
        response = RedirectResponse(f"{root}/sign-in" if isinstance(self._auth, SignsIn) else root or "/", 303)
        if isinstance(self._auth, SignsIn):
            self._auth.forget(response, user, path=root or "/")
        return response

    # What goes wrong -------------------------------------------------------------------------------------------------------------

    def _refuse(self, request: Request, status: int, what: str, why: str) -> Response:
        return self._renderer.page(request, "refused.html", status, what=what, why=why, status_code=status, back=None)

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = "There is no such page" if error.status_code == 404 else str(error.detail)
        return self._refuse(request, error.status_code, what, "")

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, InventoryError)
        if isinstance(error, NotStarted) and self._trouble:
            return self._refuse(request, 503, "Not connected yet", f"The inventory can't start: {self._trouble}. It is tried again.")
        if isinstance(error, LedgerUnavailable):
            why = f"{error}. The overview shows what can be seen without it."
            return self._refuse(request, 503, "The database can't be asked now", why)
        answer = problem(error)
        if answer is None:
            log.error("%s %s: %s", request.method, request.url.path, error, exc_info=error)
        return self._refuse(request, answer.status if answer is not None else 500, "That did not work", str(error))

    async def _broken(self, request: Request, error: Exception) -> Response:
        # Starlette raises it once more behind this answer, so that the server logs it.
        return self._refuse(request, 500, "Something broke", f"{type(error).__name__}. The server's log has all of it.")


def _back(path: str | None) -> str:
    """A page of ours to go to after the sign-in; anything else is the overview."""
    return path if path and path[0] == "/" and path[1:2] not in ("/", "\\") and path.isprintable() else "/"
