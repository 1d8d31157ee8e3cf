"""The command line: what it understands, what it refuses, and how it says so."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import inventory_sdk
from inventory_sdk.cli import doctor
from inventory_sdk.cli.app import app
from inventory_sdk.cli.doctor import Deployment

runner = CliRunner()


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "QUEUE_URL", "DATABASE_URL", "NAMESPACE", "PARTITIONS"):
        monkeypatch.delenv(f"INVENTORY_{name}", raising=False)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)  # the worker's; it would stay for all later tests


def ran(*arguments: str, code: int = 0) -> str:
    done = runner.invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == code, done.output
    return done.output


def test_help_lists_the_commands() -> None:
    told = ran("--help")
    assert all(command in told for command in ("demo", "worker", "schema", "doctor", "admin", "admin-user"))


@pytest.mark.parametrize("command", ["demo", "worker", "schema", "doctor", "admin", "admin-user"])
def test_every_command_explains_itself(command: str) -> None:
    assert "Usage" in ran(command, "--help")


def test_version_is_the_packages_own() -> None:
    assert ran("--version").strip() == f"inventory_sdk {inventory_sdk.__version__}"


@pytest.mark.parametrize(
    "arguments",
    [("sell",), ("demo", "--buyers", "0"), ("demo", "--units", "many"), ("demo", "--orders", "/no/such/file"), ("worker",)],
)
def test_what_it_does_not_understand_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    ran(*arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("demo", "--queue", "amqp://127.0.0.1/"), "--redis"),
        (("demo", "--redis", "redis://127.0.0.1/"), "--database"),
        (("schema",), "INVENTORY_DATABASE_URL"),
        (("schema", "--sql", "--check", "--database", "sqlite+aiosqlite://"), "exclude"),
        (("doctor",), "INVENTORY_REDIS_URL"),
        (("doctor", "--redis", "redis://127.0.0.1/"), "INVENTORY_DATABASE_URL"),
        (("doctor", "--durability", "forever"), "'forever'"),
        (("worker", "shop"), "MODULE:INVENTORY"),
        (("worker", "no_such_module_here:inventory"), "no_such_module_here"),
        (("worker", "json:inventory"), "'inventory'"),
        (("worker", "json:dumps"), "function"),
        (("worker", "json:dumps", "--log-level", "LOUD"), "'LOUD'"),
    ],
)
def test_a_refusal_names_what_to_change_and_is_exit_code_1(arguments: tuple[str, ...], named: str) -> None:
    assert named in ran(*arguments, code=1)


def test_a_worker_whose_module_lacks_a_dependency_names_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_that_breaks.py").write_text("import a_driver_that_is_not_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    done = runner.invoke(app, ["worker", "shop_that_breaks:inventory"])
    assert isinstance(done.exception, ModuleNotFoundError)
    assert done.exception.name == "a_driver_that_is_not_here"


def test_without_its_extra_the_command_names_the_extra() -> None:
    block = "import sys; sys.modules['typer'] = None; import inventory_sdk.cli as cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "inventory_sdk[cli]" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_its_extra_the_command_still_says_its_version() -> None:
    code = "import sys; sys.modules['typer'] = None; sys.argv = ['inventory-sdk', '--version']; import inventory_sdk.cli as cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"inventory_sdk {inventory_sdk.__version__}\n"


def test_help_loads_neither_the_database_nor_fakeredis() -> None:
    code = """
import sys
from inventory_sdk.cli.app import app
try:
    app(["--help"])
except SystemExit:
    pass
