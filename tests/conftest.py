"""Services for the tests. A marker names what a test needs; a server that isn't there skips the test by name, or fails it
under INVENTORY_TEST_SERVICES=required. Every test has a namespace of its own."""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from sqlalchemy.engine.base import Engine
from sqlalchemy.util import LRUCache

from tests import cluster_kit

T = TypeVar("T")

SERVICES = {
    "redis": ("INVENTORY_TEST_REDIS_URL", "redis://127.0.0.1:6379/0"),
    "amqp": ("INVENTORY_TEST_AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/"),
    "postgresql": ("INVENTORY_TEST_POSTGRESQL_URL", "postgresql+asyncpg://postgres@127.0.0.1:5432/test"),
    "mariadb": ("INVENTORY_TEST_MARIADB_URL", "mysql+asyncmy://root@127.0.0.1:3306/test"),
}


def service_url(name: str) -> str:
    variable, default = SERVICES[name]
    return os.environ.get(variable, default)


def required() -> bool:
    """Whether a missing server is a failure: this is CI, and random tests run longer."""
    return os.environ.get("INVENTORY_TEST_SERVICES") == "required"


def sample(cases: Sequence[T]) -> Sequence[T]:
    """Of cases that differ in little: all of them in CI, else each third."""
    return cases if required() else cases[::3]


@pytest.fixture(scope="session", autouse=True)
def compiled() -> Iterator[None]:
    """Thousands of tests make an engine on SQLite each and send it the same statements: they are compiled once."""
    shared: LRUCache[Any, Any] = LRUCache(2000)
    made = Engine.__init__

    def make(engine: Engine, *arguments: Any, **options: Any) -> None:
        made(engine, *arguments, **options)
        if engine.dialect.name == "sqlite":
            engine._compiled_cache = shared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", make)
        yield


@cache
def answers(name: str) -> bool:
    parts = urlsplit(service_url(name))
    try:
        socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 0), timeout=2).close()
    except OSError:
        return False
    return True


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cluster"):
        cluster_kit.cluster()
    for name in SERVICES:
        if item.get_closest_marker(name) and not answers(name):
            message = f"no {name} server at {service_url(name)}"
            if required():
                pytest.fail(message, pytrace=False)
            pytest.skip(message)


def pytest_sessionfinish() -> None:
    cluster_kit.end_cluster()


@pytest.fixture
def namespace() -> str:
    """A name nobody else uses: Redis namespace, queue prefix, table prefix."""
    return f"t{uuid.uuid4().hex[:12]}"


@pytest.fixture
def redis_url() -> str:
    return service_url("redis")


@pytest.fixture
def amqp_url() -> str:
    return service_url("amqp")


@pytest.fixture
def postgresql_url() -> str:
    return service_url("postgresql")


@pytest.fixture
def mariadb_url() -> str:
    return service_url("mariadb")
