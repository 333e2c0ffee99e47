"""The websocket server, in the openpi convention: metadata first, then observation in, actions out.

Messages are binary msgpack (`spear.serve.wire`); an error is a text message, after which the connection goes
on. `GET /healthz` says "ok"; `GET /metrics` has counts for Prometheus.

No client can hold the others up, fill the memory, or keep the server from stopping; nor does a web page of
somebody else reach a server on the machine of whoever looks at it.
"""

import asyncio
import contextlib
import functools
import hmac
import http
import logging
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Hashable, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame
from websockets.http11 import Request, Response
from websockets.protocol import State

from spear.errors import SpearError
from spear.serve import wire
from spear.serve.options import ServeOptions
from spear.serve.service import Batcher, Busy, Gone, Result, Service

LOG = logging.getLogger("spear.serve")
QUIET = logging.getLogger("spear.serve.websockets")
"""For what broken clients do: the metrics count it, the terminal does not show it."""
QUIET.setLevel(logging.CRITICAL)
LARGEST_MESSAGE = 16 * 2**20
"""Bytes; a larger one ends its connection, 1009 (our choice)."""
MOST_CLIENTS = 256
"""Connections at a time; further ones get 503 (our choice)."""
DRAIN_S = 30.0
"""How long requests under way may take when the server stops."""
REFUSED_S, UNAUTHORIZED_S = 0.05, 0.5
"""A client whose message was refused is not heard for so long, a wrong token not answered (our choice)."""
SEND_S, CLOSE_S = 10.0, 1.0
"""A client that does not read for so long what it is sent, or that the server stops, is cut off (these
limits are all our choice)."""
SMALL, MOST_SMALL = 1024, 100
"""So many frames below so many bytes may come within a second: each is as much work as a large one."""
UNREAD = 2**20
"""Bytes that may wait for a client to read them, beside the answer that it is sent: answers to its pings."""
HELD = 256 * 2**20
"""Bytes of messages not yet answered, of all clients: beyond, the client with most of them is cut off."""
OPENING = 256
"""Connections that have not said yet what they want: beyond, the oldest are cut off."""
PRIVATE = (".localhost", ".local", ".internal", ".home.arpa")
"""Endings of names that nobody outside can point anywhere."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Page(Protocol):
    """What the server knows of `spear.ui.page.Page`."""

    def owns(self, request: Request) -> bool: ...
    def request(self, request: Request) -> Response | None: ...
    async def talk(self, connection: ServerConnection) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """What one server counts, in a registry of its own.

    requests count by outcome: ok, refused (a bad observation), busy, failed (an error of ours), gone (the
    client left). `queue` and `clients` are read when somebody asks.
    """

    def __init__(self, queue: Callable[[], float], clients: Callable[[], float]) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("spear_requests", "Requests by outcome.", ["outcome"], registry=own)
        for outcome in ("ok", "refused", "busy", "failed", "gone"):
            self.requests.labels(outcome)  # shown from the start
        seconds = functools.partial(Histogram, buckets=SECONDS, registry=own)
        self.latency = seconds(
            "spear_request_seconds", "From a request's arrival to its answer being ready."
        )
        self.inference = seconds("spear_inference_seconds", "Inference of one batch.")
        self.size = Histogram(
            "spear_batch_size", "Requests answered together.", buckets=SIZES, registry=own
        )
        Gauge("spear_queue", "Requests that wait.", registry=own).set_function(queue)
        Gauge("spear_clients", "Open connections.", registry=own).set_function(clients)
        Gauge("spear_gpu_memory_bytes", "Held by PyTorch on GPUs.", registry=own).set_function(
            gpu_memory
        )


class Guarded(ServerConnection):
    """One of `peers`, the open connections of a server: cut off where it goes beyond a limit above."""

    def __init__(self, peers: "dict[Guarded, None]", *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.peers, self.held, self._taken = peers, 0, 0
        self._second, self._small, self._sending = 0.0, 0, 0

    async def send(self, message: Any, *, text: bool | None = None) -> None:
        """Send it, within `SEND_S` and as much for each MiB."""
        self._sending += len(message)
        await self._within(SEND_S * (1 + len(message) / 2**20), super().send(message, text=text))
        self._sending -= len(message)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye, within `CLOSE_S`."""
        await self._within(CLOSE_S, super().close(code, reason))

    async def recv(self, decode: bool | None = None) -> Any:
        """The next message; the one before has been answered."""
        self.held, self._taken = max(0, self.held - self._taken), 0
        message = await super().recv(decode)
        self._taken = 14 + len(
            message if isinstance(message, bytes) else message.encode()
        )  # with its frame
        return message

    async def _within(self, seconds: float, work: Coroutine[Any, Any, None]) -> None:
        try:
            async with asyncio.timeout(seconds):
                await work
        except TimeoutError:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.peers[self] = None
        for peer in [peer for peer in self.peers if peer.state is State.CONNECTING][:-OPENING]:
            peer.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.peers.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads in pieces, so that what many small frames cost is known before the rest is looked at."""
        self.held += len(data)
        rest, size = memoryview(data), SMALL
        while rest and not self.transport.is_closing():
            before = self._small
            super().data_received(bytes(rest[:size]))
            rest, size = rest[size:], 2 * size if self._small == before else SMALL
        if self.transport.get_write_buffer_size() > UNREAD + self._sending:
            self.transport.abort()
        if sum(peer.held for peer in self.peers) > HELD:
            max(self.peers, key=lambda peer: peer.held).transport.abort()

    def process_event(self, event: Any) -> None:
        if isinstance(event, Frame) and len(event.data) < SMALL:
            if self.loop.time() - self._second > 1:
                self._second, self._small = self.loop.time(), 0
            self._small += 1
            if self._small > MOST_SMALL:
                self.transport.abort()
        super().process_event(event)


class PolicyServer:
    """Serves one `Service`, and a page if there is one, until it is stopped."""

    def __init__(self, service: Service, options: ServeOptions, page: Page | None = None) -> None:
        self.options, self.page, self.port = options, page, options.port
        self._greeting, self._direct_reply = (
            wire.encode(service.greeting),
            service.embodiment.direct_reply,
        )
        self._peers: dict[Guarded, None] = {}
        self._metrics = Metrics(lambda: len(self._batcher), self._clients)
        self._service, self._stop = service, asyncio.Event()
        self._batcher = Batcher(
            self._compute, options.max_batch, options.wait_ms / 1000, options.queue
        )
        self._draining, self._answering = False, 0

    def _clients(self) -> int:
        return sum(peer.state is State.OPEN for peer in self._peers)

    def _compute(self, requests: Sequence[Any], robots: Sequence[Hashable]) -> Sequence[Result]:
        """A batch, counted."""
        self._metrics.size.observe(len(requests))
        with self._metrics.inference.time():
            return self._service.answer(requests, robots)

    def stop(self) -> None:
        """Take no more requests, answer those that were taken, then end `run`. Call it in the event loop."""
        self._stop.set()

    async def run(self, ready: "Callable[[PolicyServer], None] | None" = None) -> None:
        """Serve until `stop`, SIGTERM or SIGINT. `ready` is called once clients can connect.

        Raises `SpearError` when the port cannot be had.
        """
        with contextlib.suppress(
            ValueError, RuntimeError
        ):  # not the main thread: `stop` is for that
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
        answering = asyncio.create_task(self._batcher.run())
        answering.add_done_callback(lambda _: self.stop())
        try:
            async with await self._listen() as server:
                self.port = next(iter(server.sockets)).getsockname()[1]
                if ready:
                    ready(self)
                await self._stop.wait()
                await self._drain(server)
                if answering.done():
                    answering.result()  # raises what ended it
        finally:
            answering.cancel()
            if self.page:
                self.page.close()

    async def _listen(self) -> Server:
        try:
            return await serve(
                self._client,
                self.options.host,
                self.options.port,
                create_connection=functools.partial(Guarded, self._peers),  # type: ignore[arg-type]
                process_request=self._request,
                compression=None,
                max_size=LARGEST_MESSAGE,
                max_queue=1,
                server_header=None,
                logger=QUIET,
            )
        except OSError as error:
            raise cannot_listen(self.options.host, self.options.port, error) from error

    async def _drain(self, server: Server) -> None:
        self._draining = True
        server.close(close_connections=False)
        deadline = time.monotonic() + DRAIN_S
        while self._answering and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(peer.close(1001, "the server stops") for peer in self._peers))
        for peer in self._peers:
            peer.transport.abort()

    async def _client(self, connection: ServerConnection) -> None:
        """One client, from its first message to its last."""
        previous: float | None = None
        try:
            if self.page and connection.request and self.page.owns(connection.request):
                await self.page.talk(connection)
                return
            await connection.send(self._greeting)
            async for message in connection:
                arrived = time.perf_counter()
                self._answering += 1
                try:
                    reply = await self._reply(connection, message, arrived, previous)
                    await connection.send(reply)
                finally:
                    self._answering -= 1
                previous = time.perf_counter() - arrived
                if isinstance(reply, str):
                    await asyncio.sleep(REFUSED_S)
        except ConnectionClosed:
            pass
        finally:
            self._batcher.forget(connection.id)

    async def _reply(
        self,
        connection: ServerConnection,
        message: str | bytes,
        arrived: float,
        previous: float | None,
    ) -> bytes | str:
        """What to send for a message: bytes with actions, or a text that says what was wrong."""
        outcome = "failed"
        try:
            if self._draining:
                raise Busy("busy: the server is stopping: connect to another one")
            if isinstance(message, str):
                raise SpearError(
                    "message: a text: send one map packed as openpi-client does, in binary"
                )
            request = wire.decode(message)
            if said := self._direct_reply(request):
                outcome = "ok"
                return said
            result = await self._batcher.submit(
                connection.id, request, lambda: connection.state is State.OPEN
            )
            timing = {"infer_ms": 1000 * (time.perf_counter() - arrived)}
            if previous is not None:
                timing["prev_total_ms"] = 1000 * previous
            reply = wire.encode({**result, "server_timing": timing})
            outcome = "ok"
            return reply
        except SpearError as error:
            outcome = "busy" if isinstance(error, Busy) else "refused"
            return str(error)
        except Gone:
            outcome = "gone"
            return ""
        except Exception as error:
            LOG.exception("request failed")
            return f"the server failed: {type(error).__name__}: see its log"
        finally:
            self._metrics.requests.labels(outcome).inc()
            self._metrics.latency.observe(time.perf_counter() - arrived)

    async def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers GET requests; None lets a websocket in. Whoever guesses tokens waits."""
        answer = self._answer(connection, request)
        if answer is not None and answer.status_code == http.HTTPStatus.UNAUTHORIZED:
            await asyncio.sleep(UNAUTHORIZED_S)
        return answer

    def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        status = http.HTTPStatus
        if why := stranger(request, self.options.token):
            return connection.respond(status.FORBIDDEN, why)
        if request.path == "/healthz":
            return connection.respond(status.OK, "ok\n")
        if self.page and self.page.owns(request):
            if answer := self.page.request(request):
                return answer
        elif not self._allowed(request):
            how = "send the token: Authorization: Api-Key TOKEN (openpi-client: api_key)\n"
            return connection.respond(status.UNAUTHORIZED, how)
        if request.path == "/metrics":
            return connection.respond(status.OK, generate_latest(self._metrics.registry).decode())
        if "upgrade" not in request.headers:
            return connection.respond(
                status.NOT_FOUND, "there is /healthz, /metrics and a websocket\n"
            )
        if (busy := self._clients()) >= MOST_CLIENTS:
            return connection.respond(
                status.SERVICE_UNAVAILABLE, f"busy: {busy} clients: try again later\n"
            )
        return None

    def _allowed(self, request: Request) -> bool:
        if (token := self.options.token) is None:
            return True
        sent = [
            each.encode(errors="surrogateescape")
            for each in request.headers.get_all("Authorization")
        ]
        return len(sent) == 1 and hmac.compare_digest(sent[0], f"Api-Key {token}".encode())


