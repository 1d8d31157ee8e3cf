"""A ledger with later-functions to run, and the tables of a service that they write to."""

from __future__ import annotations

import json
from collections import Counter

from sqlalchemy import BigInteger, Column, Integer, MetaData, String, Table, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk.ledger.protocol import Task
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.model import key_of


class Desk:
    """A ledger with tasks, and the service's own tables: a hot row, and a note for each effect."""

    def __init__(self, database: str, namespace: str) -> None:
        self.database = database
        self.ledger = SqlLedger(database, prefix=f"{namespace}_")
        self.own = MetaData()
        self.stock = Table(f"{namespace}_own", self.own, Column("sku", String(64), primary_key=True), Column("left", BigInteger))
        self.notes = Table(
            f"{namespace}_notes",
            self.own,
            Column("number", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
            Column("task", String(64), nullable=False),
        )

    async def start(self) -> None:
        await self.ledger.start()
        async with self.ledger.engine.begin() as connection:
            await connection.run_sync(self.ledger.tables.task.create)
            await connection.run_sync(self.own.create_all)
            await connection.execute(insert(self.stock), [{"sku": sku, "left": 1000} for sku in ("hot", "cold")])

    async def close(self) -> None:
        async with self.ledger.engine.begin() as connection:
            await connection.run_sync(self.own.drop_all)
            await connection.run_sync(self.ledger.tables.metadata.drop_all)
        await self.ledger.close()

    async def put(self, *names: str, order: str = "", sku: str = "hot") -> list[Task]:
        """Pending tasks, one operation of one unit each."""
        async with self.ledger.engine.begin() as connection:
            for name in names:
                receipt = {
                    "kind": "deduct",
                    "merchant": "m",
                    "operation_id": name,
                    "order": order or None,
                    "lines": [key_of("m", sku), 1],
                    "remaining": [5],
                    "position": [0, 1, 1],
                }
                row = {"partition": 0, "epoch": 1, "seq": 1, "index": 0, "name": "write", "version": 1, "arguments": "{}"}
                row |= {"merchant": "m", "group_id": order or name, "operation_id": name, "receipt": json.dumps(receipt)}
                row |= {"attempts": 0, "due_ms": 0, "state": "pending", "route": ""}
                await connection.execute(insert(self.ledger.tables.task).values(**row))
        return await self.ledger.due_tasks(1000)

    async def write(self, task: Task, session: AsyncSession) -> None:
        """What a function does."""
        await session.execute(update(self.stock).where(self.stock.c.sku == "hot").values(left=self.stock.c.left - 1))
        await session.execute(insert(self.notes).values(task=task.operation_id))

    async def effects(self) -> Counter[str]:
        """How often each function's writes are there; the hot row must say the same."""
        async with self.ledger.engine.connect() as connection:
            notes = Counter((await connection.execute(select(self.notes.c.task))).scalars())
            left = (await connection.execute(select(self.stock.c.left).where(self.stock.c.sku == "hot"))).scalar_one()
        assert left == 1000 - notes.total()
        return notes

    async def states(self) -> dict[str, tuple[str, int]]:
        """State and attempts of each task."""
        table = self.ledger.tables.task
        async with self.ledger.engine.connect() as connection:
            rows = await connection.execute(select(table.c.operation_id, table.c.state, table.c.attempts))
            return {name: (state, attempts) for name, state, attempts in rows}

    async def in_order(self) -> list[str]:
        async with self.ledger.engine.connect() as connection:
            return list((await connection.execute(select(self.notes.c.task).order_by(self.notes.c.number))).scalars())
