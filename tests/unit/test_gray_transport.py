"""Between deployments: an httpx transport picks the side's deployment, and decisions travel on."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from gray_kit import Places, links, watch_of

from inventory_sdk import context
from inventory_sdk.context import Side
from inventory_sdk.errors import InvalidOperation

WHO: dict[str, Any] = {"who": "eva", "why": "try"}


class Far(httpx.AsyncBaseTransport):
    def __init__(self, status: int = 200, error: Exception | None = None) -> None:
        self.requests: list[httpx.Request] = []
        self.status = status
        self.error = error
        self.closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        return httpx.Response(self.status)

    async def aclose(self) -> None:
        self.closed = True


DEPLOYMENTS: dict[str, str] = {"stable": "http://old.internal", "candidate": "https://new.internal:8443/v2"}


async def test_a_merchants_calls_go_to_the_deployment_of_its_side_and_carry_the_decision(namespace: str) -> None:
    far = Far()
    async with links(Places(None), namespace) as here:
        await here.set("checkout", allow=["new"], **WHO)
        async with httpx.AsyncClient(transport=here.transport("checkout", **DEPLOYMENTS, inner=far), base_url="http://checkout") as client:
            await client.get("/orders/7?x=1", extensions={"merchant": "old"})
            token = context.merchant.set("new")
            await client.post("/orders", headers={"baggage": "tenant=7"})
            context.merchant.reset(token)
            await client.get("/")
    first, second, third = far.requests
    assert (str(first.url), first.headers["host"]) == ("http://old.internal/orders/7?x=1", "old.internal")
    assert first.headers["baggage"] == "inventory-gray.checkout=stable:1:old"
    assert (str(second.url), second.headers["host"]) == ("https://new.internal:8443/v2/orders", "new.internal:8443")
    assert second.headers["baggage"] == "tenant=7,inventory-gray.checkout=candidate:1:new"
    assert (str(third.url), "baggage" in third.headers) == ("http://old.internal/", False)
    assert far.closed
    assert context.sides.get() is None


async def test_what_a_deployment_answers_is_counted_on_its_side(namespace: str) -> None:
    async with links(Places(None), namespace) as here:
        await here.set("checkout", percentage=100, **WHO)
        for far in (Far(200), Far(404), Far(500), Far(error=httpx.ConnectError("no"))):
            async with httpx.AsyncClient(transport=here.transport("checkout", **DEPLOYMENTS, inner=far)) as client:
                try:
                    await client.get("http://checkout/", extensions={"merchant": "m1"})
                except httpx.ConnectError:
                    assert far.error is not None
        tally = watch_of(here)._samples["checkout"].sides["candidate"]
        assert (tally.calls, tally.errors) == (4, 2)


async def test_a_plain_client_carries_the_decisions_of_the_request_it_is_in(namespace: str) -> None:
    far = Far()
    async with links(Places(None), namespace) as here, httpx.AsyncClient(transport=here.carrying(far)) as client:
        context.sides.set({("checkout", "m1"): Side("candidate", 3)})
        await client.get("http://payments/", headers={"baggage": "inventory-gray.checkout=stable:1:m1"})
        assert far.requests[0].headers["baggage"] == "inventory-gray.checkout=candidate:3:m1"
        assert here.baggage("a=b") == "a=b,inventory-gray.checkout=candidate:3:m1"


@pytest.mark.parametrize("url", ["old.internal", "ftp://x", "http://", "http://x/?a=1"])
async def test_an_address_that_is_none_is_refused_when_the_transport_is_made(namespace: str, url: str) -> None:
    async with links(Places(None), namespace) as here:
        with pytest.raises(InvalidOperation, match="candidate"):
            here.transport("checkout", stable="http://old.internal", candidate=url)
