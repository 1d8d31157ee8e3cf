"""The last good rules on disk, so that a process that starts without Redis knows what was decided last."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import NamedTemporaryFile

from inventory_sdk.gray.rules import Rules, read


def write(path: Path, rules: Iterable[Rules]) -> None:
    """Replace the file as a whole: a reader finds the old one or the new one."""
    text = json.dumps([each.document() for each in sorted(rules, key=lambda each: each.link)], indent=1, ensure_ascii=False)
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def load(path: Path) -> list[Rules]:
    """What is there; nothing where there is no file. ``OSError`` and ``ValueError`` (``InvalidOperation``) for one that can't be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [read(json.dumps(document)) for document in json.loads(text)]
