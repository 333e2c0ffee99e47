"""The page: its files, who may see them, and its tabs, each with a websocket.

The page puts this machine to work for whoever opens it; other web sites may not (`spear.serve.server`).

A tab sends JSON {"do": one of `REQUESTS`, …}, or the bytes of an image file; it is sent parts of its view.
Whatever is wrong becomes {"problem": one line}. One thread does all the work, never the event loop.
"""

import asyncio
import contextlib
import hashlib
import hmac
import http
import json
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
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
from spear.ui.scenes import Shelf, View
from spear.ui.table import Studio, Table

LOG = logging.getLogger("spear.ui")
OF_TABLE = ("look", "film", "predict", "boxes", "question", "reset", "open", "instruct", "step")
REQUESTS = (*OF_TABLE, "start", "stop")
"""What a tab may ask for: `OF_TABLE` are methods of `spear.ui.table.Table`."""
LONGEST_REQUEST = 10_000
"""Characters: what is longer is no request (our choice)."""
SOCKET = "/ui"
SCRIPTS = {f"/{name}.js": "javascript" for name in ("ui", "memory", "space", "timeline")}
FILES = {"/": "html", "/ui.css": "css", **SCRIPTS}
MOST_TABS, PAUSE_S = 8, 0.01
"""Open at a time; after each answer a tab is not heard for so long: one that is dragged through a recording
would else send more than the server's `MOST_SMALL` messages (our choice)."""
POLICY = (
    "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'self'"
)


