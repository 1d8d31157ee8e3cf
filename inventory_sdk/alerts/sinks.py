"""Where alerts go. A sink is anything that can be called with an ``Alert``, async or not; what it raises is counted and tried again."""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from inventory_sdk.alerts.board import Alert
from inventory_sdk.errors import InvalidOperation

log = logging.getLogger("inventory_sdk.alerts")

Sink = Callable[[Alert], Awaitable[None] | None]
WEBHOOK_TIMEOUT: Final = 5.0
_LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}


def to_log(alert: Alert) -> None:
    """To the logger ``inventory_sdk.alerts``, at the level of its severity."""
    level = _LEVELS.get(alert.severity, logging.WARNING) if alert.state == "firing" else logging.INFO
    log.log(level, "%s %s: %s", alert.rule, alert.state, alert.message)


class Webhook:
    """POSTs the alert as JSON. ``headers`` for a token; any answer but 2xx is a failure, and tried again."""

    def __init__(self, url: str, *, headers: Mapping[str, str] | None = None, timeout: float = WEBHOOK_TIMEOUT) -> None:
        if not url.startswith(("http://", "https://")):
            raise InvalidOperation("url", url.partition(":")[0], "of a webhook must begin with http:// or https://")
        self._url = url
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._timeout = timeout

    async def __call__(self, alert: Alert) -> None:
        """In a thread: the event loop goes on."""
        await asyncio.to_thread(self._post, json.dumps(alert.document()).encode())

    def _post(self, body: bytes) -> None:
        request: Any = urllib.request.Request(self._url, body, self._headers, method="POST")  # noqa: S310  # http(s), checked above
        with urllib.request.urlopen(request, timeout=self._timeout):  # noqa: S310  # as above
            pass  # HTTPError is raised for what is not 2xx
