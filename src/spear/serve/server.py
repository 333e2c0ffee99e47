"""The websocket server, in the openpi convention: metadata first, then observation in, actions out.

Messages are binary msgpack (`spear.serve.wire`); an error is a text message, after which the
connection stays open. `GET /healthz` says "ok"; `GET /metrics` has counts for Prometheus.

No client can delay the others, fill the memory, or keep the server from stopping
(`spear.serve.connection`). If you open somebody else's web page in your browser, that page cannot
use a server on your machine (`spear.serve.access`).
"""

import asyncio
import contextlib
import functools
import http
import logging
import signal
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response
from websockets.protocol import State

from spear.errors import SpearError
from spear.serve import wire
from spear.serve.access import (
    explain_foreign_page,
    explain_malformed_request,
    is_authorized,
    make_listen_error,
    parse_request,
)
from spear.serve.batcher import Batcher, ClientGoneError, ServerBusyError
from spear.serve.connection import ConnectionLimits, LimitedConnection
from spear.serve.exchange import Exchange, Recorder
from spear.serve.listener import LimitedListener, bind_sockets, has_client_gone
from spear.serve.memory import trim_memory_until_cancelled
from spear.serve.metrics import Metrics
from spear.serve.options import ServeOptions
from spear.serve.reading import ReadingBudgets
from spear.serve.service import Answer, Result, Service

LOG = logging.getLogger("spear.serve")
CONNECTION_LOG = logging.getLogger("spear.serve.websockets")
"""The log of the websockets library. It is not shown, because broken clients would fill it; the
metrics count what they do."""
CONNECTION_LOG.setLevel(logging.CRITICAL)
DRAIN_POLL_S = 0.01  # while the server stops, time between checks for unanswered requests
DEFAULT_LIMITS = ConnectionLimits()


class BrowserPage(Protocol):
    """The methods of `spear.ui.page.Page` that the server calls."""

    def owns(self, request: Request) -> bool: ...
    def answer_own_request(self, request: Request) -> Response | None: ...
    async def talk(self, connection: ServerConnection) -> None: ...
    def close(self) -> None: ...


