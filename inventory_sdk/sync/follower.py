"""Follows one partition's journal into the ledger: consume → order → apply → acknowledge, never past a gap."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

from inventory_sdk.ledger.protocol import EpochClosed, ForkFound, PartitionRow, WatermarkMoved
from inventory_sdk.model import JournalEntry, Position
from inventory_sdk.stock.journal import UnreadableEntry, decode
from inventory_sdk.sync.applier import MAX_OPERATIONS, Applier
from inventory_sdk.sync.backoff import Backoff, waited
from inventory_sdk.sync.buffer import Buffer
from inventory_sdk.sync.late import settle_late
from inventory_sdk.sync.parts import Halted, Parts, log
from inventory_sdk.sync.queues.protocol import Consumer, Message
from inventory_sdk.sync.recovery import Memory, RecoveryNeeded, open_first, recover, until_readable
from inventory_sdk.sync.stock_side import JournalState

T = TypeVar("T")

IDLE: Final = 0.05
"""Seconds without a message after which the journal itself is read to its end."""
GATHER: Final = 0.005
"""Seconds that a small batch waits for more."""
ENOUGH: Final = 100
"""Operations that are worth a transaction at once."""
FILL_COUNT: Final = 1000
REBIND: Final = 15.0
"""Seconds after which an idle worker makes sure that the broker still lets its epoch in: one that was emptied returns every publish."""
TAKE_OVER: Final = 10.0
"""Seconds without a sign after which a half-done recovery counts as abandoned."""
LOOK: Final = 1.0
"""Seconds between looks at the ledger while nothing moves: it may have gone back."""
LATE: Final = 0.5
"""Seconds that late entries are gathered, so that a take comes before what ended it."""


class QueueFault(Exception):
    """The queue's consumer failed; the stay at the queue ends and begins anew."""


class EpochMoved(Exception):
    """The ledger (maybe) has a newer epoch than the one followed here: read its row again."""


@dataclass(frozen=True, slots=True)
class _Task:
    """``row`` is the epoch to be consumed; ``newest`` differs from it where an abandoned recovery is taken over."""

    row: PartitionRow
    newest: int
    abandoned: bool = False


