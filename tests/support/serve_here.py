"""Runs servers in this process or in another one, with small policies instead of networks.

The actions of these policies depend on the state in a simple way, so that a test can see from an
answer which observation the policy got.
"""

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

import numpy as np

from spear import embodiments
from spear.errors import SpearError
from spear.serve.connection import ConnectionLimits
from spear.serve.exchange import Recorder
from spear.serve.options import ServeOptions
from spear.serve.server import PolicyServer
from spear.serve.service import Service

START_TIMEOUT_S = 120
HTTP_TIMEOUT_S = 240

SPEAR_CLI_CODE = "import sys; from spear.cli import main; sys.exit(main())"
"""The Python code of the command `spear`."""


class HomingPolicy:
    """Moves a tenth of the way towards the origin per step, and records its requests.

    The prompt "explode" is refused by a `SpearError`. The prompts "bug" and "stop" raise other
    exceptions.

    Args:
        inference_s: seconds that an inference takes.
    """

    def __init__(self, inference_s: float = 0.0) -> None:
        self.inference_s = inference_s
        self.batch_sizes: list[int] = []
        self.seeds: list[int | None] = []

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        self.batch_sizes.append(len(observations))
        self.seeds += [observation.get("seed") for observation in observations]
        time.sleep(self.inference_s)
        prompts = [observation["prompt"] for observation in observations]
        if "explode" in prompts:
            raise SpearError("prompt: 'explode': say something else")
        if "bug" in prompts:
            raise ZeroDivisionError("a mistake of ours")
        if "stop" in prompts:
            raise StopIteration
        return [
            {"actions": make_homing_chunk(observation["observation/state"])}
            for observation in observations
        ]


class LargeAnswerPolicy(HomingPolicy):
    """A policy whose answers are 64 MiB long."""

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        one_action = make_homing_chunk(np.ones(8))[:1]  # [1, 8] float32, 32 bytes
        num_actions = 2**21  # 64 MiB / 32 bytes
        return [{"actions": np.repeat(one_action, num_actions, 0)} for _ in observations]


def make_homing_chunk(state: np.ndarray) -> np.ndarray:
    """Return the chunk [5, 8] that `HomingPolicy` predicts from a state [8].

    All five actions are equal: a tenth of the way to the origin, no rotation, an open gripper.
    """
    translation = -0.1 * np.float64(state[:3])
    no_rotation = (1, 0, 0, 0)
    is_open = 1
    action = [*translation, *no_rotation, is_open]
    return np.tile(action, (5, 1)).astype(np.float32)


@contextmanager
def run_python(code: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run code in another process, whose stdout can be read, and kill the process at the end.

    options: options of `Popen`.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, **options
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def run_server_process(
    code: str, limits: str = "ConnectionLimits()", **options: Any
) -> Iterator[tuple[subprocess.Popen[str], int, IO[str]]]:
    """Serve a policy in another process.

    Args:
        code: Python code that defines a class `Policy`.
        limits: Python code of the server's limits.
        options: options of `Popen`.

    Yields:
        The process, the server's port, and the process's stdout.
    """
    run_code = f"""
from serve_here import *
{code}
service = Service(Policy(), embodiments.load("generic"))
server = PolicyServer(service, ServeOptions("test", port=0), limits={limits})
asyncio.run(server.run(lambda server: print(server.port, flush=True)))
"""
    with run_python(run_code, cwd=Path(__file__).parent, **options) as process:
        port = int(process.stdout.readline())
        yield process, port, process.stdout


def http_get(server: PolicyServer, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """Send a GET request without following redirects; return status, headers and body."""
    with closing(HTTPConnection("127.0.0.1", server.port, timeout=HTTP_TIMEOUT_S)) as connection:
        connection.request("GET", path, headers=headers)
        reply = connection.getresponse()
        return reply.status, dict(reply.getheaders()), reply.read().decode()


@contextmanager
def run_server(
    policy: Any = None,
    robot: str = "generic",
    page: Any = None,
    limits: ConnectionLimits = ConnectionLimits(),  # noqa: B008, it is frozen
    recorder: Recorder | None = None,
    **options: Any,
) -> Iterator[PolicyServer]:
    """Run a server in a thread, on a free port of this machine, and stop it at the end.

    Args:
        policy: the policy; a `HomingPolicy` if None.
        robot: name of the embodiment.
        page: the page in the browser; None serves none.
        limits: limits of the connections.
        recorder: records what is observed and answered.
        options: options of `ServeOptions`.
    """
    control = options.get("control")
    service = Service(
        policy or HomingPolicy(),
        embodiments.load(robot),
        name="test",
        robot=robot,
        control=control,
    )
    serve_options = ServeOptions(policy="test", **{"port": 0, **options})
    is_ready = threading.Event()
    running: dict[str, Any] = {}

    async def main() -> None:
        server = PolicyServer(service, serve_options, page, limits, recorder)
        running["server"] = server
        running["loop"] = asyncio.get_running_loop()
        await server.run(lambda _: is_ready.set())

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert is_ready.wait(START_TIMEOUT_S), "the server did not start"
    try:
        yield running["server"]
    finally:
        if not running["loop"].is_closed():
            running["loop"].call_soon_threadsafe(running["server"].stop)  # as SIGTERM would
        thread.join(START_TIMEOUT_S)
        assert not thread.is_alive(), "the server did not stop"
