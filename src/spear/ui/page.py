"""The page: its files, who may see them, and its tabs, each with a websocket.

The page puts this machine to work for whoever opens it; other web sites may not
(`spear.serve.access`).

A tab sends JSON {"do": the name of a request, …}, or the bytes of an image file; the server sends
parts of its view. Whatever is wrong becomes {"problem": one line}. One thread does all the work,
never the event loop.
"""

import asyncio
import contextlib
import hashlib
import hmac
import http
import json
import logging
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from spear.errors import SpearError
from spear.policy import Spear1Policy
from spear.sim.scene import FAMILIES
from spear.types import CONTROL_RATE_HZ
from spear.ui.episodes import EpisodeFolder, PageState
from spear.ui.tab import Handler, SharedModel, Tab

LOG = logging.getLogger("spear.ui")

MAX_REQUEST_CHARS = 10_000  # what is longer is no request of the page
MAX_TABS = 8  # open at a time
PAUSE_S = 0.01
"""After each answer the server does not listen to a tab for this long: one that is dragged through
a recording would otherwise send more than the server's `max_small_frames_per_s` messages."""
REQUESTS_THAT_STOP = ("stop", "step", "reset", "open", "photo")
"""Requests before which a running rollout ends."""

SOCKET_PATH = "/ui"
STYLE_PATH = "/ui.css"
SUBTYPE_BY_PATH = {
    "/": "html",
    STYLE_PATH: "css",
    "/ui.js": "javascript",
    "/memory.js": "javascript",
    "/space.js": "javascript",
    "/timeline.js": "javascript",
}
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'"
)


