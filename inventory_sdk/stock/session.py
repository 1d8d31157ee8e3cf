"""``session=``: a take ends with the transaction of a SQLAlchemy session, whoever commits it and when.

Web frameworks commit after the response, so the end of the function is not the end of the transaction. What is watched is the
session's *root* transaction: the one in progress when the function is called, or else the next that begins.

- before its commit: ``Ending.hold`` (Redis), then ``Ending.decide`` with the transaction's own connection; either may refuse,
  which aborts the commit;
- when it has ended (``after_transaction_end``, the only event that always comes: ``after_commit`` comes for savepoints too, and
  a close without commit has no other): ``Ending.committed`` or ``Ending.rolled_back``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final, Protocol

from inventory_sdk.errors import InvalidOperation

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session, SessionTransaction

log = logging.getLogger("inventory_sdk.stock")

_KEY: Final = "inventory_sdk.stock"

Insist = Callable[[Callable[[], Coroutine[Any, Any, Any]], str], "asyncio.Future[BaseException | None]"]
"""Runs work that outlives its caller, with retries; the future answers the first try's error, or None."""


class Ending(Protocol):
    """What a take does at the ends of its transaction."""

    async def hold(self) -> None:
        """The root transaction is about to commit. Raising aborts the commit."""
        ...

    def decide(self, connection: Any) -> Coroutine[Any, Any, None]:
        """Write the decision through the transaction's connection. Raising aborts the commit."""
        ...

    async def committed(self) -> None: ...
    async def rolled_back(self, unclear: bool) -> None:
        """``unclear``: the commit was sent and its answer is not known."""
        ...


class Binding:
    """One take, tied to the root transaction of one session."""

    def __init__(self, session: Session, asynchronous: AsyncSession | None, ending: Ending, insist: Insist) -> None:
        self.session = session
        self.ending = ending
        self.insist = insist
        self.asynchronous = asynchronous
        self.root: SessionTransaction | None = session.get_transaction()
        self.loop = asyncio.get_running_loop()
        self.connection: Any = None
        self.prepared = False
        self.committed = False
        self.rolled_back = False
        self.ended = False
        self.dropped = False

    def join(self) -> None:
        """The function returned. If it began no transaction, one begins now: ``rollback()`` or ``close()`` of a session that has
        none would go unseen, and a later, foreign transaction would decide."""
        if self.root is None:
            self.session.begin()

    def drop(self) -> bool:
        """The function raised: True if the take is now the caller's to undo, False if the transaction has spoken or will."""
        if self.ended or self.prepared:
            return False
        self.dropped = True
        return True


def bind(session: Session, asynchronous: AsyncSession | None, ending: Ending, insist: Insist) -> Binding:
    """Tie ``ending`` to the session's root transaction in progress, or to the next one."""
    watch = session.info.get(_KEY)
    if watch is None:
        watch = session.info[_KEY] = _Watch()
        watch.listen(session)
    binding = Binding(session, asynchronous, ending, insist)
    watch.bindings.append(binding)
    return binding


class _Watch:
    """Listens to one session for as long as it lives; holds the takes whose transaction has not ended."""

    def __init__(self) -> None:
        self.bindings: list[Binding] = []

    def listen(self, session: Session) -> None:
        from sqlalchemy import event

        for name in ("after_transaction_create", "before_commit", "after_commit", "after_rollback", "after_transaction_end"):
            event.listen(session, name, getattr(self, name))

    def _of_root(self, session: Session) -> list[Binding]:
        """Those of the root transaction, when the event is the root's own and not a savepoint's."""
        if session.in_nested_transaction():
            return []
        root = session.get_transaction()
        return [each for each in self.bindings if each.root is root and not each.dropped]

    def after_transaction_create(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            for binding in self.bindings:
                if binding.root is None:
                    binding.root = transaction

    def before_commit(self, session: Session) -> None:
        for binding in self._of_root(session):
            if binding.asynchronous is not None:
                from sqlalchemy.util import await_only

                await_only(_prepare(binding, binding.asynchronous))
            else:
                _prepare_from_thread(binding, session)
            binding.prepared = True

    def after_commit(self, session: Session) -> None:
        for binding in self._of_root(session):
            binding.committed = True

    def after_rollback(self, session: Session) -> None:
        for binding in self._of_root(session):
            # A rollback on a living connection proves that the transaction did not commit; on a lost one it proves nothing.
            binding.rolled_back = binding.connection is None or not (binding.connection.invalidated or binding.connection.closed)

    def after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        # Savepoints end here too, but a binding's root is never one.
        over = [binding for binding in self.bindings if binding.root is transaction]
        self.bindings = [binding for binding in self.bindings if binding.root is not transaction]
        for binding in over:
            if not binding.dropped:
                _end(binding)


async def _prepare(binding: Binding, session: AsyncSession) -> None:
    await binding.ending.hold()
    connection = await session.connection()
    binding.connection = connection.sync_connection
    await binding.ending.decide(connection)


def _prepare_from_thread(binding: Binding, session: Session) -> None:
    if _running_loop() is not None:
        raise InvalidOperation(
            "session", session, "a sync Session can't be committed inside the event loop; use a worker thread or an AsyncSession"
        )
    asyncio.run_coroutine_threadsafe(_awaited(binding.ending.hold()), binding.loop).result()
    binding.connection = session.connection()
    # The transaction's connection belongs to this thread, so the decision is written here: every await in it is done at once.
    deciding = binding.ending.decide(_Immediate(binding.connection))
    try:
        deciding.send(None)
    except StopIteration:
        return
    deciding.close()
    raise InvalidOperation("session", session, "the ledger can't write its decision through a sync Session; use an AsyncSession")


async def _awaited(work: Any) -> None:
    await work


class _Immediate:
    """A sync connection with the awaitable methods of an AsyncConnection, for use in its own thread."""

    def __init__(self, connection: Any) -> None:
        self.sync_connection = connection
        self.dialect = connection.dialect

    async def execute(self, *args: Any, **kwargs: Any) -> Any:
        return self.sync_connection.execute(*args, **kwargs)

    async def scalar(self, *args: Any, **kwargs: Any) -> Any:
        return self.sync_connection.scalar(*args, **kwargs)

    async def run_sync(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(self.sync_connection, *args, **kwargs)


def _end(binding: Binding) -> None:
    """The root transaction is over. Waits for the first try where it can, so that whoever committed sees the stock as it is."""
    binding.ended = True
    ending, unclear = binding.ending, binding.prepared and not binding.rolled_back

    async def finish() -> None:
        if binding.committed:
            await ending.committed()
        else:
            await ending.rolled_back(unclear)

    name = "end of a session's take"
    if _running_loop() is binding.loop:
        first = binding.insist(finish, name)
        from sqlalchemy.util.concurrency import in_greenlet

        if in_greenlet():
            from sqlalchemy.util import await_only

            await_only(asyncio.shield(first))
    elif binding.loop.is_closed():
        log.error("a session ended after its event loop: its take waits until it expires, or until its overdue pin is resolved")
    else:
        binding.loop.call_soon_threadsafe(binding.insist, finish, name)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
