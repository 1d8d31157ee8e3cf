"""``inventory-sdk monitoring``: the alert rules and the dashboard that come with the package, to be piped where they are needed."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated, Literal

import typer

FILES = {"rules": "rules.yaml", "dashboard": "dashboard.json"}


def monitoring(
    what: Annotated[Literal["rules", "dashboard"], typer.Argument(help="rules: for Prometheus. dashboard: for Grafana.")],
) -> None:
    """Print Prometheus' alert rules (YAML) or Grafana's dashboard (JSON)."""
    typer.echo(files("inventory_sdk.metrics").joinpath("monitoring", FILES[what]).read_text(encoding="utf-8"), nl=False)
