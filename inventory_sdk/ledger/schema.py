"""The ledger's tables, as a ``MetaData`` that a service's Alembic can include.

    target_metadata = [Base.metadata, tables().metadata]      # or tables(metadata=Base.metadata)

A key is compared as bytes: case counts, and so does a trailing space. PostgreSQL gets that from ``COLLATE "C"``, MySQL and
MariaDB from ``VARBINARY`` (their ``_bin`` collations pad), SQLite does it anyway.

There are no foreign keys: every row is written under its partition's lock by one writer, ``verify`` checks what foreign keys
would, and they would cost a lookup per row on the hot path.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Dialect,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.mysql import MEDIUMTEXT, VARBINARY
from sqlalchemy.types import TypeDecorator, TypeEngine

NAME_BYTES: Final = 128
ID_BYTES: Final = 384
"""Room for an id of the user's (128) inside a derived one."""
KEY_BYTES: Final = 512
"""merchant, separator, id."""
SUBJECT_BYTES: Final = 640
"""What kind of thing, separator, key."""

COUNTERS: Final = ("available", "reserved", "sold", "supplied", "written_off")

_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,39}|")


class Key(TypeDecorator[str]):
    """Text that is compared byte by byte, at most ``length`` bytes of UTF-8."""

    impl = Text
    cache_ok = True

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name in ("mysql", "mariadb"):
            return dialect.type_descriptor(VARBINARY(self.length))
        if dialect.name == "postgresql":
            return dialect.type_descriptor(Text(collation="C"))
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: str | None, dialect: Dialect) -> Any:
        return value.encode() if value is not None and dialect.name in ("mysql", "mariadb") else value

    def process_result_value(self, value: Any, dialect: Dialect) -> str | None:
        return value.decode() if isinstance(value, bytes) else value


def _long() -> TypeEngine[str]:
    """Text that nobody compares; MySQL's TEXT ends at 64 KB, which an operation of 512 lines exceeds."""
    return Text().with_variant(MEDIUMTEXT(), "mysql", "mariadb")


@dataclass(frozen=True, slots=True)
class Tables:
    """All tables of one ledger; ``prefix`` is part of their names."""

    prefix: str
    metadata: MetaData
    stock: Table
    admission: Table
    entry: Table
    operation: Table
    change: Table
    reservation: Table
    reservation_line: Table
    partition: Table
    credit: Table
    void: Table
    task: Table
    decision: Table
    setting: Table
    discrepancy: Table
    audit: Table
    letter: Table

    def all(self) -> tuple[Table, ...]:
        """Every table, in order of creation."""
        return (
            self.stock,
            self.admission,
            self.entry,
            self.operation,
            self.change,
            self.reservation,
            self.reservation_line,
            self.partition,
            self.credit,
            self.void,
            self.task,
            self.decision,
            self.setting,
            self.discrepancy,
            self.audit,
            self.letter,
        )


