"""The service's own SQLAlchemy sessions: what stands behind a ``session=`` argument."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inventory_sdk.errors import InvalidOperation

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session


def parts_of(session: Any) -> tuple[Session, AsyncSession | None]:
    """The sync session behind ``session``, and the AsyncSession if it is one; scoped ones are resolved.

    ``InvalidOperation`` for anything else, ``ImportError`` without SQLAlchemy.
    """
    try:
        from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
        from sqlalchemy.orm import Session, scoped_session
    except ImportError as error:
        raise ImportError("session= needs SQLAlchemy: pip install 'inventory_sdk[sqlalchemy]'") from error
    if isinstance(session, async_scoped_session | scoped_session):
        session = session.registry()
    if isinstance(session, AsyncSession):
        return session.sync_session, session
    if isinstance(session, Session):
        return session, None
    raise InvalidOperation("session", session, "must be a SQLAlchemy AsyncSession or Session on the ledger's database")
