"""``inventory.alerts``: every process counts, one worker judges, each sink is told once that something began and once that it is over.

<namespace>:alerts:counts:<bucket>   what was counted in ten seconds (tally.py)
<namespace>:alerts:state             hash, rule ␟ subject → standing (board.py)
<namespace>:alerts:silences          hash, number → silence
<namespace>:alerts:judge             who judges; another worker takes over when it falls silent
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol
from uuid import uuid4
from weakref import WeakKeyDictionary

from redis.exceptions import RedisClusterException, RedisError

from inventory_sdk.alerts.board import Alert, Silence, Standing, judged, to_tell
from inventory_sdk.alerts.rules import Count, Rule, ShadowMismatch
from inventory_sdk.alerts.sinks import Sink, to_log
from inventory_sdk.alerts.tally import Tally
from inventory_sdk.beside import Ground, Job
from inventory_sdk.errors import InvalidOperation, InventoryError, NotStarted
from inventory_sdk.metrics.events import Alerting, Event, Retried
from inventory_sdk.model import JournalEntry, StockLevel, split_key
from inventory_sdk.sync.backoff import waited

log = logging.getLogger("inventory_sdk.alerts")

PERIOD: Final = 5.0
"""Seconds between two pushes of a process, and between two rounds of the judge."""
LEASE_MS: Final = 30_000
SINK_TIMEOUT: Final = 10.0


class Levels(Protocol):
    """What is asked of the stock."""

    async def level(self, sku: str, *, merchant: str | None = None) -> StockLevel: ...


@dataclass(slots=True)
class _Here:
    """One event loop's half."""

    ground: Ground
    pushing: asyncio.Task[None]


