"""Mechanisms of the SDK, each of which can be switched off: what the simulator must notice."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

from inventory_sdk.ledger.decide import CLAIM, Verdicts
from inventory_sdk.running import Running
from inventory_sdk.stock import spanning
from inventory_sdk.stock.givers import Givers
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.waits import Waits
from inventory_sdk.stock.wire import script
from inventory_sdk.sync import recovery
from inventory_sdk.sync.buffer import Buffer
from inventory_sdk.sync.follower import Follower
from tests.model.simulator.broker import SimQueue
from tests.model.simulator.ledger import SimLedger


@dataclass(frozen=True)
class Mutation:
    """``what``: the mechanism, in words. ``begin`` enters the patches that take it away."""

    what: str
    begin: Callable[[ExitStack], None]


XADD = "  call('XADD', KEYS[10], position, 'b', body, unpack(ARGV, 8))\n"


def _lua(name: str, *changes: tuple[str, str]) -> Callable[[ExitStack], None]:
    """A script with some of its text replaced; every piece must be there, so that a mutation can't rot unseen."""

    def begin(stack: ExitStack) -> None:
        target = script(name)
        text = target.text
        for old, new in changes:
            if text.count(old) < 1:
                raise LookupError(f"{name}.lua has no {old!r} any more: bring the mutation up to date")
            text = text.replace(old, new)
        stack.enter_context(mock.patch.object(target, "text", text))
        stack.enter_context(mock.patch.object(target, "digest", hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()))

    return begin


def _attribute(owner: Any, name: str, value: Any) -> Callable[[ExitStack], None]:
    return lambda stack: stack.enter_context(mock.patch.object(owner, name, value)) and None


def _no_claims(stack: ExitStack) -> None:
    """The ledger takes a repeated id for a new one."""

    def take(self: Verdicts, operation: Any, extra: Any) -> None:
        self.known.claims.pop(operation.key, None)
        original(self, operation, extra)

    original = Verdicts._take
    insert = SimLedger._insert

    def insert_freely(self: SimLedger, rows: Sequence[list[Any]]) -> None:
        for row in rows:
            self._tables.claims.pop(row[CLAIM], None)
        insert(self, rows)

    stack.enter_context(mock.patch.object(Verdicts, "_take", take))
    stack.enter_context(mock.patch.object(SimLedger, "_insert", insert_freely))


def _no_fork_check(stack: ExitStack) -> None:
    stack.enter_context(mock.patch.object(Buffer, "_same", return_value=None))
    sift = SimLedger._sift

    def blind(self: SimLedger, partition: int, epoch: int, entries: Any, lost: Any, applied: int) -> Any:
        seen = {entry.sequence: entry for entry in entries}
        fresh = [entry for entry in entries if entry.sequence > applied and seen[entry.sequence] is entry]
        new, gone, _ = sift(self, partition, epoch, fresh, lost, applied)
        return new, gone, len(entries) - len(fresh)

    stack.enter_context(mock.patch.object(SimLedger, "_sift", blind))
    # The worker's look at Redis' last entry and a recovery's search for the fork ask the ledger for what it has.
    stack.enter_context(mock.patch.object(SimLedger, "nonces", _always({})))


def _ack_first(stack: ExitStack) -> None:
    receive = Follower._receive

    async def acknowledge(self: Follower, consumer: Any, buffer: Any, messages: Any) -> None:
        await receive(self, consumer, buffer, messages)
        await self._at_queue(consumer.ack([message for message in messages if message.epoch == buffer.epoch and not message.marker]))

    stack.enter_context(mock.patch.object(Follower, "_receive", acknowledge))


def _no_gap_reading(stack: ExitStack) -> None:
    async def fill(self: Follower, buffer: Any, missing: int) -> None:
        """The journal is not asked for what is missing."""

    stack.enter_context(mock.patch.object(Follower, "_fill", fill))
    run = Buffer.run

    def over_gaps(self: Buffer, operations: int, after: int | None = None) -> Any:
        found = run(self, operations, after)
        if not found and self._entries:
            found = [self._entries[min(self._entries)]]
        return found

    stack.enter_context(mock.patch.object(Buffer, "run", over_gaps))
    stack.enter_context(mock.patch.object(SimLedger, "_sift", _sift_over_gaps))


def _sift_over_gaps(self: SimLedger, partition: int, epoch: int, entries: Any, lost: Any, applied: int) -> Any:
    new = sorted((entry for entry in entries if entry.sequence > applied), key=lambda entry: entry.sequence)
    between = [] if not new else [at for at in range(applied + 1, new[-1].sequence) if at not in {entry.sequence for entry in new}]
    return new, between, len(entries) - len(new)


