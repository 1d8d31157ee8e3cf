"""What all benchmarks take on the command line."""

from __future__ import annotations

import argparse
import os
import uuid
from dataclasses import dataclass

REDIS = "redis://127.0.0.1:6379/0"
QUEUE = "amqp://guest:guest@127.0.0.1/"
DATABASE = "postgresql+asyncpg://postgres@127.0.0.1:5432/test"


@dataclass(frozen=True, slots=True)
class Options:
    """Servers, load, and a name that nobody else uses (Redis namespace, queue, table prefix)."""

    redis: str
    queue: str
    database: str
    callers: tuple[int, ...]
    seconds: float
    name: str


def parse(what: str | None, callers: str = "64,256") -> Options:
    """The command line; ``what`` is the module's docstring."""
    parser = argparse.ArgumentParser(description=(what or "").partition("\n")[0])
    parser.add_argument("--redis", default=os.environ.get("INVENTORY_TEST_REDIS_URL", REDIS))
    parser.add_argument("--queue", default=os.environ.get("INVENTORY_TEST_AMQP_URL", QUEUE))
    parser.add_argument("--database", default=os.environ.get("INVENTORY_TEST_POSTGRESQL_URL", DATABASE))
    parser.add_argument("--callers", default=callers, help="concurrent callers, comma-separated (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="load of each variant (default %(default)s)")
    given = parser.parse_args()
    try:
        counts = tuple(int(count) for count in given.callers.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        parser.error(f"--callers={given.callers!r}: must be whole numbers from 1, such as 64,256")
    if given.seconds <= 0:
        parser.error(f"--seconds={given.seconds}: must be more than 0")
    return Options(given.redis, given.queue, given.database, counts, given.seconds, f"b{uuid.uuid4().hex[:10]}")
