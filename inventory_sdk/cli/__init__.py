"""The command ``inventory-sdk``. Everything it needs beyond the SDK comes with the extra ``cli`` and is imported on use."""

from __future__ import annotations

import importlib.util
import sys

__all__ = ["main"]

NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command; exit code 0 all is well, 1 something must change, 2 the command was not understood."""
    if sys.argv[1:] == ["--version"]:  # for a report of what is wrong with an installation, so before anything can be
        from inventory_sdk import __version__

        sys.stdout.write(f"inventory_sdk {__version__}\n")
        return
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"inventory-sdk: {' and '.join(missing)} not installed; the command line needs: pip install 'inventory_sdk[cli]'")
    from inventory_sdk.cli.app import app

    app(prog_name="inventory-sdk")
