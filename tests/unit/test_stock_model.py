"""Random batches against a model of one partition in plain Python: every answer, counter and record after every step.

The seed is printed; INVENTORY_TEST_SEED repeats a run.
"""

from __future__ import annotations

import asyncio
import os
import random
import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from inventory_sdk.model import fingerprint, key_of
from tests.stock_kit import MERCHANT, SERVERS, Shop, shop_on

SEED = int(os.environ.get("INVENTORY_TEST_SEED", "0")) or random.SystemRandom().getrandbits(32)
EXAMPLES = int(os.environ.get("INVENTORY_TEST_EXAMPLES", "0")) or 60
RS = "\x1e"
STOCKED = {"a": 6, "b": 3}
SKUS = (*STOCKED, "unknown")
NAMES = ("n0", "n1", "n2")


@dataclass
class Hold:
    state: str
    mark: str
    fingerprint: str
    expires_at: int
    order: str
    lines: dict[str, list[int]]
    """By field: original, confirmed, released, expired."""

    def open(self, name: str) -> int:
        original, *gone = self.lines.get(name, [0])
        return original - sum(gone)

    def text(self) -> str:
        flat = []
        for name, amounts in self.lines.items():
            flat += [name, "/".join(map(str, amounts)) if any(amounts[1:]) else str(amounts[0])]
        one = [f"r{amounts[0]} {name}" for name, amounts in self.lines.items()]
        print_ = "" if self.state in "hp" and one == [self.fingerprint] else self.fingerprint
        return RS.join([self.state, self.mark, print_, str(self.expires_at), self.order, *flat])


@dataclass
class Result:
    fingerprint: str
    mark: str
    remaining: list[int]
    order: str = ""
    lines: list[Any] | None = None
    kept: bool = False

    def text(self) -> str:
        text = RS.join([self.fingerprint, self.mark, "k" if self.kept else "", ",".join(map(str, self.remaining))])
        if self.lines is not None:
            return RS.join([text, self.order, *map(str, self.lines)])
        return f"{text}{RS}{self.order}" if self.order else text