class PolicyServer:
    """Serves one `Service`, and a page if there is one, until it is stopped."""

    def __init__(
        self,
        service: Service,
        options: ServeOptions,
        page: BrowserPage | None = None,
        limits: ConnectionLimits = DEFAULT_LIMITS,
        recorder: Recorder | None = None,
    ) -> None:
        self.options = options
        self.page = page
        self.limits = limits
        self.port = options.port
        self._service = service
        self._recorder = recorder
        self._greeting = wire.encode(service.greeting)
        self._peers: dict[LimitedConnection, None] = {}
        self._batcher = Batcher(
            self._infer_batch,
            max_batch=options.max_batch_size,
            wait_s=options.batch_timeout_ms / 1000,
            capacity=options.max_queue_size,
        )
        self._metrics = Metrics(lambda: len(self._batcher), self._count_clients)
        if recorder:
            self._metrics.add_gauge_of_unrecorded_observations(lambda: recorder.num_dropped)
        self._stop = asyncio.Event()
        self._is_draining = False
        self._num_unanswered = 0

    def stop(self) -> None:
        """Take no more requests, answer those under way, then end `run`.

        Call it in the event loop.
        """
        self._stop.set()

    async def run(self, ready: "Callable[[PolicyServer], None] | None" = None) -> None:
        """Serve until `stop`, SIGTERM or SIGINT.

        Args:
            ready: called with the server once clients can connect.

        Raises:
            SpearError: the server cannot listen on its port.
        """
        self._stop_on_signals()
        inference = asyncio.create_task(self._batcher.answer_until_cancelled())
        inference.add_done_callback(lambda _: self.stop())
        trimming = asyncio.create_task(trim_memory_until_cancelled())
        try:
            async with await self._listen() as server:
                self.port = next(iter(server.sockets)).getsockname()[1]
                if ready:
                    ready(self)
                await self._stop.wait()
                await self._drain(server)
                if inference.done():
                    inference.result()  # raises what ended it
        finally:
            inference.cancel()
            trimming.cancel()
            if self.page:
                self.page.close()

    def _stop_on_signals(self) -> None:
        """Let SIGTERM and SIGINT stop the server."""
        # Outside of the main thread there are no signal handlers; `stop` ends the server there.
        with contextlib.suppress(ValueError, RuntimeError):
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.stop)

    async def _listen(self) -> Server:
        """Open the port, with all limits of connections, and serve each client that connects.

        Two methods answer HTTP requests. While a connection still waits to be admitted,
        `_answer_plain_request` answers a request for /healthz or /metrics, so that a busy server
        can be watched. Every other first request waits for the admission and comes to
        `_process_request`, which answers it, or lets a websocket connection begin. `_serve_client`
        then serves this connection.
        """
        try:
            listener = LimitedListener(
                await bind_sockets(self.options.host, self.options.port),
                self.limits.admission,
                self._answer_plain_request,
            )
            return await serve(
                self._serve_client,
                sock=listener,
                create_connection=functools.partial(  # type: ignore[arg-type]
                    LimitedConnection,
                    self._peers,
                    ReadingBudgets(self.limits.reading),
                    self.limits,
                ),
                process_request=self._process_request,
                compression=None,
                max_size=self.limits.max_message_bytes,
                max_queue=1,
                server_header=None,
                logger=CONNECTION_LOG,
            )
        except OSError as error:
            raise make_listen_error(self.options.host, self.options.port, error) from error

    async def _drain(self, server: Server) -> None:
        """Answer the requests under way, then close all connections."""
        self._is_draining = True
        server.close(close_connections=False)
        deadline = time.monotonic() + self.limits.drain_timeout_s
        while self._num_unanswered and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        endings = [peer.close(CloseCode.GOING_AWAY, "the server stops") for peer in self._peers]
        await asyncio.gather(*endings)
        for peer in self._peers:
            peer.transport.abort()

    def _count_clients(self) -> int:
        """Return the number of open websocket connections."""
        return sum(peer.state is State.OPEN for peer in self._peers)

    def _infer_batch(self, requests: Sequence[Any], robots: Sequence[Hashable]) -> Sequence[Result]:
        """Answer a batch, and measure its size and time for the metrics."""
        self._metrics.batch_size.observe(len(requests))
        with self._metrics.inference.time():
            return self._service.answer(requests, robots)

    async def _serve_client(self, connection: ServerConnection) -> None:
        """Serve one client, from its first message to its last."""
        try:
            if self.page and connection.request and self.page.owns(connection.request):
                await self.page.talk(connection)
            else:
                await self._answer_messages(connection)
        except ConnectionClosed:
            pass
        finally:
            self._batcher.forget(connection.id)
            if self._recorder:
                self._recorder.end_episode(connection.id)

    async def _answer_messages(self, connection: ServerConnection) -> None:
        """Send the greeting, and then a reply to each message of a client."""
        # How long the previous answer took, sending included
        previous_duration_s: float | None = None
        await connection.send(self._greeting)
        async for message in connection:
            arrival_time = time.perf_counter()
            self._num_unanswered += 1
            try:
                reply = await self._answer_or_explain(
                    connection, message, arrival_time, previous_duration_s
                )
                del message  # it may be large, and the next one may come late
                await connection.send(reply)
            finally:
                self._num_unanswered -= 1
            previous_duration_s = time.perf_counter() - arrival_time
            is_error = isinstance(reply, str)
            if is_error:  # a client that repeats its mistake at once must not keep the server busy
                await asyncio.sleep(self.limits.error_pause_s)

    async def _answer_or_explain(
        self,
        connection: ServerConnection,
        message: str | bytes,
        arrival_time: float,
        previous_duration_s: float | None,
    ) -> bytes | str:
        """Return the reply to a message: bytes with actions, or a text that says what was wrong.

        `arrival_time` is when the message arrived (`time.perf_counter`), and `previous_duration_s`
        how long the previous answer took.
        """
        outcome = "failed"
        try:
            reply = await self._answer(connection, message, arrival_time, previous_duration_s)
            outcome = "ok"
            return reply
        except ServerBusyError as error:
            outcome = "busy"
            return str(error)
        except SpearError as error:
            outcome = "refused"
            return str(error)
        except ClientGoneError:
            outcome = "gone"
            return ""
        except Exception as error:
            LOG.exception("request failed")
            return f"the server failed with {type(error).__name__}. See its log."
        finally:
            self._metrics.requests.labels(outcome).inc()
            self._metrics.latency.observe(time.perf_counter() - arrival_time)

    async def _answer(
        self,
        connection: ServerConnection,
        message: str | bytes,
        arrival_time: float,
        previous_duration_s: float | None,
    ) -> bytes | str:
        """Answer a message with actions, or with the embodiment's direct reply.

        Raises `SpearError` if the message is wrong or the server is busy.
        """
        if not _is_client_waiting(connection):
            raise ClientGoneError
        if self._is_draining:
            raise ServerBusyError("busy: the server is stopping. Connect to another one.")
        if isinstance(message, str):
            raise SpearError(
                "the message is a text. Send one map packed as openpi-client does, in binary."
            )
        request = wire.decode(message)
        direct_reply = self._service.embodiment.direct_reply(request)
        if direct_reply:
            if self._recorder:  # such a request resets the robot
                self._recorder.end_episode(connection.id)
            return direct_reply
        result = await self._batcher.submit(
            connection.id, request, lambda: _is_client_waiting(connection)
        )
        latency_s = time.perf_counter() - arrival_time
        if self._recorder:
            self._recorder.add(_make_exchange(connection, len(message), latency_s, result))
        timing = {"infer_ms": 1000 * latency_s}
        if previous_duration_s is not None:
            timing["prev_total_ms"] = 1000 * previous_duration_s
        return wire.encode({**result, "server_timing": timing})

    def _answer_plain_request(self, data: bytes) -> bytes | None:
        """Answer a valid and allowed request for /healthz or /metrics; None for any other."""
        if not data.startswith((b"GET /healthz ", b"GET /metrics ")):
            return None
        request = parse_request(data)
        if request is None or self._find_refusal(request):
            return None
        if request.path == "/healthz":
            return make_plain_response("ok\n")
        if not is_authorized(request, self.options.token):
            return None
        return make_plain_response(self._metrics.format())

    async def _process_request(
        self, connection: ServerConnection, request: Request
    ) -> Response | None:
        """Answer a client's first request; None means that a websocket connection begins.

        The answer to a wrong token is delayed, so that guessing tokens takes long.
        """
        response = self._make_response_unless_websocket(connection, request)
        if response is not None and response.status_code == http.HTTPStatus.UNAUTHORIZED:
            await asyncio.sleep(self.limits.unauthorized_pause_s)
        return response

    def _make_response_unless_websocket(
        self, connection: ServerConnection, request: Request
    ) -> Response | None:
        """Return the response to a request; None means that a websocket connection begins."""
        status = http.HTTPStatus
        refusal = self._find_refusal(request)
        if refusal:
            refusal_status, refusal_text = refusal
            return connection.respond(refusal_status, refusal_text)
        if request.path == "/healthz":
            return connection.respond(status.OK, "ok\n")

        if self.page and self.page.owns(request):
            response = self.page.answer_own_request(request)
            if response:
                return response
        elif not is_authorized(request, self.options.token):
            return connection.respond(
                status.UNAUTHORIZED,
                "send the token: Authorization: Api-Key TOKEN (openpi-client: api_key)\n",
            )

        if request.path == "/metrics":
            return connection.respond(status.OK, self._metrics.format())
        if "upgrade" not in request.headers:
            return connection.respond(
                status.NOT_FOUND, "there is /healthz, /metrics and a websocket\n"
            )
        num_clients = self._count_clients()
        if num_clients >= self.limits.max_clients:
            return connection.respond(
                status.SERVICE_UNAVAILABLE, f"busy: {num_clients} clients: try again later\n"
            )
        return None

    def _find_refusal(self, request: Request) -> tuple[http.HTTPStatus, str] | None:
        """Return the status and the text for a malformed request, or one of a foreign web page.

        The result is None for any other request.
        """
        malformed = explain_malformed_request(request)
        if malformed:
            return http.HTTPStatus.BAD_REQUEST, malformed
        foreign_page = explain_foreign_page(request, self.options.token)
        if foreign_page:
            return http.HTTPStatus.FORBIDDEN, foreign_page
        return None


def _make_exchange(
    connection: ServerConnection, num_message_bytes: int, latency_s: float, answer: Answer
) -> Exchange:
    """Make what is recorded of an answer that is ready `latency_s` after its message arrived."""
    now_s = time.time()
    host, port = connection.remote_address[:2]
    rows = answer["actions"]
    return Exchange(
        client=connection.id,
        address=f"{host}:{port}",
        arrival_s=now_s - latency_s,
        answer_s=now_s,
        inference_s=answer["policy_timing"]["infer_ms"] / 1000,
        observation=answer.observation,
        actions=answer.chunk,
        rows=rows,
        num_bytes=num_message_bytes + answer.chunk.nbytes + rows.nbytes,
    )


def _is_client_waiting(connection: ServerConnection) -> bool:
    """Return whether a client still waits for its answer."""
    if connection.state is not State.OPEN or connection.transport.is_closing():
        return False
    return not has_client_gone(connection.transport.get_extra_info("socket"))


def make_plain_response(text: str) -> bytes:
    """Make the bytes of a whole HTTP response with a text as its body."""
    body = text.encode()
    head = (
        "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: text/plain; charset=utf-8\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