class Page:
    """A page for people, served together with the websocket for robots.

    Args:
        policy: what acts and answers.
        name: what the page calls it.
        token: the server's.
        max_message_bytes: of a message to the server.
        episode_folder: episodes to replay.
    """

    def __init__(
        self,
        policy: Spear1Policy,
        name: str,
        token: str | None,
        max_message_bytes: int,
        episode_folder: EpisodeFolder | None = None,
    ) -> None:
        self._shared = SharedModel(policy, name, episode_folder)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="page")
        self._token = token
        self._max_message_bytes = max_message_bytes
        self._num_tabs = 0
        folder = resources.files("spear.ui")
        self._token_form = folder.joinpath("token_form.html").read_text("utf-8")
        self._files: dict[str, tuple[bytes, str]] = {}  # path → content, content type
        for path, subtype in SUBTYPE_BY_PATH.items():
            content = folder.joinpath(path[1:] or "index.html").read_bytes()
            self._files[path] = (content, f"text/{subtype}")

    def owns(self, request: Request) -> bool:
        """Return whether a request is for the page; the policy's websocket is everywhere else."""
        path = urlsplit(request.path).path
        is_file = path in self._files and "Upgrade" not in request.headers
        return path == SOCKET_PATH or is_file

    def respond(self, request: Request) -> Response | None:
        """Answer a request that the page owns; None lets its websocket in."""
        url = urlsplit(request.path)
        tokens = parse_qs(url.query).get("token")
        if url.path == "/" and tokens:
            return self._respond_to_token(request, tokens[-1])
        if not self._is_authorized(request) and url.path != STYLE_PATH:
            return self._ask_for_token("This page asks for the server's token.")
        if url.path != SOCKET_PATH:
            content, content_type = self._files[url.path]
            return _make_response(http.HTTPStatus.OK, content, content_type)
        if self._num_tabs >= MAX_TABS:
            return _make_response(
                http.HTTPStatus.SERVICE_UNAVAILABLE,
                f"busy: {self._num_tabs} tabs are open: close one",
            )
        return None

    async def talk(self, connection: ServerConnection) -> None:
        """Serve one tab until it is closed."""
        self._num_tabs += 1
        try:
            description = {"max_bytes": self._max_message_bytes, **self._shared.describe()}
            await TabConnection(connection, self._shared, self._thread).talk(description)
        finally:
            self._num_tabs -= 1

    def close(self) -> None:
        """End the thread; the server calls this when it stops and all tabs are gone."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _is_authorized(self, request: Request) -> bool:
        if self._token is None:
            return True
        cookies = "; ".join(request.headers.get_all("Cookie")).split("; ")
        return any(_is_same_secret(cookie, self._make_cookie(request)) for cookie in cookies)

    def _respond_to_token(self, request: Request, sent_token: str) -> Response:
        if self._token is not None and not _is_same_secret(sent_token, self._token):
            return self._ask_for_token("That is not the token: try again.")
        response = _make_response(http.HTTPStatus.SEE_OTHER, "")
        response.headers["Location"] = "/"
        if self._token is not None:
            cookie = self._make_cookie(request)
            response.headers["Set-Cookie"] = f"{cookie}; Path=/; HttpOnly; SameSite=Strict"
        return response

    def _ask_for_token(self, words: str) -> Response:
        form_html = self._token_form.format(words)
        return _make_response(http.HTTPStatus.UNAUTHORIZED, form_html, "text/html")

    def _make_cookie(self, request: Request) -> str:
        """Return what a browser that knows the token sends.

        Browsers send cookies to all ports of a host, so the cookie's name contains the port.
        """
        port = request.headers.get("Host", "").rpartition(":")[2]
        value = hmac.new((self._token or "").encode(), b"spear page", hashlib.sha256).hexdigest()
        return f"spear_{port if port.isdecimal() else 80}={value}"


def _is_same_secret(sent: str, expected: str) -> bool:
    """Compare secrets in a time that does not depend on how much of them is the same."""
    return hmac.compare_digest(sent.encode(errors="surrogateescape"), expected.encode())


def _make_response(
    status: http.HTTPStatus, body: str | bytes, content_type: str = "text/plain"
) -> Response:
    content = body.encode() if isinstance(body, str) else body
    headers = {
        "Content-Type": f"{content_type}; charset=utf-8",
        "Content-Length": str(len(content)),
        "Connection": "close",
        "Cache-Control": "no-store",
        "Content-Security-Policy": CONTENT_SECURITY_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(status.value, status.phrase, Headers(headers), content)


class TabConnection:
    """The websocket of one tab. `thread` is the one thread that the shared model belongs to."""

    def __init__(self, connection: ServerConnection, shared: SharedModel, thread: Executor) -> None:
        self._connection = connection
        self._thread = thread
        self._tab = Tab(shared, is_open=lambda: connection.close_code is None)
        self._rollout: asyncio.Task[None] | None = None

    async def talk(self, description: PageState) -> None:
        """Send the description and the first scene, then answer requests until the tab closes."""
        try:
            await self._send({**description, "running": False, "problem": None})
            first_scene = {"do": "reset", "family": FAMILIES[0], "seed": 0}
            await self._report_problems(self._handle_request(first_scene))
            async for message in self._connection:
                await self._report_problems(self._handle_message(message))
                await asyncio.sleep(PAUSE_S)
        finally:
            if self._rollout is not None:
                self._rollout.cancel()

    async def _report_problems(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, and tell the page what went wrong with it."""
        try:
            await work
            await self._send({"problem": None})
        except SpearError as error:
            await self._send({"problem": str(error)})
        except Exception as error:
            LOG.exception("request failed")
            await self._send(
                {"problem": f"the server failed with {type(error).__name__}. See its log."}
            )

    async def _handle_message(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            await self._handle_request({"do": "photo", "data": message})
        else:
            await self._handle_request(self._parse_request(message))

    def _parse_request(self, message: str) -> Mapping[str, Any]:
        try:
            request = json.loads(message[:MAX_REQUEST_CHARS])
            name = request["do"]
            is_known = name in ("start", "stop") or (name in self._tab.handlers and name != "photo")
        except (ValueError, TypeError, KeyError, RecursionError):
            is_known = False
        if not is_known:
            raise SpearError(f"{message[:60]!r} is no request of this page. Reload it.")
        return request

    async def _handle_request(self, request: Mapping[str, Any]) -> None:
        name = request["do"]
        if name in REQUESTS_THAT_STOP:
            await self._stop_rollout()
        if name not in ("start", "stop"):
            await self._send(await self._run_in_thread(self._tab.handlers[name], request))
        starts_rollout = name == "start" or (name == "open" and self._tab.can_move)
        if starts_rollout and (self._rollout is None or self._rollout.done()):
            self._rollout = asyncio.create_task(self._report_problems(self._roll_out()))

    async def _stop_rollout(self) -> None:
        """Wait until the step under way is finished and sent; otherwise the page would lack it."""
        rollout = self._rollout
        self._rollout = None
        if rollout is not None:
            await rollout

    async def _roll_out(self) -> None:
        """Execute steps at the robot's pace, or as fast as this machine can, until the end."""
        await self._send({"running": True})
        try:
            due = time.monotonic()
            while self._rollout is asyncio.current_task():
                await self._send(await self._run_in_thread(self._tab.execute_step, {}))
                if not self._tab.can_move:
                    break
                due = max(due + 1 / CONTROL_RATE_HZ, time.monotonic() - 1 / CONTROL_RATE_HZ)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        finally:
            await self._send({"running": False})

    async def _run_in_thread(self, handler: Handler, request: Mapping[str, Any]) -> PageState:
        return await asyncio.get_running_loop().run_in_executor(self._thread, handler, request)

    async def _send(self, view: PageState) -> None:
        with contextlib.suppress(ConnectionClosed):  # `talk` notices it
            await self._connection.send(json.dumps(view))
