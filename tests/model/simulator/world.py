"""One seed's world: the loop, the servers' doubles, the network between them, and what befalls it."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import Any

from tests.model.simulator.auditor import Auditor
from tests.model.simulator.broker import Broker
from tests.model.simulator.clock import BEGIN, VirtualLoop
from tests.model.simulator.ledger import Database
from tests.model.simulator.redis import ScriptCall, Server, runtime


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one request to Redis. ``lost``: it never arrives. ``silent``: its reply never comes. ``reset``: the connection
    breaks after it was executed. Times in seconds."""

    delay: float
    back: float
    lost: bool = False
    silent: bool = False
    reset: bool = False


class Network:
    """Latencies and losses on the way to Redis."""

    def __init__(self, world: World) -> None:
        self._world = world

    def latency(self) -> float:
        """Seconds for one way, now and then far longer than usual."""
        chance = self._world.random
        if self._world.chance("delayed"):
            return chance.uniform(0.005, 0.4)
        return chance.uniform(0.0001, 0.002)

    def request(self, connection: Any, words: list[bytes]) -> Fate:
        world = self._world
        delay, back = self.latency(), self.latency()
        if world.chance("request_lost"):
            if world.random.random() < 0.5:
                world.later(delay, connection.cut)
            return Fate(delay, back, lost=True)
        if world.chance("request_held"):
            # It sits in a dead connection and gets there when nobody expects it any more.
            return Fate(world.random.uniform(0.2, 6.0), back, silent=world.random.random() < 0.7)
        if world.chance("reply_lost"):
            silent = world.random.random() < 0.5
            return Fate(delay, back, silent=silent, reset=not silent)
        return Fate(delay, back)


class Process:
    """A caller's or a worker's operating-system process."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.dead = False
        self.ready = False
        """It has started."""
        self.leaving = False
        """It was told to stop."""

    async def away(self, seconds: float) -> None:
        """Be on the network for so long."""
        if self.world.over:
            raise ConnectionError("the simulation is over")
        self.maybe_dies()
        await asyncio.sleep(seconds)

    def maybe_dies(self) -> None:
        """Any await may be the last one."""
        if not self.dead and self.world.chance("killed_here"):
            self.kill()
            self.world.bereaved(self)

    def kill(self) -> None:
        """SIGKILL: no ``finally`` runs; what it sent is on its way, its connections are noticed to be gone later."""
        self.dead = True
        self.world.loop.freeze(self)
        self.world.broker.abandoned(self)
        self.world.database.abandoned(self)
        self.world.trace("killed", self.name)


class World:
    """Everything that one seed decides."""

    bereaved: Callable[[Process], None] = staticmethod(lambda process: None)
    """Told of a process that died by itself: somebody starts another one."""

    def __init__(self, seed: int, rates: Mapping[str, float], tracing: bool = False, copies: bool = False, anonymous: bool = False) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.loop = VirtualLoop()
        self.rates = dict(rates)
        self.injected: Counter[str] = Counter()
        self.lines: list[str] = []
        self.tracing = tracing
        self.copies = copies
        """Whether Redis has a replica and an append-only file that calls may wait for."""
        self.anonymous = anonymous
        """Whether Redis' user may not ask who the server is: then only sequences and nonces tell that it went back."""
        self.forgets = 0.0
        """Seconds after which Redis forgets what was done; 0: not in this life."""
        self.over = False
        self.scripts: list[ScriptCall] | None = None
        """Every script call, where somebody wants to compare."""
        self.neutral = Context()
        self.network = Network(self)
        self.auditor = Auditor(self)
        self.broker = Broker(self)
        self.database = Database(self)
        self._runs = 0
        self.redis = self._server(runtime().out[b"new"]())
        self.old: list[Server] = []

    def chance(self, kind: str) -> bool:
        """Whether this fault happens now; counted."""
        rate = self.rates.get(kind, 0.0)
        if rate and self.random.random() < rate:
            self.count(kind)
            return True
        return False

    def count(self, kind: str) -> None:
        self.injected[kind] += 1
        self.trace("fault", kind)

    def later(self, seconds: float, act: Callable[[], Any]) -> None:
        """Something that happens whoever lives or dies."""
        self.loop.call_later(seconds, act, context=self.neutral)

    def trace(self, what: str, *facts: Any) -> None:
        if self.tracing:
            self.lines.append(f"{self.loop.time() - BEGIN:10.4f}  {what:<12} " + "  ".join(map(str, facts)))

    # Redis' misfortunes ---------------------------------------------------------------------------------------------------------

    def _server(self, state: Any, skew_ms: int = 0) -> Server:
        self._runs += 1
        return Server(self, f"run{self._runs:04d}", state, skew_ms)

    def crash_redis(self, forget: int | None, seconds: float) -> None:
        """The server dies and comes back with all, with the last ``forget`` writes missing, or (None) with nothing."""
        old = self.redis
        old.up = False
        for connection in list(old.connections):
            connection.cut()
        count = old.length()
        kept = 0 if forget is None else max(0, count - forget, old.synced if self.copies else 0)
        new = self._server(runtime().out[b"replay"](old.state, kept))
        new.up = False
        self.redis = new
        self.auditor.branched(old, new, "emptied" if forget is None else "rolled_back")
        self.trace("redis", f"crashed, {kept} of {count} writes survive, back in {seconds:.2f} s as {new.name}")
        self.later(seconds, lambda: setattr(new, "up", True))

    def flush_redis(self) -> None:
        """Somebody empties the running server."""
        self.redis.flush()
        self.auditor.branched(self.redis, self.redis, "emptied")
        self.trace("redis", "flushed")

    def fail_over(self, behind: int, stuck: float) -> None:
        """A replica that is ``behind`` writes takes over; the old primary goes on serving whoever is connected for ``stuck`` s."""
        old = self.redis
        count = old.length()
        kept = max(0, count - behind, old.copied if self.copies else 0)
        old.alone = True
        new = self._server(runtime().out[b"replay"](old.state, kept), self.random.randint(-50, 50))
        self.redis = new
        self.old.append(old)
        self.auditor.branched(old, new, "failed_over")
        self.trace("redis", f"failed over to {new.name} with {kept} of {count} writes; old one stuck for {stuck:.2f} s")

        def demote() -> None:
            old.demoted = True
            self.later(self.random.uniform(0.0, 0.5), end)

        def end() -> None:
            old.up = False
            for connection in list(old.connections):
                connection.cut()

        self.later(stuck, demote)
