"""What people do on the management pages, in a browser, on a shop that really sells: find, correct, kill, retry, reopen; who may not."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import pytest_asyncio
from playwright.async_api import Browser
from starlette.applications import Starlette
from starlette.routing import Mount

from inventory_sdk import Line
from inventory_sdk.errors import StockFrozen
from inventory_sdk.web import admin_app
from tests.web.conftest import HERE, Visit
from tests.web.desk import HOSTILE, LINK, Desk, hostile, served, until

pytestmark = [HERE, pytest.mark.redis, pytest.mark.postgresql]

SHOWN = HOSTILE.replace("\u202e", "⟨U+202E⟩")


async def acts_of(shop: Desk, kind: str) -> list[tuple[str, str]]:
    """(who, outcome) in the ledger's audit, oldest first."""
    rows = (await shop.pages.ledger.pages.audit()).rows
    return [(row.actor, row.outcome.partition(":")[0]) for row in reversed(rows) if row.kind == kind]


def everywhere(shop: Desk) -> list[str]:
    """A path of every page."""
    product = urlencode({"merchant": "m1", "sku": hostile("sku-")})
    enemy = urlencode({"merchant": hostile("shop-"), "sku": hostile("sku-")})
    operations = [hostile("po-"), hostile("hold-"), hostile("count-"), hostile("order-"), "order-42", "oversold-case"]
    numbers = [each.number for each in shop.found.values()]
    return [
        "/",
        "/search",
        "/search?merchant=m1",
        "/search?q=order-42",
        "/search?" + urlencode({"q": hostile("order-")}),
        "/search?" + urlencode({"merchant": hostile("shop-")}),
        "/products?merchant=m1",
        f"/product?{product}",
        f"/product?{enemy}",
        "/product?merchant=m1&sku=lid",
        *("/operation?" + urlencode({"merchant": "m1", "id": each}) for each in operations),
        "/discrepancies",
        *(f"/discrepancy?number={number}" for number in numbers),
        "/links",
        f"/link?link={LINK}",
        "/later",
        "/frozen",
        "/triggers",
        "/audit",
    ]


async def test_nobody_sees_anything_before_signing_in(visit: Visit) -> None:
    for path in ("/", "/search?q=order-42", "/product?merchant=m1&sku=phone-15", "/later", "/frozen", "/audit", "/nowhere"):
        await visit.goes(path)
        assert await visit.page.locator("h1").inner_text() == "Sign in"
        assert await visit.page.locator("table, nav").count() == 0
    await visit.goes("/search?q=order-42")
    await visit.signs_in("olga", "not her password")
    assert "don’t belong together" in (await visit.text()).replace("'", "’")
    visit.complaints.clear()  # the browser says that the answer was 401
    await visit.signs_in("olga")
    assert visit.page.url.endswith("/search?q=order-42")


# Find --------------------------------------------------------------------------------------------------------------------------------


async def test_an_operation_is_found_by_its_order_and_shows_its_whole_life(visit: Visit) -> None:
    await visit.is_("victor")
    await visit.goes("/")
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
    await visit.is_("victor")
    await visit.goes("/search")
    await visit.page.get_by_role("link", name="m2", exact=True).click()
    assert "po-7" in await visit.text("table")
    await visit.goes("/search?q=phone")
    await visit.page.get_by_role("link", name="phone-15 m2").click()
    assert "20" in await visit.text(".balances")
    await visit.goes("/search?q=nothing-like-it")
    assert "Nothing is known by" in await visit.text()


async def test_the_overview_shows_what_is_hot_what_alerts_and_what_is_behind(visit: Visit, shop: Desk) -> None:
    await visit.is_("victor")
    await visit.goes("/")
    assert "1 of 1" in await visit.text("#overview")
    await asyncio.gather(*[shop.shop.buy(f"rush-{number}", "phone-15") for number in range(60)])

    async def told() -> bool:
        return bool(shop.pages.hotspots.top()) and "stock_out" in {each.rule for each in await shop.pages.alerts.firing()}

    await until(told)
    await visit.goes("/")
    assert "phone-15" in await visit.text("section[aria-labelledby=hot]")
    alerts = visit.page.locator("section[aria-labelledby=alerts]")
    assert "is out in" in await alerts.inner_text()
    assert "Redis and ledger disagreed" in await alerts.inner_text()
    await alerts.get_by_role("link", name="phone-15").click()
    assert await visit.page.locator("h1").inner_text() == "phone-15"


