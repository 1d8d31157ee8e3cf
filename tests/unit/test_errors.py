"""Errors: one tree, and each says what to change."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from inventory_sdk import errors
from inventory_sdk.errors import (
    DeadlineExceeded,
    DurabilityNotReached,
    HotspotLimited,
    InsufficientStock,
    InvalidOperation,
    InventoryError,
    JournalFull,
    LaneFull,
    LaneNotServed,
    NotStarted,
    OperationConflict,
    OutcomeUnknown,
    Overloaded,
    QuantityMismatch,
    RecalculationCutOff,
    RecalculationFailed,
    ReservationClosed,
    ReservationExpired,
    ReservationNotFound,
    StockFrozen,
    UnknownStock,
)
from inventory_sdk.model import Position, Shortage

SAMPLES = [
    InvalidOperation("quantity", 0, "must not be zero"),
    InsufficientStock([Shortage("m1", "a", 3, 1), Shortage("m1", "b", 2, 0)]),
    UnknownStock("m1", "a"),
    OperationConflict("order-1"),
    ReservationNotFound("order-1", "m1"),
    ReservationClosed("order-1", "released"),
    ReservationExpired("order-1"),
    QuantityMismatch([("a", 2, 1)]),
    OutcomeUnknown("order-1", "the connection was lost"),
    Overloaded("too much"),
    LaneFull("lane core is full", 0.5),
    HotspotLimited("sku a is hot", 0.2),
    JournalFull("the journal holds 2000000 operations"),
    StockFrozen("partition 0 is being rebuilt", 3),
    LaneNotServed("batch", ["core"], "https://batch.example"),
    DeadlineExceeded("0.5 s ran out"),
    RecalculationFailed("shop:recalculate", "shop-1", "ValueError", "no such shop"),
    RecalculationCutOff("shop:recalculate", "shop-1", "TimeoutError", "not done within 60 s"),
    DurabilityNotReached("database", Position(0, 1, 9), Position(0, 1, 4), None),
    NotStarted(),
]


def tree() -> dict[str, str]:
    """Name → parent, as the module's docstring draws it."""
    parents, path = {}, ["InventoryError"]
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"\s*((?:│   |    )*)[├└]── (\w+)", line):
            depth = len(match[1]) // 4 + 1
            parents[match[2]] = path[depth - 1]
            path[depth:] = [match[2]]
    return parents


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    defined = {
        name: value.__bases__[0].__name__
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, InventoryError) and value is not InventoryError
    }
    assert tree() == defined


def test_there_is_a_sample_of_every_error() -> None:
    assert {type(sample).__name__ for sample in SAMPLES} == set(tree())


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_is_an_inventory_error_with_a_message(error: InventoryError) -> None:
    assert isinstance(error, InventoryError)
    assert str(error)
    assert type(error).__doc__


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_survives_pickling_and_copying(error: InventoryError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_invalid_operation_is_a_value_error_that_names_field_and_value() -> None:
    error = InvalidOperation("quantity", -3, "must be positive")
    assert isinstance(error, ValueError)
    assert (error.field, error.value, error.why) == ("quantity", -3, "must be positive")
    assert str(error) == "quantity=-3: must be positive"


def test_a_huge_value_does_not_flood_the_log() -> None:
    assert len(str(InvalidOperation("sku", "x" * 10_000, "too long"))) < 300


def test_insufficient_stock_names_the_first_short_line_and_keeps_all() -> None:
    error = InsufficientStock([Shortage("m1", "a", 3, 1), Shortage("m2", "b", 2, 0)])
    assert (error.merchant, error.sku, error.requested, error.available) == ("m1", "a", 3, 1)
    assert [shortage.sku for shortage in error.shortages] == ["a", "b"]
    assert str(error) == "merchant 'm1', sku 'a': 3 asked, 1 available (and 1 more lines)"


def test_overloaded_errors_say_when_to_come_back() -> None:
    for error in (LaneFull("full", 0.25), HotspotLimited("hot", 0.25), JournalFull("full", 0.25), StockFrozen("frozen", 0.25)):
        assert error.retry_after == 0.25
        assert "0.25 s" in str(error)


def test_an_expired_reservation_is_a_closed_one_whose_state_is_expired() -> None:
    error = ReservationExpired("order-1")
    assert isinstance(error, ReservationClosed)
    assert error.state == "expired"


def test_durability_not_reached_says_how_far_it_came_and_when_a_worker_was_seen() -> None:
    error = DurabilityNotReached("database", (0, 1, 9), (0, 1, 4), 2.5, "timeout 30 s")
    assert (error.level, error.wanted, error.applied, error.worker_seen) == ("database", (0, 1, 9), (0, 1, 4), 2.5)
    assert "worker seen 2.5 s ago" in str(error)
    assert "timeout 30 s" in str(error)
    assert "no worker has given a sign of life" in str(DurabilityNotReached("database", None, None, None))


def test_errors_that_can_be_repeated_say_with_which_id() -> None:
    assert "'order-1'" in str(OutcomeUnknown("order-1", "no reply"))
    assert OperationConflict("order-1").operation_id == "order-1"
