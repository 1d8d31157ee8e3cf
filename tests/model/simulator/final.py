"""The end state, counted to the unit once everything is quiet: the ledger alone, Redis against it, and every acknowledged call."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from inventory_sdk.errors import ReservationNotFound
from inventory_sdk.ledger.decide import CHANGE, OPERATION
from inventory_sdk.model import Layout, Receipt
from tests.model.simulator.auditor import EFFECTS, TAKES, Attempt, Auditor, Place
from tests.model.simulator.redis import runtime

if TYPE_CHECKING:
    from tests.model.simulator.world import World

_AT = {name: OPERATION.index(name) for name in OPERATION}
_CHANGE = {name: CHANGE.index(name) for name in CHANGE}
BEYOND = {
    "redis": {"emptied", "rolled_back", "failed_over"},
    "replica": {"emptied", "rolled_back"},
    "aof": {"emptied", "failed_over"},
    "queue": set[str](),
    "database": set[str](),
}
"""What each level does not survive."""
ONCE = (*TAKES, "confirm", "release", "reacquire", "restock", "take_back")
"""Kinds whose id has one effect."""
COUNTERS = ("available", "reserved", "sold", "supplied", "written_off")


def redis_command(world: World, *words: str) -> Any:
    """Ask the Redis that goes on, past the network."""
    server = world.redis
    fine, reply, _, _ = runtime().out[b"command"](
        server.state, server.now_ms(), 0, server.run_id.encode(), b"", *[word.encode() for word in words]
    )
    assert fine, reply
    return runtime().plain(reply)


def redis_hash(world: World, partition: int, name: str) -> dict[str, str]:
    """One of a partition's hashes."""
    flat = redis_command(world, "HGETALL", f"{{sim:{partition}}}:{name}")
    return {key.decode(): value.decode() for key, value in zip(flat[::2], flat[1::2], strict=True)}


def unquiet(world: World, layout: Layout) -> str:
    """What still moves, in words; empty when all is quiet."""
    tables = world.database.tables
    for partition in range(layout.partitions):
        rows = {epoch: row for epoch, row in tables.epochs.get(partition, {}).items() if epoch > 0}
        meta = redis_hash(world, partition, "meta")
        if not rows or not meta:
            return f"partition {partition} was never opened"
        newest = max(rows)
        state, applied = rows[newest]
        if state != "open" or meta.get("state") != "open" or meta["epoch"] != str(newest) or meta["run_id"] != world.redis.run_id:
            return f"partition {partition}: ledger {newest} {state}, Redis {meta}, server {world.redis.run_id}"
        if int(meta["seq"]) != applied:
            return f"partition {partition}: {newest}-{meta['seq']} is journaled, {newest}-{applied} applied"
        for (p, seq), credit in tables.credits.items():
            if p == partition and credit[3] == "pending":
                return f"credit {seq} of partition {partition} is pending"
        for place, void in tables.voids.items():
            if place[0] == partition and void[5] == "pending":
                return f"void {place} is pending"
        now = str(world.redis.now_ms())
        if due := redis_command(world, "ZRANGEBYSCORE", f"{{sim:{partition}}}:expiry", "1", now):
            return f"partition {partition}: {due} are due"
        for key, text in redis_hash(world, partition, "reservations").items():
            if why := _unfollowed(world, layout, partition, key, text):
                return why
        if messages := world.broker.line(partition).unsettled():
            # Late entries of an epoch that is over are gathered for a while, unacknowledged.
            return f"partition {partition}: {messages} messages are not acknowledged"
    return ""


PART = "\x1fpart\x1f"


def _open(text: str) -> dict[str, int]:
    """What a hold's record in Redis still holds, by field; lines of other partitions under their plain field."""
    parts = text.split("\x1e")
    lines: dict[str, int] = {}
    for field, numbers in zip(parts[5::2], parts[6::2], strict=True):
        original, *rest = (int(number) for number in numbers.split("/"))
        lines[field.rpartition("\x1d")[2]] = original - sum(rest)
    return lines