# Mend --------------------------------------------------------------------------------------------------------------------------------


async def test_an_operator_corrects_a_discrepancy_with_a_second_look_and_the_sides_agree(visit: Visit, shop: Desk) -> None:
    found = shop.found["charger"]
    redis, ledger = await shop.sides("charger")
    assert redis[0] == ledger[0] + 50
    await visit.is_("olga")
    await visit.goes("/discrepancies?sku=charger")
    await visit.page.get_by_role("link", name=str(found.number), exact=True).click()
    assert "Changed by hand in Redis" in await visit.text("h1")
    await visit.acts("Correct 50 units", "counted on the shelf")
    assert "corrected" in await visit.text("h1")
    assert "counted on the shelf" in await visit.text()
    assert await shop.sides("charger") == (ledger, ledger)
    assert (await shop.pages.reconciler.run(merchant="m1", sku="charger")).clean
    assert not [each for each in await shop.pages.ledger.verify() if "charger" in each]
    assert await acts_of(shop, "correct") == [("olga", "done")]
    await visit.goes("/audit")
    assert "counted on the shelf" in await visit.text()


async def test_a_correction_that_is_sent_twice_is_made_once(visit: Visit, shop: Desk) -> None:
    found = shop.found["cable"]
    _, ledger = await shop.sides("cable")
    await visit.is_("olga")
    await visit.goes(f"/discrepancy?number={found.number}")
    twice = """async () => {
        const form = document.querySelector('form[action$="/discrepancy/correct"]');
        form.querySelector('[name=why]').value = 'twice';
        const body = new URLSearchParams(new FormData(form));
        const sent = [1, 2, 3].map(() => fetch(form.action, {method: 'POST', body}));
        return (await Promise.all(sent)).map(answer => answer.status);
    }"""
    assert await visit.page.evaluate(twice) == [200, 200, 200]  # each was sent on to the discrepancy's page
    assert await shop.sides("cable") == (ledger, ledger)
    rows = (await shop.pages.ledger.pages.audit()).rows
    assert [row.details["discrepancy"] for row in rows if row.kind == "correct"].count(found.number) == 1
    await visit.page.reload()
    assert "corrected" in await visit.text("h1")


async def test_a_drift_that_has_grown_since_it_was_looked_at_is_not_corrected_unseen(visit: Visit, shop: Desk) -> None:
    await shop.by_hand("phone-15", 3, "m2")
    (found,) = (await shop.pages.reconciler.run(merchant="m2", sku="phone-15")).open
    await visit.is_("olga")
    await visit.goes(f"/discrepancy?number={found.number}")
    await shop.by_hand("phone-15", 2, "m2")
    await visit.acts("Correct 3 units", "counted")
    assert "it has changed since you looked" in await visit.text()
    assert (await shop.sides("phone-15", "m2"))[0][0] == (await shop.sides("phone-15", "m2"))[1][0] + 5
    visit.complaints.clear()  # the browser says that the answer was 409
    await visit.goes(f"/discrepancy?number={found.number}")
    await visit.acts("Correct 5 units", "counted again")
    redis, ledger = await shop.sides("phone-15", "m2")
    assert redis == ledger


async def test_what_cannot_be_corrected_says_why_and_offers_nothing(visit: Visit, shop: Desk) -> None:
    await visit.is_("olga")
    await visit.goes(f"/discrepancy?number={shop.found['box'].number}")
    assert "can’t be corrected" in await visit.text()
    assert await visit.page.locator("main form").count() == 0


