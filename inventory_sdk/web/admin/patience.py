"""How long a page may take: behind the door, before the pages. Whatever a server that hangs does to them, the browser gets an answer."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any, Final

from starlette.requests import Request

from inventory_sdk.web.admin.door import App, Receive, Refuse, Scope, Send

LONGEST_LOOK: Final = 10.0
"""Seconds for a page. The facts of one that shows several wait for less, each by itself."""
LONGEST_SENT: Final = 60.0
"""Seconds for what a form asks for."""


class Patience:
    """ASGI middleware."""

    def __init__(self, app: App, refuse: Refuse) -> None:
        self.app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        looks = scope["method"] in ("GET", "HEAD")
        limit = asyncio.timeout(LONGEST_LOOK if looks else LONGEST_SENT)
        try:
            async with limit:
                await self.app(scope, receive, noted)
        except TimeoutError:
            if begun or not limit.expired():
                raise
            why = "Something that it needs does not answer."
            if not looks:
                why += " Whether it was done is not known: the audit has it as begun, and its page shows how things stand."
            await self._refuse(Request(scope, receive), 503, "That took too long", why)(scope, receive, send)
