"""``inventory-sdk monitoring``: the alert rules and the dashboard that come with the package, to be piped where they are needed."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Final, Literal

import typer

FILES = {"rules": "rules.yaml", "dashboard": "dashboard.json"}
LINK: Final = "runbook_url: "


def monitoring(
    what: Annotated[Literal["rules", "dashboard"], typer.Argument(help="rules: for Prometheus. dashboard: for Grafana.")],
    docs: Annotated[
        str, typer.Option(help="Where your copy of the documentation stands, https://…: the rules' run book links lead there.")
    ] = "",
) -> None:
    """Print Prometheus' alert rules (YAML) or Grafana's dashboard (JSON)."""
    if docs and not docs.startswith(("http://", "https://")):
        raise typer.BadParameter(f"--docs={docs!r}: must begin with http:// or https://")
    text = files("inventory_sdk.metrics").joinpath("monitoring", FILES[what]).read_text(encoding="utf-8")
    if docs:
        text = text.replace(LINK, f"{LINK}{docs.rstrip('/')}/")
    typer.echo(text, nl=False)