async def test_an_operator_kills_a_link_and_the_next_call_of_another_process_goes_the_old_way(visit: Visit, shop: Desk) -> None:
    seller = shop.shop
    assert (seller.inventory.gray_links.route("m1"), await seller.allocate("m1")) == ("candidate", "candidate")
    await visit.is_("olga")
    await visit.goes(f"/link?link={LINK}")
    await visit.acts("Kill", "refusals doubled")

    async def routed(variant: str) -> None:
        async def there() -> bool:
            return seller.inventory.gray_links.route("m1") == variant and await seller.allocate("m1") == variant

        await until(there)

    await routed("stable")
    assert "Kill: done" in await visit.text("#said")
    assert "refusals doubled" in await visit.text("section[aria-labelledby=history]")
    await visit.acts("Restore", "the fix is out")
    await routed("candidate")
    assert await acts_of(shop, "kill") == await acts_of(shop, "restore") == [("olga", "done")]
    await visit.goes("/audit")
    assert "refusals doubled" in await visit.text()


async def test_an_operator_retries_a_failed_function_and_the_worker_runs_it(visit: Visit, shop: Desk) -> None:
    seller = shop.shop
    assert "order-77" not in seller.shipped
    await visit.is_("olga")
    await visit.goes("/later")
    card = visit.page.locator("article", has_text="order-77")
    assert "the address service is away" in await card.inner_text()
    number = str(await card.locator("[name=number]").get_attribute("value"))
    seller.away.discard("order-77")
    await visit.acts("Retry", "the address service is back", place=f"article:has([name=number][value='{number}'])")

    async def done() -> bool:
        page = await shop.pages.ledger.pages.named("order-77", "m1")
        life = await shop.pages.ledger.pages.life(page[0].position, page[0].index)
        return life is not None and life.tasks[0].state == "done"

    await until(done)
    assert seller.shipped.count("order-77") == 1
    assert "retry: done" in (await visit.text("#said")).lower()
    assert await acts_of(shop, "retry") == [("olga", "done")]
    await visit.goes("/later")
    assert await visit.page.locator("article", has_text="order-77").count() == 0


async def test_a_function_that_fails_again_comes_back_to_the_page(visit: Visit, shop: Desk) -> None:
    await visit.is_("olga")
    await visit.goes("/later")
    await visit.acts("Retry", "let us see", place="article:has-text('order-78')")

    async def dead() -> bool:
        return "order-78" in {row.task.operation_id for row in (await shop.pages.ledger.pages.dead_tasks()).rows}

    await until(dead)
    await visit.goes("/later")
    assert "2 tries" in await visit.page.locator("article", has_text="order-78").inner_text()


async def test_an_operator_reopens_a_frozen_sku_and_it_sells_again(visit: Visit, shop: Desk) -> None:
    with pytest.raises(StockFrozen):
        await shop.stock.deduct([Line("case", 1)])
    await visit.is_("olga")
    await visit.goes("/product?merchant=m1&sku=case")
    await visit.acts("Compare and reopen", "the hand is known")
    assert "sells again" in await visit.text("#said")
    assert "lid" in await visit.text()
    assert await visit.page.get_by_role("link", name="case", exact=True).count() == 0
    receipt = await shop.stock.deduct([Line("case", 1)])
    await shop.shop.inventory.settled(receipt)
    assert "case" not in await shop.frozen()
    assert ("olga", "done") in await acts_of(shop, "reopen")


async def test_a_sku_that_differs_stays_frozen_and_the_page_says_by_how_much(visit: Visit, shop: Desk) -> None:
    await visit.is_("olga")
    await visit.goes("/product?merchant=m1&sku=lid")
    await visit.acts("Compare and reopen", "it looks right")
    said = await visit.text("#said")
    assert "failed" in said
    assert "40" in said
    assert "44" in said
    assert "lid" in await shop.frozen()
    assert ("olga", "failed") in await acts_of(shop, "reopen")


# Who may not --------------------------------------------------------------------------------------------------------------------------


