"""The documented message formats are the ones that the code reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from inventory_sdk.model import LEDGER_DELTAS, Deltas, JournalOperation, Kind
from inventory_sdk.stock.journal import VERSION, UnreadableEntry, decode, encode
from inventory_sdk.sync.queues.announcement import announcement, read_announcement

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


@pytest.fixture(scope="module")
def page() -> str:
    return (REFERENCE / "journal.md").read_text()


@pytest.fixture(scope="module")
def api() -> dict[str, Any]:
    document = yaml.safe_load((REFERENCE / "asyncapi.yaml").read_text())
    assert isinstance(document, dict)
    return document


def test_the_example_of_an_entry_decodes_into_what_the_page_says(page: str) -> None:
    example = re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0]
    entry = decode(0, 1, 7, example)
    assert (entry.nonce, entry.at_ms) == ("5f2e91c07", 1735689600123)
    assert [operation.kind for operation in entry.operations] == ["reserve", "deduct", "confirm", "adjust", "keep"]
    reserve, _, confirm, adjust, keep = entry.operations
    assert (reserve.merchant, reserve.operation_id, reserve.order) == ("m1", "order-42", "42")
    assert reserve.lines == ["m1\x1fsku-1", 2, "m1\x1fsku-2", 1]
    assert reserve.remaining == [98, 11]
    assert reserve.expires_at - entry.at_ms == 900_000
    assert confirm.reference == reserve.key
    assert json.loads(adjust.extra) == {"reason": "damaged"}
    assert (keep.lines, keep.remaining) == ([], [])


def test_the_example_of_an_announcement_is_read(page: str) -> None:
    example = re.findall(r"```json\n(.*?)```", page, re.DOTALL)[1]
    read = read_announcement(0, 1, 7, example)
    assert read.refused == {1: "insufficient"}
    assert [operation.kind for operation in read.entry.operations] == ["reserve", "deduct"]


def test_the_table_of_fields_has_every_field_of_an_operation(page: str) -> None:
    rows = re.findall(r"^\| (\d) \| (\w+) \|", page, re.MULTILINE)
    assert rows == [(str(number), name) for number, name in enumerate(JournalOperation._fields)]


def test_the_table_of_kinds_says_what_the_ledger_does(page: str) -> None:
    stated: dict[str, Deltas] = {}
    table = page[page.index("| Kind | available |") : page.index("| `undo` |")]
    for line in table.splitlines()[2:]:
        kinds, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if kinds:
            deltas = Deltas(*(int(cell.replace("−", "-") or 0) for cell in cells))
            stated |= dict.fromkeys(re.findall(r"`(\w+)`", kinds), deltas)
    assert stated == LEDGER_DELTAS
    for kind in Kind:
        assert f"`{kind}`" in page


def test_asyncapi_names_this_version_all_kinds_and_resolves(api: dict[str, Any]) -> None:
    assert api["asyncapi"] == "3.0.0"
    schemas = api["components"]["schemas"]
    assert schemas["entry"]["properties"]["v"]["const"] == VERSION
    assert schemas["operation"]["items"][0]["enum"] == [str(kind) for kind in Kind]
    assert [field["title"] for field in schemas["operation"]["items"]] == list(JournalOperation._fields)

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            return [node["$ref"]] if "$ref" in node else [found for value in node.values() for found in references(value)]
        return [found for value in node for found in references(value)] if isinstance(node, list) else []

    found = references(api)
    assert found
    for reference in found:
        node = api
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]


def test_the_examples_of_asyncapi_are_read(api: dict[str, Any]) -> None:
    messages = api["components"]["messages"]
    (entry,), (applied,) = messages["entry"]["examples"], messages["applied"]["examples"]
    decoded = decode(0, 1, 7, json.dumps(entry["payload"]))
    assert [(operation.kind, operation.operation_id) for operation in decoded.operations] == [
        ("reserve", "order-42"),
        ("deduct", "order-43"),
    ]
    read = read_announcement(0, 1, 7, json.dumps(applied["payload"]))
    assert (read.entry, read.refused) == (decoded, {1: "insufficient"})


def test_an_announcement_carries_the_entry_as_it_was_and_who_was_refused() -> None:
    body = encode("n1", 5, [["deduct", "m\x1fo", "f", ["m\x1fä", 1], [0], "", "", 0, ""]])
    text = announcement(body, {2: "duplicate", 0: "closed"})
    assert body in text
    assert read_announcement(0, 1, 1, text) == (decode(0, 1, 1, body), {0: "closed", 2: "duplicate"})


@pytest.mark.parametrize("text", ["", "[]", "1", '{"v":1}', '{"v":2,"refused":{},"entry":{}}', '{"v":1,"refused":{"x":"y"},"entry":{}}'])
def test_what_is_no_announcement_is_refused_by_its_position(text: str) -> None:
    with pytest.raises(UnreadableEntry, match="3/1-9"):
        read_announcement(3, 1, 9, text)
