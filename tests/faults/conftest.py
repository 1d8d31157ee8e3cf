"""Servers of the fault tier: Redis for each test, PostgreSQL for all of them, RabbitMQ the shared one, behind proxies."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers_kit import PostgresServer, RedisServer, postgres_server, redis_server


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    # Processes crash here and the machine doesn't: what was written is there, flushed or not.
    with postgres_server("fsync=off", "full_page_writes=off") as server:
        yield server


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """Keeps what it was told through a crash."""
    with redis_server("--appendfsync", "everysec", persistent=True) as server:
        yield server


@pytest.fixture
def folder() -> Iterator[Path]:
    """For what callers and workers write: in memory where there is such a place, since callers flush every line."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)
