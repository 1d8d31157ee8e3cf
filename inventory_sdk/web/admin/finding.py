"""Looking things up: by merchant, product, order, operation or reservation, and one operation's whole life on one page."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from inventory_sdk.errors import InvalidOperation, Overloaded
from inventory_sdk.ledger.pages import Life, Moment, Page
from inventory_sdk.ledger.protocol import OperationRow, StockRow
from inventory_sdk.model import MAX_ID_BYTES, Position, Receipt, StockLevel, check_text, key_of
from inventory_sdk.stock.batch import read_entries
from inventory_sdk.stock.journal import decode
from inventory_sdk.web.admin.acting import Act, Acting, filled, reason
from inventory_sdk.web.admin.door import root_of
from inventory_sdk.web.admin.looking import LEDGER_PATIENCE, Fact, fact, of_ledger
from inventory_sdk.web.admin.render import Renderer, pretty

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

SIZE: Final = 50
FEW: Final = 10
MERCHANTS: Final = 100
LONGEST: Final = 3 * MAX_ID_BYTES
"""Characters of something that is searched for."""


@dataclass(frozen=True, slots=True)
class Journaled:
    """An operation's journal entry while Redis still has it: as it is written there, and how many operations share it."""

    text: str
    operations: int
    nonce: str
    at_ms: int


@dataclass(frozen=True, slots=True)
class InLedger:
    """What a search has found there; None where that was not asked."""

    operations: Page[OperationRow, Moment] | None = None
    named: Sequence[OperationRow] = ()
    products: Page[StockRow, tuple[str, str]] | None = None
    merchants: Sequence[str] = ()


