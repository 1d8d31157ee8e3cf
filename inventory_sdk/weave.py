"""One wrapper per function, however many aspects are stacked on it.

A decorator gives ``weave`` a function and an aspect. What comes back is a ``Woven``: the function behind a chain that was
compiled from all of its aspects, in the fixed order of ``Order`` and not in the order of stacking. A decorator on a woven
function weaves the same function anew with one aspect more; there is never a wrapper around a wrapper.

What a call needs to know about its arguments is compiled here too. ``Call.values()`` binds them with a function that has the
signature of the woven one, so that Python itself applies defaults and refuses a wrong call, at a twentieth of the price of
``Signature.bind`` and before an aspect has done anything.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import Any, Final, Protocol

import wrapt

from inventory_sdk import tracing

Proceed = Callable[["Call"], Awaitable[Any]]


class Order(IntEnum):
    """Where an aspect stands in the chain, outermost first. A function has at most one aspect of each.

    COALESCE is outside of LANE: many calls become one run, and the lane is the run's. TRIGGER is inside of it and outside of the
    rest: it asks for a recalculation once stock and function have succeeded, with the call's slot and time.
    """

    COALESCE = 1
    LANE = 2
    TRIGGER = 3
    GRAY = 4
    HOTSPOT = 5
    STOCK = 6
    VERIFY = 7


class Aspect(Protocol):
    """One concern of a call. ``compile`` runs at decoration, once per weaving, so it must not register anything."""

    @property
    def order(self) -> Order: ...

    def compile(self, site: Site, proceed: Proceed) -> Proceed:
        """What is called instead of ``proceed``. Raises ``TypeError`` where the aspect does not fit the function."""
        ...


class _Injected:
    __slots__ = ()

    def __repr__(self) -> str:
        return "injected()"


INJECTED: Final = _Injected()


def injected() -> Any:
    """Default of a parameter that an aspect fills, chosen by its annotation (``receipt: Receipt = injected()``).

    Such a parameter is not in the signature that ``inspect`` and web frameworks see. A caller may still pass it; then nothing
    is filled in.
    """
    return INJECTED


class Call:
    """One call on its way through the chain. ``args`` leaves out the receiver (``self``, ``cls``) where ``instance`` has it."""

    __slots__ = ("_values", "args", "function", "given", "instance", "kwargs", "site")

    def __init__(self, site: Site, function: Callable[..., Awaitable[Any]], instance: Any, args: Any, kwargs: Any) -> None:
        self.site = site
        self.function = function
        self.instance = instance
        self.args = args
        self.kwargs = kwargs
        self.given: dict[Any, Any] | None = None
        self._values: tuple[Any, ...] | None = None

    def values(self) -> tuple[Any, ...]:
        """Every parameter's value in the order of the signature, receiver included. ``TypeError`` as Python words it."""
        values = self._values
        if values is None:
            if self.instance is None:
                values = self.site.bind(*self.args, **self.kwargs)
            else:
                values = self.site.bind(self.instance, *self.args, **self.kwargs)
            self._values = values
        return values

    def give(self, kind: Any, value: Any) -> None:
        """Fill the injected parameters that are annotated with ``kind``."""
        if self.given is None:
            self.given = {kind: value}
        else:
            self.given[kind] = value


class Home:
    """The class that a method was found in; shared by all weavings of one function, because only the last one learns it."""

    __slots__ = ("owner",)

    def __init__(self) -> None:
        self.owner: type | None = None


