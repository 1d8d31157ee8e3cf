"""The pictures of docs/how-to/admin.md: ``python -m tests.web.pictures docs/images/admin [page …]``. Needs Chromium, Redis and
PostgreSQL. ``WIDTH``, ``FORCED`` and ``ENEMIES`` in the environment take others, to be looked at and not to be kept."""

from __future__ import annotations

import asyncio
import math
import os
import random
import sys
import uuid
from pathlib import Path
from urllib.parse import urlencode

from playwright.async_api import async_playwright

from tests.conftest import service_url
from tests.web.conftest import ARGUMENTS, CHROMIUM, Visit
from tests.web.desk import LINK, Desk, Servers, desk, hostile

WIDTH = int(os.environ.get("WIDTH", "1180"))
FORCED = "FORCED" in os.environ
ENEMIES = "ENEMIES" in os.environ


def pages(shop: Desk) -> dict[str, str]:
    sku = hostile("sku-") if ENEMIES else "phone-15"
    return {
        "overview": "/",
        "operation": "/operation?merchant=m1&id=order-42",
        "refused": "/operation?merchant=m1&id=oversold-lid",
        "product": "/product?" + urlencode({"merchant": "m1", "sku": sku}),
        "products": "/products?merchant=m1",
        "merchants": "/search",
        "search": "/search?q=order-42",
        "later": "/later",
        "frozen": "/frozen",
        "links": "/links",
        "link": f"/link?link={LINK}",
        "discrepancies": "/discrepancies",
        "discrepancy": f"/discrepancy?number={shop.found['charger'].number}",
        "books": f"/discrepancy?number={shop.found['box'].number}",
        "triggers": "/triggers",
        "audit": "/audit",
    }


async def main(folder: Path, wanted: list[str]) -> None:
    servers = Servers(service_url("redis"), service_url("postgresql"), f"t{uuid.uuid4().hex[:12]}")
    async with desk(servers, enemies=ENEMIES) as shop, async_playwright() as playwright:
        # Half an hour of an evening, which nobody would wait for: the ledger falls behind when the sale begins, and catches up.
        noise = random.Random(7)
        minutes = [at / 12 for at in range(360)]
        shop.app._looking._lag.extend([0.05 + 2.6 * math.exp(-((minute - 18) ** 2) / 9) + 0.2 * noise.random() for minute in minutes])
        shop.app._looking._pace.extend([40 + 900 * math.exp(-((minute - 17) ** 2) / 16) + 60 * noise.random() for minute in minutes])
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        for scheme in ("light", "dark"):
            context = await browser.new_context(
                color_scheme="light" if scheme == "light" else "dark",
                viewport={"width": WIDTH, "height": 760 if WIDTH > 600 else 844},
                reduced_motion="reduce",
                forced_colors="active" if FORCED else "none",
            )
            visit = Visit(await context.new_page(), shop.url, shop.auth)
            await visit.goes("/sign-in")
            if "sign-in" in wanted:
                await visit.page.screenshot(path=folder / f"sign-in-{scheme}.png")
            await visit.is_("olga")
            if scheme == "light":
                await visit.goes(f"/link?link={LINK}")
                await visit.acts("Kill", "refusals doubled since 03:10")
                await visit.acts("Restore", "the fix is out")
            for name, path in pages(shop).items():
                if name in wanted:
                    if name == "overview":
                        await asyncio.gather(*[shop.shop.buy(f"{scheme}-{buyer}", "phone-15") for buyer in range(60)])
                        await asyncio.sleep(1)
                    await visit.goes(path)
                    await visit.page.screenshot(path=folder / f"{name}-{scheme}.png", full_page=ENEMIES or WIDTH < 600)
            await context.close()
        await browser.close()


if __name__ == "__main__":
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    kept = ["overview", "operation", "search", "later", "link", "discrepancy"]
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2:] or kept))
