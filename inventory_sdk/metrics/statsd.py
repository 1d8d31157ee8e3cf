"""Events as StatsD lines over UDP: ``inventory.`` and the names of ``series.py``.

    inventory.operations_accepted:12|c|#kind:reserve         tags, as Datadog's and most agents take them
    inventory.operations_accepted.reserve:12|c               tags=False: plain StatsD, label values as parts of the name
    inventory.batch:4.2|ms|#lane:core                        seconds are sent as StatsD's timers, in milliseconds

Fire and forget: a packet that can't be sent at once is counted in ``dropped``, and so is one that the kernel reports as refused.
"""

from __future__ import annotations

import re
import socket
from threading import Lock
from typing import Final

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.metrics.events import Event
from inventory_sdk.metrics.series import Series
from inventory_sdk.metrics.sink import SeriesSink, Write

MAX_PACKET: Final = 1432
"""Bytes that fit into one Ethernet frame."""

MAX_LABEL: Final = 100
"""Characters of a label's value."""
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_./-]")


class StatsdMetrics(SeriesSink):
    """A sink. ``host`` is looked up once, here (``InvalidOperation`` where it has no address). ``prefix`` stands before every name;
    ``tags``: labels as tags, or in the name."""

    def __init__(self, host: str = "127.0.0.1", port: int = 8125, *, prefix: str = "inventory", tags: bool = True) -> None:
        super().__init__()
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        except OSError as error:
            raise InvalidOperation("host", host, f"of StatsdMetrics can't be looked up ({error}): name the agent by its address") from error
        self.dropped = 0
        self._socket = socket.socket(family, kind, protocol)
        self._socket.setblocking(False)
        self._socket.connect(address)
        self._prefix = prefix
        self._tags = tags
        self._lines: list[bytes] = []
        self._lock = Lock()

    def record(self, event: Event) -> None:
        """Send it, in as few packets as hold it."""
        with self._lock:  # several event loops may be in several threads
            super().record(event)
            lines, self._lines = self._lines, []
        packet: list[bytes] = []
        size = 0
        for line in lines:
            if packet and size + len(line) > MAX_PACKET:
                self._send(packet)
                packet, size = [], 0
            packet.append(line)
            size += len(line) + 1
        if packet:
            self._send(packet)

    def close(self) -> None:
        """Close the socket; what is recorded later is dropped."""
        self._socket.close()

    def __del__(self) -> None:
        # A sink lives as long as its service; nobody should have to close one.
        if hasattr(self, "_socket"):
            self._socket.close()

    def opened(self, series: Series, labels: tuple[str, ...]) -> Write:
        """One that puts a line into the event's packet."""
        seconds = series.kind == "histogram" and series.unit == "s"
        name = f"{self._prefix}.{series.name.removesuffix('_seconds') if seconds else series.name}"
        end = ""
        if self._tags:
            end = "|#" + ",".join(f"{key}:{_safe(value)}" for key, value in zip(series.labels, labels, strict=True)) if labels else ""
        else:
            name = ".".join([name, *(_safe(value).replace(".", "_") or "none" for value in labels)])
        kind = {"counter": "c", "gauge": "g", "histogram": "ms" if seconds or not self._tags else "h"}[series.kind]
        scale = 1000 if seconds else 1

        def line(value: float) -> None:
            # A gauge with a sign would be changed by it, not set; ours are never negative.
            self._lines.append(f"{name}:{value * scale:.12g}|{kind}{end}".encode())

        return line

    def ended(self, series: Series, labels: tuple[str, ...]) -> bool:
        """StatsD goes on sending a gauge's last value: that is 0 then, said once."""
        self._writes[series, labels](0)
        return False

    def _send(self, packet: list[bytes]) -> None:
        try:
            self._socket.send(b"\n".join(packet))
        except OSError:  # no room in the socket's buffer, nobody listens, or it is closed: measuring must not hurt selling
            self.dropped += 1


def _safe(value: str) -> str:
    return _UNSAFE.sub("_", value[:MAX_LABEL])
