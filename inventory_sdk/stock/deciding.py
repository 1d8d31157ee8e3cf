"""What became of a call over several partitions: home is asked, its parts follow, and what nobody decided is given up.

The only place where such a call is decided is the journal of its home partition. Everybody who comes across a part (its
coordinator, the worker behind the coordinator, whoever finds it overdue) goes the same way:

1. read home in Redis, in one step: decided, and on this very preparation of the part?
2. wait until the ledger has applied home's journal up to that reading; then ask it what Redis does not know (any more);
3. still undecided: write a tombstone for this preparation into home's journal. The script that writes it and the script that
   decides exclude each other, so one of them wins for good;
4. bring the part in line: undo it, or let it follow.

Each step may be repeated by anyone at any time, in any order.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from inventory_sdk.errors import InventoryError
from inventory_sdk.model import Kind, Position, fingerprint
from inventory_sdk.stock import reading
from inventory_sdk.stock.batch import CLOSED, DONE, DONE_LINES, NOT_FOUND, REPLAY, TOO_LATE
from inventory_sdk.stock.parts import HOLD_ON, WRITE_OFF, Instance, call_of, part_key, plain
from inventory_sdk.stock.records import RS, read_result, write_reservation
from inventory_sdk.stock.together import together

if TYPE_CHECKING:
    from inventory_sdk.stock.engine import Engine
    from inventory_sdk.stock.partition import Partition
    from inventory_sdk.stock.reading import Reading

PART_OVERDUE_MS: Final = 15_000
"""A part whose call has not been decided by then is resolved by whoever finds it."""
LOOK_AGAIN_MS: Final = 300_000
"""A part that is held on looks at home at least this often, so that it ends even if every follower died."""
WATERMARK_WAIT: Final = 5.0
"""Seconds that a resolver waits for the ledger to apply home's journal; then it leaves the part to the next one."""

Amounts = tuple[int, int, int]
"""Confirmed, released, expired."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What home decided: on which preparations; ``kept``: for good; ``lines``: field → what is closed of it, for a reservation.
    ``expires_at``: Redis milliseconds, 0: until closed."""

    instances: tuple[Instance, ...]
    kept: bool
    lines: Mapping[str, Amounts] | None
    expires_at: int


@dataclass(frozen=True, slots=True)
class Part:
    """A part that is still open in its partition, as its record says. ``meaning``: see ``parts``; ``lines``: field → open."""

    instance: Instance
    key: str
    meaning: int
    mark: str
    lines: Mapping[str, tuple[int, int]]
    """Field → (original, open)."""

    @property
    def flat(self) -> list[Any]:
        return [value for field, (original, _) in self.lines.items() for value in (field, original)]


async def look(engine: Engine, partition: Partition, key: str) -> Part | None:
    """The part as it stands in Redis; None when it is closed or gone."""
    client: Any = partition.wire.client
    record = await client.hget(partition.key("reservations"), key)
    if record is None or not record.startswith(b"p"):
        return None
    _, mark, content, meaning, _, *flat = record.decode().split(RS)
    lines: dict[str, tuple[int, int]] = {}
    for field, numbers in zip(flat[::2], flat[1::2], strict=True):
        original, *closed = [int(number) for number in numbers.split("/")]
        lines[field] = (original, original - sum(closed))
    return Part(Instance(partition.number, mark), key, int(meaning), content, lines)


