"""The database, and the session of a request."""

import os
from collections.abc import AsyncIterator

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

engine = create_async_engine(os.environ.get("SHOP_DATABASE_URL", "postgresql+asyncpg://shop@127.0.0.1/shop"))
sessions = async_sessionmaker(engine, expire_on_commit=False)


async def get_session() -> AsyncIterator[AsyncSession]:
    """One transaction per request: committed when the endpoint has returned, rolled back when it raised."""
    async with sessions() as session, session.begin():
        yield session
