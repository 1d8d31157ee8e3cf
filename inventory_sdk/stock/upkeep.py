"""What the worker does to Redis: reads the journal, makes credits and voids, expires holds, turns and trims, freezes and rebuilds."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from redis.exceptions import OutOfMemoryError

from inventory_sdk.errors import InventoryError, StockFrozen, UnknownStock
from inventory_sdk.ledger.protocol import Credit, EpochClosed, Ledger, Rebuilding, Void
from inventory_sdk.model import JournalOperation, fingerprint, key_of, split_key
from inventory_sdk.stock.batch import AWAY, CLOSED, DONE, DONE_LINES, NOT_FOUND, NOT_LOADED, OVER, PIN, REPLAY, Answer, read_entries
from inventory_sdk.stock.givers import sweep
from inventory_sdk.stock.partition import Partition
from inventory_sdk.stock.records import PIN_OVERDUE_MS, RS, write_memory, write_reservation
from inventory_sdk.stock.resubmit import SETTLED, late_verdict, lost_part, resubmission
from inventory_sdk.stock.together import together
from inventory_sdk.stock.wire import NotExecuted, ReplyLost

KEEP_APPLIED_MS: Final = 600_000
"""Applied journal entries stay this long, so that a ledger that went back is noticed and can be caught up."""
HEARTBEAT_MS: Final = 10_000
CHUNK: Final = 1000
RECENT_MS: Final = 600_000
"""Results this young are restored before a partition opens: a caller that repeats does so within minutes."""


@dataclass(frozen=True, slots=True)
class JournalState:
    """A partition as its Redis master reports it, read in one step.

    ``state``: ``open``, ``frozen`` or ``rebuilding`` (being recovered), ``missing`` (no meta: first start or emptied Redis; epoch
    and sequence are 0). ``sequence`` is the last entry that was written, ``oldest_kept_sequence`` the oldest of this epoch that is
    still in the stream (None: the stream has none). ``run_id_known``: it is the server process that the partition was opened on.
    ``now_ms`` is Redis' clock. ``applied``: the highest watermark of the ledger that Redis was told. ``state`` ``suspect``: a
    caller's process closed it because of ``why`` (``went_back``, ``fork``), having seen the entry ``seen``."""

    epoch: int
    sequence: int
    state: str
    run_id_known: bool
    oldest_kept_sequence: int | None
    now_ms: int
    applied: int = 0
    why: str = ""
    seen: int = 0


@dataclass(frozen=True, slots=True)
class Expired:
    """What one expiry did: ``keys`` (merchant, reservation) are expired now, ``pinned`` are overdue and wait for their decider."""

    keys: Sequence[str]
    pinned: Sequence[str] = ()


class Submits(Protocol):
    """Sends one internal operation through the group commit."""

    async def __call__(self, partition: Partition, operation: list[Any]) -> Answer: ...


Resolve = Callable[[Partition, str, str | None], Awaitable[bool]]
"""See ``deciding.resolve``."""


