"""What one event loop knows of the links: kept new by a push and a poll, never replaced by anything older.

A document takes effect when its version is higher than the known one. A poll that finds Redis behind (it lost what came after) gives
back what is known here. While Redis is away everything stays as it was last.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from inventory_sdk.beside import Ground
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.gray import snapshot
from inventory_sdk.gray.decision import Decider
from inventory_sdk.gray.rules import Rules, read
from inventory_sdk.gray.samples import Samples
from inventory_sdk.gray.store import AWAY, RulesChanged, RuleStore, RulesUnavailable
from inventory_sdk.metrics import Happened, Retried
from inventory_sdk.metrics.events import GrayRouted, GrayRules, GrayRulesRead
from inventory_sdk.sync.backoff import Backoff, waited

log = logging.getLogger("inventory_sdk.gray")

POLL: Final = 5.0
"""Seconds between two looks at all rules, give or take a fifth."""
SHORTEST: Final = 0.2
"""Between two looks, however many hints there are that something is new."""
FIRST: Final = 1.0
"""Seconds that the start waits for the rules."""
FLUSH: Final = 1.0
QUIET: Final = 60.0
"""Seconds without a push after which the subscription is made anew: a connection may be dead without anybody saying so."""

Attributes = Callable[[str], Mapping[str, Any]]


class Watch:
    """One event loop's half of the links. ``known`` is by link. ``named``: the links that are declared, whether rules of them are known or
    not."""

    def __init__(self, ground: Ground, attributes: Attributes, path: Path | None, poll: float = POLL, named: Collection[str] = ()) -> None:
        self.ground = ground
        self.store = RuleStore(ground.client, ground.namespace)
        self.known: dict[str, Decider] = {}
        self.changed = asyncio.Event()
        """Set by every change of rules, for those who follow them."""
        self._attributes = attributes
        self._path = path
        self._poll = poll
        self._named = named
        self._read_at = time.monotonic()
        self._look = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._samples: dict[str, Samples] = {}
        self._exposed: dict[str, set[str]] = {}
        self._fetched: dict[str, int] = {}
        self._coming: dict[str, set[str]] = {}
        self._flush = asyncio.Event()
        self._unsaved = False
        self._dice = random.Random()  # noqa: S311 - it keeps processes apart, nothing more

    @property
    def rules(self) -> dict[str, Rules]:
        """By link."""
        return {link: decider.rules for link, decider in self.known.items()}

    async def start(self) -> None:
        """Take what is on disk, then what is in Redis if it answers at once."""
        if self._path is not None:
            try:
                for rules in await asyncio.to_thread(snapshot.load, self._path):
                    self.install(rules)
            except (OSError, ValueError) as error:
                self._failed("gray_snapshot", error, "the snapshot %s can't be used: %s", self._path)
            self._unsaved = False
        try:
            async with asyncio.timeout(FIRST):
                await self.load()
        except (TimeoutError, RulesUnavailable) as error:
            self._retried(error, 1)
            log.warning("the gray links' rules can't be read: going on with the last known ones, stable where there are none: %s", error)
        for name, work in (("listening", self._listen()), ("polling", self._keep_looking()), ("counting", self._keep_flushing())):
            self._spawn(f"inventory gray {name}", work)

    async def close(self) -> None:
        """Hands on what was counted."""
        pending = set(self._tasks)
        while pending:
            # A client may swallow a cancellation that meets the arrival of its answer: then the task is cancelled once more.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.1)
        await self.flush()

    # What is known ------------------------------------------------------------------------------------------------------------------

    def install(self, rules: Rules, stored: bool = False) -> bool:
        """Let rules take effect unless they are not newer; whether they did. ``stored``: read from Redis, which decides between two
        documents of one version (one of them was lost there in a failover)."""
        known = self.known.get(rules.link)
        if known is not None and (rules.version < known.version or (rules.version == known.version and not stored)):
            return False
        if known is not None and known.rules == rules:
            return False
        exposed = self._exposed.setdefault(rules.link, set())
        self.known[rules.link] = Decider(rules, exposed, self._attributes_of)
        self._unsaved = True
        self._flush.set()
        self.changed.set()
        self.ground.metrics.record(GrayRules(rules.link, rules.version, rules.percentage, rules.killed, rules.paused))
        return True

    async def load(self) -> None:
        """Look at all rules in Redis. ``RulesUnavailable``."""
        asked = time.monotonic()
        found = await self.store.load()
        versions: dict[str, int] = {}
        for link, document in found.items():
            rules = self._readable(document, link)
            if rules is None:
                versions[link] = -1  # whatever it is, it is not for us to replace
                continue
            versions[link] = rules.version
            await self._arrived(rules, stored=True)
        for link, decider in list(self.known.items()):
            there = versions.get(link, 0)
            if 0 <= there < decider.version:
                log.warning("Redis has version %d of gray link %s, %d is known: giving it back", there, link, decider.version)
                self.ground.metrics.record(Happened("gray_brought_back", {"reason": link}))
                if exposed := self._exposed[link] if decider.rules.keep_exposed else set():
                    self._fetched[link] = 0
                    self._coming.setdefault(link, set()).update(exposed)
                with suppress(RulesChanged):  # somebody was first
                    await self.store.bring_back(there, decider.rules)
        self._read_at = asked

    def hint(self) -> None:
        """Somebody knows newer rules than we do."""
        self._look.set()

    async def _arrived(self, rules: Rules, stored: bool) -> None:
        if rules.keep_exposed and not rules.killed:
            await self._fetch_exposed(rules.link)
        self.install(rules, stored)

    def _readable(self, document: bytes, link: str) -> Rules | None:
        try:
            rules = read(document)
            if link and rules.link != link:
                raise InvalidOperation("link", rules.link, f"stands under {link!r}")
        except InvalidOperation as error:
            self.ground.metrics.record(Happened("gray_unreadable", {}))
            log.error("rules of gray link %s can't be read and do not take effect: %s", link or "(pushed)", error)
            return None
        return rules

    def _attributes_of(self, merchant: str) -> Mapping[str, Any]:
        try:
            return self._attributes(merchant)
        except Exception as error:  # noqa: BLE001 - the service's function may raise anything, and a call must not fail for it
            self._failed("gray_attributes", error, "the attributes of merchant %s can't be had, so none of them fit: %s", merchant)
            return {}

    # What is counted and remembered ---------------------------------------------------------------------------------------------------

    def count(self, link: str, variant: str, merchant: str, seconds: float, failed: bool) -> None:
        """One call went through."""
        samples = self._samples.get(link)
        if samples is None:
            samples = self._samples[link] = Samples()
        samples.add(variant, merchant, seconds, failed)

    def expose(self, link: str, merchant: str) -> None:
        """The percentage has reached a merchant, for good."""
        known = self._exposed.setdefault(link, set())
        if merchant not in known:
            known.add(merchant)
            self._coming.setdefault(link, set()).add(merchant)
            self._flush.set()

    async def flush(self) -> None:
        """Hand on what was counted, remember who was exposed, write the snapshot."""
        await self._flush_exposed()
        await self._flush_samples()
        if self._path is not None and self._unsaved:
            self._unsaved = False
            try:
                await asyncio.to_thread(snapshot.write, self._path, list(self.rules.values()))
            except OSError as error:
                self._unsaved = True
                self._failed("gray_snapshot", error, "the snapshot %s can't be written: %s", self._path)

    async def _flush_samples(self) -> None:
        counted, self._samples = self._samples, {}
        now: float | None = None
        for link, samples in counted.items():
            for variant, tally in samples.sides.items():
                if tally.calls:
                    self.ground.metrics.record(GrayRouted(link, variant, tally.calls, tally.errors, tally.seconds))
            decider = self.known.get(link)
            guard = decider.rules.guard if decider is not None else None
            if guard is None:
                continue
            try:
                now = await self.store.now() if now is None else now
                await self.store.count(link, guard.interval, int(now // guard.interval), samples.counts())
            except RulesUnavailable as error:
                # Counts are dropped, not kept: they would be of another window by then.
                self._retried(error, 1)

    async def _flush_exposed(self) -> None:
        for link in list(self._coming):
            merchants = self._coming.pop(link)
            try:
                await self.store.expose(link, sorted(merchants))
            except RulesUnavailable as error:
                self._coming.setdefault(link, set()).update(merchants)
                self._retried(error, 1)
            except asyncio.CancelledError:
                self._coming.setdefault(link, set()).update(merchants)
                raise

    async def _fetch_exposed(self, link: str) -> None:
        known = self._fetched.get(link, 0)
        found = await self.store.exposed(link, known)
        self._fetched[link] = max(self._fetched.get(link, 0), known + len(found))  # a push and a poll may both be here
        self._exposed.setdefault(link, set()).update(found)

    def _tell_age(self) -> None:
        """Not from where the rules are read: who hangs there says nothing."""
        if self._named or self.known:
            self.ground.metrics.record(GrayRulesRead(time.monotonic() - self._read_at))

    # Tasks --------------------------------------------------------------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        backoff = Backoff(SHORTEST, self._poll)
        delay = self._jittered()
        while True:
            await waited(self._look, delay)
            self._look.clear()
            try:
                await self.load()
                backoff.reset()
                delay = self._jittered()
            except RulesUnavailable as error:
                delay = backoff.delay()
                self._retried(error, backoff.attempts)
            await asyncio.sleep(SHORTEST)

    def _jittered(self) -> float:
        return self._poll * self._dice.uniform(0.8, 1.2)

    async def _keep_flushing(self) -> None:
        while True:
            await waited(self._flush, FLUSH)
            self._flush.clear()
            self._tell_age()
            await self.flush()
            await asyncio.sleep(0.05)

    async def _listen(self) -> None:
        client: Any = self.ground.client
        if not hasattr(client, "pubsub"):
            return  # an old client of a cluster: then the poll alone has to do
        backoff = Backoff(0.1, self._poll)
        while True:
            pubsub = client.pubsub()
            try:
                await pubsub.subscribe(self.store.channel)
                while (message := await pubsub.get_message(timeout=QUIET)) is not None:
                    if message["type"] == "subscribe":
                        self.hint()  # what was pushed before we listened
                        backoff.reset()
                    elif message["type"] == "message":
                        await self._pushed(message["data"])
            except (*AWAY, RulesUnavailable) as error:
                self._retried(error, backoff.attempts + 1)
                await asyncio.sleep(backoff.delay())
            finally:
                with suppress(*AWAY):
                    await pubsub.aclose()

    async def _pushed(self, document: bytes) -> None:
        rules = self._readable(document, "")
        if rules is not None:
            await self._arrived(rules, stored=False)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("%s died", task.get_name(), exc_info=error)
            self.ground.failed(error)

    def _retried(self, error: BaseException, attempt: int) -> None:
        reason = type(error.__cause__ or error).__name__
        self.ground.metrics.record(Retried("gray", reason))
        if attempt & (attempt - 1) == 0 and attempt > 1:
            log.warning("the gray links' Redis does not answer (attempt %d): %s", attempt, error)

    def _failed(self, what: str, error: Exception, message: str, *about: object) -> None:
        self.ground.metrics.record(Happened(f"{what}_failed", {"reason": type(error).__name__}))
        log.warning(message, *about, error)