async def decision(engine: Engine, key: str, *, patient: bool = True) -> tuple[Decision | None, bool]:
    """Home's decision on the call ``key``, and whether that is certain.

    ``patient``: waits until the ledger has applied all that the reading includes, so what is followed can't be lost behind us,
    and what is absent is absent. Else Redis alone is asked.
    """
    home = engine.home(key)
    found = await reading.read(engine, home, operations=[key], reservations=[key])
    if patient and not await _applied(engine, home, found):
        return None, False
    record, hold = found.results[0], found.reservations[0]
    if record is not None:
        result = read_result(record)
        instances, kept = result.parts, result.kept
    elif not patient:
        return None, False
    else:
        row = await engine.ledger.operation(key)
        if row is None:
            return None, True
        # Without its record in Redis it can't be undone any more.
        instances = tuple(Instance(part[0], part[1]) for part in row.parts if part[1])
        kept = True
    if patient and (hold is None or not _amounts(hold)):
        # Also where Redis has but a tombstone, of a close that came after it had forgotten the hold.
        stored = await engine.ledger.reservation(key)
        hold = write_reservation(stored) if stored is not None else None
    if hold is None:
        return Decision(instances, kept, None, 0), True
    return Decision(instances, kept, _amounts(hold), _expires_at(hold)), True


async def _applied(engine: Engine, home: Partition, found: Reading) -> bool:
    give_up = asyncio.get_running_loop().time() + WATERMARK_WAIT
    while True:
        row = await engine.ledger.partition(home.number)
        if row is None or row.epoch != found.epoch:
            return False
        if row.applied >= found.sequence:
            return True
        if asyncio.get_running_loop().time() > give_up:
            return False
        await asyncio.sleep(0.02)


def _amounts(hold: str) -> dict[str, Amounts]:
    parts = hold.split(RS)
    found: dict[str, Amounts] = {}
    for field, numbers in zip(parts[5::2], parts[6::2], strict=True):
        _, confirmed, released, expired = ([int(number) for number in numbers.split("/")] + [0, 0, 0])[:4]
        found[plain(field)[0]] = (confirmed, released, expired)
    return found


def _expires_at(hold: str) -> int:
    # A pinned record has what a resume gives it there, and not a time.
    return int(hold.split(RS)[3]) if hold.startswith("h") else 0


async def resolve(engine: Engine, partition: Partition, key: str, journaled: str | None = None) -> bool:
    """Bring the part ``key`` in line with its call; False when that can't be told now (the ledger is behind, or away).

    ``journaled``: the part's position in a journal entry of home that decided or undid the call ("" where the entry closed some
    of it); another preparation is left alone, and so is a call that may still be undone. None: the part is overdue, nobody is
    expected to decide any more.
    """
    call = call_of(key)
    if call is None:
        raise InventoryError(f"{key!r} is not a part of a call over several partitions")
    part = await look(engine, partition, key)
    if part is None or (journaled and part.instance.mark != journaled):
        return True
    decided, certain = await decision(engine, call)
    if not certain:
        return False
    if decided is None or part.instance not in decided.instances:
        if journaled != "":
            await give_up(engine, call, [part])
        return True
    if part.meaning != HOLD_ON and not decided.kept:
        if journaled is not None:
            return True
        if not await keep(engine, call, part.instance):
            return False  # undone meanwhile: the next look finds that
    await follow(engine, part, decided)
    return True


async def keep(engine: Engine, call: str, instance: Instance) -> bool:
    """From now on the call can't be undone; False if it was."""
    home = engine.home(call)
    found = (await reading.read(engine, home, operations=[call])).results[0]
    if found is None:
        return False
    result = read_result(found)
    if instance not in result.parts:
        return False
    operation: list[Any] = ["keep", f"{call}\x1fkeep", "", [], "", call, 0, "", f"{result.epoch}-{result.sequence}", ""]
    answer, _ = await engine.send(home, operation)
    return bool(answer[0] != TOO_LATE)


async def give_up(engine: Engine, call: str, parts: Sequence[Part]) -> list[Instance]:
    """Tombstones at home for these preparations, then undo them; those that a decision was quicker to name are answered and
    stand."""
    home = engine.home(call)
    left, named = list(parts), list[Instance]()
    while left:
        marks = [[part.instance.partition, part.instance.mark] for part in left]
        operation: list[Any] = ["abort", f"{call}\x1fabort", "", [], "", call, 0, "", "", "", marks]
        answer, _ = await engine.send(home, operation)
        if answer[0] == REPLAY and answer[1]:
            decided = set(read_result(answer[1]).parts)
            named += [part.instance for part in left if part.instance in decided]
            left = [part for part in left if part.instance not in decided]
            continue
        if answer[0] not in (DONE, DONE_LINES, REPLAY):
            raise InventoryError(f"the parts of {call!r} could not be given up: {answer}")
        break
    await together(undo(engine, part) for part in left)
    return named