class Site:
    """What is known of a woven function, and its chain.

    ``function`` is the plain function, ``label`` its stable name ``module:qualname``, ``names`` all parameters, ``receiver``
    the name of the first one if it is ``self`` or ``cls``, ``injected`` the injected ones with their annotations (an Optional
    one without its None, and its name in ``optional``).
    """

    def __init__(self, wrapped: Any, aspects: tuple[Aspect, ...], home: Home) -> None:
        function, kind = _underlying(wrapped)
        self.function: Any = function
        inner = function.func if isinstance(function, functools.partial) else function
        self.label: str = f"{getattr(inner, '__module__', '?')}:{getattr(inner, '__qualname__', type(inner).__qualname__)}"
        self.namespace: dict[str, Any] = getattr(inner, "__globals__", {})
        if not inspect.iscoroutinefunction(function):
            what = "an async generator" if inspect.isasyncgenfunction(function) else "not an async function"
            raise TypeError(f"{self.label} is {what}: only 'async def' functions can be woven")
        self.home = home
        self.signature = inspect.signature(function)
        parameters = list(self.signature.parameters.values())
        self.names: tuple[str, ...] = tuple(self.signature.parameters)
        self.receiver = _receiver(self.label, kind, parameters)
        self.injected: dict[str, Any] = {}
        self.optional: set[str] = set()
        for parameter in parameters:
            if parameter.default is INJECTED:
                self._note_injected(parameter)
        self.visible = self.signature.replace(parameters=[each for each in parameters if each.default is not INJECTED])
        self.bind = compile_binder(inner, self.signature)
        self.aspects: tuple[Aspect, ...] = tuple(sorted(aspects, key=lambda aspect: aspect.order))
        for outer, next_one in zip(self.aspects, self.aspects[1:], strict=False):
            if outer.order == next_one.order:
                raise TypeError(f"{self.label} has two {outer.order.name.lower()} aspects; a function can have one of each")
        chain = self._innermost()
        for aspect in reversed(self.aspects):
            chain = aspect.compile(self, chain)
        self.chain: Proceed = chain

    def find(self, order: Order) -> Aspect | None:
        """The function's aspect of this order, if it has one (hotspots take their keys from the stock aspect)."""
        return next((aspect for aspect in self.aspects if aspect.order == order), None)

    def annotation(self, name: str) -> Any:
        """The parameter's annotation, strings resolved; ``inspect.Parameter.empty`` without one."""
        return self.resolve(name, self.signature.parameters[name].annotation)

    def resolve(self, name: str, annotation: Any) -> Any:
        """``annotation`` with strings resolved in the function's module; ``TypeError`` names the parameter otherwise."""
        if not isinstance(annotation, str):
            return annotation
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            return typing.get_type_hints(holder, self.namespace, include_extras=True)[name]
        except Exception as error:  # An annotation is code: evaluating it can raise anything.
            message = f"{self.label}: the annotation {annotation!r} of {name!r} can't be resolved at run time: {error}"
            raise TypeError(message) from error

    def _note_injected(self, parameter: inspect.Parameter) -> None:
        name = parameter.name
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise TypeError(f"{self.label}: the injected parameter {name!r} must not be positional-only")
        annotation = self.annotation(name)
        if annotation is inspect.Parameter.empty:
            raise TypeError(f"{self.label}: the injected parameter {name!r} needs an annotation: it says what to inject")
        if typing.get_origin(annotation) in (typing.Union, types.UnionType):
            members = [member for member in typing.get_args(annotation) if member is not type(None)]
            if len(members) == 1:
                annotation = members[0]
                self.optional.add(name)
        self.injected[name] = annotation

    def _innermost(self) -> Proceed:
        wanted = [(self.names.index(name), name, kind) for name, kind in self.injected.items()]
        label = self.label

        def run(call: Call) -> Awaitable[Any]:
            return call.function(*call.args, **call.kwargs)

        def run_with_injected(call: Call) -> Awaitable[Any]:
            values = call.values()
            given = call.given or {}
            kwargs = dict(call.kwargs)
            for index, name, kind in wanted:
                if values[index] is INJECTED:
                    if kind not in given:
                        raise TypeError(f"{label}: nothing injects {name!r} ({kind!r}); no aspect of this function has one")
                    kwargs[name] = given[kind]
            return call.function(*call.args, **kwargs)

        return run_with_injected if wanted else run


class _VisibleSignature:
    """``__signature__`` of instances only: ``inspect.signature(Woven)`` must not find a descriptor."""

    def __get__(self, woven: Any, owner: type | None = None) -> inspect.Signature:
        if woven is None:
            raise AttributeError("__signature__")
        visible: inspect.Signature = woven._self_site.visible
        if isinstance(woven, _BoundWoven) and getattr(woven.__wrapped__, "__self__", None) is not None:
            return visible.replace(parameters=list(visible.parameters.values())[1:])
        return visible


class _BoundWoven(wrapt.BoundFunctionWrapper[..., Any]):
    __signature__ = _VisibleSignature()

    @property
    def __func__(self) -> Any:
        # inspect asks a method's __func__ for signature and kind: it has to see the woven function, which hides injected ones.
        return self._self_parent._self_plain()

    def __reduce__(self) -> Any:
        receiver = getattr(self.__wrapped__, "__self__", self._self_owner)
        return getattr, (receiver, self.__wrapped__.__name__)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Woven(wrapt.FunctionWrapper[..., Any]):
    """A function behind its chain. Looks like the function: name, doc, module, binding; pickled by its name like one."""

    __bound_function_wrapper__ = _BoundWoven
    __signature__ = _VisibleSignature()

    def __init__(self, wrapped: Any, aspects: tuple[Aspect, ...], home: Home) -> None:
        site = Site(wrapped, aspects, home)
        chain = site.chain

        def enter(function: Any, instance: Any, args: Any, kwargs: Any) -> Awaitable[Any]:
            if tracing.active is not None:
                return tracing.active.call(site.label, chain, Call(site, function, instance, args, kwargs))
            return chain(Call(site, function, instance, args, kwargs))

        receiver = getattr(wrapped, "__self__", None)

        def enter_unbound(*args: Any, **kwargs: Any) -> Awaitable[Any]:
            return enter(wrapped, receiver, args, kwargs)

        super().__init__(wrapped, enter)
        self._self_site = site
        self._self_enter = enter_unbound

        @functools.cache
        def plain() -> Any:
            return self if site.function is wrapped else Woven(site.function, site.aspects, site.home)

        self._self_plain = plain

    @property
    def __func__(self) -> Any:
        if not hasattr(self.__wrapped__, "__func__"):
            raise AttributeError("__func__")
        return self._self_plain()

    # wrapt's own looks for a __self__ that a function hasn't got, and so raises and catches an AttributeError per call.
    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._self_enter(*args, **kwargs)

    def __set_name__(self, owner: type, name: str) -> None:
        self._self_site.home.owner = owner

    def __reduce__(self) -> Any:
        return self.__wrapped__.__qualname__

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        return self


