"""Chromium for the tests of the management pages, driven by Playwright. Where it is missing the tests skip, by name."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, Page, async_playwright

from tests.web.desk import PASSWORD, Desk, desk

CHROMIUM = os.environ.get("INVENTORY_TEST_CHROMIUM", "/usr/bin/chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
async def shop() -> AsyncIterator[Desk]:
    async with desk() as opened:
        yield opened


@pytest.fixture
async def mounted() -> AsyncIterator[Desk]:
    """The same below /admin of another app."""
    async with desk("/admin") as opened:
        yield opened


@pytest.fixture
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


class Visit:
    """One page of one person. What its browser complained about must be nothing: a blocked script, or an error."""

    def __init__(self, page: Page, shop: Desk) -> None:
        self.page = page
        self.shop = shop
        self.complaints: list[str] = []
        page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: self.complaints.append(f"a dialog: {dialog.message}"))

    async def goes(self, path: str) -> int:
        response = await self.page.goto(self.shop.url + path)
        assert response is not None
        return response.status

    async def signs_in(self, name: str, password: str = PASSWORD) -> None:
        await self.page.fill("[name=name]", name)
        await self.page.fill("[name=password]", password)
        await self.page.get_by_role("button", name="Sign in").click()

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


@pytest.fixture
async def visit(browser: Browser, shop: Desk) -> AsyncIterator[Visit]:
    """Nobody yet, at the door."""
    context = await browser.new_context()
    visiting = Visit(await context.new_page(), shop)
    yield visiting
    await context.close()
    assert visiting.complaints == []
