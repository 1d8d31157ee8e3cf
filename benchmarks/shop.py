"""The service under load: an Inventory from the environment, with or without writes of its own.

``inventory-sdk worker benchmarks.shop:inventory`` runs its worker. INVENTORY_BENCH_NAME names namespace and tables,
INVENTORY_BENCH_WRITES is ``none``, ``batch`` (``writes_stock``) or ``later`` (a function per operation). INVENTORY_BENCH_WINDOW (seconds)
and INVENTORY_BENCH_CAP (entries) make results and journal small, for ``benchmarks.endurance``; INVENTORY_BENCH_RATE (SKUs per
second) is for ``benchmarks.reconcile``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

from sqlalchemy import BigInteger, Column, MetaData, String, Table, bindparam, insert, update
from sqlalchemy.ext.asyncio import AsyncSession

from inventory_sdk import Inventory, Line, Movement, injected
from inventory_sdk.reconcile.model import Reconcile

NAME: Final = os.environ.get("INVENTORY_BENCH_NAME", "bench")
WRITES: Final = os.environ.get("INVENTORY_BENCH_WRITES", "none")
SKU: Final = "hot"

tables = MetaData()
product = Table(f"{NAME}_product", tables, Column("sku", String(64), primary_key=True), Column("available", BigInteger, nullable=False))
product_log = Table(
    f"{NAME}_product_log",
    tables,
    Column("number", BigInteger, primary_key=True, autoincrement=True),
    Column("sku", String(64), nullable=False),
    Column("operation_id", String(128), nullable=False),
    Column("change", BigInteger, nullable=False),
)
_move = update(product).where(product.c.sku == bindparam("moved")).values(available=product.c.available + bindparam("units"))

inventory = Inventory.from_env(
    redis=os.environ.get("INVENTORY_REDIS_URL", "memory://"),
    namespace=NAME,
    table_prefix=f"{NAME}_",
    results_window=float(os.environ.get("INVENTORY_BENCH_WINDOW", "86400")),
    journal_cap=int(os.environ.get("INVENTORY_BENCH_CAP", "1000000")),
    reconcile=Reconcile(every=None, whole_every=None, rate=float(os.environ.get("INVENTORY_BENCH_RATE", "20000"))),
)

if WRITES == "batch":

    @inventory.writes_stock
    async def write(moves: Sequence[Movement], session: AsyncSession) -> None:
        """One UPDATE per SKU and one INSERT of all log rows."""
        units: Counter[str] = Counter()
        rows: list[dict[str, Any]] = []
        for move in moves:
            units[move.sku] += move.available
            rows.append({"sku": move.sku, "operation_id": move.operation_id, "change": move.available})
        await session.execute(insert(product_log), rows)
        for sku in sorted(units):
            await session.execute(_move, {"moved": sku, "units": units[sku]})


if WRITES == "later":

    @inventory.deducts(run="later", name="write-product", operation_id="order_id", lines="lines")
    async def sell(order_id: str, lines: list[Line], session: AsyncSession = injected()) -> None:
        """The same writes, per operation."""
        for line in lines:
            row = {"sku": line.sku, "operation_id": order_id, "change": -line.quantity}
            await session.execute(_move, {"moved": line.sku, "units": -line.quantity})
            await session.execute(insert(product_log), row)
