"""``inventory-sdk gray``: look at the gray links' rules and change them. Needs Redis only, not the service's code."""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inventory_sdk.cli.options import Namespace, RedisUrl, refuse, run

if TYPE_CHECKING:
    from inventory_sdk.gray.rules import Rules
    from inventory_sdk.gray.store import RuleStore

gray = typer.Typer(no_args_is_help=True, help="Gray links: who is on the candidate, and taking it back.")

Link = Annotated[str, typer.Argument(help="The link's name.")]
Why = Annotated[str, typer.Option(help="Kept in the history.")]
Who = Annotated[str | None, typer.Option(help="Kept in the history; without it your login and host.")]


@gray.command("list")
def list_(redis: RedisUrl = None, namespace: Namespace = "inventory") -> None:
    """One line for each link that has rules."""

    async def work(store: RuleStore) -> None:
        from inventory_sdk.errors import InvalidOperation
        from inventory_sdk.gray.rules import read

        for link, document in sorted((await store.load()).items()):
            try:
                typer.echo(_line(read(document)))
            except InvalidOperation as error:
                typer.echo(f"{link}: can't be read and is in effect nowhere: {error}")

    _run(redis, namespace, work)


@gray.command()
def show(link: Link, redis: RedisUrl = None, namespace: Namespace = "inventory") -> None:
    """The link's rules as they are stored, as JSON."""

    async def work(store: RuleStore) -> None:
        typer.echo(json.dumps((await store.get(link)).document(), indent=2, ensure_ascii=False))

    _run(redis, namespace, work)


@gray.command("set")
def set_(
    link: Link,
    changes: Annotated[list[str], typer.Argument(metavar="FIELD=VALUE…", help='percentage=12.5 allow=m1,m2 \'where={"region":["eu"]}\'')],
    why: Why,
    who: Who = None,
    version: Annotated[int | None, typer.Option(help="The version that you have seen; refused if there is another one.")] = None,
    redis: RedisUrl = None,
    namespace: Namespace = "inventory",
) -> None:
    """Change some of the rules; the others stay."""
    parsed = dict(map(_parsed, changes))

    async def work(store: RuleStore) -> None:
        from inventory_sdk.gray.links import change

        typer.echo(_line(await change(store, link, who=who or _me(), why=why, version=version, **parsed)))

    _run(redis, namespace, work)


@gray.command()
def kill(link: Link, why: Why, who: Who = None, redis: RedisUrl = None, namespace: Namespace = "inventory") -> None:
    """Stable for everybody, at once."""
    set_(link, ["killed=true"], why, who, None, redis, namespace)


@gray.command()
def restore(link: Link, why: Why, who: Who = None, redis: RedisUrl = None, namespace: Namespace = "inventory") -> None:
    """Take a kill back."""
    set_(link, ["killed=false"], why, who, None, redis, namespace)


@gray.command()
def history(
    link: Link,
    limit: Annotated[int, typer.Option(min=1, help="How many changes.")] = 20,
    redis: RedisUrl = None,
    namespace: Namespace = "inventory",
) -> None:
    """Who changed what, when and why, newest first."""

    async def work(store: RuleStore) -> None:
        for change in await store.history(link, limit):
            at = datetime.fromtimestamp(change.at_ms / 1000, UTC).isoformat(sep=" ", timespec="seconds")
            typer.echo(f"{at}  version {change.version}  {change.who}: {change.why}")
            for field, (before, after) in change.changes.items():
                typer.echo(f"    {field}: {json.dumps(before, ensure_ascii=False)} → {json.dumps(after, ensure_ascii=False)}")

    _run(redis, namespace, work)


def _parsed(text: str) -> tuple[str, Any]:
    """``percentage=12.5``, ``paused=false``, ``guard={…}`` as JSON; lists of names also as ``m1,m2``, and empty."""
    name, equals, value = text.partition("=")
    if not equals:
        raise refuse(f"{text!r}: must be FIELD=VALUE")
    if name in ("allow", "deny", "taken_back") and not value.startswith("["):
        return name, [each for each in value.split(",") if each]
    try:
        return name, json.loads(value)
    except ValueError as error:
        raise refuse(f"{text!r}: the value must be JSON: {error}") from None


def _line(rules: Rules) -> str:
    marks = [name for name in ("killed", "paused", "keep_exposed") if getattr(rules, name)]
    lists = [f"{len(value)} {name}" for name in ("allow", "deny", "taken_back") if (value := getattr(rules, name))]
    where = [f"where {name} in {', '.join(values)}" for name, values in rules.where.items()]
    guard = [] if rules.guard is None else ["guarded"]
    return f"{rules.link}: {rules.percentage:g} %, version {rules.version}" + "".join(f"; {each}" for each in marks + lists + where + guard)


def _me() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _run(redis: str | None, namespace: str, work: Callable[[RuleStore], Awaitable[None]]) -> None:
    if redis is None:
        raise refuse("no Redis: give --redis or set INVENTORY_REDIS_URL")
    run(_with_store(redis, namespace, work))


async def _with_store(redis: str, namespace: str, work: Callable[[RuleStore], Awaitable[None]]) -> bool:
    from inventory_sdk.errors import InventoryError
    from inventory_sdk.gray.store import RuleStore
    from inventory_sdk.redis_urls import close_client
    from inventory_sdk.servers import servers_for

    try:
        client = servers_for(redis, None, None).make_client()
        try:
            await work(RuleStore(client, namespace))
        finally:
            await close_client(client)
    except InventoryError as error:
        typer.echo(f"inventory-sdk: {error}", err=True)
        return False
    return True
