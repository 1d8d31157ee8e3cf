"""A ground for gray links without an Inventory, on fakeredis or on a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from fakeredis import FakeAsyncRedis, FakeServer

from inventory_sdk.beside import Ground
from inventory_sdk.gray.links import GrayLinks
from inventory_sdk.gray.watch import Watch
from inventory_sdk.metrics import Event
from inventory_sdk.redis_urls import close_client
from inventory_sdk.servers import servers_for


class Record:
    """A metrics sink that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        self.events.append(event)

    def named(self, name: str) -> list[Any]:
        return [event for event in self.events if getattr(event, "name", getattr(event, "what", None)) == name]


class Places:
    """Redis servers, real or not, and clients of them as an Inventory would make them."""

    def __init__(self, redis_url: str | None) -> None:
        self.url = redis_url
        self.server = FakeServer()

    def client(self) -> Any:
        redis = FakeAsyncRedis(server=self.server) if self.url is None else self.url
        return servers_for(redis, None, None).make_client()


def ground(client: Any, namespace: str, metrics: Record, told: list[Any] | None = None) -> Ground:
    async def tell(name: str, facts: Mapping[str, Any]) -> None:
        if told is not None:
            told.append((name, facts))

    def failed(error: BaseException) -> None:
        raise error

    nothing = cast("Any", None)
    return Ground(namespace, client, nothing, nothing, nothing, nothing, metrics, tell, failed, False)


@asynccontextmanager
async def links(places: Places, namespace: str, metrics: Record | None = None, snapshot: Any = None) -> AsyncIterator[GrayLinks]:
    """Started links, as one process has them."""
    metrics = metrics or Record()
    made = GrayLinks(lambda: None, cast("Any", None), metrics, snapshot)
    client = places.client()
    try:
        await made.start(ground(client, namespace, metrics))
        try:
            yield made
        finally:
            await made.close()
    finally:
        await close_client(client)


def watch_of(made: GrayLinks) -> Watch:
    return made._watch()


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns as soon as it holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def forget(places: Places, namespace: str) -> None:
    """Remove what a namespace has in Redis."""
    client = places.client()
    keys = [key async for key in client.scan_iter(match=f"*{namespace}*")]
    if keys:
        await client.delete(*keys)
    await close_client(client)
