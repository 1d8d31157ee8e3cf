"""One Redis Cluster for a whole test run, and what befalls it: slots that move, replicas that take over, masters that die."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import redis
from redis.crc import key_slot

from tests.servers_kit import RedisServer, redis_cluster, wait_until

_running: Final = ExitStack()
_found: Final[list[Cluster]] = []


@dataclass
class Cluster:
    """Six nodes; who is a master is asked anew each time."""

    nodes: Sequence[RedisServer]
    opened: int = 0
    """Shops that the contract tests have opened on it."""
    ids: dict[int, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{node.port}' for node in self.nodes[:2])}/"

    def node(self, port: int) -> RedisServer:
        return next(node for node in self.nodes if node.port == port)

    @contextmanager
    def client(self, port: int) -> Iterator[redis.Redis]:
        with self.node(port).client() as client:
            yield client

    def say(self, port: int, *words: Any) -> Any:
        with self.client(port) as client:
            return client.execute_command(*words)

    def id_of(self, port: int) -> str:
        if port not in self.ids:
            self.ids[port] = _text(self.say(port, "CLUSTER", "MYID"))
        return self.ids[port]

    def masters(self) -> list[int]:
        """Ports, of those that are alive and own slots."""
        return sorted({port for _, _, (_, port, *_), *_ in self._ranges()})

    def owner(self, key: str) -> int:
        """Port of the master that has this key."""
        slot = key_slot(key.encode())
        return next(port for first, last, (_, port, *_), *_ in self._ranges() if first <= slot <= last)

    def replica(self, port: int) -> int:
        """A replica of this master, as that one sees it."""
        with self.client(port) as client:
            return int(client.info("replication")["slave0"]["port"])

    def _ranges(self) -> list[Any]:
        for node in self.nodes:
            if node.process is None:
                continue
            with node.client() as client:
                connection = client.connection_pool.make_connection()
                try:
                    connection.connect()
                    connection.send_command("CLUSTER", "SLOTS")
                    return list(connection.read_response())
                finally:
                    connection.disconnect()
        raise RuntimeError("no node runs")

    def move_empty(self, key: str) -> None:
        """The slot of this key, which holds nothing, to another master."""
        slot, source = key_slot(key.encode()), self.owner(key)
        target = next(port for port in self.masters() if port != source)
        self.say(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        self.end_move(slot, source, target)

    def begin_move(self, key: str, target: int) -> int:
        """The slot of this key is on its way: source and target redirect."""
        slot, source = key_slot(key.encode()), self.owner(key)
        self.say(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.id_of(source))
        self.say(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.id_of(target))
        return source

    def move_keys(self, slot: int, source: int, target: int, *only: str) -> int:
        """Its keys go over, all or those named; how many."""
        keys = [key.encode() for key in only] or self.say(source, "CLUSTER", "GETKEYSINSLOT", slot, 1000)
        for key in keys:
            self.say(source, "MIGRATE", "127.0.0.1", target, key, 0, 5000)
        return len(keys)

    def end_move(self, slot: int, source: int, target: int) -> None:
        """The slot is the target's, and every master knows it."""
        for port in (target, source, *(each for each in self.masters() if each not in (source, target))):
            self.say(port, "CLUSTER", "SETSLOT", slot, "NODE", self.id_of(target))

    def move(self, key: str, target: int | None = None) -> int:
        """The whole slot of this key to another master; its port."""
        slot, source = key_slot(key.encode()), self.owner(key)
        chosen = target if target is not None else next(port for port in self.masters() if port != source)
        self.begin_move(key, chosen)
        while self.move_keys(slot, source, chosen):
            pass
        self.end_move(slot, source, chosen)
        return chosen

    def fail_over(self, master: int) -> int:
        """A replica that is caught up takes over; its port."""
        replica = self.replica(master)
        self.say(replica, "CLUSTER", "FAILOVER")
        wait_until(lambda: replica in self.masters() and master not in self.masters(), "the failover")
        return replica

    def kill(self, master: int) -> int:
        """SIGKILL; returns the port of its replica, which takes over after a while."""
        replica = self.replica(master)
        self.node(master).kill()
        return replica

    def whole(self) -> None:
        """Start who is dead; returns once every master has its replica and every node sees all is well."""
        for node in self.nodes:
            if node.process is None:
                node.start()
        for node in self.nodes:
            wait_until(lambda node=node: self._well(node), f"the cluster as {node.port} sees it")

    def _well(self, node: RedisServer) -> bool:
        with node.client() as client:
            links = client.info("replication")
            linked = links["role"] == "master" or links["master_link_status"] == "up"
            return "cluster_state:ok" in str(client.execute_command("CLUSTER", "INFO")) and linked and len(self.masters()) == 3


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def cluster() -> Cluster:
    """The run's cluster, started when it is first asked for."""
    if not _found:
        _found.append(Cluster(_running.enter_context(redis_cluster())))
    return _found[0]


def end_cluster() -> None:
    """At the end of the run."""
    _found.clear()
    _running.close()
