"""The page's side of HTTP: its files, who may see them, and its websocket.

The page puts this machine to work for whoever opens it. Other web sites must not do that: a websocket is
taken only from a page of this server, and without a token the page is found only under an address or
localhost, never under a name that somebody else could point here.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http
import ipaddress
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from spear.policy import Spear1Policy
from spear.ui.session import Session
from spear.ui.table import Studio

SOCKET = "/ui"
FILES = {
    "/": ("index.html", "text/html"),
    "/ui.css": ("ui.css", "text/css"),
    "/ui.js": ("ui.js", "text/javascript"),
    "/space.js": ("space.js", "text/javascript"),
}
MOST_TABS = 8
"""Open at a time (our choice)."""
POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
ASK = """<!doctype html><html lang="en"><meta charset="utf-8"><title>SPEAR-1</title>
<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="stylesheet" href="/ui.css">
<main class="door"><h1>SPEAR-1</h1><p>{said}</p><form action="/" method="get">
<input type="password" name="token" placeholder="token" autofocus><button
class="primary">Open</button></form></main>
"""


class Page:
    """A page for people beside the websocket for robots. `token`, `max_bytes` (a message's): the server's."""

    def __init__(self, policy: Spear1Policy, name: str, token: str | None, max_bytes: int) -> None:
        self._studio = Studio(policy, name)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="page")
        self._token = token
        self._about = {"max_bytes": max_bytes}
        self._tabs = 0
        folder = resources.files("spear.ui")
        self._files = {path: (folder.joinpath(f).read_bytes(), kind) for path, (f, kind) in FILES.items()}

    def owns(self, request: Request) -> bool:
        """Whether a request is for the page, and not for the policy, whose websocket is everywhere else."""
        path = urlsplit(request.path).path
        return path == SOCKET or (path in FILES and "Upgrade" not in request.headers)

    def request(self, request: Request) -> Response | None:
        """The answer to a request that the page owns; None lets its websocket in."""
        parts = urlsplit(request.path)
        if why := self._stranger(request):
            return _response(http.HTTPStatus.FORBIDDEN, why)
        if parts.path == "/" and (sent := parse_qs(parts.query).get("token")):
            return self._enter(request, sent[-1])
        if not self._known(request) and parts.path != "/ui.css":
            return _ask("This page asks for the server's token.")
        if parts.path != SOCKET:
            return _response(http.HTTPStatus.OK, *self._files[parts.path])
        if self._tabs >= MOST_TABS:
            busy = f"busy: {self._tabs} tabs are open: close one"
            return _response(http.HTTPStatus.SERVICE_UNAVAILABLE, busy)
        return None

    async def talk(self, connection: ServerConnection) -> None:
        """One tab, until it is closed."""
        self._tabs += 1
        try:
            await Session(connection, self._studio, self._thread).talk(self._about)
        finally:
            self._tabs -= 1

    async def close(self) -> None:
        """When the server stops and all tabs are gone."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._studio.close)
        self._thread.shutdown(wait=False)

    def _stranger(self, request: Request) -> str | None:
        """Why a request does not come from a page of ours; None when it does."""
        host = request.headers.get("Host", "")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return "this page is for its own server only"
        if self._token is None and not _address(host):
            return "open this page by address (http://127.0.0.1:PORT), or start the server with a --token"
        return None

    def _known(self, request: Request) -> bool:
        right = self._cookie(request).encode()
        sent = "; ".join(request.headers.get_all("Cookie")).split("; ")
        return self._token is None or any(
            hmac.compare_digest(cookie.encode(errors="surrogateescape"), right) for cookie in sent
        )

    def _enter(self, request: Request, sent: str) -> Response:
        if self._token is not None and not hmac.compare_digest(sent.encode(), self._token.encode()):
            return _ask("That is not the token: try again.")
        response = _response(http.HTTPStatus.SEE_OTHER, "")
        response.headers["Location"] = "/"
        if self._token is not None:
            response.headers["Set-Cookie"] = f"{self._cookie(request)}; Path=/; HttpOnly; SameSite=Strict"
        return response

    def _cookie(self, request: Request) -> str:
        """What a browser that knows the token sends. Cookies do not know ports: the name does."""
        port = request.headers.get("Host", "").rpartition(":")[2]
        value = hmac.new((self._token or "").encode(), b"spear page", hashlib.sha256).hexdigest()
        return f"spear_{port if port.isdecimal() else 80}={value}"


def _address(host: str) -> bool:
    """Whether a Host header names localhost or a numeric address."""
    try:
        ipaddress.ip_address(urlsplit("//" + host).hostname or "")
    except ValueError:
        return host.partition(":")[0] == "localhost"
    return True


def _ask(why: str) -> Response:
    """The page that asks for the token."""
    return _response(http.HTTPStatus.UNAUTHORIZED, ASK.format(said=why), "text/html")


def _response(status: http.HTTPStatus, body: str | bytes, kind: str = "text/plain") -> Response:
    data = body.encode() if isinstance(body, str) else body
    headers = Headers(
        {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(data)),
            "Connection": "close",
            "Cache-Control": "no-store",
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
    )
    return Response(status.value, status.phrase, headers, data)
