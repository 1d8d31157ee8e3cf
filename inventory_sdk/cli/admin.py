"""``inventory-sdk admin module:inventory``: serve the management pages; ``admin-user``: a line for the file of those who may see them."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from inventory_sdk.cli.options import refuse
from inventory_sdk.cli.worker import load

if TYPE_CHECKING:
    from inventory_sdk.web.admin import PasswordAuth


def admin(
    target: Annotated[str, typer.Argument(metavar="MODULE:INVENTORY", help="Where your Inventory is, e.g. shop.stock:inventory")],
    users: Annotated[
        Path, typer.Option(envvar="INVENTORY_ADMIN_USERS", help="Who may sign in: name:role:hash a line, as admin-user prints it.")
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on.")] = 8900,
    secret: Annotated[
        str | None, typer.Option(envvar="INVENTORY_ADMIN_SECRET", help="Signs the sessions; without it they end with this process.")
    ] = None,
) -> None:
    """Serve the management pages. Without a file of users nobody could sign in, so there is no start without one."""
    auth = signing(users, secret)
    inventory = load(target)
    try:
        import uvicorn

        from inventory_sdk.web import admin_app

        app = admin_app(inventory, auth=auth)
    except ImportError as error:
        raise refuse(f"{error}; the pages need: pip install 'inventory_sdk[admin]'") from error
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uvicorn.run(app, host=host, port=port, log_config=None)


def signing(users: Path, secret: str | None) -> PasswordAuth:
    """Who may sign in; exits with a message that names what is wrong."""
    from inventory_sdk.errors import InvalidOperation
    from inventory_sdk.web.admin import PasswordAuth

    try:
        return PasswordAuth.from_file(users, secret=secret or secrets.token_urlsafe(32))
    except (OSError, InvalidOperation) as error:
        raise refuse(f"--users: {error}") from error


def admin_user(
    name: Annotated[str, typer.Argument(help="What the audit will say.")],
    role: Annotated[Literal["viewer", "operator"], typer.Option(help="viewer: sees everything. operator: may act as well.")] = "viewer",
    password: Annotated[
        str, typer.Option(prompt=True, hide_input=True, confirmation_prompt=True, help="Asked for, if it is not given.")
    ] = "",
) -> None:
    """Print the line of one person for the file of users; the password is only in it as a hash."""
    from inventory_sdk.errors import InvalidOperation
    from inventory_sdk.model import check_text
    from inventory_sdk.web.admin import hash_password

    try:
        if ":" in check_text("name", name) or name != name.strip() or name.startswith("#"):
            raise InvalidOperation("name", name, "must not contain a colon, begin with #, or have blanks around it")
        hashed = hash_password(password)
    except InvalidOperation as error:
        raise refuse(str(error)) from error
    typer.echo(f"{name}:{role}:{hashed}")
