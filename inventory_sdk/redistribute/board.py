"""What all processes know together, in Redis: which keys were asked for, which are being calculated and by whose lease, what was done.

One function's keys share a slot (its name is their hash tag). Versions and fences only ever go up, so a state that was cleaned away
and made anew is never mistaken for an older one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import NoScriptError

from inventory_sdk.redistribute.covers import Seen

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

NOTHING: Final = -2
OUTCOME_KEPT: Final = 60.0
"""Seconds that a key without requests is remembered, with its last outcome."""
SEPARATOR: Final = "\x1f"


@dataclass(frozen=True, slots=True)
class Request:
    """``calls``: by trigger. ``opener``: the first of them. ``wanted``: somebody waits for the outcome. ``age``: seconds since the
    last call. ``covered``: the version of a request that covers all of them; 0: none. Once that was answered they are only counted."""

    key: str
    arguments: str
    wanted: bool
    calls: Mapping[str, int]
    opener: str
    age: float = 0.0
    covered: int = 0


@dataclass(frozen=True, slots=True)
class Claim:
    """A key in our hands, until its lease ends. ``version``: the newest request that this run answers. ``waited``: seconds."""

    key: str
    version: int
    fence: int
    arguments: str
    calls: Mapping[str, int]
    opener: str
    wanted: bool
    taken_over: bool
    waited: float


@dataclass(frozen=True, slots=True)
class Standing:
    """A request on the board. ``due``: seconds until its key is; None: once the run that is on has ended. ``fixed``: no call puts that
    off any more. ``waits`` is False for one that was only counted."""

    version: int
    due: float | None
    fixed: bool
    waits: bool


@dataclass(frozen=True, slots=True)
class Answered:
    """``known`` is False for a key without a state. ``outcome`` is that of version ``outcome_of``; 0: there is none."""

    known: bool
    done: int
    outcome_of: int
    outcome: str


@dataclass(frozen=True, slots=True)
class Counts:
    """What one trigger did: runs it caused (it was the first that waited), CPU microseconds charged by its part of the calls."""

    calls: int = 0
    runs: int = 0
    cpu_us: int = 0


class Board:
    """One function's board. Times are in seconds. Redis' errors come through."""

    def __init__(self, client: Redis | RedisCluster, namespace: str, function: str) -> None:
        self._client: Any = client
        begins = f"{namespace}:redistribute:{{{function}}}"
        self._due = f"{begins}:due"
        self._counts = f"{begins}:counts"
        self._claims = f"{begins}:claims"
        self._state = f"{begins}:key:"

    async def request(self, requests: Sequence[Request], debounce: float, max_wait: float, fence: int = 0) -> tuple[list[Standing], Seen]:
        """How each of them stands, and what was claimed after ``fence``."""
        total: Counter[str] = Counter()
        of_keys: list[str | int] = []
        for each in requests:
            total.update(each.calls)
            calls = "".join([f"{trigger}{SEPARATOR}{count}\x1e" for trigger, count in each.calls.items()])
            kind = "1" if each.wanted else f"-{each.covered}" if each.covered else "0"
            of_keys += (each.key, each.arguments, kind, calls, each.opener, _ms(each.age))
        of_triggers = [word for pair in total.items() for word in pair]
        keys = [self._due, self._counts, self._claims, *(self._state + each.key for each in requests)]
        reply, claims = await self._run("request", keys, [_ms(debounce), _ms(max_wait), fence, len(total), *of_triggers, *of_keys])
        newest, first, *dues = reply.split()
        standings = [_standing(version, due) for version, due in enumerate(dues, int(first))]
        return standings, _seen(standings[-1].version, int(newest), claims)

    async def look(self, fence: int) -> Seen:
        """What was claimed after ``fence``."""
        newest, version, claims = await self._run("look", [self._counts, self._claims], [fence])
        return _seen(version, newest, claims)

    async def peek(self, most: int) -> tuple[list[str], float | None]:
        """Keys that are due, and seconds until another one is."""
        due, later = await self._run("peek", [self._due], [most])
        return [key.decode() for key in due], None if later < 0 else later / 1000

    async def overdue(self) -> tuple[int, float]:
        """Keys that are due and that nobody calculates, and seconds since the first of them is."""
        keys, since = await self._run("overdue", [self._due], [])
        return keys, since / 1000

    async def claim(self, keys: Sequence[str], lease: float) -> list[Claim]:
        """Those of ``keys`` that are ours now."""
        states = [self._state + key for key in keys]
        replies = await self._run("claim", [self._due, self._counts, self._claims, *states], [_ms(lease), *keys])
        claims = []
        for key, reply in zip(keys, replies, strict=True):
            if reply:
                version, fence, arguments, calls, opener, wanted, taken_over, waited = reply
                claims.append(
                    Claim(
                        key=key,
                        version=version,
                        fence=fence,
                        arguments=arguments.decode(),
                        calls=_added_up(calls.decode()),
                        opener=opener.decode(),
                        wanted=wanted == b"1",
                        taken_over=taken_over == b"1",
                        waited=waited / 1000,
                    )
                )
        return claims

    async def renew(self, claims: Sequence[Claim], lease: float) -> list[bool]:
        """Which of them are still ours, and for another lease."""
        pairs = [word for each in claims for word in (each.key, each.fence)]
        keys = [self._due, *(self._state + each.key for each in claims)]
        return [bool(kept) for kept in await self._run("renew", keys, [_ms(lease), *pairs])]

    async def finish(
        self, claim: Claim, outcome: str, debounce: float, max_wait: float, rest: float, cpu_us: Mapping[str, int]
    ) -> tuple[bool, float | None]:
        """Whether it was still ours, and seconds until the key is due again."""
        charges = [word for pair in cpu_us.items() for word in pair]
        times = [_ms(debounce), _ms(max_wait), _ms(rest), _ms(OUTCOME_KEPT)]
        reply = await self._end(claim, ["1", outcome, *times, *charges])
        return reply != -2, reply / 1000 if reply >= 0 else None

    async def give_back(self, claim: Claim) -> None:
        """Somebody else shall run it, at once."""
        await self._end(claim, ["0", "", 0, 0, 0, 0])

    async def answered(self, keys: Sequence[str]) -> list[Answered]:
        """How things stand with these keys."""
        pipe = self._client.pipeline(transaction=False)
        for key in keys:
            pipe.hmget(self._state + key, "asked", "done", "outcome_of", "outcome")
        return [
            Answered(asked is not None, int(done or 0), int(of or 0), (outcome or b"").decode())
            for asked, done, of, outcome in await pipe.execute()
        ]

    async def counted(self) -> dict[str, Counts]:
        """By trigger, over all processes."""
        found: dict[str, dict[str, int]] = {}
        for field, value in (await self._client.hgetall(self._counts)).items():
            what, separator, trigger = field.decode().partition(SEPARATOR)
            if separator:
                found.setdefault(trigger, {})["cpu_us" if what == "cpu" else what] = int(value)
        return {trigger: Counts(**counts) for trigger, counts in found.items()}

    async def _end(self, claim: Claim, more: Sequence[str | int]) -> int:
        keys = [self._due, self._counts, self._state + claim.key]
        reply: int = await self._run("finish", keys, [claim.key, claim.fence, *more])
        return reply

    async def _run(self, name: str, keys: Sequence[str], arguments: Sequence[str | int]) -> Any:
        text, digest = _script(name)
        try:
            return await self._client.evalsha(digest, len(keys), *keys, *arguments)
        except NoScriptError:
            return await self._client.eval(text, len(keys), *keys, *arguments)


@cache
def _script(name: str) -> tuple[str, str]:
    text = resources.files("inventory_sdk.redistribute").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")
    return text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def _added_up(calls: str) -> dict[str, int]:
    """Calls by trigger, from what ``request.lua`` keeps of them."""
    sums: dict[str, int] = {}
    for each in calls.replace("\x1d", "").split("\x1e")[:-1]:
        trigger, _, count = each.rpartition(SEPARATOR)
        sums[trigger] = sums.get(trigger, 0) + int(count)
    return sums


def _standing(version: int, due: bytes) -> Standing:
    ms = int(due.rstrip(b"!"))
    return Standing(version, None if ms < 0 else ms / 1000, due.endswith(b"!"), ms != NOTHING)


def _seen(version: int, fence: int, claims: Sequence[bytes]) -> Seen:
    found = [claim.decode().partition(" ") for claim in claims]
    in_order = all(int(of) == fence - back for back, (of, _, _) in enumerate(found))
    return Seen(version, fence, [key for _, _, key in found] if in_order else ())


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
