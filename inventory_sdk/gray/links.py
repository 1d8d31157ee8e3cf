"""``inventory.gray_links``: what is declared, what the rules say, and changing them."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakKeyDictionary

from inventory_sdk import context
from inventory_sdk.beside import Ground, Job
from inventory_sdk.context import Side, Sides
from inventory_sdk.errors import InvalidOperation, NotStarted
from inventory_sdk.gray import propagation
from inventory_sdk.gray.admission import AdmissionJob, Hands, Merchants
from inventory_sdk.gray.aspect import GrayAspect
from inventory_sdk.gray.decision import CANDIDATE, STABLE, VARIANTS, Decision
from inventory_sdk.gray.guard import GuardJob
from inventory_sdk.gray.rules import Rules, changed, check_link, check_note
from inventory_sdk.gray.store import Change, RulesChanged, RuleStore
from inventory_sdk.gray.watch import Watch
from inventory_sdk.ledger.protocol import TaskFilter
from inventory_sdk.metrics import Happened, Metrics
from inventory_sdk.model import Receipt, check_text

if TYPE_CHECKING:
    import httpx

UNKNOWN: Final = Decision(STABLE, 0, "unknown")
NO_MERCHANT: Final = Decision(STABLE, 0, "no_merchant")
TRIES: Final = 16
"""A change that names no version is made again on what somebody else has just made."""

A = TypeVar("A", bound=Callable[[str], Mapping[str, Any]])


class GrayLinks:
    """The links of one Inventory. ``snapshot``: a file for the last known rules; None: none is kept."""

    def __init__(
        self,
        default_merchant: Callable[[], str | None],
        hands: Hands,
        metrics: Metrics,
        snapshot: str | os.PathLike[str] | None = None,
    ) -> None:
        self._default_merchant = default_merchant
        self._hands = hands
        self._metrics = metrics
        self._path = None if snapshot is None else Path(snapshot)
        self._aspects: list[GrayAspect] = []
        self._named: set[str] = set()
        self._later: dict[Any, GrayAspect] = {}
        self._attributes: Callable[[str], Mapping[str, Any]] | None = None
        self._followed: list[tuple[str, Merchants]] = []
        self._split: str | None = None
        self._here: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Watch]] = WeakKeyDictionary()
        self._last: tuple[weakref.ref[asyncio.AbstractEventLoop] | None, Watch | None] = (None, None)

    # Life (Beside) --------------------------------------------------------------------------------------------------------------------

    async def start(self, ground: Ground) -> None:
        """Refuse candidates that don't fit (``TypeError``), and learn the rules."""
        watch = Watch(ground, self._attributes_of, self._path, named=self._named)
        # First of all: whatever fails from here on, close() is called and takes it away again.
        self._here.setdefault(asyncio.get_running_loop(), []).append(watch)
        self._last = (None, None)
        for aspect in self._aspects:
            aspect.check()
        await watch.start()

    async def close(self) -> None:
        """Forget them in this event loop."""
        loop = asyncio.get_running_loop()
        watches = self._here.get(loop)
        if not watches:
            return
        watch = watches.pop()
        if not watches:
            del self._here[loop]
        self._last = (None, None)
        await watch.close()

    def jobs(self, ground: Ground) -> Sequence[Job]:
        """The guard, and admission that follows a link."""
        watch = self._watch()
        guard = GuardJob(watch.store, lambda: watch.rules, ground.metrics, ground.tell)
        jobs = [Job("gray guard", guard.run)]
        for link, merchants in self._followed:
            job = AdmissionJob(link, merchants, watch.known, self._hands, ground.ledger, ground.metrics, watch.changed)
            jobs.append(Job(f"gray admission {link}", job.run))
        return jobs

    # Declaring ------------------------------------------------------------------------------------------------------------------------

    def declare(self, aspect: GrayAspect) -> None:
        """A function goes through a link; its aspect has been woven."""
        self._aspects.append(aspect)
        self._named.add(aspect.link)
        assert aspect.site is not None
        self._later[aspect.site.function] = aspect

    def attributes(self, function: A) -> A:
        """``def attributes(merchant: str) -> Mapping[str, object]`` says what a merchant is like, for rules with ``where``. It is
        called for decisions, so it answers from memory; what it raises makes nothing fit."""
        if self._attributes is not None:
            raise TypeError(f"attributes is {self._attributes!r} already")
        if not callable(function) or asyncio.iscoroutinefunction(function):
            raise TypeError(f"attributes({function!r}): must be a function, not async: decisions don't wait")
        self._attributes = function
        return function

    def follow_admission(self, link: str, *, merchants: Merchants) -> None:
        """Workers hand the stock of the link's candidates to Redis and that of the others to the database, merchant by merchant, each
        as a drain (``stock.adopt``, ``stock.withdraw``). ``merchants``: an async function that lists those it is about."""
        if any(link == known for known, _ in self._followed):
            raise TypeError(f"follow_admission({link!r}) is there already")
        self._named.add(check_link(link))
        self._followed.append((link, merchants))

    def split_workers(self, link: str) -> None:
        """Later-functions get a routing key by this link: ``inventory.worker(variant="candidate")`` serves those of merchants on its
        candidate, ``variant="stable"`` the others, a worker without variant all. Say it in callers and workers alike."""
        if self._split is not None and self._split != link:
            raise TypeError(f"split_workers({link!r}): the workers are split by {self._split!r}, and can be by one link only")
        self._named.add(check_link(link))
        self._split = link

    def transport(
        self, link: str, *, stable: str, candidate: str, inner: httpx.AsyncBaseTransport | None = None
    ) -> httpx.AsyncBaseTransport:
        """For ``httpx.AsyncClient(transport=…)``: a merchant's calls go to the deployment of its side, whatever host the client
        names, and carry the request's decisions. Answers of 500 and more, and errors, count as failed for the guard."""
        self._named.add(check_link(link))
        made: httpx.AsyncBaseTransport = _transports().GrayTransport(self, link, stable, candidate, inner)
        return made

    def carrying(self, inner: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncBaseTransport:
        """For ``httpx.AsyncClient(transport=…)``: calls carry the request's decisions and go where they go."""
        made: httpx.AsyncBaseTransport = _transports().CarryingTransport(self, inner)
        return made

    # Deciding -------------------------------------------------------------------------------------------------------------------------

    def decide(self, link: str, merchant: str | None = None) -> Decision:
        """On which side of the link this request's merchant is. Within a request the first answer stands, here and in whatever it
        calls, unless the link was killed or the merchant denied since."""
        if merchant is None:
            merchant = self.home(None)
        if not merchant:
            return NO_MERCHANT
        watch = self._watch()
        known = watch.known.get(link)
        carried = context.sides.get()
        if carried is None:
            decision = UNKNOWN if known is None else known(merchant)
        else:
            side = carried.get((link, merchant))
            if side is not None:
                newer = known is None or known.version < side.version
                if newer:
                    watch.hint()
                if newer or side.variant != CANDIDATE or known is None or not known.stops(merchant):
                    return Decision(CANDIDATE if side.variant == CANDIDATE else STABLE, side.version, "carried")
            decision = UNKNOWN if known is None else known(merchant)
            carried[link, merchant] = Side(decision.variant, decision.version)
        if decision.reason == "percentage" and known is not None and known.rules.keep_exposed:
            watch.expose(link, merchant)
        return decision

    def explain(self, link: str, merchant: str) -> Decision:
        """What the rules say of a merchant, whatever this request was told before."""
        known = self._watch().known.get(check_link(link))
        return UNKNOWN if known is None else known(check_text("merchant", merchant))

    def home(self, merchant: str | None) -> str:
        """The merchant to decide for: this one, else the request's, else the Inventory's, else none (an empty text)."""
        return merchant or context.merchant.get() or self._default_merchant() or ""

    def count(self, link: str, variant: str, merchant: str, seconds: float, failed: bool) -> None:
        """For the guard and the metrics: a call went through."""
        self._watch().count(link, variant, merchant, seconds, failed)

    # The chain ------------------------------------------------------------------------------------------------------------------------

    def baggage(self, header: str | None = None) -> str:
        """A W3C baggage header with this request's decisions, and with what others have in ``header``. For clients other than httpx."""
        return propagation.merged(header, context.sides.get() or {})

    def arrived(self, header: str) -> Sides:
        """The decisions in the baggage of a caller who is trusted."""
        found, unreadable = propagation.found(header)
        if unreadable:
            self._metrics.record(Happened("gray_baggage_unreadable"))
        return found

    async def run_later(self, function: Any, receipt: Receipt, positional: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        """A worker calls a later-function: on the side that its caller was on."""
        aspect = self._later.get(function)
        if aspect is None:
            await function(*positional, **arguments)
            return
        decision = self.decide(aspect.link, receipt.merchant)
        began = time.perf_counter()
        try:
            if decision.variant != CANDIDATE:
                await function(*positional, **arguments)
            elif positional and aspect.has_receiver:
                await aspect.bound(positional[0])(*positional[1:], **arguments)
            else:
                await aspect.bound(None)(*positional, **arguments)
        except asyncio.CancelledError:
            raise
        except BaseException:
            self.count(aspect.link, decision.variant, receipt.merchant, time.perf_counter() - began, True)
            raise
        self.count(aspect.link, decision.variant, receipt.merchant, time.perf_counter() - began, False)

    def route(self, merchant: str) -> str:
        """The routing key of a later-function: the variant by which the workers are split, empty where they aren't."""
        return "" if self._split is None else self.decide(self._split, merchant).variant

    def serves(self, variant: str | None) -> Callable[[], TaskFilter | None] | None:
        """Which later-functions a worker of this variant may run now; None: all."""
        if variant is None:
            return None
        if variant not in VARIANTS:
            raise InvalidOperation("variant", variant, f"must be one of {', '.join(VARIANTS)}")
        link = self._split
        if link is None:
            raise InvalidOperation("variant", variant, "needs inventory.gray_links.split_workers(link): nothing says who is on which side")
        watch = self._watch()

        def now() -> TaskFilter | None:
            rules = watch.known[link].rules if link in watch.known else None
            killed = rules is not None and rules.killed
            denied = () if rules is None else (*rules.deny, *rules.taken_back)
            if variant == CANDIDATE:
                return TaskFilter((), ()) if killed else TaskFilter((CANDIDATE,), (), denied)
            return None if killed else TaskFilter((STABLE, ""), denied)

        return now

    # Rules ----------------------------------------------------------------------------------------------------------------------------

    def links(self) -> list[str]:
        """Every link that is declared in this process, or that this process knows rules of."""
        return sorted({*self._named, *self._watch().known})

    def known(self, link: str) -> Rules:
        """The rules that this process goes by; version 0 where it knows none."""
        decider = self._watch().known.get(check_link(link))
        return Rules(link) if decider is None else decider.rules

    async def show(self, link: str) -> Rules:
        """The rules as they stand in Redis. ``RulesUnavailable`` while it does not answer; ``known`` says what we go by."""
        return await self._store().get(check_link(link))

    async def set(self, link: str, *, who: str, why: str, version: int | None = None, **changes: Any) -> Rules:
        """Change fields of ``Rules`` (``percentage``, ``allow``, ``deny``, ``where``, ``keep_exposed``, ``guard``, ``paused``, …); the
        others stay. ``version``: the one that you have seen; ``RulesChanged`` if there is another one by now. Returns the new rules.

        ``InvalidOperation`` for what can't be, or a raise of the percentage while the rollout is paused. ``RulesUnavailable``.
        """
        watch = self._watch()
        made = await change(watch.store, link, who=who, why=why, version=version, known=self.known(link), **changes)
        watch.install(made)
        return made

    async def kill(self, link: str, *, who: str, why: str) -> Rules:
        """Stable for everybody, at once; also for requests that were decided before."""
        return await self.set(link, who=who, why=why, killed=True)

    async def restore(self, link: str, *, who: str, why: str) -> Rules:
        """Take a kill back: the rules are as they were."""
        return await self.set(link, who=who, why=why, killed=False)

    async def history(self, link: str, *, limit: int = 50) -> list[Change]:
        """Who changed what, when and why, newest first; with what the guard found."""
        if type(limit) is not int or limit < 1:
            raise InvalidOperation("limit", limit, "must be a whole number from 1")
        return await self._store().history(check_link(link), limit)

    # Here -----------------------------------------------------------------------------------------------------------------------------

    def _watch(self) -> Watch:
        last, watch = self._last
        loop = asyncio.get_running_loop()
        if watch is not None and last is not None and last() is loop:
            return watch
        watches = self._here.get(loop)
        if not watches:
            raise NotStarted
        self._last = (weakref.ref(loop), watches[-1])  # one assignment: loops of other threads read it
        return watches[-1]

    def _store(self) -> RuleStore:
        return self._watch().store

    def _attributes_of(self, merchant: str) -> Mapping[str, Any]:
        return {} if self._attributes is None else self._attributes(merchant)


async def change(
    store: RuleStore, link: str, *, who: str, why: str, version: int | None = None, known: Rules | None = None, **changes: Any
) -> Rules:
    """``GrayLinks.set`` on a store alone. ``known``: rules that must end up below the new version, whatever Redis has forgotten."""
    check_link(link)
    who, why = check_note("who", who), check_note("why", why)
    for attempt in range(TRIES):
        seen = await store.get(link)
        if version is not None and seen.version != version:
            raise RulesChanged(link, version, seen)
        base = known if known is not None and known.version > seen.version and version is None else seen
        try:
            return await store.put(seen, changed(base, **changes), who, why, above=0 if known is None else known.version)
        except RulesChanged:
            if version is not None or attempt == TRIES - 1:
                raise
            await asyncio.sleep(0)
    raise AssertionError  # the last attempt raised


def _transports() -> Any:
    try:
        from inventory_sdk.gray import transport
    except ImportError as error:
        raise ImportError(f"transports need httpx ({error}): pip install 'inventory_sdk[httpx]'") from error
    return transport