def weave(function: Any, aspect: Aspect) -> Any:
    """``function`` (plain, method, classmethod, staticmethod, woven already) with one aspect more.

    Raises ``TypeError`` for a function that is not ``async def``, and for whatever the aspect refuses.
    """
    kind = type(function)
    if kind in (classmethod, staticmethod) and type(function.__func__) is Woven:
        return kind(weave(function.__func__, aspect))
    site = site_of(function)
    if site is None:
        return Woven(function, (aspect,), Home())
    return Woven(function.__wrapped__, (*site.aspects, aspect), site.home)


def site_of(function: Any) -> Site | None:
    """The site of a woven function, bound or not; None for any other."""
    if type(function) in (classmethod, staticmethod):
        function = function.__func__
    if type(function) in (Woven, _BoundWoven):
        site: Site = function._self_site
        return site
    return None


def weave_in_place(path: str, *decorators: Callable[[Any], Any]) -> Callable[[], None]:
    """Decorate what stands at ``"module:name"`` or ``"module:Class.method"``; the first decorator ends up outermost.

    Returns a function that puts back what was there. Names that other modules imported before stay as they are, so weave
    before they do. Raises ``ImportError``, ``AttributeError`` where there is nothing at the path, ``TypeError`` for no path.
    """
    module_name, colon, trail = path.partition(":")
    if not (colon and module_name and trail):
        raise TypeError(f"{path!r} is not a path: write 'package.module:name' or 'package.module:Class.method'")
    if not decorators:
        raise TypeError(f"nothing to weave into {path!r}: name at least one decorator")
    owner: Any = importlib.import_module(module_name)
    *ways, name = trail.split(".")
    for way in ways:
        owner = getattr(owner, way)
    found = inspect.getattr_static(owner, name)
    inherited = name not in vars(owner)
    woven = found
    for decorator in reversed(decorators):
        woven = decorator(woven)
    setattr(owner, name, woven)
    site = site_of(woven)
    if site is not None and isinstance(owner, type) and site.home.owner is None:
        site.home.owner = owner

    def undo() -> None:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, found)

    return undo


def owner_of(site: Site) -> type | None:
    """The class whose method this is; None for a function, or while its class is still being made."""
    if site.home.owner is None:
        # A decorator below @classmethod or @staticmethod is never told its owner.
        module, _, qualname = site.label.partition(":")
        found: Any = sys.modules.get(module)
        for part in qualname.split(".")[:-1]:
            found = getattr(found, part, None)
        if isinstance(found, type):
            site.home.owner = found
    return site.home.owner


def compile_binder(function: Any, signature: inspect.Signature) -> Callable[..., tuple[Any, ...]]:
    """A function with this signature that answers all of its arguments as a tuple. Its errors name ``function``."""
    namespace: dict[str, Any] = {}
    parts: list[str] = []
    last: Any = None
    for index, parameter in enumerate(signature.parameters.values()):
        if last is inspect.Parameter.POSITIONAL_ONLY and parameter.kind is not last:
            parts.append("/")
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and last not in (parameter.kind, inspect.Parameter.VAR_POSITIONAL):
            parts.append("*")
        stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
        default = ""
        if parameter.default is not inspect.Parameter.empty:
            default = f"=__default_{index}__"
            namespace[f"__default_{index}__"] = parameter.default
        parts.append(f"{stars}{parameter.name}{default}")
        last = parameter.kind
    if last is inspect.Parameter.POSITIONAL_ONLY:
        parts.append("/")
    values = "".join(f"{name}, " for name in signature.parameters)
    exec(f"def bind({', '.join(parts)}): return ({values})", namespace)  # noqa: S102  # from a signature: identifiers only
    bind: Callable[..., tuple[Any, ...]] = namespace["bind"]
    bind.__qualname__ = getattr(function, "__qualname__", "function")
    return bind


def _underlying(wrapped: Any) -> tuple[Any, type | None]:
    """The plain function behind a descriptor or bound method, and which of the two method kinds wraps it."""
    if type(wrapped) in (classmethod, staticmethod):
        return wrapped.__func__, type(wrapped)
    if inspect.ismethod(wrapped):
        return wrapped.__func__, None
    return wrapped, None


def _receiver(label: str, kind: type | None, parameters: list[inspect.Parameter]) -> str | None:
    if kind is staticmethod or not parameters:
        return None
    first = parameters[0]
    if kind is classmethod:
        return first.name
    within = label.rpartition(".")[0]
    in_class = bool(within) and ":" in within and not within.endswith("<locals>")
    # Below @staticmethod or @classmethod the function looks like any other of its class, so the name has to decide.
    return first.name if in_class and first.name in ("self", "cls") and first.annotation is inspect.Parameter.empty else None
