"""The socket from which a server accepts connections, at the rates of `spear.serve.admission`."""

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

from spear.serve.admission import AdmissionLimits, AdmissionQueue, get_rate_limit_key

LOG = logging.getLogger("spear.serve")
ADMISSION_INTERVAL_S = 0.01  # while connections wait, time between checks of the rates
MAX_ACCEPTED_AT_ONCE = 100  # connections that are accepted before the event loop does other work
MAX_PLAIN_REQUEST_BYTES = 4096  # largest plain request that is answered before a client is admitted
RESOURCE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of accepting that say that this machine is out of files or memory."""
ACCEPT_PAUSE_S = 1.0  # pause after such an error, because trying again at once would fail again
LOG_INTERVAL_S = 60.0  # smallest time between two lines in the log about such errors
# What `poll` reports if a client has closed its end, or its connection has an error.
HANG_UP_EVENTS = select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0)

AnswerPlainRequest = Callable[[bytes], bytes | None]


class LimitedListener(socket.socket):
    """A listening socket for asyncio, from which connections can be accepted at limited rates only.

    It accepts connections from the sockets that really listen on the server's addresses, lets them
    wait, and *admits* them at limited rates: asyncio then gets them from `accept`. Connections
    whose clients have gone while they waited are dropped.

    asyncio calls `accept` when a socket becomes readable. So this object is one end of a pair of
    connected sockets, and for each admitted connection a byte is written to the other end.

    Args:
        listeners: bound sockets, which this object listens on and closes.
        limits: the limits of rates and of waiting connections.
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
        self.recv(1)  # the byte of an admitted connection; raises BlockingIOError if there is none
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
        """Let the event loop call `_accept_waiting` when a client connects."""
        if not self._is_closed:
            for listener in self._listeners:
                self._loop.add_reader(listener, self._accept_waiting, listener)

    def _pause_accepting(self, error: OSError) -> None:
        """Accept nothing for a while, after an error that says that resources are used up."""
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
        """Accept the connections that clients have made to an address, and let them wait."""
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
            surplus_connection = self._queue.add_and_pop_surplus(
                get_rate_limit_key(address[0]), connection
            )
            if surplus_connection is not None:
                surplus_connection.close()
            if not self._is_admission_planned:
                self._admit()

    def _admit(self) -> None:
        """Admit the connections that the rates let in. If others wait, check again soon."""
        self._is_admission_planned = False
        if self._is_closed:
            return
        while (connection := self._queue.take(self._loop.time())) is not None:
            if has_client_gone(connection) or self._answer_if_plain_request(connection):
                connection.close()
            else:
                self._admitted.append(connection)
                self._other_end.send(b"c")
        if len(self._queue):
            self._is_admission_planned = True
            self._loop.call_later(ADMISSION_INTERVAL_S, self._admit)

    def _answer_if_plain_request(self, connection: socket.socket) -> bool:
        """Send the response to a plain request whose bytes have arrived already.

        Returns:
            Whether the bytes were such a request, so that the connection can be closed.
        """
        with contextlib.suppress(OSError):
            # MSG_PEEK leaves the bytes unread. If they are not a plain request, the websocket
            # connection has yet to read them.
            request = connection.recv(MAX_PLAIN_REQUEST_BYTES, socket.MSG_PEEK)
            response = self._answer_plain_request(request)
            if response is not None:
                connection.recv(len(request))  # closing with unread bytes would lose the response
                connection.send(response)
                connection.shutdown(socket.SHUT_WR)
                return True
        return False


async def bind_sockets(host: str, port: int) -> list[socket.socket]:
    """Bind a socket to each address of a host, as asyncio does; the sockets do not listen yet.

    Raises:
        OSError: an address is taken or does not exist.
    """
    # asyncio's own server binds the sockets. Copies of them stay open when it is closed.
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, host, port, start_serving=False)
    listeners = [socket.socket(fileno=os.dup(bound.fileno())) for bound in server.sockets]
    server.close()
    return listeners


def has_client_gone(client_socket: Any) -> bool:
    """Return whether the client of a socket has closed its end, even if data are still unread."""
    poll = select.poll()
    poll.register(client_socket.fileno(), HANG_UP_EVENTS)
    return bool(poll.poll(0))