async def _at_once() -> None:
    """Nothing."""


async def _answer(value: Any) -> Any:
    return value


def _always(value: Any) -> Callable[..., Any]:
    """A coroutine function that answers this, whatever it is asked."""
    return lambda *_, **__: _answer(value)


MUTATIONS: Final[dict[str, Mutation]] = {
    "results": Mutation(
        "the record of each operation id in Redis",
        _lua(
            "batch",
            (
                "local record = results[op[2]]\n  if not record then return nil end",
                "local record = nil\n  if not record then return nil end",
            ),
        ),
    ),
    "not_after": Mutation(
        "`not_after`: a script stuck in a dead connection refuses to run later",
        _lua("batch", ("if now > tonumber(ARGV[3]) then return refuse('late') end", "")),
    ),
    "xadd_first": Mutation(
        "XADD is the first write",
        _lua(
            "batch",
            ("  body = entry(journal)\n  call('XADD', KEYS[10], position, 'b', body, unpack(ARGV, 8))\n", "  body = entry(journal)\n"),
            (
                "  bulk('HSET', KEYS[4], set)\n",
                "  bulk('HSET', KEYS[4], set)\n  call('XADD', KEYS[10], position, 'b', body, unpack(ARGV, 8))\n",
            ),
        ),
    ),
    "cover": Mutation(
        "a take needs that much available",
        _lua(
            "batch",
            ("elseif there < asked then", "elseif there < -10 then"),
            ("if left and left >= lines[2] then", "if left and left >= lines[2] - 1 then"),
        ),
    ),
    "claims": Mutation("the unique claim of an id in the ledger", _no_claims),
    "forks": Mutation("the nonce at a known position is compared", _no_fork_check),
    "ack_after_commit": Mutation("a message is acknowledged after the commit", _ack_first),
    "gaps": Mutation("gaps are filled from the journal, never passed", _no_gap_reading),
    "run_id": Mutation(
        "the script and the worker know the server process that the partition was opened on",
        _lua("batch", ("if run_id ~= meta[4] or run_id ~= ARGV[2] then return refuse('run_id') end", "")),
    ),
    "epoch": Mutation(
        "the script refuses another epoch than the caller's", _lua("batch", ("if epoch ~= ARGV[1] then return refuse('epoch') end", ""))
    ),
    "outlive": Mutation(
        "after a lost reply nothing is sent again before the first script can't run any more",
        _attribute(Partition, "outlive", lambda *_: _at_once()),
    ),
    "owed_epoch": Mutation(
        "a credit or a void is made only in the epoch in which it is owed",
        _lua("batch", ("return op[9] ~= '' and string.match(op[9], '^%d+') ~= epoch end", "return false end")),
    ),
    "aborted": Mutation(
        "a decision on a part that was given up is refused",
        _lua("batch", ("if results[abort_name(op[2], op[11][j]) .. '\\31'] then return true end", "")),
    ),
    "part_level": Mutation(
        "the parts of a call reach its level before home decides", _attribute(spanning._Work, "_secure", _always(False))
    ),
    "givers": Mutation("a sale at queue also sends what gave it its stock", _attribute(Givers, "confirm", _always(0))),
    "waits": Mutation("replica and aof wait for the copies", _attribute(Waits, "_outcome", _always(""))),
    "queue_end": Mutation(
        "a recovery takes from the queue what Redis has lost", _attribute(recovery._Ending, "_receive_to_marker", _always(None))
    ),
    "verdict": Mutation("database answers for the operation, not for its position", _attribute(Running, "_verdict", _always(None))),
    "unbind": Mutation("an epoch that is over is unbound in the queue", _attribute(SimQueue, "unbind", lambda *_: _at_once())),
    "load_if_absent": Mutation(
        "a load writes only fields that are absent",
        _lua(
            "load",
            (
                "if redis.call('HSETNX', KEYS[2], list[i], string.format('%.0f', list[i + 1])) == 1 then",
                "if redis.call('HSET', KEYS[2], list[i], string.format('%.0f', list[i + 1])) >= 0 then",
            ),
        ),
    ),
}


@contextmanager
def switched_off(name: str | None) -> Iterator[None]:
    """Without the mechanism of this name; None: all as it is."""
    with ExitStack() as stack:
        if name is not None:
            MUTATIONS[name].begin(stack)
        yield
