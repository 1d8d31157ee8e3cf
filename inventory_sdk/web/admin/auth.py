"""Who asks, and what they may do. The pages know people through this; ``passwords.py`` is the way that comes with the SDK."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from inventory_sdk.errors import Overloaded

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


class Role(StrEnum):
    """What a person may do."""

    VIEWER = "viewer"
    """See everything, change nothing."""
    OPERATOR = "operator"
    """Correct, kill, retry, reopen as well; each act needs a reason and is written down."""


@dataclass(frozen=True, slots=True)
class User:
    """A person who has signed in. ``name`` is what the audit says. ``session`` tells one sign-in from another, "" where there is
    nothing like it; forms of one are no good in another."""

    name: str
    role: Role
    session: str = ""

    @property
    def acts(self) -> bool:
        """May change things."""
        return self.role is Role.OPERATOR


class TooManyTries(Overloaded):
    """Sign-ins of this name failed again and again; it has to wait ``retry_after`` seconds."""


class Auth(Protocol):
    """How the pages learn who asks. Nobody gets in unless ``user`` says who it is."""

    @property
    def secret(self) -> str:
        """What forms are signed with: at least 32 characters, the same in all processes that serve these pages."""
        ...

    async def user(self, request: Request) -> User | None:
        """Who sends this request; None: nobody that is known. Called for every request, so that who was removed is out at once."""
        ...


@runtime_checkable
class SignsIn(Auth, Protocol):
    """An ``Auth`` that people sign in to on the pages' own form. Others (a proxy in front that knows them) don't need it."""

    async def sign_in(self, name: str, password: str, address: str) -> User | None:
        """The person with a session of their own, None: wrong. ``TooManyTries`` says when to come back. ``address``: the peer's."""
        ...

    def remember(self, response: Response, user: User, *, path: str, secure: bool) -> None:
        """Make the browser send what ``user`` recognises, below ``path``; only over TLS where ``secure``."""
        ...

    def forget(self, response: Response, user: User, *, path: str) -> None:
        """End this session."""
        ...
