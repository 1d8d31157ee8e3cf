"""Decisions on their way between services, as W3C baggage: one member per link, under ``inventory-gray.<link>``.

    baggage: tenant=7,inventory-gray.checkout=candidate:7:m1:m2!stable:7:m3

Groups are joined with ``!``; each is variant, version of the rules, and the merchants it is for, percent-encoded. Members of others
are left as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final
from urllib.parse import quote, unquote

from inventory_sdk.context import MOST_SIDES, Side, Sides
from inventory_sdk.errors import InvalidOperation
from inventory_sdk.gray.decision import VARIANTS
from inventory_sdk.gray.rules import LINK
from inventory_sdk.model import check_text

VERSION: Final = re.compile(r"[0-9]{1,15}")
PREFIX: Final = "inventory-gray."
MAX_BYTES: Final = 8192
"""Of a baggage header, as its definition asks of everybody."""


def merged(header: str | None, sides: Mapping[tuple[str, str], Side]) -> str:
    """A baggage header with what others put there, and our decisions instead of any that were there before. What does not fit is left
    out: whoever misses a decision decides by the same rules."""
    members = [member for member in stripped(header).split(",") if member]
    groups: dict[str, dict[Side, list[str]]] = {}
    for (link, merchant), side in list(sides.items())[-MOST_SIDES:]:
        groups.setdefault(link, {}).setdefault(side, []).append(quote(merchant, safe=""))
    for link, by_side in groups.items():
        value = "!".join(":".join((side.variant, str(side.version), *merchants)) for side, merchants in by_side.items())
        members.append(f"{PREFIX}{link}={value}")
    while members and len(",".join(members)) > MAX_BYTES and members[-1].startswith(PREFIX):
        members.pop()
    return ",".join(members)


def stripped(header: str | None) -> str:
    """The header without our members."""
    if not header:
        return ""
    return ",".join(member.strip() for member in header.split(",") if member.strip() and not member.strip().startswith(PREFIX))


def found(header: str) -> tuple[Sides, int]:
    """The decisions in a header, and how many members of ours could not be read: those are decided anew."""
    sides: Sides = {}
    unreadable = 0
    for member in header.split(","):
        name, _, value = member.strip().partition("=")
        if not name.startswith(PREFIX):
            continue
        try:
            link = name.removeprefix(PREFIX).strip()
            if not LINK.fullmatch(link):
                raise InvalidOperation("baggage", name, "names no link")
            read = _groups(link, value.partition(";")[0].strip())
        except ValueError:
            unreadable += 1
            continue
        sides.update(read)
        if len(sides) > MOST_SIDES:
            return {}, unreadable + 1
    return sides, unreadable


def _groups(link: str, value: str) -> Sides:
    sides: Sides = {}
    for group in value.split("!"):
        variant, version, *merchants = group.split(":")
        if variant not in VARIANTS or not VERSION.fullmatch(version) or not merchants:
            raise InvalidOperation("baggage", group, "is no decision")
        for merchant in merchants:
            sides[link, check_text("merchant", unquote(merchant, errors="strict"))] = Side(variant, int(version))
    return sides
