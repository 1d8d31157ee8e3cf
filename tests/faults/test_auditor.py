"""The auditor finds what it is there to find: each kind of wrong, made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.auditor import Asked, Books, Row, audit, read_callers
from tests.faults.stand import schedule

KEY, FIELD = "m\x1fo1", "m\x1fa"


def asked(*said: str, kind: str = "deduct", level: str = "queue") -> dict[str, Asked]:
    return {KEY: Asked(KEY, kind, {"a": 2}, level, None, list(said), [], [(0, 1, 5)] if "acked" in said else [])}


def books(status: str = "applied", times: int = 1, units: int = 2) -> Books:
    """100 of a supplied, and the operation in the ledger so many times."""
    opening = Row((0, 0, 1), "m\x1fopening", "restock", "applied", {"a": 100}, None)
    rows = {opening.key: [opening]}
    if times:
        rows[KEY] = [Row((0, 1, 5 + number), KEY, "deduct", status, {"a": units}, None) for number in range(times)]
    sold = units * times if status == "applied" else 0
    stock = {FIELD: {"available": 100 - sold, "reserved": 0, "sold": sold, "supplied": 100, "written_off": 0}}
    return Books(rows, stock, set(), set(), {}, 0)


@pytest.mark.parametrize("said", [("acked",), ("unknown",), ("weaker",), (), ("unknown", "acked"), ("refused", "acked")])
def test_an_operation_that_is_there_once_is_right_unless_it_was_refused(said: tuple[str, ...]) -> None:
    assert audit(asked(*said), books()).wrong == []


@pytest.mark.parametrize("said", [("refused",), ("unknown",), (), ("refused", "unknown")])
def test_one_that_was_not_acknowledged_may_be_missing(said: tuple[str, ...]) -> None:
    assert audit(asked(*said), books(times=0)).wrong == []


WRONGS: dict[str, tuple[Callable[[], tuple[dict[str, Asked], Books]], str]] = {
    "lost": (lambda: (asked("acked"), books(times=0)), "not in the ledger"),
    "rejected": (lambda: (asked("acked"), books(status="rejected")), "not in the ledger"),
    "doubled": (lambda: (asked("acked"), books(times=2)), "2 times"),
    "refused and there": (lambda: (asked("refused"), books()), "refused, and yet"),
    "other quantity": (lambda: (asked("acked"), books(units=3)), "the ledger moved"),
    "nobody asked": (lambda: ({}, books()), "nobody asked"),
    "driver's error": (lambda: (asked("raw"), books(times=0)), "outside the SDK's tree"),
}


@pytest.mark.parametrize("name", WRONGS)
def test_what_is_wrong_is_found(name: str) -> None:
    make, words = WRONGS[name]
    (wrong,) = audit(*make()).wrong
    assert words in wrong


def test_stock_that_does_not_add_up_is_found() -> None:
    crooked = books()
    crooked.stock[FIELD]["available"] += 1
    assert len(audit(asked("acked"), crooked).wrong) == 2  # against its operations, and against itself


def test_a_loss_is_allowed_at_its_level_only_and_only_if_the_ledger_names_it() -> None:
    gone = books(times=0)
    assert audit(asked("acked", level="redis"), gone, ("redis",)).wrong  # nobody says where it went
    gone.lost.add((0, 1, 5))
    assert audit(asked("acked", level="redis"), gone, ("redis",)).wrong == []
    assert audit(asked("acked", level="queue"), gone, ("redis",)).wrong
    assert audit(asked("acked", level="redis"), gone).wrong
    ended = books(times=0)
    ended.ends[0, 1] = 4  # the epoch ended before it
    assert audit(asked("acked", level="redis"), ended, ("redis",)).wrong == []


def test_a_book_whose_last_line_was_being_written_is_read_up_to_it(tmp_path: Path) -> None:
    told = {"id": "o1", "said": "asked", "kind": "deduct", "merchant": "m", "lines": {"a": 2}, "level": "queue"}
    book = tmp_path / "book"
    book.write_text(json.dumps(told) + "\n" + '{"id": "o1", "sa')
    assert read_callers([book])[KEY].said == []


def test_a_seed_replays_its_schedule() -> None:
    faults = ["cut", "kill", "pause"]
    assert schedule(7, faults, 10.0) == schedule(7, faults, 10.0)
    assert schedule(7, faults, 10.0) != schedule(8, faults, 10.0)
    assert schedule(7, faults, 0.0)  # never none
