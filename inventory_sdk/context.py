"""What a request carries along: its merchant and its lane. Set by middleware and decorators, read by the stock calls."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Final

merchant: Final[ContextVar[str | None]] = ContextVar("inventory_merchant", default=None)
lane: Final[ContextVar[str]] = ContextVar("inventory_lane", default="core")
