"""Functions of ``run="later"``: their names, the codecs of their arguments, and how the worker calls them.

The caller's process encodes the arguments into a task row that travels with the movement; the worker's process decodes them,
maybe days and several releases later. So both sides go by a stable name and a version, types are checked at decoration, and a
change of the parameters needs a higher version with ``upgrade`` functions from the older ones.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from inventory_sdk.errors import InvalidOperation, InventoryError
from inventory_sdk.model import Receipt, check_text
from inventory_sdk.weave import INJECTED, Call, Site, owner_of

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

Arguments = dict[str, Any]
"""Encoded arguments by name: plain JSON values."""
Upgrade = Callable[[Arguments], Arguments]
"""From the encoded arguments of one version to those of the next."""
Runner = Callable[[Any, Receipt, Sequence[Any], Mapping[str, Any]], Awaitable[None]]
"""Calls a registered function: it, the receipt of its operation, positional arguments (``self`` first), the others."""


class TaskUnreadable(InventoryError):
    """A task row that this process can't run: unknown name or version, or arguments that don't fit the function."""


class StoredTask(Protocol):
    """What ``Registry.run`` needs of a task row."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...
    @property
    def arguments(self) -> str: ...


class Codec:
    """Arguments of one function to JSON and back, by its annotations. Made at decoration, where it refuses what can't travel."""

    def __init__(self, site: Site) -> None:
        self._label = site.label
        self._fields: list[tuple[int, str, TypeAdapter[Any], Any]] = []
        self._required: set[str] = set()
        self._injected = [(site.names.index(name), name) for name in site.injected]
        for index, (name, parameter) in enumerate(site.signature.parameters.items()):
            if name in site.injected or (index == 0 and site.receiver is not None):
                continue
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(f"{site.label}: {parameter} can't be kept for later; name each parameter")
            self._fields.append((index, name, _adapter(site, name), site.annotation(name)))
            if parameter.default is parameter.empty:
                self._required.add(name)

    def encode(self, call: Call) -> Arguments:
        """The call's arguments; ``InvalidOperation`` names the one that its annotation does not allow."""
        values = call.values()
        for index, name in self._injected:
            if values[index] is not INJECTED:
                raise TypeError(f"{self._label}: {name!r} is given by the worker and can't be passed")
        encoded: Arguments = {}
        for index, name, adapter, annotation in self._fields:
            value = values[index]
            if annotation is str and type(value) is str and value.isascii():
                encoded[name] = value  # as it would come back
                continue
            try:
                # Read back here what the worker will read: a value that can't be is the caller's error, not a dead letter.
                text = adapter.dump_json(adapter.validate_python(value))
                adapter.validate_json(text)
                encoded[name] = json.loads(text)
            except (ValidationError, PydanticSerializationError, ValueError) as error:
                raise InvalidOperation(name, value, f"can't be kept for {self._label}: {_brief(error)}") from error
        return encoded

    def decode(self, arguments: Mapping[str, Any]) -> Arguments:
        """The arguments as the function takes them; ``TaskUnreadable`` says which don't fit."""
        known = {name for _, name, *_ in self._fields}
        unknown = sorted(set(arguments) - known)
        missing = sorted(self._required - set(arguments))
        if unknown or missing:
            said = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
            raise TaskUnreadable(f"{self._label}: stored arguments don't fit ({said}); give a new version= with upgrade=")
        decoded: Arguments = {}
        for _, name, adapter, _ in self._fields:
            if name in arguments:
                try:
                    decoded[name] = adapter.validate_json(json.dumps(arguments[name]))
                except ValidationError as error:
                    raise TaskUnreadable(f"{self._label}: the stored {name!r} doesn't fit: {_brief(error)}") from error
        return decoded


@dataclass(frozen=True, slots=True)
class Entry:
    """One registered function."""

    name: str
    version: int
    site: Site
    codec: Codec
    upgrades: Mapping[int, Upgrade] = field(default_factory=dict)


def make_entry(site: Site, name: object, version: object, upgrade: Mapping[int, Upgrade] | None) -> Entry:
    """Check a ``run="later"`` function and build its codec; ``TypeError`` says what it must change."""
    label = site.label
    if not isinstance(name, str):
        raise TypeError(f"{label}: run='later' needs name=, a stable name that outlives renaming the function")
    check_text("name", name)
    if type(version) is not int or version < 1:
        raise TypeError(f"{label}: version={version!r} must be a whole number from 1")
    steps = dict(upgrade or {})
    for step, function in steps.items():
        if type(step) is not int or not 1 <= step < version or not callable(function):
            raise TypeError(f"{label}: upgrade={{{step!r}: …}}: a key is a version older than {version}, a value a function")
    returns = site.resolve("return", site.signature.return_annotation)
    if returns not in (None, type(None), inspect.Signature.empty):
        raise TypeError(f"{label}: a run='later' function returns None, its caller has gone on; it is annotated with {returns!r}")
    for parameter, kind in site.injected.items():
        if kind is not Receipt and _session_kind(kind) is None:
            raise TypeError(f"{label}: the worker can inject a Receipt, AsyncSession or Session; {parameter!r} is {kind!r}")
    return Entry(name, version, site, Codec(site), steps)


