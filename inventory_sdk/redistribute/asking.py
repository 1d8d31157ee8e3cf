"""From calls to requests on the board: those that come together go together, and what was asked for is not given up.

A trigger whose key waits for a run already need not be written down (``covers.py``). Until the key is due it is let go at once, and
written down shortly before, so that it can still put the run off. Where nothing puts that off any more, it is let go by a look at the
board made after it came, and counted later. So a key's calls are in one of two places: ``_pending``, written with the next script, or
``_covered``, written at their end or when a look finds their request gone.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Final

from redis.exceptions import RedisError

from inventory_sdk.ending import end
from inventory_sdk.errors import InventoryError, NotStarted
from inventory_sdk.metrics import Metrics
from inventory_sdk.metrics.events import Retried, Triggered
from inventory_sdk.redistribute.board import Board, Request
from inventory_sdk.redistribute.coalesced import Coalesced, keyed_by_all
from inventory_sdk.redistribute.covers import Covers
from inventory_sdk.redistribute.outcome import Outcome

GATHER: Final = 0.005
"""Seconds between two script calls of one function: under load requests wait so long for company."""
COUNTED: Final = 1.0
"""Seconds after which a call that a look has let go is counted at the latest, or after half the time that its key waits already: what
is counted before the run begins has its part of what that costs."""
TOGETHER: Final = 0.05
"""Seconds: such calls of all keys are counted together."""
MOST: Final = 32
"""Keys in one script call: all of Redis waits for it, some 10 µs per key. Of more, the next call is sent at once."""
FIRST_RETRY: Final = 0.02
LAST_RETRY: Final = 1.0
TRIGGER_PATIENCE: Final = 1.0
"""Seconds that a trigger's function, which has done its work, waits for that."""
FLUSH: Final = 5.0
"""Seconds that ``close`` tries to write down what was asked for."""
FAULTS: Final = (RedisError, OSError, TimeoutError)
"""A server that is away, or an answer that did not come."""


@dataclass(slots=True)
class _Note:
    """Calls with one key, to be written down. ``covered``: version of the request that waited at the last look, where a look has let
    all of them go; ``unsure``: calls that wait for one. ``strict``: not all of them are a look's."""

    arguments: str = ""
    opener: str = ""
    last: float = 0.0
    """Monotonic time of the last call."""
    ends: float = math.inf
    """Monotonic time at which it is written down, while it is covered."""
    strict: bool = True
    covered: int = 0
    unsure: int = 0
    wanted: bool = False
    calls: Counter[str] = field(default_factory=Counter)
    asked: list[asyncio.Future[int]] = field(default_factory=list)
    callers: list[asyncio.Future[None]] = field(default_factory=list)

    def add(self, arguments: str, trigger: str, now: float) -> None:
        """One call more."""
        self.opener = self.opener or trigger
        self.arguments = arguments
        self.last = now
        self.calls[trigger] += 1


@dataclass(frozen=True, slots=True)
class _Looker:
    """A covered call that waits for a look at the board."""

    key: str
    caller: asyncio.Future[None]
    note: _Note


