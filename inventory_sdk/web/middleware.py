"""Pure ASGI middleware: a request's lane, deadline, merchant, operation id and gray decisions, and our errors as problem details.

Only what is configured is read from a request, and only from peers that are trusted. The app runs in the request's own task and
context, its messages pass as they are; the one thing that is looked at is whether a response has begun. From then on the request's
time is the stream's: no deadline cuts it off, and an error that comes later is not ours to answer.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, MutableMapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk import context
from inventory_sdk.context import OperationName, Serves
from inventory_sdk.errors import InvalidOperation, InventoryError, LaneNotServed
from inventory_sdk.gray.propagation import PREFIX, stripped
from inventory_sdk.model import check_text
from inventory_sdk.traffic.deadline import Deadline, Timed, reset
from inventory_sdk.web.lifespan import serve_lifespan
from inventory_sdk.web.problem import Problem, problem

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

log = logging.getLogger("inventory_sdk.web")

SECONDS: Final = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")
HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class InventoryMiddleware:
    """``app.add_middleware(InventoryMiddleware, inventory=inventory, lane={"/": "core", "/imports": "batch"})``.

    ``lane``: the lane of all requests, or by path prefix (the longest that matches whole segments), or a function of the ASGI
    scope; None from the function: no lane. A request in a lane takes one of its slots until its response is complete, and has its
    timeout until its response begins. ``lane_header`` names a header that may choose a declared lane instead. ``serve``: lanes
    that this process serves, None: all; others are refused with 421, and with ``elsewhere[lane]`` as the pointer.

    ``merchant_header``, ``deadline_header`` (seconds such as ``0.250``, at most ``max_deadline``) and ``idempotency_header`` (the
    operation id of the one act that names none) name headers to read; None: not read. ``trusted``: networks (``"10.0.0.0/8"``)
    whose headers are believed, by the client address that the server tells; None: everybody's, where a header is named.

    Every request has gray decisions of its own: within it each link answers a merchant once. ``baggage=True`` takes over those that
    the W3C baggage header of a trusted peer carries, so it needs ``trusted``; from anybody else they are removed.

    ``lifespan=True`` starts the inventory before the app and closes it after; it is counted, so the app may do so too.
    """

    def __init__(
        self,
        app: App,
        *,
        inventory: Inventory,
        lane: str | Mapping[str, str] | Callable[[Scope], str | None] | None = None,
        lane_header: str | None = None,
        serve: Collection[str] | None = None,
        elsewhere: Mapping[str, str] | None = None,
        merchant_header: str | None = None,
        deadline_header: str | None = None,
        max_deadline: float = 60.0,
        idempotency_header: str | None = None,
        trusted: Iterable[str] | None = None,
        baggage: bool = False,
        lifespan: bool = False,
    ) -> None:
        self.app = app
        self._inventory = inventory
        lanes = inventory.lanes
        if isinstance(serve, str):
            raise InvalidOperation("serve", serve, "must be a set of lanes")
        named = {lane} if isinstance(lane, str) else set(lane.values()) if isinstance(lane, Mapping) else set()
        for name in (*named, *(serve or ()), *(elsewhere or {})):
            lanes.declared(name)
        self._lane: str | Callable[[Scope], str | None] | None = _by_path(lane) if isinstance(lane, Mapping) else lane
        self._serves = None if serve is None else Serves(frozenset(serve), dict(elsewhere or {}))
        if not 0 < max_deadline < math.inf:
            raise InvalidOperation("max_deadline", max_deadline, "must be seconds, more than 0")
        self._max_deadline = max_deadline
        self._lane_header = _header("lane_header", lane_header)
        self._merchant_header = _header("merchant_header", merchant_header)
        self._deadline_header = _header("deadline_header", deadline_header)
        self._idempotency_header = _header("idempotency_header", idempotency_header)
        self._reads: set[str] = {
            each for each in (self._lane_header, self._merchant_header, self._deadline_header, self._idempotency_header) if each is not None
        }
        self._trusted = None if trusted is None else tuple(_network(each) for each in trusted)
        if baggage and self._trusted is None:
            why = "name the networks whose baggage is believed: whoever may set it chooses the side of the gray links"
            raise InvalidOperation("trusted", None, why)
        self._baggage = baggage
        self._lifespan = lifespan
        self._warned = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            await self._request(scope, receive, send)
        elif scope["type"] == "lifespan" and self._lifespan:
            await serve_lifespan(self.app, self._inventory, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = answered = False
        status = 0
        timers: list[Timed] = []

        async def noticing(message: Message) -> None:
            nonlocal began, status
            if answered:
                return  # from a task of the framework that our answer has overtaken
            if message["type"] == "http.response.start":
                began = True
                status = message["status"]
                for timer in timers:
                    timer.disarm()
            await send(message)

        try:
            async with AsyncExitStack() as stack:
                scope = self._with_sides(stack, scope)
                await self._prepare(stack, scope, timers)
                await self.app(scope, receive, noticing)
        except InventoryError as error:
            answer = problem(error)
            if answer is None:
                raise
            if began:
                self._warn(error, status)
                raise
            answered = True
            await _send(answer, send)

    async def _prepare(self, stack: AsyncExitStack, scope: Scope, timers: list[Timed]) -> None:
        """Merchant, operation id, deadline and lane of the request, until the stack unwinds."""
        found = self._headers(scope) if self._reads else {}
        merchant = found.get(self._merchant_header)
        if merchant is not None:
            _set(stack, context.merchant, check_text(str(self._merchant_header), merchant))
        key = found.get(self._idempotency_header)
        if key is not None:
            header = str(self._idempotency_header)
            if len(key) > 1 and key[0] == key[-1] == '"':  # the header's own definition has it in quotes
                key = key[1:-1]
            _set(stack, context.operation, OperationName(check_text(header, key), header))
        seconds = self._seconds(found.get(self._deadline_header))
        if seconds != math.inf or self._serves is not None:
            timers.append(await stack.enter_async_context(Deadline(seconds, self._serves)))
        lane = self._lane_of(scope, found.get(self._lane_header))
        if lane is not None:
            timers.append(await stack.enter_async_context(self._inventory.lanes.enter(lane)))

    def _with_sides(self, stack: AsyncExitStack, scope: Scope) -> Scope:
        """Begin the request's gray decisions; the scope without ours in its baggage, where its sender is not to be believed."""
        headers = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == b"baggage"]
        carried = [header for header in headers if PREFIX in header]
        if not carried:
            _set(stack, context.sides, {})
        elif self._baggage and self._trusted is not None and _is_within(scope.get("client"), self._trusted):
            _set(stack, context.sides, self._inventory.gray_links.arrived(",".join(carried)))
        else:
            _set(stack, context.sides, {})
            kept = [(name, value) for name, value in scope["headers"] if name.lower() != b"baggage"]
            rest = stripped(",".join(headers))
            if rest:
                kept.append((b"baggage", rest.encode("latin-1")))
            return {**scope, "headers": kept}
        return scope

    def _lane_of(self, scope: Scope, wanted: str | None) -> str | None:
        if wanted is not None:
            if wanted not in self._inventory.lanes:
                raise InvalidOperation(str(self._lane_header), wanted, "is not a lane")
            lane: str | None = wanted
        elif self._lane is None or isinstance(self._lane, str):
            lane = self._lane
        else:
            lane = self._lane(scope)
            if lane is not None:
                self._inventory.lanes.declared(lane)
        serves = self._serves
        if lane is not None and serves is not None and lane not in serves.lanes:
            raise LaneNotServed(lane, sorted(serves.lanes), serves.elsewhere.get(lane))
        return lane

    def _headers(self, scope: Scope) -> dict[str | None, str]:
        """The configured headers of a trusted peer, by their names."""
        if self._trusted is not None and not _is_within(scope.get("client"), self._trusted):
            return {}
        found: dict[str | None, str] = {}
        for name, value in scope["headers"]:
            text: str = name.decode("latin-1").lower()
            if text in self._reads:
                if text in found:
                    raise InvalidOperation(text, value.decode("latin-1"), "must be there only once")
                found[text] = value.decode("latin-1").strip()
        return found

    def _seconds(self, text: str | None) -> float:
        if text is None:
            return math.inf
        if not SECONDS.fullmatch(text):
            raise InvalidOperation(str(self._deadline_header), text, "must be seconds such as 0.250")
        return min(float(text), self._max_deadline)

    def _warn(self, error: InventoryError, status: int) -> None:
        """Somebody has answered the error before us: this middleware stands outside of the framework's own error handling."""
        if status == 500 and not self._warned:
            self._warned = True
            log.warning(
                "the framework answered %s with 500 before InventoryMiddleware saw it: add it with app.add_middleware(…) "
                "instead of wrapping the app in it, or register inventory_sdk.web.problem for InventoryError there",
                type(error).__name__,
            )


