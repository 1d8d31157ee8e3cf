"""Chromium for the tests of the management pages, driven by Playwright, and the shop that they show. A browser and a shop are made once
for the tests of a file, in the file's event loop: each test has things of its own in it. Where Chromium is missing the tests skip,
by name."""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from secrets import token_urlsafe

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright
from starlette.responses import Response

from inventory_sdk.web.admin import PasswordAuth, Role, User
from tests.conftest import service_url
from tests.web.desk import PASSWORD, Desk, Servers, desk

CHROMIUM = os.environ.get("INVENTORY_TEST_CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HERE = pytest.mark.asyncio(loop_scope="module")
"""For files whose tests use what is made here."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop() -> AsyncIterator[Desk]:
    servers = Servers(service_url("redis"), service_url("postgresql"), f"t{uuid.uuid4().hex[:12]}")
    async with desk(servers) as opened:
        yield opened


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    if not os.access(CHROMIUM, os.X_OK):
        message = f"no Chromium at {CHROMIUM} (apt-get install chromium, or INVENTORY_TEST_CHROMIUM)"
        if os.environ.get("INVENTORY_TEST_SERVICES") == "required":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        try:
            yield started
        finally:
            await started.close()


PATIENCE_MS = 15_000


class Visit:
    """One page of one person at ``url``. What its browser complained about must be nothing: a blocked script, or an error."""

    def __init__(self, page: Page, url: str, auth: PasswordAuth) -> None:
        self.page = page
        self.url = url
        self._auth = auth
        self.complaints: list[str] = []
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))

    async def goes(self, path: str) -> int:
        response = await self.page.goto(self.url + path)
        assert response is not None
        return response.status

    async def signs_in(self, name: str, password: str = PASSWORD) -> None:
        await self.page.fill("[name=name]", name)
        await self.page.fill("[name=password]", password)
        async with self.page.expect_navigation():
            await self.page.get_by_role("button", name="Sign in").click()

    async def is_(self, name: str) -> None:
        """Somebody who has signed in before: without the form, whose hash takes a good part of a second."""
        response = Response()
        self._auth.remember(response, User(name, Role.VIEWER, token_urlsafe(16)), path="/", secure=False)
        cookie, _, value = response.headers["set-cookie"].partition(";")[0].partition("=")
        await self.page.context.add_cookies([{"name": cookie, "value": value.strip('"'), "url": self.url, "sameSite": "Strict"}])

    async def acts(self, title: str, why: str, *, place: str = "main") -> None:
        """Opens the form behind a button, gives the reason, sends it; by keyboard alone."""
        area = self.page.locator(place)
        opener = area.locator("summary", has_text=title).first
        await opener.focus()
        await self.page.keyboard.press("Enter")
        await self.page.keyboard.press("Tab")
        confirming = area.locator("details[open] [name=confirmed]")
        if await confirming.count():
            await self.page.keyboard.press("Space")
            await self.page.keyboard.press("Tab")
        await self.page.keyboard.type(why)
        async with self.page.expect_navigation():
            await self.page.keyboard.press("Enter")

    async def text(self, place: str = "main") -> str:
        return await self.page.locator(place).inner_text()


@pytest_asyncio.fixture(loop_scope="module")
async def visit(browser: Browser, shop: Desk) -> AsyncIterator[Visit]:
    """Nobody yet, at the door."""
    context = await browser.new_context()
    visiting = Visit(await context.new_page(), shop.url, shop.auth)
    yield visiting
    await context.close()
    assert visiting.complaints == []