def _unfollowed(world: World, layout: Layout, partition: int, key: str, text: str) -> str:
    """Whether this is a part that its call does not hold (any more), or not this preparation of it: somebody has to bring it in line."""
    call, found, _ = key.rpartition(PART)
    if not found:
        return f"hold {key!r} is pinned" if text.startswith("p") else ""
    home = layout.home(call)
    decided = redis_hash(world, home, "reservations").get(call)
    if decided is None:
        return f"part {key!r} is open, its call is not"
    mark = text.split("\x1e")[1]
    if not world.forgets and (partition, mark) not in _named(world, call):
        return f"part {key!r} was prepared at {mark}, its call decided on {sorted(_named(world, call))}"
    wanted, there = _open(decided), _open(text)
    return "" if all(wanted.get(field) == units for field, units in there.items()) else f"part {key!r} has {there}, its call {wanted}"


def _named(world: World, call: str) -> set[tuple[int, str]]:
    """The preparations that a call was decided on, by partition and position, as far as the ledger has it."""
    row = world.database.tables.claims.get(call)
    _, _, *parts = json.loads(row[_AT["receipt"]]) if row is not None else (None, None)
    return {(number, mark) for number, mark, _, _ in parts[0]} if parts else set()


def audit(world: World, partitions: int) -> None:
    """All of it; raises ``Violation``."""
    auditor = world.auditor
    _ledger(world)
    _entries(world)
    _parts(world)
    for partition in range(partitions):
        _redis(world, partition)
    for attempt in auditor.attempts:
        if attempt.state == "done":
            _survived(world, attempt)
        elif attempt.state == "refused":
            _moved_nothing(world, attempt)
    auditor.must(not auditor.unacknowledged_loss, f"acknowledged to the broker before the commit: {auditor.unacknowledged_loss}")


def _ledger(world: World) -> None:
    """Promise 6, and that nothing moved which nobody asked for."""
    auditor, tables = world.auditor, world.database.tables
    totals: dict[str, list[int]] = {}
    stands: dict[str, str] = {}
    takes = {
        (f"{row[_AT['merchant']]}\x1f{row[_AT['operation_id']]}", row[_AT["fingerprint"]]): row[_AT["kind"]]
        for row in tables.operations.values()
        if row[_AT["kind"]] in TAKES
    }
    for place, row in tables.operations.items():
        kind, status = row[_AT["kind"]], row[_AT["status"]]
        flat = json.loads(row[_AT["receipt"]])[0]
        name = f"{kind} {row[_AT['merchant']]}/{row[_AT['operation_id']]!r} at {place}"
        if status == "duplicate":
            auditor.must(auditor.branches or world.forgets, f"{name} was accepted twice, and no Redis was lost")
            auditor.must(kind not in ("credit", "void"), f"{name} was made twice in Redis")
        if status == "rejected" and kind not in ("extend", "keep", "pin", "resume"):
            # A part whose call was repeated beyond the window is voided with it, and what followed it is refused.
            apart = world.forgets and PART in f"\x1f{row[_AT['operation_id']]}"
            why = row[_AT["reason"]]
            auditor.must(auditor.branches or apart, f"{name} was rejected by the ledger ({why}), and no Redis was lost")
        if status not in ("applied", "undone"):
            continue
        if status == "applied" and kind in ONCE:
            first = stands.setdefault(f"{row[_AT['merchant']]}\x1f{row[_AT['operation_id']]}", name)
            auditor.must(first == name, f"{name} stands, and {first} too")
        effect = _effect(row, takes)
        if effect is None:
            continue
        for field, quantity in zip(flat[::2], flat[1::2], strict=True):
            total = totals.setdefault(field, [0] * 5)
            for at, per_unit in enumerate(effect):
                total[at] += per_unit * quantity
        _asked(auditor, row, _whole(row), name)
    for field, stock in tables.stock.items():
        found = list(stock.after()[:5])
        auditor.must(found == totals.get(field, [0] * 5), f"{field!r}: the ledger says {found}, its operations sum to {totals.get(field)}")
        auditor.must(min(found) >= 0, f"{field!r}: {dict(zip(COUNTERS, found, strict=True))} is below zero")
        available, reserved, sold, supplied, written_off = found
        auditor.must(supplied == available + reserved + sold + written_off, f"{field!r}: supplied {supplied} is not accounted for: {found}")
    _chains(world)
    held: dict[str, int] = {}
    for hold in tables.holds.values():
        for field, counts in hold.lines.items():
            auditor.must(counts[0] == counts[1] + counts[2] + counts[3], f"hold {hold.key!r}: {counts}")
            held[field] = held.get(field, 0) + counts[1]
    for field, stock in tables.stock.items():
        auditor.must(stock.reserved == held.get(field, 0), f"{field!r}: {stock.reserved} reserved, holds have {held.get(field, 0)}")


