"""Opening and closing connections to RabbitMQ so that none is left behind, whoever goes away meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import aio_pika
from aio_pika.abc import AbstractConnection

log = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 5.0
DIAL_GRACE_SECONDS: Final = 1.0


async def dial(url: str, purpose: str, timeout: float) -> AbstractConnection:
    """A plain connection (not a robust one: that replays no publication and hides the loss); ``TimeoutError`` after
    ``timeout`` seconds. ``purpose`` is in the name that RabbitMQ's management shows."""
    properties: dict[str, Any] = {"connection_name": f"inventory_sdk {purpose}"}
    # A task of its own: cancelled at its last step, the client would leave an open connection that nobody knows.
    dialing = asyncio.create_task(aio_pika.connect(url, client_properties=properties), name="inventory-amqp-dial")
    try:
        await asyncio.wait({dialing}, timeout=timeout)
    except asyncio.CancelledError:
        await _give_up(dialing, DIAL_GRACE_SECONDS)
        raise
    if dialing.done():
        return dialing.result()
    await _give_up(dialing, 0)
    raise TimeoutError(f"no connection within {timeout:g} s")


async def _give_up(dialing: asyncio.Task[Any], grace: float) -> None:
    await asyncio.wait({dialing}, timeout=grace)
    if not dialing.done():
        dialing.cancel()
        await asyncio.wait({dialing})
    if not dialing.cancelled() and dialing.exception() is None:
        await close_connection(dialing.result())


@contextmanager
def own_cancellation_only() -> Iterator[None]:
    """aiormq ends waiting calls of a lost connection with ``CancelledError``. Whoever was not cancelled himself gets a
    ``ConnectionError`` instead: taken for a cancellation it would silently end the task."""
    task = asyncio.current_task()
    before = task.cancelling() if task else 0
    try:
        yield
    except asyncio.CancelledError as error:
        if task is None or task.cancelling() > before:
            raise
        raise ConnectionError("the connection to RabbitMQ was closed") from error


async def close_connection(connection: AbstractConnection) -> None:
    """Close it, also when the other side no longer answers."""
    try:
        with own_cancellation_only():
            async with asyncio.timeout(CLOSE_SECONDS):
                await connection.close()
    except Exception as error:  # noqa: BLE001  whatever it is, this connection is not used again
        log.debug("closing a connection to RabbitMQ: %r", error)