print(sorted({"sqlalchemy", "fakeredis", "aio_pika"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("url", "type_of_key"),
    [("postgresql+asyncpg://host/db", 'COLLATE "C"'), ("mysql+asyncmy://host/db", "VARBINARY"), ("sqlite+aiosqlite://", "TEXT")],
)
def test_schema_sql_prints_the_databases_own_statements_without_connecting(url: str, type_of_key: str) -> None:
    told = ran("schema", "--sql", "--database", url, "--prefix", "shop_")
    assert "CREATE TABLE shop_stock" in told
    assert type_of_key in told


def test_schema_creates_and_then_finds_nothing_missing(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/stock.db"
    assert "CHANGE" in ran("schema", "--check", "--database", url, code=1)
    assert "OK" in ran("schema", "--database", url)
    assert "OK" in ran("schema", "--check", "--database", url)


def deployment(**changes: Any) -> Deployment:
    plain: dict[str, Any] = {
        "redis": "redis://127.0.0.1/0",
        "queue": None,
        "database": "sqlite+aiosqlite://",
        "namespace": "inventory",
        "partitions": 1,
        "durability": None,
    }
    return Deployment(**plain | changes)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://127.0.0.1/0", "redis://127.0.0.1/0"),
        ("amqp://shop:se:cret@rabbit/", "amqp://shop:***@rabbit/"),
        ("redis://:secret@127.0.0.1:6379/0", "redis://:***@127.0.0.1:6379/0"),
        ("mysql+asyncmy://root@127.0.0.1:3306/test", "mysql+asyncmy://root@127.0.0.1:3306/test"),
    ],
)
def test_doctor_never_shows_a_password(url: str, expected: str) -> None:
    assert doctor.shown(url) == expected


@pytest.mark.parametrize(
    ("changes", "aof", "snapshots", "well"),
    [
        ({}, False, "", False),
        ({}, False, "3600 1", False),
        ({}, True, "", True),
        ({"queue": "amqp://127.0.0.1/"}, False, "", True),
        ({"queue": "amqp://127.0.0.1/", "durability": "redis"}, False, "", False),
        ({"durability": "database"}, False, "", True),
    ],
)
def test_persistence_matters_where_acknowledged_sales_rest_on_redis_alone(
    changes: dict[str, Any], aof: bool, snapshots: str, well: bool
) -> None:
    assert (not doctor.persistence(deployment(**changes), aof, snapshots).advice) == well


ALL_WELL = {"redis_version": "7.2.4", "redis_numbers": (7, 2), "database": True, "workers": True, "confirms": True, "queue": True}


@pytest.mark.parametrize(
    ("level", "changes", "facts", "reason"),
    [
        ("redis", {}, ALL_WELL, ""),
        ("redis", {}, {}, "Redis does not answer"),
        ("queue", {"queue": "amqp://127.0.0.1/"}, ALL_WELL, ""),
        ("queue", {}, ALL_WELL, "INVENTORY_QUEUE_URL"),
        ("queue", {"queue": "memory://"}, ALL_WELL | {"confirms": False}, "does not confirm"),
        ("queue", {"queue": "amqp://127.0.0.1/"}, ALL_WELL | {"queue": False}, "see above"),
        ("database", {}, ALL_WELL, ""),
        ("database", {}, ALL_WELL | {"workers": False}, "no worker"),
        ("database", {}, ALL_WELL | {"database": False}, "see above"),
        ("aof", {}, ALL_WELL | {"redis_version": "7.0.15", "redis_numbers": (7, 0)}, "no WAITAOF"),
        ("replica", {}, ALL_WELL, "replicas"),
    ],
)
def test_a_level_that_can_not_be_kept_is_refused_with_the_reason(
    level: str, changes: dict[str, Any], facts: dict[str, Any], reason: str
) -> None:
    finding = doctor.keeps(deployment(durability=level, **changes), facts)
    assert reason in finding.advice
    assert bool(finding.advice) == bool(reason)


async def test_doctor_looks_on_when_one_thing_does_not_answer(unused_tcp_port: int, tmp_path: Path) -> None:
    nowhere = deployment(redis=f"redis://127.0.0.1:{unused_tcp_port}/0", database=f"sqlite+aiosqlite:///{tmp_path}/stock.db")
    findings = [finding async for finding in doctor.examine(nowhere)]
    subjects = {finding.subject: finding for finding in findings}
    assert "ConnectionError" in subjects["redis"].advice
    assert "inventory-sdk schema" in subjects["schema"].advice
    assert not subjects["queue"].advice


def test_a_person_is_a_line_for_the_file_of_users_and_the_password_is_only_a_hash() -> None:
    line = ran("admin-user", "olga", "--role", "operator", "--password", "correct horse battery").strip()
    assert line.startswith("olga:operator:scrypt$")
    assert "horse" not in line


@pytest.mark.parametrize(("name", "password"), [("a:b", "correct horse battery"), ("#a", "correct horse battery"), ("olga", "short")])
def test_a_person_that_the_file_could_not_hold_is_refused(name: str, password: str) -> None:
    assert "inventory-sdk: " in ran("admin-user", name, "--password", password, code=1)


def test_the_pages_do_not_start_without_anybody_who_may_sign_in(tmp_path: Path) -> None:
    ran("admin", "shop:inventory", code=2)
    (tmp_path / "users").write_text("# nobody yet")
    assert "nobody could sign in" in ran("admin", "shop:inventory", "--users", str(tmp_path / "users"), code=1)
    assert "--users" in ran("admin", "shop:inventory", "--users", str(tmp_path / "none"), code=1)
    (tmp_path / "users").write_text(ran("admin-user", "olga", "--password", "correct horse battery"))
    assert "there is no module" in ran("admin", "no_such_shop:inventory", "--users", str(tmp_path / "users"), code=1)