def _whole(row: list[Any]) -> list[Any]:
    """All lines of a row, those in other partitions included."""
    flat, _, *parts = json.loads(row[_AT["receipt"]])
    rows = list(zip(flat[::2], flat[1::2], strict=True))
    for part in parts[0] if parts else ():
        rows += zip(part[2][::2], part[2][1::2], strict=True)
    return [value for pair in sorted(rows) for value in pair]


def _parts(world: World) -> None:
    """All lines or none, over several partitions: a decided take has every part that it names, and a part that stands is named."""
    auditor, tables = world.auditor, world.database.tables
    standing: dict[tuple[str, int, str], list[Any]] = {}
    named: set[tuple[str, int, str]] = set()
    for place, row in tables.operations.items():
        key = f"{row[_AT['merchant']]}\x1f{row[_AT['operation_id']]}"
        if row[_AT["kind"]] == "reserve" and PART in key and row[_AT["status"]] == "applied":
            standing[key.rpartition(PART)[0], place[0], f"{place[1]}-{place[2]}"] = row
    for row in tables.operations.values():
        if row[_AT["kind"]] not in TAKES or row[_AT["status"]] != "applied" or row[_AT["epoch"]] == 0:
            continue
        key = f"{row[_AT['merchant']]}\x1f{row[_AT['operation_id']]}"
        _, _, *parts = json.loads(row[_AT["receipt"]])
        for number, mark, flat, _ in parts[0] if parts else ():
            named.add((key, number, mark))
            part = standing.get((key, number, mark))
            if part is None:
                epoch, _, sequence = mark.partition("-")
                gone = auditor.is_forgotten((number, int(epoch), int(sequence)))
                if not gone and world.forgets:
                    # Given up once its result was forgotten, the part was released and not undone: its name is taken in the ledger, and
                    # the part of a repeat is voided there.
                    auditor.tolerated["part of a repeat beyond the window"] += 1
                    continue
                auditor.must(gone, f"{row[_AT['kind']]} {key!r} was decided, and its part {flat} at {number}/{mark} does not stand")
                auditor.tolerated["part lost with its Redis"] += 1
            else:
                auditor.must(json.loads(part[_AT["receipt"]])[0] == flat, f"{key!r} names {flat} at {number}/{mark}, {part} stands")
    for place in standing.keys() - named:
        hold = tables.holds.get(f"{place[0]}{PART}{place[1]}")
        # One that was given up after its result was forgotten is released instead of undone.
        released = hold is not None and hold.state in ("released", "expired")
        if not released and world.forgets:
            # Beyond the window home's repeat is voided, and a part that had followed it stands.
            auditor.tolerated["part of a voided repeat"] += 1
            continue
        auditor.must(released, f"part {place} stands in the ledger, and no call has decided on it")


def _effect(row: list[Any], takes: dict[tuple[str, str], str]) -> tuple[int, ...] | None:
    kind = row[_AT["kind"]]
    if kind == "undo":
        if not json.loads(row[_AT["receipt"]])[0]:
            return None  # of a take that went with a named loss
        return tuple(-each for each in EFFECTS[takes[row[_AT["reference"]], row[_AT["fingerprint"]]]])
    if kind == "adjust" and row[_AT["epoch"]] == 0:
        return EFFECTS["restock"]
    return EFFECTS.get(kind)


def _asked(auditor: Auditor, row: list[Any], flat: list[Any], name: str) -> None:
    kind, key = row[_AT["kind"]], f"{row[_AT['merchant']]}\x1f{row[_AT['operation_id']]}"
    if "\x1f" in row[_AT["operation_id"]] or kind in (
        "expire",
        "reacquire",
        "undo",
        "tombstone",
        "keep",
        "extend",
        "correct",
        "credit",
        "void",
    ):
        return
    if kind == "release" and not flat and auditor.lost:
        return  # of a hold that went with a named loss: nothing was left to release
    for attempt in auditor.attempts:
        if attempt.kind == kind and attempt.key in (None, key) and attempt.flat in (None, flat) and not attempt.bad:
            return
    auditor.fail(f"{name} of {flat} stands in the ledger, and nobody asked for it")


