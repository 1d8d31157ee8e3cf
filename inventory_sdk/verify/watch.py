"""Watches one AsyncSession while a verified function runs, and asks for the verdict before anything of it is committed.

Just before a statement writes stock rows, those rows are read and locked (with the first one, all that the call has to move); before
the commit, and when the function has returned, they are read again. So what counts is what stands in the database: a rolled back
savepoint, an expression, a trigger, a lost update are all in it. Change-log rows are taken from the INSERTs. A write to a watched table
that can't be read so (SQL text, INSERT … SELECT, a changed change row) is a mismatch of its own. Not seen at all: other connections,
stored procedures, and rows that a trigger writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sqlalchemy import Connection, Delete, Enum, Insert, String, Update, event, select, tuple_
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.elements import RollbackToSavepointClause, SavepointClause

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.selectors import as_text
from inventory_sdk.verify.changes import Found, Key
from inventory_sdk.verify.statements import Values, inserted, same_table, touched, writes_to
from inventory_sdk.verify.tables import Watched

if TYPE_CHECKING:
    from sqlalchemy.orm import Session, SessionTransaction

CHUNK: Final = 200
"""Stock rows read by one statement."""


class _Row(NamedTuple):
    """One change-log row of the transaction in progress."""

    key: Key
    units: int
    before: int | None
    after: int | None


class Gate:
    """Asks for the verdict before each commit of a session; ``judge`` raises to abort it."""

    def __init__(self, session: Session, judge: Callable[[Found], None]) -> None:
        self.session = session
        self.judge = judge
        self._heard: list[tuple[Any, str, Callable[..., Any]]] = []

    def open(self) -> None:
        """Begin to watch. In the session's greenlet."""
        self._hear(self.session, "before_commit", self._before_commit)

    def close(self) -> None:
        """Watch no more."""
        for target, name, function in self._heard:
            event.remove(target, name, function)
        self._heard.clear()

    def verify(self) -> None:
        """Ask for the verdict on what was found until now."""
        self.session.flush()
        self.judge(self.found())

    def found(self) -> Found:
        """What is known here; a gate alone knows nothing."""
        return Found()

    def _hear(self, target: Any, name: str, function: Callable[..., Any]) -> None:
        event.listen(target, name, function)
        self._heard.append((target, name, function))

    def _before_commit(self, session: Session) -> None:
        if not session.in_nested_transaction():
            self.verify()