async def test_a_viewer_sees_everything_and_is_offered_nothing(visit: Visit, browser: Browser, shop: Desk) -> None:
    """Where an operator is offered an act, so that the pages have something not to offer."""
    lid = shop.found["lid"].number
    paths = ("/later", "/frozen", f"/link?link={LINK}", f"/discrepancy?number={lid}", "/product?merchant=m1&sku=lid")
    forms = "main form:not([role=search])"
    context = await browser.new_context()
    operator = Visit(await context.new_page(), shop.url, shop.auth)
    await operator.is_("olga")
    await visit.is_("victor")
    for path in paths:
        assert await operator.goes(path) == await visit.goes(path) == 200
        assert await operator.page.locator(forms).count() > 0, path
        assert await visit.page.locator(forms).count() == 0, path
    action = await operator.page.locator(forms).first.get_attribute("action")
    await context.close()
    assert await visit.goes("/audit") == 200
    # He makes the form himself, with the token that his own pages have.
    sent = f"""async () => {{
        const token = document.querySelector('[name=token]').value;
        const body = new URLSearchParams({{token, merchant: 'm1', sku: 'lid', why: 'x'}});
        return (await fetch('{action}', {{method: 'POST', body}})).status;
    }}"""
    assert await visit.page.evaluate(sent) == 403
    visit.complaints.clear()  # the browser says so, too
    assert "victor" not in {row.actor for row in (await shop.pages.ledger.pages.audit()).rows if row.kind != "sign_in"}


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


# How pages look, and what others wrote on them ------------------------------------------------------------------------------------------

LOOK = Path(__file__).with_name("look.js").read_text()
FINE = {"wide": 0, "faint": [], "small": [], "unnamed": [], "headings": 1}
ENEMIES = """() => ({
    scripts: [...document.scripts].map(each => each.getAttribute('src')),
    images: document.images.length,
    handlers: [...document.querySelectorAll('*')].flatMap(each => [...each.attributes])
        .filter(each => each.name.startsWith('on') || each.value.trim().toLowerCase().startsWith('javascript:')).length,
    inline: document.querySelectorAll('style, [style], iframe, object, embed, base').length,
})"""


@dataclass(frozen=True)
class Seen:
    """One page as an operator with a telephone sees it, with everything unfolded."""

    text: str
    enemies: dict[str, Any]
    light: dict[str, Any]
    dark: dict[str, Any]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tour(browser: Browser, shop: Desk) -> dict[str, Seen]:
    """Every page, once."""
    context = await browser.new_context(color_scheme="light", viewport={"width": 390, "height": 844}, reduced_motion="reduce")
    visit = Visit(await context.new_page(), shop.url, shop.auth)
    seen: dict[str, Seen] = {}

    async def look(path: str) -> None:
        await visit.goes(path)
        for summary in await visit.page.locator("main summary").all():
            await summary.click()
        enemies, light = await visit.page.evaluate(ENEMIES), await visit.page.evaluate(LOOK)
        await visit.page.emulate_media(color_scheme="dark")
        dark = await visit.page.evaluate(LOOK)
        await visit.page.emulate_media(color_scheme="light")
        seen[path] = Seen(await visit.text("html") + await visit.page.title(), enemies, light, dark)

    await look("/sign-in")
    await visit.is_("olga")
    await visit.goes(f"/link?link={LINK}")
    await visit.acts("Kill", hostile("reason-"))
    await visit.acts("Restore", "as it was")
    for path in everywhere(shop):
        await look(path)
    await look("/search?" + urlencode({"q": HOSTILE, "merchant": HOSTILE}))
    assert visit.complaints == []
    await look("/product?" + urlencode({"sku": HOSTILE}))  # there is none
    await context.close()
    return seen


async def test_whatever_somebody_chose_as_a_name_or_a_reason_is_only_ever_text(tour: dict[str, Seen]) -> None:
    """Nobody's text became an element, and every kind of it was really shown somewhere."""
    for path, seen in tour.items():
        assert seen.enemies == {"scripts": ["/static/htmx.min.js"], "images": 0, "handlers": 0, "inline": 0}, path
        assert "1530169" not in seen.text, path
    text = "".join(each.text for each in tour.values())
    for what in ("sku-", "shop-", "order-", "po-", "hold-", "count-", "why-", "who-", "no-", "kind-", "is-", "reason-", "sale-"):
        assert what + SHOWN in text, what


async def test_pages_fit_a_telephone_and_can_be_read_in_light_and_dark(tour: dict[str, Seen]) -> None:
    for path, seen in tour.items():
        assert seen.light == FINE, path
        assert seen.dark == FINE, path


