"""The publisher: what the process that journaled does with its entries."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from inventory_sdk.metrics.events import Event, Published, Retried
from inventory_sdk.sync.publish import Publisher
from inventory_sdk.sync.queues.amqp import AmqpQueue
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.queues.protocol import PublishFailed, Unroutable

LONG = 10.0


class Seen:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def record(self, event: Event) -> None:
        self.events.append(event)

    def failures(self) -> list[str | None]:
        return [event.failed for event in self.events if isinstance(event, Published)]

    def retries(self) -> int:
        return sum(isinstance(event, Retried) and event.what == "publish" for event in self.events)


class ScriptedQueue(MemoryQueue):
    """Answers each publish as the test says; ``calls`` counts them."""

    def __init__(self, answer: Callable[[int], Awaitable[None]]) -> None:
        super().__init__()
        self.calls = 0
        self.timeouts: list[float] = []
        self._answer = answer

    async def publish(self, partition: int, epoch: int, sequence: int, body: str, timeout: float) -> None:
        self.calls += 1
        self.timeouts.append(timeout)
        await self._answer(self.calls)


async def confirm(_: int) -> None:
    pass


async def test_an_entry_is_published_without_anybody_waiting() -> None:
    queue, seen = MemoryQueue(), Seen()
    await queue.bind(0, 1)
    publisher = Publisher(queue, seen)
    publisher.publish(0, 1, 1, "body")
    await publisher.close()
    async with queue.consume(0, 1, 0) as consumer:
        (message,) = await consumer.get(LONG)
    assert (message.sequence, message.body) == (1, "body")
    assert seen.failures() == [None]


async def test_who_needs_the_confirm_waits_for_it() -> None:
    gate = asyncio.Event()

    async def hold(_: int) -> None:
        await gate.wait()

    publisher = Publisher(ScriptedQueue(hold), Seen())
    publication = publisher.publish(0, 1, 1, "body")
    waiting = asyncio.create_task(publisher.confirmed(publication))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    gate.set()
    await waiting
    await publication
    await publisher.close()


async def test_a_failed_publish_is_tried_again_and_counted() -> None:
    async def third_time(call: int) -> None:
        if call < 3:
            raise PublishFailed("connection lost")

    queue, seen = ScriptedQueue(third_time), Seen()
    publisher = Publisher(queue, seen)
    await publisher.confirmed(publisher.publish(0, 1, 1, "body"))
    assert queue.calls == 3
    assert seen.retries() == 2
    assert seen.failures() == [None]
    await publisher.close()


async def test_a_publish_that_keeps_failing_ends_within_its_time() -> None:
    async def never(_: int) -> None:
        raise PublishFailed("nack")

    queue, seen = ScriptedQueue(never), Seen()
    publisher = Publisher(queue, seen)
    publication = publisher.publish(0, 1, 1, "body")
    with pytest.raises(PublishFailed, match="0/1-1, attempt 5: nack"):
        await publisher.confirmed(publication)
    assert queue.calls == 5
    assert seen.failures() == ["unconfirmed"]
    assert all(later < earlier for earlier, later in zip(queue.timeouts[:-1], queue.timeouts[1:-1], strict=False))
    await publisher.close()


async def test_a_returned_message_is_not_tried_again() -> None:
    queue, seen = MemoryQueue(), Seen()
    publisher = Publisher(queue, seen)
    with pytest.raises(Unroutable):
        await publisher.publish(0, 1, 1, "body")
    assert seen.retries() == 0
    assert seen.failures() == ["returned"]
    await publisher.close()


async def test_waiting_has_a_time_limit_of_its_own() -> None:
    gate = asyncio.Event()

    async def hold(_: int) -> None:
        await gate.wait()

    publisher = Publisher(ScriptedQueue(hold), Seen())
    publication = publisher.publish(0, 1, 1, "body")
    with pytest.raises(PublishFailed, match="not confirmed yet"):
        await publisher.confirmed(publication, timeout=0.01)
    gate.set()
    await publisher.confirmed(publication)
    await publisher.close()


async def test_a_cancelled_waiter_leaves_the_publish_to_the_others() -> None:
    gate = asyncio.Event()

    async def hold(_: int) -> None:
        await gate.wait()

    publisher = Publisher(ScriptedQueue(hold), Seen())
    publication = publisher.publish(0, 1, 1, "body")
    leaving, staying = (asyncio.create_task(publisher.confirmed(publication)) for _ in range(2))
    impatient = asyncio.create_task(asyncio.wait_for(publication, 0.01))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    with pytest.raises(TimeoutError):
        await impatient
    gate.set()
    await staying
    await publisher.close()


async def test_the_same_entry_on_its_way_is_not_sent_twice() -> None:
    gate = asyncio.Event()

    async def hold(_: int) -> None:
        await gate.wait()

    queue = ScriptedQueue(hold)
    publisher = Publisher(queue, Seen())
    first, second = publisher.publish(0, 1, 1, "body"), publisher.publish(0, 1, 1, "body")
    forked = publisher.publish(0, 1, 1, "another body")
    gate.set()
    await publisher.confirmed(first, second, forked)
    assert queue.calls == 2
    again = publisher.publish(0, 1, 1, "body")
    await again
    assert queue.calls == 3
    await publisher.close()


async def test_beyond_the_limit_only_entries_that_somebody_waits_for_are_sent() -> None:
    gate = asyncio.Event()

    async def hold(_: int) -> None:
        await gate.wait()

    queue, seen = ScriptedQueue(hold), Seen()
    publisher = Publisher(queue, seen, max_in_flight=2)
    publications = [publisher.publish(0, 1, sequence, "body") for sequence in range(1, 6)]
    assert seen.failures() == ["full"] * 3
    waiting = asyncio.create_task(publisher.confirmed(publications[4]))
    for _ in range(10):
        await asyncio.sleep(0)
    assert queue.calls == 2
    assert not waiting.done()
    gate.set()
    await waiting
    assert queue.calls == 3
    await publisher.close()


async def test_closing_drains_what_can_be_confirmed_and_cancels_the_rest() -> None:
    gate, stuck = asyncio.Event(), asyncio.Event()

    async def first_only(call: int) -> None:
        await (gate if call == 1 else stuck).wait()

    seen = Seen()
    publisher = Publisher(ScriptedQueue(first_only), seen)
    drained, cancelled = publisher.publish(0, 1, 1, "body"), publisher.publish(0, 1, 2, "body")
    asyncio.get_running_loop().call_soon(gate.set)
    await publisher.close(timeout=0.05)
    await publisher.confirmed(drained)
    with pytest.raises(PublishFailed, match="closed"):
        await publisher.confirmed(cancelled)
    assert sorted(map(str, seen.failures())) == ["None", "closed"]


async def test_a_queue_that_does_not_confirm_is_not_published_to_and_promises_nothing() -> None:
    class Journal(ScriptedQueue):
        @property
        def confirms(self) -> bool:
            return False

    queue = Journal(confirm)
    publisher = Publisher(queue, Seen())
    publication = publisher.publish(0, 1, 1, "body")
    with pytest.raises(PublishFailed, match="does not confirm"):
        await publication
    await publisher.close()
    assert queue.calls == 0


def test_one_publisher_serves_one_event_loop_after_another() -> None:
    queue = MemoryQueue()
    publisher = Publisher(queue, Seen(), max_in_flight=1)

    async def day(first: int) -> None:
        await queue.bind(0, 1)
        await publisher.confirmed(*(publisher.publish(0, 1, first + number, "body") for number in range(4)))
        await publisher.close()

    asyncio.run(day(1))
    asyncio.run(day(5))


@pytest.mark.amqp
async def test_every_entry_that_was_confirmed_is_in_rabbitmq(namespace: str, amqp_url: str) -> None:
    queue, seen = AmqpQueue(amqp_url, namespace), Seen()
    publisher = Publisher(queue, seen)
    await queue.bind(0, 1)
    try:
        publications = [publisher.publish(0, 1, sequence, f"entry {sequence}") for sequence in range(1, 201)]
        await publisher.confirmed(*publications)
        arrived: set[int] = set()
        async with asyncio.timeout(LONG), queue.consume(0, 1, 0) as consumer:
            while len(arrived) < 200:
                messages = await consumer.get(1.0)
                await consumer.ack(messages)
                arrived.update(message.sequence for message in messages)
        assert seen.failures() == [None] * 200
    finally:
        await publisher.close()
        await queue.delete(0)
        await queue.close()
