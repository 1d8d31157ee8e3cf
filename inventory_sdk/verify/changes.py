"""What a function says that it changed: ``Change`` objects that it returns, or ``record_change`` calls beside its writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Final

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import check_text

Key = tuple[str, str]
"""(merchant, sku)."""

MOVED: Final = "moved"
"""The one counter of a function that reports its changes itself."""


@dataclass(frozen=True, slots=True)
class Change:
    """One change of one SKU, in signed units: ``moved`` in the stock, ``logged`` in its change-log row; either may be reported alone.

    ``merchant``: another shop than the call's.
    """

    sku: str
    moved: int | None = None
    logged: int | None = None
    merchant: str | None = None

    def __post_init__(self) -> None:
        check_text("sku", self.sku)
        if self.merchant is not None:
            check_text("merchant", self.merchant)
        if self.moved is None and self.logged is None:
            raise InvalidOperation("moved", None, f"say what changed: moved=, logged= or both (sku {self.sku!r})")
        for name, units in (("moved", self.moved), ("logged", self.logged)):
            if units is not None and type(units) is not int:
                raise InvalidOperation(name, units, f"must be a whole number (sku {self.sku!r})")


@dataclass(slots=True)
class Found:
    """What was found to have happened: units per line and counter, units per line in the change log, and what else is wrong."""

    moved: dict[tuple[Key, str], int] = field(default_factory=dict)
    logged: dict[Key, int] = field(default_factory=dict)
    wrong: list[tuple[str, int, int]] = field(default_factory=list)

    def move(self, key: Key, counter: str, units: int) -> None:
        """So many units more."""
        self.moved[key, counter] = self.moved.get((key, counter), 0) + units

    def log(self, key: Key, units: int) -> None:
        """A change-log row of so many units."""
        self.logged[key] = self.logged.get(key, 0) + units

    def add(self, other: Found) -> None:
        """All that ``other`` has."""
        for (key, counter), units in other.moved.items():
            self.move(key, counter, units)
        for key, units in other.logged.items():
            self.log(key, units)
        self.wrong += other.wrong


class Recording:
    """The changes of one verified call while it runs."""

    __slots__ = ("changes", "ended", "parent")

    def __init__(self, parent: Recording | None) -> None:
        self.parent = parent
        self.changes: list[Change] = []
        self.ended = False


_recording: ContextVar[Recording | None] = ContextVar("inventory_recording", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Collect what is recorded in this context. A block that ends well passes it on to the one around it; one that raises has moved
    nothing, so nothing of it counts there."""
    mine = Recording(_recording.get())
    token = _recording.set(mine)
    try:
        yield mine
    except BaseException:
        mine.ended = True
        raise
    finally:
        _recording.reset(token)
    mine.ended = True
    if mine.parent is not None:
        mine.parent.changes += mine.changes


def record_change(sku: str, *, moved: int | None = None, logged: int | None = None, merchant: str | None = None) -> None:
    """Tell the verified call around this what was just written: ``moved`` signed units of stock, ``logged`` in a change-log row.

    Call it beside each write, in the function or in anything that it calls or gathers. Without a verified call around it does
    nothing. ``InvalidOperation`` for no quantity, one that is not a whole number, or a call that has ended already.
    """
    change = Change(sku, moved, logged, merchant)
    current = _recording.get()
    if current is None:
        return
    if current.ended:
        raise InvalidOperation("record_change", sku, "comes too late: the verified call has ended, and a task of it still writes")
    current.changes.append(change)


def found_in(changes: Iterable[Change], merchant: str) -> Found:
    """The changes summed per line; ``merchant`` is the call's."""
    found = Found()
    for change in changes:
        if not isinstance(change, Change):
            raise InvalidOperation("changes", change, "must be inventory_sdk.Change objects")
        key = (change.merchant or merchant, change.sku)
        if change.moved is not None:
            found.move(key, MOVED, change.moved)
        if change.logged is not None:
            found.log(key, change.logged)
    return found
