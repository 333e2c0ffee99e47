"""What no client can do: hold the others up, fill the memory, keep the server from stopping.

Nor does a web page of somebody else reach a server on the machine of whoever looks at it.
"""

import asyncio
import socket
from collections.abc import Coroutine
from typing import Any
from urllib.parse import urlsplit

from websockets.asyncio.server import ServerConnection
from websockets.frames import Frame
from websockets.http11 import Request
from websockets.protocol import State

from spear.errors import SpearError

SEND_S, CLOSE_S = 10.0, 1.0
"""A client that does not read for so long what it is sent, or that the server stops, is cut off (these
limits are all our choice)."""
SMALL, MOST_SMALL = 1024, 100
"""So many frames below so many bytes may come within a second: each is as much work as a large one."""
UNREAD = 2**20
"""Bytes that may wait for a client to read them: answers to its pings."""
HELD = 256 * 2**20
"""Bytes of messages not yet answered, of all clients: beyond, the client with most of them is cut off."""
OPENING = 256
"""Connections that have not said yet what they want: beyond, the oldest are cut off."""
PRIVATE = (".localhost", ".local", ".internal", ".home.arpa")
"""Endings of names that nobody outside can point anywhere."""


class Guarded(ServerConnection):
    """One of `peers`, the open connections of a server: cut off where it goes beyond a limit above."""

    def __init__(self, peers: "dict[Guarded, None]", *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.peers, self.held, self._taken = peers, 0, 0
        self._second, self._small = 0.0, 0

    async def send(self, message: Any, *, text: bool | None = None) -> None:
        """Send it, within `SEND_S`."""
        await self._within(SEND_S, super().send(message, text=text))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye, within `CLOSE_S`."""
        await self._within(CLOSE_S, super().close(code, reason))

    async def recv(self, decode: bool | None = None) -> Any:
        """The next message; the one before has been answered."""
        self.held, self._taken = max(0, self.held - self._taken), 0
        message = await super().recv(decode)
        self._taken = 14 + len(message if isinstance(message, bytes) else message.encode())  # with its frame
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
        if self.transport.get_write_buffer_size() > UNREAD:
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


def stranger(request: Request, token: str | None) -> str | None:
    """Why a request may come from a web page of somebody else; None when it does not.

    Browsers send a page's address as Origin. A page whose own name has been pointed here (DNS rebinding) is
    known by the Host; a server with a token needs no such care. Programs send no Origin.
    """
    hosts, origins = (request.headers.get_all(name) for name in ("Host", "Origin"))
    if any(urlsplit(origin).netloc not in hosts for origin in origins):
        return "this server is not for other web pages\n"
    if token is None and not all(map(_ours, hosts)):
        return "use this server by its address (http://127.0.0.1:PORT), or start it with a --token\n"
    return None


def _ours(host: str) -> bool:
    """Whether a Host header has an address, or a name that only this machine or its network gives."""
    name = (urlsplit("//" + host).hostname or "").rstrip(".")
    return ":" in name or "." not in name or name.replace(".", "").isdecimal() or name.endswith(PRIVATE)


def reachable(host: str) -> str:
    """Where clients reach a server that listens on `host`: of all addresses, the one that others can use."""
    if host in ("", "0.0.0.0", "::"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
            try:
                asked.connect(("192.0.2.1", 9))  # sends nothing: which of our addresses would be used?
            except OSError:  # no network
                return socket.gethostname()
            return str(asked.getsockname()[0])
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
