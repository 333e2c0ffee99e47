"""Clients of benchmarks/serve/load.py, in a process of their own: N of them ask until the time is over.

    python benchmarks/serve/client.py URL CLIENTS SECONDS

The environment may have a TOKEN. Prints JSON: round trips and server times, milliseconds, and requests per
second.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time

import numpy as np
from websockets.asyncio.client import connect

from spear import embodiments
from spear.serve import wire

TOKEN = os.environ.get("TOKEN", "")


async def client(url: str, until: float, round_trips: list[float], overheads: list[float]) -> None:
    """One client, which asks for its next chunk as soon as it has one."""
    message = wire.encode(embodiments.load("generic").example())
    headers = {"Authorization": f"Api-Key {TOKEN}"}
    async with connect(
        url, compression=None, max_size=None, proxy=None, additional_headers=headers
    ) as connection:
        await connection.recv()
        while time.perf_counter() < until:
            started = time.perf_counter()
            await connection.send(message)
            reply = await connection.recv()
            took = 1000 * (time.perf_counter() - started)
            if isinstance(reply, str):
                raise SystemExit(reply)
            round_trips.append(took)
            overheads.append(took - wire.decode(reply)["policy_timing"]["infer_ms"])


async def main(url: str, clients: int, seconds: float) -> None:
    """All clients at once; the first fifth of the time warms up."""
    warm: tuple[list[float], list[float]] = ([], [])
    await asyncio.gather(
        *(client(url, time.perf_counter() + seconds / 5, *warm) for _ in range(clients))
    )
    round_trips: list[float] = []
    overheads: list[float] = []
    started = time.perf_counter()
    await asyncio.gather(
        *(client(url, started + seconds, round_trips, overheads) for _ in range(clients))
    )
    result = {
        "clients": clients,
        "requests": len(round_trips),
        "p50": float(np.percentile(round_trips, 50)),
        "p99": float(np.percentile(round_trips, 99)),
        "overhead_p50": float(np.percentile(overheads, 50)),
        "per_second": len(round_trips) / (time.perf_counter() - started),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