@dataclass
class Model:
    """What the rules say, one operation after the other."""

    available: dict[str, int]
    reserved: dict[str, int]
    results: dict[str, Result] = field(default_factory=dict)
    closed: dict[str, Hold] = field(default_factory=dict)
    old_results: dict[str, Result] = field(default_factory=dict)
    old_closed: dict[str, Hold] = field(default_factory=dict)
    holds: dict[str, Hold] = field(default_factory=dict)
    expiry: dict[str, int] = field(default_factory=dict)
    sequence: int = 0
    taken: list[tuple[str, str, str, list[Any], str]] = field(default_factory=list)
    """(kind, key, fingerprint, lines, mark) of every take that was ever accepted."""
    now: int = 0
    mark: str = ""

    def batch(self, operations: list[list[Any]], now: int) -> list[list[Any]]:
        self.now, self.mark = now, f"1-{self.sequence + 1}"
        answers = [getattr(self, operation[0])(operation) for operation in operations]
        if any(answer[0] <= 0 for answer in answers):
            self.sequence += 1
        return answers

    def rotate(self) -> None:
        self.old_results, self.old_closed, self.results, self.closed = self.results, self.closed, {}, {}

    def result(self, key: str) -> Result | None:
        return self.results.get(key) or self.old_results.get(key)

    def ended(self, key: str) -> Hold | None:
        return self.closed.get(key) or self.old_closed.get(key)

    def forget(self, key: str) -> None:
        self.results.pop(key, None)
        self.old_results.pop(key, None)

    def seen(self, operation: list[Any]) -> list[Any] | None:
        known = self.result(operation[1])
        if known is None:
            return None
        return [1, known.text()] if known.fingerprint == operation[2] else [2]

    def uncovered(self, lines: list[Any]) -> list[Any] | None:
        pairs = list(zip(lines[::2], lines[1::2], strict=True))
        unknown = [name for name, _ in pairs if name not in self.available]
        if unknown:
            return [4, *unknown]
        short = [value for name, asked in pairs if self.available[name] < asked for value in (name, asked, self.available[name])]
        return [3, *short] if short else None

    def move(self, lines: list[Any], available: int, reserved: int) -> list[int]:
        for name, quantity in zip(lines[::2], lines[1::2], strict=True):
            self.available[name] += available * quantity
            self.reserved[name] = self.reserved.get(name, 0) + reserved * quantity
        return [self.available[name] for name in lines[::2]]

    def deduct(self, operation: list[Any]) -> list[Any]:
        kind, key, mark, lines, order = operation[:5]
        answer = self.seen(operation) or self.uncovered(lines)
        if answer:
            return answer
        remaining = self.move(lines, -1, 0)
        self.results[key] = Result(mark, self.mark, remaining, order)
        self.taken.append((kind, key, mark, lines, self.mark))
        return [0, *remaining]

    adjust = deduct

    def reserve(self, operation: list[Any]) -> list[Any]:
        kind, key, mark, lines, order, _, ttl = operation[:7]
        answer, hold, ended = self.seen(operation), self.holds.get(key), self.ended(key)
        if answer == [2]:
            return answer
        if hold:
            return [2] if hold.fingerprint != mark else answer or [1, RS.join([hold.fingerprint, hold.mark, "", "", hold.order])]
        if ended:
            return answer if answer and ended.state == "c" else [6, ended.state]
        answer = answer or self.uncovered(lines)
        if answer:
            return answer
        remaining = self.move(lines, -1, +1)
        due = self.now + ttl if ttl else 0
        self.holds[key] = Hold("h", self.mark, mark, due, order, {n: [q, 0, 0, 0] for n, q in zip(lines[::2], lines[1::2], strict=True)})
        self.timed(key, due)
        self.results[key] = Result(mark, self.mark, remaining, order)
        self.taken.append((kind, key, mark, lines, self.mark))
        return [0, *remaining]

    def timed(self, key: str, due: int) -> None:
        self.expiry.pop(key, None)
        if due:
            self.expiry[key] = due

    def close(self, hold: Hold, key: str, lines: list[Any], column: int) -> list[int]:
        for name, quantity in zip(lines[::2], lines[1::2], strict=True):
            hold.lines[name][column] += quantity
        remaining = self.move(lines, 0 if column == 1 else 1, -1)
        if not any(hold.open(name) for name in hold.lines):
            hold.state = "hcrx"[column]
            del self.holds[key]
            self.expiry.pop(key, None)
            self.closed[key] = hold
        return remaining

    def confirm(self, operation: list[Any]) -> list[Any]:
        kind, key, mark, asked, order, reference, _, _, _, flag = operation
        column = 1 if kind == "confirm" else 2
        answer = self.seen(operation)
        if answer:
            return answer
        hold, ended = self.holds.get(reference), self.ended(reference)
        if hold is None and ended is not None:
            if column == 1 and ended.state == "x" and "r" in flag:
                return self.reacquire(operation, ended)
            return [6, ended.state]
        if hold is None:
            if "t" not in flag:
                return [7]
            self.closed[reference] = Hold("r", self.mark, "", 0, "", {})
            return [-1, [], [], order]
        if hold.state == "p" and "d" not in flag:
            return [10]
        lines = asked or [value for name in hold.lines if hold.open(name) for value in (name, hold.open(name))]
        over = [v for n, q in zip(lines[::2], lines[1::2], strict=True) if q > hold.open(n) for v in (n, q, hold.open(n))]
        if over:
            return [9, *over]
        remaining = self.close(hold, reference, lines, column)
        self.results[key] = Result(mark, self.mark, remaining, order or hold.order, None if asked else lines)
        return [-1, remaining, lines, order or hold.order]

    release = confirm

    def reacquire(self, operation: list[Any], ended: Hold) -> list[Any]:
        lines = [value for name, amounts in ended.lines.items() if amounts[3] for value in (name, amounts[3])]
        answer = self.uncovered(lines)
        if answer:
            return answer
        remaining = self.move(lines, -1, 0)
        for amounts in ended.lines.values():
            amounts[1], amounts[3] = amounts[1] + amounts[3], 0
        ended.state = "c"
        self.closed[operation[5]] = ended
        self.results[operation[1]] = Result(operation[2], self.mark, remaining, operation[4] or ended.order, lines)
        return [-1, remaining, lines, operation[4] or ended.order]

    def expire(self, operation: list[Any]) -> list[Any]:
        key = operation[5]
        hold = self.holds.get(key)
        if hold is None:
            self.expiry.pop(key, None)
            return [7]
        due = self.expiry.get(key, 0)
        if not due or due > self.now:
            return [12, due]
        if hold.state == "p":
            return [10]
        lines = [value for name in hold.lines if hold.open(name) for value in (name, hold.open(name))]
        return [-1, self.close(hold, key, lines, 3), lines, hold.order]

    def extend(self, operation: list[Any]) -> list[Any]:
        kind, key, ttl = operation[0], operation[5], operation[6]
        hold, ended = self.holds.get(key), self.ended(key)
        if hold is None:
            return [6, ended.state] if ended else [7]
        if kind == "extend" and hold.state == "p":
            return [10]
        hold.state = "p" if kind == "pin" else "h"
        hold.expires_at = ttl if kind == "pin" else self.now + ttl if ttl else 0
        self.timed(key, self.now + int(operation[8]) if kind == "pin" else hold.expires_at)
        return [0]

    pin = resume = extend

    def undo(self, operation: list[Any]) -> list[Any]:
        key, mark, print_, lines, kind = operation[5], operation[8], operation[2], operation[3], operation[9]
        known, hold = self.result(key), self.holds.get(key)
        if known is None or (known.fingerprint, known.mark) != (print_, mark) or known.kept:
            return [11]
        if kind == "reserve":
            if not hold or (hold.mark, hold.fingerprint) != (mark, print_):
                return [11]
            if hold.state == "p":
                return [10]
            if any(sum(amounts[1:]) for amounts in hold.lines.values()):
                return [11]
        remaining = self.move(lines, +1, -1 if kind == "reserve" else 0)
        if kind == "reserve":
            del self.holds[key]
            self.expiry.pop(key, None)
        self.forget(key)
        return [0, *remaining]

    def keep(self, operation: list[Any]) -> list[Any]:
        key, mark = operation[5], operation[8]
        known, hold = self.result(key), self.holds.get(key)
        if known is None and hold and hold.mark == mark:
            return [1, ""]  # nothing can undo it any more
        if known is None and key in self.holds and self.holds[key].mark == mark:
            return [1, ""]
        if known is None or known.mark != mark:
            return [11]
        if known.kept:
            return [1, known.text()]
        known = Result(known.fingerprint, known.mark, known.remaining, known.order, known.lines, kept=True)
        self.results[key] = known
        return [0]

    def credit(self, operation: list[Any]) -> list[Any]:
        _, key, mark, lines, order, reference = operation[:6]
        answer = self.seen(operation)
        if answer:
            return answer
        unknown = [name for name in lines[::2] if name not in self.available]
        if unknown:
            return [4, *unknown]
        remaining = self.move(lines, +1, 0)
        self.results[key] = Result(mark, self.mark, remaining, order)
        if reference and self.result(reference) is None:
            self.results[reference] = Result("entered", self.mark, remaining, order)
        return [0, *remaining]

    def correct(self, operation: list[Any]) -> list[Any]:
        pairs = [value for at in range(0, len(operation[3]), 3) for value in operation[3][at : at + 2]]
        return self.credit([*operation[:3], pairs, *operation[4:]])


