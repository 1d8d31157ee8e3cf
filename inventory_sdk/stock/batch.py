"""Group commit: concurrent awaits in one event loop become one script call per partition and lane.

While one call is in flight the next batch gathers; there is no timer, so an idle caller waits for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic_core import from_json, to_json
from redis.exceptions import OutOfMemoryError, RedisClusterException, RedisError, ResponseError

from inventory_sdk import tracing
from inventory_sdk.errors import InventoryError, JournalFull, OutcomeUnknown, Overloaded, StockFrozen
from inventory_sdk.metrics.events import BatchSent, Metrics, Retried
from inventory_sdk.model import Position
from inventory_sdk.stock.journal import decode
from inventory_sdk.stock.partition import Hello, Partition
from inventory_sdk.stock.parts import as_replied
from inventory_sdk.stock.wire import NotExecuted, ReplyLost

if TYPE_CHECKING:
    from inventory_sdk.stock.givers import Givers
    from inventory_sdk.stock.waits import Waits

log = logging.getLogger("inventory_sdk.stock")

MAX_OPERATIONS: Final = 512
MAX_BATCH_LINES: Final = 1024
HALVE_ABOVE: Final = 128
"""A longer queue goes in two halves: Redis works on one while this process answers the callers of the other."""
GIVE_UP: Final = 10.0
"""Seconds that a batch is tried again on connection faults before its callers are told."""

DONE_LINES: Final = -1
"""Done, with what the call did not name: [-1, [remaining, …], [field, quantity, …], order]."""
(
    DONE,
    REPLAY,
    CONFLICT,
    SHORT,
    NOT_LOADED,
    FROZEN,
    CLOSED,
    NOT_FOUND,
    JOURNAL_FULL,
    NOT_OPEN,
    PIN,
    TOO_LATE,
    NOT_DUE,
    ASK_LEDGER,
    GIVEN_UP,
    OVER,
) = range(16)
"""Codes of the batch script's answers."""
AWAY: Final = 30
"""The database sells it, or is about to: [30, field, …]."""
_REASONS: Final = {
    CONFLICT: "conflict",
    SHORT: "insufficient",
    NOT_LOADED: "not_loaded",
    FROZEN: "frozen",
    CLOSED: "closed",
    NOT_FOUND: "not_found",
    JOURNAL_FULL: "journal_full",
    NOT_OPEN: "more_than_open",
    PIN: "pinned",
    TOO_LATE: "ended",
    NOT_DUE: "not_due",
    ASK_LEDGER: "forgotten",
    AWAY: "away",
    GIVEN_UP: "part_given_up",
    OVER: "epoch_over",
}

TAKES: Final = frozenset({"reserve", "deduct", "adjust"})
UNANSWERED: Final = frozenset({NOT_LOADED, PIN, ASK_LEDGER, AWAY})
"""Answers after which the same operation is asked again, here or elsewhere."""
GIVE: Final = frozenset({"release", "expire", "undo", "void"})
"""Kinds that make units available again, and are in the script's ``givers`` until they are confirmed."""
_PROCESS: Final = secrets.token_hex(4)
_NUMBERS: Final = count()

Publish = Callable[[int, int, int, str], Awaitable[Any]]
"""(partition, epoch, sequence, body) → an awaitable that ends when the queue has confirmed the entry."""


def new_nonce() -> str:
    """Unique per script call, over all processes."""
    return f"{_PROCESS}{next(_NUMBERS):x}"


