"""httpx transports: one sends a merchant's calls to the deployment of its side, one only carries the decisions on."""

from __future__ import annotations

import time
from typing import Protocol

import httpx

from inventory_sdk import context
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.gray.decision import CANDIDATE, STABLE, Decision


class Links(Protocol):
    """What a transport asks the controller for."""

    def decide(self, link: str, merchant: str | None = None) -> Decision: ...
    def count(self, link: str, variant: str, merchant: str, seconds: float, failed: bool) -> None: ...
    def home(self, merchant: str | None) -> str: ...
    def baggage(self, header: str | None = None) -> str: ...


class CarryingTransport(httpx.AsyncBaseTransport):
    """Puts the request's decisions into the baggage header of what goes out."""

    def __init__(self, links: Links, inner: httpx.AsyncBaseTransport | None) -> None:
        self._links = links
        self._inner = inner if inner is not None else httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.carry(request)
        return await self._inner.handle_async_request(request)

    def carry(self, request: httpx.Request) -> None:
        header = self._links.baggage(request.headers.get("baggage"))
        if header:
            request.headers["baggage"] = header
        elif "baggage" in request.headers:
            del request.headers["baggage"]

    async def aclose(self) -> None:
        await self._inner.aclose()


class GrayTransport(CarryingTransport):
    """The host (and a path before the request's) by the side of the merchant: ``request.extensions["merchant"]``, else the request's
    that we are in, else the Inventory's."""

    def __init__(self, links: Links, link: str, stable: str, candidate: str, inner: httpx.AsyncBaseTransport | None) -> None:
        super().__init__(links, inner)
        self._link = link
        self._urls = {STABLE: _base("stable", stable), CANDIDATE: _base("candidate", candidate)}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        token = context.sides.set({}) if context.sides.get() is None else None
        try:
            merchant = self._links.home(request.extensions.get("merchant"))
            decision = self._links.decide(self._link, merchant)
            base = self._urls[decision.variant]
            path = base.raw_path.rstrip(b"/") + request.url.raw_path
            request.url = request.url.copy_with(scheme=base.scheme, host=base.host, port=base.port, raw_path=path)
            request.headers["host"] = base.netloc.decode("ascii")
            self.carry(request)
        finally:
            if token is not None:
                context.sides.reset(token)
        began = time.perf_counter()
        try:
            response = await self._inner.handle_async_request(request)
        except Exception:
            self._links.count(self._link, decision.variant, merchant, time.perf_counter() - began, True)
            raise
        self._links.count(self._link, decision.variant, merchant, time.perf_counter() - began, response.status_code >= 500)
        return response


def _base(name: str, url: str) -> httpx.URL:
    base = httpx.URL(url)
    if base.scheme not in ("http", "https") or not base.host or base.query or base.fragment:
        raise InvalidOperation(name, url, "must be the address of a deployment, such as https://checkout-next.internal")
    return base