class Upkeep:
    """The worker's side of stock, in one event loop."""

    def __init__(
        self,
        partition: Callable[[int], Partition],
        submit: Submits,
        load: Callable[[Partition, Sequence[str]], Awaitable[Sequence[str]]],
        results_window: float,
        results_most: int,
        journal_most: int,
        resolve: Resolve | None = None,
    ) -> None:
        self._resolve = resolve
        self._partition = partition
        self._submit = submit
        self._load = load
        self._window_ms = str(int(results_window * 1000))
        self._most = str(results_most)
        self._journal_most = str(journal_most)

    async def journal_state(self, partition: int) -> JournalState:
        """Ask Redis now. ``StockFrozen`` where stock is told apart in another way by now than in this process."""
        view = self._partition(partition)
        hello = await view.hello()
        view.same_layout(hello)
        state = hello.state or "missing"
        epoch = hello.epoch or 0
        return JournalState(
            epoch, hello.sequence, state, hello.run_id_kept, hello.oldest, hello.now_ms, hello.applied, hello.why, hello.seen
        )

    async def read_journal(self, partition: int, epoch: int, after: int, upto: int | None, count: int) -> list[tuple[int, str]]:
        """Entries of an epoch after a sequence, up to one (None: the end), at most ``count``: (sequence, body)."""
        entries = await read_entries(self._partition(partition), epoch, after, upto, count)
        return [(sequence, body.decode()) for sequence, body in entries]

    async def read_back(self, partition: int, epoch: int, upto: int, count: int) -> list[tuple[int, str]]:
        """The last ``count`` entries of an epoch up to a sequence, newest first: (sequence, body)."""
        view = self._partition(partition)
        found = await self._client(view).xrevrange(view.key("journal"), f"{epoch}-{upto}", f"{epoch}-1", count=count)
        return [(int(bytes(name).partition(b"-")[2]), fields[b"b"].decode()) for name, fields in found]

    async def resubmit(self, partition: int, epoch: int, operation: JournalOperation, at_ms: int) -> str:
        """A late operation once more, under its id, in the open epoch: "" when it stands (or never had to), else why it was
        refused, in a word. ``StockFrozen`` when ``epoch`` is not the open one; ``Overloaded`` for what passes by itself."""
        if lost_part(operation):
            return "part"
        batched = resubmission(operation, at_ms)
        if batched is None:
            return "" if operation.kind in SETTLED else "unknown_kind"
        try:
            return late_verdict(await self._make(partition, epoch, batched, later=True))
        except UnknownStock:
            return "unknown_stock"

    async def void(self, partition: int, epoch: int, void: Void) -> None:
        """The exact inverse of a refused entry, once; ``StockFrozen`` when its epoch is not the open one."""
        mark = f"{void.position.epoch}-{void.position.sequence}"
        name = f"{mark}-{void.index}"
        merchant = split_key(void.key)[0]
        key = key_of(merchant, f"\x1fvoid\x1f{name}")
        reference = void.key if void.kind in ("reserve", "deduct", "adjust") else ""
        extra = json.dumps({"position": name})
        operation = ["void", key, "void", list(void.deltas), "", reference, 0, extra, mark, "f" if void.freeze else ""]
        await self._make(partition, epoch, operation)

    async def credit(self, partition: int, epoch: int, credit: Credit) -> None:
        """Raise the counters by what entered through the ledger, once; ``StockFrozen`` when its epoch is not the open one."""
        await self._make(partition, epoch, credit_operation(credit))

    async def correct(
        self, partition: int, epoch: int, key: str, units: tuple[str, int, int], reason: str, *, ledger: bool = False
    ) -> None:
        """Move the counters of (field, available, reserved) by so much, once under this key, journaled; the ledger stays as it is.
        ``ledger``: the other way round, for units that Redis has sold and the ledger does not know of. ``StockFrozen`` when the epoch
        is not the open one: then Redis was filled from the ledger anew."""
        extra = json.dumps({"reason": reason})
        await self._make(partition, epoch, ["correct", key, "correct", list(units), "", "", 0, extra, "", "l" if ledger else ""])

    async def _make(self, partition: int, epoch: int, operation: list[Any], later: bool = False) -> Answer:
        view = self._partition(partition)
        for _ in range(5):
            await view.known()
            if int(view.epoch) != epoch:
                raise StockFrozen(f"epoch {epoch} of partition {partition} is over, {view.epoch} is open", retry_after=0.5)
            answer = await self._submit(view, operation)
            code = answer[0][0]
            if code in (DONE, DONE_LINES, REPLAY) or (later and code != NOT_LOADED):
                return answer
            if code == OVER:
                raise StockFrozen(f"epoch {epoch} of partition {partition} is over", retry_after=0.5)
            if code != NOT_LOADED:
                raise InventoryError(f"{operation[0]} {operation[1]!r} was refused: {answer[0]}")
            if await self._load(view, answer[0][1:]):
                return answer  # the database sells it: nothing is owed to Redis any more
        raise InventoryError(f"{operation[0]} {operation[1]!r}: its stock does not stay loaded")

    async def due_expiries(self, partition: int, limit: int) -> list[str]:
        """Keys of reservations whose time has come, by Redis' clock, oldest first."""
        view = self._partition(partition)
        now = (await view.hello()).now_ms
        found = await self._client(view).zrangebyscore(view.key("expiry"), 1, now, start=0, num=limit)
        return [bytes(key).decode() for key in found]

    async def expire(self, partition: int, keys: Sequence[str]) -> Expired:
        """Expire those of these holds that are due; overdue pinned ones are left as they are and named."""
        view = self._partition(partition)

        async def expire(key: str) -> int:
            merchant, name = split_key(key)
            operation = ["expire", key_of(merchant, f"{name}\x1fexpire"), "", [], "", key, 0, "", "", ""]
            answer, _ = await self._settle(view, operation)
            return int(answer[0])

        codes = await together(expire(key) for key in keys)
        expired = [key for key, code in zip(keys, codes, strict=True) if code in (DONE, DONE_LINES)]
        pinned = [key for key, code in zip(keys, codes, strict=True) if code == PIN]
        return Expired(expired, pinned)

    async def settle_pin(self, partition: int, key: str, verdict: str) -> None:
        """Carry out what the decider of a pinned hold said. ``committed``: confirm it, or let it go on, as its pin says;
        ``aborted``: release it."""
        view = self._partition(partition)
        merchant, name = split_key(key)
        record = await self._client(view).hget(view.key("reservations"), key)
        if record is None or not record.startswith(b"p"):
            return  # its decider has spoken meanwhile
        resume = int(record.decode().split(RS)[3])
        kind = "release" if verdict == "aborted" else "confirm" if resume == 1 else "resume"
        act = key_of(merchant, f"{name}\x1f{kind}")
        mark = "" if kind == "resume" else fingerprint(kind, key, ())
        operation = [kind, act, mark, [], "", key, resume if kind == "resume" else 0, "", "", "d"]
        answer, _ = await self._settle(view, operation)
        if answer[0] in (AWAY, NOT_LOADED):
            return  # the ledger runs it now, or will in a moment
        if answer[0] not in (DONE, DONE_LINES, REPLAY, CLOSED, NOT_FOUND):
            raise InventoryError(f"pinned hold {name!r} of {merchant!r} could not be settled as {verdict}: {answer}")

    async def resolve_part(self, partition: int, key: str, journaled: str | None = None) -> bool:
        """Bring a part of a call over several partitions in line with its call; False: not now. See ``deciding.resolve``."""
        assert self._resolve is not None, "the engine gives it"
        return await self._resolve(self._partition(partition), key, journaled)

    async def _settle(self, view: Partition, operation: list[Any]) -> Answer:
        answer = await self._submit(view, operation)
        if answer[0][0] == NOT_LOADED:
            await self._load(view, answer[0][1:])
            answer = await self._submit(view, operation)
        return answer

    async def trim(self, partition: int, epoch: int, upto_sequence: int) -> None:
        """Entries up to this one are applied: they are no ``givers`` any more, and those older than ten minutes go, all of them where
        room is short."""
        await self._tidy(partition, epoch, upto_sequence)
        await sweep(self._partition(partition), epoch, upto_sequence)

    async def rotate(self, partition: int) -> None:
        """Start a new results window where the current one is full or old."""
        view = self._partition(partition)
        await view.known()
        await self._tidy(partition, int(view.epoch), 0)

    async def _tidy(self, partition: int, epoch: int, applied: int) -> None:
        view = self._partition(partition)
        keys = [view.key("meta"), view.key("results:0"), view.key("results:1"), view.key("journal")]
        arguments = [str(epoch), self._window_ms, self._most, str(applied), str(KEEP_APPLIED_MS), self._journal_most]
        await view.wire.run("tidy", keys, arguments)

    def _client(self, view: Partition) -> Any:
        return view.wire.client

    async def heartbeat(self, partition: int, worker: str) -> None:
        """A sign of life that lasts ten seconds."""
        view = self._partition(partition)
        client: Any = self._client(view)
        try:
            await client.set(view.key("worker"), f"{time.time():.3f} {worker}", px=HEARTBEAT_MS)
        except OutOfMemoryError:
            # A full Redis still lets an earlier sign live on, and callers that wait for the ledger must see it: it is what ends this.
            if not await client.pexpire(view.key("worker"), HEARTBEAT_MS):
                raise

    async def worker_seen(self, partition: int) -> float | None:
        """Seconds since a worker of this partition gave a sign of life; None: not in the last ten seconds."""
        view = self._partition(partition)
        remaining = await view.wire.client.pttl(view.key("worker"))
        return (HEARTBEAT_MS - int(remaining)) / 1000 if int(remaining) > 0 else None

    async def freeze(self, partition: int, epoch: int) -> None:
        """Close the partition under its new epoch; ``EpochClosed`` when a newer one stands there."""
        view = self._partition(partition)
        frozen = await self._again("freeze", view, [view.key("meta")], [str(epoch)])
        view.forget()
        if not frozen:
            raise EpochClosed(f"partition {partition} is past epoch {epoch}")

    async def rebuild(self, partition: int, epoch: int, rebuilding: Rebuilding, down_ms: int = 0) -> None:
        """Write balances, recent results and live reservations, then commit the ledger's side, then open: a Redis that accepts
        must find an open epoch in the ledger. Older results follow behind the opening (``restore_older``).

        Holds get the time back that nobody could use: since Redis was frozen, or ``down_ms`` where the worker missed it for
        longer. Each chunk is fenced by epoch, state and its number; ``EpochClosed`` when somebody else rebuilds.
        """
        view = self._partition(partition)
        chunks = _Chunks(view, epoch)
        await chunks.write("begin", [])
        async for balances in rebuilding.balances(CHUNK):
            await chunks.write("balances", [x for row in balances for x in (row.field, row.available, row.reserved)])
        recent = (await view.hello()).now_ms - min(RECENT_MS, int(self._window_ms))
        async for results in rebuilding.results(CHUNK, recent):
            await chunks.write("results", [x for row in results for x in write_memory(row)])
        hello = await view.hello()
        await rebuilding.extend(max(down_ms, hello.now_ms - hello.frozen_at))
        async for reservations in rebuilding.reservations(CHUNK):
            flat: list[Any] = []
            for row in reservations:
                due = hello.now_ms + PIN_OVERDUE_MS if row.pinned else row.expires_at
                flat += (row.key, write_reservation(row), due)
            await chunks.write("reservations", flat)
        await rebuilding.open()
        await chunks.write("open", [f"{recent},0,0", view.layout])
        view.forget()

    async def restore_older(self, partition: int, epoch: int, ledger: Ledger) -> bool:
        """One more chunk of the results that a rebuild left for behind its opening; False when there is none left, or somebody
        else wrote it. Any worker may; a chunk is written once."""
        view = self._partition(partition)
        hello = await view.hello()
        if not hello.older or hello.epoch != epoch or hello.state != "open":
            return False
        at_ms, of_epoch, sequence = map(int, hello.older.split(","))
        since = hello.now_ms - int(self._window_ms)
        found, before = await ledger.results(partition, since, (at_ms, of_epoch, sequence), CHUNK)
        values = [hello.older, ",".join(map(str, before)) if before is not None else ""]
        for row in found:
            values += write_memory(row)
        arguments = [str(epoch), "0", "older", json.dumps(values)]
        return bool(await view.wire.run("rebuild", view.keys[:9], arguments)) and before is not None

    async def _again(self, name: str, view: Partition, keys: Sequence[str], arguments: Sequence[str]) -> Any:
        """Freeze and rebuild scripts are fenced, so a lost reply is simply asked again."""
        for attempt in range(5):
            try:
                return await view.wire.run(name, keys, arguments)
            except (ReplyLost, NotExecuted):
                if attempt == 4:
                    raise
        raise AssertionError("unreachable")


class _Chunks:
    def __init__(self, view: Partition, epoch: int) -> None:
        self._view = view
        self._epoch = str(epoch)
        self._number = 0

    async def write(self, what: str, values: list[Any]) -> None:
        self._number += 1
        arguments = [self._epoch, str(self._number), what, json.dumps(values)]
        if not await self._view.wire.run("rebuild", self._view.keys[:9], arguments):
            raise EpochClosed(f"partition {self._view.number}: another process rebuilds, or epoch {self._epoch} is over")


def credit_operation(credit: Credit) -> list[Any]:
    """The batch operation that makes a credit; its id is the position of the operation that entered."""
    merchant = split_key(credit.key)[0]
    name = f"{credit.position.epoch}-{credit.position.sequence}"
    extra = json.dumps({"position": name})
    key = key_of(merchant, f"\x1fcredit\x1f{name}")
    return ["credit", key, "credit", list(credit.lines), "", credit.key, 0, extra, str(credit.epoch), ""]
