"""What one would use instead: a row lock in the database, a lock in Redis, one Lua call per operation.

Each is set up as well as its own documentation allows, keeps no memory of operation ids, and checks its books at the end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.lock import Lock
from sqlalchemy import BigInteger, Column, MetaData, String, Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from benchmarks.load import Call

UNITS: Final = 10**9
SKU: Final = "hot"
POOL: Final = 64

DECREMENT: Final = """
local left = tonumber(redis.call('GET', KEYS[1]) or '0')
if left < tonumber(ARGV[1]) then return -1 end
return redis.call('DECRBY', KEYS[1], ARGV[1])
"""


class Rival:
    """``call`` sells one unit; ``sold`` counts; ``check`` says in words what does not add up."""

    def __init__(self) -> None:
        self.sold = 0

    async def call(self) -> None:
        raise NotImplementedError

    async def left(self) -> int:
        """Units that are still there."""
        raise NotImplementedError

    async def check(self) -> list[str]:
        left = await self.left()
        name = type(self).__name__
        return [] if UNITS - left == self.sold else [f"{name}: {self.sold} sold, {UNITS - left} gone"]


class RowLock(Rival):
    """SELECT … FOR UPDATE, UPDATE, a change-log row, commit: Core statements, compiled once, through a pool of 64."""

    def __init__(self, engine: AsyncEngine, name: str) -> None:
        super().__init__()
        self._engine = engine
        self.metadata = MetaData()
        self._stock = stock = Table(
            f"{name}_row", self.metadata, Column("sku", String(64), primary_key=True), Column("available", BigInteger, nullable=False)
        )
        self._log = Table(
            f"{name}_row_log",
            self.metadata,
            Column("number", BigInteger, primary_key=True, autoincrement=True),
            Column("sku", String(64), nullable=False),
            Column("operation_id", String(128), nullable=False),
            Column("quantity", BigInteger, nullable=False),
            Column("before", BigInteger, nullable=False),
            Column("after", BigInteger, nullable=False),
        )
        self._read = select(stock.c.available).where(stock.c.sku == SKU).with_for_update()

    async def create(self) -> None:
        async with self._engine.begin() as connection:
            await connection.run_sync(self.metadata.create_all)
            await connection.execute(insert(self._stock).values(sku=SKU, available=UNITS))

    async def drop(self) -> None:
        async with self._engine.begin() as connection:
            await connection.run_sync(self.metadata.drop_all)

    async def call(self) -> None:
        stock = self._stock
        async with self._engine.begin() as connection:
            before = (await connection.execute(self._read)).scalar_one()
            if before < 1:
                raise RuntimeError("sold out")
            await connection.execute(update(stock).where(stock.c.sku == SKU).values(available=before - 1))
            self.sold += 1
            row = {"sku": SKU, "operation_id": f"order-{self.sold}", "quantity": 1, "before": before, "after": before - 1}
            await connection.execute(insert(self._log), row)

    async def left(self) -> int:
        async with self._engine.connect() as connection:
            return int((await connection.execute(select(self._stock.c.available))).scalar_one())

    async def check(self) -> list[str]:
        wrong = await super().check()
        async with self._engine.connect() as connection:
            logged = len((await connection.execute(select(self._log.c.number))).all())
        return wrong if logged == self.sold else [*wrong, f"RowLock: {self.sold} sold, {logged} log rows"]


class RedisLock(Rival):
    """redis-py's Lock around GET and SET."""

    def __init__(self, client: Redis, name: str) -> None:
        super().__init__()
        self._client = client
        self._key = f"{name}:locked"
        self._lock = f"{name}:lock"

    async def create(self) -> None:
        await self._client.set(self._key, UNITS)

    async def drop(self) -> None:
        await self._client.delete(self._key, self._lock)

    async def call(self) -> None:
        client = self._client
        # Asks again every 10 ms: its default of 100 ms leaves the lock unused most of the time.
        async with Lock(client, self._lock, timeout=10, sleep=0.01):
            left = int(await client.get(self._key) or 0)
            if left < 1:
                raise RuntimeError("sold out")
            await client.set(self._key, left - 1)
            self.sold += 1

    async def left(self) -> int:
        return int(await self._client.get(self._key) or 0)


class LuaCall(Rival):
    """One EVALSHA per operation: check and decrement, nothing else."""

    def __init__(self, client: Redis, name: str) -> None:
        super().__init__()
        self._client: Any = client
        self._key = f"{name}:plain"
        self._digest = ""

    async def create(self) -> None:
        await self._client.set(self._key, UNITS)
        self._digest = await self._client.script_load(DECREMENT)

    async def drop(self) -> None:
        await self._client.delete(self._key)

    async def call(self) -> None:
        if await self._client.evalsha(self._digest, 1, self._key, 1) < 0:
            raise RuntimeError("sold out")
        self.sold += 1

    async def left(self) -> int:
        return int(await self._client.get(self._key) or 0)


@asynccontextmanager
async def row_lock(database: str, name: str) -> AsyncIterator[RowLock]:
    """On tables of its own."""
    engine = create_async_engine(database, pool_size=POOL, max_overflow=0, pool_timeout=60)
    try:
        rival = RowLock(engine, name)
        await rival.create()
        try:
            yield rival
        finally:
            await rival.drop()
    finally:
        await engine.dispose()


@asynccontextmanager
async def in_redis(url: str, name: str, kind: type[RedisLock] | type[LuaCall]) -> AsyncIterator[RedisLock | LuaCall]:
    """On keys of its own. A connection for every caller: waiting for one in redis-py's blocking pool is not fair, and takes seconds."""
    pool = ConnectionPool.from_url(url, max_connections=10_000)
    client = Redis(connection_pool=pool)
    try:
        rival = kind(client, name)
        await rival.create()
        try:
            yield rival
        finally:
            await rival.drop()
    finally:
        await client.aclose()
        await pool.disconnect()


def call_of(rival: Rival) -> Call:
    """What the callers do."""
    return rival.call