# What is tried ---------------------------------------------------------------------------------------------------------------

names = st.sampled_from(NAMES)
some_lines = st.dictionaries(st.sampled_from(SKUS[:2] * 3 + SKUS[2:]), st.integers(1, 3), min_size=1, max_size=2)
known_lines = st.dictionaries(st.sampled_from(tuple(STOCKED)), st.integers(1, 3), min_size=1, max_size=2)
orders = st.sampled_from(["", "77"])
which = st.integers(0, 5)
operations = st.one_of(
    st.tuples(st.sampled_from(["reserve", "reserve", "deduct", "adjust"]), names, some_lines, orders, st.sampled_from([0, 60_000])),
    st.tuples(
        st.sampled_from(["confirm", "release"]), names, st.none() | known_lines, st.sampled_from(["", "s0", "s1", *NAMES]),
        st.sampled_from(["", "r", "t", "d"]),
    ),
    st.tuples(st.just("expire"), names),
    st.tuples(st.sampled_from(["extend", "resume", "pin"]), names, st.sampled_from([0, 60_000])),
    st.tuples(st.sampled_from(["undo", "keep"]), which),
    st.tuples(st.sampled_from(["credit", "correct"]), st.integers(0, 2), known_lines, st.sampled_from(["", *NAMES])),
)  # fmt: skip
steps = st.lists(
    st.one_of(st.lists(operations, min_size=1, max_size=6), st.tuples(st.just("due"), names), st.just(("rotate",))), min_size=1, max_size=14
)


