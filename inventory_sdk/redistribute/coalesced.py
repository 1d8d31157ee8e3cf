"""``@inventory.coalesce(…)``: calls become requests, and one run answers all that were made before it began."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol

from pydantic import PydanticUserError, TypeAdapter

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import check_text
from inventory_sdk.redistribute.policy import check_seconds, check_share
from inventory_sdk.selectors import Pick, Selector, compile_text
from inventory_sdk.stock.later import Codec
from inventory_sdk.weave import Call, Order, Proceed, Site

MAX_SECONDS: Final = 86_400.0
DIRECT: Final = "(direct)"
"""The trigger that a plain call of the function counts as."""


@dataclass(frozen=True, slots=True)
class Recalculation:
    """The run that a function is in; a parameter ``run: Recalculation = injected()`` gets it.

    ``fence`` goes up with every run of the function, in all processes: a write that says ``WHERE fence < :fence`` can't be overtaken
    by a runner that lost its lease and does not know it yet. ``version``: the newest request that the run answers.
    """

    key: str
    version: int
    fence: int


class Within:
    """The run that a task is part of; ``live`` while it goes on."""

    __slots__ = ("function", "key", "live")

    def __init__(self, function: str, key: str) -> None:
        self.function = function
        self.key = key
        self.live = True


within: Final[ContextVar[Within | None]] = ContextVar("inventory_recalculation", default=None)


@dataclass(frozen=True, slots=True)
class Options:
    """The keywords of ``coalesce``; see there."""

    key: Selector
    debounce: float
    max_wait: float
    executor: str
    timeout: float
    cpu_budget: float | None
    key_cpu_budget: float | None
    name: str | None

    def __post_init__(self) -> None:
        check_seconds("debounce", self.debounce, 0.0, MAX_SECONDS)
        check_seconds("max_wait", self.max_wait, 0.0, MAX_SECONDS)
        check_seconds("timeout", self.timeout, 0.001, MAX_SECONDS)
        if self.max_wait < self.debounce:
            raise InvalidOperation(
                "max_wait", self.max_wait, f"must be at least debounce={self.debounce:g}: the first request waits so long"
            )
        if self.executor not in ("loop", "process"):
            raise InvalidOperation("executor", self.executor, "must be 'loop' or 'process'")
        check_share("cpu_budget", self.cpu_budget)
        check_share("key_cpu_budget", self.key_cpu_budget)


class Asking(Protocol):
    """Where the aspects bring their requests."""

    async def call(self, function: Coalesced, key: str, arguments: str) -> Any:
        """Ask for a run and answer its result."""
        ...


@dataclass
class Coalesced:
    """A coalesced function: what is known of it, and how one run of it is made. Woven anew, it is bound anew."""

    name: str
    options: Options
    site: Site
    proceed: Proceed
    key: Pick
    codec: Codec
    result: TypeAdapter[Any]

    def run(self, arguments: str, run: Recalculation, function: Any = None) -> Awaitable[Any]:
        """The function's chain below this aspect; ``function``: what stands in for the function itself."""
        call = Call(self.site, function or self.site.function, None, (), self.codec.decode(json.loads(arguments)))
        call.give(Recalculation, run)
        return self.proceed(call)

    def outcome(self, result: Any) -> Any:
        """The result as JSON can hold it; raises where it can't."""
        return json.loads(self.result.dump_json(self.result.validate_python(result)))

    def arguments(self, given: Mapping[str, Any]) -> str:
        """Arguments by name, for ``run``; ``InvalidOperation`` names the one that does not fit."""
        return json.dumps(self.codec.encode(Call(self.site, self.site.function, None, (), given)))


class CoalesceAspect:
    """See above. Outermost: a lane or another aspect of the function belongs to the run, not to those who wait for it."""

    order = Order.COALESCE

    def __init__(self, room: Asking, options: Options) -> None:
        self._room = room
        self._options = options
        self.function: Coalesced | None = None

    def compile(self, site: Site, proceed: Proceed) -> Proceed:
        function = self._bind(site, proceed)
        room, key_of, codec = self._room, function.key, function.codec

        async def run(call: Call) -> Any:
            key = check_text("key", key_of(call.values()))
            around = within.get()
            if around is not None and around.live and (around.function, around.key) == (function.name, key):
                raise InvalidOperation("key", key, f"a run of {function.name} would wait for itself")
            return await room.call(function, key, json.dumps(codec.encode(call)))

        return run

    def _bind(self, site: Site, proceed: Proceed) -> Coalesced:
        options, label = self._options, site.label
        if site.receiver is not None:
            raise TypeError(f"{label} has a {site.receiver!r}: a run may be in another process, so coalesce a function or staticmethod")
        if options.executor == "process" and "<locals>" in label:
            raise TypeError(f"{label}: executor='process' imports the function by its name, so it must not be inside another function")
        for name, parameter in site.signature.parameters.items():
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
                raise TypeError(f"{label}: {name!r} must not be positional-only, a run passes arguments by name")
        key = compile_text(site, "key", options.key, required=True)
        if self.function is None:
            name = check_text("name", options.name if options.name is not None else label)
            if set(name) & set("{}"):
                raise InvalidOperation("name", name, "must not contain braces: they belong to the Redis keys")
            self.function = Coalesced(name, options, site, proceed, key, Codec(site), _result(site))
        else:
            self.function.site, self.function.proceed = site, proceed
        return self.function


def _result(site: Site) -> TypeAdapter[Any]:
    annotation = site.resolve("return", site.signature.return_annotation)
    if annotation is inspect.Signature.empty or annotation is Any:
        raise TypeError(f"{site.label} needs a return annotation: whoever waits for a run may be in another process")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        adapter.json_schema(mode="serialization")
    except PydanticUserError as error:
        raise TypeError(f"{site.label} returns {annotation!r}, which can't be kept as JSON: {str(error).splitlines()[0]}") from error
    return adapter


def given_by_name(function: Coalesced) -> list[str]:
    """The parameters without a default that a run must be given."""
    return [name for name, parameter in function.site.signature.parameters.items() if parameter.default is parameter.empty]


def keyed_by_all(function: Coalesced) -> bool:
    """Its key says all that a run is given: calls with the same key can't differ."""
    names = [name for name in function.site.signature.parameters if name not in function.site.injected]
    return len(names) == 1 and function.options.key in (names[0], f"{{{names[0]}}}")


class Here:
    """This process. ``calculates``: it is a child that only calculates, and runs nothing that it finds on the board."""

    calculates = False


here: Final = Here()
