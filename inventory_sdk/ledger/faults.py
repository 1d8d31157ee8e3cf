"""What a database's errors mean: a fault that passes (``LedgerUnavailable``, with a fixed word for it), or a mistake of ours.

Drivers raise their own errors while they connect, SQLAlchemy wraps those of statements, and a lost connection shows as whatever
was being done at that moment. Who calls the ledger needs one error for all of them, and the reason for the metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from inventory_sdk.ledger.protocol import LedgerUnavailable

_STATES: Final = {
    "40P01": "deadlock",
    "40001": "serialization",
    "55P03": "lock_timeout",
    "57014": "canceled",  # statement_timeout, or an administrator
    "53100": "disk_full",
    "53200": "out_of_memory",
    "53300": "too_many_connections",
    "25006": "read_only",  # the database failed over and this is not the primary (any more)
}
"""SQLSTATE (PostgreSQL) → reason."""
_CLASSES: Final = {"08": "disconnected", "57": "disconnected"}
"""The first two characters of other SQLSTATEs: connection exceptions, and a server that shuts down, crashed, or starts."""
_NUMBERS: Final = {
    1213: "deadlock",
    1205: "lock_timeout",
    1020: "serialization",  # MariaDB: the record has changed since it was read
    1021: "disk_full",
    1040: "too_many_connections",
    1290: "read_only",
    1836: "read_only",
    1053: "disconnected",
    1927: "disconnected",
    2003: "disconnected",
    2006: "disconnected",
    2013: "disconnected",
}
"""Error numbers of MariaDB and MySQL → reason."""
_DRIVERS: Final = ("asyncpg", "asyncmy", "aiosqlite", "sqlite3")


def reason_of(error: BaseException) -> str | None:
    """The fault's fixed word; None: the statement or the data is wrong, and trying again can't help."""
    if isinstance(error, PoolTimeout):
        return "no_free_connection"
    if isinstance(error, DBAPIError):
        if error.connection_invalidated:
            return "disconnected"
        driver = error.orig
        if driver is None:
            return None
        found = _of_driver(driver)
        # asyncpg and asyncmy say in an error without a number that the connection under a statement was lost.
        return found or ("disconnected" if _lost(driver) else None)
    if isinstance(error, OSError):
        return "disconnected"
    return _of_driver(error) if type(error).__module__.partition(".")[0] in _DRIVERS else None


def _of_driver(error: BaseException) -> str | None:
    if error.args and type(error.args[0]) is int:
        # Before the SQLSTATE: MariaDB gives a deadlock that of a serialization failure, and most others one that says nothing.
        return _NUMBERS.get(error.args[0])
    state = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        return _STATES.get(state) or _CLASSES.get(state[:2])
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return "locked"
    if name.startswith(("SQLITE_IOERR", "SQLITE_FULL", "SQLITE_CANTOPEN")):
        return "disk_full" if name == "SQLITE_FULL" else "disconnected"
    return None


def _lost(error: BaseException) -> bool:
    text = str(error).lower()
    return any(sign in text for sign in ("connection was closed", "connection is closed", "connection_lost", "lost connection"))


class Opening:
    """Whether a connection is there yet."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = False


@contextmanager
def faults_named() -> Iterator[Opening]:
    """``LedgerUnavailable`` instead of whatever a fault raises; everything else passes. Set ``done`` once there is a connection:
    an ``OSError`` is the network's before that, and may be a user's function's own afterwards."""
    opening = Opening()
    try:
        yield opening
    except Exception as error:
        if opening.done and isinstance(error, OSError):
            raise
        reason = reason_of(error)
        if reason is None:
            raise
        raise LedgerUnavailable(reason, error) from error