class Finding:
    """GET pages that search; and reopening, which belongs to a product's page."""

    def __init__(self, inventory: Inventory, renderer: Renderer, acting: Acting) -> None:
        self._inventory = inventory
        self._renderer = renderer
        self._acting = acting

    def routes(self) -> list[Route]:
        return [
            Route("/search", self._search),
            Route("/products", self._products),
            Route("/product", self._product),
            Route("/operation", self._operation),
            Route("/frozen", self._frozen),
            Route("/frozen/reopen", self._reopen, methods=["POST"]),
        ]

    # Search -----------------------------------------------------------------------------------------------------------------

    async def _search(self, request: Request) -> Response:
        asked, merchant = _asked(request, "q"), _asked(request, "merchant") or None
        before = _moment(request.query_params.get("before"))
        ledger = await fact(lambda: self._in_ledger(asked, merchant, before), LEDGER_PATIENCE)
        found = ledger.value or InLedger()
        pending = level = None
        if asked and before is None and not found.named:
            pending = (await fact(lambda: self._status(asked, merchant))).value
            if ledger.trouble and merchant is not None:
                level = (await fact(lambda: self._level(merchant, asked))).value
        asking = {"q": asked, "merchant": merchant or "", "before": before}
        status = 503 if ledger.trouble else 200
        page = "search.html"
        return self._renderer.page(request, page, status, **asking, ledger=ledger, found=found, pending=pending, level=level)

    async def _in_ledger(self, asked: str, merchant: str | None, before: Moment | None) -> InLedger:
        pages = self._inventory.ledger.pages
        if not asked and not merchant:
            return InLedger(merchants=await pages.merchants(limit=MERCHANTS))
        operations = await pages.operations(order=asked or None, merchant=merchant, limit=SIZE, before=before)
        if not asked or before is not None:
            return InLedger(operations)
        products = await pages.products(merchant=merchant, prefix=asked, limit=FEW)
        return InLedger(operations, await pages.named(asked, merchant), products)

    async def _status(self, operation_id: str, merchant: str | None) -> Receipt | None:
        """What Redis has accepted and the ledger has not applied yet."""
        try:
            return await self._inventory.stock.status(operation_id, merchant=merchant)
        except InvalidOperation:
            return None  # no merchant was named, or it is no id

    async def _products(self, request: Request) -> Response:
        merchant, prefix = _asked(request, "merchant") or None, _asked(request, "q")
        raw = request.query_params.get("after")
        after = (request.query_params.get("of", ""), raw) if raw is not None else None
        products = self._inventory.ledger.pages.products
        page = await of_ledger(lambda: products(merchant=merchant, prefix=prefix, limit=SIZE, after=after))
        return self._renderer.page(request, "products.html", page=page, merchant=merchant or "", q=prefix)

    # One product ----------------------------------------------------------------------------------------------------------------

    async def _product(self, request: Request) -> Response:
        merchant, sku = _named(request, "merchant"), _named(request, "sku")
        raw = request.query_params.get("before", "")
        before = int(raw) if raw.isdecimal() and len(raw) <= 18 else None
        ledger = self._inventory.ledger
        rows, changes, redis, frozen = await asyncio.gather(
            fact(lambda: ledger.stock([key_of(merchant, sku)]), LEDGER_PATIENCE),
            fact(lambda: ledger.pages.changes(merchant, sku, limit=SIZE, before=before), LEDGER_PATIENCE),
            fact(lambda: self._level(merchant, sku)),
            fact(lambda: self._is_frozen(merchant, sku)),
        )
        if not rows.value and not rows.trouble:
            raise HTTPException(404)
        return self._renderer.page(
            request,
            "product.html",
            503 if rows.trouble else 200,
            merchant=merchant,
            sku=sku,
            ledger=rows,
            row=rows.value[0] if rows.value else None,
            redis=redis,
            frozen=frozen,
            changes=changes,
            before=before,
            history=[float(change.after.available) for change in reversed(changes.value.rows)] if changes.value else [],
            said=await self._acting.said(request),
        )

    async def _level(self, merchant: str, sku: str) -> StockLevel:
        return await self._inventory.stock.level(sku, merchant=merchant)

    async def _is_frozen(self, merchant: str, sku: str) -> bool:
        found = await self._inventory.stock.frozen()
        return any((each.merchant, each.sku) == (merchant, sku) for each in found)

    # One operation ----------------------------------------------------------------------------------------------------------------

    async def _operation(self, request: Request) -> Response:
        at = request.query_params.get("at")
        if at is None:
            return await self._by_id(request)
        numbers = at.split(".")
        if len(numbers) != 4 or not all(each.isdecimal() and len(each) <= 15 for each in numbers):
            raise HTTPException(404)
        partition, epoch, sequence, index = map(int, numbers)
        position = Position(partition, epoch, sequence)
        life = await of_ledger(lambda: self._inventory.ledger.pages.life(position, index))
        if life is None:
            raise HTTPException(404)
        running = self._inventory._running()
        return self._renderer.page(
            request,
            "operation.html",
            life=life,
            receipt=None,
            trouble="",
            journaled=await fact(lambda: self._journaled(life)),
            queue="RabbitMQ" if running.queue.confirms else "the journal itself",
        )

    async def _by_id(self, request: Request) -> Response:
        merchant, operation_id = _named(request, "merchant"), _asked(request, "id")
        ledger = await fact(lambda: self._inventory.ledger.pages.named(operation_id, merchant), LEDGER_PATIENCE)
        for row in ledger.value or ():
            at = ".".join(map(str, (*row.position, row.index)))
            return RedirectResponse(f"{root_of(request.scope)}/operation?at={at}", 303)
        receipt = await fact(lambda: self._status(operation_id, merchant))
        if receipt.value is None:
            if ledger.trouble:
                redis = receipt.trouble or "it does not know it"
                raise Overloaded(f"the ledger can't be asked about {operation_id!r} ({ledger.trouble}), nor Redis ({redis})")
            if receipt.trouble:
                raise Overloaded(f"the ledger does not have {operation_id!r}, and Redis can't be asked: {receipt.trouble}")
            raise HTTPException(404)
        running = self._inventory._running()
        return self._renderer.page(
            request,
            "operation.html",
            503 if ledger.trouble else 200,
            life=None,
            receipt=receipt.value,
            trouble=ledger.trouble,
            journaled=Fact(None),
            queue="RabbitMQ" if running.queue.confirms else "the journal itself",
        )

    async def _journaled(self, life: Life) -> Journaled | None:
        """None: it never was in the journal, or has been trimmed."""
        position = life.operation.position
        partitions = self._inventory._ready().engine.partitions
        if position.epoch == 0 or position.partition >= len(partitions):
            return None
        entries = await read_entries(partitions[position.partition], position.epoch, position.sequence - 1, position.sequence, 1)
        if not entries:
            return None
        entry = decode(*position, entries[0][1])
        mine = [each for each in entry.operations if each.key == life.operation.key] or entry.operations[life.operation.index :][:1]
        text = "\n".join(
            f"{name}: {pretty(value) if name == 'extra' else value}" for each in mine for name, value in each._asdict().items()
        )
        return Journaled(text, len(entry.operations), entry.nonce, entry.at_ms)

    # Frozen stock -----------------------------------------------------------------------------------------------------------------

    async def _frozen(self, request: Request) -> Response:
        frozen = await fact(self._inventory.stock.frozen)
        keys = [key_of(each.merchant, each.sku) for each in frozen.value or ()]
        ledger = await fact(lambda: self._inventory.ledger.stock(keys)) if keys else Fact([])
        rows = {key_of(row.merchant, row.sku): row for row in ledger.value or ()}
        status = 503 if frozen.trouble else 200
        said = await self._acting.said(request)
        return self._renderer.page(request, "frozen.html", status, frozen=frozen, ledger=ledger, rows=rows, key_of=key_of, said=said)

    async def _reopen(self, request: Request) -> Response:
        merchant, sku, why = filled(request, "merchant"), filled(request, "sku"), reason(request)

        async def do() -> str:
            await self._inventory.stock.reopen(sku, merchant=merchant)
            return "Redis and ledger agree; it sells again"

        act = Act("reopen", merchant=merchant, sku=sku, details={"why": why})
        return await self._acting.does(request, act, do, "/frozen")


def _asked(request: Request, name: str) -> str:
    """Something to search for, as it was typed but for blanks around it."""
    value = request.query_params.get(name, "").strip()
    if len(value) > LONGEST:
        raise InvalidOperation(name, value, f"must have at most {LONGEST} characters")
    return value if "\x00" not in value else ""  # PostgreSQL takes none, and no name has one


def _named(request: Request, name: str) -> str:
    """A name as the house has it. Not stripped: a SKU may begin with a blank."""
    try:
        return check_text(name, request.query_params.get(name, ""))
    except InvalidOperation:
        raise HTTPException(404) from None


def _moment(text: str | None) -> Moment | None:
    """A cursor out of a link; anything else begins at the newest."""
    numbers = text.split(".") if text else []
    if len(numbers) != 5 or not all(each.isdecimal() and len(each) <= 15 for each in numbers):
        return None
    return Moment(*map(int, numbers))
