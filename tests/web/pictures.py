"""The pictures of docs/how-to/admin.md: ``python -m tests.web.pictures docs/images/admin``. Needs Chromium."""

from __future__ import annotations

import asyncio
import math
import random
import sys
from pathlib import Path

from playwright.async_api import async_playwright

from tests.web.conftest import ARGUMENTS, CHROMIUM
from tests.web.desk import PASSWORD, desk

PAGES = {
    "overview": "/",
    "operation": "/operation?merchant=m1&id=order-42",
    "product": "/product?merchant=m1&sku=phone-15",
    "search": "/search?q=order-42",
    "later": "/later",
    "frozen": "/frozen",
    "link": "/link?link=fast-allocation",
    "discrepancy": "/discrepancy?number=7",
    "audit": "/audit",
}


async def main(folder: Path, wanted: list[str]) -> None:
    async with desk() as shop, async_playwright() as playwright:
        # Half an hour of an evening: the ledger falls behind when the sale begins, and catches up.
        noise = random.Random(7)
        minutes = [at / 12 for at in range(360)]
        shop.app._looking._lag.extend([0.05 + 2.6 * math.exp(-((minute - 18) ** 2) / 9) + 0.2 * noise.random() for minute in minutes])
        shop.app._looking._pace.extend([40 + 900 * math.exp(-((minute - 17) ** 2) / 16) + 60 * noise.random() for minute in minutes])
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for scheme in ("light", "dark"):
            context = await browser.new_context(color_scheme=scheme, viewport={"width": 1180, "height": 760}, reduced_motion="reduce")
            page = await context.new_page()
            await page.goto(f"{shop.url}/sign-in")
            await page.fill("[name=name]", "olga")
            await page.fill("[name=password]", PASSWORD)
            await page.click("button[type=submit]")
            for name in wanted:
                await page.goto(shop.url + PAGES[name])
                await page.screenshot(path=folder / f"{name}-{scheme}.png")
            await context.close()
        await browser.close()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:] or list(PAGES)))
