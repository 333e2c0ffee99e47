"""Half an hour of mixed clients: well-behaved, malformed, coming and going, dying in the middle. Memory stays
flat.

    python benchmarks/serve/soak.py [SECONDS] [POLICY] [--quick]

Prints the server's memory and open files over time. Fails when memory grew by more than 2 % in the second
half, when files stayed open, when a good client was not answered or when a malformed message was. --quick
runs for six seconds, in which memory still grows, and does not judge it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import tyro
from tyro.conf import Positional
from websockets.asyncio.client import connect

from process import Server, server
from spear import embodiments
from spear.cli import run_reporting_errors
from spear.serve import wire

GROWTH = 0.02
SPARE = 3
"""Files that a server may open for itself while it runs (our choice)."""
PATIENT: dict[str, Any] = {
    "compression": None,
    "max_size": None,
    "proxy": None,
    "open_timeout": 120,
}


async def good(url: str, until: float, counts: Counter[str]) -> None:
    """Asks at 5 Hz, as a robot that looks at every step; every answer must be actions."""
    robot = embodiments.load("generic")
    async with connect(url, **PATIENT) as connection:
        await connection.recv()
        while time.monotonic() < until:
            await connection.send(wire.encode(robot.example()))
            reply = await connection.recv()
            if isinstance(reply, str) or not np.isfinite(wire.decode(reply)["actions"]).all():
                raise SystemExit(f"a good observation was answered with {reply[:200]!r}")
            counts["answered"] += 1
            await asyncio.sleep(0.2)


async def bad(url: str, until: float, counts: Counter[str], seed: int) -> None:
    """Comes, sends messages that were cut, and leaves with or without a word, or before its answer is
    there."""
    rng = np.random.default_rng(seed)
    whole = wire.encode(embodiments.load("generic").example())
    while time.monotonic() < until:
        async with connect(url, **PATIENT) as connection:
            await connection.recv()
            for _ in range(int(rng.integers(1, 5))):
                await connection.send(whole[: rng.integers(len(whole))])
                if not isinstance(await connection.recv(), str):
                    raise SystemExit("a message that was cut was answered with actions")
                counts["refused"] += 1
            if rng.random() < 0.5:
                await connection.send(whole)
                connection.transport.abort()
                counts["died"] += 1
        await asyncio.sleep(0.5)


async def load(served: Server, seconds: float) -> list[float]:
    """Runs the clients; the server's memory, MiB, sampled 60 times."""
    until, counts, sizes = time.monotonic() + seconds, Counter[str](), []
    async with asyncio.TaskGroup() as clients:
        for seed in range(4):
            clients.create_task(bad(served.url, until, counts, seed))
        for _ in range(8):
            clients.create_task(good(served.url, until, counts))
        while time.monotonic() < until:
            await asyncio.sleep(seconds / 60)
            sizes.append(served.memory())
            print(
                f"{max(0.0, until - time.monotonic()):6.0f} s left: {sizes[-1]:7.1f} MiB, "
                f"{served.files()} files, "
                f"{dict(counts)}",
                flush=True,
            )
    return sizes


def main(
    seconds: Positional[float] = 1800.0, policy: Positional[str] = "nano", quick: bool = False
) -> None:
    """Starts a server, loads it, judges its memory and its open files."""
    seconds = min(seconds, 6.0) if quick else seconds
    with server(policy) as served:
        files = served.files()
        sizes = asyncio.run(load(served, seconds))
        time.sleep(1)  # the last connections are closed by then
        left = served.files()
    half = len(sizes) // 2
    growth = max(sizes[half:]) / max(sizes[: half + 1]) - 1
    slope = (
        3600
        / seconds
        * len(sizes)
        * np.polynomial.Polynomial.fit(range(half), sizes[-half:], 1).convert().coef[1]
    )
    print(
        f"memory: {sizes[0]:.1f} … {sizes[-1]:.1f} MiB; second half: {growth:+.2%} (goal <= {GROWTH:.0%}), "
        f"{slope:+.1f} MiB/h"
    )
    print(f"open files: {files} before the first client, {left} after the last")
    if not quick and (growth > GROWTH or left > files + SPARE):
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
