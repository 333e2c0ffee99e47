"""A served policy as a `spear.types.Policy`, so that whatever runs a policy here runs one elsewhere.

This is for programs that have this package. A robot's own computer needs only openpi-client, which pins
numpy < 2 and so lives in an environment of its own.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection, connect

from spear.errors import SpearError, summarize_error
from spear.serve import wire

PAUSE, PATIENCE, STUCK = 0.05, 30.0, 600.0
"""Seconds before a busy server is asked again, for how long, and until a silent one has gone (our choice)."""


class RemotePolicy:
    """A policy at "ws://host:port".

    The observations of a batch are sent on as many connections at once, so that the server can answer them
    together; calls from several threads wait for each other. `token` is the server's --token. Raises
    `SpearError` with its words for a bad observation, when it stays busy, is gone, or has become another.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url, self._token, self._greeting = url, token, b""
        self._connections: list[ClientConnection] = []
        self._one_call = threading.Lock()
        self._open(1)

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """One observation → {"actions": …, timings}."""
        return self.infer_batch([observation])[0]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Several observations, one result each, in order."""
        messages = [wire.encode(o) for o in observations]
        with self._one_call:
            return self._exchange(messages)

    def _exchange(self, messages: Sequence[bytes]) -> list[dict[str, Any]]:
        deadline = time.monotonic() + PATIENCE
        try:
            self._open(len(messages))
            sent = list(zip(self._connections, messages, strict=False))
            for connection, message in sent:
                connection.send(message)
            # every answer is read, so that a refused one leaves nothing behind for the next call
            replies = [connection.recv(timeout=STUCK) for connection, _ in sent]
            for index, (connection, message) in enumerate(sent):
                while isinstance(said := replies[index], str) and said.startswith("busy: "):
                    if time.monotonic() > deadline:
                        break
                    time.sleep(PAUSE)
                    connection.send(message)
                    replies[index] = connection.recv(timeout=STUCK)
        except (
            BaseException
        ) as error:  # Ctrl-C too: what is unread would be taken for the next call's answer
            self.close()
            if not isinstance(error, ConnectionClosed | TimeoutError):
                raise
            if (last := getattr(error, "rcvd", None)) and last.code == CloseCode.MESSAGE_TOO_BIG:
                raise SpearError(
                    "observation: larger than the server takes: send smaller ones"
                ) from error
            raise SpearError(
                f"{self.url}: the server has gone ({error}): start it again"
            ) from error
        if refused := [reply for reply in replies if isinstance(reply, str)]:
            raise SpearError(refused[0])
        results = [wire.decode(reply) for reply in replies if isinstance(reply, bytes)]
        if others := [", ".join(result)[:80] for result in results if "actions" not in result]:
            raise SpearError(f"{self.url}: answers {others[0]!r} without actions: no policy server")
        return results

    def close(self) -> None:
        """Hang up; the next call connects again."""
        left, self._connections = self._connections, []
        for connection in left:
            connection.close()

    def _open(self, count: int) -> None:
        headers = {"Authorization": f"Api-Key {self._token}"} if self._token else None
        while len(self._connections) < count:
            try:
                connection = connect(
                    self.url,
                    compression=None,
                    max_size=None,
                    additional_headers=headers,
                    proxy=None,
                ).__enter__()  # websockets 17 asks for that
                self._connections.append(connection)
                greeting: Any = connection.recv(timeout=10)
                self.metadata = wire.decode(greeting)
                self.image_sizes = {
                    v: (w, h) for v, (w, h) in self.metadata.get("image_sizes", {}).items()
                }
                self.committed = int(
                    self.metadata.get("committed", 0)
                )  # see `Spear1Policy.committed`
            except InvalidStatus as error:
                said = (error.response.body or b"").decode(errors="replace").strip()
                raise SpearError(
                    f"{self.url}: refused with {error.response.status_code}: {said}"
                ) from error
            except (
                OSError,
                WebSocketException,
                SpearError,
                ValueError,
                TypeError,
                AttributeError,
            ) as error:
                self.close()  # also of one that greets as no policy server does
                raise SpearError(
                    f"{self.url}: no policy server ({summarize_error(error)}): start one"
                ) from error
            self._greeting = self._greeting or greeting
            if greeting != self._greeting:
                self.close()
                raise SpearError(
                    f"{self.url}: serves others than before: make a new `RemotePolicy` for them"
                )
