"""The inventory's life around an app's: started before the app starts, closed after it has ended."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

log = logging.getLogger("inventory_sdk.web")


class Living(Protocol):
    """What is started and closed."""

    async def start(self) -> None: ...
    async def close(self) -> None: ...


async def serve_lifespan(
    app: Callable[[Any, Any, Any], Awaitable[None]], inventory: Living, scope: Any, receive: Receive, send: Send
) -> None:
    """One lifespan. An app that doesn't know lifespans is served one; an inventory that can't start or close is told to the server."""
    first = await receive()
    try:
        await inventory.start()
    except Exception as error:
        log.exception("the inventory could not be started")
        await send({"type": "lifespan.startup.failed", "message": f"the inventory could not be started: {error}"})
        return
    life = _Life(inventory, first, receive, send)
    try:
        await app(scope, life.receive, life.send)
    except Exception:
        if life.asked:
            raise
        log.debug("the app does not serve lifespans", exc_info=True)
        await _serve_alone(life, receive, send)
    finally:
        await life.close()


class _Life:
    def __init__(self, inventory: Living, first: Message, receive: Receive, send: Send) -> None:
        self._inventory = inventory
        self._first: Message | None = first
        self._receive = receive
        self._send = send
        self._open = True

    @property
    def asked(self) -> bool:
        """Has the app asked for a message?"""
        return self._first is None

    async def receive(self) -> Message:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await self._receive()

    async def send(self, message: Message) -> None:
        if message["type"] == "lifespan.shutdown.complete":
            try:
                await self.close()
            except Exception as error:
                log.exception("the inventory could not be closed")
                message = {"type": "lifespan.shutdown.failed", "message": f"the inventory could not be closed: {error}"}
        await self._send(message)

    async def close(self) -> None:
        if self._open:
            self._open = False
            await self._inventory.close()


async def _serve_alone(life: _Life, receive: Receive, send: Send) -> None:
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await life.send({"type": "lifespan.shutdown.complete"})
