"""Where alerts go. A sink is anything that can be called with an ``Alert``; what it raises is counted and tried again. One that is not
async is called in the event loop, so it must return at once."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from inventory_sdk.alerts.board import Alert
from inventory_sdk.errors import InvalidOperation

log = logging.getLogger("inventory_sdk.alerts")

Sink = Callable[[Alert], Awaitable[None] | None]
WEBHOOK_TIMEOUT: Final = 5.0
WEBHOOK_THREADS: Final = 4
_LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}


def to_log(alert: Alert) -> None:
    """To the logger ``inventory_sdk.alerts``, at the level of its severity."""
    level = _LEVELS.get(alert.severity, logging.WARNING) if alert.state == "firing" else logging.INFO
    log.log(level, "%s %s: %s", alert.rule, alert.state, alert.message)


class _Stays(urllib.request.HTTPRedirectHandler):
    """A redirected POST would go on as a GET without its body, and with the token, to whoever was named."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """None: the redirect is an error like any other answer."""


class Webhook:
    """POSTs the alert as JSON. ``headers`` for a token; any answer but 2xx, a redirect too, is a failure, and tried again.

    At most four posts are under way, in threads of their own: a hook that hangs takes none that the service needs."""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, timeout: float = WEBHOOK_TIMEOUT) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidOperation("url", url.partition(":")[0], "of a webhook must begin with http:// or https://")
        self._url = url
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(WEBHOOK_THREADS, "inventory-webhook")
        self._opener = urllib.request.build_opener(_Stays)

    async def __call__(self, alert: Alert) -> None:
        """In a thread: the event loop goes on."""
        body = json.dumps(alert.document()).encode()
        await asyncio.get_running_loop().run_in_executor(self._threads, self._post, body)

    def _post(self, body: bytes) -> None:
        request: Any = urllib.request.Request(self._url, body, self._headers, method="POST")  # noqa: S310  # http(s), checked above
        with self._opener.open(request, timeout=self._timeout):
            pass  # HTTPError is raised for what is not 2xx
