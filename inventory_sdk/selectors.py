"""Selectors: how a decorator is told where in the arguments the order's id, or its lines, are.

Compiled once at decoration, against the parameters of the function; a name that is not there is a ``TypeError`` then. What
they answer comes from a tuple of all arguments (``Call.values()``).

- ``"order_id"``: a parameter; ``"order.id"``, ``"self.shop.id"``: attributes or mapping keys below one;
- ``"{shop}:{order.id}"``: a template. Values are escaped, so that two different pairs of values never give the same text;
- ``lambda order: order.id``: a callable that gets the parameters it names.
"""

from __future__ import annotations

import inspect
import operator
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from string import Formatter
from typing import Any, Final

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import Line
from inventory_sdk.weave import Site

Selector = str | Callable[..., Any]
Pick = Callable[[Sequence[Any]], Any]
"""From the tuple of arguments to the value."""

_ESCAPE: Final = "\\"


def compile_selector(site: Site, field: str, selector: Selector) -> Pick:
    """The compiled form of ``selector``. ``field`` is the decorator's keyword; errors name it.

    Raises ``TypeError`` for an unknown or injected parameter, a template that could be ambiguous, an async callable. The
    compiled form raises ``InvalidOperation`` where a path leads nowhere.
    """
    if isinstance(selector, str):
        if "{" in selector or "}" in selector:
            return _template(site, field, selector)
        return _path(site, field, selector)
    if callable(selector):
        return _callable(site, field, selector)
    raise TypeError(f"{field}={selector!r}: a selector is a parameter name, a dotted path, a template or a callable")


def compile_text(site: Site, field: str, selector: Selector, *, required: bool) -> Pick:
    """Like ``compile_selector``, for what names something: strings stay, whole numbers and UUIDs become their text.

    ``required``: None is refused with ``InvalidOperation`` and not passed on.
    """
    pick = compile_selector(site, field, selector)

    def text(values: Sequence[Any]) -> str | None:
        value = pick(values)
        if type(value) is str:
            return value
        if value is None and not required:
            return None
        return as_text(field, value)

    return text