def tables(prefix: str = "inventory_", metadata: MetaData | None = None) -> Tables:
    """The tables named ``<prefix>stock``, ``<prefix>operation``, …, registered in ``metadata`` (a new one if None).

    ``ValueError`` for a prefix that is not letters, digits and underscores, or longer than 40.
    """
    if not _PREFIX.fullmatch(prefix):
        raise ValueError(f"prefix={prefix!r}: must be letters, digits and underscores, at most 40")
    meta = MetaData() if metadata is None else metadata

    def table(name: str, *parts: Any) -> Table:
        options: dict[str, Any] = {"mysql_engine": "InnoDB", "mysql_charset": "utf8mb4"}
        options |= {"mariadb_engine": "InnoDB", "mariadb_charset": "utf8mb4"}
        return Table(f"{prefix}{name}", meta, *parts, **options)

    def number(name: str, *, primary: bool = False, default: int | None = None) -> Column[int]:
        server = None if default is None else text(str(default))
        return Column(name, BigInteger, primary_key=primary, nullable=False, autoincrement=False, server_default=server)

    def small(name: str, *, primary: bool = False) -> Column[int]:
        return Column(name, Integer, primary_key=primary, nullable=False, autoincrement=False)

    def key(name: str, length: int = KEY_BYTES, *, primary: bool = False, nullable: bool = False) -> Column[str]:
        return Column(name, Key(length), primary_key=primary, nullable=nullable)

    def flag(name: str) -> Column[bool]:
        return Column(name, Boolean(create_constraint=False), nullable=False)

    def position(*more: Column[Any]) -> list[Column[Any]]:
        return [small("partition", primary=True), small("epoch", primary=True), number("seq", primary=True), *more]

    def where(condition: str) -> dict[str, Any]:
        return {"postgresql_where": text(condition), "sqlite_where": text(condition)}

    def check(name: str, condition: str) -> CheckConstraint:
        return CheckConstraint(condition, name=f"{prefix}{name}")

    stock = table(
        "stock",
        key("merchant", NAME_BYTES, primary=True),
        key("sku", NAME_BYTES, primary=True),
        small("partition"),
        *[number(name, default=0) for name in COUNTERS],
        Column("admission", Key(16), nullable=False),
        # Rises with every change of ``admission``: what was begun under an older one is refused.
        number("fence", default=0),
        number("version", default=0),
        *[check(f"stock_{name}", f"{name} >= 0") for name in COUNTERS],
        check("stock_adds_up", "supplied = available + reserved + sold + written_off"),
    )
    Index(f"{prefix}stock_partition", stock.c.partition, stock.c.merchant, stock.c.sku)
    Index(f"{prefix}stock_sku", stock.c.sku, stock.c.merchant)

    # Where a merchant's new SKUs are sold; those that are there say it themselves.
    admission = table(
        "admission", key("merchant", NAME_BYTES, primary=True), small("partition"), key("admission", 16), number("changed_ms")
    )

    # One row per script call (or per SQL-first operation, in epoch 0): the nonce tells a redelivery from a fork.
    entry = table("entry", *position(), key("nonce", 64), number("at_ms"), small("operations"))
    Index(f"{prefix}entry_at", entry.c.partition, entry.c.at_ms)

    operation = table(
        "operation",
        *position(small("index", primary=True)),
        key("merchant", NAME_BYTES),
        key("operation_id", ID_BYTES),
        key("claim", nullable=True),
        key("kind", 16),
        key("order_id", ID_BYTES, nullable=True),
        key("reference", nullable=True),
        key("fingerprint", 64),
        small("lines"),
        Column("receipt", _long(), nullable=False),
        key("status", 16),
        flag("kept"),
        number("at_ms"),
        Column("reason", _long(), nullable=True),
        UniqueConstraint("claim", name=f"{prefix}operation_claim"),
    )
    # For people: the pages list them by time. An order's number is often all that they have, so the merchant is not in front of it.
    Index(f"{prefix}operation_order", operation.c.order_id, operation.c.at_ms, **where("order_id IS NOT NULL"))
    Index(f"{prefix}operation_time", operation.c.merchant, operation.c.at_ms)
    Index(f"{prefix}operation_reference", operation.c.reference, **where("reference IS NOT NULL"))

    # The chain is the key: a SKU has one change per version.
    change = table(
        "change",
        key("merchant", NAME_BYTES, primary=True),
        key("sku", NAME_BYTES, primary=True),
        number("version", primary=True),
        small("partition"),
        small("epoch"),
        number("seq"),
        small("index"),
        small("line"),
        number("quantity"),
        *[number(f"{name}_delta") for name in COUNTERS],
        *[number(f"{name}_before") for name in COUNTERS],
        *[number(f"{name}_after") for name in COUNTERS],
    )
    # Not down to the line: equal keys are stored once, which makes it the cheaper half of a change row's indexes.
    Index(f"{prefix}change_entry", change.c.partition, change.c.epoch, change.c.seq)

    reservation = table(
        "reservation",
        key("key", primary=True),
        small("partition"),
        small("epoch"),
        number("seq"),
        key("state", 16),
        key("fingerprint", 64),
        key("order_id", ID_BYTES, nullable=True),
        number("expires_at"),
        flag("pinned"),
        number("opened_ms"),
        # Reported as stale: held for longer than anyone should.
        flag("reported"),
        # Home of a call over several partitions: its lines there, {field: [partition, original, open, confirmed, released]}.
        Column("elsewhere", _long(), nullable=True),
    )
    Index(f"{prefix}reservation_held", reservation.c.partition, reservation.c.state, reservation.c.key, **where("state = 'held'"))

    reservation_line = table(
        "reservation_line",
        key("key", primary=True),
        key("merchant", NAME_BYTES, primary=True),
        key("sku", NAME_BYTES, primary=True),
        number("original"),
        number("open"),
        number("confirmed"),
        number("released"),
        check("reservation_open", "open >= 0 AND confirmed >= 0 AND released >= 0"),
        check("reservation_adds_up", "original = open + confirmed + released"),
    )

    partition = table("partition", small("partition", primary=True), small("epoch", primary=True), key("state", 16), number("applied"))

    # One row per line; (partition, 0, seq) is the SQL-first operation, ``epoch`` the Redis epoch that the credit is bound to.
    credit = table(
        "credit",
        small("partition", primary=True),
        number("seq", primary=True),
        small("line", primary=True),
        small("epoch"),
        key("key"),
        key("merchant", NAME_BYTES),
        key("sku", NAME_BYTES),
        number("quantity"),
        key("state", 16),
    )
    Index(f"{prefix}credit_pending", credit.c.partition, credit.c.epoch, credit.c.state, **where("state = 'pending'"))

    void = table(
        "void",
        *position(small("index", primary=True)),
        key("key"),
        key("kind", 16),
        key("reference", nullable=True),
        Column("deltas", _long(), nullable=False),
        flag("freeze"),
        key("state", 16),
    )
    Index(f"{prefix}void_key", void.c.key)
    Index(f"{prefix}void_pending", void.c.partition, void.c.epoch, void.c.state, **where("state = 'pending'"))

    task = table(
        "task",
        Column("number", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
        small("partition"),
        small("epoch"),
        number("seq"),
        small("index"),
        key("name", ID_BYTES),
        number("version"),
        Column("arguments", _long(), nullable=False),
        key("merchant", NAME_BYTES),
        key("group_id", ID_BYTES),
        key("operation_id", ID_BYTES),
        Column("receipt", _long(), nullable=False),
        number("attempts"),
        number("due_ms"),
        key("state", 16),
        key("route", 16),
        Column("error", _long(), nullable=True),
    )
    Index(f"{prefix}task_group", task.c.merchant, task.c.group_id, task.c.number, **where("state = 'pending'"))
    Index(f"{prefix}task_operation", task.c.partition, task.c.epoch, task.c.seq)
    Index(f"{prefix}task_state", task.c.state, task.c.number, **where("state <> 'done'"))

    decision = table("decision", key("key", primary=True), key("verdict", 16), number("at_ms"))
    setting = table("setting", key("name", NAME_BYTES, primary=True), key("value"))

    def log(name: str, *more: Any) -> Table:
        made = table(
            name,
            Column("number", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
            key("merchant", NAME_BYTES),
            key("sku", NAME_BYTES, nullable=True),
            key("kind", 64),
            *more,
            Column("details", _long(), nullable=False),
            number("created_ms"),
        )
        Index(f"{prefix}{name}_created", made.c.merchant, made.c.created_ms)
        return made

    # What disagrees has one row while it does: its subject is unique, and NULL once that has ended.
    discrepancy = log(
        "discrepancy",
        key("state", 16),
        Column("resolved_ms", BigInteger, nullable=True),
        key("subject", SUBJECT_BYTES, nullable=True),
        UniqueConstraint("subject", name=f"{prefix}discrepancy_subject"),
    )
    Index(f"{prefix}discrepancy_state", discrepancy.c.state, discrepancy.c.number)
    # ``units`` is what limits are counted by: positive for a correction, negative for one that was refused after all.
    audit = log("audit", key("actor", ID_BYTES), key("operation_id", ID_BYTES, nullable=True), number("units", default=0))

    # Documents of discrepancies that a sink could not take, until it can.
    letter = table(
        "letter",
        Column("number", BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=True),
        key("sink", NAME_BYTES),
        Column("document", _long(), nullable=False),
        number("created_ms"),
    )
    Index(f"{prefix}letter_sink", letter.c.sink, letter.c.number)

    return Tables(
        prefix=prefix,
        metadata=meta,
        stock=stock,
        admission=admission,
        entry=entry,
        operation=operation,
        change=change,
        reservation=reservation,
        reservation_line=reservation_line,
        partition=partition,
        credit=credit,
        void=void,
        task=task,
        decision=decision,
        setting=setting,
        discrepancy=discrepancy,
        audit=audit,
        letter=letter,
    )


@cache
def own_tables(prefix: str) -> Tables:
    """The tables as the SDK itself reads and writes them, made once; nobody adds to their metadata."""
    return tables(prefix)