class Watch(Gate):
    """A gate that sees what the session does to the watched tables. ``merchant``: of rows that name none. ``expected``: the lines."""

    def __init__(self, session: Session, judge: Callable[[Found], None], tables: Watched, merchant: str, expected: Iterable[Key]) -> None:
        super().__init__(session, judge)
        self._tables = tables
        self._merchant = merchant
        plain = all(isinstance(column.type, String) and not isinstance(column.type, Enum) for column in tables.keys)
        self._ahead = [(sku, whose)[: len(tables.keys)] for whose, sku in expected] if plain else []
        watched = [table for table in (tables.stock, tables.log) if table is not None]
        self._text = writes_to(table.name for table in watched)
        self._earlier = Found()
        """Of transactions that were committed."""
        self._last = Found()
        """Of the transaction in progress when it was last asked."""
        self._attached: set[Connection] = set()
        self._connection: Connection | None = None
        """The one that wrote stock rows."""
        self._before: dict[tuple[Any, ...], tuple[Key, tuple[int, ...]]] = {}
        """Stock rows that this transaction writes: as they stood before."""
        self._rows: list[_Row] = []
        self._unread: list[str] = []
        self._savepoints: dict[str, tuple[int, int]] = {}
        self._committed = False

    def open(self) -> None:
        super().open()
        self._hear(self.session, "after_begin", self._after_begin)
        self._hear(self.session, "after_commit", self._after_commit)
        self._hear(self.session, "after_transaction_end", self._after_transaction_end)
        if self.session.in_transaction():
            self.session.flush()  # what the caller had begun is not the function's
            self._attach(self.session.connection(bind_arguments={"clause": self._tables.stock}))

    def found(self) -> Found:
        found = Found()
        found.add(self._earlier)
        found.add(self._now())
        return found

    # What the session does ------------------------------------------------------------------------------------------------------

    def _after_begin(self, session: Session, transaction: SessionTransaction, connection: Connection) -> None:
        self._attach(connection)

    def _after_commit(self, session: Session) -> None:
        self._committed = not session.in_nested_transaction()

    def _after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is not None:
            return
        if self._committed:
            self._earlier.add(self._last)
        self._last = Found()
        self._attached.clear()
        self._connection = None
        self._before.clear()
        self._rows.clear()
        self._unread.clear()
        self._savepoints.clear()
        self._committed = False

    def _attach(self, connection: Connection) -> None:
        if connection in self._attached:
            return
        self._attached.add(connection)
        self._hear(connection, "before_execute", self._before_execute)
        self._hear(connection, "before_cursor_execute", self._before_cursor_execute)

    def _before_cursor_execute(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
    ) -> None:
        known = getattr(context, "invoked_statement", None)
        if not isinstance(known, UpdateBase) and self._text.search(statement):
            self._unread.append(statement)

    def _before_execute(
        self, connection: Connection, statement: Any, multiparams: Sequence[Values], params: Values, execution_options: Any
    ) -> None:
        if isinstance(statement, SavepointClause):
            self._savepoints[statement.ident] = (len(self._rows), len(self._unread))
        elif isinstance(statement, RollbackToSavepointClause):
            rows, unread = self._savepoints.get(statement.ident, (0, 0))
            del self._rows[rows:], self._unread[unread:]
        if not isinstance(statement, Insert | Update | Delete):
            return
        sets = list(multiparams) or [params]
        if same_table(statement.table, self._tables.stock):
            self._stock_written(connection, statement, sets)
        elif same_table(statement.table, self._tables.log):
            self._log_written(connection, statement, sets)

    def _stock_written(self, connection: Connection, statement: Insert | Update | Delete, sets: Sequence[Values]) -> None:
        names = self._tables.keys
        keys: Iterable[tuple[Any, ...]] | None
        if isinstance(statement, Insert):
            rows = inserted(connection, statement, sets, names)
            keys = None if rows is None else {tuple(row[column.key] for column in names) for row in rows}
        else:
            keys = touched(connection, statement, sets, names)
        if keys is None:
            self._unread.append(str(statement))
            return
        self._connection = connection
        wanted = keys if self._before else {*self._ahead, *keys}
        new = [key for key in wanted if key not in self._before]
        standing = self._read(connection, new)
        for raw in new:
            self._before[raw] = (self._key(*raw), standing.get(self._key(*raw), (0,) * len(self._tables.counters)))

    def _log_written(self, connection: Connection, statement: Insert | Update | Delete, sets: Sequence[Values]) -> None:
        tables = self._tables
        ends = (tables.log_quantity, tables.log_before, tables.log_after)
        columns = [column for column in (tables.log_sku, tables.log_merchant, *ends) if column is not None]
        rows = inserted(connection, statement, sets, columns) if isinstance(statement, Insert) else None
        if rows is None:
            self._unread.append(str(statement))
            return
        for row in rows:
            key = self._key(row[tables.log_sku.key], *([] if tables.log_merchant is None else [row[tables.log_merchant.key]]))
            quantity, before, after = (None if end is None else _whole(end.key, row[end.key]) for end in ends)
            if quantity is None:
                assert before is not None
                assert after is not None
                quantity = after - before
            self._rows.append(_Row(key, quantity, before, after))

    # What came of it ------------------------------------------------------------------------------------------------------------

    def _now(self) -> Found:
        """Of the transaction in progress."""
        found = Found()
        standing = {} if self._connection is None else self._read(self._connection, list(self._before))
        zeros = (0,) * len(self._tables.counters)
        for key, before in self._before.values():
            after = standing.get(key, zeros)
            for counter, was, is_now in zip(self._tables.counters, before, after, strict=True):
                found.move(key, counter, is_now - was)
        for row in self._rows:
            found.log(row.key, row.units)
        found.wrong += self._broken_chains(standing)
        found.wrong += [(f"writes to the watched tables that can't be read ({_short(text)})", 0, 1) for text in self._unread]
        self._last = found
        return found

    def _broken_chains(self, standing: dict[Key, tuple[int, ...]]) -> list[tuple[str, int, int]]:
        """Change rows that do not begin where the last one, or the stock, left off; stock that is not where they end."""
        if self._tables.log is None or self._tables.log_after is None:
            return []
        last = {key: before[0] for key, before in self._before.values()}
        wrong: list[tuple[str, int, int]] = []
        for row in self._rows:
            if row.before is not None and row.before != last.get(row.key, 0):
                wrong.append((f"{_named(row.key)}, change log, before", last.get(row.key, 0), row.before))
            last[row.key] = row.after or 0
        for key in dict.fromkeys(row.key for row in self._rows):
            stands = standing.get(key, (0,))[0]
            if last[key] != stands:
                wrong.append((f"{_named(key)}, change log, after", stands, last[key]))
        return wrong

    def _read(self, connection: Connection, raws: Sequence[tuple[Any, ...]]) -> dict[Key, tuple[int, ...]]:
        """Counters of these SKUs now, locked in order until the transaction ends."""
        tables, names = self._tables, self._tables.keys
        found: dict[Key, tuple[int, ...]] = {}
        for at in range(0, len(raws), CHUNK):
            part = raws[at : at + CHUNK]
            chosen = names[0].in_([raw[0] for raw in part]) if len(names) == 1 else tuple_(*names).in_(part)
            query = select(*names, *tables.counters.values()).where(chosen).order_by(*names).with_for_update()
            for row in connection.execute(query):
                key = self._key(*row[: len(names)])
                counters = tuple(_whole(name, units) for name, units in zip(tables.counters, row[len(names) :], strict=True))
                before = found.get(key)
                found[key] = counters if before is None else tuple(map(sum, zip(before, counters, strict=True)))
        return found

    def _key(self, sku: Any, merchant: Any = None) -> Key:
        return (self._merchant if merchant is None else as_text("merchant", merchant), as_text("sku", sku))


def _whole(name: str, units: Any) -> int:
    if units is None:
        return 0
    whole = int(units)
    if whole != units:
        raise InvalidOperation(name, units, "of a watched table must be a whole number")
    return whole


def _named(key: Key) -> str:
    return f"merchant {key[0]!r}, sku {key[1]!r}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:77]}..."
