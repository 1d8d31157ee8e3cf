"""Redis' side of a comparison: many counters, or many holds, at one moment, and where in the journal that moment is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from inventory_sdk.errors import InventoryError
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.wire import NotExecuted, ReplyLost


@dataclass(frozen=True, slots=True)
class Counters:
    """``available`` and ``reserved`` run along the fields asked for, None where Redis has none. ``state`` is ``open``, or why the
    partition is not: then nothing can be compared. ``fields``: how many there are in all."""

    epoch: int
    sequence: int
    state: str
    fields: int
    available: list[int | None]
    reserved: list[int | None]


@dataclass(frozen=True, slots=True)
class Holds:
    """Records and ends (ms) run along the keys asked for, None where Redis has none."""

    epoch: int
    sequence: int
    state: str
    now_ms: int
    records: list[str | None]
    due: list[int | None]


async def _read(partition: Partition, name: str, keys: Sequence[str], arguments: Sequence[str]) -> Any:
    try:
        return await partition.wire.run(name, [partition.key(key) for key in keys], arguments)
    except ReplyLost as error:
        raise NotExecuted(str(error)) from error  # it reads: asking again is the same


async def read_counters(partition: Partition, fields: Sequence[str]) -> Counters:
    """``Overloaded`` where Redis does not answer."""
    epoch, sequence, state, there, available, reserved = await _read(partition, "compare", ("meta", "available", "reserved"), fields)

    def numbers(values: Sequence[Any]) -> list[int | None]:
        return [None if value is None else _number(partition, name, value) for name, value in zip(fields, values, strict=True)]

    return Counters(int(epoch or 0), int(sequence), state.decode() or "missing", int(there), numbers(available), numbers(reserved))


def _number(partition: Partition, name: str, value: bytes) -> int:
    try:
        return int(value)
    except ValueError:
        raise InventoryError(
            f"{partition.key('available')}, field {name!r}: {value!r} is not a whole number, somebody wrote it by hand"
        ) from None


async def read_holds(partition: Partition, keys: Sequence[str]) -> Holds:
    """``Overloaded`` where Redis does not answer."""
    epoch, sequence, state, now, records, due = await _read(partition, "holds", ("meta", "reservations", "expiry"), keys)
    return Holds(
        int(epoch or 0),
        int(sequence),
        state.decode() or "missing",
        int(now),
        [None if record is None else bytes(record).decode() for record in records],
        [None if score is None else int(float(score)) for score in due],
    )


async def remembered(partition: Partition, keys: Sequence[str]) -> list[bool]:
    """Whether Redis remembers these operations."""
    found = [False] * len(keys)
    for window in ("results:0", "results:1"):
        for start in range(0, len(keys), 500):
            values: Any = await partition.wire.client.hmget(partition.key(window), list(keys[start : start + 500]))
            for at, value in enumerate(values, start):
                found[at] = found[at] or value is not None
    return found