def as_text(field: str, value: object) -> str:
    """A name as text: a string, whole number or UUID; ``InvalidOperation`` otherwise."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, uuid.UUID) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    raise InvalidOperation(field, value, "must be a string, a whole number or a UUID")


def compile_lines(
    site: Site,
    *,
    lines: Selector | None,
    sku: Selector | None,
    quantity: Selector | int | None,
    line_merchant: Selector | None,
) -> Pick | None:
    """From the arguments to a list of ``Line``; None where the decorator names no lines.

    With ``lines``: the selected collection's items are read by ``sku``, ``quantity`` (a whole number means that many of each)
    and ``line_merchant``, which name an attribute or key of an item, or are callables that get it. Without ``sku`` and
    ``quantity`` the items are ``Line`` objects or pairs (sku, quantity), or the collection is a mapping {sku: quantity}.
    Without ``lines``: one line, from ``sku`` and ``quantity`` as selectors of parameters.
    """
    if lines is None:
        return _single_line(site, sku, quantity, line_merchant)
    if (sku is None) != (quantity is None):
        given, missing = ("sku", "quantity") if quantity is None else ("quantity", "sku")
        raise TypeError(f"{site.label}: lines= with {given}= needs {missing}= too")
    collection = compile_selector(site, "lines", lines)
    if sku is None or quantity is None:
        if line_merchant is not None:
            raise TypeError(f"{site.label}: line_merchant= needs sku= and quantity= with lines=")
        return lambda values: _plain_lines(collection(values))
    sku_of = _item_reader(site, "sku", sku)
    quantity_of = _constant_quantity(site, quantity) if isinstance(quantity, int) else _item_reader(site, "quantity", quantity)
    merchant_of = None if line_merchant is None else _item_reader(site, "line_merchant", line_merchant)

    def read(values: Sequence[Any]) -> list[Line]:
        found: list[Line] = []
        for index, item in enumerate(_items(collection(values))):
            try:
                shop = None if merchant_of is None else merchant_of(item)
                found.append(Line(as_text("sku", sku_of(item)), quantity_of(item), None if shop is None else as_text("merchant", shop)))
            except _Nowhere as error:
                raise InvalidOperation(f"lines[{index}].{error.name}", item, error.why) from error.__cause__
        return found

    return read


class _Nowhere(Exception):
    def __init__(self, name: str, value: object, why: str) -> None:
        super().__init__(name, why)
        self.name = name
        self.value = value
        self.why = why


def _single_line(site: Site, sku: Selector | None, quantity: Selector | int | None, line_merchant: Selector | None) -> Pick | None:
    if sku is None and quantity is None and line_merchant is None:
        return None
    if sku is None or quantity is None:
        missing = "sku" if sku is None else "quantity"
        raise TypeError(f"{site.label}: one line needs sku= and quantity=; {missing}= is missing (or name lines=)")
    sku_of = compile_text(site, "sku", sku, required=True)
    quantity_of = _constant_quantity(site, quantity) if isinstance(quantity, int) else compile_selector(site, "quantity", quantity)
    merchant_of = None if line_merchant is None else compile_text(site, "line_merchant", line_merchant, required=False)

    def read(values: Sequence[Any]) -> list[Line]:
        return [Line(sku_of(values), quantity_of(values), None if merchant_of is None else merchant_of(values))]

    return read


def _constant_quantity(site: Site, quantity: int) -> Callable[[Any], int]:
    try:
        Line("any", quantity)
    except InvalidOperation as error:
        raise TypeError(f"{site.label}: quantity={quantity!r}: {error.why}") from error
    return lambda _: quantity


def _item_reader(site: Site, field: str, selector: Selector) -> Callable[[Any], Any]:
    if not isinstance(selector, str):
        if not callable(selector) or inspect.iscoroutinefunction(selector):
            raise TypeError(f"{site.label}: {field}={selector!r}: name an attribute or key of an item, or give a function of it")
        return selector
    steps = selector.split(".")
    _check_steps(site, field, selector, steps)
    if len(steps) == 1:
        return lambda item: _step(item, selector, selector)

    def walk(item: Any) -> Any:
        for step in steps:
            item = _step(item, step, selector)
        return item

    return walk


def _items(collection: Any) -> Iterable[Any]:
    if isinstance(collection, Iterator):
        raise InvalidOperation("lines", collection, "must be a collection: an iterator can't be read twice")
    if isinstance(collection, str | bytes) or not isinstance(collection, Iterable):
        raise InvalidOperation("lines", collection, "must be a collection of lines")
    return collection


def _plain_lines(collection: Any) -> list[Line]:
    if isinstance(collection, Mapping):
        return [Line(as_text("sku", sku), quantity) for sku, quantity in collection.items()]
    found: list[Line] = []
    for index, item in enumerate(_items(collection)):
        if isinstance(item, Line):
            found.append(item)
        elif isinstance(item, tuple | list) and len(item) == 2:
            found.append(Line(as_text("sku", item[0]), item[1]))
        else:
            why = "must be a Line or (sku, quantity); or name sku= and quantity= in the decorator"
            raise InvalidOperation(f"lines[{index}]", item, why)
    return found


def _path(site: Site, field: str, selector: str) -> Pick:
    root, *steps = selector.split(".")
    pick: Pick = operator.itemgetter(_index(site, field, selector, root))
    if not steps:
        return pick
    _check_steps(site, field, selector, steps)

    def walk(values: Sequence[Any]) -> Any:
        value = pick(values)
        try:
            for step in steps:
                value = _step(value, step, selector)
        except _Nowhere as error:
            raise InvalidOperation(field, error.value, f"{selector!r}: {error.why}") from error.__cause__
        return value

    return walk


def _check_steps(site: Site, field: str, selector: str, steps: Sequence[str]) -> None:
    if not all(step.isidentifier() for step in steps):
        raise TypeError(f"{site.label}: {field}={selector!r} is not a name or a dotted path")


def _step(value: Any, step: str, path: str) -> Any:
    try:
        if isinstance(value, Mapping):
            return value[step]
        return getattr(value, step)
    except (AttributeError, KeyError) as error:
        raise _Nowhere(path, value, f"{type(value).__name__} has no attribute or key {step!r}") from error


def _index(site: Site, field: str, selector: object, name: str) -> int:
    if name not in site.names:
        raise TypeError(f"{field}={selector!r}: {site.label} has no parameter {name!r}; it has {', '.join(site.names) or 'none'}")
    if name in site.injected:
        raise TypeError(f"{field}={selector!r}: {name!r} of {site.label} is injected, so it is not there to select from")
    return site.names.index(name)


def _template(site: Site, field: str, selector: str) -> Pick:
    try:
        parsed = list(Formatter().parse(selector))
    except ValueError as error:
        raise TypeError(f"{site.label}: {field}={selector!r}: {error}") from error
    literals = [literal for literal, *_ in parsed]
    if any(_ESCAPE in literal for literal in literals):
        raise TypeError(f"{site.label}: {field}={selector!r}: a template must not contain a backslash, it escapes values")
    # Within a value each character that begins a separator is escaped, so an unescaped one is a separator.
    fields = [index for index, (_, name, *_) in enumerate(parsed) if name is not None]
    begins = {literals[index][:1] for index in fields[1:]}
    escapes = {ord(character): _ESCAPE + character for character in (begins | {_ESCAPE} if begins else begins) if character}
    parts: list[str | Pick] = []
    for literal, name, spec, conversion in parsed:
        if literal:
            parts.append(literal)
        if name is None:
            continue
        if not name or spec or conversion:
            raise TypeError(f"{site.label}: {field}={selector!r}: write parameters as {{name}} or {{name.path}}")
        if parts and not isinstance(parts[-1], str):
            raise TypeError(f"{site.label}: {field}={selector!r}: put a separator between two parameters, or ids could collide")
        parts.append(_path(site, field, name))

    def fill(values: Sequence[Any]) -> str:
        return "".join([part if isinstance(part, str) else as_text(field, part(values)).translate(escapes) for part in parts])

    return fill


def _callable(site: Site, field: str, selector: Callable[..., Any]) -> Pick:
    if inspect.iscoroutinefunction(selector):
        raise TypeError(f"{site.label}: {field}={selector!r}: a selector must not be async")
    try:
        parameters = inspect.signature(selector).parameters.values()
    except ValueError as error:
        raise TypeError(f"{site.label}: {field}={selector!r}: its parameters can't be read; use a lambda") from error
    by_position: list[int] = []
    by_name: list[tuple[str, int]] = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{site.label}: {field}={selector!r}: name the parameters it needs instead of *{parameter.name}")
        if parameter.name not in site.names and parameter.default is not parameter.empty:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                break
            continue
        index = _index(site, field, selector, parameter.name)
        if parameter.kind is parameter.POSITIONAL_ONLY:
            by_position.append(index)
        else:
            by_name.append((parameter.name, index))
    if len(by_name) == 1 and not by_position and not any(each.kind is each.KEYWORD_ONLY for each in parameters):
        ((name, index),) = by_name
        if next(iter(parameters)).name == name:
            return lambda values: selector(values[index])
    return lambda values: selector(*[values[each] for each in by_position], **{name: values[each] for name, each in by_name})
