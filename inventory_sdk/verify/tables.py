"""The service's own stock table and change log, as the session watcher has to know them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Column, Table


@dataclass(frozen=True, slots=True)
class WatchedTables:
    """The service's own tables, each a mapped class or a ``Table``; columns by their attribute or column name.

    ``stock``: one row per SKU (several rows of a SKU, say one per warehouse, are summed), which ``sku`` and perhaps ``merchant``
    name. ``log``: the change log; None: there is none. Its rows say ``log_quantity``, ``log_before`` and ``log_after``, or all
    three; the two must form one chain from what stood in the stock to what stands there. ``log_sku`` and ``log_merchant`` where
    they are called otherwise there.
    """

    stock: Any
    sku: str
    merchant: str | None = None
    log: Any = None
    log_sku: str | None = None
    log_merchant: str | None = None
    log_quantity: str | None = None
    log_before: str | None = None
    log_after: str | None = None


class Watched:
    """The same with its columns found. ``TypeError`` names the one that is not there."""

    def __init__(self, tables: WatchedTables, counters: Iterable[str]) -> None:
        self.sku = _column(tables.stock, tables.sku, "sku")
        self.merchant = None if tables.merchant is None else _column(tables.stock, tables.merchant, "merchant")
        self.counters = {name: _column(tables.stock, name, "by") for name in counters}
        self.keys = [column for column in (self.sku, self.merchant) if column is not None]
        self.stock = _one_table([self.sku, self.merchant, *self.counters.values()])
        self.log: Table | None = None
        if tables.log is None:
            return
        self.log_sku = _column(tables.log, tables.log_sku or tables.sku, "log_sku")
        named = tables.log_merchant or tables.merchant
        self.log_merchant = None if named is None else _column(tables.log, named, "log_merchant")
        ends = (tables.log_before, tables.log_after)
        if (tables.log_quantity is None and ends == (None, None)) or ends.count(None) == 1:
            raise TypeError("WatchedTables: name the change log's log_quantity=, or its log_before= and log_after=")
        self.log_quantity = None if tables.log_quantity is None else _column(tables.log, tables.log_quantity, "log_quantity")
        self.log_before = None if tables.log_before is None else _column(tables.log, tables.log_before, "log_before")
        self.log_after = None if tables.log_after is None else _column(tables.log, tables.log_after, "log_after")
        self.log = _one_table([self.log_sku, self.log_merchant, self.log_quantity, self.log_before, self.log_after])


def _column(source: Any, name: str, field: str) -> Column[Any]:
    try:
        from sqlalchemy import Table, inspect
        from sqlalchemy.exc import NoInspectionAvailable
    except ImportError as error:
        raise ImportError("WatchedTables needs SQLAlchemy: pip install 'inventory_sdk[sqlalchemy]'") from error
    if isinstance(source, Table):
        columns: Any = source.c
    else:
        try:
            columns = inspect(source).columns
        except (NoInspectionAvailable, AttributeError) as error:
            raise TypeError(f"WatchedTables: {source!r} is neither a mapped class nor a Table") from error
    if name not in columns:
        raise TypeError(f"WatchedTables: {field}={name!r}: {source!r} has no such column; it has {', '.join(columns.keys())}")
    column: Column[Any] = columns[name]
    return column


def _one_table(columns: Iterable[Column[Any] | None]) -> Table:
    tables = {column.table for column in columns if column is not None}
    if len(tables) != 1:
        raise TypeError(f"WatchedTables: the columns stand in {', '.join(sorted(table.name for table in tables))}; name those of one table")
    return tables.pop()
