from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from itertools import product
from types import MappingProxyType
from typing import Any

import pytest

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import Line, Receipt
from inventory_sdk.selectors import compile_lines, compile_selector, compile_text
from inventory_sdk.weave import Home, Site, injected


@dataclass
class Item:
    sku: str = "a"
    qty: int = 2
    shop: str | None = None
    product: dict[str, Any] = field(default_factory=lambda: {"id": 7})


@dataclass
class Order:
    id: Any = "o-1"
    meta: dict[str, str] = field(default_factory=lambda: {"shop": "m1"})


async def place(order: Any, items: Any = (), *, shop: Any = "m1", receipt: Receipt = injected()) -> None: ...


SITE = Site(place, (), Home())


def values(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return SITE.bind(*args, **kwargs)


def lines(collection: Any, **options: Any) -> list[Line]:
    settings: dict[str, Any] = {"lines": "items", "sku": None, "quantity": None, "line_merchant": None, **options}
    pick = compile_lines(SITE, **settings)
    assert pick is not None
    found: list[Line] = pick(values(Order(), collection))
    return found


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("shop", "m1"),
        ("order.id", "o-1"),
        ("order.meta.shop", "m1"),
        ("{shop}-{order.id}", "m1-o\\-1"),
        ("order:{order.id}", "order:o-1"),
        ("{shop}-{order.id}!", "m1-o\\-1!"),
        ("{{{shop}}}", "{m1}"),
        (lambda order: order.id, "o-1"),
        (lambda shop, order: f"{shop}/{order.id}", "m1/o-1"),
        (lambda: "always", "always"),
        (lambda *, shop: shop, "m1"),
        (lambda shop, suffix="!": shop + suffix, "m1!"),
    ],
)
def test_a_selector_finds_its_value(selector: Any, expected: str) -> None:
    assert compile_selector(SITE, "operation_id", selector)(values(Order())) == expected


def test_a_selector_reads_attributes_of_self() -> None:
    class Service:
        async def hold(self, sku: str) -> None: ...

    site = Site(Service.__dict__["hold"], (), Home())
    service = Service()
    service.merchant = "m9"  # type: ignore[attr-defined]
    assert compile_selector(site, "merchant", "self.merchant")(site.bind(service, "a")) == "m9"


@pytest.mark.parametrize(
    ("selector", "why"),
    [
        ("ordr", r"operation_id='ordr': .*test_selectors:place has no parameter 'ordr'; it has order, items, shop"),
        ("ordr.id", "has no parameter 'ordr'"),
        ("{shop}:{ordr.id}", "has no parameter 'ordr'"),
        (lambda ordr: ordr, "has no parameter 'ordr'"),
        ("receipt", "is injected"),
        ("order..id", "not a name or a dotted path"),
        ("order.i d", "not a name or a dotted path"),
        ("{shop}{order.id}", "put a separator between"),
        ("{shop:>3}", "write parameters as"),
        ("{shop!r}", "write parameters as"),
        ("{}", "write parameters as"),
        ("{shop", "expected '}'"),
        ("{shop}\\{order.id}", "must not contain a backslash"),
        (lambda **all: all, r"instead of \*all"),
        (3, "a selector is a parameter name"),
    ],
)
def test_a_selector_that_cannot_work_is_refused_at_decoration(selector: Any, why: str) -> None:
    with pytest.raises(TypeError, match=why):
        compile_selector(SITE, "operation_id", selector)


def test_an_async_selector_is_refused() -> None:
    async def find(order: Any) -> str:
        return ""

    with pytest.raises(TypeError, match="must not be async"):
        compile_selector(SITE, "order", find)


def test_a_path_that_leads_nowhere_names_field_path_and_step() -> None:
    pick = compile_selector(SITE, "operation_id", "order.number")
    with pytest.raises(InvalidOperation, match=r"'order.number': Order has no attribute or key 'number'") as caught:
        pick(values(Order()))
    assert caught.value.field == "operation_id"
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize("template", ["{shop}:{order}", "{shop}:-{order}", "a{shop}:{order}:", "{shop}::{order}"])
def test_a_template_never_gives_two_pairs_of_values_the_same_text(template: str) -> None:
    pick = compile_selector(SITE, "operation_id", template)
    words = ["".join(letters) for size in range(4) for letters in product("a:\\-", repeat=size)]
    made = {pick(values(order, shop=shop)) for shop in words for order in words}
    assert len(made) == len(words) ** 2


def test_the_classic_collision_does_not_happen() -> None:
    pick = compile_selector(SITE, "operation_id", "{shop}:{order}")
    assert pick(values("c", shop="a:b")) != pick(values("b:c", shop="a"))


@pytest.mark.parametrize(("value", "expected"), [("x", "x"), (7, "7"), (uuid.UUID(int=1), str(uuid.UUID(int=1)))])
def test_what_names_something_may_be_a_number_or_a_uuid(value: Any, expected: str) -> None:
    assert compile_text(SITE, "operation_id", "order", required=True)(values(value)) == expected
    assert compile_selector(SITE, "operation_id", "id/{order}")(values(value)) == f"id/{expected}"


