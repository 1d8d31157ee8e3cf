"""A service's own many-line writes, watched in their session, on each database: what is not exact is refused, and nothing of it stands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Identity,
    Integer,
    MetaData,
    String,
    Table,
    bindparam,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from inventory_sdk import InsufficientStock, Inventory, Line, QuantityMismatch, WatchedTables

DATABASES = [
    pytest.param("sqlite"),
    pytest.param("postgresql", marks=pytest.mark.postgresql),
    pytest.param("mariadb", marks=pytest.mark.mariadb),
]
STOCK = {"a": 10, "b": 10, "c": 10, "other": 10}
LINES = {"a": 1, "b": 2, "c": 3}


class Shop:
    """Tables of one test: ``stock`` (available, reserved) and ``changes``, mapped as ``Stock`` and ``Change``."""

    def __init__(self, engine: AsyncEngine, prefix: str) -> None:
        self.engine = engine

        class Base(DeclarativeBase):
            metadata = MetaData()

        class Stock(Base):
            __tablename__ = f"{prefix}_stock"
            sku: Mapped[str] = mapped_column("product", String(40), primary_key=True)
            available: Mapped[int]
            reserved: Mapped[int] = mapped_column(default=0)

        class Change(Base):
            __tablename__ = f"{prefix}_changes"
            id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), Identity(), primary_key=True)
            product: Mapped[str] = mapped_column(String(40), ForeignKey(f"{prefix}_stock.product"))
            units: Mapped[int]
            old: Mapped[int] = mapped_column(default=0)
            new: Mapped[int] = mapped_column(default=0)

        self.base, self.Stock, self.Change = Base, Stock, Change
        self.inventory = Inventory("memory://", metrics=[])
        self.watched = WatchedTables(Stock, "sku", log=Change, log_sku="product", log_quantity="units")

    async def make(self) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(self.base.metadata.create_all)
            await connection.execute(
                insert(self.Stock.__table__), [{"product": sku, "available": units, "reserved": 0} for sku, units in STOCK.items()]
            )

    async def drop(self) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(self.base.metadata.drop_all)
        await self.engine.dispose()

    async def books(self) -> tuple[dict[str, int], list[tuple[str, int]]]:
        async with self.engine.connect() as connection:
            stock = await connection.execute(select(self.Stock.__table__.c.product, self.Stock.__table__.c.available))
            rows = await connection.execute(select(self.Change.product, self.Change.units).order_by(self.Change.id))
            return {row[0]: row[1] for row in stock}, [(sku, units) for sku, units in rows]

    def session(self) -> AsyncSession:
        return AsyncSession(self.engine, expire_on_commit=False)

    def take(self, way: Way, fault: str = "", **options: Any) -> Callable[[AsyncSession, Mapping[str, int]], Coroutine[Any, Any, None]]:
        """The verified function: takes the lines in one of the ways, with a fault."""

        settings: dict[str, Any] = {"by": {"available": -1, "reserved": 0}, "changes": self.watched, **options}

        @self.inventory.verifies(lines="lines", session="session", **settings)
        async def take(session: AsyncSession, lines: Mapping[str, int]) -> None:
            await way(self, session, FAULTS[fault](dict(lines)))

        return take


Writes = list[tuple[str, int, str | None, int]]
"""SKU whose stock is written, units taken; SKU of the change row (None: no row), units that it says."""
Way = Callable[[Shop, AsyncSession, Writes], Coroutine[Any, Any, None]]


def exact(lines: dict[str, int]) -> Writes:
    return [(sku, units, sku, -units) for sku, units in lines.items()]


FAULTS: dict[str, Callable[[dict[str, int]], Writes]] = {
    "": exact,
    "wrong": lambda lines: [*exact(lines)[:-1], ("c", 4, "c", -4)],
    "missing": lambda lines: exact(lines)[:-1],
    "doubled": lambda lines: [*exact(lines), ("b", 2, "b", -2)],
    "extra": lambda lines: [*exact(lines), ("other", 1, "other", -1)],
    "given instead of taken": lambda lines: [*exact(lines)[:-1], ("c", -3, "c", 3)],
    "wrong change row": lambda lines: [*exact(lines)[:-1], ("c", 3, "c", -2)],
    "change row of another": lambda lines: [*exact(lines)[:-1], ("c", 3, "other", -3)],
    "no change row": lambda lines: [*exact(lines)[:-1], ("c", 3, None, 0)],
    "change row alone": lambda lines: [*exact(lines)[:-1], ("c", 0, "c", -3)],
    "two change rows": lambda lines: [*exact(lines), ("c", 0, "c", -3)],
}


async def with_objects(shop: Shop, session: AsyncSession, writes: Writes) -> None:
    for sku, units, row, said in writes:
        stock = await session.get_one(shop.Stock, sku)
        stock.available -= units
        if row is not None:
            session.add(shop.Change(product=row, units=said))


async def with_expressions(shop: Shop, session: AsyncSession, writes: Writes) -> None:
    for sku, units, row, said in writes:
        await session.execute(update(shop.Stock).where(shop.Stock.sku == sku).values(available=shop.Stock.available - units))
        if row is not None:
            await session.execute(insert(shop.Change).values(product=row, units=said))


async def with_many_at_once(shop: Shop, session: AsyncSession, writes: Writes) -> None:
    table, changes = shop.Stock.__table__, shop.Change.__table__
    connection = await session.connection()
    await connection.execute(
        update(table)
        .where(table.c.product + "" == bindparam("key"), table.c.available > bindparam("least"))
        .values(available=table.c.available - bindparam("by")),
        [{"key": sku, "by": units, "least": 0} for sku, units, *_ in writes],
    )
    rows = [{"product": row, "units": said, "old": 0, "new": 0} for *_, row, said in writes if row is not None]
    await session.execute(insert(changes).values(rows))


WAYS: list[Way] = [with_objects, with_expressions, with_many_at_once]


@pytest.fixture(params=DATABASES)
async def shop(request: pytest.FixtureRequest, tmp_path: Any, namespace: str) -> AsyncIterator[Shop]:
    url = f"sqlite+aiosqlite:///{tmp_path}/shop.db" if request.param == "sqlite" else request.getfixturevalue(f"{request.param}_url")
    engine = create_async_engine(url)
    if request.param == "sqlite":
        # Python's driver begins no transaction for a savepoint, so releasing the first one would commit it: SQLAlchemy's recipe.
        event.listen(engine.sync_engine, "connect", lambda connection, _: setattr(connection, "isolation_level", None))
        event.listen(engine.sync_engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    shop = Shop(engine, namespace)
    await shop.make()
    yield shop
    await shop.drop()


@pytest.mark.parametrize("way", WAYS)
async def test_what_is_exact_is_committed(shop: Shop, way: Way) -> None:
    async with shop.session() as session, session.begin():
        await shop.take(way)(session, LINES)
    stock, rows = await shop.books()
    assert stock == {"a": 9, "b": 8, "c": 7, "other": 10}
    assert sorted(rows) == [("a", -1), ("b", -2), ("c", -3)]


@pytest.mark.parametrize("commits", ["the caller", "the function"])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault])
@pytest.mark.parametrize("way", WAYS)
async def test_what_is_not_exact_is_refused_and_the_database_is_unchanged(shop: Shop, way: Way, fault: str, commits: str) -> None:
    async def alone(shop: Shop, session: AsyncSession, writes: Writes) -> None:
        async with session.begin():
            await way(shop, session, writes)

    with pytest.raises(QuantityMismatch) as refused:
        if commits == "the function":
            async with shop.session() as session:
                await shop.take(alone, fault)(session, LINES)
        else:
            async with shop.session() as session, session.begin():
                await shop.take(way, fault)(session, LINES)
    assert await shop.books() == (STOCK, [])
    assert refused.value.mismatches
    about = {name.partition("sku ")[2].partition(",")[0].strip("'") for name, *_ in refused.value.mismatches}
    assert about == {"doubled": {"b"}, "extra": {"other"}, "change row of another": {"c", "other"}}.get(fault, {"c"})


async def test_the_error_says_which_line_what_was_expected_and_what_was_found(shop: Shop) -> None:
    with pytest.raises(QuantityMismatch) as refused:
        async with shop.session() as session, session.begin():
            await shop.take(with_objects, "wrong")(session, LINES)
    assert refused.value.mismatches == (
        ("merchant 'default', sku 'c', available", -3, -4),
        ("merchant 'default', sku 'c', change log", -3, -4),
    )


async def test_a_failure_that_was_swallowed_is_refused(shop: Shop) -> None:
    async def each_in_a_savepoint(shop: Shop, session: AsyncSession, writes: Writes) -> None:
        for write in writes:
            try:
                async with session.begin_nested():
                    await with_objects(shop, session, [write])
                    await session.flush()
                    if write[0] == "b":
                        raise LookupError("the shelf of b can't be reached")
            except LookupError:
                continue  # "the others can still be booked"

    with pytest.raises(QuantityMismatch) as refused:
        async with shop.session() as session, session.begin():
            await shop.take(each_in_a_savepoint)(session, LINES)
    assert [name for name, *_ in refused.value.mismatches] == [
        "merchant 'default', sku 'b', available",
        "merchant 'default', sku 'b', change log",
    ]
    assert await shop.books() == (STOCK, [])


async def test_a_savepoint_that_was_rolled_back_and_done_again_is_exact(shop: Shop) -> None:
    async def twice(shop: Shop, session: AsyncSession, writes: Writes) -> None:
        savepoint = await session.begin_nested()
        await with_expressions(shop, session, writes)
        await savepoint.rollback()
        await with_expressions(shop, session, writes)

    async with shop.session() as session, session.begin():
        await shop.take(twice)(session, LINES)
    assert (await shop.books())[0] == {"a": 9, "b": 8, "c": 7, "other": 10}


async def test_a_refused_commit_that_is_caught_and_tried_again_is_refused_again(shop: Shop) -> None:
    async def stubborn(shop: Shop, session: AsyncSession, writes: Writes) -> None:
        await with_objects(shop, session, writes)
        for _ in range(2):
            try:
                await session.commit()
            except QuantityMismatch:
                continue

    with pytest.raises(QuantityMismatch):
        async with shop.session() as session:
            await shop.take(stubborn, "doubled")(session, LINES)
    assert await shop.books() == (STOCK, [])


async def test_what_moves_after_an_exact_commit_is_refused_too(shop: Shop) -> None:
    async def more(shop: Shop, session: AsyncSession, writes: Writes) -> None:
        await with_objects(shop, session, writes)
        await session.commit()
        await with_objects(shop, session, [("a", 1, "a", -1)])
        await session.commit()

    with pytest.raises(QuantityMismatch) as refused:
        async with shop.session() as session:
            await shop.take(more)(session, LINES)
    assert refused.value.mismatches[0] == ("merchant 'default', sku 'a', available", -1, -2)
    assert (await shop.books())[0] == {"a": 9, "b": 8, "c": 7, "other": 10}


async def test_what_the_caller_had_done_before_is_not_the_functions(shop: Shop) -> None:
    async with shop.session() as session, session.begin():
        await with_objects(shop, session, [("a", 1, "a", -1), ("other", 1, "other", -1)])
        await shop.take(with_objects)(session, LINES)
    assert (await shop.books())[0] == {"a": 8, "b": 8, "c": 7, "other": 9}


@pytest.mark.parametrize("shop", DATABASES[1:], indirect=True)  # SQLite refuses the other writer
async def test_a_lost_update_is_found(shop: Shop) -> None:
    """The row was loaded without a lock, and somebody else took one meanwhile: writing 10 − 1 takes nothing at all."""

    async def late(shop: Shop, session: AsyncSession, writes: Writes) -> None:
        loaded = (await session.scalars(select(shop.Stock))).all()
        async with shop.engine.begin() as other:
            await other.execute(update(shop.Stock).where(shop.Stock.sku == "a").values(available=9))
        await with_objects(shop, session, writes)
        assert loaded

    with pytest.raises(QuantityMismatch, match="sku 'a', available: expected -1, found 0"):
        async with shop.session() as session, session.begin():
            await shop.take(late)(session, LINES)
    assert (await shop.books())[0] == {**STOCK, "a": 9}


async def test_every_watched_counter_counts(shop: Shop) -> None:
    async def hold(shop: Shop, session: AsyncSession, writes: Writes) -> None:
        for sku, units, *_ in writes:
            stock = await session.get_one(shop.Stock, sku)
            stock.available -= units
            stock.reserved += units if sku != "b" else units - 1
            session.add(shop.Change(product=sku, units=units))

    take = shop.take(hold, by={"available": -1, "reserved": 1}, log="unsigned")
    with pytest.raises(QuantityMismatch, match="sku 'b', reserved: expected 2, found 1"):
        async with shop.session() as session, session.begin():
            await take(session, LINES)
    async with shop.session() as session, session.begin():
        await take(session, {"a": 1})
    assert (await shop.books()) == ({**STOCK, "a": 9}, [("a", 1)])


@pytest.mark.parametrize(
    "statement",
    ["UPDATE {stock} SET available = available - 1 WHERE product = 'other'", "DELETE FROM {changes} WHERE units = 77"],
)
@pytest.mark.parametrize("raw", [False, True])
async def test_a_write_that_the_watcher_can_not_read_is_refused_by_name(shop: Shop, statement: str, raw: bool) -> None:
    sql = statement.format(stock=shop.Stock.__tablename__, changes=shop.Change.__tablename__)

    async def by_text(shop: Shop, session: AsyncSession, writes: Writes) -> None:
        await with_objects(shop, session, writes)
        if raw:
            await (await session.connection()).exec_driver_sql(sql)
        else:
            await session.execute(text(sql))

    with pytest.raises(QuantityMismatch, match="that can't be read"):
        async with shop.session() as session, session.begin():
            await shop.take(by_text)(session, LINES)
    assert await shop.books() == (STOCK, [])


async def test_reading_and_writing_other_tables_as_text_is_nobodys_business(shop: Shop) -> None:
    async def reads(shop: Shop, session: AsyncSession, writes: Writes) -> None:
        await session.execute(text(f"SELECT available FROM {shop.Stock.__tablename__}"))
        await with_objects(shop, session, writes)

    async with shop.session() as session, session.begin():
        await shop.take(reads)(session, LINES)
    assert (await shop.books())[0]["a"] == 9


async def test_change_rows_must_form_a_chain_with_the_stock(shop: Shop) -> None:
    async def with_ends(shop: Shop, session: AsyncSession, writes: Writes) -> None:
        for sku, units, *_ in writes:
            stock = await session.get_one(shop.Stock, sku)
            old = stock.available if sku != "b" else 5
            stock.available -= units
            session.add(shop.Change(product=sku, units=0, old=old, new=old - units))

    chained = WatchedTables(shop.Stock, "sku", log=shop.Change, log_sku="product", log_before="old", log_after="new")
    take = shop.take(with_ends, changes=chained)
    with pytest.raises(QuantityMismatch) as refused:
        async with shop.session() as session, session.begin():
            await take(session, LINES)
    assert refused.value.mismatches == (
        ("merchant 'default', sku 'b', change log, before", 10, 5),
        ("merchant 'default', sku 'b', change log, after", 8, 3),
    )
    async with shop.session() as session, session.begin():
        await take(session, {"a": 1, "c": 2})
    assert (await shop.books())[0] == {**STOCK, "a": 9, "c": 8}


async def test_new_and_deleted_stock_rows_move_what_they_held(shop: Shop) -> None:
    @shop.inventory.verifies(
        lines="lines", session="session", by={"available": 1}, changes=WatchedTables(shop.Stock, "sku")
    )  # without a change log
    async def receive(session: AsyncSession, lines: Mapping[str, int], scrap: str | None = None) -> None:
        session.add_all(shop.Stock(sku=sku, available=units) for sku, units in lines.items())
        if scrap is not None:
            await session.delete(await session.get_one(shop.Stock, scrap))

    async with shop.session() as session, session.begin():
        await receive(session, {"new": 4})
    with pytest.raises(QuantityMismatch, match="sku 'c', available: expected 0, found -10"):
        async with shop.session() as session, session.begin():
            await receive(session, {"newer": 4}, scrap="c")
    assert (await shop.books())[0] == {**STOCK, "new": 4}


async def test_rows_are_told_apart_by_merchant_where_the_table_has_one(shop: Shop, namespace: str) -> None:
    table = Table(
        f"{namespace}_shops", MetaData(), Column("shop", String(20)), Column("sku", String(20)), Column("place", Integer),
        Column("units", Integer),
    )  # fmt: skip
    async with shop.engine.begin() as connection:
        await connection.run_sync(table.metadata.create_all)
        rows = [("m1", 1), ("m1", 2), ("m2", 1)]
        await connection.execute(insert(table), [{"shop": name, "sku": "a", "place": place, "units": 5} for name, place in rows])

    @shop.inventory.verifies(
        lines="lines", merchant="merchant", session="session", by={"units": -1}, changes=WatchedTables(table, "sku", merchant="shop")
    )
    async def take(session: AsyncSession, merchant: str, lines: list[Line], **units: int) -> None:
        for name, count in units.items():
            shop_name, _, place = name.partition("_")
            here = (table.c.shop == shop_name, table.c.sku == "a", table.c.place == int(place))
            await session.execute(update(table).where(*here).values(units=table.c.units - count))

    try:
        async with shop.session() as session, session.begin():
            await take(session, "m1", [Line("a", 3)], m1_1=2, m1_2=1)  # from two warehouses
            await take(session, "m1", [Line("a", 1), Line("a", 1, "m2")], m1_1=1, m2_1=1)
        with pytest.raises(QuantityMismatch, match=r"merchant 'm1'.*expected -1, found 0; merchant 'm2'.*expected 0, found -1"):
            async with shop.session() as session, session.begin():
                await take(session, "m1", [Line("a", 1)], m2_1=1)
    finally:
        async with shop.engine.begin() as connection:
            await connection.run_sync(table.metadata.drop_all)


async def test_a_refusal_gives_back_the_stock_that_was_taken_for_the_call(shop: Shop) -> None:
    inventory = shop.inventory

    @inventory.deducts(run="now", operation_id="order", lines="lines")
    @inventory.verifies(lines="lines", session="session", by={"available": -1}, changes=shop.watched)
    async def sell(session: AsyncSession, order: str, lines: Mapping[str, int], fault: str = "") -> None:
        await with_objects(shop, session, FAULTS[fault](dict(lines)))

    async with inventory:
        await inventory.stock.restock([Line(sku, units) for sku, units in STOCK.items()], operation_id="delivery")
        with pytest.raises(QuantityMismatch):
            async with shop.session() as session, session.begin():
                await sell(session, "o1", LINES, "missing")
        assert [(await inventory.stock.level(sku)).available for sku in "abc"] == [10, 10, 10]
        async with shop.session() as session, session.begin():
            await sell(session, "o1", LINES)
        assert [(await inventory.stock.level(sku)).available for sku in "abc"] == [9, 8, 7]
        with pytest.raises(InsufficientStock):
            async with shop.session() as session:
                await sell(session, "o2", {"a": 10})
        await inventory.settled()
        assert await inventory.ledger.verify() == []
