"""Pages while Redis or the database is away: each answers, in words, with what the other one knows. The servers are real ones: a
redis-server of the test's own that is killed, a PostgreSQL behind a proxy that cuts off or lets nothing through."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from sqlalchemy.engine import make_url

from inventory_sdk import Inventory, Line
from inventory_sdk.model import key_of
from inventory_sdk.web import admin_app
from inventory_sdk.web.admin import acting, finding, looking
from inventory_sdk.web.admin import app as admin
from tests.conftest import service_url
from tests.faults.proxy import Proxy
from tests.servers_kit import RedisServer, redis_server
from tests.web.desk import LINK, Servers, Shop, until
from tests.web.test_door import Named, client, sign_in, signing, token

pytestmark = pytest.mark.postgresql

PAGES = [
    "/", "/overview", "/search", "/search?q=order-42", "/search?q=order-42&merchant=m1", "/search?q=phone-15&merchant=m1",
    "/products?merchant=m1",
    "/product?merchant=m1&sku=phone-15", "/operation?merchant=m1&id=order-42", "/discrepancies", "/discrepancy?number=1", "/links",
    f"/link?link={LINK}", "/later", "/frozen", "/triggers", "/audit",
]  # fmt: skip
BOUND = 20.0
"""Seconds after which a page hangs, as far as these tests go."""


@dataclass
class Stand:
    """A shop on servers that may go away, and who looks at its pages as an operator."""

    redis: RedisServer
    database: Proxy
    shop: Shop
    app: Any
    olga: httpx.AsyncClient

    async def looks(self, path: str) -> tuple[int, str]:
        async with asyncio.timeout(BOUND):
            answer = await self.olga.get(path)
        return answer.status_code, answer.text

    async def acts(self, path: str, mark: str, **form: str) -> httpx.Response:
        async with asyncio.timeout(BOUND):
            return await self.olga.post(path, data={"token": mark, "why": "because", **form})

    async def looks_everywhere(self) -> dict[str, tuple[int, str]]:
        """Every page comes, as a page, and none of them is a traceback or an error that nobody foresaw."""
        found = dict(zip(PAGES, await asyncio.gather(*map(self.looks, PAGES)), strict=True))
        for path, (status, text) in found.items():
            assert status in (200, 303, 503), path
            assert "Traceback" not in text, path
            assert status == 303 or "</html>" in text or path == "/overview", path
        return found


@pytest.fixture
async def stand() -> AsyncIterator[Stand]:
    database = make_url(service_url("postgresql"))
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(redis_server())
        servers = Servers(redis.url, service_url("postgresql"), f"t{uuid.uuid4().hex[:12]}")
        stack.push_async_callback(servers.sweep_database)
        proxy = await stack.enter_async_context(Proxy(database.host or "127.0.0.1", database.port or 5432))
        behind = servers.behind(proxy.port)
        shop, shown = Shop(behind.inventory()), Shop(behind.inventory())
        inventory = await stack.enter_async_context(shop.inventory)
        await inventory.create_schema()
        worker = await stack.enter_async_context(AsyncExitStack())
        await worker.enter_async_context(inventory.worker(task_attempts=1))
        await inventory.stock.restock([Line("phone-15", 50)], operation_id="po-7")
        await inventory.stock.reserve([Line("phone-15", 2)], operation_id="order-42", order="order-42")
        await inventory.gray_links.set(LINK, percentage=25, who="gisela", why="nobody complained")
        await shop.ship("order-77")
        await until(lambda: failed_in(inventory))
        partition = inventory._ready().engine.home("m1")
        hand: Any = partition.wire.client
        await hand.hincrby(partition.key("available"), key_of("m1", "phone-15"), 3)
        await inventory.reconciler.run()
        await worker.aclose()  # what follows is not about it
        pages = await stack.enter_async_context(shown.inventory)
        app = admin_app(pages, auth=Named())
        olga = await stack.enter_async_context(client(app, **{"x-user": "olga"}))
        yield Stand(redis, proxy, shop, app, olga)
        await proxy.allow()
        proxy.resume()


def life_of(app: Any) -> Any:
    """The lifespan of the pages, as a server has it."""
    return app._door.app.app.router.lifespan_context(app)


async def failed_in(inventory: Inventory) -> bool:
    return (await inventory.ledger.pages.waiting_tasks())[1] == 1


async def test_without_redis_the_ledger_is_shown_and_what_redis_knows_is_said_to_be_missing(stand: Stand) -> None:
    mark = await token(stand.olga)
    stand.redis.kill()
    found = await stand.looks_everywhere()
    assert "How far the ledger is can’t be shown" in found["/"][1]
    assert "?" in found["/"][1]
    assert "order-42" in found["/search?q=order-42"][1]
    status, product = found["/product?merchant=m1&sku=phone-15"]
    assert status == 200
    assert "What Redis says can’t be shown" in product
    assert '<th scope="row">Ledger</th><td class="number">47</td>' in product
    assert "25 %" in found[f"/link?link={LINK}"][1]
    assert "rules that this process goes by" in found[f"/link?link={LINK}"][1]
    assert found["/frozen"][0] == 503
    assert "Nothing is frozen" not in found["/frozen"][1]
    answer = await stand.acts("/link/kill", mark, link=LINK)
    assert answer.status_code == 303
    assert "failed: Redis does not answer" in (await stand.looks(answer.headers["location"]))[1]
    stand.shop.away.clear()
    (row,) = (await stand.shop.inventory.ledger.pages.dead_tasks()).rows
    assert (await stand.acts("/later/retry", mark, number=str(row.task.number), merchant="m1")).status_code == 303
    outcomes = [(row.kind, row.outcome.partition(":")[0]) for row in (await stand.shop.inventory.ledger.pages.audit()).rows]
    assert outcomes == [("retry", "done"), ("kill", "failed")]


@pytest.mark.parametrize("how", ["refuses", "hangs"])
async def test_without_the_database_redis_is_shown_and_nothing_is_done_that_cannot_be_written_down(
    stand: Stand, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = await token(stand.olga)
    if how == "refuses":
        await stand.database.refuse()
    else:
        for each in (acting, admin, looking):
            monkeypatch.setattr(each, "PATIENCE", 0.5)
        for module in (looking, finding):
            monkeypatch.setattr(module, "LEDGER_PATIENCE", 0.5)
        stand.database.hold()
    found = await stand.looks_everywhere()
    assert found["/"][0] == 200
    assert "How far the ledger is can’t be shown" in found["/"][1]
    status, search = found["/search?q=order-42&merchant=m1"]
    assert status == 503
    assert "What the ledger has can’t be shown" in search
    assert "Redis has accepted it" in search
    assert "Nothing is known by" not in search
    assert "50 available" in found["/search?q=phone-15&merchant=m1"][1]
    status, operation = found["/operation?merchant=m1&id=order-42"]
    assert status == 503
    assert "Redis has accepted it; whether the ledger has applied it can’t be said now" in operation
    status, product = found["/product?merchant=m1&sku=phone-15"]
    assert status == 503
    assert '<th scope="row">Redis</th><td class="number">50</td><td class="number">2</td>' in product
    for path in ("/later", "/audit", "/discrepancies"):
        assert found[path][0] == 503
        assert "The database can&#39;t be asked now" in found[path][1], path
    assert "25 %" in found[f"/link?link={LINK}"][1]
    assert found["/frozen"][0] == 200
    answer = await stand.acts("/link/kill", mark, link=LINK)
    assert answer.status_code == 503
    assert "nothing was done" in answer.text
    assert not (await stand.shop.inventory.gray_links.show(LINK)).killed
    async with client(admin_app(stand.shop.inventory, auth=signing())) as browser:  # who comes because of this has to get in
        assert (await sign_in(browser, "olga")).status_code == 303
    await stand.database.allow()
    stand.database.resume()
    answer = await stand.acts("/link/kill", mark, link=LINK)
    assert answer.status_code == 303
    assert (await stand.shop.inventory.gray_links.show(LINK)).killed


async def test_an_act_whose_server_hangs_is_on_record_as_unknown(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    monkeypatch.setattr(acting, "LONGEST_ACT", 0.5)
    mark = await token(stand.olga)
    stand.redis.signal(signal.SIGSTOP)
    answer = await stand.acts("/link/kill", mark, link=LINK)
    stand.redis.signal(signal.SIGCONT)
    (row,) = (await stand.shop.inventory.ledger.pages.audit()).rows
    assert row.outcome.startswith("unknown: it did not end within")
    assert "may have been done all the same" in (await stand.looks(answer.headers["location"]))[1]


@pytest.mark.parametrize("gone", ["redis", "database"])
async def test_pages_come_up_while_a_server_is_away_and_are_whole_when_it_is_back(
    stand: Stand, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Served alone, as ``inventory-sdk admin`` does: then the pages start the inventory."""
    monkeypatch.setattr(admin, "AGAIN", 0.05)
    servers = Servers(stand.redis.url, service_url("postgresql"), stand.shop.inventory._settings.namespace)
    inventory = Shop(servers.behind(stand.database.port).inventory()).inventory
    app = admin_app(inventory, auth=Named())
    if gone == "redis":
        stand.redis.kill()
    else:
        await stand.database.refuse()
    async with life_of(app), client(app, **{"x-user": "victor"}) as victor:
        stand.olga = victor
        found = await stand.looks_everywhere()
        assert found["/"][0] == 200
        said = "How far the ledger is can’t be shown" if gone == "redis" else "The inventory can’t start"
        assert said in found["/"][1]
        if gone == "redis":
            stand.redis.start()
        else:
            await stand.database.allow()

        async def started() -> bool:
            return said not in (await stand.looks("/"))[1]

        await until(started)
        assert (await stand.looks("/audit"))[0] == 200
        assert inventory._running().open
    assert not inventory._here


async def test_a_wrong_setting_ends_the_start_at_once() -> None:
    """It would not pass by itself."""
    inventory = Inventory("redis://127.0.0.1:1/0", database="sqlite+aiosqlite:///no/such/folder/stock.db", metrics=[])

    async def broken() -> None:
        raise TypeError("a candidate that does something else to stock")

    inventory.start = broken  # type: ignore[method-assign]
    with pytest.raises(TypeError, match="something else"):
        async with life_of(admin_app(inventory, auth=Named())):
            pass
