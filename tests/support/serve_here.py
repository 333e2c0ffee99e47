"""A server in this process, and a small policy whose answers show what it was asked."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, Any
from unittest.mock import patch

import numpy as np

from spear import embodiments
from spear.errors import SpearError
from spear.serve.options import ServeOptions
from spear.serve.server import PolicyServer
from spear.serve.service import Service


class Homing:
    """Moves a tenth of the way towards the origin per step; refuses to "explode". Notes what it is asked."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.batches: list[int] = []
        self.seeds: list[int] = []

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        self.batches.append(len(observations))
        self.seeds += [o.get("seed") for o in observations]
        time.sleep(self.seconds)
        if any(o["prompt"] == "explode" for o in observations):
            raise SpearError("prompt: 'explode': say something else")
        if any(o["prompt"] == "bug" for o in observations):
            raise ZeroDivisionError("a mistake of ours")
        if any(o["prompt"] == "stop" for o in observations):
            raise StopIteration
        return [{"actions": homing(o["observation/state"])} for o in observations]


class Loud(Homing):
    """Whose answers are 64 MiB long."""

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{"actions": np.repeat(homing(np.ones(8))[:1], 2**21, 0)} for _ in observations]


def homing(state: np.ndarray) -> np.ndarray:
    return np.tile([*(-0.1 * np.float64(state[:3])), 1, 0, 0, 0, 1], (5, 1)).astype(np.float32)


SPEAR = "import sys; from spear.cli import main; sys.exit(main())"
"""The code of `spear`, whose words follow it."""


@contextmanager
def started(code: str, *words: str, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """Code in a process of its own, whose output can be read."""
    running = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True, **how
    )
    try:
        yield running
    finally:
        running.kill()
        running.wait()


@contextmanager
def process(code: str) -> Iterator[tuple[subprocess.Popen[str], int, IO[str]]]:
    """A server of the class `Policy` of this code in a process of its own; its port; what it says."""
    made = (
        "PolicyServer(Service(Policy(), embodiments.load('generic')), ServeOptions('test', port=0))"
    )
    run = f"asyncio.run({made}.run(lambda made: print(made.port, flush=True)))"
    code = "\n".join(["from serve_here import *; from spear.serve import server", code, run])
    with started(code, cwd=Path(__file__).parent) as running:
        yield running, int(running.stdout.readline()), running.stdout


def get(server: PolicyServer, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body, redirects as they are."""
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=240)) as connection:
        connection.request("GET", path, headers=headers)
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read().decode()


@contextmanager
def serving(
    policy: Any = None,
    robot: str = "generic",
    page: Any = None,
    bounds: Mapping[str, float] = {},
    **how: Any,
) -> Iterator[PolicyServer]:
    """A server on a free port of this machine, stopped at the end. bounds: other constants of its module."""
    service = Service(
        policy or Homing(), embodiments.load(robot), "test", robot, how.get("control")
    )
    started = threading.Event()
    held: dict[str, Any] = {}

    async def main() -> None:
        server = PolicyServer(service, ServeOptions("test", **{"port": 0, **how}), page)
        held.update(server=server, loop=asyncio.get_running_loop())
        await server.run(lambda _: started.set())

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    with patch.dict("spear.serve.server.__dict__", bounds):
        thread.start()
        assert started.wait(120), "the server did not start"
        try:
            yield held["server"]
        finally:
            if not held["loop"].is_closed():
                held["loop"].call_soon_threadsafe(held["server"].stop)  # as SIGTERM would
            thread.join(120)
            assert not thread.is_alive(), "the server did not stop"