class Alerts:
    """Rules and sinks are declared before the inventory starts, alike in all of its processes. ``clock``: seconds since 1970.

    Without a rule nothing is counted, sent or asked."""

    def __init__(self, namespace: str, stock: Callable[[], Levels], clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._namespace = namespace
        self._stock = stock
        self._rules: dict[str, Rule] = {}
        self._sinks: dict[str, Sink] = {}
        self._tally = Tally(namespace)
        self._here: WeakKeyDictionary[asyncio.AbstractEventLoop, _Here] = WeakKeyDictionary()
        self._name = uuid4().hex

    # Declaring ------------------------------------------------------------------------------------------------------------------

    def watch(self, *rules: Rule) -> None:
        """Judge these rules too. ``InvalidOperation`` for a second one of the same name."""
        self._not_started("watch")
        for rule in rules:
            if rule.name in self._rules:
                raise InvalidOperation("name", rule.name, "is watched already: give one of them another name=")
            self._rules[rule.name] = rule

    def tell(self, *sinks: Sink) -> None:
        """Tell these of every alert; without one, the log is told. ``@inventory.on("alert")`` handlers are told in any case."""
        self._not_started("tell")
        for sink in sinks:
            if not callable(sink):
                raise InvalidOperation("sink", sink, "must be something that can be called with an Alert")
            self._sinks[f"{len(self._sinks)}"] = sink

    def _not_started(self, what: str) -> None:
        if len(self._here):
            raise InventoryError(f"alerts.{what}() comes before the inventory is started: its processes must agree")

    # Counting -------------------------------------------------------------------------------------------------------------------

    def record(self, event: Event) -> None:
        """As a metrics sink: what the SDK tells of itself counts for the rules that want it."""
        for rule in self._rules.values():
            self._tally.add(rule.name, rule.on_event(event))

    def answered(self, merchant: str, accepted: bool) -> None:
        """One take was answered."""
        for rule in self._rules.values():
            self._tally.add(rule.name, rule.on_answer(merchant, accepted))

    def applied(self, entries: Sequence[JournalEntry]) -> None:
        """The ledger has these, and its worker is here."""
        for rule in self._rules.values():
            for entry in entries:
                self._tally.add(rule.name, rule.on_applied(entry))

    def compared(self, subject: str, *, same: bool) -> None:
        """For ``ShadowMismatch``: the service has compared an answer of ``subject`` (a gray link, a function) with its shadow's."""
        for rule in self._rules.values():
            if isinstance(rule, ShadowMismatch):
                self._tally.add(rule.name, [Count(subject, "same" if same else "different", 1)])

    # Asking ---------------------------------------------------------------------------------------------------------------------

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of what is watched, in the order of ``watch``."""
        return tuple(self._rules)

    async def firing(self) -> list[Alert]:
        """What fires now, silenced or not, longest first."""
        now = self.clock()
        standings = [standing for standing in (await self._standings()).values() if standing.firing and not standing.over]
        return [standing.alert(now) for standing in sorted(standings, key=lambda each: each.since)]

    async def silence(
        self, seconds: float, *, rule: str | None = None, subject: str | None = None, who: str = "", why: str = ""
    ) -> Silence:
        """Tell nobody of the beginning of what matches, for so long. What still fires afterwards is told then."""
        if not 0 < seconds <= 30 * 86_400:
            raise InvalidOperation("seconds", seconds, "of a silence must be more than 0 and at most 30 days")
        if rule is not None and rule not in self._rules:
            raise InvalidOperation("rule", rule, f"is not watched; there are {', '.join(self._rules) or 'none'}")
        silence = Silence(uuid4().hex[:8], rule, subject, self.clock() + seconds, who, why)
        await self._client().hset(self._key("silences"), silence.number, silence.text())
        return silence

    async def unsilence(self, number: str) -> bool:
        """End a silence; False where there is none of this number."""
        return bool(await self._client().hdel(self._key("silences"), number))

    async def silences(self) -> list[Silence]:
        """Those that are not over, the first to end first."""
        now = self.clock()
        rows = await self._client().hgetall(self._key("silences"))
        found = [Silence.read(number.decode(), text) for number, text in rows.items()]
        return sorted((each for each in found if each.until > now), key=lambda each: each.until)

    # Life -----------------------------------------------------------------------------------------------------------------------

    async def start(self, ground: Ground) -> None:
        """Begin to count in this event loop."""
        if not self._rules:
            return
        ground.engine.tell_takes(self.answered)
        ground.applied.append(self.applied)
        pushing = asyncio.create_task(self._push_on(ground), name="inventory-alerts-push")
        self._here[asyncio.get_running_loop()] = _Here(ground, pushing)

    async def close(self) -> None:
        """Push what was counted, once; end."""
        here = self._here.pop(asyncio.get_running_loop(), None)
        if here is None:
            return
        here.pushing.cancel()
        await asyncio.wait([here.pushing])
        await self._push(here.ground)

    def jobs(self, ground: Ground) -> Sequence[Job]:
        """A worker is ready to be the judge."""
        return [Job("alerts", partial(self._judge_on, ground))] if self._rules else []

    async def _push_on(self, ground: Ground) -> None:
        while True:
            await asyncio.sleep(PERIOD)
            await self._push(ground)

    async def _push(self, ground: Ground) -> None:
        try:
            await self._tally.push(ground.client, self.clock())
        except (RedisError, RedisClusterException, OSError) as error:
            ground.metrics.record(Retried("alerts", type(error).__name__))

    async def _judge_on(self, ground: Ground, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                if await self._elected(ground):
                    await self.judge()
            except (RedisError, RedisClusterException, OSError) as error:
                ground.metrics.record(Retried("alerts", type(error).__name__))
            await waited(stopping, PERIOD)
        try:
            if await self._elected(ground):
                await ground.client.delete(self._key("judge"))
        except (RedisError, RedisClusterException, OSError) as error:
            ground.metrics.record(Retried("alerts", type(error).__name__))  # it ends by itself

    async def _elected(self, ground: Ground) -> bool:
        """Two may think so for a moment, after a pause of half a minute: then somebody is told twice."""
        client: Any = ground.client
        key = self._key("judge")
        if await client.set(key, self._name, nx=True, px=LEASE_MS):
            return True
        if await client.get(key) != self._name.encode():
            return False
        await client.pexpire(key, LEASE_MS)
        return True

    # Judging --------------------------------------------------------------------------------------------------------------------

    async def judge(self) -> None:
        """One round, as the worker makes one every five seconds: sum, judge, tell."""
        ground = self._ground()
        client: Any = ground.client
        now = self.clock()
        sums = await self._tally.sums(client, self._rules.values(), now)
        before = await self._standings()
        silences = await self.silences()
        after: dict[str, Standing] = {}
        for rule in self._rules.values():
            try:
                findings = await rule.judge(sums[rule.name], partial(self._available, ground))
            except Exception:  # a rule may be the service's own
                log.exception("alert rule %s failed", rule.name)
                ground.metrics.record(Retried("alerts", f"rule_{rule.name}"))
                after |= {key: each for key, each in before.items() if each.rule == rule.name}
                continue
            after |= judged(before, rule, findings, now)
        sinks: dict[str, Sink] = {**(self._sinks or {"log": to_log}), "on": partial(self._handlers, ground)}
        told = await asyncio.gather(*[self._tell(ground, each, sinks, silences, now) for each in after.values()])
        after = {each.key: each for each in told if not each.over or each.told}
        changed = {key: each.text() for key, each in after.items() if before.get(key) != each}
        if changed:
            await client.hset(self._key("state"), mapping=changed)
        if gone := before.keys() - after.keys():
            await client.hdel(self._key("state"), *gone)
        firing = dict.fromkeys(self._rules, 0)
        for each in after.values():
            firing[each.rule] = firing.get(each.rule, 0) + (each.firing and not each.over)
        ground.metrics.record(Alerting(firing))

    async def _tell(
        self, ground: Ground, standing: Standing, sinks: Mapping[str, Sink], silences: Sequence[Silence], now: float
    ) -> Standing:
        """The standing, with who knows of it now."""
        names = to_tell(standing, sinks, silences, now)
        alert = standing.alert(now)
        heard = await asyncio.gather(*[self._told(ground, sinks[name], alert) for name in names])
        done = {name for name, fine in zip(names, heard, strict=True) if fine}
        if standing.over:
            return replace(standing, told=tuple(name for name in standing.told if name in sinks and name not in done))
        return replace(standing, told=(*standing.told, *(name for name in names if name in done)))

    async def _told(self, ground: Ground, sink: Sink, alert: Alert) -> bool:
        try:
            async with asyncio.timeout(SINK_TIMEOUT):
                result = sink(alert)
                if inspect.isawaitable(result):
                    await result
        except Exception as error:  # noqa: BLE001 - whatever a sink raises: counted, said again in the next round
            log.warning("alert %s could not be told to %r, it is tried again: %r", alert.rule, sink, error)
            ground.metrics.record(Retried("alerts", f"sink_{type(error).__name__}"))
            return False
        return True

    async def _handlers(self, ground: Ground, alert: Alert) -> None:
        await ground.tell("alert", {**alert.document(), "alert": alert})

    async def _available(self, ground: Ground, field: str) -> int | None:
        merchant, sku = split_key(field)
        try:
            return (await self._stock().level(sku, merchant=merchant)).available
        except InventoryError as error:  # frozen, being recovered, Redis away: not to be said now
            ground.metrics.record(Retried("alerts", type(error).__name__))
            return None

    async def _standings(self) -> dict[str, Standing]:
        rows = await self._client().hgetall(self._key("state"))
        found = [Standing.read(text) for text in rows.values()]
        return {each.key: each for each in found}

    def _ground(self) -> Ground:
        here = self._here.get(asyncio.get_running_loop())
        if here is None:
            raise NotStarted("the inventory is not started in this event loop, or no alert rule is watched")
        return here.ground

    def _client(self) -> Any:
        return self._ground().client

    def _key(self, name: str) -> str:
        return f"{self._namespace}:alerts:{name}"
