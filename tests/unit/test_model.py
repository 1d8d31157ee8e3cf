"""The data checks itself at the door (promise 7), and the derived values are the same in every process and language."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import (
    LEDGER_DELTAS,
    MAX_BALANCE,
    MAX_QUANTITY,
    MAX_TTL,
    NO_DELTAS,
    Deltas,
    JournalOperation,
    Kind,
    Lane,
    Line,
    Movement,
    OpeningBalance,
    Position,
    Receipt,
    ReceiptLine,
    Reservation,
    Shortage,
    StockLevel,
    check_text,
    check_ttl,
    fingerprint,
    key_of,
    partition_of,
    split_key,
    summed,
)

CONTROL = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))]
names = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=30)
quantities = st.integers(1, MAX_QUANTITY)
lines_of_a_call = st.lists(st.builds(Line, names, quantities, st.none() | names), min_size=1, max_size=12)


def refusal(call: Any, *arguments: Any) -> InvalidOperation:
    with pytest.raises(InvalidOperation) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize("value", ["sku-1", "é", "漢字 with spaces", "x" * 128, "é" * 64, "a\xa0b", "\u2028"])
def test_a_name_may_be_any_printable_text_up_to_128_bytes(value: str) -> None:
    assert check_text("sku", value) == value


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("", "empty"),
        (None, "string"),
        (7, "string"),
        (b"sku", "string"),
        (["sku"], "string"),
        ("x" * 129, "128 bytes"),
        ("é" * 65, "128 bytes"),
        ("a" * 200 + "\n", "control"),
        ("\ud800", "control"),
    ],
)
def test_a_bad_name_is_refused_with_field_and_value(value: Any, why: str) -> None:
    error = refusal(check_text, "operation_id", value)
    assert error.field == "operation_id"
    assert error.value == value
    assert why in str(error)
    assert str(error).startswith("operation_id=")


@pytest.mark.parametrize("character", CONTROL, ids=lambda character: f"{ord(character):#04x}")
def test_no_control_character_gets_into_a_name(character: str) -> None:
    """Among them \\x1f, which separates the parts of a key."""
    assert "control" in str(refusal(check_text, "sku", f"a{character}b"))


@given(st.text(max_size=200))
def test_every_text_is_either_refused_or_safe_to_put_into_a_key(value: str) -> None:
    try:
        check_text("sku", value)
    except InvalidOperation:
        return
    assert split_key(key_of("m1", value)) == ("m1", value)
    assert 0 < len(value.encode()) <= 128


@pytest.mark.parametrize("quantity", [True, False, 1.0, 1.5, "2", None, 2 + 0j, float("nan")])
def test_a_quantity_that_is_not_a_whole_number_is_refused(quantity: Any) -> None:
    error = refusal(Line, "a", quantity)
    assert error.field == "quantity"
    assert error.value is quantity
    assert "sku 'a'" in str(error)


@pytest.mark.parametrize("quantity", [0, MAX_QUANTITY + 1, -MAX_QUANTITY - 1, 10**30])
def test_a_quantity_of_zero_or_beyond_a_thousand_million_is_refused(quantity: int) -> None:
    error = refusal(Line, "a", quantity)
    assert (error.field, error.value) == ("quantity", quantity)


@pytest.mark.parametrize("quantity", [1, -1, MAX_QUANTITY, -MAX_QUANTITY])
def test_quantities_up_to_the_limits_are_taken(quantity: int) -> None:
    assert Line("a", quantity).quantity == quantity


@pytest.mark.parametrize(
    ("arguments", "field"), [(("", 1), "sku"), ((7, 1), "sku"), (("a", 1, ""), "merchant"), (("a", 1, "m\n"), "merchant")]
)
def test_a_line_names_its_bad_field(arguments: tuple[Any, ...], field: str) -> None:
    assert refusal(Line, *arguments).field == field


@pytest.mark.parametrize("ttl", [0, -1, MAX_TTL + 1, float("nan"), float("inf"), True, False, "900", [900]])
def test_a_bad_ttl_is_refused_with_its_value(ttl: Any) -> None:
    error = refusal(check_ttl, ttl)
    assert error.field == "ttl"
    assert error.value is ttl


@pytest.mark.parametrize("ttl", [None, 0.001, 900, 900.5, MAX_TTL])
def test_a_ttl_is_seconds_or_none(ttl: float | None) -> None:
    assert check_ttl(ttl) == ttl


@pytest.mark.parametrize("available", [-1, True, 1.0, "1", None, MAX_BALANCE + 1])
def test_a_bad_opening_balance_is_refused(available: Any) -> None:
    error = refusal(OpeningBalance, "a", available)
    assert (error.field, error.value) == ("available", available)


def test_an_opening_balance_may_be_zero() -> None:
    assert OpeningBalance("a", 0).available == 0


@pytest.mark.parametrize("cls", [Line, Shortage, Receipt, StockLevel, Reservation, Movement, OpeningBalance, Lane])
def test_public_data_is_frozen_and_slotted(cls: Any) -> None:
    assert cls.__dataclass_params__.frozen
    assert not hasattr(cls, "__dict__") or "__dict__" not in dir(cls)
    assert {field.name for field in dataclasses.fields(cls)} <= set(cls.__slots__)


def test_a_line_can_not_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Line("a", 1).quantity = 2  # type: ignore[misc]  # this is what must fail


def test_summed_adds_the_same_sku_once_per_merchant_and_sorts() -> None:
    lines = [Line("b", 1), Line("a", 2), Line("b", 3), Line("b", 5, "m0"), Line("a", 7, "m1")]
    assert summed(lines, "m1") == ["m0\x1fb", 5, "m1\x1fa", 9, "m1\x1fb", 4]


@given(lines_of_a_call, names, st.randoms())
def test_summed_does_not_depend_on_order_and_loses_nothing(lines: list[Line], merchant: str, random: Any) -> None:
    flat = summed(lines, merchant)
    shuffled = list(lines)
    random.shuffle(shuffled)
    assert summed(shuffled, merchant) == flat
    fields = flat[::2]
    assert fields == sorted(set(fields))
    assert sum(flat[1::2]) == sum(line.quantity for line in lines)


@given(names, names, names, names)
def test_no_two_pairs_share_a_key(merchant: str, name: str, other_merchant: str, other_name: str) -> None:
    same = (merchant, name) == (other_merchant, other_name)
    assert (key_of(merchant, name) == key_of(other_merchant, other_name)) == same


@pytest.mark.parametrize(
    ("kind", "reference", "flat", "expected"),
    [
        ("reserve", "", ["m1\x1fa", 2], "r2 m1\x1fa"),
        ("deduct", "", ["m1\x1fa", 2], "d2 m1\x1fa"),
        ("adjust", "", ["m1\x1fa", 2], "a2 m1\x1fa"),
        ("deduct", "", ["m1\x1fa-sku-with-a-longer-name", 2], "7750a5691cae2690"),
        ("confirm", "order-42", [], "f5893ae56c7a9ad4"),
        ("take_back", "order-43", ["m1\x1fa", 1, "m1\x1fé", 2], "80b164f91cae7794"),
    ],
)
def test_fingerprints_stay_what_they_are(kind: str, reference: str, flat: list[Any], expected: str) -> None:
    """They stand in ledgers and in Redis: a release that computed another one would call every repeat a conflict."""
    assert fingerprint(kind, reference, flat) == expected


@given(lines_of_a_call, lines_of_a_call, st.sampled_from(["reserve", "deduct"]), st.sampled_from(["reserve", "deduct"]))
def test_fingerprints_differ_exactly_when_the_content_does(lines: list[Line], others: list[Line], kind: str, other: str) -> None:
    flat, other_flat = summed(lines, "m1"), summed(others, "m1")
    same = (kind, flat) == (other, other_flat)
    assert (fingerprint(kind, "", flat) == fingerprint(other, "", other_flat)) == same


def test_a_fingerprint_can_not_be_forged_by_moving_text_between_its_parts() -> None:
    assert fingerprint("confirm", "r1", ["m\x1fa", 1]) != fingerprint("confirm", "r", ["1m\x1fa", 1])
    assert fingerprint("confirm", "", ["m\x1fa", 11]) != fingerprint("confirm", "", ["m\x1fa", 1, "1"])


@pytest.mark.parametrize(
    ("merchant", "partitions", "expected"),
    [
        ("123456789", 1_000_000, 0xCBF43926 % 1_000_000),  # the check value of CRC-32 itself
        ("default", 16, 15),
        ("m1", 7, 1),
        ("Österreich", 16, 14),
        ("anything", 1, 0),
    ],
)
def test_partitions_stay_where_they_are(merchant: str, partitions: int, expected: int) -> None:
    """A merchant that moved to another partition would find no stock there."""
    assert partition_of(merchant, partitions) == expected


@given(names, st.integers(1, 64))
def test_a_partition_is_crc32_of_the_utf8_modulo_their_number(merchant: str, partitions: int) -> None:
    assert partition_of(merchant, partitions) == zlib.crc32(merchant.encode("utf-8")) % partitions


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_leaves_the_books_balanced(kind: Kind) -> None:
    """Promise 6, per unit: supplied = available + reserved + sold + written off."""
    deltas = LEDGER_DELTAS.get(kind, NO_DELTAS)
    assert deltas.supplied == deltas.available + deltas.reserved + deltas.sold + deltas.written_off


def test_an_inverse_undoes_exactly() -> None:
    deltas = LEDGER_DELTAS[Kind.RESERVE]
    assert Deltas(*(a + b for a, b in zip(deltas, deltas.negated(), strict=True))) == NO_DELTAS


def test_a_journal_operation_knows_its_merchant_and_its_id_even_a_derived_one() -> None:
    operation = JournalOperation("confirm", "m1\x1forder-42\x1fconfirm", "f", [], [], "", "", 0, "")
    assert operation.merchant == "m1"
    assert operation.operation_id == "order-42\x1fconfirm"


def test_receipts_compare_by_value() -> None:
    def receipt() -> Receipt:
        return Receipt("order-1", "deduct", "m1", None, (ReceiptLine("m1", "a", 1, 9),), (Position(0, 1, 1),), "redis")

    assert receipt() == receipt()
    assert dataclasses.replace(receipt(), replayed=True) != receipt()
