"""Time that passes when a test says so. Holds live by the clock of Redis, and fakeredis' clock can be put forward."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.errors import InvalidOperation

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

_AHEAD: Final = "inventory_sdk_ahead"
"""Seconds that a fakeredis server is ahead of the machine's clock; an attribute of the server."""


async def advance(inventory: Inventory, seconds: float) -> None:
    """``seconds`` pass for the inventory's Redis. When it returns, holds whose time is up have expired, in the ledger too, and
    ``on("expired")`` was told. Only the scripts' clock moves: nothing else waits or ends.

    ``InvalidOperation`` on a real Redis (shorten the hold there: ``stock.extend(…, ttl=0.01)``), and for time that runs backwards.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise InvalidOperation("seconds", seconds, "must be a number of seconds, not negative")
    running = inventory._ready()
    server = await _fake_server(running.client)
    _make_movable()
    setattr(server, _AHEAD, getattr(server, _AHEAD, 0.0) + seconds)
    for partition in running.engine.partitions:
        await partition.hello()  # what a script may be sent until is counted from the time that was heard last
    if running.embedded_worker is not None:
        await running.embedded_worker.tidy()
        await inventory.settled()


async def _fake_server(client: Any) -> Any:
    try:
        from fakeredis import FakeServer
    except ImportError as error:
        raise ImportError(f"advance() needs fakeredis ({error}): pip install 'inventory_sdk[embedded]'") from error
    pool = getattr(client, "connection_pool", None)
    if pool is not None and "Fake" in pool.connection_class.__name__:
        connection = await pool.get_connection()
        try:
            server = getattr(connection, "_server", None)
        finally:
            await pool.release(connection)
        if isinstance(server, FakeServer):
            return server
    raise InvalidOperation("inventory", client, "is not on fakeredis, and a real Redis has its own time: use stock.extend(…, ttl=0.01)")


@functools.cache
def _make_movable() -> None:
    """Once per process: the command TIME of fakeredis adds how far its server is ahead, which is nothing for all others."""
    from fakeredis.commands_mixins.server_mixin import ServerCommandsMixin

    told: Any = ServerCommandsMixin.time

    @functools.wraps(told)
    def time(self: Any) -> list[bytes]:
        seconds, micros = map(int, told(self))
        ahead: float = getattr(self._server, _AHEAD, 0.0)
        moved = seconds * 1_000_000 + micros + round(ahead * 1_000_000)
        return [str(moved // 1_000_000).encode(), str(moved % 1_000_000).encode()]

    setattr(ServerCommandsMixin, "time", time)  # noqa: B010  # mypy refuses to assign a method
