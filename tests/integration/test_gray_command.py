"""``inventory-sdk gray`` as an operator meets it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator

import pytest
from typer.testing import CliRunner, Result

from inventory_sdk.cli.app import app
from tests.gray_kit import Places, forget

pytestmark = pytest.mark.redis


@pytest.fixture
async def swept_namespace(redis_url: str, namespace: str) -> AsyncIterator[str]:
    yield namespace
    await forget(Places(redis_url), namespace)


@pytest.fixture
def gray(redis_url: str, swept_namespace: str) -> object:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["gray", *arguments, "--redis", redis_url, "--namespace", swept_namespace])

    return run


def test_rules_are_set_shown_killed_and_their_history_says_who_and_why(gray: object) -> None:
    assert callable(gray)
    done = gray("set", "checkout", "percentage=12.5", "allow=m1,m2", 'where={"region":["eu"]}', "--why", "first merchants", "--who", "eva")
    assert (done.exit_code, done.output) == (0, "checkout: 12.5 %, version 1; 2 allow; where region in eu\n")
    assert gray("kill", "checkout", "--why", "errors").output.startswith("checkout: 12.5 %, version 2; killed; ")
    shown = json.loads(gray("show", "checkout").output)
    assert (shown["killed"], shown["allow"], shown["version"]) == (True, ["m1", "m2"], 2)
    assert gray("restore", "checkout", "--why", "fixed", "--who", "max").exit_code == 0
    assert gray("list").output == "checkout: 12.5 %, version 3; 2 allow; where region in eu\n"
    lines = gray("history", "checkout", "--limit", "2").output.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+00:00  version 3  max: fixed", lines[0])
    assert lines[1] == "    killed: true → false"
    assert "@" in lines[2]
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("set", "checkout", "percentage=101", "--why", "x"), "percentage=101"),
        (("set", "checkout", "percentage", "--why", "x"), "FIELD=VALUE"),
        (("set", "checkout", "percentage=ten", "--why", "x"), "JSON"),
        (("set", "Check out", "percentage=1", "--why", "x"), "link"),
        (("set", "checkout", "percentage=1", "--why", "x", "--version", "7"), "version 0, not 7"),
        (("kill", "checkout", "--why", " "), "why"),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(gray: object, arguments: tuple[str, ...], said: str) -> None:
    assert callable(gray)
    done = gray(*arguments)
    assert done.exit_code == 1
    assert said in done.output
    assert gray("list").output == ""


def test_a_redis_that_is_away_is_said() -> None:
    done = CliRunner().invoke(app, ["gray", "list", "--redis", "redis://127.0.0.1:1/0"])
    assert done.exit_code == 1
    assert "does not answer" in done.output