def flat_of(quantities: dict[str, int]) -> list[Any]:
    return [value for sku in sorted(quantities) for value in (key_of(MERCHANT, sku), quantities[sku])]


def built(step: list[tuple[Any, ...]], model: Model) -> list[list[Any]]:
    """Batch operations as the SDK would write them."""
    made: list[list[Any]] = []
    for kind, *values in step:
        if kind in ("reserve", "deduct", "adjust"):
            flat = flat_of(values[1])
            ttl = values[3] if kind == "reserve" else 0
            made.append([kind, key_of(MERCHANT, values[0]), fingerprint(kind, "", flat), flat, values[2], "", ttl, "", "", ""])
        elif kind in ("confirm", "release"):
            target, asked, name, flag = values
            hold, flat = key_of(MERCHANT, target), flat_of(asked or {})
            mine = key_of(MERCHANT, name or f"{target}\x1f{kind}")
            # Only the whole can be reacquired or leave a tombstone.
            made.append([kind, mine, fingerprint(kind, hold, flat), flat, "", hold, 0, "", "", "" if asked and flag in "rt" else flag])
        elif kind == "expire":
            key = key_of(MERCHANT, values[0])
            made.append([kind, f"{key}\x1fexpire", "", [], "", key, 0, "", "", ""])
        elif kind in ("extend", "resume", "pin"):
            key = key_of(MERCHANT, values[0])
            made.append([kind, f"{key}\x1fx", "", [], "", key, values[1], "", "60000" if kind == "pin" else "", ""])
        elif kind in ("undo", "keep"):
            if not model.taken:
                continue
            how, key, print_, flat, mark = model.taken[-1 - values[0] % len(model.taken)]
            if kind == "undo":
                made.append([kind, f"{key}\x1fundo", print_, flat, "", key, 0, "", mark, how])
            else:
                made.append([kind, f"{key}\x1fkeep", "", [], "", key, 0, "", mark, ""])
        else:
            reference = key_of(MERCHANT, values[2]) if values[2] and kind == "credit" else ""
            flat = flat_of(values[1])
            if kind == "correct":
                flat = [value for at in range(0, len(flat), 2) for value in (flat[at], flat[at + 1], 0)]
            made.append([kind, key_of(MERCHANT, f"\x1f{kind}\x1f{values[0]}"), kind, flat, "", reference, 0, "", "", ""])
    return made


