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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol
from uuid import uuid4
from weakref import WeakKeyDictionary

from redis.exceptions import RedisClusterException, RedisError

from inventory_sdk.alerts.board import Alert, Silence, Standing, judged, to_tell
from inventory_sdk.alerts.rules import Count, Rule, ShadowMismatch, Sums, check
from inventory_sdk.alerts.sinks import Sink, to_log
from inventory_sdk.alerts.tally import Tally
from inventory_sdk.beside import Ground, Job
from inventory_sdk.errors import InvalidOperation, InventoryError, NotStarted
from inventory_sdk.metrics.events import Alerting, Event, Retried
from inventory_sdk.model import JournalEntry, StockLevel, split_key
from inventory_sdk.sync.backoff import waited

log = logging.getLogger("inventory_sdk.alerts")

CLOCK: Final = "return redis.call('TIME')"
"""TIME names no key, so a cluster would not know which node is asked."""
PERIOD: Final = 5.0
"""Seconds between two pushes of a process, and between two rounds of the judge."""
LEASE_MS: Final = 30_000
RULE_TIMEOUT: Final = 10.0
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
    """Rules and sinks are declared before the inventory starts, alike in all of its processes. ``clock``: seconds since 1970; None:
    Redis' own, the one that all processes share.

    Without a rule nothing is counted, sent or asked. A rule that raises is counted (``rule_<name>``) and hurts neither the sale that it
    was to count nor the other rules."""

    def __init__(self, namespace: str, stock: Callable[[], Levels], clock: Callable[[], float] | None = None) -> None:
        self.clock = clock
        self._namespace = namespace
        self._stock = stock
        self._rules: dict[str, Rule] = {}
        self._sinks: dict[str, Sink] = {}
        self._tally = Tally(namespace)
        self._here: WeakKeyDictionary[asyncio.AbstractEventLoop, _Here] = WeakKeyDictionary()
        self._name = uuid4().hex
        self._broken: Counter[str] = Counter()
        self._untold: set[str] = set()
        self._unsaved: dict[str, Standing] | None = None

    # Declaring ------------------------------------------------------------------------------------------------------------------

    def watch(self, *rules: Rule) -> None:
        """Judge these rules too. ``InvalidOperation`` for a second one of the same name."""
        self._not_started("watch")
        for rule in rules:
            check(rule)
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
            try:
                self._tally.add(rule.name, rule.on_event(event))
            except Exception as error:  # noqa: BLE001 - a rule may be the service's own
                self._breaks(rule, error)

    def answered(self, merchant: str, accepted: bool) -> None:
        """One take was answered."""
        for rule in self._rules.values():
            try:
                self._tally.add(rule.name, rule.on_answer(merchant, accepted))
            except Exception as error:  # noqa: BLE001 - it stands between the take and its caller
                self._breaks(rule, error)

    def applied(self, entries: Sequence[JournalEntry]) -> None:
        """The ledger has these, and its worker is here."""
        for rule in self._rules.values():
            for entry in entries:
                try:
                    self._tally.add(rule.name, rule.on_applied(entry))
                except Exception as error:  # noqa: BLE001 - it stands between the ledger and what waits for it
                    self._breaks(rule, error)

    def compared(self, subject: str, *, same: bool) -> None:
        """For ``ShadowMismatch``: the service has compared an answer of ``subject`` (a gray link, a function) with its shadow's."""
        for rule in self._rules.values():
            if isinstance(rule, ShadowMismatch):
                self._tally.add(rule.name, [Count(subject, "same" if same else "different", 1)])

    def _breaks(self, rule: Rule, error: Exception) -> None:
        """Told with the next push: what is told of itself here could be what it breaks of."""
        self._untold.add(rule.name)
        self._broken[rule.name] += 1
        if (count := self._broken[rule.name]) & (count - 1) == 0:
            log.error("alert rule %s failed to count (%d times by now)", rule.name, count, exc_info=error)

    # Asking ---------------------------------------------------------------------------------------------------------------------

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of what is watched, in the order of ``watch``."""
        return tuple(self._rules)

    async def firing(self) -> list[Alert]:
        """What fires now, silenced or not, longest first."""
        now = await self._now(self._ground())
        standings = [standing for standing in (await self._standings())[0].values() if standing.firing and not standing.over]
        return [standing.alert(now) for standing in sorted(standings, key=lambda each: each.since)]

    async def silence(
        self, seconds: float, *, rule: str | None = None, subject: str | None = None, who: str = "", why: str = ""
    ) -> Silence:
        """Tell nobody of the beginning of what matches, for so long. What still fires afterwards is told then."""
        if not 0 < seconds <= 30 * 86_400:
            raise InvalidOperation("seconds", seconds, "of a silence must be more than 0 and at most 30 days")
        if rule is not None and rule not in self._rules:
            raise InvalidOperation("rule", rule, f"is not watched; there are {', '.join(self._rules) or 'none'}")
        now = await self._now(self._ground())
        silence = Silence(uuid4().hex[:8], rule, subject, now + seconds, who, why, now)
        await self._client().hset(self._key("silences"), silence.number, silence.text())
        return silence

    async def unsilence(self, number: str) -> bool:
        """End a silence; False where there is none of this number."""
        return bool(await self._client().hdel(self._key("silences"), number))

    async def silences(self) -> list[Silence]:
        """Those that are not over, the first to end first."""
        now = await self._now(self._ground())
        return (await self._silences(now))[0]

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
        broken, self._untold = self._untold, set()
        for name in broken:
            ground.metrics.record(Retried("alerts", f"rule_{name}"))
        try:
            await self._tally.push(ground.client, await self._now(ground))
        except (RedisError, RedisClusterException, OSError) as error:
            ground.metrics.record(Retried("alerts", type(error).__name__))

    async def _judge_on(self, ground: Ground, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                if await self._elected(ground):
                    await self.judge()
                else:
                    self._unsaved = None
            except (RedisError, RedisClusterException, OSError) as error:
                ground.metrics.record(Retried("alerts", type(error).__name__))
            except Exception as error:  # the worker has more to do than this
                log.exception("a round of the alerts failed")
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
        name = f"{self._name}/{id(asyncio.get_running_loop())}"
        holder = await client.get(key)
        if holder is None:
            return bool(await client.set(key, name, nx=True, px=LEASE_MS))
        if holder != name.encode():
            return False
        await client.pexpire(key, LEASE_MS)  # which a Redis without memory does, too: it has something to be told
        return True

    async def _now(self, ground: Ground) -> float:
        if self.clock is not None:
            return self.clock()
        client: Any = ground.client
        seconds, microseconds = await client.eval(CLOCK, 1, self._key("state"))
        return int(seconds) + int(microseconds) / 1e6

    # Judging --------------------------------------------------------------------------------------------------------------------

    async def judge(self) -> None:
        """One round, as the worker makes one every five seconds: sum, judge, tell."""
        ground = self._ground()
        client: Any = ground.client
        now = await self._now(ground)
        sums = await self._tally.sums(client, self._rules.values(), now)
        stored, unreadable = await self._standings()
        before = stored if self._unsaved is None else self._unsaved
        silences, ended = await self._silences(now)
        after = {key: replace(each, over=True) for key, each in before.items() if each.rule not in self._rules and each.told}
        for found in await asyncio.gather(*[self._found(ground, each, sums[each.name], before, now) for each in self._rules.values()]):
            after |= found
        sinks: dict[str, Sink] = {**(self._sinks or {"log": to_log}), "on": partial(self._handlers, ground)}
        told = await asyncio.gather(*[self._tell(ground, each, sinks, silences, now) for each in after.values()])
        self._unsaved = after = {each.key: each for each in told if not each.over or each.told}
        firing = dict.fromkeys(self._rules, 0)
        for each in after.values():
            if each.rule in firing:
                firing[each.rule] += each.firing and not each.over
        ground.metrics.record(Alerting(firing))
        # Should Redis not take it, the next round here goes on from what is kept, and nobody is told twice.
        if changed := {key: each.text() for key, each in after.items() if stored.get(key) != each}:
            await client.hset(self._key("state"), mapping=changed)
        if gone := [*(stored.keys() - after.keys()), *unreadable]:
            await client.hdel(self._key("state"), *gone)
        if ended:
            await client.hdel(self._key("silences"), *ended)
        self._unsaved = None

    async def _found(
        self, ground: Ground, rule: Rule, sums: Mapping[str, Sums], before: Mapping[str, Standing], now: float
    ) -> dict[str, Standing]:
        """One rule's standings; where it fails, or takes too long, they stay as they were."""
        try:
            async with asyncio.timeout(RULE_TIMEOUT):
                findings = await rule.judge(sums, partial(self._available, ground))
            return judged(before, rule, findings, now)
        except Exception:  # a rule may be the service's own
            log.exception("alert rule %s failed", rule.name)
            ground.metrics.record(Retried("alerts", f"rule_{rule.name}"))
            return {key: each for key, each in before.items() if each.rule == rule.name}

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

    async def _standings(self) -> tuple[dict[str, Standing], list[bytes]]:
        """What Redis keeps, and the fields of what is none of ours."""
        standings: dict[str, Standing] = {}
        unreadable: list[bytes] = []
        for field, text in (await self._client().hgetall(self._key("state"))).items():
            try:
                standing = Standing.read(text)
                standings[standing.key] = standing
            except (ValueError, TypeError) as error:
                log.error("the state of alert %r can't be read and is forgotten: %r", field, error)
                unreadable.append(field)
        return standings, unreadable

    async def _silences(self, now: float) -> tuple[list[Silence], list[bytes]]:
        """Those that are not over, the first to end first, and the fields of the others."""
        silences: list[Silence] = []
        ended: list[bytes] = []
        for number, text in (await self._client().hgetall(self._key("silences"))).items():
            try:
                silence = Silence.read(number.decode(), text)
                if silence.until > now:
                    silences.append(silence)
                else:
                    ended.append(number)
            except (ValueError, TypeError) as error:
                log.error("silence %r can't be read and is forgotten: %r", number, error)
                ended.append(number)
        return sorted(silences, key=lambda each: each.until), ended

    def _ground(self) -> Ground:
        here = self._here.get(asyncio.get_running_loop())
        if here is None:
            raise NotStarted("the inventory is not started in this event loop, or no alert rule is watched")
        return here.ground

    def _client(self) -> Any:
        return self._ground().client

    def _key(self, name: str) -> str:
        return f"{self._namespace}:alerts:{name}"
