"""The double of RabbitMQ at the Queue protocol: what is confirmed stays until it is acknowledged; everything else may go wrong."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from inventory_sdk.sync.queues.protocol import Message, PublishFailed, QueueUnavailable, Unroutable

if TYPE_CHECKING:
    from tests.model.simulator.world import Process, World


class BrokerGone(Exception):
    """The connection to the broker broke."""


@dataclass(slots=True)
class Line:
    """One partition's queue."""

    bound: set[int] = field(default_factory=set)
    waiting: deque[Message] = field(default_factory=deque)
    consumers: list[SimConsumer] = field(default_factory=list)

    def wake(self) -> None:
        if self.consumers and self.waiting:
            self.consumers[0].arrived.set()

    def unsettled(self) -> int:
        """Messages that nobody has acknowledged, those that a consumer holds included."""
        return len(self.waiting) + sum(len(consumer.unacked) for consumer in self.consumers)


class Broker:
    """The server, shared by all processes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.up = True
        self.lines: dict[int, Line] = {}
        self.ever_confirmed: set[tuple[int, int, int]] = set()
        """For the auditor."""
        self._tag = 0

    def line(self, partition: int) -> Line:
        return self.lines.setdefault(partition, Line())

    def put(self, message: Message) -> None:
        """A message is in: mostly at the end, at times before others (it overtook them on another connection)."""
        self._tag += 1
        line = self.line(message.partition)
        message = replace(message, tag=self._tag)
        if message.marker or not self.world.chance("reordered"):
            line.waiting.append(message)
        else:
            # Never past a marker: what is behind it came after the fence and would have been returned.
            last = max((at + 1 for at, each in enumerate(line.waiting) if each.marker), default=0)
            line.waiting.insert(self.world.random.randint(last, len(line.waiting)), message)
        line.wake()

    def restart(self) -> None:
        """Every connection breaks; what is confirmed is on disk."""
        self.up = False
        for line in self.lines.values():
            for consumer in list(line.consumers):
                consumer.lose()
        self.world.later(self.world.random.uniform(0.05, 1.5), self._back)

    def _back(self) -> None:
        self.up = True

    def empty(self) -> None:
        """Somebody set the broker up anew: no messages, no bindings."""
        self.restart()
        for line in self.lines.values():
            line.bound.clear()
            line.waiting.clear()

    def abandoned(self, process: Process) -> None:
        """A process died: its connections are noticed to be gone some time later."""
        for line in self.lines.values():
            for consumer in [each for each in line.consumers if each.process is process]:
                self.world.later(self.world.random.choice((0.001, 0.01, 0.5, 3.0)), consumer.lose)


class SimConsumer:
    """One process' place in a line; the first one is active."""

    def __init__(self, process: Process, broker: Broker, line: Line) -> None:
        self.process = process
        self.arrived = asyncio.Event()
        self.gone = False
        self._broker = broker
        self._line = line
        self.unacked: dict[int, Message] = {}

    async def get(self, timeout: float) -> Sequence[Message]:
        line = self._line
        self._check()
        if not (line.waiting and line.consumers[0] is self):
            self.arrived.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self.arrived.wait()
            except TimeoutError:
                return []
        self._check()
        world = self._broker.world
        count = len(line.waiting)
        if count > 1 and world.chance("trickle"):
            count = world.random.randint(1, count)
        taken = [line.waiting.popleft() for _ in range(count)] if line.consumers[0] is self else []
        self.unacked.update((message.tag, message) for message in taken)
        return taken

    async def ack(self, messages: Sequence[Message]) -> None:
        await self.process.away(self._broker.world.network.latency())
        self._check()
        if self._broker.world.chance("ack_lost"):
            self.lose()
            raise BrokerGone("the connection broke before the acknowledgement arrived")
        for message in messages:
            if self.unacked.pop(message.tag, None) is not None and not message.marker:
                self._broker.world.auditor.acknowledged(message)

    def _check(self) -> None:
        if self.gone:
            raise BrokerGone("the consumer's connection is gone")

    def lose(self) -> None:
        """The connection is gone: what was not acknowledged comes again, first, to whoever is next."""
        if self.gone:
            return
        self.gone = True
        line = self._line
        line.consumers.remove(self)
        line.waiting.extendleft(replace(message, redelivered=True) for message in reversed(self.unacked.values()))
        if self.unacked:
            self._broker.world.count("redelivered")
        self.unacked.clear()
        self.arrived.set()
        line.wake()


