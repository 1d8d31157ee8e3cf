from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from shop.api import app
from shop.database import get_session
from shop.models import Base, Product, Stock, StockChange
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

PRODUCTS = {"mug": 5, "tee": 2}


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/shop.db"


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(database)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with AsyncSession(engine) as session, session.begin():
        session.add_all(Product(id=product_id, name=product_id.title(), cents=1200) for product_id in PRODUCTS)
        await session.flush()
        session.add_all(Stock(product_id=product_id, available=units) for product_id, units in PRODUCTS.items())
    yield engine
    await engine.dispose()


@pytest.fixture
async def client(engine: AsyncEngine) -> AsyncIterator[httpx.AsyncClient]:
    sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def session() -> AsyncIterator[AsyncSession]:
        async with sessions() as session, session.begin():
            yield session

    app.dependency_overrides[get_session] = session
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        yield client
    app.dependency_overrides.clear()


class Books:
    """What the shop's own tables say."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine

    async def stock(self, product_id: str) -> tuple[int, int, int]:
        """Available, reserved, sold."""
        async with AsyncSession(self.engine) as session:
            row = await session.get_one(Stock, product_id)
            return row.available, row.reserved, row.sold

    async def changes(self, product_id: str) -> list[tuple[str, str, int]]:
        async with AsyncSession(self.engine) as session:
            query = select(StockChange).where(StockChange.product_id == product_id).order_by(StockChange.id)
            return [(row.what, row.reference, row.quantity) for row in await session.scalars(query)]


@pytest.fixture
def books(engine: AsyncEngine) -> Books:
    return Books(engine)
