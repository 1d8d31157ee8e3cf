"""The door of the management pages, without a browser: what every request meets, and that nothing is open by accident."""

from __future__ import annotations

import asyncio
import json
import re
from base64 import urlsafe_b64decode
from collections.abc import AsyncIterator
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from starlette.routing import Mount, Route

from inventory_sdk import Inventory, Line
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import key_of
from inventory_sdk.reconcile.model import Reconcile
from inventory_sdk.web import admin_app
from inventory_sdk.web.admin import Account, PasswordAuth, Role, User
from tests.web.desk import HASHED, LINK, PASSWORD, SECRET, Shop

NEVER_SEEN = "/static/style.css"


class Named:
    """Who asks is who the header says: what a proxy in front would do, and the second implementation of ``Auth``."""

    secret = SECRET

    async def user(self, request: Any) -> User | None:
        name = request.headers.get("x-user")
        return User(name, Role.OPERATOR if name == "olga" else Role.VIEWER) if name else None


@pytest.fixture
async def whole() -> AsyncIterator[Inventory]:
    """A shop with everything embedded: a link at 25 %, and discrepancy 1, of 5 units that Redis has been given by hand."""
    quiet = Reconcile(every=None, whole_every=None, settle=0.01)
    inventory = Inventory("memory://", merchant="m1", metrics=[], reconcile=quiet)
    shop = Shop(inventory)
    async with inventory:
        await inventory.stock.restock([Line("a", 10)], operation_id="po-7")
        await inventory.gray_links.set(LINK, percentage=25, who="gisela", why="first merchants")
        partition = inventory._ready().engine.home("m1")
        hand: Any = partition.wire.client
        await hand.hincrby(partition.key("available"), key_of("m1", "a"), 5)
        await inventory.reconciler.run()
        assert await shop.allocate("m1") in ("stable", "candidate")
        yield inventory


def killed(inventory: Inventory) -> bool:
    return inventory.gray_links.known(LINK).killed


async def corrected(inventory: Inventory) -> bool:
    return (await inventory.reconciler.discrepancy(1)).state != "open"


def signing(**more: Any) -> PasswordAuth:
    return PasswordAuth([Account("olga", Role.OPERATOR, HASHED), Account("victor", Role.VIEWER, HASHED)], secret=SECRET, **more)


def client(app: Any, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="https://admin.test", headers=headers)


async def sign_in(browser: httpx.AsyncClient, name: str, password: str = PASSWORD, **more: str) -> httpx.Response:
    return await browser.post("/sign-in", data={"name": name, "password": password, **more})


def session_of(cookie: str) -> str:
    """What the cookie of ``PasswordAuth`` calls it."""
    _, session, _ = json.loads(urlsafe_b64decode(cookie.partition(".")[0]))
    return str(session)


async def token(browser: httpx.AsyncClient) -> str:
    found = re.search('name="token" value="([0-9a-f]+)"', (await browser.get("/audit")).text)
    assert found is not None
    return found[1]


def inline(html: str) -> list[str]:
    """Scripts and styles that stand in the page itself."""
    found: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            named = dict(attrs)
            if tag == "style" or (tag == "script" and "src" not in named):
                found.append(tag)
            found.extend(name for name in named if name == "style" or name.startswith("on"))
            found.extend(value for value in named.values() if value and value.lower().startswith("javascript:"))

    Tags().feed(html)
    return found


def routes(app: Any) -> list[tuple[str, str]]:
    """(method, path) of every page and form there is."""
    found = []
    for route in app._door.app.app.routes:
        if isinstance(route, Route):
            found += [(method, route.path) for method in sorted(route.methods or ())]
        else:
            assert isinstance(route, Mount)
            assert route.path == "/static"
    return found


