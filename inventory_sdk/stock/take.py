"""What a call has taken and how it can end: finished, undone, or decided by a database transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from inventory_sdk.errors import (
    InsufficientStock,
    InvalidOperation,
    InventoryError,
    NotStarted,
    OperationConflict,
    ReservationClosed,
    ReservationExpired,
)
from inventory_sdk.model import Kind, Line, Receipt, key_of

if TYPE_CHECKING:
    from inventory_sdk.ledger.protocol import Ledger

log = logging.getLogger("inventory_sdk.stock")

Raises = Mapping[type[InventoryError], Callable[[Any], BaseException]]
"""For each of our errors what the caller gets: an exception class (made from the error's text), or a function of the error."""

TRIES: Final = 8
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0


class StockActs(Protocol):
    """What the aspects need of the stock room."""

    async def submit(
        self,
        kind: str,
        *,
        merchant: str | None = None,
        operation_id: str | None = None,
        lines: Sequence[Line] | None = None,
        reservation: str | None = None,
        order: str | None = None,
        ttl: float | None = None,
        of: str | None = None,
        reason: str | None = None,
        durability: str | None = None,
        task: dict[str, Any] | None = None,
    ) -> Receipt: ...
    async def confirm(
        self, reservation: str, *, merchant: str | None = None, durability: Any = None, reacquire: bool = False
    ) -> Receipt: ...
    async def undo(self, receipt: Receipt, *, decider: bool = False) -> bool: ...
    async def keep(self, receipt: Receipt) -> bool: ...
    async def extend(self, reservation: str, *, ttl: float | None, merchant: str | None = None) -> None: ...
    async def pin(self, receipt: Receipt, *, resume: float | None = None, confirm: bool = False) -> bool: ...
    async def resume(self, receipt: Receipt, ttl: float | None) -> bool: ...
    async def settle_pinned(self, receipt: Receipt, kind: Literal["confirm", "release"]) -> Receipt: ...


class Afterwards:
    """Tasks that outlive the call that started them. ``drain`` waits for them when the Inventory closes."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def insist(self, work: Callable[[], Coroutine[Any, Any, Any]], what: str) -> asyncio.Future[BaseException | None]:
        """Do ``work``, again with growing pauses while it fails; the future answers the first try's error, or None.

        What fails for good is logged as an error with its cause. ``work`` must be safe to repeat.
        """
        loop = asyncio.get_running_loop()
        first: asyncio.Future[BaseException | None] = loop.create_future()
        task = loop.create_task(self._insist(work, what, first), name=f"inventory {what}")
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return first

    async def _insist(self, work: Callable[[], Coroutine[Any, Any, Any]], what: str, first: asyncio.Future[Any]) -> None:
        pause = FIRST_PAUSE
        for attempt in range(1, TRIES + 1):
            try:
                await work()
            except asyncio.CancelledError:
                first.cancel()
                raise
            except Exception as error:
                if not first.done():
                    first.set_result(error)
                if attempt == TRIES or isinstance(error, InvalidOperation | NotStarted | TypeError):
                    raise
                log.warning("%s failed (%r), again in %.1f s", what, error, pause)
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                if not first.done():
                    first.set_result(None)
                return

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s failed for good: %s", task.get_name(), error, exc_info=error)

    async def drain(self) -> None:
        """Wait for all tasks of this event loop."""
        loop = asyncio.get_running_loop()
        while tasks := [task for task in self._tasks if task.get_loop() is loop]:
            await asyncio.wait(tasks)


class Room(Protocol):
    """What an aspect asks its Inventory for, at each call (``replaced()`` may have changed it)."""

    @property
    def hold_ttl(self) -> float: ...
    @property
    def _afterwards(self) -> Afterwards: ...
    def _task_route(self, merchant: str) -> str:
        """By which group of workers a later-function of the merchant is to be run; empty: any."""
        ...

    def _stock_acts(self) -> StockActs: ...
    def _ledger(self) -> Ledger: ...
    def _default_merchant(self) -> str | None: ...


class Translating:
    """``with``: our errors leave as what ``raises`` says, by the nearest class, with ours as their cause."""

    __slots__ = ("_raises",)

    def __init__(self, raises: Raises | None) -> None:
        self._raises = raises or {}

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._raises and isinstance(error, InventoryError):
            for each in type(error).__mro__:
                make = self._raises.get(each)
                if make is not None:
                    raise (make(str(error)) if isinstance(make, type) else make(error)) from error


class Take:
    """What a call has taken, and the ways it can end. Every method may be repeated."""

    def __init__(self, room: Room, kind: Kind, asked: dict[str, Any], receipt: Receipt, *, deduct: bool, ttl: float | None) -> None:
        self.room = room
        self.kind = kind
        self.asked = asked
        self.receipt = receipt
        self.deduct = deduct
        self.ttl = ttl

    async def undo(self) -> None:
        await self.room._stock_acts().undo(self.receipt)

    async def secure(self) -> None:
        """A replay's part: make sure that the first call can't undo any more, or take anew where it has."""
        acts = self.room._stock_acts()
        while self.receipt.replayed and not await acts.keep(self.receipt):
            try:
                self.receipt = await acts.submit(self.kind, **self.asked)
            except (InsufficientStock, OperationConflict, ReservationClosed) as error:
                raise ReservationClosed(self.receipt.operation_id, "released") from error

    async def finish(self) -> None:
        """The function has returned."""
        await self.secure()
        if self.kind is not Kind.RESERVE:
            if len(self.receipt.positions) > 1:
                # Its parts wait for this: from now on it can't be undone.
                await self.room._stock_acts().keep(self.receipt)
            return
        acts = self.room._stock_acts()
        name, merchant = self.receipt.operation_id, self.receipt.merchant
        try:
            if self.deduct:
                # The function has returned: if it took longer than the hold lives, the stock is taken again if it is there.
                await acts.confirm(name, merchant=merchant, durability=self.asked.get("durability"), reacquire=True)
            elif self.ttl is None:
                await acts.extend(name, ttl=None, merchant=merchant)
        except ReservationClosed as error:
            # Confirmed already: by the function itself, or before this replay.
            if error.state != "confirmed":
                raise


class SessionTake:
    """A take whose end is decided by a database transaction (see ``stock/session.py``).

    Before the commit the hold is pinned, so that its time can't run out, and the decision ``committed`` is written through the
    transaction. If the process dies now, whoever finds the overdue pin asks the ledger. After the commit a deduct is confirmed
    and a reserve's ttl runs again; after a rollback the take is undone by the call that took.
    """

    def __init__(self, take: Take, translating: Translating) -> None:
        self._take = take
        self._translating = translating
        self._pinned = False
        self._closed_before = False

    @property
    def _key(self) -> str:
        return key_of(self._take.receipt.merchant, self._take.receipt.operation_id)

    async def hold(self) -> None:
        with self._translating:
            await self._take.secure()
            acts = self._take.room._stock_acts()
            self._pinned = await acts.pin(self._take.receipt, resume=self._take.ttl, confirm=self._take.deduct)

    async def decide(self, connection: Any) -> None:
        ledger, name = self._take.room._ledger(), self._take.receipt.operation_id
        with self._translating:
            # Not held any more: fine for a replay if an earlier transaction had committed it. Else this one is aborted by the
            # error, and the verdict that was just written goes with it.
            verdict = await ledger.decide(self._key, "committed" if self._pinned else "aborted", connection)
            if verdict != "committed":
                raise ReservationClosed(name, "released") if self._pinned else ReservationExpired(name)
        self._closed_before = not self._pinned

    async def committed(self) -> None:
        if self._closed_before:
            return
        acts = self._take.room._stock_acts()
        if self._take.deduct:
            await acts.settle_pinned(self._take.receipt, "confirm")
        else:
            await acts.resume(self._take.receipt, self._take.ttl)

    async def rolled_back(self, unclear: bool) -> None:
        if self._closed_before:
            return
        acts, receipt = self._take.room._stock_acts(), self._take.receipt
        if unclear:
            if await self._take.room._ledger().decide(self._key, "aborted") == "committed":
                await self.committed()
            elif not receipt.replayed:
                # The verdict stands for good, so the id is closed and not freed.
                await acts.settle_pinned(receipt, "release")
        elif not receipt.replayed:
            await acts.undo(receipt, decider=True)
        elif self._pinned:
            await acts.resume(receipt, self._take.ttl or self._take.room.hold_ttl)
