"""For tests that run commands on the real servers: a namespace that is swept afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import create_async_engine

from inventory_sdk.ledger.schema import tables
from inventory_sdk.sync.queues import from_url


@pytest.fixture
async def swept(namespace: str, redis_url: str, amqp_url: str, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The namespace; whatever the test left under it on the servers is removed."""
    used = {"postgresql_url", "mariadb_url"} & set(request.fixturenames)
    databases = [request.getfixturevalue(name) for name in sorted(used)]  # they are gone when this is torn down
    yield namespace
    client = Redis.from_url(redis_url)
    keys = [key async for key in client.scan_iter(match=f"*{namespace}*", count=1000)]
    if keys:
        await client.delete(*keys)
    await client.aclose()
    queue = from_url(amqp_url, namespace)
    await queue.start()
    await queue.delete(0)
    await queue.close()
    for database in databases:
        engine = create_async_engine(database)
        async with engine.begin() as connection:
            await connection.run_sync(tables(f"{namespace}_").metadata.drop_all)
        await engine.dispose()