async def test_nobody_gets_past_any_route_and_none_is_forgotten(whole: Inventory) -> None:
    app = admin_app(whole, auth=signing())
    assert len(routes(app)) > 25
    async with client(app) as browser:
        for method, path in routes(app):
            if path == "/sign-in":
                continue
            answer = await browser.request(method, path, data={"token": "", "why": "x"} if method == "POST" else None)
            if method == "POST":
                assert answer.status_code == 401, path
            else:
                assert answer.status_code == (303 if method == "GET" else 401) or method == "HEAD", path
                assert answer.status_code != 200, path
            assert "operation" not in answer.text, path
    assert (await whole.ledger.pages.audit()).rows == []


async def test_a_viewer_gets_past_no_form(whole: Inventory) -> None:
    app = admin_app(whole, auth=signing())
    async with client(app) as browser:
        await sign_in(browser, "victor")
        mark = await token(browser)
        for method, path in routes(app):
            if method != "POST" or path in ("/sign-in", "/sign-out"):
                continue
            form = {
                "token": mark,
                "why": "x",
                "link": LINK,
                "number": "1",
                "available": "5",
                "reserved": "0",
                "merchant": "m1",
                "sku": "a",
                "confirmed": "yes",
            }
            answer = await browser.post(path, data=form)
            assert (answer.status_code, "needs an operator" in answer.text) == (403, True), path
    assert [row.kind for row in (await whole.ledger.pages.audit()).rows] == ["sign_in"]
    assert not killed(whole)
    assert not await corrected(whole)


async def test_a_form_of_another_session_or_another_site_does_nothing(whole: Inventory) -> None:
    app = admin_app(whole, auth=signing())
    form = {"link": LINK, "why": "because"}
    async with client(app) as browser, client(app) as other:
        await sign_in(browser, "olga")
        await sign_in(other, "olga")
        mine, theirs = await token(browser), await token(other)
        assert mine != theirs
        for wrong in ({}, {"token": ""}, {"token": theirs}, {"token": mine[:-1]}, {"token": "é"}):
            assert (await browser.post("/link/kill", data={**form, **wrong})).status_code == 403
        for site in ("cross-site", "same-site"):
            answer = await browser.post("/link/kill", data={**form, "token": mine}, headers={"sec-fetch-site": site})
            assert answer.status_code == 403
        answer = await browser.post("/link/kill", data={**form, "token": mine}, headers={"origin": "https://elsewhere.test"})
        assert answer.status_code == 403
        answer = await browser.post("/link/kill", json={**form, "token": mine})
        assert answer.status_code == 403
        assert not killed(whole)
        answer = await browser.post("/link/kill", data={**form, "token": mine}, headers={"sec-fetch-site": "same-origin"})
        assert answer.status_code == 303
        assert killed(whole)


async def test_every_answer_has_the_headers_and_no_page_has_inline_script_or_style(whole: Inventory) -> None:
    app = admin_app(whole, auth=signing())
    async with client(app) as browser:
        answers = [await browser.get("/sign-in"), await browser.get("/"), await browser.get(NEVER_SEEN)]
        await sign_in(browser, "olga")
        asked = ("/", "/search", "/links", "/link?link=fast-allocation", "/discrepancies", "/discrepancy?number=1", "/discrepancy?number=8",
                 "/later", "/frozen", "/audit", "/products", "/nowhere", "/product?merchant=m1&sku=none", "/operation?at=x")  # fmt: skip
        answers += [await browser.get(path) for path in asked]
        answers.append(await browser.post("/link/kill", data={}))
        answers.append(await browser.put("/"))
    for answer in answers:
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        if answer.headers.get("content-type", "").startswith("text/html"):
            assert answer.headers["cache-control"] == "no-store"
            assert inline(answer.text) == []
    assert {answer.status_code for answer in answers} <= {200, 303, 403, 404, 405, 422}