class Follower:
    """One partition of one worker. ``run`` lives as long as the worker; ``last_sign`` (monotonic seconds, None: never) is when it
    last made progress or found all well; ``receiving`` says whether it is at something that a stop should let it finish."""

    def __init__(
        self,
        parts: Parts,
        partition: int,
        applier: Applier,
        signed: asyncio.Event,
        *,
        idle: float = IDLE,
        take_over: float = TAKE_OVER,
        rebind: float = REBIND,
    ) -> None:
        self._parts = parts
        self._rebind = rebind
        self._partition = partition
        self._applier = applier
        self._signed = signed
        self._idle = idle
        self._take_over = take_over
        self._trouble = Backoff(parts.first_delay, 1.0)
        self._late = Backoff(LATE, 30.0)
        self._late_messages: list[Message] = []
        self._late_entries: list[JournalEntry] = []
        self._late_due = 0.0
        self._highest = (0, 0)
        """The newest epoch and watermark of the ledger that this worker has seen: a ledger below it went back."""
        self._sequence = (0, 0)
        """The newest epoch and sequence that Redis has shown."""
        self._look_at = 0.0
        self._absent: int | None = None
        """The sequence that the journal was asked for and did not have."""
        self._bind_at = 0.0
        self._more = False
        """The last reading of the journal was cut off: there is more at once."""
        self.last_sign: float | None = None
        self.sign_now = False
        """Redis may have lost the last sign: the next one is not to wait for its turn."""
        self.receiving = False

    async def run(self) -> None:
        """Until the worker stops. Faults of the servers are waited out here; only a mistake in our own code ends it early."""
        parts = self._parts
        backoff = parts.backoff()
        while not parts.stopping.is_set():
            try:
                task = await self._task()
                if task is not None:
                    await self._stay(task)
                backoff.reset()
            except Halted:
                return
            except (EpochMoved, EpochClosed, WatermarkMoved) as moved:
                log.info("partition %d: %s: %s", self._partition, type(moved).__name__, moved)
                await waited(parts.stopping, parts.first_delay)
            except QueueFault as fault:
                delay = backoff.delay()
                parts.retried("consume", fault.__cause__ or fault, backoff.attempts)
                await waited(parts.stopping, delay)

    async def _task(self) -> _Task | None:
        """The epoch to follow, or the abandoned recovery to take over; None: look again."""
        parts = self._parts
        ledger = parts.ledger
        row = await parts.persist("ledger", lambda: ledger.partition(self._partition))
        if row is None:
            try:
                row = await open_first(parts.stock_side, ledger, parts.queue, self._partition, timeout=self._take_over)
                return _Task(row, row.epoch)
            except Exception as error:  # noqa: BLE001 - a server is away: counted, tried again
                parts.retried("open", error, self._trouble.attempts + 1)
                await waited(parts.stopping, self._trouble.delay())
                return None
        if row.state == "open":
            return _Task(row, row.epoch)
        # Somebody recovers. If that takes suspiciously long it is done again, with a higher epoch that fences the slow one off.
        until = time.monotonic() + self._take_over
        while row is not None and row.state != "open" and time.monotonic() < until:
            if await waited(parts.stopping, min(0.2, self._take_over / 10)):
                return None
            newer = await parts.persist("ledger", lambda: ledger.partition(self._partition))
            if (newer is not None and newer.epoch != row.epoch) or await self._recoverer_signs():
                until = time.monotonic() + self._take_over
            row = newer
        if row is None or row.state == "open":
            return None
        rows = await parts.persist("ledger", lambda: ledger.epochs(self._partition))
        return _Task(rows[0] if rows else row, row.epoch, abandoned=True)

    async def _recoverer_signs(self) -> bool:
        """Nobody else signs for a partition that is not open. One who can't reach Redis can't recover either."""
        try:
            seen = await self._parts.stock_side.worker_seen(self._partition)
        except Exception as error:  # noqa: BLE001 - Redis is away: counted
            self._parts.retried("redis", error, self._trouble.attempts + 1)
            return True
        return seen is not None and seen < self._take_over

    async def _stay(self, task: _Task) -> None:
        """One stay at the queue as the active consumer."""
        parts = self._parts
        row = task.row
        async with self._consumer(row) as consumer:
            # Becoming the active consumer may have taken long: others have worked meanwhile.
            rows = await parts.persist("ledger", lambda: parts.ledger.epochs(self._partition))
            mine = [each for each in rows if each.epoch == row.epoch]
            if not mine or rows[-1].epoch != task.newest:
                raise EpochMoved(f"epoch {task.newest} is not the newest any more")
            buffer = Buffer(self._partition, row.epoch, mine[0].applied)
            try:
                if task.abandoned:
                    raise RecoveryNeeded("abandoned", f"the recovery to epoch {task.newest} was not finished")
                if (row.epoch, buffer.watermark) < self._highest:
                    known, at = self._highest
                    raise RecoveryNeeded("ledger_went_back", f"the ledger is at {row.epoch}-{buffer.watermark}, was at {known}-{at}", known)
                self._highest = (row.epoch, buffer.watermark)
                self._bind_at = 0.0
                self._look_at = 0.0
                await self._follow(consumer, buffer)
            except RecoveryNeeded as need:
                await self._recover(consumer, buffer, need, task.newest)
            finally:
                self.receiving = False
                self._late_messages.clear()  # unacknowledged: they come again

    @asynccontextmanager
    async def _consumer(self, row: PartitionRow) -> AsyncIterator[Consumer]:
        manager = self._parts.queue.consume(row.partition, row.epoch, row.applied)
        consumer = await self._at_queue(manager.__aenter__())
        try:
            yield consumer
        finally:
            await self._at_queue(manager.__aexit__(None, None, None))

    async def _at_queue(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except Exception as error:  # whatever the queue's client raises
            raise QueueFault from error

    async def _recover(self, consumer: Consumer, buffer: Buffer, need: RecoveryNeeded, newest: int) -> None:
        parts = self._parts
        epoch, sequence = self._sequence
        memory = Memory(newest, sequence if epoch == buffer.epoch else 0, self.last_sign)
        self.sign_now = True
        try:
            aside = await recover(parts, self._applier, consumer, buffer, need, memory, self._sign)
            if aside is None:
                raise EpochMoved("another process recovers it")
            self._late_entries += aside
            self.sign_now = True
            self._sign()
            self._highest = (0, 0)  # what a ledger that went back has forgotten is dealt with
        except (Halted, EpochMoved, EpochClosed):
            raise
        except Exception as error:  # noqa: BLE001 - a server left in the middle: the next round raises the epoch once more
            parts.retried("recovery", error, self._trouble.attempts + 1)
            await waited(parts.stopping, self._trouble.delay())

    async def _follow(self, consumer: Consumer, buffer: Buffer) -> None:
        stopping = self._parts.stopping
        await self._check(buffer)
        await self._flush(consumer, buffer)
        while not stopping.is_set():
            messages = await self._at_queue(consumer.get(0 if self._more else self._idle))
            if messages:
                self.receiving = True
                await self._receive(consumer, buffer, messages)
                await self._gather(consumer, buffer)
            else:
                await self._check(buffer)
            await self._flush(consumer, buffer)
            await self._settle_late(consumer, buffer)
        await self._receive(consumer, buffer, await self._at_queue(consumer.get(0)))
        await self._flush(consumer, buffer)

    async def _gather(self, consumer: Consumer, buffer: Buffer) -> None:
        until = time.monotonic() + GATHER
        while buffer.operations < ENOUGH and (left := until - time.monotonic()) > 0:
            await self._receive(consumer, buffer, await self._at_queue(consumer.get(left)))

    async def _receive(self, consumer: Consumer, buffer: Buffer, messages: Sequence[Message]) -> None:
        for message in messages:
            if message.epoch < buffer.epoch:
                if not self._late_messages:
                    self._late_due = time.monotonic() + self._late.delay()
                self._late_messages.append(message)
            elif message.epoch > buffer.epoch:
                newest = await self._parts.persist("ledger", lambda: self._parts.ledger.partition(self._partition))
                if newest is None or newest.epoch < message.epoch:
                    raise RecoveryNeeded(
                        "ledger_went_back", f"an entry of epoch {message.epoch} came, the ledger has {newest}", message.epoch
                    )
                raise EpochMoved(f"an entry of epoch {message.epoch} came")
            elif message.marker:
                raise EpochMoved(f"epoch {message.epoch} was ended")
            else:
                try:
                    buffer.receive(message)
                except ForkFound as fork:
                    raise RecoveryNeeded("fork", str(fork)) from fork

    async def _settle_late(self, consumer: Consumer, buffer: Buffer) -> None:
        """Entries of closed epochs, once those that came together are here; held unacknowledged until all of them are settled."""
        if not (self._late_messages or self._late_entries) or time.monotonic() < self._late_due:
            return
        parts = self._parts
        entries, settled = list(self._late_entries), []
        for message in self._late_messages:
            try:
                if not message.marker:
                    entries.append(decode(message.partition, message.epoch, message.sequence, message.body))
                settled.append(message)
            except UnreadableEntry as error:
                log.error("partition %d: %s; it came after its epoch was closed and is kept in the queue", self._partition, error)
                parts.happened("unreadable", partition=self._partition)
        try:
            await settle_late(parts, buffer.epoch, entries)
        except Exception as error:  # noqa: BLE001 - a server is away, or the stock is frozen or full: again later
            self._late_due = time.monotonic() + self._late.delay()
            parts.retried("late", error, self._late.attempts)
            return
        self._late.reset()
        self._late_messages.clear()
        self._late_entries.clear()
        await self._at_queue(consumer.ack(settled))

    async def _flush(self, consumer: Consumer, buffer: Buffer) -> None:
        """Apply and acknowledge all that is consecutive; fill holes from the journal first."""
        self.receiving = self.receiving or buffer.waiting > 0
        while True:
            missing = buffer.first_missing()
            if missing is not None and sum(len(e.operations) for e in buffer.run(MAX_OPERATIONS)) < MAX_OPERATIONS:
                await self._fill(buffer, missing)
            try:
                moved = await self._applier.commit(buffer)
            except ForkFound as fork:
                raise RecoveryNeeded("fork", str(fork)) from fork
            if done := buffer.acknowledgeable():
                await self._at_queue(consumer.ack(done))
            if moved:
                self._highest = max(self._highest, (buffer.epoch, buffer.watermark))
                self._sign()
                self._trouble.reset()
                await self._look(buffer)
            elif buffer.held() is not None:
                await until_readable(self._parts, buffer)
            else:
                break
        self.receiving = False
        if buffer.waiting:
            # A gap that the journal did not fill: the check decides whether it is a loss; until it can, nothing passes.
            await self._check(buffer)
            if buffer.waiting and not buffer.run(1):
                self._parts.retried("gap", EpochMoved(f"entry {buffer.watermark + 1} is missing"), self._trouble.attempts + 1)
                await waited(self._parts.stopping, self._trouble.delay())

    async def _fill(self, buffer: Buffer, missing: int) -> None:
        try:
            pairs = await self._parts.stock_side.read_journal(self._partition, buffer.epoch, missing - 1, buffer.highest, FILL_COUNT)
        except Exception as error:  # noqa: BLE001 - counted, looked at again
            self._absent = None
            # What is consecutive without the missing one is applied all the same; the hole is looked at again afterwards.
            self._parts.retried("redis", error, self._trouble.attempts + 1)
            return
        self._read(buffer, pairs)
        self._absent = missing if buffer.first_missing() == missing else None

    def _read(self, buffer: Buffer, pairs: Sequence[tuple[int, str]]) -> None:
        try:
            for sequence, body in pairs:
                buffer.read(sequence, body)
        except ForkFound as fork:
            raise RecoveryNeeded("fork", str(fork)) from fork

    async def _bind(self, buffer: Buffer) -> None:
        """A broker that was emptied lets nothing in until somebody binds the epoch (again). One that is away is tried again at the next
        idle moment: meanwhile the journal is read."""
        parts = self._parts
        try:
            await parts.queue.bind(self._partition, buffer.epoch)
        except Exception as error:  # noqa: BLE001 - counted, tried again
            parts.retried("queue", error, self._trouble.attempts + 1)
            return
        newest = await parts.persist("ledger", lambda: parts.ledger.partition(self._partition))
        if newest is None or newest.epoch != buffer.epoch:
            # Somebody fenced this epoch between our reading and our binding: the fence must stand.
            await parts.persist("queue", lambda: parts.queue.unbind(self._partition, buffer.epoch))
            raise EpochMoved(f"the ledger is at {newest}")
        self._bind_at = time.monotonic() + self._rebind

    async def _check(self, buffer: Buffer) -> None:
        """Is Redis what the ledger remembers? Then read the journal to its end, so that an entry whose publisher died gets in."""
        parts = self._parts
        self._more = False
        if time.monotonic() >= self._bind_at:
            await self._bind(buffer)
        try:
            state = await parts.stock_side.journal_state(self._partition)
        except Exception as error:  # noqa: BLE001 - Redis is away: counted, asked again
            parts.retried("redis", error, self._trouble.attempts + 1)
            await waited(parts.stopping, self._trouble.delay())
            return
        if state.epoch == buffer.epoch:
            self._sequence = max(self._sequence, (state.epoch, max(state.sequence, state.seen)))
        need = self._judged(state, buffer)
        if need is not None:
            await self._confirm(need, buffer)
            return
        if state.state != "open":
            await self._left_frozen(state)
            return
        if state.sequence > buffer.watermark and buffer.first_missing() is None:
            before = buffer.watermark
            await self._applier.reread(buffer)
            if buffer.watermark > before:
                # Another worker is at it: two that read the same entries would only wait for each other's locks.
                self._sign()
                return
            try:
                pairs = await parts.stock_side.read_journal(self._partition, buffer.epoch, buffer.highest, None, FILL_COUNT)
            except Exception as error:  # noqa: BLE001 - Redis is away: counted, asked again
                parts.retried("redis", error, self._trouble.attempts + 1)
                await waited(parts.stopping, self._trouble.delay())
                return
            self._read(buffer, pairs)
            self._more = len(pairs) == FILL_COUNT
        if not buffer.waiting:
            await self._look(buffer)
            self._trouble.reset()
            self._sign()

    async def _look(self, buffer: Buffer) -> None:
        """Now and then: a ledger that was restored from a backup, and a Redis that went back and grew again to where it was, show
        themselves in nothing that moves."""
        if time.monotonic() < self._look_at:
            return
        parts, place = self._parts, Position(self._partition, buffer.epoch, buffer.watermark)
        newest = await parts.persist("ledger", lambda: parts.ledger.partition(self._partition))
        if newest is None or (newest.epoch, newest.applied) < self._highest or newest.epoch != buffer.epoch:
            raise EpochMoved(f"the ledger is at {newest}, it was at {self._highest}")
        known = (await parts.persist("ledger", lambda: parts.ledger.nonces([place]))).get(place)
        try:
            found = await parts.stock_side.read_journal(self._partition, buffer.epoch, place.sequence - 1, place.sequence, 1)
            nonce = decode(*place, found[0][1]).nonce if found else known
        except UnreadableEntry:
            nonce = known  # the ledger has passed it
        except Exception as error:  # noqa: BLE001 - Redis is away: counted, looked at again
            parts.retried("redis", error, self._trouble.attempts + 1)
            return
        if known is not None and nonce != known:
            raise RecoveryNeeded("fork", f"Redis has {nonce!r} at {place}, the ledger {known!r}")
        self._look_at = time.monotonic() + LOOK

    def _judged(self, state: JournalState, buffer: Buffer) -> RecoveryNeeded | None:
        if state.state == "missing":
            return RecoveryNeeded("meta_missing", "Redis does not know the partition")
        if state.epoch != buffer.epoch:
            return RecoveryNeeded("foreign_epoch", f"Redis is at epoch {state.epoch}, the ledger at {buffer.epoch}", state.epoch)
        if not state.run_id_known:
            return RecoveryNeeded("other_server", "another Redis process answers than the one it was opened on")
        if state.state == "suspect":
            return RecoveryNeeded(state.why, f"a process has seen entry {buffer.epoch}-{state.seen}, Redis is at {state.sequence}")
        if state.state != "open":
            return None
        if state.applied > buffer.watermark:
            return RecoveryNeeded(
                "ledger_went_back", f"the ledger stands at {buffer.epoch}-{buffer.watermark}, and has been at {state.applied}"
            )
        if state.sequence < max(buffer.highest, self._seen(buffer)):
            return RecoveryNeeded(
                "went_back", f"Redis is at {buffer.epoch}-{state.sequence}, entry {max(buffer.highest, self._seen(buffer))} was seen"
            )
        oldest = state.oldest_kept_sequence
        if state.sequence > buffer.watermark and (oldest is None or oldest > buffer.watermark + 1):
            if buffer.run(1):
                return None
            return RecoveryNeeded(
                "ledger_went_back",
                f"the ledger stands at {buffer.epoch}-{buffer.watermark}, the oldest kept journal entry is {oldest}",
            )
        missing = buffer.first_missing()
        if missing is not None and missing == self._absent == buffer.watermark + 1:
            return RecoveryNeeded("entry_missing", f"the journal has no entry {buffer.epoch}-{missing}, though later ones")
        return None

    def _seen(self, buffer: Buffer) -> int:
        epoch, sequence = self._sequence
        return sequence if epoch == buffer.epoch else 0

    async def _confirm(self, need: RecoveryNeeded, buffer: Buffer) -> None:
        """Recover, unless what looked wrong was another worker's progress."""
        before = buffer.watermark
        newest = await self._parts.persist("ledger", lambda: self._parts.ledger.partition(self._partition))
        if newest is not None and newest.epoch != buffer.epoch:
            raise EpochMoved(f"the ledger is at epoch {newest.epoch}")
        await self._applier.reread(buffer)
        if buffer.watermark == before:
            raise need

    async def _left_frozen(self, state: JournalState) -> None:
        """The ledger is open and Redis is not: between the two steps of an opening, or its process died there."""
        until = time.monotonic() + self._take_over
        while time.monotonic() < until:
            if await waited(self._parts.stopping, min(0.2, self._take_over / 10)):
                return
            now = await self._parts.persist("redis", lambda: self._parts.stock_side.journal_state(self._partition))
            if (now.epoch, now.state) != (state.epoch, state.state):
                return
        raise RecoveryNeeded("left_frozen", f"Redis stays {state.state} at epoch {state.epoch}", state.epoch)

    def _sign(self) -> None:
        self.last_sign = time.monotonic()
        self._signed.set()