def _chains(world: World) -> None:
    auditor, tables = world.auditor, world.database.tables
    by_field: dict[str, list[tuple[Any, ...]]] = {}
    for change in tables.changes:
        by_field.setdefault(f"{change[0]}\x1f{change[1]}", []).append(change)
    for field, stock in tables.stock.items():
        before = (0, 0, 0, 0, 0)
        for version, change in enumerate(sorted(by_field.get(field, ()), key=lambda row: row[2]), 1):
            auditor.must(change[2] == version, f"{field!r}: change {version} is missing, {change[2]} is there")
            begins = tuple(change[_CHANGE[f"{name}_before"]] for name in COUNTERS)
            moved = tuple(change[_CHANGE[f"{name}_delta"]] for name in COUNTERS)
            after = tuple(change[_CHANGE[f"{name}_after"]] for name in COUNTERS)
            auditor.must(begins == before, f"{field!r}: change {version} begins at {begins}, the one before ended at {before}")
            auditor.must(tuple(a + b for a, b in zip(begins, moved, strict=True)) == after, f"{field!r}: change {version} does not add up")
            before = after
        auditor.must(before == tuple(stock.after()[:5]), f"{field!r}: the chain ends at {before}, the row is {stock.after()}")


def _entries(world: World) -> None:
    """Every applied entry has the rows of exactly one entry that some Redis wrote, or is named as lost."""
    auditor, tables = world.auditor, world.database.tables
    rows: dict[Place, list[list[Any]]] = {}
    for place, row in sorted(tables.operations.items()):
        rows.setdefault(place[:3], []).append(row)
    for place, (nonce, _) in tables.entries.items():
        if place[1] == 0:
            continue
        if nonce == "":
            auditor.must(place in auditor.lost, f"{place} was passed over and not named as lost")
            auditor.must(place not in rows, f"{place} is lost and has rows")
            continue
        (entry,) = [each for each in auditor.entries[place] if each.nonce == nonce]
        asked = [(op[0], op[1]) for op in entry.operations]
        found = [_journaled(auditor, row) for row in rows.get(place, [])]
        auditor.must(asked == found, f"{place}: journaled {asked}, the ledger has {found}")
    for partition, epochs in tables.epochs.items():
        for epoch, (_, applied) in epochs.items():
            if epoch:
                there = {sequence for p, e, sequence in tables.entries if (p, e) == (partition, epoch)}
                auditor.must(there == set(range(1, applied + 1)), f"{partition}/{epoch}: watermark {applied}, entries {sorted(there)}")


def _journaled(auditor: Auditor, row: list[Any]) -> tuple[str, str]:
    """Kind and key as the journal had them: a confirm whose reserve went with a named loss takes for itself what that had taken."""
    key = f"{row[_AT['merchant']]}\x1f{row[_AT['operation_id']]}"
    kind = row[_AT["kind"]]
    written = {op[0] for entry in auditor.entries[tuple(row[:3])] for op in entry.operations if op[1] == key}
    return ("confirm" if kind == "reacquire" and auditor.lost and kind not in written else str(kind), key)


def _redis(world: World, partition: int) -> None:
    """Promise 5 at rest: nothing is on its way, so the two are equal."""
    auditor, tables = world.auditor, world.database.tables
    available, reserved = redis_hash(world, partition, "available"), redis_hash(world, partition, "reserved")
    for field, value in available.items():
        row = tables.stock.get(field)
        auditor.must(row, f"{field!r} is in Redis and not in the ledger")
        assert row is not None
        found = (int(value), int(reserved.get(field, "0")))
        auditor.must(
            found == (row.available, row.reserved),
            f"{field!r}: Redis {found}, ledger {(row.available, row.reserved)} (available, reserved)",
        )
    frozen = redis_hash(world, partition, "frozen")
    if frozen:
        auditor.must(auditor.branches, f"{sorted(frozen)} are frozen, and no Redis was lost")
        auditor.tolerated["frozen"] += len(frozen)
    holds = redis_hash(world, partition, "reservations")
    live = {hold.key: hold for hold in tables.holds.values() if hold.state == "held" and hold.partition == partition}
    auditor.must(set(holds) == set(live), f"holds in Redis {sorted(holds)}, in the ledger {sorted(live)}")
    scores = {key.decode() for key in redis_command(world, "ZRANGEBYSCORE", f"{{sim:{partition}}}:expiry", "1", "1e18")}
    for key, text in holds.items():
        lines = _open(text)
        wanted = {field: counts[1] for field, counts in live[key].lines.items()}
        wanted.update((field, counts[2]) for field, counts in live[key].foreign.items())
        auditor.must(lines == wanted, f"hold {key!r}: Redis has {lines} open, the ledger {wanted}")
        timed = bool(live[key].expires_at) or live[key].pinned
        auditor.must(timed == (key in scores), f"hold {key!r}: {'has' if timed else 'has no'} end in the ledger, Redis says otherwise")
    auditor.must(scores <= set(holds), f"ends without a hold: {sorted(scores - set(holds))}")


