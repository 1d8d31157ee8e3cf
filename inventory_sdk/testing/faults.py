"""Faults to order, for tests of your own: lose a reply, take a server away, empty Redis, and see what your code does.

Each takes an ``Inventory`` that is started in this event loop and touches nothing but that one object's connections (except
``empty_redis``, which removes its keys). A block yields a ``Fault`` whose ``met`` tells how often it was met: a test whose fault
was never met has tested nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from redis.exceptions import ConnectionError as RedisConnectionError

from inventory_sdk.errors import InventoryError
from inventory_sdk.stock.partition import KEY_NAMES
from inventory_sdk.stock.wire import NotExecuted, ReplyLost
from inventory_sdk.sync.queues.protocol import PublishFailed

if TYPE_CHECKING:
    from inventory_sdk.inventory import Inventory


@dataclass(slots=True)
class Fault:
    """``met``: how many calls have met it so far."""

    met: int = 0


@contextmanager
def reply_lost(inventory: Inventory, times: int = 1) -> Iterator[Fault]:
    """The next ``times`` batches run in Redis, and their answers never arrive.

    The callers get their receipts all the same once the script can't be running any more (``redis_timeout`` seconds later): from
    the journal, or by sending again what is not there.
    """
    wire = inventory._ready().engine.wire
    run, fault = wire.run, Fault()

    async def lossy(name: str, *arguments: Any, **options: Any) -> Any:
        reply = await run(name, *arguments, **options)
        if name == "batch" and fault.met < times:
            fault.met += 1
            raise ReplyLost("injected: the answer was lost")
        return reply

    with _instead(wire, "run", lossy):
        yield fault


@contextmanager
def redis_away(inventory: Inventory) -> Iterator[Fault]:
    """Nothing reaches Redis. Callers wait up to ten seconds for it, then get ``Overloaded``."""
    running, fault = inventory._ready(), Fault()

    async def refused(*_: Any, **__: Any) -> Any:
        fault.met += 1
        raise NotExecuted("injected: Redis can't be reached")

    async def unreachable(*_: Any, **__: Any) -> Any:
        fault.met += 1
        raise RedisConnectionError("injected: Redis can't be reached")  # as the client says it, whose users know nothing else

    with _instead(running.engine.wire, "run", refused), _instead(running.client, "execute_command", unreachable):
        yield fault


@contextmanager
def queue_away(inventory: Inventory) -> Iterator[Fault]:
    """Nothing is published. At durability ``queue`` callers get ``DurabilityNotReached``: what they did stands, and the worker
    finds it in the journal."""
    queue, fault = inventory._ready().queue, Fault()
    if not queue.confirms:
        raise InventoryError("queue_away needs an inventory with a queue that confirms: Inventory(queue='amqp://…')")

    async def failed(*_: Any, **__: Any) -> None:
        fault.met += 1
        raise PublishFailed("injected: the queue can't be reached")

    with _instead(queue, "publish", failed):
        yield fault


@contextmanager
def database_away(inventory: Inventory) -> Iterator[Fault]:
    """No transaction can begin on the ledger's engine (on yours, if you gave one): restocks fail, sales go on, the worker waits."""
    from sqlalchemy import event
    from sqlalchemy.exc import OperationalError

    fault = Fault()

    def refused(_: Any) -> None:
        fault.met += 1
        raise OperationalError("injected", None, ConnectionError("the database can't be reached"), connection_invalidated=True)

    engine = _engine(inventory)
    event.listen(engine, "begin", refused)
    try:
        yield fault
    finally:
        event.remove(engine, "begin", refused)


@contextmanager
def commit_unheard(inventory: Inventory, times: int = 1) -> Iterator[Fault]:
    """The next ``times`` commits on the ledger's engine are made, and the answer never arrives."""
    from sqlalchemy.exc import OperationalError

    dialect, fault = _engine(inventory).dialect, Fault()
    commit = dialect.do_commit

    def unheard(connection: Any) -> None:
        commit(connection)
        if fault.met < times:
            fault.met += 1
            raise OperationalError("injected", None, ConnectionError("the connection broke after the commit"), connection_invalidated=True)

    with _instead(dialect, "do_commit", unheard):
        yield fault


@asynccontextmanager
async def worker_away(inventory: Inventory) -> AsyncIterator[None]:
    """The worker inside (``memory://`` or ``replaced()``) is stopped; another one begins when the block ends."""
    running = inventory._ready()
    worker = running.embedded_worker
    if worker is None:
        raise InventoryError("no worker runs inside this inventory: stop the one that you started")
    await worker.stop()
    try:
        yield
    finally:
        await running.embed_worker()


async def empty_redis(inventory: Inventory) -> int:
    """Remove everything that this inventory has in Redis, as a server without persistence loses it at a restart; the number of
    keys that were there. A worker builds it anew from the ledger; until then callers get ``StockFrozen``."""
    running = inventory._ready()
    gone = 0
    for partition in running.engine.partitions:
        gone += await running.client.delete(*(partition.key(name) for name in KEY_NAMES))
    return gone


@contextmanager
def _instead(owner: Any, name: str, other: Any) -> Iterator[None]:
    """The owner has another method of this name while the block runs."""
    before = vars(owner).get(name)
    setattr(owner, name, other)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:  # two faults of one kind, one in the other
            setattr(owner, name, before)


def _engine(inventory: Inventory) -> Any:
    ledger: Any = inventory.ledger
    return ledger.engine.sync_engine
