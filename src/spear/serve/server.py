"""The websocket server, in the openpi convention: metadata first, then observation in, actions out.

Messages are binary msgpack (`spear.serve.wire`); an error is a text message, after which the connection goes
on. `GET /healthz` says "ok"; `GET /metrics` has the counts for Prometheus.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State

from spear.errors import SpearError
from spear.serve import wire
from spear.serve.batching import Batcher, Busy, Gone
from spear.serve.metrics import Metrics, gpu_memory
from spear.serve.service import Service

LOG = logging.getLogger("spear.serve")


@dataclass(frozen=True)
class Settings:
    """How to serve.

    host, port   where; port 0 takes a free one.
    token        what clients must send as "Authorization: Api-Key TOKEN" (openpi-client's api_key); None:
                 nothing.
    max_batch, wait_ms, queue  see `spear.serve.batching.Batcher`; wait_ms in milliseconds.
    max_clients  connections at a time; further ones get 503.
    max_bytes    the largest message; a larger one ends its connection (1009).
    drain_s      how long, when stopping, answers under way may take.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    max_batch: int = 16
    wait_ms: float = 5.0
    queue: int = 64
    max_clients: int = 256
    max_bytes: int = 16 * 2**20
    drain_s: float = 30.0


class Page(Protocol):
    """Something for people beside the policy: requests of its own, with its own answers and websocket."""

    def owns(self, request: Request) -> bool:
        """Whether a request is the page's; all below is for such requests alone."""
        ...

    def request(self, request: Request) -> Response | None:
        """The answer to a GET request; None lets a websocket in."""
        ...

    async def talk(self, connection: ServerConnection) -> None:
        """One websocket, from its first message to its last."""
        ...

    async def close(self) -> None:
        """When the server stops."""
        ...


class PolicyServer:
    """Serves one `Service`, and a page if there is one, until it is stopped."""

    def __init__(self, service: Service, settings: Settings | None = None, page: Page | None = None) -> None:
        self.service, self.page = service, page
        self.settings = settings or Settings()
        self.metrics = Metrics()
        self.port = self.settings.port
        self._stop = asyncio.Event()
        self._draining = False
        self._clients: set[ServerConnection] = set()
        self._answering = 0

    def stop(self) -> None:
        """Take no more requests, answer those that were taken, then end `run`. Call it in the event loop."""
        self._stop.set()

    async def run(self, ready: Callable[[PolicyServer], None] | None = None) -> None:
        """Serve until `stop`, SIGTERM or SIGINT. `ready` is called once clients can connect.

        Raises SpearError when the port cannot be had.
        """
        s = self.settings
        self._batcher = Batcher(self.service.answer, s.max_batch, s.wait_ms / 1000, s.queue, self.metrics)
        self._metadata = wire.encode(self.service.metadata)
        loop = asyncio.get_running_loop()
        signals = []
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                loop.add_signal_handler(number, self.stop)
                signals.append(number)
            except (ValueError, RuntimeError, NotImplementedError):  # not the main thread: `stop` is for that
                break
        answering = asyncio.create_task(self._batcher.run())
        try:
            async with await self._listen() as server:
                self.port = next(iter(server.sockets)).getsockname()[1]
                if ready:
                    ready(self)
                await self._stop.wait()
                await self._drain(server)
        finally:
            answering.cancel()
            if self.page:
                await self.page.close()
            for number in signals:
                loop.remove_signal_handler(number)

    async def _listen(self) -> Server:
        s = self.settings
        try:
            return await serve(
                self._client,
                s.host,
                s.port,
                process_request=self._request,
                compression=None,
                max_size=s.max_bytes,
                max_queue=1,
                server_header=None,
                logger=_quiet(),
            )
        except (OSError, OverflowError) as error:
            raise SpearError(
                f"cannot listen on {s.host}:{s.port}: {error}: choose another --port or --host"
            ) from error

    async def _drain(self, server: Server) -> None:
        self._draining = True
        server.close(close_connections=False)
        deadline = time.monotonic() + self.settings.drain_s
        while (self._answering or not self._batcher.idle) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(c.close(1001, "the server stops") for c in self._clients))

    async def _client(self, connection: ServerConnection) -> None:
        """One client, from its first message to its last."""
        self._clients.add(connection)
        previous: float | None = None
        try:
            if self.page and connection.request and self.page.owns(connection.request):
                await self.page.talk(connection)
                return
            await connection.send(self._metadata)
            async for message in connection:
                arrived = time.perf_counter()
                self._answering += 1
                try:
                    await connection.send(await self._reply(connection, message, arrived, previous))
                finally:
                    self._answering -= 1
                previous = time.perf_counter() - arrived
        except ConnectionClosed:
            pass
        finally:
            self._clients.discard(connection)
            self._batcher.forget(connection)

    async def _reply(
        self, connection: ServerConnection, message: str | bytes, arrived: float, previous: float | None
    ) -> bytes | str:
        """What to send for a message: bytes with actions, or a text that says what was wrong."""
        outcome = "failed"
        try:
            if self._draining:
                raise Busy("busy: the server is stopping: connect to another one")
            if isinstance(message, str):
                raise SpearError("message: a text: send one map packed as openpi-client does, in binary")
            observation = wire.decode(message)
            result: dict[str, Any] = await self._batcher.submit(
                connection, observation, lambda: connection.state is State.OPEN
            )
            timing = {"infer_ms": 1000 * (time.perf_counter() - arrived)}
            if previous is not None:
                timing["prev_total_ms"] = 1000 * previous
            reply = wire.encode({**result, "server_timing": timing})
            outcome = "ok"
            return reply
        except Busy as error:
            outcome = "busy"
            return str(error)
        except SpearError as error:
            outcome = "refused"
            return str(error)
        except Gone:
            outcome = "gone"
            return ""
        except Exception as error:
            LOG.exception("request failed")
            return f"the server failed: {type(error).__name__}: see its log"
        finally:
            self.metrics.requests[outcome] += 1
            self.metrics.latency.observe(time.perf_counter() - arrived)

    def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers GET requests; None lets a websocket in."""
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "ok\n")
        if self.page and self.page.owns(request):
            if answer := self.page.request(request):
                return answer
        elif not self._allowed(request):
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED,
                "send the token: Authorization: Api-Key TOKEN (openpi-client: api_key)\n",
            )
        if request.path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self._metrics())
        if "upgrade" not in request.headers:
            return connection.respond(
                http.HTTPStatus.NOT_FOUND, "there is /healthz, /metrics and a websocket\n"
            )
        if len(self._clients) >= self.settings.max_clients:
            return connection.respond(
                http.HTTPStatus.SERVICE_UNAVAILABLE, f"busy: {len(self._clients)} clients: try again later\n"
            )
        return None

    def _allowed(self, request: Request) -> bool:
        if self.settings.token is None:
            return True
        sent = request.headers.get_all("Authorization")
        right = f"Api-Key {self.settings.token}".encode()
        return len(sent) == 1 and hmac.compare_digest(sent[0].encode(errors="surrogateescape"), right)

    def _metrics(self) -> str:
        return self.metrics.text(
            {
                "spear_queue": ("Requests that wait.", lambda: len(self._batcher)),
                "spear_clients": ("Open connections.", lambda: len(self._clients)),
                "spear_gpu_memory_bytes": ("Memory that PyTorch holds on GPUs.", gpu_memory),
            }
        )


def _quiet() -> logging.Logger:
    """A logger that keeps what broken clients do out of the terminal: it is counted, not shouted."""
    logger = logging.getLogger("spear.serve.websockets")
    logger.setLevel(logging.CRITICAL)
    return logger