async def test_a_page_whose_controller_is_missing_is_not_there(whole: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Inventory of ours lacks one; another object that is shown may."""
    for name in ("gray_links", "reconciler", "hotspots", "redistribution", "alerts"):
        monkeypatch.setattr(whole, name, None)
    async with client(admin_app(whole, auth=signing())) as browser:
        await sign_in(browser, "olga")
        for path in ("/links", "/link?link=x", "/discrepancies", "/discrepancy?number=1", "/triggers"):
            assert (await browser.get(path)).status_code == 404
        overview = (await browser.get("/")).text
        assert "Discrepancies" not in overview
        assert "Gray links" not in overview


async def test_another_auth_decides_alone_and_has_no_sign_in_form(whole: Inventory) -> None:
    app = admin_app(whole, auth=Named())
    async with client(app) as nobody:
        for path in ("/", "/sign-in", "/audit"):
            assert (await nobody.get(path)).status_code == 401
        assert (await nobody.post("/sign-in", data={"name": "olga"})).status_code == 401
    async with client(app, **{"x-user": "olga"}) as browser:
        mark = await token(browser)
        form = {"token": mark, "link": LINK, "why": "because"}
        assert (await browser.post("/link/kill", data=form, headers={"x-user": "victor"})).status_code == 403
        assert (await browser.post("/link/kill", data=form)).status_code == 303
    (row,) = (await whole.ledger.pages.audit()).rows
    assert (row.actor, row.kind, row.outcome) == ("olga", "kill", "done: nobody takes the new way any more")


@pytest.mark.parametrize("auth", [None, object(), "olga:secret"])
def test_there_are_no_pages_without_an_auth(auth: Any) -> None:
    with pytest.raises(InvalidOperation, match="never open"):
        admin_app(Inventory("memory://", metrics=[]), auth=auth)


def test_a_short_secret_is_refused() -> None:
    short = Named()
    short.secret = "x" * 31  # type: ignore[misc]
    with pytest.raises(InvalidOperation, match="at least 32"):
        admin_app(Inventory("memory://", metrics=[]), auth=short)


async def test_every_act_needs_a_reason(whole: Inventory) -> None:
    async with client(admin_app(whole, auth=Named()), **{"x-user": "olga"}) as browser:
        mark = await token(browser)
        for why in ({}, {"why": "  "}, {"why": "x" * 501}):
            answer = await browser.post("/link/kill", data={"token": mark, "link": LINK, **why})
            assert answer.status_code == 422
            assert "why" in answer.text
    assert not killed(whole)
    assert (await whole.ledger.pages.audit()).rows == []


async def test_an_act_that_was_cancelled_half_way_stays_on_record_as_begun(whole: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = asyncio.Event()

    async def kill(*_: Any, **__: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    # In place of the real one, which is over too soon to be met in the middle.
    monkeypatch.setattr(whole.gray_links, "kill", kill)
    async with client(admin_app(whole, auth=Named()), **{"x-user": "olga"}) as browser:
        mark = await token(browser)
        form = {"token": mark, "link": LINK, "why": "because"}
        asking = asyncio.create_task(browser.post("/link/kill", data=form))
        await entered.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    (row,) = (await whole.ledger.pages.audit()).rows
    assert (row.actor, row.kind, row.outcome, row.details) == ("olga", "kill", "begun", {"link": LINK, "why": "because"})


async def test_the_overview_says_what_it_cannot_see(whole: Inventory, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: Any, **__: Any) -> Any:
        raise ConnectionError("the server is <away>")

    async with client(admin_app(whole, auth=Named()), **{"x-user": "victor"}) as browser:
        monkeypatch.setattr(whole.ledger, "partition", away)
        answer = await browser.get("/")
    assert answer.status_code == 200
    assert "the server is &lt;away&gt;" in answer.text
    assert "Failed functions" in answer.text


async def test_what_refreshes_itself_leaves_for_the_sign_in_when_the_session_has_ended(whole: Inventory) -> None:
    async with client(admin_app(whole, auth=signing())) as browser:
        answer = await browser.get("/overview", headers={"hx-request": "true"})
    assert (answer.status_code, answer.headers["hx-redirect"], answer.text) == (401, "/sign-in", "")


async def test_after_the_sign_in_one_stays_here(whole: Inventory) -> None:
    away = ["https://elsewhere.test/", "//elsewhere.test",
            "/\\elsewhere.test", "/\t/elsewhere.test", "\\\\elsewhere.test", "javascript:alert(1)",
            "/\r\nset-cookie: a=b", "", "x"]  # fmt: skip
    async with client(admin_app(whole, auth=signing())) as browser:
        for back in away:
            answer = await sign_in(browser, "olga", next=back)
            assert (answer.status_code, answer.headers["location"]) == (303, "/"), back
            assert answer.headers.get_list("set-cookie") == [answer.headers["set-cookie"]]
    cookie = answer.headers["set-cookie"]
    for part in ("HttpOnly", "Secure", "SameSite=strict", "Path=/"):
        assert part in cookie


async def test_a_session_is_made_at_the_sign_in_whatever_the_browser_brings(whole: Inventory) -> None:
    """Nobody can give somebody a session and know it after the sign-in; nor is there one before it."""
    async with client(admin_app(whole, auth=signing())) as enemy, client(admin_app(whole, auth=signing())) as browser:
        assert "set-cookie" not in (await browser.get("/sign-in")).headers
        planted = (await sign_in(enemy, "victor")).cookies["inventory_admin"]
        browser.cookies.set("inventory_admin", planted, domain="admin.test")
        mine = (await sign_in(browser, "olga")).cookies["inventory_admin"]
        again = (await sign_in(browser, "olga")).cookies["inventory_admin"]
        assert len({session_of(cookie) for cookie in (planted, mine, again)}) == 3


async def test_another_site_cannot_sign_somebody_in(whole: Inventory) -> None:
    async with client(admin_app(whole, auth=signing())) as browser:
        for headers in ({"sec-fetch-site": "cross-site"}, {"origin": "https://elsewhere.test"}, {"origin": "null"}):
            answer = await browser.post("/sign-in", data={"name": "olga", "password": PASSWORD}, headers=headers)
            assert (answer.status_code, "set-cookie" in answer.headers) == (403, False), headers


async def test_one_who_has_to_wait_is_told_so_and_how_long(whole: Inventory) -> None:
    async with client(admin_app(whole, auth=signing())) as browser:
        for _ in range(5):
            assert (await sign_in(browser, "olga", "a wrong password")).status_code == 401
        answer = await sign_in(browser, "olga")
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert "too many wrong passwords; retry after" in answer.text


async def test_a_correction_needs_the_numbers_that_were_seen(whole: Inventory) -> None:
    async with client(admin_app(whole, auth=Named()), **{"x-user": "olga"}) as browser:
        form = {"token": await token(browser), "number": "1", "why": "counted"}
        for seen, status in (({}, 422), ({"available": "x", "reserved": "0"}, 422), ({"available": "-4", "reserved": "0"}, 409)):
            assert (await browser.post("/discrepancy/correct", data={**form, **seen})).status_code == status
            assert not await corrected(whole)
        offered = re.search('name="available" value="(-?[0-9]+)"', (await browser.get("/discrepancy?number=1")).text)
        assert offered is not None
        for _ in range(2):
            answer = await browser.post("/discrepancy/correct", data={**form, "available": offered[1], "reserved": "0"})
            assert (answer.status_code, answer.headers["location"]) == (303, "/discrepancy?number=1")
    assert [row.kind for row in (await whole.ledger.pages.audit()).rows] == ["correct"]
    assert (await whole.stock.level("a")).available == 10


async def test_a_long_form_is_not_read_to_its_end(whole: Inventory) -> None:
    async with client(admin_app(whole, auth=signing())) as browser:
        assert (await sign_in(browser, "olga", "x" * 70_000)).status_code == 413


async def test_a_websocket_is_let_down(whole: Inventory) -> None:
    app, sent = admin_app(whole, auth=signing()), []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    await app({"type": "websocket", "path": "/", "headers": []}, receive, send)
    assert sent == []
