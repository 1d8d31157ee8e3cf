"""From calls to requests on the board: those that come together go together, and what was asked for is not given up."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from redis.exceptions import RedisError

from inventory_sdk.ending import end
from inventory_sdk.errors import InventoryError, NotStarted
from inventory_sdk.metrics import Metrics
from inventory_sdk.metrics.events import Retried, Triggered
from inventory_sdk.redistribute.board import Board, Request
from inventory_sdk.redistribute.coalesced import Coalesced
from inventory_sdk.redistribute.outcome import Outcome

GATHER: Final = 0.005
"""Seconds between two script calls of one function: under load requests wait so long for company."""
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


@dataclass
class _Pending:
    arguments: str
    opener: str
    wanted: bool = False
    calls: Counter[str] = field(default_factory=Counter)
    asked: list[asyncio.Future[int]] = field(default_factory=list)
    callers: list[asyncio.Future[None]] = field(default_factory=list)


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
        self._pending: dict[str, _Pending] = {}
        self._sender: asyncio.Task[None] | None = None
        self._sent = 0.0
        self._patient: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, key: str, arguments: str, trigger: str, wanted: bool) -> asyncio.Future[int]:
        """A request; done, with its version, once it is written down. Whoever waits for it shields it: it is others' too."""
        pending = self._note(key, arguments, trigger)
        pending.wanted |= wanted
        if not pending.asked:
            pending.asked.append(asyncio.get_running_loop().create_future())
        return pending.asked[0]

    def fire(self, key: str, arguments: str, trigger: str) -> asyncio.Future[None]:
        """A request that nobody waits for; done once it is written down, or after ``TRIGGER_PATIENCE``: while Redis is away it is
        kept in this process and tried again."""
        loop = asyncio.get_running_loop()
        caller: asyncio.Future[None] = loop.create_future()
        self._note(key, arguments, trigger).callers.append(caller)
        self._patient.append((loop.time() + TRIGGER_PATIENCE, caller))
        if self._timer is None:
            self._timer = loop.call_later(TRIGGER_PATIENCE, self._out_of_patience)
        return caller

    def _note(self, key: str, arguments: str, trigger: str) -> _Pending:
        pending = self._pending.get(key)
        if pending is None:
            pending = self._pending[key] = _Pending(arguments, trigger)
        pending.arguments = arguments
        pending.calls[trigger] += 1
        if self._sender is None:
            self._begin()
        return pending

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
        sender = self._sender
        if sender is not None:
            await asyncio.wait({sender}, timeout=FLUSH)
            await end([sender])
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        left, self._pending = self._pending, {}
        while self._patient:
            _let_go(self._patient.popleft()[1])
        for pending in left.values():
            for asked in pending.asked:
                if not asked.done():
                    asked.set_exception(NotStarted("closed before Redis had the request, so it"))
                    asked.exception()  # nobody may be waiting any more
        if left:
            some = ", ".join(sorted(left)[:5])
            raise InventoryError(f"{self._function.name}: Redis did not take the requests of {len(left)} keys ({some}); they are lost")

    def _begin(self) -> None:
        self._sender = asyncio.create_task(self._send(), name=f"inventory requests of {self._function.name}")
        self._sender.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._sender = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._failed(error)
        elif self._pending and not task.cancelled():
            self._begin()

    async def _send(self) -> None:
        delay = 0.0
        while self._pending:
            wait = max(delay, 0.0 if len(self._pending) >= MOST else self._sent + GATHER - time.monotonic())
            if wait > 0:
                await asyncio.sleep(wait)
            batch = dict(list(self._pending.items())[:MOST])
            for key in batch:
                del self._pending[key]
            try:
                self._sent = time.monotonic()
                await self._write(batch)
                delay = 0.0
            except FAULTS as error:
                self._metrics.record(Retried("redistribution", type(error).__name__))
                self._put_back(batch)
                delay = min(max(FIRST_RETRY, delay * 2), LAST_RETRY)
            except BaseException:
                self._put_back(batch)
                raise

    async def _write(self, batch: dict[str, _Pending]) -> None:
        options = self._function.options
        requests = [Request(key, each.arguments, each.wanted, each.calls, each.opener) for key, each in batch.items()]
        replies = await self._board.request(requests, options.debounce, options.max_wait)
        calls: Counter[str] = Counter()
        for (version, due), pending in zip(replies, batch.values(), strict=True):
            calls.update(pending.calls)
            for asked in pending.asked:
                if not asked.done():
                    asked.set_result(version)
            for caller in pending.callers:
                _let_go(caller)
            if due is not None:
                self._due(due)
        while self._patient and self._patient[0][1].done():
            self._patient.popleft()
        self._metrics.record(Triggered(self._function.name, calls))

    def _put_back(self, batch: dict[str, _Pending]) -> None:
        for key, older in batch.items():
            newer = self._pending.get(key)
            if newer is not None:
                older.arguments = newer.arguments
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
        for key, standing in zip(keys, await self._board.standings(keys), strict=True):
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
