"""``PasswordAuth``: people from a file, passwords hashed with scrypt, sessions as signed cookies. Standard library only."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
import os
import secrets
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.model import check_text
from inventory_sdk.web.admin.auth import Role, TooManyTries, User
from inventory_sdk.web.admin.tries import Tries

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

COOKIE: Final = "inventory_admin"
HOURS: Final = 8.0
LEAST_SECRET: Final = 32
LEAST_PASSWORD: Final = 12
LONGEST_PASSWORD: Final = 1024
LONGEST_NAME: Final = 256
MOST_ENDED: Final = 10_000
"""Ended sessions that one process remembers."""
AT_ONCE: Final = 2
"""Passwords that are checked at a time: each takes 32 MB and a good part of a second of one core."""
MOST_WAITING: Final = 20
"""Sign-ins that may wait for that."""

_COST: Final = (15, 8, 3)  # log2 of N, r, p
_NOBODY: Final = "scrypt${}$AAAAAAAAAAAAAAAAAAAAAA==$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="


@dataclass(frozen=True, slots=True)
class Account:
    """One person: ``password`` is what ``hash_password`` made."""

    name: str
    role: Role
    password: str


def hash_password(password: str) -> str:
    """``scrypt$15$8$3$<salt>$<hash>``; ``InvalidOperation`` for one of fewer than 12 characters."""
    if not LEAST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise InvalidOperation("password", "…", f"must have {LEAST_PASSWORD} to {LONGEST_PASSWORD} characters")
    salt = os.urandom(16)
    cost = "$".join(map(str, _COST))
    return f"scrypt${cost}${_text(salt)}${_text(_scrypt(password, salt, *_COST))}"


def check_password(password: str, hashed: str) -> bool:
    """Whether it is the one that was hashed; takes as long either way."""
    _, power, r, p, salt, wanted = hashed.split("$")
    found = _scrypt(password[:LONGEST_PASSWORD], urlsafe_b64decode(salt), int(power), int(r), int(p))
    return hmac.compare_digest(found, urlsafe_b64decode(wanted)) and len(password) <= LONGEST_PASSWORD


def _scrypt(password: str, salt: bytes, power: int, r: int, p: int) -> bytes:
    room = 128 * r * (2**power + p + 2) + (1 << 20)
    return hashlib.scrypt(password.encode("utf-8", "replace"), salt=salt, n=2**power, r=r, p=p, maxmem=room, dklen=32)


class PasswordAuth:
    """``accounts`` are the people, ``secret`` (32 characters or more, the same in all processes) signs their sessions, which last
    ``hours``. A changed role counts at once; a changed password or a removed account ends its sessions; another secret ends all.

    After five wrong passwords a name has to wait from the same address, twice as long each time, up to a minute; so has an address
    after fifty of any names.
    """

    def __init__(self, accounts: Iterable[Account], *, secret: str, hours: float = HOURS) -> None:
        if not isinstance(secret, str) or len(secret) < LEAST_SECRET:
            raise InvalidOperation("secret", "…", f"must have at least {LEAST_SECRET} characters: secrets.token_urlsafe(32) makes one")
        if not 0 < hours <= 24 * 30:
            raise InvalidOperation("hours", hours, "must be more than 0, at most 720")
        self.secret = secret
        self._seconds = hours * 3600
        self._accounts: dict[str, Account] = {}
        for account in accounts:
            check_text("name", account.name)
            _check_hash(account)
            if account.name in self._accounts:
                raise InvalidOperation("accounts", account.name, "is there twice")
            self._accounts[account.name] = account
        if not self._accounts:
            raise InvalidOperation("accounts", [], "must not be empty: nobody could sign in")
        costs = [account.password.split("$")[1:4] for account in self._accounts.values()]
        dearest = max(costs, key=lambda cost: (int(cost[1]) * int(cost[2])) << int(cost[0]))
        self._nobody = _NOBODY.format("$".join(dearest))
        self._tries = Tries()
        self._waiting = 0
        self._ended: dict[str, float] = {}
        self._checking = asyncio.Semaphore(AT_ONCE)

    @classmethod
    def from_file(cls, path: str | Path, *, secret: str, hours: float = HOURS) -> Self:
        """One person a line, ``name:role:hash`` as ``inventory-sdk admin-user`` prints it; empty lines and ``#`` are skipped."""
        accounts = []
        for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, _, rest = line.strip().partition(":")
            role, _, hashed = rest.partition(":")
            if role not in tuple(Role):
                raise InvalidOperation(f"{path}, line {number}", role, "the role must be viewer or operator: name:role:hash")
            accounts.append(Account(name, Role(role), hashed))
        return cls(accounts, secret=secret, hours=hours)

    async def user(self, request: Request) -> User | None:
        """By the cookie."""
        raw = request.cookies.get(COOKIE)
        if raw is None:
            return None
        body, _, mark = raw.partition(".")
        try:
            name, session, until = json.loads(urlsafe_b64decode(body))
            account = self._accounts[name]
            known = hmac.compare_digest(self._mark(body, account), mark)
        except (ValueError, TypeError, KeyError):
            return None
        if not known or until <= time.time() or session in self._ended:
            return None
        return User(account.name, account.role, session)

    async def sign_in(self, name: str, password: str, address: str) -> User | None:
        """Unknown names take as long as known ones."""
        name = name[:LONGEST_NAME]
        account = self._accounts.get(name)
        if self._waiting >= MOST_WAITING:
            raise TooManyTries("too many sign-ins at once", retry_after=1.0)
        self._waiting += 1
        try:
            async with self._checking:
                # Only here, and counted before it is known: those that come all at once are as many tries as one after the other.
                if (wait := self._tries.wait(name, address)) > 0:
                    raise TooManyTries("too many wrong passwords", retry_after=math.ceil(wait))
                self._tries.failed(name, address)
                right = await asyncio.to_thread(check_password, password, account.password if account is not None else self._nobody)
        finally:
            self._waiting -= 1
        if account is None or not right:
            return None
        self._tries.right(name, address)
        return User(account.name, account.role, secrets.token_urlsafe(16))

    def remember(self, response: Response, user: User, *, path: str, secure: bool) -> None:
        """A cookie that scripts can't read and other sites don't send."""
        until = time.time() + self._seconds
        body = _text(json.dumps([user.name, user.session, until]).encode())
        value = f"{body}.{self._mark(body, self._accounts[user.name])}"
        response.set_cookie(COOKIE, value, max_age=int(self._seconds), path=path, secure=secure, httponly=True, samesite="strict")

    def forget(self, response: Response, user: User, *, path: str) -> None:
        """The cookie goes, and this process takes it no more from anybody."""
        now = time.time()
        for session in [each for each, until in self._ended.items() if until < now]:
            del self._ended[session]
        self._ended[user.session] = now + self._seconds
        while len(self._ended) > MOST_ENDED:
            del self._ended[next(iter(self._ended))]
        response.delete_cookie(COOKIE, path=path, httponly=True, samesite="strict")

    def _mark(self, body: str, account: Account) -> str:
        key = hashlib.sha256(f"session\x1f{self.secret}\x1f{account.password}".encode()).digest()
        return _text(hmac.new(key, body.encode(), "sha256").digest())


def _check_hash(account: Account) -> None:
    try:
        kind, power, r, p, salt, hashed = account.password.split("$")
        whole = kind == "scrypt" and 14 <= int(power) <= 20 and 1 <= int(r) <= 32 and 1 <= int(p) <= 16
        whole = whole and len(urlsafe_b64decode(salt)) >= 16 and len(urlsafe_b64decode(hashed)) == 32
    except ValueError:
        whole = False
    if not whole:
        raise InvalidOperation(f"password of {account.name!r}", "…", "must be what hash_password() or inventory-sdk admin-user made")


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode()
