"""Servers of the fault tier: Redis for each test, PostgreSQL for all of them, RabbitMQ the shared one, behind proxies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers_kit import PostgresServer, RedisServer, postgres_server, redis_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """Keeps what it was told through a crash."""
    with redis_server(persistent=True) as server:
        yield server
