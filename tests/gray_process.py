"""A process that knows a gray link and says what it learns of it: ``python -m tests.gray_process REDIS_URL NAMESPACE LINK``.

Lines: ``ready``, then ``VERSION REASON CARRIED MONOTONIC`` for each new version, where REASON is the decision for merchant ``m1`` and
CARRIED the one for a request whose caller was on the candidate under version 1. Ends when its input does.
"""

from __future__ import annotations

import asyncio
import sys
import time

from inventory_sdk import context
from inventory_sdk.context import Side
from tests.gray_kit import Places, links, watch_of


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


async def main(url: str, namespace: str, link: str) -> None:
    async with links(Places(url), namespace) as here:
        watch = watch_of(here)
        say("ready")
        ended = asyncio.ensure_future(asyncio.to_thread(sys.stdin.read))
        last = here.known(link).version
        while not ended.done():
            changed = asyncio.ensure_future(watch.changed.wait())
            await asyncio.wait({ended, changed}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            watch.changed.clear()
            at = time.monotonic()
            version = here.known(link).version
            if version != last:
                last = version
                fresh = here.decide(link, "m1")
                context.sides.set({(link, "m1"): Side("candidate", 1)})
                carried = here.decide(link, "m1")
                context.sides.set(None)
                say(f"{version} {fresh.reason} {carried.variant} {at}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
