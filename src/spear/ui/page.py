"""Serves the page in the browser: its files, to whom it is shown, and a websocket for each tab.

Whoever opens the page makes this machine work. `spear.serve.access` keeps other web sites from
opening its websocket.

A tab sends JSON {"do": the name of a request, …}, or the bytes of an image file. The server answers
with a part of the *view*, which is all that the tab shows. An error becomes {"problem": one line}.
One thread does all the work, so that the event loop never waits for the work.
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

MAX_REQUEST_CHARS = 10_000  # longer messages are cut off, since the page's requests are shorter
MAX_TABS = 8  # tabs that may be open at the same time
PAUSE_AFTER_ANSWER_S = 0.01
"""How long the server does not read a tab's messages after each answer. While someone drags through
a recording, the tab would otherwise send more than `max_small_frames_per_s` of `serve.connection`
messages per second."""
REQUESTS_THAT_STOP = ("stop", "step", "reset", "open", "photo")
"""Requests before which a running rollout ends."""

SOCKET_PATH = "/ui"
STYLE_PATH = "/ui.css"
# Path of each file of the page -> its content type, without "text/".
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
    """The page for people, which one server serves together with the websocket for robots.

    Args:
        policy: the policy that acts and answers.
        name: the policy's name on the page.
        token: the server's token; None lets everybody in.
        max_message_bytes: size of the largest message that the server accepts.
        episode_folder: episodes that the page can replay.
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
            content = folder.joinpath(path.removeprefix("/") or "index.html").read_bytes()
            self._files[path] = (content, f"text/{subtype}")

    def owns(self, request: Request) -> bool:
        """Return whether a request is for the page; the policy's websocket is everywhere else."""
        path = urlsplit(request.path).path
        is_file = path in self._files and "Upgrade" not in request.headers
        return path == SOCKET_PATH or is_file

    def answer_own_request(self, request: Request) -> Response | None:
        """Answer a request that the page owns. None accepts the websocket of a tab."""
        url = urlsplit(request.path)
        tokens = parse_qs(url.query).get("token")
        if url.path == "/" and tokens:
            return self._respond_to_token(request, tokens[-1])
        needs_token = url.path != STYLE_PATH  # the form that asks for the token uses the style, too
        if needs_token and not self._is_authorized(request):
            return self._make_token_form("This page asks for the server's token.")
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
            description = {
                "max_bytes": self._max_message_bytes,
                **self._shared.make_constant_state(),
            }
            await TabConnection(connection, self._shared, self._thread).talk(description)
        finally:
            self._num_tabs -= 1

    def close(self) -> None:
        """End the thread; the server calls this when it stops and all tabs are gone."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _is_authorized(self, request: Request) -> bool:
        """Return whether a request has the cookie that proves knowledge of the token."""
        if self._token is None:
            return True
        # A proxy may split the cookies into several headers.
        cookies = "; ".join(request.headers.get_all("Cookie")).split("; ")
        return any(_is_same_secret(cookie, self._make_cookie(request)) for cookie in cookies)

    def _respond_to_token(self, request: Request, sent_token: str) -> Response:
        """Answer a request with a token: set the cookie, and redirect to "/", without the token."""
        if self._token is not None and not _is_same_secret(sent_token, self._token):
            return self._make_token_form("That is not the token: try again.")
        response = _make_response(http.HTTPStatus.SEE_OTHER, "")
        response.headers["Location"] = "/"
        if self._token is not None:
            cookie = self._make_cookie(request)
            response.headers["Set-Cookie"] = f"{cookie}; Path=/; HttpOnly; SameSite=Strict"
        return response

    def _make_token_form(self, words: str) -> Response:
        """Return the page with the form for the token, which shows `words`."""
        form_html = self._token_form.format(words)
        return _make_response(http.HTTPStatus.UNAUTHORIZED, form_html, "text/html")

    def _make_cookie(self, request: Request) -> str:
        """Return the cookie, NAME=VALUE, of a browser whose user knows the token.

        The value is a hash, so that the browser does not store the token. Browsers send cookies to
        all ports of a host, so the name contains the port of this server.
        """
        host_port = request.headers.get("Host", "").rpartition(":")[2]
        port = host_port if host_port.isdecimal() else 80  # which browsers leave out
        token = (self._token or "").encode()
        value = hmac.new(token, b"spear page", hashlib.sha256).hexdigest()
        return f"spear_{port}={value}"


def _is_same_secret(sent_secret: str, expected_secret: str) -> bool:
    """Compare two secrets, in a time that does not show how many characters are equal."""
    return hmac.compare_digest(
        sent_secret.encode(errors="surrogateescape"), expected_secret.encode()
    )


def _make_response(
    status: http.HTTPStatus, body: str | bytes, content_type: str = "text/plain"
) -> Response:
    """Make a response with headers that forbid caching, framing and foreign content."""
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
    """The websocket of one tab.

    A *rollout* is a task that executes steps of the robot until it is stopped or the episode ends.

    Args:
        connection: the websocket.
        shared: the model that all tabs share.
        thread: the thread of the shared model, which does the work of all tabs.
    """

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
            await self._run_and_report_problem(self._handle_request(first_scene))
            async for message in self._connection:
                await self._run_and_report_problem(self._handle_message(message))
                await asyncio.sleep(PAUSE_AFTER_ANSWER_S)
        finally:
            if self._rollout is not None:
                self._rollout.cancel()

    async def _run_and_report_problem(self, work: Coroutine[Any, Any, None]) -> None:
        """Do the work, and send the page its problem, or that there is none."""
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
        """Handle a message of the tab: a request, or the bytes of a photo."""
        if isinstance(message, bytes):
            await self._handle_request({"do": "photo", "data": message})
        else:
            await self._handle_request(self._parse_request(message))

    def _parse_request(self, message: str) -> Mapping[str, Any]:
        """Parse a request. Raises `SpearError` for anything that the page does not send."""
        try:
            request = json.loads(message[:MAX_REQUEST_CHARS])
            name = request["do"]
            # "start" and "stop" concern the rollout, and other requests the tab. Photos are bytes.
            is_known = name in ("start", "stop") or (name in self._tab.handlers and name != "photo")
        except (ValueError, TypeError, KeyError, RecursionError):
            is_known = False
        if not is_known:
            raise SpearError(f"{message[:60]!r} is no request of this page. Reload it.")
        return request

    async def _handle_request(self, request: Mapping[str, Any]) -> None:
        """Stop the rollout if the request needs that, do the request, and start a rollout if asked.

        A rollout also starts when someone opens an episode of an evaluation, to run it again.
        """
        name = request["do"]
        if name in REQUESTS_THAT_STOP:
            await self._stop_rollout()
        if name not in ("start", "stop"):
            view = await self._run_in_thread(self._tab.handlers[name], request)
            await self._send(view)
        should_roll_out = name == "start" or (name == "open" and self._tab.can_move)
        is_rolling_out = self._rollout is not None and not self._rollout.done()
        if should_roll_out and not is_rolling_out:
            self._rollout = asyncio.create_task(self._run_and_report_problem(self._roll_out()))

    async def _stop_rollout(self) -> None:
        """Let the rollout end after its current step, and wait until that step is sent.

        Without the wait, the page would lack the step.
        """
        rollout = self._rollout
        self._rollout = None  # `_roll_out` sees that it is not the current rollout, and ends
        if rollout is not None:
            await rollout

    async def _roll_out(self) -> None:
        """Execute steps until the episode ends or the rollout is stopped.

        The steps follow each other at the robot's pace, or more slowly if this machine is slower.
        """
        await self._send({"running": True})
        try:
            step_s = 1 / CONTROL_RATE_HZ
            due_s = time.monotonic()  # when the next step should begin
            while self._rollout is asyncio.current_task():
                view = await self._run_in_thread(self._tab.execute_step, {})
                await self._send(view)
                if not self._tab.can_move:
                    break
                # After a slow step, the next ones make up for at most one step of delay.
                due_s = max(due_s + step_s, time.monotonic() - step_s)
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
        finally:
            await self._send({"running": False})

    async def _run_in_thread(self, handler: Handler, request: Mapping[str, Any]) -> PageState:
        """Call a handler in the model's thread, without blocking the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, handler, request)

    async def _send(self, view: PageState) -> None:
        """Send a part of the view to the tab."""
        with contextlib.suppress(ConnectionClosed):  # `talk` notices that the tab was closed
            await self._connection.send(json.dumps(view))
