"""``PasswordAuth``: accounts, hashes, sessions as cookies, and waiting after wrong passwords."""

from __future__ import annotations

import asyncio
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response

from inventory_sdk.errors import InvalidOperation
from inventory_sdk.web.admin import Account, PasswordAuth, Role, TooManyTries, hash_password, passwords, tries
from inventory_sdk.web.admin.names import visible
from tests.web.desk import HASHED, PASSWORD, SECRET

OLGA = Account("olga", Role.OPERATOR, HASHED)


def auth(*accounts: Account, secret: str = SECRET, **more: Any) -> PasswordAuth:
    return PasswordAuth(accounts or (OLGA,), secret=secret, **more)


async def cookie(of: PasswordAuth) -> str:
    user = await of.sign_in("olga", PASSWORD, "here")
    assert user is not None
    response = Response()
    of.remember(response, user, path="/", secure=True)
    return response.headers["set-cookie"].partition(";")[0]


def request(cookie: str) -> Request:
    return Request({"type": "http", "headers": [(b"cookie", cookie.encode())]})


async def test_a_session_is_recognised_and_a_changed_one_is_not() -> None:
    mine = auth()
    sent = await cookie(mine)
    user = await mine.user(request(sent))
    assert user is not None
    assert (user.name, user.role) == ("olga", Role.OPERATOR)
    body, _, mark = sent.partition("=")[2].partition(".")
    name, session, until = json.loads(urlsafe_b64decode(body))
    forged = urlsafe_b64encode(json.dumps([name, session, until + 1]).encode()).decode()
    for value in (f"{forged}.{mark}", f"{body}.", f".{mark}", "x", "", f"{body}.{mark[:-2]}AA", f"{body}.é"):
        assert await mine.user(Request({"type": "http", "headers": [(b"cookie", f"inventory_admin={value}".encode("latin-1"))]})) is None
    assert await mine.user(Request({"type": "http", "headers": []})) is None


async def test_a_session_ends_with_its_time_its_password_its_account_and_its_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = request(await cookie(auth()))
    assert await auth().user(sent) is not None
    viewer = await auth(Account("olga", Role.VIEWER, HASHED)).user(sent)
    assert viewer is not None
    assert viewer.role is Role.VIEWER  # a changed role counts at once
    assert await auth(Account("olga", Role.OPERATOR, hash_password("another password"))).user(sent) is None
    assert await auth(Account("other", Role.OPERATOR, HASHED)).user(sent) is None
    assert await auth(secret=SECRET + "!").user(sent) is None
    later = passwords.time.time() + 9 * 3600
    monkeypatch.setattr(passwords.time, "time", lambda: later)
    assert await auth().user(sent) is None


async def test_after_five_wrong_passwords_one_has_to_wait_and_others_have_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(tries.time, "monotonic", lambda: now)
    monkeypatch.setattr(passwords, "check_password", lambda password, _: password == PASSWORD)
    mine = auth()
    for _ in range(5):
        assert await mine.sign_in("olga", "wrong password", "here") is None
    with pytest.raises(TooManyTries) as refused:
        await mine.sign_in("olga", PASSWORD, "here")
    assert 0 < refused.value.retry_after <= 60
    assert await mine.sign_in("olga", PASSWORD, "elsewhere") is not None
    now += refused.value.retry_after + 0.1
    assert await mine.sign_in("olga", "wrong password", "here") is None
    with pytest.raises(TooManyTries) as again:
        await mine.sign_in("olga", PASSWORD, "here")
    assert again.value.retry_after > refused.value.retry_after
    now += 61
    assert await mine.sign_in("olga", PASSWORD, "here") is not None
    assert await mine.sign_in("olga", "wrong password", "here") is None  # and counts from one again
    assert await mine.sign_in("olga", PASSWORD, "here") is not None


async def test_tries_that_come_all_at_once_are_as_many_as_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []

    def check(password: str, _: str) -> bool:
        checked.append(password)
        return False

    monkeypatch.setattr(passwords, "check_password", check)
    mine = auth()
    answers = await asyncio.gather(*[mine.sign_in("olga", f"guess {number}", "here") for number in range(200)], return_exceptions=True)
    assert len(checked) == 5
    assert answers.count(None) == 5
    assert sum(isinstance(each, TooManyTries) for each in answers) == 195