class Answered:
    """What the callers of one batch share: where its entry stands, and what makes it durable. ``position`` is the partition's
    last one where nothing was journaled. ``confirmed`` is None where nothing was published. ``waited``: ends with "" when the
    level ``waited_for`` is reached for what the batch did, else with why not. ``givers``: what its sales at ``queue`` rest on,
    as the script said it; None: not known. ``given`` is the task that sees to it, once somebody asks."""

    __slots__ = ("confirmed", "given", "givers", "position", "waited", "waited_for")

    def __init__(
        self,
        position: Position,
        confirmed: Awaitable[Any] | None,
        givers: Sequence[str] | None = (),
        waited: asyncio.Task[str] | None = None,
        waited_for: str = "",
    ) -> None:
        self.position = position
        self.confirmed = confirmed
        self.givers = givers
        self.given: asyncio.Task[Exception | None] | None = None
        self.waited = waited
        self.waited_for = waited_for


Answer = tuple[list[Any], Answered]
"""One operation's answer from the script, and its batch."""


class _Waiting:
    __slots__ = ("future", "lines", "operation", "orphaned", "span")

    def __init__(self, operation: list[Any], future: asyncio.Future[Answer], orphaned: Callable[[Answer], None] | None) -> None:
        self.operation = operation
        self.future = future
        self.orphaned = orphaned
        self.lines = len(operation[3]) // 2
        self.span = None if tracing.active is None else tracing.active.asking(operation)


class _Sent(NamedTuple):
    """One try: what to look for in the journal if its reply is lost. ``after``: the last sequence known then; ``at``: monotonic."""

    nonce: str
    epoch: str
    after: int
    not_after: str
    at: float


class Begun(NamedTuple):
    """A batch of one, sent by its caller; ``reply`` is to be awaited."""

    sent: _Sent
    reply: Awaitable[Any]