class Requests:
    """One function's requests of one event loop. Nothing is forgotten before the board has it; keys bound the memory."""

    def __init__(
        self,
        function: Coalesced,
        board: Board,
        metrics: Metrics,
        due: Callable[[float], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._function = function
        self._board = board
        self._metrics = metrics
        self._due = due
        self._failed = failed
        self._pending: dict[str, _Note] = {}
        self.closed = False
        self._coverable = keyed_by_all(function)
        self._covers = Covers()
        self._covered: dict[str, _Note] = {}
        self._ends: list[tuple[float, str]] = []
        """When what is covered is written down, soonest first."""
        self._writer: asyncio.TimerHandle | None = None
        self._lookers: list[_Looker] = []
        self._sender: asyncio.Task[None] | None = None
        self._sent = 0.0
        self._patient: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: str, arguments: str, trigger: str, wanted: bool) -> asyncio.Future[int]:
        """A request; done, with its version, once it is written down. Whoever waits for it shields it: it is others' too."""
        note = self._note(key, arguments, trigger)
        note.wanted |= wanted
        if not note.asked:
            note.asked.append(asyncio.get_running_loop().create_future())
        return note.asked[0]

    def fire(self, key: str, arguments: str, trigger: str) -> asyncio.Future[None] | None:
        """A request that nobody waits for; done once it is on the board, or after ``TRIGGER_PATIENCE``: while Redis is away it is
        kept in this process and tried again. None: another one covers it."""
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        cover = self._covers.of(key, now) if self._coverable and key not in self._pending else None
        if cover is None:
            caller: asyncio.Future[None] = loop.create_future()
            self._note(key, arguments, trigger).callers.append(caller)
        else:
            sure = now < cover.sure
            counted = now + min(COUNTED, (now - cover.since) / 2)
            note = self._cover(key, cover.sure if sure else (counted // TOGETHER + 1) * TOGETHER)
            note.add(arguments, trigger, now)
            if sure:
                note.strict = True  # a clock says so: not enough for what is written down too late, after all
                return None
            note.unsure += 1
            caller = loop.create_future()
            self._lookers.append(_Looker(key, caller, note))
            self._begin()
        self._patient.append((loop.time() + TRIGGER_PATIENCE, caller))
        if self._timer is None:
            self._timer = loop.call_later(TRIGGER_PATIENCE, self._out_of_patience)
        return caller

    def _note(self, key: str, arguments: str, trigger: str) -> _Note:
        note = self._uncover(key) or self._pending.setdefault(key, _Note())
        note.strict = True
        note.add(arguments, trigger, time.monotonic())
        self._begin()
        return note

    def _cover(self, key: str, ends: float) -> _Note:
        """What is covered of the key; it is written down at ``ends`` or before."""
        note = self._covered.get(key)
        if note is None:
            note = self._covered[key] = _Note(strict=False)
        if ends < note.ends:
            note.ends = ends
            heappush(self._ends, (ends, key))
            if self._ends[0] == (ends, key):
                self._write_at(ends)
        return note

    def _uncover(self, key: str) -> _Note | None:
        """What is covered of the key is written down now. None: nothing is."""
        note = self._covered.pop(key, None)
        if note is not None:
            self._pending[key] = note  # where it was not: a key is in one of both
        return note

    def _write_at(self, ends: float) -> None:
        if self._writer is not None:
            self._writer.cancel()
        self._writer = asyncio.get_running_loop().call_later(ends - time.monotonic(), self._write_covered)

    def _write_covered(self) -> None:
        """Those whose cover ends now."""
        self._writer = None
        now = time.monotonic()
        while self._ends and self._ends[0][0] <= now:
            self._uncover(heappop(self._ends)[1])
        if self._ends:
            self._write_at(self._ends[0][0])
        self._begin()

    def _out_of_patience(self) -> None:
        """One timer for all callers: they wait equally long, so the first that came is the first that goes."""
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._patient and (self._patient[0][1].done() or self._patient[0][0] <= loop.time()):
            _let_go(self._patient.popleft()[1])
        if self._patient:
            self._timer = loop.call_at(self._patient[0][0], self._out_of_patience)

    async def close(self) -> None:
        """Write down what is left; ``InventoryError`` names the keys for which that was not possible."""
        if self._writer is not None:
            self._writer.cancel()
            self._writer = None
        for key in list(self._covered):
            self._uncover(key)
        self.closed = True
        self._covers.close()
        self._begin()
        until = time.monotonic() + FLUSH
        while self._sender is not None and (left := until - time.monotonic()) > 0:
            await asyncio.wait({self._sender}, timeout=left)
            await asyncio.sleep(0)  # for ``_ended``, which begins anew where something came at the very end
        if self._sender is not None:
            await end([self._sender])
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lost, self._pending = self._pending, {}
        while self._patient:
            _let_go(self._patient.popleft()[1])
        for note in lost.values():
            for asked in note.asked:
                if not asked.done():
                    asked.set_exception(NotStarted("closed before Redis had the request, so it"))
                    asked.exception()  # nobody may be waiting any more
        if lost:
            some = ", ".join(sorted(lost)[:5])
            raise InventoryError(f"{self._function.name}: Redis did not take the requests of {len(lost)} keys ({some}); they are lost")

    def _begin(self) -> None:
        """See to it that somebody sends what is there."""
        if self._sender is not None or not (self._pending or self._lookers):
            return
        self._sender = asyncio.create_task(self._send(), name=f"inventory requests of {self._function.name}")
        self._sender.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._sender = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failed(error)
        elif not task.cancelled():
            self._begin()

    async def _send(self) -> None:
        delay = 0.0
        while self._pending or self._lookers:
            wait = max(delay, 0.0 if len(self._pending) >= MOST else self._sent + GATHER - time.monotonic())
            if wait > 0:
                await asyncio.sleep(wait)
            batch = dict(list(self._pending.items())[:MOST])
            for key in batch:
                del self._pending[key]
            lookers, self._lookers = self._lookers, []
            try:
                self._sent = time.monotonic()
                await self._write(batch)
                self._let_go_of(lookers, batch)
                delay = 0.0
            except FAULTS as error:
                self._metrics.record(Retried("redistribution", type(error).__name__))
                self._put_back(batch, lookers)
                delay = min(max(FIRST_RETRY, delay * 2), LAST_RETRY)
            except BaseException:
                self._put_back(batch, lookers)
                raise

    async def _write(self, batch: dict[str, _Note]) -> None:
        """Write it on the board, or only look at it where there is nothing to write."""
        if not batch:
            self._covers.saw(await self._board.look(self._covers.fence))
            return
        options, asked = self._function.options, self._sent
        requests = [
            Request(
                key,
                each.arguments,
                each.wanted,
                each.calls,
                each.opener,
                asked - each.last,
                covered=0 if each.strict or each.unsure else each.covered,
            )
            for key, each in batch.items()
        ]
        standings, seen = await self._board.request(requests, options.debounce, options.max_wait, self._covers.fence)
        self._covers.saw(seen)
        calls: Counter[str] = Counter()
        for standing, (key, note) in zip(standings, batch.items(), strict=True):
            calls.update(note.calls)
            if standing.waits:
                self._covers.wrote(key, standing.version, asked, standing.due, standing.fixed)
                if standing.due is not None:
                    self._due(standing.due)
            for future in note.asked:
                if not future.done():
                    future.set_result(standing.version)
            for caller in note.callers:
                _let_go(caller)
        self._metrics.record(Triggered(self._function.name, calls))

    def _let_go_of(self, lookers: Sequence[_Looker], batch: Mapping[str, _Note]) -> None:
        """After a look that began when they were there, or a write: whose request waits is let go, and the others are written down."""
        for each in lookers:
            version = self._covers.waits(each.key)
            if version or each.key in batch:
                each.note.unsure -= 1
                each.note.covered = max(each.note.covered, version)
                _let_go(each.caller)
            else:
                note = self._uncover(each.key) or self._pending.setdefault(each.key, each.note)
                note.strict = True
                note.callers.append(each.caller)
        while self._patient and self._patient[0][1].done():
            self._patient.popleft()

    def _put_back(self, batch: dict[str, _Note], lookers: list[_Looker]) -> None:
        self._lookers = lookers + self._lookers
        for key, older in batch.items():
            for newer in (self._pending.get(key), self._covered.pop(key, None)):
                if newer is not None:
                    older.arguments, older.last = newer.arguments, newer.last
                    older.strict |= newer.strict or newer.unsure > 0
                    older.covered = max(older.covered, newer.covered)
                    older.wanted |= newer.wanted
                    older.calls.update(newer.calls)
                    older.asked += newer.asked
                    older.callers += newer.callers
            self._pending[key] = older


def _let_go(caller: asyncio.Future[None]) -> None:
    if not caller.done():
        caller.set_result(None)


class Waiting:
    """One function's callers who wait for a run, in this event loop."""

    def __init__(self, function: Coalesced, board: Board) -> None:
        self._function = function
        self._board = board
        self._waiters: dict[str, list[tuple[int, asyncio.Future[Any]]]] = {}

    def add(self, key: str, version: int) -> asyncio.Future[Any]:
        """The outcome of a run that answers this version, or a later one. None of it: the run is not known any more, ask again."""
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(key, []).append((version, waiter))
        return waiter

    def drop(self, key: str, waiter: asyncio.Future[Any]) -> None:
        """It waits no longer."""
        left = [each for each in self._waiters.get(key, ()) if each[1] is not waiter]
        if left:
            self._waiters[key] = left
        else:
            self._waiters.pop(key, None)

    def answer(self, key: str, version: int, outcome: Outcome | None) -> None:
        """A run of ``key`` ended that answers all requests up to ``version``."""
        for each, waiter in self._waiters.get(key, ()):
            if each <= version and not waiter.done():
                waiter.set_result(outcome)

    @property
    def awaited(self) -> list[str]:
        """Keys that somebody waits for."""
        return list(self._waiters)

    async def ask(self, keys: Sequence[str]) -> None:
        """Answer those whose run ended elsewhere."""
        for key, standing in zip(keys, await self._board.answered(keys), strict=True):
            if not standing.known:
                # Its outcome was cleaned away, or Redis has forgotten all of it: who still waits asks anew.
                self.answer(key, 2**62, None)
            elif standing.outcome_of and standing.done >= standing.outcome_of:
                self.answer(key, standing.outcome_of, Outcome.read(standing.outcome, self._function, key))

    def close(self) -> None:
        """Nobody will answer any more."""
        for waiters in self._waiters.values():
            for _, waiter in waiters:
                if not waiter.done():
                    waiter.set_exception(NotStarted("closed while somebody waited for a run, so it"))
                    waiter.exception()