def overlaid(old: dict[str, str], current: dict[str, str]) -> dict[str, str]:
    """What of the older window counts: the current one hides the rest."""
    return {key: text for key, text in old.items() if key not in current}


async def state(shop: Shop) -> dict[str, Any]:
    client: Any = shop.client

    async def table(name: str) -> dict[str, str]:
        return {key.decode(): value.decode() for key, value in (await client.hgetall(shop.key(name))).items()}

    meta = await table("meta")
    current = meta["window"]
    return {
        "available": await table("available"),
        "reserved": {name: value for name, value in (await table("reserved")).items() if value != "0"},
        "holds": await table("reservations"),
        "results": await table(f"results:{current}"),
        "old results": overlaid(await table(f"results:{1 - int(current)}"), await table(f"results:{current}")),
        "expiry": {key.decode(): int(score) for key, score in await client.zrange(shop.key("expiry"), 0, -1, withscores=True)},
        "sequence": int(meta["seq"]),
    }


def expected(model: Model) -> dict[str, Any]:
    def window(results: dict[str, Result], closed: dict[str, Hold]) -> dict[str, str]:
        return {key: known.text() for key, known in results.items()} | {f"{key}\x1f": hold.text() for key, hold in closed.items()}

    return {
        "available": {name: str(value) for name, value in model.available.items()},
        "reserved": {name: str(value) for name, value in model.reserved.items() if value},
        "holds": {key: hold.text() for key, hold in model.holds.items()},
        "results": window(model.results, model.closed),
        "old results": overlaid(window(model.old_results, model.old_closed), window(model.results, model.closed)),
        "expiry": model.expiry,
        "sequence": model.sequence,
    }


async def play(server: str, steps: list[Any]) -> None:
    async with shop_on(server, f"t{uuid.uuid4().hex[:12]}", STOCKED, results_window=0.0) as shop:
        model = Model({key_of(MERCHANT, sku): quantity for sku, quantity in STOCKED.items()}, {})
        supplied = sum(STOCKED.values())
        for step in steps:
            if step == ("rotate",):
                await shop.engine.upkeep.rotate(0)
                model.rotate()
            elif isinstance(step, tuple):
                key = key_of(MERCHANT, step[1])
                await shop.client.zadd(shop.key("expiry"), {key: 1}, xx=True)
                if key in model.expiry:
                    model.expiry[key] = 1
            else:
                batch = built(step, model)
                if not batch:
                    continue
                # Real Redis prints an empty list as {}.
                answers = [[[] if value == {} else value for value in answer] for answer in await shop.run(*batch)]
                entries = await shop.engine.upkeep.read_journal(0, 1, model.sequence, None, 2)
                now = 10
                if entries:
                    now = (await shop.journal())[-1].at_ms
                wanted = model.batch(batch, now)
                assert answers == wanted, f"{batch}"
                assert len(entries) == any(answer[0] <= 0 for answer in wanted)
                credited = zip(batch, wanted, strict=True)
                for op, answer in credited:
                    if op[0] in ("credit", "correct") and answer[0] == 0:
                        supplied += sum(op[3][1 :: 3 if op[0] == "correct" else 2])
            found = await state(shop)
            assert found == expected(model), f"after {step}"
            assert all(value >= 0 for value in [*model.available.values(), *model.reserved.values()])
            assert sum(model.available.values()) + sum(model.reserved.values()) <= supplied


@pytest.mark.parametrize("server", SERVERS)
def test_every_batch_answers_and_writes_what_the_rules_say(server: str) -> None:
    print(f"INVENTORY_TEST_SEED={SEED}")  # noqa: T201 - shown with a failure

    @seed(SEED)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(steps)
    def run(steps: list[Any]) -> None:
        asyncio.run(play(server, steps))

    run()
