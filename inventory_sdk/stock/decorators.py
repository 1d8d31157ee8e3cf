"""The stock decorators and hooks that an Inventory hands out, with their types.

What they do when the function is called stands in ``stock/aspect.py``. A selector says where in the arguments a value is: a
parameter (``"order_id"``), a path (``"order.id"``), a template (``"{shop}:{order_id}"``), or a callable that gets the parameters
it names (``lambda order: order.id``).
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, overload

from inventory_sdk import context
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import MAX_TTL, Kind, Movement, OpeningBalance, Receipt
from inventory_sdk.selectors import Selector
from inventory_sdk.stock.aspect import Act, StockAspect
from inventory_sdk.stock.later import Registry, Upgrade
from inventory_sdk.stock.take import Afterwards, Raises, StockActs
from inventory_sdk.weave import weave, weave_in_place

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from inventory_sdk.ledger.protocol import Ledger

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Awaitable[Any]])
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
H = TypeVar("H", bound=Callable[..., Any])
W = TypeVar("W", bound="Callable[[Sequence[Movement], AsyncSession], Awaitable[None]]")
R = TypeVar("R", bound="Callable[[str, Sequence[str], AsyncSession], Awaitable[Iterable[OpeningBalance]]]")

Level = Literal["redis", "replica", "aof", "queue", "database"]
LEVELS = ("redis", "replica", "aof", "queue", "database")

EVENTS: Mapping[str, str] = {
    "expired": "a reservation's time ran out",
    "rejected": "the ledger refused an accepted take, which was voided",
    "duplicate": "an operation was repeated after the results window and voided",
    "stale": "a hold without ttl is older than 24 h",
    "frozen": "a partition or SKU stopped selling",
    "recovered": "a partition sells again",
    "lost": "entries of an ended epoch are gone for good; sequences names them",
    "fork": "two entries stood at one position: Redis had gone back in time",
    "late_entry": "an entry came after its epoch was closed and was sent once more",
    "unreadable": "an entry can't be read and holds its partition",
    "dead_letter": "a run='later' function failed for good",
    "task_died": "a background task ended with an error",
    "writes_stock_failed": "a writes_stock function refused a movement",
    "mismatch": "a verified function did not move what it was asked to",
    "recalculation_failed": "a run of a coalesced function raised",
    "recalculation_cut_off": "a run of a coalesced function did not end within its timeout",
    "hot": "a SKU became hot",
    "cool": "a SKU is no longer hot",
    "alert": "a business alert fires, or is over",
    "gray_taken_back": "a gray link's guard took merchants, or the link, back to the stable side",
    "drift": "a comparison found two sides of the stock apart",
}
"""What ``on`` takes."""


class Now(Protocol):
    """A ``run="now"`` decorator: the function keeps its type."""

    def __call__(self, function: F, /) -> F: ...


class Later(Protocol[T_co]):
    """A ``run="later"`` decorator: the function returns None, its callers get the receipt or what ``result=`` makes of it."""

    def __call__(self, function: Callable[P, Coroutine[Any, Any, None]], /) -> Callable[P, Coroutine[Any, Any, T_co]]: ...


class Common(TypedDict, total=False):
    """Keywords of every stock decorator."""

    merchant: Selector | None
    operation_id: Selector | None
    order: Selector | None
    lines: Selector | None
    sku: Selector | None
    quantity: Selector | int | None
    line_merchant: Selector | None
    durability: Level | None
    raises: Raises | None


class Hold(Common, total=False):
    """``ttl``: seconds, a selector of seconds, or None: until it is closed, which needs ``operation_id``."""

    ttl: float | Selector | None


class Closing(Common):
    """``reservation`` is what it closes; without lines all of it."""

    reservation: Selector


class Returning(Common):
    """``of`` is the operation that sold."""

    of: Selector


class Counted(Common, total=False):
    """``reason`` is kept with the movement."""

    reason: Selector | None


class Stored(TypedDict, total=False):
    """Keywords of ``run="later"``: the stable name is required; see ``stock/later.py`` for versions."""

    version: int
    upgrade: Mapping[int, Upgrade] | None


_KEYWORDS: Mapping[Kind, type] = {
    Kind.RESERVE: Hold,
    Kind.DEDUCT: Common,
    Kind.CONFIRM: Closing,
    Kind.RELEASE: Closing,
    Kind.RESTOCK: Common,
    Kind.TAKE_BACK: Returning,
    Kind.ADJUST: Counted,
}


class HoldLater(Hold, Stored, total=False): ...


class CommonLater(Common, Stored, total=False): ...


class ClosingLater(Closing, Stored): ...


class ReturningLater(Returning, Stored): ...


class CountedLater(Counted, Stored, total=False): ...


@dataclass
class Hooks:
    """Functions of the service that the worker and the engine call."""

    writes_stock: list[Callable[[Sequence[Movement], AsyncSession], Awaitable[None]]] = field(default_factory=list)
    reads_stock: Callable[[str, Sequence[str], AsyncSession], Awaitable[Iterable[OpeningBalance]]] | None = None
    handlers: dict[str, list[Callable[..., Any]]] = field(default_factory=dict)

    async def tell(self, name: str, facts: Mapping[str, Any]) -> None:
        """Call the handlers of ``name``, sync or async, one after the other."""
        for handler in self.handlers.get(name, ()):
            result = handler(facts)
            if inspect.isawaitable(result):
                await result


class StockDecorators(ABC):
    """The decorators as a mixin. Whoever mixes it in gives it the parts below; they are asked for at each call."""

    _registry: Registry
    _hooks: Hooks
    _afterwards: Afterwards

    def __init__(self) -> None:
        self._registry = Registry()
        self._hooks = Hooks()
        self._afterwards = Afterwards()

    @property
    def hold_ttl(self) -> float:
        """Seconds that a hold without a ttl of its own lives until its function has returned: a minute more than the call has (its
        lane's timeout, or less where less was inherited); 60.5 where nobody limited it."""
        scope = context.living()
        return 60.5 if scope is None or scope.timeout == math.inf else min(60.0 + scope.timeout, MAX_TTL)

    @abstractmethod
    def _stock_acts(self) -> StockActs:
        """The stock room as it is now; ``NotStarted`` before the start."""

    @abstractmethod
    def _ledger(self) -> Ledger:
        """The ledger as it is now."""

    @abstractmethod
    def _default_merchant(self) -> str | None:
        """The Inventory's own merchant."""

    def _task_route(self, merchant: str) -> str:
        """By which group of workers a later-function of the merchant is to be run; empty: any."""
        return ""

    @overload
    def reserves(self, *, run: Literal["now"], session: Selector | None = None, **options: Unpack[Hold]) -> Now: ...
    @overload
    def reserves(self, *, run: Literal["later"], name: str, result: None = None, **options: Unpack[HoldLater]) -> Later[Receipt]: ...
    @overload
    def reserves(self, *, run: Literal["later"], name: str, result: Callable[[Receipt], T], **options: Unpack[HoldLater]) -> Later[T]: ...
    def reserves(self, *, run: str, **options: Any) -> Any:
        """The function's lines are held for ``ttl`` seconds under the operation id: all, or none.

        ``run="now"``: held before the function runs and undone if it raises; ``session`` names a session parameter whose
        transaction decides instead. ``run="later"``: held, and the worker runs the function.
        """
        return self._decorator(Kind.RESERVE, "reserves", run, options)

    @overload
    def deducts(self, *, run: Literal["now"], session: Selector | None = None, **options: Unpack[Common]) -> Now: ...
    @overload
    def deducts(self, *, run: Literal["later"], name: str, result: None = None, **options: Unpack[CommonLater]) -> Later[Receipt]: ...
    @overload
    def deducts(self, *, run: Literal["later"], name: str, result: Callable[[Receipt], T], **options: Unpack[CommonLater]) -> Later[T]: ...
    def deducts(self, *, run: str, **options: Any) -> Any:
        """The function's lines are sold. ``run="now"``: held, then the function, then sold; undone if it raises."""
        return self._decorator(Kind.DEDUCT, "deducts", run, options)

    @overload
    def confirms(self, *, run: Literal["now"], **options: Unpack[Closing]) -> Now: ...
    @overload
    def confirms(self, *, run: Literal["later"], name: str, result: None = None, **options: Unpack[ClosingLater]) -> Later[Receipt]: ...
    @overload
    def confirms(
        self, *, run: Literal["later"], name: str, result: Callable[[Receipt], T], **options: Unpack[ClosingLater]
    ) -> Later[T]: ...
    def confirms(self, *, run: str, **options: Any) -> Any:
        """The reservation, or the part in the lines, is sold; with ``run="now"`` after the function returned."""
        return self._decorator(Kind.CONFIRM, "confirms", run, options)

    @overload
    def releases(self, *, run: Literal["now"], **options: Unpack[Closing]) -> Now: ...
    @overload
    def releases(self, *, run: Literal["later"], name: str, result: None = None, **options: Unpack[ClosingLater]) -> Later[Receipt]: ...
    @overload
    def releases(
        self, *, run: Literal["later"], name: str, result: Callable[[Receipt], T], **options: Unpack[ClosingLater]
    ) -> Later[T]: ...
    def releases(self, *, run: str, **options: Any) -> Any:
        """The reservation, or the part in the lines, is available again; with ``run="now"`` after the function returned."""
        return self._decorator(Kind.RELEASE, "releases", run, options)

    @overload
    def restocks(self, *, run: Literal["now"], **options: Unpack[Common]) -> Now: ...
    @overload
    def restocks(self, *, run: Literal["later"], name: str, result: None = None, **options: Unpack[CommonLater]) -> Later[Receipt]: ...
    @overload
    def restocks(self, *, run: Literal["later"], name: str, result: Callable[[Receipt], T], **options: Unpack[CommonLater]) -> Later[T]: ...
    def restocks(self, *, run: str, **options: Any) -> Any:
        """The function's lines are new stock; with ``run="now"`` after the function returned."""
        return self._decorator(Kind.RESTOCK, "restocks", run, options)

    @overload
    def takes_back(self, *, run: Literal["now"], **options: Unpack[Returning]) -> Now: ...
    @overload
    def takes_back(self, *, run: Literal["later"], name: str, result: None = None, **options: Unpack[ReturningLater]) -> Later[Receipt]: ...
    @overload
    def takes_back(
        self, *, run: Literal["later"], name: str, result: Callable[[Receipt], T], **options: Unpack[ReturningLater]
    ) -> Later[T]: ...
    def takes_back(self, *, run: str, **options: Any) -> Any:
        """The function's lines, sold by operation ``of``, come back; with ``run="now"`` after the function returned."""
        return self._decorator(Kind.TAKE_BACK, "takes_back", run, options)

    @overload
    def adjusts(self, *, run: Literal["now"], **options: Unpack[Counted]) -> Now: ...
    @overload
    def adjusts(self, *, run: Literal["later"], name: str, result: None = None, **options: Unpack[CountedLater]) -> Later[Receipt]: ...
    @overload
    def adjusts(self, *, run: Literal["later"], name: str, result: Callable[[Receipt], T], **options: Unpack[CountedLater]) -> Later[T]: ...
    def adjusts(self, *, run: str, **options: Any) -> Any:
        """The function's lines correct a count. With ``run="now"`` negative ones move before the function and are undone if it
        raises, positive ones after it returned; one call has one sign."""
        return self._decorator(Kind.ADJUST, "adjusts", run, options)

    def writes_stock(self, function: W) -> W:
        """``async def write(moves: Sequence[Movement], session: AsyncSession) -> None`` keeps the service's own tables.

        Called once per applied batch with every movement, expiries and corrections too, in the ledger's transaction; raising
        holds the batch back.
        """
        _must_be_async(function, "writes_stock")
        self._hooks.writes_stock.append(function)
        return function

    def reads_stock(self, function: R) -> R:
        """``async def read(merchant, skus, session) -> Iterable[OpeningBalance]`` says what the service's own tables have.

        Asked for SKUs that the ledger does not know yet, and by comparison. There is one per Inventory.
        """
        _must_be_async(function, "reads_stock")
        if self._hooks.reads_stock is not None:
            raise TypeError(f"reads_stock is {self._hooks.reads_stock!r} already")
        self._hooks.reads_stock = function
        return function

    def on(self, name: str) -> Callable[[H], H]:
        """Call the function, sync or async, when ``name`` happens; ``ValueError`` lists what can."""
        if name not in EVENTS:
            raise ValueError(f"on({name!r}): there is no such event; there are {', '.join(EVENTS)}")

        def register(handler: H) -> H:
            self._hooks.handlers.setdefault(name, []).append(handler)
            return handler

        return register

    def provides(self, kind: type[Any]) -> Callable[[H], H]:
        """The function makes the ``self`` of ``run="later"`` methods of class ``kind``: ``make(session)`` returns an instance.

        It may be sync or async, or yield the instance, or return a context manager of it; then it is closed when the method
        has ended, with its error if it raised.
        """

        def register(make: H) -> H:
            self._registry.provide(kind, make)
            return make

        return register

    def weave(self, path: str, *decorators: Callable[[Any], Any]) -> Callable[[], None]:
        """Decorate code that one can't edit: ``inventory.weave("shop.services:StockService.hold", inventory.reserves(…))``.

        Returns a function that puts back what was there; ``run="later"`` functions stay registered, stored tasks need them.
        """
        return weave_in_place(path, *decorators)

    def _decorator(self, kind: Kind, called: str, run: str, options: dict[str, Any]) -> Callable[[Any], Any]:
        if run not in ("now", "later"):
            raise TypeError(f"{called}(run={run!r}): run is 'now' or 'later'")
        allowed = {*_KEYWORDS[kind].__annotations__}
        if run == "later":
            allowed |= {"name", "result", *Stored.__annotations__}
        elif kind in (Kind.RESERVE, Kind.DEDUCT):
            allowed.add("session")
        for keyword in options:
            if keyword not in allowed:
                raise TypeError(
                    f"{called}(run={run!r}) got an unexpected keyword argument {keyword!r}; it takes {', '.join(sorted(allowed))}"
                )
        for keyword in ("reservation", "of", *(("name",) if run == "later" else ())):
            if (keyword in allowed) and options.get(keyword) is None:
                raise TypeError(f"{called}(run={run!r}) is missing the keyword argument {keyword!r}")
        if options.get("durability") not in (None, *LEVELS):
            raise InvalidOperation("durability", options["durability"], f"must be one of {', '.join(LEVELS)}")
        result = options.get("result")
        if result is not None and (not callable(result) or inspect.iscoroutinefunction(result)):
            raise TypeError(f"{called}(result={result!r}): result is a function of the receipt, not async")
        act = Act(kind=kind, run="now" if run == "now" else "later", **options)

        def decorate(function: Any) -> Any:
            aspect = StockAspect(self, act)
            woven = weave(function, aspect)
            if aspect.entry is not None:
                self._registry.add(aspect.entry)
            return woven

        return decorate


def _must_be_async(function: Any, hook: str) -> None:
    if not inspect.iscoroutinefunction(function):
        raise TypeError(f"@{hook}: {getattr(function, '__qualname__', function)!r} must be 'async def'")