def _survived(world: World, attempt: Attempt) -> None:
    """An acknowledged operation is where its level promised it."""
    auditor, tables = world.auditor, world.database.tables
    receipt = attempt.receipt
    assert receipt is not None
    key = f"{receipt.merchant}\x1f{receipt.operation_id}"
    place: Place = tuple(receipt.positions[0])  # type: ignore[assignment]
    rows = [row for at, row in tables.operations.items() if at[:3] == place and f"{row[4]}\x1f{row[5]}" == key]
    where = f"{attempt}, acknowledged at {receipt.durability}"
    standing = tables.claims.get(key)
    if not rows and standing is not None and len(auditor.entries.get(place, ())) > 1:
        # The other side of a fork: it came late, and was taken up again where the ledger goes on.
        auditor.must(_whole(standing) == flat_of(receipt), f"{where}, stands with other lines: {standing}")
        auditor.tolerated["taken up again elsewhere"] += 1
        return
    forgotten = {entry.lost_by for entry in auditor.entries.get(place, ())} - {""}
    if world.anonymous and (not rows or rows[0][_AT["status"]] == "rejected"):
        # Nothing fences one server from another here, so both may have sold: what the ledger can't cover is named; a loss that no
        # process has seen is not, where the level does not survive it.
        unseen = forgotten & BEYOND[receipt.durability]
        auditor.must(key in auditor.rejected or unseen, f"{where}, is gone and was not named")
        auditor.tolerated["sold on both sides, or lost unseen"] += 1
        return
    if not rows:
        auditor.must(forgotten & BEYOND[receipt.durability], f"{where}, is not in the ledger at {place}")
        state, applied = tables.epochs[place[0]][place[1]]
        auditor.must(place in auditor.lost or (state == "closed" and place[2] > applied), f"{where}, is gone and its sequence not named")
        return
    (row,) = rows
    status = row[_AT["status"]]
    if status == "undone":
        auditor.must(auditor.undone[key], f"{where}, was undone and nobody asked for that")
    elif status == "duplicate":
        hold = tables.holds.get(key)
        if key not in tables.claims and hold is not None and hold.state == "released" and not hold.lines and place[1] > 1:
            auditor.tolerated["tombstone forgotten by a rebuild"] += 1
            return
        if key not in tables.claims and hold is not None and place[1] > 1:
            # The reserve went with a named loss, and its end was taken up again: it names a hold that nothing took.
            auditor.tolerated["hold known by its end only"] += 1
            return
        auditor.must(key in tables.claims or world.forgets, f"{where}, was voided as a duplicate of nothing")
    elif status == "rejected":
        # What leans on an entry that its Redis lost can't stand either, where its level does not survive that.
        beyond = BEYOND[receipt.durability]
        lost = any(entry.lost_by in beyond for entries in auditor.entries.values() for entry in entries)
        auditor.must(lost, f"{where}, was rejected")
        auditor.tolerated[f"rejected {receipt.durability}"] += 1


def flat_of(receipt: Receipt) -> list[Any]:
    """A receipt's lines by field."""
    return [value for line in receipt.lines for value in (f"{line.merchant}\x1f{line.sku}", abs(line.quantity))]


def _moved_nothing(world: World, attempt: Attempt) -> None:
    """A refusal moved nothing: under its id nothing stands, unless another call of that id got through or may have."""
    auditor, tables = world.auditor, world.database.tables
    if attempt.key is None or attempt.kind not in (*TAKES, "confirm", "release", "restock", "take_back"):
        return
    if any(other.key == attempt.key and other.state != "refused" for other in auditor.attempts):
        return
    row = tables.claims.get(attempt.key)
    if row is not None and attempt.kind == "release" and isinstance(attempt.error, ReservationNotFound):
        # It left a tombstone, and that has met the hold elsewhere: its entry was taken up again behind the reserve.
        auditor.tolerated["tombstone that met its hold"] += 1
        return
    auditor.must(row is None, f"{attempt} was refused ({attempt.error!r}), and stands in the ledger at {row and row[:4]}")
