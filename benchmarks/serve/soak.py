"""Half an hour of mixed clients: well-behaved, malformed, coming and going, dying in the middle.

    python benchmarks/serve/soak.py [SECONDS] [POLICY] [--quick]

Prints the server's memory and open files over time. Fails if memory grew by more than 2 % in the
second half, if files stayed open, if a good client was not answered or if a malformed message was.
--quick runs for six seconds, in which memory still grows, and does not judge it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import tyro
from tyro.conf import Positional
from websockets.asyncio.client import connect

from process import ServerProcess, run_server
from spear import embodiments
from spear.cli import run_reporting_errors
from spear.serve import wire

MAX_GROWTH = 0.02  # of memory in the second half
MAX_NEW_FILES = 3  # that a server may open for itself while it runs
NUM_SAMPLES = 60
NUM_GOOD_CLIENTS = 8
NUM_BAD_CLIENTS = 4
CONTROL_STEP_S = 0.2
CLOSING_S = 1.0  # after which the last connections are closed
CONNECT_OPTIONS: dict[str, Any] = {
    "compression": None,
    "max_size": None,
    "proxy": None,
    "open_timeout": 120,
}


async def run_good_client(url: str, deadline: float, counts: Counter[str]) -> None:
    """Ask at 5 Hz, as a robot that replans at every step; every answer must be actions."""
    robot = embodiments.load("generic")
    async with connect(url, **CONNECT_OPTIONS) as connection:
        await connection.recv()
        while time.monotonic() < deadline:
            await connection.send(wire.encode(robot.example()))
            reply = await connection.recv()
            if isinstance(reply, str) or not np.isfinite(wire.decode(reply)["actions"]).all():
                raise SystemExit(f"a good observation was answered with {reply[:200]!r}")
            counts["answered"] += 1
            await asyncio.sleep(CONTROL_STEP_S)


async def run_bad_client(url: str, deadline: float, counts: Counter[str], seed: int) -> None:
    """Come, send messages that were cut off, and leave.

    Half of the times the client leaves without closing the connection, before its answer has come.
    """
    rng = np.random.default_rng(seed)
    message = wire.encode(embodiments.load("generic").example())
    while time.monotonic() < deadline:
        async with connect(url, **CONNECT_OPTIONS) as connection:
            await connection.recv()
            for _ in range(int(rng.integers(1, 5))):
                await connection.send(message[: rng.integers(len(message))])
                if not isinstance(await connection.recv(), str):
                    raise SystemExit("a message that was cut off was answered with actions")
                counts["refused"] += 1
            if rng.random() < 0.5:
                await connection.send(message)
                connection.transport.abort()
                counts["died"] += 1
        await asyncio.sleep(0.5)


async def load_server(server: ServerProcess, seconds: float) -> list[float]:
    """Run the clients; returns samples of the server's memory (MiB)."""
    deadline = time.monotonic() + seconds
    counts: Counter[str] = Counter()
    memory_mib = []
    async with asyncio.TaskGroup() as clients:
        for seed in range(NUM_BAD_CLIENTS):
            clients.create_task(run_bad_client(server.url, deadline, counts, seed))
        for _ in range(NUM_GOOD_CLIENTS):
            clients.create_task(run_good_client(server.url, deadline, counts))
        while time.monotonic() < deadline:
            await asyncio.sleep(seconds / NUM_SAMPLES)
            memory_mib.append(server.measure_memory_mib())
            seconds_left = max(0.0, deadline - time.monotonic())
            print(
                f"{seconds_left:6.0f} s left: {memory_mib[-1]:7.1f} MiB, "
                f"{server.count_open_files()} files, {dict(counts)}",
                flush=True,
            )
    return memory_mib


def fit_slope_mib_per_h(memory_mib: Sequence[float], seconds: float) -> float:
    """Fit a line to samples that were taken in so many seconds."""
    line = np.polynomial.Polynomial.fit(range(len(memory_mib)), memory_mib, 1).convert()
    samples_per_h = 3600 * len(memory_mib) / seconds
    return float(line.coef[1] * samples_per_h)


def main(
    seconds: Positional[float] = 1800.0, policy: Positional[str] = "nano", quick: bool = False
) -> None:
    """Start a server, load it, and judge its memory and its open files."""
    if quick:
        seconds = min(seconds, 6.0)
    with run_server(policy) as server:
        num_files_before = server.count_open_files()
        memory_mib = asyncio.run(load_server(server, seconds))
        time.sleep(CLOSING_S)
        num_files_after = server.count_open_files()

    half = len(memory_mib) // 2
    growth = max(memory_mib[half:]) / max(memory_mib[: half + 1]) - 1
    slope = fit_slope_mib_per_h(memory_mib[-half:], seconds / 2)
    print(
        f"memory: {memory_mib[0]:.1f} … {memory_mib[-1]:.1f} MiB; second half: {growth:+.2%} "
        f"(goal <= {MAX_GROWTH:.0%}), {slope:+.1f} MiB/h"
    )
    print(
        f"open files: {num_files_before} before the first client, {num_files_after} after the last"
    )
    has_open_files = num_files_after > num_files_before + MAX_NEW_FILES
    if not quick and (growth > MAX_GROWTH or has_open_files):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