class Registry:
    """All ``run="later"`` functions of one Inventory, and how their ``self`` is made."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._providers: dict[type, Callable[[Any], Any]] = {}
        self.runner: Runner = _run_itself
        """What calls a function, or another one in its place (gray links)."""

    def add(self, entry: Entry) -> None:
        """Register; ``TypeError`` if another function has the name."""
        known = self._entries.get(entry.name)
        if known is not None and known.site.function is not entry.site.function:
            raise TypeError(f"name={entry.name!r} of {entry.site.label} is taken by {known.site.label}")
        self._entries[entry.name] = entry

    def provide(self, kind: type, make: Callable[[Any], Any]) -> None:
        """``make(session)`` gives instances of ``kind``; ``TypeError`` for a second one."""
        if not isinstance(kind, type):
            raise TypeError(f"provides({kind!r}): name the class whose instances the function makes")
        if kind in self._providers:
            raise TypeError(f"provides({kind.__qualname__}) is there already: {self._providers[kind]!r}")
        self._providers[kind] = make

    def __len__(self) -> int:
        return len(self._entries)

    def check(self) -> None:
        """``TypeError`` unless every method has a provider of its ``self``. For the start of a worker."""
        for entry in self._entries.values():
            if entry.site.receiver is not None:
                self._maker(entry)

    async def run(self, task: StoredTask, session: AsyncSession, receipt: Receipt) -> None:
        """Call the task's function once, in ``session``'s transaction.

        Raises what the function raises, and ``TaskUnreadable``."""
        entry = self._entries.get(task.name)
        if entry is None:
            raise TaskUnreadable(f"no function is registered as {task.name!r}; is the module that has it imported here?")
        arguments = entry.codec.decode(_upgraded(entry, task))
        for name, kind in entry.site.injected.items():
            which = _session_kind(kind)
            arguments[name] = receipt if which is None else session if which == "async" else session.sync_session
        async with AsyncExitStack() as stack:
            function = entry.site.function
            positional: list[Any] = []
            if entry.site.receiver is not None:
                owner, make = self._maker(entry)
                positional.append(owner if make is None else await _provided(stack, owner, make, session))
            for name, parameter in entry.site.signature.parameters.items():
                if parameter.kind is parameter.POSITIONAL_ONLY and name in arguments:
                    positional.append(arguments.pop(name))
            await self.runner(function, receipt, positional, arguments)

    def _maker(self, entry: Entry) -> tuple[type, Callable[[Any], Any] | None]:
        """The class to call on, and what makes an instance of it (None: a classmethod needs none)."""
        site = entry.site
        owner = owner_of(site)
        if owner is None:
            raise TypeError(f"{site.label}: the class of this method can't be found; define it at module level")
        if site.receiver == "cls":
            return owner, None
        if owner in self._providers:
            return owner, self._providers[owner]
        below = [kind for kind in self._providers if issubclass(kind, owner)]
        if len(below) == 1:
            return below[0], self._providers[below[0]]
        found = f"; several subclasses have one: {', '.join(kind.__qualname__ for kind in below)}" if below else ""
        raise TypeError(f"{site.label} runs later and needs a {owner.__qualname__}: add @inventory.provides({owner.__qualname__}){found}")


async def _run_itself(function: Any, receipt: Receipt, positional: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    await function(*positional, **arguments)


async def _provided(stack: AsyncExitStack, owner: type, make: Callable[[Any], Any], session: Any) -> Any:
    if inspect.isasyncgenfunction(make):
        return await stack.enter_async_context(asynccontextmanager(make)(session))
    if inspect.isgeneratorfunction(make):
        return stack.enter_context(contextmanager(make)(session))
    made = make(session)
    if inspect.isawaitable(made):
        made = await made
    if isinstance(made, owner):
        return made
    if hasattr(made, "__aenter__"):
        return await stack.enter_async_context(made)
    if hasattr(made, "__enter__"):
        return stack.enter_context(made)
    raise TypeError(f"provides({owner.__qualname__}): {make!r} gave {type(made).__qualname__}")


def _upgraded(entry: Entry, task: StoredTask) -> Arguments:
    if task.version > entry.version:
        raise TaskUnreadable(
            f"{task.name!r} was stored as version {task.version}, this process knows {entry.version}: run the newer release"
        )
    try:
        arguments: Arguments = json.loads(task.arguments)
    except ValueError as error:
        raise TaskUnreadable(f"the arguments of {task.name!r} are not JSON: {error}") from error
    for version in range(task.version, entry.version):
        step = entry.upgrades.get(version)
        if step is None:
            raise TaskUnreadable(f"{task.name!r} was stored as version {task.version}; upgrade= has no function for {version}")
        arguments = step(arguments)
    return arguments


def _adapter(site: Site, name: str) -> TypeAdapter[Any]:
    annotation = site.annotation(name)
    if annotation is inspect.Parameter.empty or annotation is Any:
        raise TypeError(f"{site.label}: {name!r} needs an annotation: run='later' keeps arguments by their types")
    if _session_kind(annotation) is not None:
        raise TypeError(f"{site.label}: {name!r} is a session, not kept for later; with '= injected()' the worker gives one")
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        # What has no JSON form is known here and not when the first call comes.
        adapter.json_schema(mode="serialization")
    except PydanticUserError as error:
        raise TypeError(f"{site.label}: {name!r} is {annotation!r}, which can't be kept as JSON: {_brief(error)}") from error
    return adapter


def _session_kind(annotation: Any) -> str | None:
    """``async`` or ``sync`` for SQLAlchemy's sessions; told by name, so that SQLAlchemy stays optional."""
    if typing.get_origin(annotation) is not None or not isinstance(annotation, type):
        return None
    for base in annotation.__mro__:
        if base.__module__ == "sqlalchemy.ext.asyncio.session" and base.__name__ == "AsyncSession":
            return "async"
        if base.__module__ == "sqlalchemy.orm.session" and base.__name__ == "Session":
            return "sync"
    return None


def _brief(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'value'}: {each['msg']}" for each in error.errors()[:3])
    return str(error).partition("\n")[0]
