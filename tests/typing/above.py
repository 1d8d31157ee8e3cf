"""Stock decorators above @classmethod and @staticmethod."""

from __future__ import annotations

from typing import assert_type

from inventory_sdk.model import Receipt
from inventory_sdk.stock.decorators import StockDecorators


def declare(inventory: StockDecorators) -> None:
    class Service:
        @inventory.restocks(run="now", sku="sku", quantity=1)
        @staticmethod
        async def receive(sku: str) -> float:
            return 1.0

        @inventory.releases(run="now", reservation="name")
        @classmethod
        async def free(cls, name: str) -> bytes:
            return b""

        @inventory.releases(run="later", name="n", reservation="name")
        @classmethod
        async def later(cls, name: str) -> None: ...

    async def calls(service: Service) -> None:
        assert_type(await Service.receive("a"), float)
        assert_type(await service.free("a"), bytes)
        assert_type(await Service.later("a"), Receipt)

    _ = calls
