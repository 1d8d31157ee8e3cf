"""Whom a routed script believes: an answer of a server that lost its part meanwhile is no acknowledgement."""

from __future__ import annotations

from typing import Any

import pytest
from fakeredis import FakeAsyncRedis

from inventory_sdk.metrics import NoMetrics
from inventory_sdk.stock.route import Address, Guide
from inventory_sdk.stock.routed import RoutedScripts
from inventory_sdk.stock.wire import ReplyLost


class OneServer:
    """A route to a fakeredis whose master may be told to have changed."""

    def __init__(self) -> None:
        self.redis = FakeAsyncRedis(protocol=2)
        self.master = True

    def address(self, key: str) -> Address | None:
        return ("here", 1)

    async def learn(self) -> None:
        """Nothing to learn."""

    def client(self, address: Address) -> Any:
        return self.redis

    def named(self, host: str, port: int, by: Address) -> Address:
        return host, port

    def stale(self, learnt: float) -> bool:
        return False

    def heard(self, address: Address) -> bool:
        return self.master


async def test_what_a_demoted_master_still_answers_counts_as_lost() -> None:
    route = OneServer()
    scripts = RoutedScripts(Guide(route, 0.5, NoMetrics()), 0.5, route.redis)
    keys = ["{x:0}:meta", "{x:0}:journal"]
    assert await scripts.run("hello", keys, [])
    route.master = False
    with pytest.raises(ReplyLost, match="here:1, which is the master no more"):
        await scripts.run("hello", keys, [])
    await scripts.close()
    await route.redis.aclose()