@pytest.mark.parametrize("value", [None, True, 1.5, b"x", ["x"]])
def test_what_is_no_name_is_refused(value: Any) -> None:
    with pytest.raises(InvalidOperation, match=r"operation_id=.*must be a string, a whole number or a UUID"):
        compile_text(SITE, "operation_id", "order", required=True)(values(value))
    with pytest.raises(InvalidOperation):
        compile_selector(SITE, "operation_id", "id/{order}")(values(value))


def test_a_name_that_is_not_required_may_be_none() -> None:
    assert compile_text(SITE, "merchant", "order", required=False)(values(None)) is None


AS_ITEMS: list[tuple[Any, dict[str, Any], list[Line]]] = [
    ([Line("a", 1), Line("b", 2, "m2")], {}, [Line("a", 1), Line("b", 2, "m2")]),
    ([("a", 1), ["b", 2]], {}, [Line("a", 1), Line("b", 2)]),
    ({"a": 1, 7: 2}, {}, [Line("a", 1), Line("7", 2)]),
    ([], {}, []),
    ((Item(),), {"sku": "sku", "quantity": "qty"}, [Line("a", 2)]),
    ([{"sku": "a", "qty": 2}], {"sku": "sku", "quantity": "qty"}, [Line("a", 2)]),
    ([MappingProxyType({"items": "a", "n": 2})], {"sku": "items", "quantity": "n"}, [Line("a", 2)]),
    ([Item()], {"sku": "product.id", "quantity": lambda item: item.qty * 2}, [Line("7", 4)]),
    ([Item(), Item("b")], {"sku": "sku", "quantity": 1}, [Line("a", 1), Line("b", 1)]),
    ([Item(shop="m2"), Item()], {"sku": "sku", "quantity": "qty", "line_merchant": "shop"}, [Line("a", 2, "m2"), Line("a", 2)]),
]


@pytest.mark.parametrize(("collection", "options", "expected"), AS_ITEMS)
def test_lines_are_read_from_items(collection: Any, options: dict[str, Any], expected: list[Line]) -> None:
    assert lines(collection, **options) == expected


def test_one_line_comes_from_parameters() -> None:
    pick = compile_lines(SITE, lines=None, sku="order.id", quantity="items", line_merchant="shop")
    assert pick is not None
    assert pick(values(Order("s"), 3)) == [Line("s", 3, "m1")]
    pick = compile_lines(SITE, lines=None, sku="order", quantity=1, line_merchant=None)
    assert pick is not None
    assert pick(values("s")) == [Line("s", 1)]


def test_no_selectors_mean_no_lines() -> None:
    assert compile_lines(SITE, lines=None, sku=None, quantity=None, line_merchant=None) is None


@pytest.mark.parametrize(
    ("collection", "options", "why"),
    [
        ([Item()], {}, r"lines\[0\].*must be a Line or \(sku, quantity\)"),
        (["ab"], {}, r"lines\[0\]"),
        ("ab", {}, "must be a collection of lines"),
        (None, {}, "must be a collection of lines"),
        (iter([Line("a", 1)]), {}, "can't be read twice"),
        ([Item(), Item()], {"sku": "sku", "quantity": "count"}, r"lines\[0\].count=.*Item has no attribute or key 'count'"),
        ([Item(qty=0)], {"sku": "sku", "quantity": "qty"}, "quantity=0: must not be zero"),
        ([Item(qty=True)], {"sku": "sku", "quantity": "qty"}, "quantity=True: must be a whole number"),
        ([Item(sku="")], {"sku": "sku", "quantity": "qty"}, "sku='': must not be empty"),
        ([("a", "2")], {}, "quantity='2'"),
    ],
)
def test_lines_that_name_nothing_are_refused(collection: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidOperation, match=why):
        lines(collection, **options)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"lines": "items", "sku": "sku"}, "needs quantity= too"),
        ({"lines": "items", "quantity": "qty"}, "needs sku= too"),
        ({"lines": "items", "line_merchant": "shop"}, "needs sku= and quantity="),
        ({"lines": "nothing"}, "has no parameter 'nothing'"),
        ({"lines": "items", "sku": "a b", "quantity": "qty"}, "not a name"),
        ({"lines": "items", "sku": 3, "quantity": "qty"}, "name an attribute or key"),
        ({"lines": "items", "sku": "sku", "quantity": 0}, "must not be zero"),
        ({"lines": "items", "sku": "sku", "quantity": True}, "must be a whole number"),
        ({"sku": "order"}, "quantity= is missing"),
        ({"quantity": 1}, "sku= is missing"),
        ({"sku": "odrer", "quantity": 1}, "has no parameter 'odrer'"),
    ],
)
def test_a_lines_selector_that_cannot_work_is_refused_at_decoration(options: dict[str, Any], why: str) -> None:
    settings: dict[str, Any] = {"lines": None, "sku": None, "quantity": None, "line_merchant": None, **options}
    with pytest.raises(TypeError, match=why):
        compile_lines(SITE, **settings)
