"""Limits of the server's connections: what one client may cost before the server cuts it off."""

import asyncio
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import DATA_OPCODES, Frame
from websockets.protocol import State

from spear.serve.admission import AdmissionLimits, get_rate_limit_key
from spear.serve.listener import has_client_gone
from spear.serve.reading import ReadingBudgets, ReadingLimits

MIB = 2**20
FRAME_HEADER_BYTES = 14  # the longest header of a websocket frame


@dataclass(frozen=True)
class ConnectionLimits:
    """What clients of one server may do. All numbers are our choice."""

    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    """How many new connections clients may make."""
    reading: ReadingLimits = field(default_factory=ReadingLimits)
    """How many bytes per second the server reads."""
    max_message_bytes: int = 16 * MIB
    """A larger message ends its connection with code 1009."""
    max_clients: int = 256
    """Connections at a time; the server answers further ones with 503."""
    max_opening: int = 256
    """Connections that have not sent their request yet; beyond this number the oldest are cut off.
    """
    max_unanswered_bytes: int = 256 * MIB
    """Messages of all clients that are not answered yet; beyond this the largest sender is cut off.
    """
    max_unread_bytes: int = MIB
    """Replies to a client's pings that the client has not read yet (answers do not count)."""
    small_frame_bytes: int = 1024
    """A smaller websocket frame is as much work as a large one, so the number of small frames per
    second is limited."""
    max_small_frames_per_s: int = 100
    send_timeout_s: float = 10.0
    """A client that does not read its answer within this time is cut off; large answers have this
    time per MiB in addition."""
    close_timeout_s: float = 1.0
    """A client that does not confirm the end of its connection for this long is cut off."""
    error_pause_s: float = 0.05
    """After an error the server reads nothing from that client for this long."""
    unauthorized_pause_s: float = 0.5
    """The server waits this long before it answers a wrong token, so that guessing takes long."""
    drain_timeout_s: float = 30.0
    """When the server stops, unanswered requests may take this long."""


