"""Real invoices through the real servers, from the command a user types; also when the process is killed in the middle."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import required

ROOT = Path(__file__).resolve().parents[2]
ORDERS = Path(os.environ.get("INVENTORY_TEST_ORDERS", ROOT.parent / "shared/data/online_retail_2011-12.csv.gz"))


@pytest.fixture
def orders() -> Path:
    if not ORDERS.exists():
        message = f"no orders file at {ORDERS}; INVENTORY_TEST_ORDERS names another"
        if required():
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    return ORDERS


def demo(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "from inventory_sdk.cli import main; main()", "demo", *map(str, arguments)]


def to_the_end(*arguments: str | Path) -> str:
    done = subprocess.run(demo(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout
    assert "PROVEN" in done.stdout
    return done.stdout


def counted(told: str, what: str) -> int:
    found = re.search(rf"{what}\D+([\d,]+)", told)
    assert found, told
    return int(found[1].replace(",", ""))


def test_the_real_invoices_agree_to_the_unit_embedded(orders: Path) -> None:
    told = to_the_end("--orders", orders)
    assert counted(told, "lines in the file") == 19_744
    assert counted(told, "by an earlier run already") == 0


@pytest.mark.redis
@pytest.mark.amqp
@pytest.mark.mariadb
def test_the_real_invoices_agree_to_the_unit_through_rabbitmq_and_mariadb(
    orders: Path, redis_url: str, amqp_url: str, mariadb_url: str, swept: str
) -> None:
    to_the_end("--orders", orders, "--redis", redis_url, "--queue", amqp_url, "--database", mariadb_url, "--namespace", swept)


@pytest.mark.redis
@pytest.mark.amqp
@pytest.mark.postgresql
def test_a_replay_killed_in_the_middle_and_started_again_completes_exactly_once(
    orders: Path, redis_url: str, amqp_url: str, postgresql_url: str, swept: str
) -> None:
    place = ("--orders", orders, "--redis", redis_url, "--queue", amqp_url, "--database", postgresql_url, "--namespace", swept)
    with subprocess.Popen(demo(*place), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if (done := re.search(r": (\d+)/(\d+) after", line)) and int(done[1]) * 3 > int(done[2]):
                break
        else:
            pytest.fail("it ended before it could be killed")
        first.send_signal(signal.SIGKILL)
    assert first.returncode == -signal.SIGKILL

    told = to_the_end(*place)
    assert counted(told, "by an earlier run already") > 0
