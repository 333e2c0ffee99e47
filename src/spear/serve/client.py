"""A served policy as a `spear.types.Policy`, so that code for local policies can use a remote one.

This client is for programs that have this package. A robot's own computer needs only openpi-client,
which pins numpy < 2 and therefore needs its own Python environment.
"""

import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection, connect

from spear.errors import SpearError, summarize_error, to_sentence
from spear.serve import wire

BUSY_PAUSE_S = 0.05  # pause before a busy server is asked again
MAX_BUSY_S = 30.0  # a server that is busy for longer is an error
ANSWER_TIMEOUT_S = 600.0  # a server that does not answer for longer counts as gone
GREETING_TIMEOUT_S = 10.0  # longest time until the server's first message
MAX_QUOTED_CHARS = 80  # longest part of an answer that an error quotes


class RemotePolicy:
    """A policy that a server serves.

    The observations of a batch are sent on as many connections at once, so that the server can
    answer them together. Several threads may share a `RemotePolicy`; their calls wait for each
    other.

    Args:
        url: the server's address, "ws://host:port".
        token: the server's --token.

    Attributes:
        metadata: what the server says about itself, for example what an action means, and how many
            rows of actions to execute per second (see `spear.serve.service.Service`).
        image_sizes: view → (width, height), the cameras that the policy takes.
        committed: the largest number of committed actions that the policy takes; 0 for none.

    Raises:
        SpearError: there is no policy server at that address, or it refuses the token.

    Example:
        >>> policy = RemotePolicy("ws://localhost:8000")  # doctest: +SKIP
        >>> policy.infer(observation)["actions"].shape  # doctest: +SKIP
        (5, 8)
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url
        self._token = token
        self._greeting = b""
        self._connections: list[ClientConnection] = []
        self._lock = threading.Lock()  # one call at a time
        self._ensure_connections(1)

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Infer the actions for one observation.

        Args:
            observation: a dict with the keys of the embodiment that is served.

        Returns:
            {"actions": …, "server_timing": …, "policy_timing": …}. The actions are [H, 8] for the
            embodiment "generic", and rows of commands for other embodiments.

        Raises:
            SpearError: the server rejects the observation, stays busy, is gone, or serves another
                policy than before.
        """
        return self.infer_batch([observation])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Infer the actions for several observations, which are sent at once.

        Args:
            observations: dicts with the keys of the embodiment that is served.

        Returns:
            What `infer` returns for each observation, in order.

        Raises:
            SpearError: as `infer`.
        """
        messages = [wire.encode(observation) for observation in observations]
        with self._lock:
            replies = self._exchange(messages)
        for reply in replies:
            if isinstance(reply, str):
                raise SpearError(reply)

        results = [wire.decode(reply) for reply in replies if isinstance(reply, bytes)]
        for result in results:
            if "actions" not in result:
                keys = ", ".join(result)[:MAX_QUOTED_CHARS]
                raise SpearError(
                    f"{self.url} answers {keys!r} without actions, so it is no policy server. "
                    "Start one with `spear serve`."
                )
        return results

    def close(self) -> None:
        """Close all connections; the next call connects again."""
        connections = self._connections
        self._connections = []
        for connection in connections:
            connection.close()

    def _exchange(self, messages: Sequence[bytes]) -> list[bytes | str]:
        """Send messages, one per connection, and receive their replies."""
        deadline = time.monotonic() + MAX_BUSY_S
        try:
            self._ensure_connections(len(messages))
            connections = self._connections[: len(messages)]
            for connection, message in zip(connections, messages, strict=True):
                connection.send(message)
            # All replies are read, even after an error, so that none is left for the next call.
            replies = [connection.recv(timeout=ANSWER_TIMEOUT_S) for connection in connections]
            for index, connection in enumerate(connections):
                while _is_busy(replies[index]) and time.monotonic() <= deadline:
                    time.sleep(BUSY_PAUSE_S)
                    connection.send(messages[index])
                    replies[index] = connection.recv(timeout=ANSWER_TIMEOUT_S)
            return replies
        except (ConnectionClosed, TimeoutError) as error:
            self.close()
            raise self._make_lost_connection_error(error) from error
        except BaseException:
            # Also after Ctrl-C. On an open connection the next call would take a reply that has not
            # been read yet for the reply to its own message.
            self.close()
            raise

    def _make_lost_connection_error(self, error: Exception) -> SpearError:
        """Make the error for a connection that was lost."""
        close_frame = getattr(error, "rcvd", None)
        if close_frame and close_frame.code == CloseCode.MESSAGE_TOO_BIG:
            limit = _format_size_limit(close_frame.reason)
            return SpearError(
                f"the observation is larger than the server takes{limit}."
                " Send smaller images, or start the server with a larger --max-message-mib."
            )
        return SpearError(f"the server {self.url} has gone ({error}). Start it again.")

    def _ensure_connections(self, num_connections: int) -> None:
        """Connect until there are that many connections."""
        while len(self._connections) < num_connections:
            try:
                greeting = self._add_connection_and_read_greeting()
            except InvalidStatus as error:
                reason = (error.response.body or b"").decode(errors="replace").strip()
                status = error.response.status_code
                raise SpearError(
                    f"{self.url} refuses the connection ({status}). {to_sentence(reason)}"
                ) from error
            except (
                OSError,
                WebSocketException,
                SpearError,
                ValueError,
                TypeError,
                AttributeError,
            ) as error:  # a server of another kind may send anything as its greeting
                self.close()  # the server may have accepted the connection before the error
                raise SpearError(
                    f"{self.url} is no policy server ({summarize_error(error)}). "
                    "Start one with `spear serve`."
                ) from error
            self._record_or_check_greeting(greeting)

    def _add_connection_and_read_greeting(self) -> bytes:
        """Open one more connection, and set the policy's properties from the server's greeting.

        Returns:
            The greeting as it was received.
        """
        headers = {"Authorization": f"Api-Key {self._token}"} if self._token else None
        connection = connect(
            self.url,
            compression=None,
            max_size=None,
            additional_headers=headers,
            proxy=None,
        ).__enter__()  # websockets 17 requires a `with` block, or this call
        self._connections.append(connection)
        # The greeting of a server of another kind may be a text, which `wire.decode` refuses.
        message: Any = connection.recv(timeout=GREETING_TIMEOUT_S)
        greeting: bytes = message
        self.metadata = wire.decode(greeting)
        self.image_sizes = {
            view: (width, height)
            for view, (width, height) in self.metadata.get("image_sizes", {}).items()
        }
        self.committed = int(self.metadata.get("committed", 0))  # actions at most
        return greeting

    def _record_or_check_greeting(self, greeting: bytes) -> None:
        """Remember the server's first greeting, and raise `SpearError` if a later one differs."""
        if not self._greeting:
            self._greeting = greeting
        if greeting != self._greeting:
            self.close()
            raise SpearError(
                f"{self.url} serves another policy, robot or control than before. Make a new "
                "`RemotePolicy` for it."
            )


def _format_size_limit(close_reason: str) -> str:
    """Return the size limit that a server's reason to close names, in parentheses; else "".

    >>> _format_size_limit("frame with 400000 bytes exceeds limit of 300000 bytes")
    ' (at most 300000 bytes)'
    """
    limit = re.search(r"limit of (\d+) bytes", close_reason)
    return f" (at most {limit[1]} bytes)" if limit else ""


def _is_busy(reply: bytes | str) -> bool:
    """Return whether a reply says that the server's queue was full."""
    return isinstance(reply, str) and reply.startswith("busy: ")