class LimitedConnection(ServerConnection):
    """A connection of a server, which is cut off when it exceeds a limit.

    Args:
        peers: all connections of the server, as the keys of a dict in the order of opening. The
            connection adds and removes itself.
        budgets: how many bytes the server still reads from each address.
        limits: the limits.
        args: passed to `ServerConnection`, and so are `options`.
    """

    def __init__(
        self,
        peers: "dict[LimitedConnection, None]",
        budgets: ReadingBudgets,
        limits: ConnectionLimits,
        *args: Any,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._peers = peers
        self._budgets = budgets
        self._limits = limits
        self._address = ""  # whose budget this connection uses
        self._is_reading_paused = False  # True until the budget has bytes again
        self.unanswered_bytes = 0  # received, and not answered yet
        self._current_message_bytes = 0
        self._unread_frames: deque[Frame] = deque()  # of messages that `recv` has not returned yet
        self._bytes_being_sent = 0
        self._second_began_s = 0.0
        self._num_small_frames = 0  # in the current second

    async def send(self, message: Any, *, text: bool | None = None) -> None:
        """Send a message.

        The client has `send_timeout_s` to read it, plus `send_timeout_s` for each MiB of the
        message (in proportion for parts of a MiB); after this time it is cut off.
        """
        self._bytes_being_sent += len(message)
        timeout_s = self._limits.send_timeout_s * (1 + len(message) / MIB)
        await self._abort_after(timeout_s, super().send(message, text=text))
        self._bytes_being_sent -= len(message)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the connection within `close_timeout_s`."""
        await self._abort_after(self._limits.close_timeout_s, super().close(code, reason))

    async def recv(self, decode: bool | None = None) -> Any:
        """Wait for the next message.

        The server only calls this when it has answered the previous message, so the bytes of that
        message no longer count as unanswered. (`data_received` adds bytes as they arrive.)
        """
        # The previous message is counted with the longest header that a frame can have. This may
        # be more than was received, but the number of unanswered bytes must not become negative.
        self.unanswered_bytes = max(0, self.unanswered_bytes - self._current_message_bytes)
        self._current_message_bytes = 0
        message = await super().recv(decode)
        self._free_message_frames()
        data = message if isinstance(message, bytes) else message.encode()
        self._current_message_bytes = FRAME_HEADER_BYTES + len(data)
        return message

    def _free_message_frames(self) -> None:
        """Free the data of the oldest message in `_unread_frames`.

        The parser keeps its last frame, so the frame's data would otherwise stay in memory until
        the client sends another frame.
        """
        while self._unread_frames:
            frame = self._unread_frames.popleft()
            frame.data = b""
            if frame.fin:
                return

    async def _abort_after(self, timeout_s: float, work: Coroutine[Any, Any, None]) -> None:
        """Wait for `work`; cut the client off if it takes longer than `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await work
        except TimeoutError:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the peers; cut off the oldest ones that have not sent a request, if too many."""
        super().connection_made(transport)
        self._peers[self] = None
        self._address = get_rate_limit_key(self.remote_address[0])
        opening = [peer for peer in self._peers if peer.state is State.CONNECTING]
        for peer in opening[: -self._limits.max_opening]:
            peer.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the peers."""
        self._peers.pop(self, None)
        self._budgets.forget(self, self.loop.time())
        super().connection_lost(exc)
        # The connection itself stays until Python collects its cycles of references.
        self.protocol.reader.buffer.clear()
        while self._unread_frames:
            self._free_message_frames()

    def data_received(self, data: bytes) -> None:
        """Read data that has arrived, and check the limits in bytes."""
        wait_s = self._budgets.spend(self, self._address, len(data), self.loop.time())
        self._pause_reading(wait_s)
        # The data is parsed in pieces, so that a flood of small frames is noticed before all of
        # them are parsed. Pieces double in size as long as they have no small frames.
        self.unanswered_bytes += len(data)
        unread = memoryview(data)
        piece_bytes = self._limits.small_frame_bytes
        while unread and not self.transport.is_closing():
            num_small_frames = self._num_small_frames
            super().data_received(bytes(unread[:piece_bytes]))
            unread = unread[piece_bytes:]
            had_small_frames = self._num_small_frames != num_small_frames
            piece_bytes = self._limits.small_frame_bytes if had_small_frames else 2 * piece_bytes

        max_buffered_bytes = self._limits.max_unread_bytes + self._bytes_being_sent
        if self.transport.get_write_buffer_size() > max_buffered_bytes:
            self.transport.abort()
        total_unanswered_bytes = sum(peer.unanswered_bytes for peer in self._peers)
        if total_unanswered_bytes > self._limits.max_unanswered_bytes:
            largest_sender = max(self._peers, key=lambda peer: peer.unanswered_bytes)
            largest_sender.transport.abort()

    def _pause_reading(self, wait_s: float) -> None:
        """Read nothing for a time.

        The websockets library pauses and resumes reading, too, for reasons of its own. If it
        resumes during this pause, at most one more piece of data is read, which begins a new pause.
        """
        if wait_s <= 0:
            return
        self.transport.pause_reading()
        if not self._is_reading_paused:
            self._is_reading_paused = True
            self.loop.call_later(wait_s, self._resume_reading)

    def _resume_reading(self) -> None:
        """Read again after a pause, unless the library has its own pause or the client has gone.

        A client that has gone is noticed here, because nothing is read during a pause.
        """
        self._is_reading_paused = False
        if self.transport.is_closing():
            return
        if has_client_gone(self.transport.get_extra_info("socket")):
            self.transport.abort()
            return
        if not self.recv_messages.paused:
            self.transport.resume_reading()

    def process_event(self, event: Any) -> None:
        """Count small frames, and cut the client off when there are too many within a second."""
        if isinstance(event, Frame) and event.opcode in DATA_OPCODES:
            self._unread_frames.append(event)
        if isinstance(event, Frame) and len(event.data) < self._limits.small_frame_bytes:
            if self.loop.time() - self._second_began_s > 1:
                self._second_began_s = self.loop.time()
                self._num_small_frames = 0
            self._num_small_frames += 1
            if self._num_small_frames > self._limits.max_small_frames_per_s:
                self.transport.abort()
        super().process_event(event)