def gpu_memory() -> float:
    """Bytes that PyTorch holds on all GPUs together; 0 without one."""
    import torch

    return float(sum(torch.cuda.memory_reserved(i) for i in range(torch.cuda.device_count())))


def stranger(request: Request, token: str | None) -> str | None:
    """Why a request may come from a web page of somebody else; None when it does not.

    Browsers send a page's address as Origin. A page whose own name has been pointed here (DNS rebinding) is
    known by the Host; a server with a token needs no such care. Programs send no Origin.
    """
    hosts, origins = (request.headers.get_all(name) for name in ("Host", "Origin"))
    if any(urlsplit(origin).netloc not in hosts for origin in origins):
        return "this server is not for other web pages\n"
    if token is None and not all(map(_ours, hosts)):
        return (
            "use this server by its address (http://127.0.0.1:PORT), or start it with a --token\n"
        )
    return None


def _ours(host: str) -> bool:
    """Whether a Host header has an address, or a name that only this machine or its network gives."""
    name = (urlsplit("//" + host).hostname or "").rstrip(".")
    return (
        ":" in name
        or "." not in name
        or name.replace(".", "").isdecimal()
        or name.endswith(PRIVATE)
    )


def reachable(host: str) -> str:
    """Where clients reach a server that listens on `host`: of all addresses, the one that others can use."""
    if host in ("", "0.0.0.0", "::"):
        v4, v6 = (socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")
        (family, far), host = (v6, "::1") if host == "::" else (v4, socket.gethostname())
        with (
            contextlib.suppress(OSError),
            socket.socket(family, socket.SOCK_DGRAM) as asked,
        ):  # no network
            asked.connect((far, 9))  # sends nothing: which of our addresses would be used?
            host = str(asked.getsockname()[0])
    return f"[{host}]" if ":" in host else host


def check_address(host: str, port: int) -> None:
    """Raises `SpearError` for an address that a server cannot listen on."""

    async def listen() -> None:
        (await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)).close()

    try:
        asyncio.run(listen())
    except (OSError, UnicodeError) as error:
        raise cannot_listen(host, port, error) from error


def cannot_listen(host: str, port: int, error: BaseException) -> SpearError:
    """The error for an address that is taken or does not exist."""
    return SpearError(f"cannot listen on {host}:{port}: {error}: choose another --port or --host")