async def undo(engine: Engine, part: Part) -> None:
    """Give one preparation back and free the part's id. Only for one that was given up at home."""
    partition = engine.partitions[part.instance.partition]
    extra = json.dumps({"of": "reserve", "position": part.instance.mark})
    operation: list[Any] = [
        "undo", f"{part.key}\x1fundo", part.mark, part.flat, "", part.key, 1, extra, part.instance.mark, "reserve",
    ]  # fmt: skip
    answer, _ = await engine.send(partition, operation)
    if answer[0] == TOO_LATE:
        # Its result has been forgotten, so it can't be undone by name: the hold is released, if it is this one.
        await _send_follow(engine, part, [value for field, (original, _) in part.lines.items() for value in (field, 0, original, 0)])
    elif answer[0] not in (DONE, DONE_LINES):
        raise InventoryError(f"part {part.key!r} could not be undone: {answer}")


async def follow(engine: Engine, part: Part, decided: Decision) -> Position | None:
    """Let the part come up to what home decided, and look again when home's time is over; where it moved, if it did."""
    position = None
    target: list[Any] = []
    for field, (original, _) in part.lines.items():
        if part.meaning != HOLD_ON:
            target += (field, original, 0, 0)
        elif decided.lines is not None:
            target += (field, *decided.lines.get(field, (0, 0, 0)))
    if any(value for at, value in enumerate(target) if at % 4):
        position = await _send_follow(engine, part, target)
    if part.meaning == HOLD_ON:
        await _look_again(engine, part, decided.expires_at)
    return position


async def _send_follow(engine: Engine, part: Part, target: list[Any]) -> Position | None:
    flag = "a" if part.meaning == WRITE_OFF and any(target[1::4]) else ""
    operation: list[Any] = ["follow", f"{part.key}\x1ffollow", "", [], "", part.key, 0, "", part.instance.mark, flag, target]
    answer, batch = await engine.send(engine.partitions[part.instance.partition], operation)
    if answer[0] not in (DONE, DONE_LINES, REPLAY, CLOSED, NOT_FOUND, TOO_LATE):
        raise InventoryError(f"part {part.key!r} can't follow: {answer}")
    return batch.position if answer[0] <= DONE else None


async def _look_again(engine: Engine, part: Part, expires_at: int) -> None:
    partition = engine.partitions[part.instance.partition]
    now = (await partition.hello()).now_ms
    due = now + LOOK_AGAIN_MS
    if expires_at:
        due = min(due, max(now, expires_at) + PART_OVERDUE_MS)
    client: Any = partition.wire.client
    await client.zadd(partition.key("expiry"), {part.key: due}, xx=True)


async def follow_call(engine: Engine, call: str, *, patient: bool) -> list[Position]:
    """All parts of one call that home has decided on; where they moved. ``patient``: see ``decision``."""
    decided, certain = await decision(engine, call, patient=patient)
    if decided is None or not certain:
        return []

    async def one(instance: Instance) -> Position | None:
        part = await look(engine, engine.partitions[instance.partition], part_key(call, instance.partition))
        if part is None or part.instance != instance or (part.meaning != HOLD_ON and not decided.kept):
            return None
        return await follow(engine, part, decided)

    return [position for position in await together(one(each) for each in decided.instances) if position is not None]


def part_fingerprint(kind: str, flat: Sequence[Any]) -> str:
    """Stands for what the part takes and what a commit of its call means."""
    return fingerprint(Kind.RESERVE, f"part of {kind}", flat)