# How it behaves ------------------------------------------------------------------------------------------------------------------------


async def test_the_overview_refreshes_itself_without_losing_the_place(visit: Visit) -> None:
    await visit.is_("victor")
    await visit.goes("/")
    await visit.page.evaluate("document.querySelector('#overview').setAttribute('hx-trigger', 'refresh')")
    await visit.page.evaluate("htmx.process(document.body)")
    await visit.page.get_by_role("link", name="Frozen SKUs").focus()
    async with visit.page.expect_response("**/overview"):
        await visit.page.evaluate("htmx.ajax('GET', '/overview', {target: '#overview', swap: 'outerMorph'})")
    await visit.page.wait_for_function("document.activeElement.textContent.includes('Frozen SKUs')")
    assert await visit.page.locator("#overview").count() == 1


async def test_by_keyboard_one_comes_to_the_content_and_sees_where_one_is(visit: Visit) -> None:
    await visit.is_("olga")
    page = visit.page
    await visit.goes("/frozen")
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.textContent") == "Skip to content"
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    seen = []
    for _ in range(8):
        here = "document.activeElement"
        seen.append(await page.evaluate(f"{here}.textContent.trim()"))
        assert await page.evaluate(f"{here}.closest('main') !== null")
        assert await page.evaluate(f"parseFloat(getComputedStyle({here}).outlineWidth)") >= 2, seen[-1]
        if seen[-1] == "Compare and reopen":
            break
        await page.keyboard.press("Tab")
    assert seen[-1] == "Compare and reopen"


async def test_mounted_below_a_path_every_link_and_form_stays_there(browser: Browser, shop: Desk) -> None:
    app = Starlette(routes=[Mount("/admin", admin_app(shop.pages, auth=shop.auth))])
    async with served(app) as url:
        context = await browser.new_context(color_scheme="dark")
        visit = Visit(await context.new_page(), f"{url}/admin", shop.auth)
        await visit.goes("/frozen")
        assert visit.page.url == f"{url}/admin/sign-in?next=%2Ffrozen"
        await visit.signs_in("olga")
        assert visit.page.url == f"{url}/admin/frozen"
        await visit.acts("Compare and reopen", "the hand is known", place="article:has-text('lid')")
        assert visit.page.url.startswith(f"{url}/admin/frozen?said=")
        for link in await visit.page.locator("a[href]").all():
            href = await link.get_attribute("href")
            assert href is not None
            assert href.startswith(("/admin", "#"))
        await context.close()
        assert visit.complaints == []


async def test_another_site_can_neither_send_a_form_nor_show_the_pages_in_a_frame(browser: Browser, shop: Desk) -> None:
    """A page of another origin, in the browser of an operator who has signed in."""
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    async def trap(_: object) -> HTMLResponse:
        fields = json.dumps({"link": LINK, "why": "the enemy's"})
        return HTMLResponse(f"""<iframe src="{shop.url}/"></iframe><form method=post action="{shop.url}/link/kill"></form>
        <script>for (const [name, value] of Object.entries({fields})) {{
            const input = document.createElement('input'); input.name = name; input.value = value; document.forms[0].append(input);
        }}</script>""")

    async with served(Starlette(routes=[Route("/", trap)])) as elsewhere:
        context = await browser.new_context()
        visit = Visit(await context.new_page(), shop.url, shop.auth)
        await visit.is_("olga")
        page = visit.page
        # Another port is another origin but the same site, so the cookie is sent: the pages themselves have to refuse.
        await page.goto(elsewhere)
        visit.complaints.clear()  # the browser says that it shows no frame
        framed = [frame for frame in page.frames if frame != page.main_frame]
        assert framed
        for frame in framed:
            assert "Overview" not in await frame.content()
        async with page.expect_navigation():
            await page.evaluate("document.forms[0].submit()")
        assert "sent from another site" in await page.inner_text("main")
        await visit.goes(f"/link?link={LINK}")
        assert "killed" not in await visit.text("h1")
        await context.close()
    assert not shop.pages.gray_links.known(LINK).killed
