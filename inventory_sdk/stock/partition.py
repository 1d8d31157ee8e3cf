"""What a process knows of one partition: its keys, its epoch, the server it is on, and what time it is there."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

from redis.exceptions import OutOfMemoryError

from inventory_sdk.errors import StockFrozen
from inventory_sdk.stock.wire import NotExecuted, ReplyLost, Scripts

KEY_NAMES: Final = (
    "meta",
    "available",
    "reserved",
    "frozen",
    "results:0",
    "results:1",
    "reservations",
    "expiry",
    "givers",
    "journal",
)


@dataclass(frozen=True, slots=True)
class Hello:
    """What Redis says of a partition. ``epoch`` is None where there is no meta: a first start, or an emptied Redis.
    ``oldest``: the sequence of this epoch's first entry that is still kept. ``applied``: what the ledger had applied when the
    worker last kept house. ``why``, ``seen``: of a suspect partition. ``frozen_at``: when it stopped selling (ms). ``older``: how
    far older results are restored, "" where all are. ``layout``: how its stock was told apart when it was opened, "" in what older
    releases have opened."""

    now_ms: int
    epoch: int | None
    sequence: int
    state: str
    run_id_kept: bool
    oldest: int | None
    entries: int
    applied: int = 0
    why: str = ""
    seen: int = 0
    frozen_at: int = 0
    older: str = ""
    layout: str = ""


class Partition:
    """The view of one partition from one event loop."""

    def __init__(self, number: int, namespace: str, wire: Scripts, layout: str = "") -> None:
        self.number = number
        self.layout = layout
        self.wire = wire
        self.tag = f"{{{namespace}:{number}}}"
        self.keys: tuple[str, ...] = tuple(f"{self.tag}:{name}" for name in KEY_NAMES)
        self.epoch = ""
        self.run_id = ""
        self.sequence = 0
        self.suspicion: tuple[str, str, int] | None = None
        """What this process has seen that can't be true of one history, until Redis was told: epoch, why, highest sequence."""
        self.own: tuple[str, int, str] | None = None
        """Epoch, sequence and nonce of the last entry that this process wrote."""
        self.checked = 0
        """How many connections had been made when ``own`` was last compared with the journal."""
        self._counted = ""
        self._redis_ms = 0
        self._heard = 0.0

    def key(self, name: str) -> str:
        """The Redis key of one of ``KEY_NAMES``, or of a plain key beside them."""
        return f"{self.tag}:{name}"

    def heard(self, redis_ms: int, epoch: str = "", sequence: int = 0) -> None:
        """Note the time of an answer that just came, and the sequence if it is of the epoch that we know."""
        self._redis_ms = redis_ms
        self._heard = time.monotonic()
        if epoch == self.epoch and sequence > self.sequence:
            self.sequence = sequence

    def not_after(self) -> int:
        """Redis milliseconds after which a script sent now must not run any more: no later than now there, plus the socket timeout."""
        return int(self._redis_ms + (time.monotonic() - self._heard + self.wire.timeout) * 1000)

    async def outlive(self, sent: float) -> None:
        """Wait until a script sent at this monotonic time is past its ``not_after``: nothing of it can happen any more."""
        await asyncio.sleep(max(0.0, sent + self.wire.timeout - time.monotonic()) + 0.005)

    async def hello(self) -> Hello:
        """Ask Redis, and remember epoch, server and time."""
        counted, before = self._counted, self.sequence
        # All keys, though two are read: in a cluster it answers only while all of the partition is in one place.
        answer = await self.wire.run("hello", [self.keys[0], self.keys[9], *self.keys[1:9]], [])
        now, epoch, sequence, state, opened_on, run_id, oldest, entries, applied, why, seen, frozen_at, older, layout = answer
        self.heard(int(now))
        in_epoch = epoch.decode()
        if in_epoch != self._counted:
            self._counted, self.sequence, self.suspicion = in_epoch, int(sequence), None
        elif in_epoch == counted and int(sequence) < before and state == b"open":
            self.doubt("went_back")
        else:
            self.sequence = max(self.sequence, int(sequence))
        self.epoch = "" if self.suspicion else in_epoch
        self.run_id = run_id.decode()
        first = None
        if oldest:
            first = int(oldest.partition(b"-")[2])
        return Hello(
            now_ms=int(now),
            epoch=int(epoch) if epoch else None,
            sequence=int(sequence),
            state=state.decode(),
            run_id_kept=opened_on == run_id,
            oldest=first,
            entries=int(entries),
            applied=int(applied),
            why=why.decode(),
            seen=int(seen),
            frozen_at=int(frozen_at),
            older=older.decode(),
            layout=layout.decode(),
        )

    def same_layout(self, hello: Hello) -> None:
        """``StockFrozen`` for good where the stock is told apart in another way by now than in this process."""
        if self.layout and hello.layout and hello.layout != self.layout:
            self.epoch = ""
            why = f"partitions of this stock are {hello.layout} now, this process was started with {self.layout}: start it anew"
            raise StockFrozen(why, retry_after=60.0)

    async def known(self) -> None:
        """Make sure that epoch and time are known; ``StockFrozen`` while the partition is not open."""
        if self.epoch:
            return
        try:
            if self.suspicion:
                await self.report()
            hello = await self.hello()
            if self.suspicion:
                # This very answer was from before what was seen.
                await self.report()
                raise self.frozen("suspect")
        except ReplyLost as error:
            raise NotExecuted(str(error)) from error
        self.same_layout(hello)
        if hello.epoch is None or hello.state != "open" or not hello.run_id_kept:
            self.epoch = ""
            raise self.frozen(hello.state or "empty")

    def doubt(self, why: str) -> None:
        """Two histories were seen: nothing is sent any more before Redis was told. ``why``: ``went_back`` or ``fork``."""
        self.suspicion = self._counted, why, self.sequence
        self.epoch = ""

    async def report(self) -> None:
        """Close the partition in Redis for what was seen; the worker finds it so and recovers. May be repeated."""
        if self.suspicion is not None:
            epoch, why, sequence = self.suspicion
            try:
                await self.wire.run("suspect", [self.keys[0]], [epoch, why, str(sequence)])
            except OutOfMemoryError as error:
                raise NotExecuted(f"Redis is out of memory and can't be told that it {why}: {error}") from error
            self.suspicion = None

    def forget(self) -> None:
        """Epoch or server have changed: ask again before the next batch."""
        self.epoch = ""

    def frozen(self, state: str) -> StockFrozen:
        """The error callers get while the partition is away."""
        return StockFrozen(f"partition {self.number} is {state} and being recovered", retry_after=0.5)
