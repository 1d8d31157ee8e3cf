"""``session=``: the root transaction of the service's session decides what becomes of the take."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aspect_fakes import FakeStock, Shop
from fastapi import Depends, FastAPI
from sqlalchemy import Column, Integer, MetaData, String, Table, create_engine, event, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from inventory_sdk.errors import InvalidOperation, ReservationClosed, ReservationExpired
from inventory_sdk.ledger.sql import SqlLedger
from inventory_sdk.model import Receipt
from inventory_sdk.stock import take
from inventory_sdk.weave import injected

META = MetaData()
ORDERS = Table("orders", META, Column("id", String(20), primary_key=True), Column("count", Integer, nullable=False))


class Refused(Exception):
    pass


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(take, "FIRST_PAUSE", 0.0)


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db", poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.run_sync(META.create_all)
    yield engine
    await engine.dispose()


@pytest.fixture
async def shop(engine: AsyncEngine) -> AsyncIterator[Shop]:
    ledger = SqlLedger(engine)
    await ledger.create_schema()
    yield Shop(FakeStock(a=5), ledger)
    await ledger.close()


async def decisions(shop: Shop, engine: AsyncEngine) -> dict[str, str]:
    table = shop.ledger.tables.decision
    async with engine.connect() as connection:
        rows = await connection.execute(select(table.c.key, table.c.verdict))
        return {key.replace("\x1f", "/"): verdict for key, verdict in rows}


def state(shop: Shop) -> tuple[int, list[str], dict[str, str]]:
    """What is available, what is held, what has become of reservations."""
    return shop.stock.available["a"], list(shop.stock.holds), dict(shop.stock.states)


HELD, SOLD, BACK = (3, ["o1"], {}), (3, [], {"o1": "confirmed"}), (5, [], {})


def selling(shop: Shop, fail: bool = False, commit: bool = False, **options: Any) -> Any:
    @shop.deducts(run="now", session="session", operation_id="order_id", sku=lambda: "a", quantity=2, **options)
    async def sell(session: Any, order_id: str, receipt: Receipt = injected()) -> Receipt:
        if isinstance(session, Session):
            await asyncio.to_thread(session.execute, insert(ORDERS).values(id=order_id, count=2))
        elif not receipt.replayed:
            await session.execute(insert(ORDERS).values(id=order_id, count=2))
        if commit:
            await session.commit()
        if fail:
            raise Refused
        return receipt

    return sell


async def test_a_commit_after_the_function_confirms_what_was_held_until_then(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await selling(shop)(session, "o1")
        assert state(shop) == HELD
        await session.commit()
        assert state(shop) == SOLD
    assert shop.stock.log == ["reserve", "pin", "settle confirm"]
    assert await decisions(shop, engine) == {"m1/o1": "committed"}


async def test_a_rollback_gives_the_stock_back_and_frees_the_id(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await selling(shop)(session, "o1")
        await session.rollback()
        assert state(shop) == BACK
        assert await decisions(shop, engine) == {}
        await selling(shop)(session, "o1")
        await session.commit()
    assert state(shop) == SOLD


async def test_a_close_without_commit_gives_the_stock_back(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await selling(shop)(session, "o1")
    assert state(shop) == BACK


@pytest.mark.parametrize("end", ["rollback", "close"])
async def test_a_session_that_the_function_did_not_touch_decides_all_the_same(shop: Shop, engine: AsyncEngine, end: str) -> None:
    @shop.deducts(run="now", session="session", operation_id="order_id", sku=lambda: "a", quantity=2)
    async def sell(session: AsyncSession, order_id: str) -> None: ...

    async with AsyncSession(engine) as session:
        await sell(session, "o1")
        await getattr(session, end)()
        assert state(shop) == BACK
        await session.commit()
        assert state(shop) == BACK
        await sell(session, "o1")
        await session.commit()
        assert state(shop) == SOLD


async def test_a_function_may_begin_the_transaction_itself(shop: Shop, engine: AsyncEngine) -> None:
    @shop.deducts(run="now", session="session", operation_id="order_id", sku=lambda: "a", quantity=2)
    async def sell(session: AsyncSession, order_id: str) -> None:
        async with session.begin():
            await session.execute(insert(ORDERS).values(id=order_id, count=2))

    async with AsyncSession(engine) as session:
        await sell(session, "o1")
        assert state(shop) == SOLD
        async with session.begin():
            pass


async def test_a_savepoint_that_is_released_or_rolled_back_decides_nothing(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        async with session.begin_nested():
            await selling(shop)(session, "o1")
        assert state(shop) == HELD
        with pytest.raises(Refused):
            async with session.begin_nested():
                raise Refused
        assert state(shop) == HELD
        await session.commit()
    assert state(shop) == SOLD


async def test_a_commit_of_the_root_with_a_savepoint_open_confirms_once(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await session.begin_nested()
        await selling(shop)(session, "o1")
        await session.commit()
    assert state(shop) == SOLD
    assert shop.stock.log.count("pin") == 1


async def test_the_transaction_in_progress_at_the_call_is_the_one_that_decides(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await selling(shop)(session, "o1")
        await selling(shop)(session, "o2")
        assert state(shop) == (1, ["o1", "o2"], {})
    assert state(shop) == (1, [], {"o1": "confirmed", "o2": "confirmed"})
    assert await decisions(shop, engine) == {"m1/o1": "committed", "m1/o2": "committed"}


async def test_a_function_that_raises_gives_the_stock_back_at_once_and_the_commit_decides_nothing_more(
    shop: Shop, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session:
        with pytest.raises(Refused):
            await selling(shop, fail=True)(session, "o1")
        assert state(shop) == BACK
        await session.commit()
    assert state(shop) == BACK
    assert shop.stock.log == ["reserve", "undo"]


async def test_a_function_that_raises_after_its_own_commit_has_sold(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        with pytest.raises(Refused):
            await selling(shop, fail=True, commit=True)(session, "o1")
    assert state(shop) == SOLD
    assert "undo" not in shop.stock.log


async def test_a_hold_that_ran_out_before_the_commit_aborts_it(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await selling(shop)(session, "o1")
        shop.stock.expire("o1")
        with pytest.raises(ReservationExpired):
            await session.commit()
        await session.rollback()
        assert (await session.execute(select(ORDERS.c.id))).all() == []
    assert shop.stock.available["a"] == 5


async def test_a_verdict_of_aborted_that_stands_aborts_the_commit(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await shop.ledger.decide("m1\x1fo1", "aborted")
        await selling(shop)(session, "o1")
        with pytest.raises(ReservationClosed):
            await session.commit()
    assert state(shop) == BACK


async def test_raises_translates_what_aborts_the_commit(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await selling(shop, raises={ReservationExpired: Refused})(session, "o1")
        shop.stock.expire("o1")
        with pytest.raises(Refused):
            await session.commit()


async def test_a_commit_that_the_database_refuses_gives_the_stock_back(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await selling(shop)(session, "o1")

        def refuse(connection: Any) -> None:
            raise Refused

        event.listen(engine.sync_engine, "commit", refuse)
        with pytest.raises(Refused):
            await session.commit()
        event.remove(engine.sync_engine, "commit", refuse)
        await session.rollback()
        assert state(shop) == BACK
    assert await decisions(shop, engine) == {}


async def after_a_lost_commit(shop: Shop, engine: AsyncEngine, first: bool) -> None:
    """The commit raises and the connection is closed without a rollback; ``first``: the database committed before."""
    async with AsyncSession(engine) as session:
        await selling(shop)(session, "o1")

        def lose(connection: Any) -> None:
            if first:
                connection.connection.commit()
            raise Refused

        event.listen(engine.sync_engine, "commit", lose)
        with pytest.raises(Refused):
            await session.commit()
        event.remove(engine.sync_engine, "commit", lose)
        await session.close()


async def test_a_commit_whose_answer_was_lost_counts_if_the_ledger_has_its_decision(shop: Shop, engine: AsyncEngine) -> None:
    await after_a_lost_commit(shop, engine, first=True)
    await shop.drained()
    assert state(shop) == SOLD


async def test_a_commit_whose_answer_was_lost_is_aborted_for_good_if_the_ledger_has_no_decision(shop: Shop, engine: AsyncEngine) -> None:
    await after_a_lost_commit(shop, engine, first=False)
    await shop.drained()
    assert state(shop) == (5, [], {"o1": "released"})
    assert await decisions(shop, engine) == {"m1/o1": "aborted"}


@pytest.mark.parametrize(("ttl", "while_open", "after"), [(900, 900, 900), (None, 60.5, None)])
async def test_a_reserve_is_pinned_by_the_commit_and_its_ttl_runs_again_afterwards(
    shop: Shop, engine: AsyncEngine, ttl: float | None, while_open: float, after: float | None
) -> None:
    @shop.reserves(run="now", session="session", operation_id="order_id", sku=lambda: "a", quantity=2, ttl=ttl)
    async def hold(session: AsyncSession, order_id: str) -> None:
        await session.execute(insert(ORDERS).values(id=order_id, count=2))

    async with AsyncSession(engine) as session:
        await hold(session, "o1")
        assert shop.stock.ttls == {"o1": while_open}
        await session.commit()
    assert (state(shop), shop.stock.ttls, shop.stock.pinned) == (HELD, {"o1": after}, set())
    assert shop.stock.log == ["reserve", "pin", "resume"]


async def test_a_replay_of_what_was_committed_commits_without_another_effect(shop: Shop, engine: AsyncEngine) -> None:
    for _ in range(2):
        async with AsyncSession(engine) as session:
            await selling(shop)(session, "o1")
            await session.commit()
    assert state(shop) == SOLD
    assert shop.stock.log.count("settle confirm") == 1


async def test_a_replay_that_rolls_back_leaves_the_first_calls_stock(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as first, AsyncSession(engine) as second:
        receipt = await selling(shop)(first, "o1")
        assert (await selling(shop)(second, "o1")).operation_id == receipt.operation_id
        await second.rollback()
        assert state(shop) == HELD
        await first.commit()
    assert state(shop) == SOLD


async def test_a_replay_that_commits_after_the_first_rolled_back_takes_anew(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as first, AsyncSession(engine) as second:
        await selling(shop)(first, "o1")
        await selling(shop)(second, "o1")
        await first.rollback()
        assert state(shop) == BACK
        await second.commit()
    assert state(shop) == SOLD


async def test_a_replay_of_what_expired_uncommitted_aborts_and_leaves_no_verdict(shop: Shop, engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as first, AsyncSession(engine) as second:
        await selling(shop)(first, "o1")
        await selling(shop)(second, "o1")
        shop.stock.expire("o1")
        await first.rollback()
        with pytest.raises(ReservationExpired):
            await second.commit()
        await second.rollback()
    assert await decisions(shop, engine) == {}


async def test_a_scoped_session_is_resolved(shop: Shop, engine: AsyncEngine) -> None:
    scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=lambda: 1)
    await selling(shop)(scoped, "o1")
    await scoped.commit()
    await scoped.remove()
    assert state(shop) == SOLD


@pytest.mark.parametrize("session", [None, "session", object()])
async def test_what_is_no_session_is_refused_before_stock_moves(shop: Shop, session: Any) -> None:
    with pytest.raises(InvalidOperation, match="must be a SQLAlchemy AsyncSession or Session"):
        await selling(shop)(session, "o1")
    assert shop.stock.log == []


async def test_a_sync_session_is_committed_from_a_thread(shop: Shop, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db", poolclass=NullPool, connect_args={"check_same_thread": False})
    with Session(engine) as session:
        await selling(shop)(session, "o1")
        await asyncio.to_thread(session.commit)
        await asyncio.sleep(0)
        await shop.drained()
        assert state(shop) == SOLD
        await selling(shop)(session, "o2")
        await asyncio.to_thread(session.rollback)
        await asyncio.sleep(0)
        await shop.drained()
    assert state(shop) == SOLD
    engine.dispose()


async def test_a_sync_session_committed_inside_the_event_loop_is_refused_and_its_stock_goes_back(shop: Shop, tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db", poolclass=NullPool, connect_args={"check_same_thread": False})
    with Session(engine) as session:
        await selling(shop)(session, "o1")
        with pytest.raises(InvalidOperation, match="worker thread"):
            session.commit()
    await shop.drained()
    assert state(shop) == BACK
    engine.dispose()


@pytest.mark.parametrize(("order", "expected"), [("o1", SOLD), ("fails", BACK)])
async def test_a_framework_that_commits_after_the_response_decides(shop: Shop, engine: AsyncEngine, order: str, expected: Any) -> None:
    app = FastAPI()
    after_response: list[Any] = []

    async def session() -> AsyncIterator[AsyncSession]:
        async with AsyncSession(engine) as session:
            yield session
            after_response.append(state(shop))
            if order == "fails":
                return
            await session.commit()

    sell = selling(shop)

    @app.post("/{order_id}")
    async def post(order_id: str, session: AsyncSession = Depends(session)) -> str:
        receipt: Receipt = await sell(session, order_id)
        return receipt.operation_id

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
        assert (await client.post(f"/{order}")).json() == order
    assert after_response == [(3, [order], {})]
    assert state(shop) == expected


async def test_a_commit_that_is_cancelled_in_its_last_wait_is_still_carried_out(shop: Shop, engine: AsyncEngine) -> None:
    gate = shop.stock.gate("settle confirm")
    async with AsyncSession(engine) as session:
        await selling(shop)(session, "o1")
        commit = asyncio.create_task(session.commit())
        await shop.stock.reached["settle confirm"].wait()
        commit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await commit
        gate.set()
        await shop.drained()
        assert state(shop) == SOLD


async def test_the_end_is_tried_again_when_redis_does_not_answer(shop: Shop, engine: AsyncEngine) -> None:
    shop.stock.failures["settle confirm"] = [ConnectionError("away")]
    async with AsyncSession(engine) as session:
        await selling(shop)(session, "o1")
        await session.commit()
        await shop.drained()
    assert state(shop) == SOLD
