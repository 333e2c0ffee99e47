"""The socket from which a server accepts connections, as `spear.serve.admission` lets them in."""

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from spear.serve.admission import AdmissionLimits, AdmissionQueue, find_network

LOG = logging.getLogger("spear.serve")
ADMISSION_INTERVAL_S = 0.01  # how often the rates are asked while connections wait
MAX_ACCEPTED_AT_ONCE = 100  # connections, before the event loop does other work
MAX_PLAIN_REQUEST_BYTES = 4096
RESOURCE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""The errors after which accepting pauses, because trying again at once would fail again."""
ACCEPT_PAUSE_S = 1.0
LOG_INTERVAL_S = 60.0
HANG_UP_EVENTS = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)

AnswerPlainRequest = Callable[[bytes], bytes | None]


class LimitedListener(socket.socket):
    """A socket that asyncio accepts from as from any other that listens.

    It takes connections from the sockets that listen on the server's addresses, lets them wait, and
    hands them over at limited rates. Clients that have gone by then are dropped.

    This object is one end of a pair of connected sockets. It becomes readable, which is what
    asyncio waits for, when the other end gets a byte for a connection that may be accepted.

    Args:
        listeners: bound sockets, which this object listens on and closes.
        limits: the rates.
        answer_plain_request: a client's first bytes → the whole response, if the request can be
            answered at once, without a websocket connection; else None.
    """

    def __init__(
        self,
        listeners: list[socket.socket],
        limits: AdmissionLimits,
        answer_plain_request: AnswerPlainRequest,
    ) -> None:
        own_end, self._other_end = socket.socketpair()
        super().__init__(own_end.family, own_end.type, own_end.proto, own_end.detach())
        self._other_end.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._listeners = listeners
        self._queue: AdmissionQueue[socket.socket] = AdmissionQueue(limits)
        self._answer_plain_request = answer_plain_request
        self._admitted: deque[socket.socket] = deque()
        self._is_admission_planned = False
        self._is_closed = False
        self._last_logged_s = -LOG_INTERVAL_S

    def getsockname(self) -> Any:
        """Return the first address."""
        return self._listeners[0].getsockname()

    def listen(self, backlog: int = 100, /) -> None:
        """Start to take connections."""
        for listener in self._listeners:
            listener.setblocking(False)
            listener.listen(backlog)
        self._resume_accepting()

    def accept(self) -> tuple[socket.socket, Any]:
        """Return the next connection that was let in, and its address.

        Raises:
            BlockingIOError: there is none.
        """
        self.recv(1)  # raises BlockingIOError
        connection = self._admitted.popleft()
        try:
            return connection, connection.getpeername()
        except OSError as error:  # the client has gone
            connection.close()
            raise ConnectionAbortedError from error

    def close(self) -> None:
        """Stop listening, and close the connections that wait."""
        self._is_closed = True
        for listener in self._listeners:
            if listener.fileno() >= 0:
                self._loop.remove_reader(listener)
                listener.close()
        for connection in (*self._queue.remove_all(), *self._admitted):
            connection.close()
        self._admitted.clear()
        self._other_end.close()
        super().close()

    def _resume_accepting(self) -> None:
        if not self._is_closed:
            for listener in self._listeners:
                self._loop.add_reader(listener, self._accept_waiting, listener)

    def _pause_accepting(self, error: OSError) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener)
        self._loop.call_later(ACCEPT_PAUSE_S, self._resume_accepting)
        if time.monotonic() - self._last_logged_s >= LOG_INTERVAL_S:
            self._last_logged_s = time.monotonic()
            LOG.error(
                "No new client can connect for now: %s. Robots that are connected are still"
                " answered. Allow more open files: ulimit -n 4096.",
                error.strerror,
            )

    def _accept_waiting(self, listener: socket.socket) -> None:
        """Let the connections wait that have come to an address."""
        for _ in range(MAX_ACCEPTED_AT_ONCE):
            try:
                connection, address = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as error:
                if error.errno not in RESOURCE_ERRNOS:
                    raise
                self._pause_accepting(error)
                break
            connection.setblocking(False)
            superfluous = self._queue.add(find_network(address[0]), connection)
            if superfluous is not None:
                superfluous.close()
            if not self._is_admission_planned:
                self._admit()

    def _admit(self) -> None:
        """Hand over the connections that the rates let in; look again soon if others wait."""
        self._is_admission_planned = False
        if self._is_closed:
            return
        while (connection := self._queue.take(self._loop.time())) is not None:
            if has_gone(connection) or self._is_answered(connection):
                connection.close()
            else:
                self._admitted.append(connection)
                self._other_end.send(b"c")
        if len(self._queue):
            self._is_admission_planned = True
            self._loop.call_later(ADMISSION_INTERVAL_S, self._admit)

    def _is_answered(self, connection: socket.socket) -> bool:
        """Answer a plain request whose bytes are here already; return whether it was one."""
        with contextlib.suppress(OSError):
            request = connection.recv(MAX_PLAIN_REQUEST_BYTES, socket.MSG_PEEK)
            response = self._answer_plain_request(request)
            if response is not None:
                connection.recv(len(request))  # closing with unread bytes would lose the response
                connection.send(response)
                connection.shutdown(socket.SHUT_WR)
                return True
        return False


async def open_listeners(host: str, port: int) -> list[socket.socket]:
    """Bind a socket to each address of a host, as asyncio does for its servers.

    Raises:
        OSError: an address is taken or does not exist.
    """
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, host, port, start_serving=False)
    listeners = [socket.socket(fileno=os.dup(bound.fileno())) for bound in server.sockets]
    server.close()
    return listeners


def has_gone(connection: Any) -> bool:
    """Return whether the client of a socket will send nothing more, whatever is still unread."""
    poll = select.poll()
    poll.register(connection.fileno(), HANG_UP_EVENTS)
    return bool(poll.poll(0))
