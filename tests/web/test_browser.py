"""What people do on the management pages, in a browser: find, correct, kill, retry, reopen; and who may not."""

from __future__ import annotations

import asyncio

import pytest
from playwright.async_api import Browser

from inventory_sdk import Line
from inventory_sdk.errors import StockFrozen
from tests.web.conftest import Visit
from tests.web.desk import HOSTILE, Desk


async def acts_of(shop: Desk) -> list[tuple[str, str, str]]:
    """(who, what, outcome) in the ledger's audit, oldest first, sign-ins left out."""
    rows = (await shop.inventory.ledger.pages.audit()).rows
    return [(row.actor, row.kind, row.outcome.partition(":")[0]) for row in reversed(rows) if row.kind != "sign_in"]


async def test_nobody_sees_anything_before_signing_in(visit: Visit) -> None:
    for path in ("/", "/search?q=order-42", "/product?merchant=m1&sku=phone-15", "/later", "/frozen", "/links", "/audit", "/nowhere"):
        await visit.goes(path)
        assert await visit.page.locator("h1").inner_text() == "Sign in"
        assert await visit.page.locator("table, nav").count() == 0
    await visit.goes("/search?q=order-42")
    await visit.signs_in("olga", "not her password")
    assert "don’t belong together" in (await visit.text()).replace("'", "’")
    visit.complaints.clear()  # the browser says that the answer was 401
    await visit.signs_in("olga")
    assert visit.page.url.endswith("/search?q=order-42")


async def test_an_operation_is_found_by_its_order_and_shows_its_whole_life(visit: Visit) -> None:
    await visit.goes("/")
    await visit.signs_in("victor")
    await visit.page.get_by_role("link", name="Search", exact=True).click()
    await visit.page.get_by_label("Order, operation").fill("order-42")
    await visit.page.keyboard.press("Enter")
    await visit.page.get_by_role("rowheader", name="order-42").first.get_by_role("link").click()
    await visit.page.wait_for_url("**/operation?at=*")
    text = await visit.text()
    for part in ("Receipt", "Journal entry 0/1-", "Message", "Ledger row", "Change rows", "applied", "Reservation order-42", "shipment-1"):
        assert part in text
    await visit.page.get_by_role("link", name="phone-15").first.click()
    assert await visit.page.locator("h1").inner_text() == "phone-15"
    assert "flash-29" in await visit.text()


async def test_products_and_merchants_are_found(visit: Visit) -> None:
    await visit.goes("/")
    await visit.signs_in("victor")
    await visit.goes("/search")
    assert "m2" in await visit.text()
    await visit.goes("/search?q=phone")
    await visit.page.get_by_role("link", name="phone-15 m2").click()
    assert "20" in await visit.text(".balances")
    await visit.goes("/search?q=nothing-like-it")
    assert "Nothing is known by" in await visit.text()


async def test_hostile_names_are_only_ever_text(visit: Visit) -> None:
    await visit.goes("/")
    await visit.signs_in("olga")
    asked = {"merchant": "m1", "sku": HOSTILE}
    for path in ("/", "/products?merchant=m1", "/operation?merchant=m1&id=order-42", "/link?link=fast-allocation", "/search?merchant=m1"):
        await visit.goes(path)
        assert "<img src=x onerror=alert(1)>" in await visit.text()
        assert await visit.page.locator("main img").count() == 0
        assert "49" not in await visit.text("h1")
    from urllib.parse import urlencode

    await visit.goes("/product?" + urlencode(asked))
    assert (await visit.page.locator("h1").inner_text()) == HOSTILE.replace("\u202e", "⟨U+202E⟩")
    assert await visit.page.locator("main img").count() == 0
    await visit.goes("/search?" + urlencode({"q": HOSTILE, "merchant": '"><script>alert(2)</script>'}))
    assert await visit.page.locator("main script").count() == 0


async def test_an_operator_corrects_a_discrepancy_with_a_second_look(visit: Visit) -> None:
    await visit.goes("/discrepancies")
    await visit.signs_in("olga")
    await visit.page.get_by_role("link", name="7", exact=True).click()
    assert "Changed by hand in Redis" in await visit.text("h1")
    await visit.acts("Correct 50 units", "counted on the shelf")
    assert visit.shop.reconciler.corrected == [(7, "counted on the shelf", "olga")]
    assert "corrected" in await visit.text("h1")
    assert "counted on the shelf" in await visit.text()


async def test_an_operator_kills_a_link_and_restores_it(visit: Visit) -> None:
    await visit.goes("/link?link=fast-allocation")
    await visit.signs_in("olga")
    await visit.acts("Kill", "refusals doubled")
    assert visit.shop.gray.rules.killed
    assert "Kill: done" in await visit.text("#said")
    assert "refusals doubled" in await visit.text()
    await visit.acts("Restore", "the fix is out")
    assert not visit.shop.gray.rules.killed
    assert await acts_of(visit.shop) == [("olga", "kill", "done"), ("olga", "restore", "done")]
    await visit.goes("/audit")
    assert "refusals doubled" in await visit.text()


