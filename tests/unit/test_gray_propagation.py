"""Baggage: decisions survive the way, others' members are left alone, and nonsense is nobody's decision."""

from __future__ import annotations

import random

import pytest

from inventory_sdk.context import MOST_SIDES, Side
from inventory_sdk.gray.propagation import MAX_BYTES, found, merged, stripped


def test_decisions_survive_the_way() -> None:
    sides = {
        ("checkout", "m1"): Side("candidate", 7),
        ("checkout", "m 2:!,;=%~"): Side("candidate", 7),
        ("checkout", "商店"): Side("stable", 7),
        ("fast", "m1"): Side("stable", 0),
    }
    header = merged("tenant=7;p=1, other=x", sides)
    assert header.startswith("tenant=7;p=1,other=x,inventory-gray.")
    assert header.isascii()
    assert found(header) == (sides, 0)
    assert stripped(header) == "tenant=7;p=1,other=x"


def test_our_members_are_replaced_and_not_doubled() -> None:
    first = merged(None, {("checkout", "m1"): Side("candidate", 7)})
    assert merged(first, {("checkout", "m1"): Side("stable", 8)}) == "inventory-gray.checkout=stable:8:m1"
    assert merged(first, {}) == ""


@pytest.mark.parametrize(
    "value",
    ["", "candidate", "candidate:7", "maybe:7:m1", "candidate:x:m1", "candidate:-1:m1", "candidate:1234567890123456:m1", "candidate:7:",
     "candidate:7:%00", "candidate:7:%ff", "candidate:７:m1", "candidate:7:" + "x" * 200],
)  # fmt: skip
def test_a_member_that_makes_no_sense_decides_nothing(value: str) -> None:
    assert found(f"inventory-gray.checkout={value},inventory-gray.fast=stable:1:m1") == ({("fast", "m1"): Side("stable", 1)}, 1)


def test_a_link_that_can_be_none_decides_nothing() -> None:
    assert found("inventory-gray.Ch eck=candidate:7:m1") == ({}, 1)


def test_more_decisions_than_we_would_send_are_not_believed() -> None:
    many = ":".join(f"m{number}" for number in range(MOST_SIDES + 1))
    assert found(f"inventory-gray.checkout=candidate:7:{many}") == ({}, 1)


def test_a_header_never_grows_beyond_its_limit() -> None:
    sides = {(f"link-{number}", "商" * 40): Side("candidate", 7) for number in range(100)}
    header = merged("tenant=7", sides)
    assert len(header) <= MAX_BYTES
    assert header.startswith("tenant=7,")
    assert found(header)[1] == 0


def test_random_text_is_survived() -> None:
    dice = random.Random(20_261_125)
    for _ in range(2_000):
        text = "".join(dice.choice("inventory-gray.ck=:!,;%7m1candidate stable") for _ in range(dice.randrange(60)))
        found(f"inventory-gray.c={text}")
        merged(text, {("c", "m"): Side("stable", 1)})
