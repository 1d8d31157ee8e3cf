"""Servers of a test's own, on free ports, each in a folder that goes with it: Redis alone, with replicas, under Sentinel, as a
cluster, and PostgreSQL. They are meant to be killed; the shared ones never are. A missing program skips the test by name, or
fails it under INVENTORY_TEST_SERVICES=required."""

from __future__ import annotations

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from tests.conftest import required

PATIENCE: Final = 30.0
"""Seconds that a server may take to do what it was told before the test fails."""


def program(name: str) -> str:
    """The path of a server's program; PostgreSQL's are kept outside PATH by Debian."""
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = str(versions[-1]) if versions else shutil.which(name)
    if found is not None:
        return found
    message = f"no {name} program"
    if required():
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


BUS: Final = 10_000
"""So far above its port a cluster's node listens for the others."""


_DICE: Final = random.SystemRandom()
"""Several processes look for ports at once: each begins elsewhere."""


def free_ports(count: int, cluster: bool = False) -> list[int]:
    """Ports that nobody listens on, all different; for nodes of a cluster, their second ports are free as well, and below those
    that the system hands out to clients."""
    first, last = (12_000, 22_000) if cluster else (20_000, 65_535)
    found: list[int] = []
    with ExitStack() as stack:
        for port in range(first + _DICE.randrange(last - first - 1_000), last):
            try:
                for each in (port, port + BUS) if cluster else (port,):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", each))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError(f"no {count} free ports from {first} to {last}")


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Returns as soon as it holds; a connection error is a no."""
    end = time.monotonic() + seconds
    while True:
        with suppress(redis.RedisError, OSError):
            if condition():
                return
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


@dataclass
class RedisServer:
    """A redis-server process. It can be killed, paused, and started again on the same port and folder."""

    port: int
    folder: Path
    options: Sequence[str]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A blocking client for the test itself; the caller closes it."""
        return redis.Redis(port=self.port, socket_timeout=5.0, protocol=2)

    def start(self) -> None:
        """Returns once it answers (a replica may still be copying)."""
        command = [program("redis-server"), *self.options, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        with (self.folder / f"{self.port}.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until(self.answers, f"redis-server on port {self.port}")

    def answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.BusyLoadingError:
                return False

    def kill(self) -> None:
        """SIGKILL, as a crash; nothing that was not written is written."""
        self.signal(signal.SIGCONT)
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP and SIGCONT make it hang and go on."""
        if self.process is not None:
            self.process.send_signal(number)


@contextmanager
def redis_server(*options: str, persistent: bool = False) -> Iterator[RedisServer]:
    """One Redis. ``persistent``: append-only file, flushed at every write, so that it survives ``kill`` and ``start``."""
    keeps = ["--save", "", "--appendonly", "yes", "--appendfsync", "always"] if persistent else ["--save", "", "--appendonly", "no"]
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(free_ports(1)[0], Path(folder), [*keeps, *options])
        try:
            server.start()
            yield server
        finally:
            server.kill()


@contextmanager
def redis_with_replica(*options: str) -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary and a replica that is caught up."""
    with redis_server(*options, "--repl-diskless-sync-delay", "0") as primary, redis_server(*options) as replica:
        replicate(replica, primary)
        yield primary, replica


def replicate(replica: RedisServer, primary: RedisServer) -> None:
    """Make one follow the other; returns once it is caught up."""
    with replica.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", primary.port)
        wait_until(lambda: client.info("replication").get("master_link_status") == "up", "the replica's link")


def promote(replica: RedisServer) -> None:
    """Make a replica a primary of its own, as it stands."""
    with replica.client() as client:
        client.execute_command("REPLICAOF", "NO", "ONE")


@dataclass(frozen=True)
class Watched:
    """A primary, its replica and three Sentinels that call it ``service``."""

    primary: RedisServer
    replica: RedisServer
    sentinels: Sequence[RedisServer]
    service: str = "stock"

    @property
    def url(self) -> str:
        places = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{places}/{self.service}/0"


@contextmanager
def redis_under_sentinel() -> Iterator[Watched]:
    """Sentinels agree by two of three that a primary is down after one second."""
    with redis_with_replica() as (primary, replica), tempfile.TemporaryDirectory() as folder:
        sentinels: list[RedisServer] = []
        try:
            for port in free_ports(3):
                place = Path(folder) / str(port)
                place.mkdir()
                config = place / "sentinel.conf"
                config.write_text(
                    f"sentinel monitor stock 127.0.0.1 {primary.port} 2\n"
                    "sentinel down-after-milliseconds stock 1000\nsentinel failover-timeout stock 5000\n"
                )
                sentinels.append(RedisServer(port, place, [str(config), "--sentinel"]))
                sentinels[-1].start()
            watched = Watched(primary, replica, sentinels)
            for sentinel in sentinels:
                with sentinel.client() as client:
                    wait_until(
                        lambda client=client: (
                            len(client.execute_command("SENTINEL", "SENTINELS", "stock")) == 2
                            and len(client.execute_command("SENTINEL", "REPLICAS", "stock")) == 1
                        ),
                        "the Sentinels' acquaintance",
                    )
            yield watched
        finally:
            for sentinel in sentinels:
                sentinel.kill()


@contextmanager
def redis_cluster(masters: int = 3, replicas: int = 1) -> Iterator[list[RedisServer]]:
    """A Redis Cluster; the masters come first. All 16,384 slots are served when this returns."""
    nodes: list[RedisServer] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for port in free_ports(masters * (1 + replicas), cluster=True):
                place = Path(folder) / str(port)
                place.mkdir()
                options = ["--save", "", "--appendonly", "no", "--cluster-enabled", "yes", "--cluster-node-timeout", "1500"]
                nodes.append(RedisServer(port, place, [*options, "--repl-diskless-sync-delay", "0"]))
                nodes[-1].start()
            addresses = [f"127.0.0.1:{node.port}" for node in nodes]
            command = [program("redis-cli"), "--cluster", "create", *addresses, "--cluster-replicas", str(replicas), "--cluster-yes"]
            subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)

            def served(node: RedisServer) -> bool:
                with node.client() as client:
                    state = client.execute_command("CLUSTER", "INFO")
                    if "cluster_state:ok" not in str(state):
                        return False
                    return client.info("replication").get("master_link_status", "up") == "up"

            for node in nodes:
                wait_until(lambda node=node: served(node), "the cluster")
            yield nodes
        finally:
            for node in nodes:
                node.kill()


@dataclass
class PostgresServer:
    """A PostgreSQL of a test's own, trusting everybody on loopback; user and database ``postgres``."""

    port: int
    folder: Path
    user: str
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    settings: Sequence[str] = ()

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Returns once it takes connections (after a crash: once it has recovered)."""
        command = [program("postgres"), "-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder)]
        command += ["-c", "listen_addresses=127.0.0.1", "-c", "max_connections=100"]
        command += [word for setting in self.settings for word in ("-c", setting)]
        with (self.folder / "postgres.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, **_as(self.user))
        ready = [program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres"]
        wait_until(lambda: subprocess.run(ready, check=False).returncode == 0, f"postgres on port {self.port}")

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """SIGINT: at once, cleanly. SIGQUIT: as a crash, with recovery at the next start."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def restart(self) -> None:
        self.stop()
        self.start()


def _as(user: str) -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    return {"user": user} if os.geteuid() == 0 else {}


@contextmanager
def postgres_server(*settings: str) -> Iterator[PostgresServer]:
    """An empty PostgreSQL that keeps what it commits through a crash. ``settings``: ``name=value``."""
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    initdb = program("initdb")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.chown(folder, user)
        # initdb without syncing: a crash of the machine is not what is tested.
        made = [initdb, "-D", str(folder / "data"), "-U", "postgres", "-A", "trust", "-N", "--no-instructions"]
        subprocess.run(made, check=True, capture_output=True, **_as(user))
        (folder / "postgres.log").touch()
        server = PostgresServer(free_ports(1)[0], folder, user, settings=settings)
        try:
            server.start()
            yield server
        finally:
            server.stop(signal.SIGQUIT)