async def test_an_operator_retries_a_failed_function_and_the_worker_runs_it(visit: Visit) -> None:
    await visit.goes("/later")
    await visit.signs_in("olga")
    assert "the address service is away" in await visit.text()
    visit.shop.address_service_is_away = False
    await visit.acts("Retry", "the address service is back")
    async with asyncio.timeout(30):
        await visit.shop.shipping.wait()
    assert visit.shop.shipped == ["order-77"]
    assert "None has failed" in await visit.text()
    assert await acts_of(visit.shop) == [("olga", "retry", "done")]


async def test_an_operator_reopens_a_frozen_sku_and_it_sells_again(visit: Visit) -> None:
    stock = visit.shop.inventory.stock
    with pytest.raises(StockFrozen):
        await stock.deduct([Line("case", 1)])
    await visit.goes("/frozen")
    await visit.signs_in("olga")
    await visit.acts("Compare and reopen", "the hand is known")
    assert "sells again" in await visit.text("#said")
    assert "Nothing is frozen" in await visit.text()
    await stock.deduct([Line("case", 1)])
    assert await acts_of(visit.shop) == [("olga", "reopen", "done")]


async def test_a_sku_that_differs_stays_frozen_and_the_page_says_by_how_much(visit: Visit) -> None:
    partition = visit.shop.inventory._ready().engine.home("m1")
    await partition.wire.client.hincrby(partition.key("available"), "m1\x1fcase", 4)
    await visit.goes("/frozen")
    await visit.signs_in("olga")
    await visit.acts("Compare and reopen", "it looks right")
    assert "failed" in await visit.text("#said")
    assert "81" in await visit.text("#said")
    assert [each.sku for each in await visit.shop.inventory.stock.frozen()] == ["case"]
    assert await acts_of(visit.shop) == [("olga", "reopen", "failed")]


async def test_a_viewer_sees_everything_and_is_offered_nothing(visit: Visit) -> None:
    await visit.goes("/")
    await visit.signs_in("victor")
    for path in ("/later", "/frozen", "/link?link=fast-allocation", "/discrepancy?number=7", "/product?merchant=m1&sku=case"):
        assert await visit.goes(path) == 200
        assert await visit.page.locator("main form:not([role=search])").count() == 0
    assert await visit.goes("/audit") == 200


async def test_the_overview_refreshes_itself_without_losing_the_place(visit: Visit) -> None:
    await visit.goes("/")
    await visit.signs_in("victor")
    assert "1 of 1" in await visit.text("#overview")
    await visit.page.evaluate("document.querySelector('#overview').setAttribute('hx-trigger', 'refresh')")
    await visit.page.evaluate("htmx.process(document.body)")
    await visit.page.get_by_role("link", name="Frozen SKUs").focus()
    async with visit.page.expect_response("**/overview"):
        await visit.page.evaluate("htmx.ajax('GET', '/overview', {target: '#overview', swap: 'outerMorph'})")
    await visit.page.wait_for_function("document.activeElement.textContent.includes('Frozen SKUs')")
    assert await visit.page.locator("#overview").count() == 1


async def test_signing_out_ends_the_session_also_for_a_copied_cookie(visit: Visit) -> None:
    await visit.goes("/")
    await visit.signs_in("olga")
    cookies = await visit.page.context.cookies()
    assert [(each["name"], each["httpOnly"], each["sameSite"]) for each in cookies] == [("inventory_admin", True, "Strict")]
    await visit.page.get_by_role("button", name="Sign out").click()
    assert await visit.page.locator("h1").inner_text() == "Sign in"
    await visit.page.context.add_cookies(cookies)
    await visit.goes("/")
    assert await visit.page.locator("h1").inner_text() == "Sign in"


async def test_mounted_below_a_path_every_link_and_form_stays_there(browser: Browser, mounted: Desk) -> None:
    context = await browser.new_context(color_scheme="dark")
    visit = Visit(await context.new_page(), mounted)
    await visit.goes("/frozen")
    assert visit.page.url == f"{mounted.url}/sign-in?next=%2Ffrozen"
    await visit.signs_in("olga")
    assert visit.page.url == f"{mounted.url}/frozen"
    await visit.acts("Compare and reopen", "the hand is known")
    assert visit.page.url.startswith(f"{mounted.url}/frozen?said=")
    for link in await visit.page.locator("a[href]").all():
        href = await link.get_attribute("href")
        assert href is not None
        assert href.startswith(("/admin", "#"))
    await context.close()
    assert visit.complaints == []
