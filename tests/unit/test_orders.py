"""An orders file becomes acts: the same ones each time, none too large, and all of the file in them."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory_sdk.cli.orders import Act, OrderLine, UnreadableOrders, plan, read_orders
from inventory_sdk.cli.recount import Count, recount
from inventory_sdk.model import Line

HEADER = "invoice,at,sku,quantity,unit_price,customer,country\n"


def line(invoice: str, sku: str, quantity: int, customer: str = "c1", merchant: str = "m1") -> OrderLine:
    return OrderLine(invoice, sku, quantity, customer, merchant)


def acts(*lines: OrderLine) -> list[Act]:
    """Without the opening stock."""
    return [act for act in plan(lines) if act.order]


def test_a_sale_is_one_deduct_with_the_same_sku_summed() -> None:
    (sale,) = acts(line("1", "a", 2), line("1", "b", 1), line("1", "a", 3))
    assert sale == Act("deduct", "m1", "1/0", "1", (Line("a", 5), Line("b", 1)))


def test_an_invoice_larger_than_one_operation_is_split_into_parts_with_derived_ids() -> None:
    parts = acts(*(line("1", f"s{number}", 1) for number in range(749)))
    assert [(part.operation_id, len(part.lines)) for part in parts] == [("1/0", 512), ("1/1", 237)]
    assert {part.order for part in parts} == {"1"}


def test_a_negative_quantity_without_c_is_an_adjustment_of_as_many_units() -> None:
    (act,) = acts(line("1", "a", -21))
    assert (act.kind, act.operation_id, act.lines) == ("adjust", "1/adjust/0", (Line("a", 21),))


def test_a_cancellation_goes_back_to_the_customers_own_sale() -> None:
    *_, back = acts(line("1", "a", 5, "c1"), line("2", "a", 9, "c2"), line("C3", "a", -4, "c1"))
    assert back == Act("take_back", "m1", "C3/of/1/0/0", "C3", (Line("a", 4),), of="1/0")


def test_a_cancellation_takes_the_newest_sale_first_and_what_is_left_is_restocked() -> None:
    *_, first, second, rest = acts(line("1", "a", 2), line("2", "a", 3), line("C3", "a", -9))
    assert {(first.of, first.lines), (second.of, second.lines)} == {("1/0", (Line("a", 2),)), ("2/0", (Line("a", 3),))}
    assert (rest.kind, rest.lines) == ("restock", (Line("a", 4),))


def test_units_come_back_only_once() -> None:
    made = acts(line("1", "a", 5), line("C2", "a", -5), line("C3", "a", -1))
    assert [act.kind for act in made] == ["deduct", "take_back", "restock"]


def test_a_cancellation_without_a_customer_belongs_to_no_sale() -> None:
    made = acts(line("1", "a", 5, ""), line("C2", "a", -5, ""))
    assert [act.kind for act in made] == ["deduct", "restock"]


def test_opening_stock_is_all_that_the_file_sells_and_writes_off_per_merchant() -> None:
    opening = [act for act in plan([line("1", "a", 5), line("2", "a", -2), line("3", "a", 7, merchant="m2")]) if not act.order]
    assert {(act.kind, act.merchant, act.lines) for act in opening} == {
        ("restock", "m1", (Line("a", 7),)),
        ("restock", "m2", (Line("a", 7),)),
    }


lines_of_a_file = st.lists(
    st.builds(
        lambda number, cancelled, sku, units, customer, merchant: OrderLine(
            f"{'C' if cancelled else ''}{number}", sku, -abs(units) if cancelled else units, customer, merchant
        ),
        st.integers(1, 6),
        st.booleans(),
        st.sampled_from("ab"),
        st.integers(-5, 5).filter(bool),
        st.sampled_from(["", "c1", "c2"]),
        st.sampled_from(["m1", "m2"]),
    ),
    max_size=30,
)


@given(lines_of_a_file)
def test_every_unit_of_the_file_is_in_exactly_one_act_and_no_id_is_used_twice(lines: list[OrderLine]) -> None:
    made = plan(lines)
    assert len({(act.merchant, act.operation_id) for act in made}) == len(made)
    in_file: Counter[tuple[str, str, str]] = Counter()
    for each in lines:
        in_file[each.merchant, each.invoice, each.sku] += abs(each.quantity)
    in_acts: Counter[tuple[str, str, str]] = Counter()
    sold: dict[tuple[str, str], dict[str, int]] = {}
    for act in made:
        for part in act.lines:
            assert part.quantity > 0
            if act.order:
                in_acts[act.merchant, act.order, part.sku] += part.quantity
            if act.kind == "deduct":
                sold.setdefault((act.merchant, act.operation_id), {})[part.sku] = part.quantity
            if act.of is not None:
                sold[act.merchant, act.of][part.sku] -= part.quantity
                assert sold[act.merchant, act.of][part.sku] >= 0
    assert in_acts == in_file


def test_a_file_is_read_plain_and_compressed(tmp_path: Path) -> None:
    text = HEADER + '1,2011-12-04 10:10:00,a,2,1.5,c1,"United Kingdom"\n1,2011-12-04 10:10:00,b,0,1.5,c1,EIRE\n'
    (tmp_path / "orders.csv").write_text(text)
    (tmp_path / "orders.csv.gz").write_bytes(gzip.compress(text.encode()))
    expected = [OrderLine("1", "a", 2, "c1", "United Kingdom")]
    assert list(read_orders(tmp_path / "orders.csv")) == expected
    assert list(read_orders(tmp_path / "orders.csv.gz")) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("invoice,sku\n1,a\n", "column at, quantity"),
        (HEADER + "1,x,a,2.5,1,c,m\n", "line 2: quantity='2.5'"),
        (HEADER + "1,x,a,,1,c,m\n", "line 2: quantity=''"),
        (HEADER + "1,x,a,1,1,c,m\n1,x,,1,1,c,m\n", "line 3: sku is empty"),
        (HEADER + "C1,x,a,1,1,c,m\n", "line 2: quantity=1 in cancellation C1"),
        ("", "column invoice"),
    ],
)
def test_an_unreadable_file_is_refused_with_line_and_column(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(text)
    with pytest.raises(UnreadableOrders) as caught:
        list(read_orders(path))
    assert named in str(caught.value)


def test_the_recount_adds_up_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(HEADER + "1,x,a,5,1,c,m\n1,x,a,2,1,c,m\nC2,x,a,-3,1,c,m\n3,x,a,-1,1,c,m\n")
    counted = recount(path)
    assert counted.lines == 4
    assert counted.units == {("m", "a"): Count(sold=7, returned=3, written_off=1)}
    assert counted.invoices == {("m", "1"): {"a": 7}, ("m", "C2"): {"a": 3}, ("m", "3"): {"a": 1}}
