"""What a writing statement is about to do to a watched table, read from the statement and its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import ClauseElement, Column, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.sql import operators, visitors
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList, ColumnClause

if TYPE_CHECKING:
    from sqlalchemy import Connection, Delete, Insert, Table, Update

Values = Mapping[str, Any]
"""One set of a statement's parameters."""


def same_table(one: Any, other: Table | None) -> bool:
    """Whether both are the same table; the ORM's statements have annotated copies."""
    return other is not None and getattr(one, "fullname", None) == other.fullname


def writes_to(names: Iterable[str]) -> re.Pattern[str]:
    """Finds SQL text that writes to one of the tables."""
    some = "|".join(re.escape(name) for name in names)
    verbs = r"update|insert(?:\s+\w+)?\s+into|delete\s+from|replace\s+into|merge\s+into|truncate(?:\s+table)?|copy"
    return re.compile(rf"\b(?:{verbs})\s+(?:only\s+)?(?:[`\"\[]?\w+[`\"\]]?\.)?[`\"\[]?(?:{some})\b", re.IGNORECASE)


def inserted(connection: Connection, statement: Insert, sets: Sequence[Values], columns: Sequence[Column[Any]]) -> list[Values] | None:
    """The plain values of ``columns`` in each row of an INSERT, by column key; None where they can't be read from it."""
    if statement.select is not None:
        return None
    needed = [column.key for column in columns]
    if all(key in values for values in sets for key in needed):
        rows: list[Values] = [dict(values) for values in sets]
    else:
        compiled = statement.compile(dialect=connection.dialect, column_keys=list(sets[0]) or None)
        literals = {key: value for key, value in compiled.params.items() if value is not None}
        if f"{needed[0]}_m0" in compiled.params:
            rows = []
            while f"{needed[0]}_m{len(rows)}" in compiled.params:
                rows.append({key: compiled.params.get(f"{key}_m{len(rows)}") for key in needed})
        else:
            rows = [{**literals, **values} for values in sets]
    for row in rows:
        if any(row.get(key) is None or isinstance(row[key], ClauseElement) for key in needed):
            return None
    return rows


def touched(
    connection: Connection, statement: Update | Delete, sets: Sequence[Values], columns: Sequence[Column[Any]]
) -> set[tuple[Any, ...]] | None:
    """The values of ``columns`` in the rows that an UPDATE or DELETE is about to change; None where that can't be told.

    Where the condition names them (the ORM's do if they are the key) no query is needed; else the rows are looked for with the
    statement's own condition, once per set of parameters.
    """
    where = statement.whereclause
    named = _equalities(where, columns)
    if named is not None:
        return {tuple(values.get(bind.key, bind.effective_value) for bind in named) for values in sets}
    query = select(*columns)
    binds: set[str] = set()
    if where is not None:
        query = query.where(where)
        binds = {element.key for element in visitors.iterate(where) if isinstance(element, BindParameter)}
    found: set[tuple[Any, ...]] = set()
    try:
        for values in sets:
            found.update(tuple(row) for row in connection.execute(query, {key: values[key] for key in binds if key in values}))
    except DBAPIError:
        raise
    except SQLAlchemyError:  # such a condition makes no query of its own
        return None
    return found


def _equalities(where: Any, columns: Sequence[Column[Any]]) -> list[BindParameter[Any]] | None:
    """The parameters that the columns are equal to, if the condition says so of each."""
    together = isinstance(where, BooleanClauseList) and where.operator is operators.and_
    found: dict[str, BindParameter[Any]] = {}
    for part in where.clauses if together else [where]:
        if not isinstance(part, BinaryExpression) or part.operator is not operators.eq:
            continue
        column, bind = part.left, part.right
        if isinstance(column, ColumnClause) and isinstance(bind, BindParameter) and same_table(column.table, columns[0].table):
            found[column.key] = bind
    if not all(column.key in found for column in columns):
        return None
    return [found[column.key] for column in columns]