async def _send(answer: Problem, send: Send) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": list(answer.headers)})
    await send({"type": "http.response.body", "body": answer.body})


def _set(stack: AsyncExitStack, variable: Any, value: Any) -> None:
    stack.callback(reset, variable, variable.set(value))


def _header(field: str, name: str | None) -> str | None:
    if name is not None and not (isinstance(name, str) and HEADER_NAME.fullmatch(name)):
        raise InvalidOperation(field, name, "must be the name of a header")
    return None if name is None else name.lower()


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise InvalidOperation("trusted", text, f"must be a network such as 10.0.0.0/8: {error}") from error


def _is_within(client: Any, networks: Iterable[ipaddress.IPv4Network | ipaddress.IPv6Network]) -> bool:
    try:
        address = ipaddress.ip_address(client[0])
    except (TypeError, ValueError, IndexError):
        return False  # a Unix socket, or a server that doesn't tell: nobody that we know
    return any(address in network for network in networks)


def _by_path(prefixes: Mapping[str, str]) -> Callable[[Scope], str | None]:
    for prefix in prefixes:
        if not prefix.startswith("/"):
            raise InvalidOperation("lane", prefix, "must be a path that begins with a slash")
    ordered = sorted(((prefix.rstrip("/"), lane) for prefix, lane in prefixes.items()), key=lambda pair: -len(pair[0]))

    def lane_of(scope: Scope) -> str | None:
        path = scope["path"]
        for prefix, lane in ordered:
            if path == prefix or path.startswith(f"{prefix}/"):
                return lane
        return None

    return lane_of