class Page:
    """A page for people beside the websocket for robots. `token`, `max_bytes` (a message's): the server's.
    shelf: episodes to replay."""

    def __init__(
        self,
        policy: Spear1Policy,
        name: str,
        token: str | None,
        max_bytes: int,
        shelf: Shelf | None = None,
    ) -> None:
        self._studio = Studio(policy, name, shelf)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="page")
        self._token, self._max_bytes, self._tabs = token, max_bytes, 0
        folder = resources.files("spear.ui")
        read = {path: folder.joinpath(path[1:] or "index.html").read_bytes() for path in FILES}
        self._files = {path: (data, f"text/{FILES[path]}") for path, data in read.items()}
        self._ask = folder.joinpath("door.html").read_text("utf-8")

    def owns(self, request: Request) -> bool:
        """Whether a request is for the page, and not for the policy, whose websocket is everywhere else."""
        path = urlsplit(request.path).path
        return path == SOCKET or (path in FILES and "Upgrade" not in request.headers)

    def respond(self, request: Request) -> Response | None:
        """The answer to a request that the page owns; None lets its websocket in."""
        parts = urlsplit(request.path)
        if parts.path == "/" and (sent := parse_qs(parts.query).get("token")):
            return self._enter(request, sent[-1])
        if not self._known(request) and parts.path != "/ui.css":
            return self._door("This page asks for the server's token.")
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
            about = {"max_bytes": self._max_bytes, **self._studio.about()}
            await Session(connection, self._studio, self._thread).talk(about)
        finally:
            self._tabs -= 1

    def close(self) -> None:
        """When the server stops and all tabs are gone."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _known(self, request: Request) -> bool:
        sent = "; ".join(request.headers.get_all("Cookie")).split("; ")
        return self._token is None or any(_equal(cookie, self._cookie(request)) for cookie in sent)

    def _enter(self, request: Request, sent: str) -> Response:
        if self._token is not None and not _equal(sent, self._token):
            return self._door("That is not the token: try again.")
        response = _response(http.HTTPStatus.SEE_OTHER, "")
        response.headers["Location"] = "/"
        if self._token is not None:
            response.headers["Set-Cookie"] = (
                f"{self._cookie(request)}; Path=/; HttpOnly; SameSite=Strict"
            )
        return response

    def _door(self, words: str) -> Response:
        return _response(http.HTTPStatus.UNAUTHORIZED, self._ask.format(words), "text/html")

    def _cookie(self, request: Request) -> str:
        """What a browser that knows the token sends. Cookies do not know ports: the name does."""
        port = request.headers.get("Host", "").rpartition(":")[2]
        value = hmac.new((self._token or "").encode(), b"spear page", hashlib.sha256).hexdigest()
        return f"spear_{port if port.isdecimal() else 80}={value}"


def _equal(sent: str, right: str) -> bool:
    """Whether a secret is the right one; the time that this takes tells nothing about it."""
    return hmac.compare_digest(sent.encode(errors="surrogateescape"), right.encode())


def _response(status: http.HTTPStatus, body: str | bytes, kind: str = "text/plain") -> Response:
    data = body.encode() if isinstance(body, str) else body
    headers = {
        "Content-Type": f"{kind}; charset=utf-8",
        "Content-Length": str(len(data)),
        "Connection": "close",
        "Cache-Control": "no-store",
        "Content-Security-Policy": POLICY,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Response(status.value, status.phrase, Headers(headers), data)


class Session:
    """One tab. `thread` is the one thread that the studio belongs to."""

    def __init__(self, connection: ServerConnection, studio: Studio, thread: Executor) -> None:
        self._connection, self._thread = connection, thread
        self._table = Table(studio, lambda: connection.close_code is None)
        self._rollout: asyncio.Task[None] | None = None

    async def talk(self, about: View) -> None:
        """Serve the tab until it is closed. `about` is sent first, then the first scene."""
        try:
            await self._send({**about, "running": False, "problem": None})
            await self._safely(self._do({"do": "reset", "family": FAMILIES[0], "seed": 0}))
            async for message in self._connection:
                await self._safely(self._answer(message))
                await asyncio.sleep(PAUSE_S)
        finally:
            if self._rollout is not None:
                self._rollout.cancel()

    async def _safely(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it; what goes wrong is said to the page."""
        try:
            await work
            await self._send({"problem": None})
        except SpearError as error:
            await self._send({"problem": str(error)})
        except Exception as error:
            LOG.exception("request failed")
            await self._send({"problem": f"the server failed: {type(error).__name__}: see its log"})

    async def _answer(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            return await self._do({"do": "photo", "data": message})
        try:
            request = json.loads(message[:LONGEST_REQUEST])
            REQUESTS.index(request["do"])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise SpearError(f"{message[:60]!r}: no request of this page: reload it") from None
        await self._do(request)

    async def _do(self, request: Mapping[str, Any]) -> None:
        name = request["do"]
        if name in ("stop", "step", "reset", "open", "photo"):
            await self._stop()
        if name not in ("start", "stop"):
            await self._send(await self._work(getattr(self._table, name), request))
        starts = name == "start" or (name == "open" and self._table.moves)
        if starts and (self._rollout is None or self._rollout.done()):
            self._rollout = asyncio.create_task(self._safely(self._roll()))

    async def _stop(self) -> None:
        """The step that is being made is made, and said: else the page would lack one."""
        task, self._rollout = self._rollout, None
        if task is not None:
            await task

    async def _roll(self) -> None:
        """Steps at the robot's pace, or as fast as this machine can, until stopped or the episode is over."""
        await self._send({"running": True})
        try:
            due = time.monotonic()
            while self._rollout is asyncio.current_task():
                await self._send(await self._work(self._table.step, {}))
                if not self._table.moves:
                    break
                due = max(due + 1 / CONTROL_RATE_HZ, time.monotonic() - 1 / CONTROL_RATE_HZ)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        finally:
            await self._send({"running": False})

    async def _work(
        self, job: Callable[[Mapping[str, Any]], View], request: Mapping[str, Any]
    ) -> View:
        return await asyncio.get_running_loop().run_in_executor(self._thread, job, request)

    async def _send(self, view: View) -> None:
        with contextlib.suppress(ConnectionClosed):  # `talk` notices it
            await self._connection.send(json.dumps(view))
