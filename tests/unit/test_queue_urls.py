"""Which queue a URL names, and what RabbitMQ of which version is told."""

from __future__ import annotations

import pytest
from fakeredis import FakeAsyncRedis

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.sync.queues import from_url
from inventory_sdk.sync.queues.amqp import AmqpQueue
from inventory_sdk.sync.queues.amqp_topology import queue_arguments
from inventory_sdk.sync.queues.memory import MemoryQueue
from inventory_sdk.sync.queues.stream import StreamQueue


def test_the_scheme_names_the_queue() -> None:
    assert isinstance(from_url("amqp://guest:guest@127.0.0.1/", "ns"), AmqpQueue)
    assert isinstance(from_url("amqps://mq.example.com/shop", "ns"), AmqpQueue)
    assert isinstance(from_url("memory://", "ns"), MemoryQueue)
    assert isinstance(from_url(None, "ns", client_factory=FakeAsyncRedis), StreamQueue)


def test_an_unknown_scheme_is_refused_without_showing_a_password() -> None:
    with pytest.raises(InvalidOperation) as refused:
        from_url("kafka://user:secret@host/", "ns")
    assert "kafka://" in str(refused.value)
    assert "secret" not in str(refused.value)


def test_the_journal_as_queue_needs_redis() -> None:
    with pytest.raises(InvalidOperation, match="Redis client"):
        from_url(None, "ns")


@pytest.mark.parametrize("version", [(3, 10, 8), (3, 13), ()])
def test_rabbitmq_3_is_not_told_of_a_delivery_limit_that_it_would_take_for_zero(version: tuple[int, ...]) -> None:
    assert queue_arguments(version) == {"x-queue-type": "quorum", "x-single-active-consumer": True}


@pytest.mark.parametrize("version", [(4, 0), (4, 1, 3)])
def test_rabbitmq_4_is_told_to_keep_messages_however_often_they_come_back(version: tuple[int, ...]) -> None:
    assert queue_arguments(version)["x-delivery-limit"] == -1
