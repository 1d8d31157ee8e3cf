"""Links' rules in Redis: one versioned document each, replaced by compare-and-set, with a history and a push; and what is counted
there for the guard. All keys of a namespace share one slot.

    {namespace:gray}:rules            hash: link → document
    {namespace:gray}:history:<link>   list, newest first
    {namespace:gray}:noted            hash: what the guard has said of which version
    {namespace:gray}:exposed:<link>   sorted set of merchants (``keep_exposed``)
    {namespace:gray}:window:<link>:<interval>:<number>   hash of counts
    {namespace:gray}:changed          channel: new documents
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import RedisError

from inventory_sdk.errors import InventoryError
from inventory_sdk.gray.rules import MAX_VERSION, Rules, difference, read

if TYPE_CHECKING:
    from redis.asyncio import Redis, RedisCluster

HISTORY: Final = 1_000
"""Changes of a link that are kept."""
WINDOWS_KEPT: Final = 4
AWAY: Final = (RedisError, OSError)


class RulesUnavailable(InventoryError):
    """Redis does not answer: nothing was changed, or it is not known whether it was; look at ``show`` before you repeat it. Calls go on
    with the last rules they know."""


class RulesChanged(InventoryError):
    """Somebody else has changed the rules in between; ``rules`` are those that are there."""

    def __init__(self, link: str, expected: int, rules: Rules) -> None:
        super().__init__(f"link {link!r} is at version {rules.version}, not {expected}: look at it and decide again")
        self.link = link
        self.rules = rules


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of a link's history. ``changes``: field → [before, after]; empty for what the guard found and left as it was."""

    version: int
    at_ms: int
    who: str
    why: str
    changes: Mapping[str, Sequence[Any]]


@cache
def _script(name: str) -> str:
    return resources.files("inventory_sdk.gray").joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")


class RuleStore:
    """The rules of one namespace, over a client that answers bytes."""

    def __init__(self, client: Redis | RedisCluster, namespace: str) -> None:
        self._client: Any = client
        self._prefix = f"{{{namespace}:gray}}:"
        self.channel = f"{self._prefix}changed"

    def _key(self, *names: object) -> str:
        return self._prefix + ":".join(map(str, names))

    async def load(self) -> dict[str, bytes]:
        """Every link's document, unread."""
        try:
            found: dict[bytes, bytes] = await self._client.hgetall(self._key("rules"))
        except AWAY as error:
            raise _away(error) from error
        return {name.decode(errors="replace"): document for name, document in found.items()}

    async def get(self, link: str) -> Rules:
        """The rules as they stand in Redis; version 0 where nobody has set any."""
        try:
            document = await self._client.hget(self._key("rules"), link)
        except AWAY as error:
            raise _away(error) from error
        return Rules(link) if document is None else read(document)

    async def put(self, seen: Rules, wanted: Rules, who: str, why: str, above: int = 0) -> Rules:
        """Replace ``seen`` by ``wanted``, with a version above both and above ``above``; ``RulesChanged`` if it is not there any more."""
        made = replace(wanted, version=min(max(seen.version, above) + 1, MAX_VERSION))
        return await self._put(seen.version, made, {"who": who, "why": why, "changes": difference(seen, made)})

    async def bring_back(self, there: int, known: Rules) -> None:
        """Redis has forgotten these rules, or has older ones (``there``): it gets what we know."""
        why = f"Redis had version {there}: it lost what came after"
        await self._put(there, known, {"who": "inventory_sdk", "why": why, "changes": {}})

    async def _put(self, seen: int, rules: Rules, entry: Mapping[str, Any]) -> Rules:
        keys = [self._key("rules"), self._key("history", rules.link)]
        said = _json({"version": rules.version, **entry})
        reply = await self._run("set", keys, rules.link, seen, rules.text(), said, HISTORY, self.channel)
        if reply[0] == 1:
            return rules
        raise RulesChanged(rules.link, seen, read(reply[1]) if reply[1] else Rules(rules.link))

    async def note(self, rules: Rules, name: str, who: str, why: str) -> None:
        """Say in the history what was found at this version, once, without changing it."""
        entry = _json({"version": rules.version, "who": who, "why": why, "changes": {}})
        keys = [self._key("history", rules.link), self._key("noted")]
        await self._run("note", keys, f"{rules.link}/{name}", rules.version, entry, HISTORY)

    async def history(self, link: str, limit: int) -> list[Change]:
        """Newest first."""
        try:
            found = await self._client.lrange(self._key("history", link), 0, limit - 1)
        except AWAY as error:
            raise _away(error) from error
        return [Change(raw["version"], raw["at_ms"], raw["who"], raw["why"], raw["changes"] or {}) for raw in map(json.loads, found)]

    async def expose(self, link: str, merchants: Iterable[str]) -> None:
        """Remember these; a repeat changes nothing."""
        await self._run("expose", [self._key("exposed", link)], *merchants)

    async def exposed(self, link: str, known: int) -> list[str]:
        """All but the first ``known`` that were exposed."""
        try:
            found = await self._client.zrange(self._key("exposed", link), known, -1)
        except AWAY as error:
            raise _away(error) from error
        return [merchant.decode() for merchant in found]

    async def now(self) -> float:
        """Redis' time, in seconds: the one clock that all processes share."""
        try:
            seconds, microseconds = await self._client.time()
        except AWAY as error:
            raise _away(error) from error
        return float(seconds) + float(microseconds) / 1e6

    async def count(self, link: str, interval: float, number: int, counts: Mapping[str, int]) -> None:
        """Add counts to a window of the guard."""
        key = self._key("window", link, f"{interval:g}", number)
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for name, value in counts.items():
                    pipe.hincrby(key, name, value)
                pipe.expire(key, int(interval * WINDOWS_KEPT) + 60)
                await pipe.execute()
        except AWAY as error:
            raise _away(error) from error

    async def counted(self, link: str, interval: float, number: int) -> dict[str, int]:
        """What all processes have counted in a window."""
        try:
            found = await self._client.hgetall(self._key("window", link, f"{interval:g}", number))
        except AWAY as error:
            raise _away(error) from error
        return {name.decode(): int(value) for name, value in found.items()}

    async def _run(self, name: str, keys: Sequence[str], *arguments: object) -> Any:
        try:
            return await self._client.eval(_script(name), len(keys), *keys, *arguments)
        except AWAY as error:
            raise _away(error) from error


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _away(error: BaseException) -> RulesUnavailable:
    return RulesUnavailable(f"Redis does not answer for the gray links' rules: {error!r}")