class SimQueue:
    """One process' way to the broker."""

    confirms = True

    def __init__(self, process: Process, broker: Broker) -> None:
        self._process = process
        self._broker = broker

    async def start(self) -> None:
        """Connections are made when needed."""

    async def close(self) -> None:
        """Nothing is kept open."""

    async def bind(self, partition: int, epoch: int) -> None:
        await self._reach("bind")
        self._broker.line(partition).bound.add(epoch)
        await self._reach("bind")

    async def unbind(self, partition: int, epoch: int) -> None:
        await self._reach("unbind")
        self._broker.line(partition).bound.discard(epoch)
        await self._reach("unbind")

    async def publish(self, partition: int, epoch: int, sequence: int, body: str, timeout: float) -> None:
        await self._send(Message(partition, epoch, sequence, body), timeout, bound=True)

    async def deliver(self, partition: int, epoch: int, sequence: int, body: str, timeout: float) -> None:
        await self._send(Message(partition, epoch, sequence, body), timeout, bound=False)

    async def mark(self, partition: int, epoch: int, timeout: float) -> None:
        await self._send(Message(partition, epoch, 0, "", marker=True), timeout, bound=False)

    @asynccontextmanager
    async def consume(self, partition: int, epoch: int, after: int) -> AsyncIterator[SimConsumer]:
        await self._reach("consume")
        line = self._broker.line(partition)
        consumer = SimConsumer(self._process, self._broker, line)
        line.consumers.append(consumer)
        line.wake()
        try:
            yield consumer
        finally:
            consumer.lose()

    async def announce(self, messages: Sequence[Message]) -> None:
        await self._reach("announce")
        self._broker.world.auditor.announced(messages)

    async def check(self) -> list[str]:
        return []

    async def delete(self, partition: int) -> None:
        self._broker.lines.pop(partition, None)

    async def _reach(self, what: str) -> None:
        world = self._broker.world
        await self._process.away(world.network.latency())
        if not self._broker.up or world.chance("broker_away"):
            raise QueueUnavailable(f"{what}: the broker can't be reached")

    async def _send(self, message: Message, timeout: float, bound: bool) -> None:
        broker, world = self._broker, self._broker.world
        answer: asyncio.Future[Any] = world.loop.create_future()

        def settle(result: Exception | None) -> None:
            if not answer.done():
                answer.set_result(result)

        def confirm() -> None:
            world.later(world.network.latency(), lambda: settle(None))

        def arrive(again: bool = False) -> None:
            if self._process.dead and not again and world.random.random() < 0.5:
                world.count("publish_died")  # it was still in the process' own buffers
                return
            if not broker.up:
                settle(PublishFailed("the broker's connection broke"))
                return
            if bound and message.epoch not in broker.line(message.partition).bound:
                settle(Unroutable(f"epoch {message.epoch} is not bound"))
                return
            broker.put(message)
            if not message.marker:
                broker.ever_confirmed.add((message.partition, message.epoch, message.sequence))
            if not again and world.chance("duplicated"):
                world.later(world.random.uniform(0, 2.0), lambda: arrive(True))
            if world.chance("confirm_lost"):
                world.later(world.network.latency(), lambda: settle(PublishFailed("the connection broke before the confirm")))
            else:
                confirm()

        if not broker.up or world.chance("publish_lost"):
            world.later(world.network.latency(), lambda: settle(PublishFailed("the connection broke")))
        elif world.chance("publish_late"):
            world.later(world.random.uniform(0.5, 8.0), arrive)
        else:
            world.later(world.network.latency(), arrive)
        try:
            async with asyncio.timeout(timeout):
                result = await answer
        except TimeoutError as error:
            raise PublishFailed("not confirmed in time") from error
        if isinstance(result, Exception):
            raise result
