"""The door of the management pages: nothing behind it runs before the request has passed here.

Closed unless opened: every path needs a person who has signed in, except the sign-in form and the style sheet; everything that is not
a GET needs an operator, and a form that this session was given. Every answer leaves with the same headers, errors included.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from inventory_sdk.web.admin.auth import Auth, SignsIn, User

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]
Refuse = Callable[[Request, int, str, str], Response]
"""The page that says no: request, status, what, and what to do."""

MOST_BYTES: Final = 64 * 1024
"""Of a form. Longer ones are not read to their end."""
MOST_FIELDS: Final = 50

POLICY: Final = (
    b"default-src 'none'",
    b"script-src 'self'",
    b"style-src 'self'",
    b"img-src 'self'",
    b"connect-src 'self'",
    b"form-action 'self'",
    b"base-uri 'none'",
    b"frame-ancestors 'none'",
)
HEADERS: Final = (
    (b"content-security-policy", b"; ".join(POLICY)),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    (b"x-robots-tag", b"noindex"),
)
NO_STORE: Final = (b"cache-control", b"no-store")


class Door:
    """ASGI middleware. What passed is in ``scope["state"]``: ``user``, and ``form`` of a POST."""

    def __init__(self, app: App, *, auth: Auth, refuse: Refuse) -> None:
        self.app = app
        self._auth = auth
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # a websocket is nobody's here: the server closes it
        path = path_of(scope)
        public = path.startswith("/static/")

        async def dressed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(header for header in (*HEADERS, *(() if public else (NO_STORE,))) if header[0] not in own),
                ]
            await send(message)

        request = Request(scope, receive)
        answer = None if public else await self._looked_at(request, path)
        await (answer or self.app)(scope, receive, dressed)

    async def _looked_at(self, request: Request, path: str) -> Response | None:
        """The answer of somebody who stays outside; None: come in."""
        state = request.scope.setdefault("state", {})
        state["user"] = user = await self._auth.user(request)
        if request.method in ("GET", "HEAD"):
            return None if user is not None or path == "/sign-in" else self._nobody(request)
        if request.method != "POST":
            return self._refuse(request, 405, "That can't be done here", "These pages know GET and POST.")
        if not _same_origin(request):
            return self._refuse(request, 403, "Refused", "The form was sent from another site.")
        form = await _form(request)
        if form is None:
            return self._refuse(request, 413, "Refused", "The form is too long.")
        state["form"] = form
        if path == "/sign-in":
            return None
        if user is None:
            return self._nobody(request)
        if not hmac.compare_digest(form.get("token", "").encode(), form_token(self._auth, user).encode()):
            return self._refuse(
                request, 403, "Nothing was done", "This form is of another session. Go back, load the page anew, try again."
            )
        if not user.acts and path != "/sign-out":
            why = f"{user.name} is a viewer here. Ask an operator."
            return self._refuse(request, 403, "Nothing was done: this needs an operator", why)
        return None

    def _nobody(self, request: Request) -> Response:
        if not isinstance(self._auth, SignsIn):
            return self._refuse(request, 401, "Sign in first", "These pages don't know who you are.")
        where = root_of(request.scope) + "/sign-in"
        if request.headers.get("hx-request"):
            # A part of a page that refreshes itself: the whole page has to go.
            return Response(status_code=401, headers={"hx-redirect": where})
        if request.method != "GET":
            return self._refuse(request, 401, "Nothing was done: sign in first", "Your session has ended.")
        back = path_of(request.scope) + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"{where}?{urlencode({'next': back})}" if back != "/" else where, 303)


def root_of(scope: Scope) -> str:
    """Where the pages are mounted, without a slash at the end."""
    return str(scope.get("root_path", "")).rstrip("/")


def path_of(scope: Scope) -> str:
    """The path below that."""
    path, root = str(scope["path"]), root_of(scope)
    return (path[len(root) :] if root and path.startswith(f"{root}/") else "/" if path == root else path) or "/"


def form_token(auth: Auth, user: User) -> str:
    """What every form of this session carries."""
    key = hashlib.sha256(f"form\x1f{auth.secret}".encode()).digest()
    return hmac.new(key, f"{user.name}\x1f{user.session}".encode(), "sha256").hexdigest()


def _same_origin(request: Request) -> bool:
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    # A browser that is too old to say more. The token of the form decides in any case.
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


async def _form(request: Request) -> dict[str, str] | None:
    """Fields of a plain form, the first of each name; empty for anything else, None when it is too long."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            return None
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        return {}
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError:
        return {}
    form: dict[str, str] = {}
    for name, value in pairs:
        form.setdefault(name, value)
    return form