async def test_one_address_may_not_try_names_for_ever_and_others_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "check_password", lambda password, _: password == PASSWORD)
    mine = auth()
    for number in range(50):
        assert await mine.sign_in(f"stranger-{number}", "x", "10.0.0.7") is None
    with pytest.raises(TooManyTries):
        await mine.sign_in("stranger-50", "x", "10.0.0.7")
    assert await mine.sign_in("olga", PASSWORD, "10.0.0.8") is not None
    for number in range(5):  # the second half of these is the sender's to choose
        assert await mine.sign_in("victor", "x", f"2001:db8:1:2::{number}") is None
    with pytest.raises(TooManyTries):
        await mine.sign_in("victor", "x", "2001:db8:1:2:ffff::9")
    assert await mine.sign_in("victor", "x", "2001:db8:1:3::9") is None


async def test_those_who_know_their_password_never_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "check_password", lambda password, _: password == PASSWORD)
    mine = auth()
    for _ in range(200):
        assert await mine.sign_in("olga", PASSWORD, "the office") is not None
    assert await mine.sign_in("victor", "a slip", "the office") is None
    assert await mine.sign_in("olga", PASSWORD, "the office") is not None


async def test_failures_are_forgotten_after_a_quiet_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(tries.time, "monotonic", lambda: now)
    monkeypatch.setattr(passwords, "check_password", lambda password, _: password == PASSWORD)
    mine = auth()
    for _ in range(20):
        for _ in range(4):
            assert await mine.sign_in("olga", "wrong password", "here") is None
        now += 3601


async def test_what_is_remembered_of_strangers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "check_password", lambda *_: False)
    monkeypatch.setattr(tries, "MOST_REMEMBERED", 10)
    mine = auth()
    for number in range(30):
        await mine.sign_in(f"stranger-{number}", "x", f"10.0.0.{number}")
    assert len(mine._tries) == 10


async def test_unknown_names_are_checked_like_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same work, whatever the accounts' hashes cost: how long an answer takes says nothing about who there is."""
    worked: list[tuple[int, int, int]] = []

    def scrypt(_: bytes, *, n: int, r: int, p: int, **__: Any) -> bytes:
        worked.append((n, r, p))
        return bytes(32)

    monkeypatch.setattr(passwords.hashlib, "scrypt", scrypt)
    salt, hashed = HASHED.split("$")[4:]
    for cost in ("14$8$1", "15$8$3", "16$8$2"):
        mine = auth(Account("olga", Role.OPERATOR, f"scrypt${cost}${salt}${hashed}"))
        assert await mine.sign_in("nobody", PASSWORD, "here") is None
        assert await mine.sign_in("olga", PASSWORD, "here") is None
        assert worked[-1] == worked[-2], cost


def test_a_password_is_kept_as_a_hash_that_is_different_each_time() -> None:
    assert hash_password(PASSWORD) != HASHED
    assert passwords.check_password(PASSWORD, HASHED)
    assert not passwords.check_password(PASSWORD + "!", HASHED)
    with pytest.raises(InvalidOperation, match="12 to 1024"):
        hash_password("short")


@pytest.mark.parametrize(
    "wrong", ["", "plain text", "scrypt$1$8$3$AAAA$AAAA", "bcrypt$15$8$3$a$b", pytest.param(HASHED[:-8], id="cut short")]
)
def test_an_account_with_something_else_than_a_hash_is_refused_and_not_repeated(wrong: str) -> None:
    with pytest.raises(InvalidOperation, match="'olga'") as refused:
        auth(Account("olga", Role.OPERATOR, wrong))
    assert not wrong or wrong not in str(refused.value)


def test_accounts_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "people"
    file.write_text(f"# the night shift\n\nolga:operator:{HASHED}\nvíctor:viewer:{HASHED}\n", "utf-8")
    assert set(PasswordAuth.from_file(file, secret=SECRET)._accounts) == {"olga", "víctor"}
    for text, why in (
        (f"olga:boss:{HASHED}", "viewer or operator"),
        ("", "must not be empty"),
        (f"a:viewer:{HASHED}\na:viewer:{HASHED}", "twice"),
    ):
        file.write_text(text)
        with pytest.raises(InvalidOperation, match=why):
            PasswordAuth.from_file(file, secret=SECRET)
    with pytest.raises(InvalidOperation, match="at least 32"):
        auth(secret="short")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("sku-7", "sku-7"),
        ("é😀 ß", "é😀 ß"),
        ("a\x1fb\x00\n\x7f", "a⟨US⟩b⟨NUL⟩⟨LF⟩⟨U+007F⟩"),
        ("gnp\u202egpj.exe", "gnp⟨U+202E⟩gpj.exe"),
        ("a\u200bb\u00a0c", "a⟨U+200B⟩b⟨U+00A0⟩c"),
    ],
)
def test_names_show_what_an_eye_would_miss(name: str, shown: str) -> None:
    assert visible(name) == shown
