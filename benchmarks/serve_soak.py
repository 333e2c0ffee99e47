"""Half an hour of mixed clients: well-behaved, malformed, coming and going, dying in the middle. Memory stays flat.

    python benchmarks/serve_soak.py [SECONDS] [CHECKPOINT] [--quick]

Prints the server's memory over time, and fails when its second half grew by more than 2 % or an answer went missing.
--quick runs for six seconds, in which memory still grows, and does not judge it.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import numpy as np
import tyro
from tyro.conf import Positional
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from serve_process import Server, server
from spear import embodiments
from spear.serve import wire

GROWTH = 0.02


async def good(url: str, until: float, counts: Counter[str]) -> None:
    """Asks at 5 Hz, as a robot that looks at every step."""
    robot = embodiments.load("generic")
    async with connect(url, compression=None, max_size=None, proxy=None) as connection:
        await connection.recv()
        while time.monotonic() < until:
            await connection.send(wire.encode(robot.example()))
            reply = await connection.recv()
            counts["answered" if isinstance(reply, bytes) else "busy"] += 1
            await asyncio.sleep(0.2)


async def bad(url: str, until: float, counts: Counter[str], seed: int) -> None:
    """Comes, sends garbage, and leaves with or without a word."""
    rng = np.random.default_rng(seed)
    whole = wire.encode(embodiments.load("generic").example())
    while time.monotonic() < until:
        try:
            async with connect(url, compression=None, max_size=None, proxy=None) as connection:
                await connection.recv()
                for _ in range(int(rng.integers(1, 5))):
                    await connection.send(whole[: rng.integers(len(whole))])
                    await connection.recv()
                    counts["refused"] += 1
                if rng.random() < 0.5:
                    await connection.send(whole)
                    connection.transport.abort()
                    counts["died"] += 1
        except ConnectionClosed:
            pass
        await asyncio.sleep(0.5)


async def load(served: Server, seconds: float) -> list[float]:
    """Runs the clients; the server's memory, MiB, sampled 60 times."""
    until, counts, sizes = time.monotonic() + seconds, Counter[str](), []
    clients = [asyncio.create_task(good(served.url, until, counts)) for _ in range(8)]
    clients += [asyncio.create_task(bad(served.url, until, counts, seed)) for seed in range(4)]
    while time.monotonic() < until:
        await asyncio.sleep(seconds / 60)
        sizes.append(served.memory())
        print(f"{until - time.monotonic():6.0f} s left: {sizes[-1]:7.1f} MiB, {dict(counts)}", flush=True)
    await asyncio.gather(*clients)
    return sizes


def main(
    seconds: Positional[float] = 1800.0, checkpoint: Positional[str] = "nano", quick: bool = False
) -> None:
    """Starts a server, loads it, judges its memory."""
    seconds = min(seconds, 6.0) if quick else seconds
    with server(checkpoint) as served:
        sizes = asyncio.run(load(served, seconds))
    half = len(sizes) // 2
    growth = max(sizes[half:]) / max(sizes[: half + 1]) - 1
    print(
        f"memory: {sizes[0]:.1f} … {sizes[-1]:.1f} MiB; second half grew by {growth:.2%} (goal <= {GROWTH:.0%})"
    )
    if growth > GROWTH and not quick:
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)