class Batcher:
    """One lane's batches on one partition, in one event loop."""

    def __init__(
        self,
        partition: Partition,
        lane: str,
        metrics: Metrics,
        publish: Publish | None,
        journal_cap: int,
        on_refused: Callable[[int, str], None],
        waits: Waits,
        givers: Givers | None,
    ) -> None:
        self._waits = waits
        self._givers = givers
        self.partition = partition
        self.lane = lane
        self._metrics = metrics
        self._publish = publish
        self._journal_cap = str(journal_cap)
        self._on_refused = on_refused
        self._waiting: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None
        self._name = f"inventory batch {partition.number}/{lane}"
        self.alone = False
        """The last batch had one operation. Whoever comes now is most likely alone too, and is sent in the turn in which it comes."""
        self._unrecorded: list[BatchSent] = []
        self.answered: Callable[[str, bool], None] | None = None
        self._loop = asyncio.get_running_loop()

    def submit(self, operation: list[Any], orphaned: Callable[[Answer], None] | None = None) -> asyncio.Future[Answer]:
        """The script's answer to one operation, to be awaited by its one caller.

        Cancelled before the batch was cut: the operation leaves it. Cancelled afterwards: it runs, and ``orphaned`` gets its answer.
        """
        future: asyncio.Future[Answer] = self._loop.create_future()
        waiting = _Waiting(operation, future, orphaned)
        if self._task is not None:
            self._waiting.append(waiting)
        else:
            begun = self._begin(waiting) if self.alone else None
            self._waiting.append(waiting)
            self._task = self._loop.create_task(self._run(begun), name=self._name)
            self._task.add_done_callback(self._over)
        return future

    async def ask(self, operation: list[Any], orphaned: Callable[[Answer], None]) -> Answer:
        """``submit`` for a caller that may go away at any moment: ``orphaned`` also gets an answer that had come, but that its
        caller was cancelled before it could look at."""
        future = self.submit(operation, orphaned)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                orphaned(future.result())
            raise

    async def close(self) -> None:
        """Waits for what is under way: an operation that was sent gets its answer."""
        while self._task is not None:
            await asyncio.wait([self._task])
        self._record()

    def _begin(self, item: _Waiting) -> Begun | None:
        """Send it now, in its caller's turn of the event loop: nobody else waits. None: that is left to the task."""
        partition = self.partition
        if tracing.active is not None or self._waits.used or not partition.epoch or partition.checked != partition.wire.made:
            return None
        sent = self._try()
        return Begun(sent, partition.wire.run("batch", partition.keys, self._arguments([item], sent)))

    async def _run(self, begun: Begun | None = None) -> None:
        batch: list[_Waiting] = []
        try:
            if begun is not None:
                batch = [self._waiting.popleft()]
                await self._send(batch, begun)
            while self._waiting:
                batch = self._cut()
                if not batch:
                    continue
                self.alone = len(batch) == 1
                if tracing.active is None:
                    await self._send(batch)
                    continue
                with tracing.active.batch((item.span for item in batch), self.partition.number, self.lane, len(batch)):
                    await self._send(batch)
        except BaseException as error:
            # Whatever stops this task must reach every caller: nobody waits for ever.
            left = [*batch, *self._waiting]
            self._waiting.clear()
            _stopped(left, error)
            if not isinstance(error, Exception):
                raise
            log.exception("batch %s/%s stopped", self.partition.number, self.lane)
        finally:
            self._task = None
            if self._unrecorded:
                self._loop.call_soon(self._record_if_idle)

    def _over(self, task: asyncio.Task[None]) -> None:
        """The task has ended; where it was cancelled before its first step, its callers still wait."""
        if self._task is not task:
            return
        self._task = None
        left = list(self._waiting)
        self._waiting.clear()
        _stopped(left, asyncio.CancelledError())

    def _cut(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        lines = 0
        waiting = self._waiting
        most = min(MAX_OPERATIONS, max(HALVE_ABOVE, (len(waiting) + 1) // 2))
        while waiting and len(batch) < most:
            item = waiting[0]
            if item.future.done():  # its caller went away before it was sent
                waiting.popleft()
                continue
            lines += item.lines
            if batch and lines > MAX_BATCH_LINES:
                break
            waiting.popleft()
            batch.append(item)
        return batch

    async def _send(self, batch: list[_Waiting], begun: Begun | None = None) -> None:
        """Until every caller of the batch has an answer or an error. ``begun``: the first try was sent already."""
        partition = self.partition
        give_up = time.monotonic() + GIVE_UP
        started = time.perf_counter()
        pause = 0.01
        unsure = ""
        while True:
            try:
                if begun is None:
                    await partition.known()
                    if partition.checked != partition.wire.made:
                        await self._check_own()
                    sent = self._try()
                    arriving = None
                else:
                    sent, arriving = begun
                    begun = None
                try:
                    status = await self._call(batch, sent, started, arriving, unsure)
                except ReplyLost as lost:
                    self._metrics.record(Retried("redis", "reply_lost"))
                    batch = await self._recover(batch, sent, lost, give_up, started)
                    status = b"lost"
                    if not batch:
                        return
                    if not partition.run_id:
                        # Another server may have answered that nothing was done, and nothing here tells one from the other.
                        unsure = str(lost)
            except StockFrozen as error:
                self._on_refused(partition.number, "frozen")
                self._fail(batch, error, unsure=unsure)
                return
            except NotExecuted as error:
                self._metrics.record(Retried("redis", "not_executed"))
                partition.forget()
                if time.monotonic() > give_up:
                    self._fail(batch, Overloaded(str(error), retry_after=1.0), unsure=unsure)
                    return
            except OutOfMemoryError as error:
                self._fail(batch, JournalFull(f"Redis is out of memory: {error}", retry_after=1.0), unsure=unsure)
                return
            except ResponseError as error:
                self._fail(batch, InventoryError(f"Redis refused the batch script, nothing moved: {error}"), error, unsure=unsure)
                return
            else:
                if status == b"ok":
                    return
                if status == b"went_back":
                    self._on_refused(partition.number, "went_back")
                    with suppress(NotExecuted, ReplyLost):  # told before the next batch at the latest
                        await partition.report()
                    why = f"Redis went back in time below {sent.epoch}-{sent.after}; the partition is being recovered"
                    self._fail(batch, None, reason=why)
                    return
                if status in (b"missing", b"run_id"):
                    self._on_refused(partition.number, status.decode())
                    self._fail(batch, partition.frozen("empty" if status == b"missing" else "on another server process"), unsure=unsure)
                    return
                self._metrics.record(Retried("redis", status.decode()))
                if time.monotonic() > give_up:
                    self._fail(batch, Overloaded(f"partition {partition.number} keeps changing", retry_after=1.0), unsure=unsure)
                    return
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.25)

    def _try(self) -> _Sent:
        partition = self.partition
        return _Sent(new_nonce(), partition.epoch, partition.sequence, str(partition.not_after()), time.monotonic())

    def _arguments(self, batch: list[_Waiting], sent: _Sent) -> list[str | bytes]:
        operations = to_json([item.operation for item in batch])
        want_body = "1" if self._publish is not None else "0"
        return [sent.epoch, self.partition.run_id, sent.not_after, sent.nonce, self._journal_cap, want_body, operations]

    async def _call(
        self, batch: list[_Waiting], sent: _Sent, started: float, arriving: Awaitable[Any] | None = None, unsure: str = ""
    ) -> bytes:
        """One script call; its status. ``ok``: the callers have their answers; anything else: nothing was executed.
        ``arriving``: its reply, where it was sent already. ``unsure``: why an earlier try may have done what this one refuses."""
        partition = self.partition
        behind = None
        if self._unrecorded:
            self._loop.call_soon(self._record)  # runs while Redis works on this one
        if arriving is None:
            arguments = self._arguments(batch, sent)
            if tracing.active is not None and (carried := tracing.active.carried()):
                arguments += ["t", carried[tracing.PARENT]]
            behind = self._waits.behind({*"".join([item.operation[9] for item in batch])}) if self._waits.used else None
            arriving = partition.wire.run("batch", partition.keys, arguments, behind)
        reply = await arriving
        waited = self._waits.follow(behind) if behind is not None else None
        status: bytes
        status, now, in_epoch, last, answers, body, *givers = reply.split(b"\n", 6)
        if status != b"ok":
            partition.heard(int(now))
            partition.forget()
            return status
        sequence = int(last)
        decoded = from_json(answers)
        # What was heard before the script was sent must be there, and an entry of its own must be behind it.
        if sequence <= sent.after and (sequence < sent.after or any(answer[0] <= DONE for answer in decoded)):
            partition.doubt("went_back")
            return b"went_back"
        partition.heard(int(now), in_epoch.decode(), sequence)
        rests = from_json(givers[0]) if givers else ()
        level = behind.level if behind is not None else ""
        seconds = time.perf_counter() - started
        # One that is to be compared first is kept for that.
        if self._deliver(batch, decoded, int(in_epoch), sequence, body, seconds, rests, waited, level, unsure) and (
            partition.checked == partition.wire.made or partition.own is None
        ):
            partition.own = (sent.epoch, sequence, sent.nonce)
        return status

    async def _check_own(self) -> None:
        """A connection was made, maybe to another server than before: does its journal have our last entry as we wrote it?"""
        partition = self.partition
        made = partition.wire.made
        if partition.own is not None and partition.own[0] == partition.epoch:
            epoch, sequence, nonce = partition.own
            entries = await read_entries(partition, int(epoch), sequence - 1, sequence, 1)
            if entries and f'"n":"{nonce}"'.encode() not in entries[0][1][:120]:
                partition.doubt("fork")
                self._on_refused(partition.number, "fork")
                with suppress(NotExecuted, ReplyLost):
                    await partition.report()
                raise partition.frozen("suspect")
        partition.checked = made

    async def _recover(self, batch: list[_Waiting], sent: _Sent, lost: ReplyLost, give_up: float, started: float) -> list[_Waiting]:
        """After a lost reply: what the journal says was done is delivered from there; the rest is returned, to be sent again."""
        partition = self.partition
        nonce, epoch, after, reason = sent.nonce, sent.epoch, sent.after, str(lost)
        await partition.outlive(sent.at)
        while True:
            try:
                hello = await partition.hello()
                same = _still(hello, epoch, after)
                entry = await self._find(nonce, int(epoch), after, hello.sequence) if same else None
                # It says that nothing was done only if it was whole until it was read.
                if entry is not None or (same and _still(await partition.hello(), epoch, hello.sequence)):
                    break
                # Redis is not the one it was: its journal can't tell any more.
                partition.forget()
                self._fail(batch, None, reason=f"{reason}; and the partition has changed since")
                return []
            except (NotExecuted, ReplyLost, ResponseError) as error:
                self._metrics.record(Retried("redis", "recover"))
                if time.monotonic() > give_up:
                    partition.forget()
                    self._fail(batch, None, reason=f"{reason}; then {error}")
                    return []
                await asyncio.sleep(0.1)
        if entry is None:
            return batch
        sequence, body = entry
        done = {operation.key: operation for operation in decode(partition.number, int(epoch), sequence, body).operations}
        found: list[_Waiting] = []
        answers: list[list[Any]] = []
        rest: list[_Waiting] = []
        for item in batch:
            operation = done.get(item.operation[1])
            mark = item.operation[2]
            if operation is None or (mark and mark != operation.fingerprint):  # an expiry learns its fingerprint there
                rest.append(item)
                continue
            found.append(item)
            # A second operation of the batch with the same key was a replay, and will find the first one's record.
            del done[operation.key]
            answers.append([DONE_LINES, *as_replied(operation), operation.order])
        # What its sales rest on was in the lost reply.
        self._deliver(found, answers, int(epoch), sequence, body, time.perf_counter() - started, None)
        return rest

    async def _find(self, nonce: str, epoch: int, after: int, upto: int) -> tuple[int, bytes] | None:
        partition = self.partition
        needle = f'"n":"{nonce}"'.encode()
        while after < upto:
            entries = await read_entries(partition, epoch, after, upto, 100)
            if not entries:
                return None
            for sequence, body in entries:
                if needle in body[:120]:
                    return sequence, body
            after = entries[-1][0]
        return None

    def _deliver(
        self,
        batch: list[_Waiting],
        answers: list[list[Any]],
        epoch: int,
        sequence: int,
        body: bytes,
        seconds: float,
        givers: Sequence[str] | None,
        waited: asyncio.Task[str] | None = None,
        level: str = "",
        unsure: str = "",
    ) -> bool:
        """Publish the entry and answer the callers; whether anything was journaled."""
        confirmed: Awaitable[Any] | None = None
        accepted: dict[str, int] = {}
        refused: dict[str, int] = {}
        replayed = 0
        if self.answered is not None:
            _tell_takes(self.answered, batch, answers)
        for item, answer in zip(batch, answers, strict=True):
            code = answer[0]
            if code <= DONE:
                kind = item.operation[0]
                accepted[kind] = accepted.get(kind, 0) + 1
            elif code == REPLAY:
                replayed += 1
            else:
                reason = _REASONS[code]
                refused[reason] = refused.get(reason, 0) + 1
        if accepted and tracing.active is not None:
            tracing.active.journaled(epoch, sequence)
        if accepted and self._publish is not None:
            confirmed = self._publish(self.partition.number, epoch, sequence, body.decode())
            if self._givers is not None and not GIVE.isdisjoint(accepted):
                fields = _given_back(batch, answers)
                self._givers.gave(self.partition, epoch, sequence, fields, confirmed)
        answered = Answered(Position(self.partition.number, epoch, sequence), confirmed, givers, waited if accepted else None, level)
        for item, answer in zip(batch, answers, strict=True):
            if not item.future.done():
                if unsure and answer[0] > REPLAY:
                    item.future.set_exception(OutcomeUnknown(_name(item.operation), f"{unsure}; then it was {_REASONS[answer[0]]}"))
                else:
                    item.future.set_result((answer, answered))
            elif item.orphaned is not None:
                item.orphaned((answer, answered))
        self._unrecorded.append(BatchSent(self.partition.number, self.lane, len(batch), accepted, refused, replayed, seconds))
        return bool(accepted)

    def _record_if_idle(self) -> None:
        if self._task is None:
            self._record()

    def _record(self) -> None:
        """Metrics are counted when nobody waits for it: while Redis works on the next batch, or when there is none."""
        events, self._unrecorded = self._unrecorded, []
        for event in events:
            self._metrics.record(event)

    def _fail(
        self, batch: list[_Waiting], error: Exception | None, cause: Exception | None = None, reason: str = "", unsure: str = ""
    ) -> None:
        """Tell the callers. ``unsure``: an earlier try may have been executed, so that no error says that nothing moved."""
        if unsure and error is not None:
            error, reason = None, f"{unsure}; then {error}"
        for item in batch:
            if item.future.done():
                continue
            if error is None:
                item.future.set_exception(OutcomeUnknown(_name(item.operation), reason))
            else:
                item.future.set_exception(_copy(error, cause))


def _tell_takes(answered: Callable[[str, bool], None], batch: list[_Waiting], answers: list[list[Any]]) -> None:
    for item, answer in zip(batch, answers, strict=True):
        kind, key = item.operation[:2]
        if kind in TAKES and answer[0] not in UNANSWERED:
            answered(key.partition("\x1f")[0], answer[0] <= REPLAY)


def _still(hello: Hello, epoch: str, after: int) -> bool:
    """Whether Redis is the one that it was, and no shorter."""
    return hello.epoch is not None and str(hello.epoch) == epoch and hello.run_id_kept and hello.sequence >= after


def _given_back(batch: list[_Waiting], answers: list[list[Any]]) -> set[str]:
    fields: set[str] = set()
    for item, answer in zip(batch, answers, strict=True):
        kind = item.operation[0]
        if answer[0] > DONE or kind not in GIVE:
            continue
        if kind == "void":
            fields.update(item.operation[3][::3])
        else:
            fields.update(((answer[2] or ()) if answer[0] == DONE_LINES else item.operation[3])[::2])  # Lua's empty list is {}
    return fields


def _stopped(batch: Sequence[_Waiting], error: BaseException) -> None:
    for item in batch:
        if not item.future.done():
            unknown = OutcomeUnknown(_name(item.operation), f"its batch was stopped: {error!r}")
            unknown.__cause__ = error if isinstance(error, Exception) else None
            item.future.set_exception(unknown)


def _name(operation: list[Any]) -> str:
    return str(operation[1]).partition("\x1f")[2]


def _copy(error: Exception, cause: Exception | None) -> Exception:
    # One exception object raised in many tasks would grow one shared traceback.
    copied = error.__class__.__new__(error.__class__)
    copied.args = error.args
    copied.__dict__.update(error.__dict__)
    copied.__cause__ = cause
    return copied


async def read_entries(partition: Partition, epoch: int, after: int, upto: int | None, most: int) -> list[tuple[int, bytes]]:
    """Journal entries of one epoch after a sequence, up to another (None: the end), at most ``most``: (sequence, body)."""
    client: Any = partition.wire.client
    last = f"{epoch}-{upto}" if upto is not None else f"{epoch}-18446744073709551615"
    try:
        rows = await client.xrange(partition.keys[9], f"{epoch}-{after + 1}", last, count=most)
    except (RedisError, RedisClusterException, OSError) as error:
        raise NotExecuted(f"the journal can't be read: {error}") from error
    return [(int(bytes(name).partition(b"-")[2]), fields[b"b"]) for name, fields in rows]
