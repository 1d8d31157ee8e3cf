"""A Prometheus server of a test's own that scrapes one port of this machine and evaluates the shipped rules."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from tests.servers_kit import free_ports, program, wait_until


class PrometheusServer:
    """Asks the server on a port of this machine."""

    def __init__(self, port: int) -> None:
        self.place = f"http://127.0.0.1:{port}"

    def ask(self, what: str, **arguments: str | float) -> Any:
        """The data of an API call; raises with Prometheus' own words where it refuses."""
        url = f"{self.place}/api/v1/{what}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:
                raise ConnectionError("Prometheus is starting") from error
            raise ValueError(f"{arguments}: {error.read().decode()}") from error

    def range(self, expression: str, seconds: float, points: int = 60) -> list[dict[str, Any]]:
        """The series of the last ``seconds``."""
        now = time.time()
        step = max(1, round(seconds / points))
        found: list[dict[str, Any]] = self.ask("query_range", query=expression, start=now - seconds, end=now, step=step)["result"]
        return found


@contextmanager
def prometheus(folder: Path, target: int, every: str = "500ms") -> Iterator[PrometheusServer]:
    """Scrapes ``127.0.0.1:target`` as job ``shop``."""
    (port,) = free_ports(1)
    (folder / "rules.yaml").write_text(files("inventory_sdk.metrics").joinpath("monitoring", "rules.yaml").read_text())
    configuration = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "shop", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    words = [
        program("prometheus"),
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        server = PrometheusServer(port)
        wait_until(lambda: server.ask("query", query='up{job="shop"} == 1')["result"], "Prometheus scrapes")
        yield server
    finally:
        process.terminate()
        process.wait(30)
