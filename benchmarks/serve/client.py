"""Clients of load.py and hostile.py, in a process of their own, which ask until the time is over.

    python benchmarks/serve/client.py URL CLIENTS SECONDS

The environment may have a TOKEN. Prints JSON: round trips and the server's overhead in
milliseconds, and requests per second.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass, field

import numpy as np
from websockets.asyncio.client import connect

from spear import embodiments
from spear.serve import wire

TOKEN = os.environ.get("TOKEN", "")
WARM_UP_SHARE = 0.2  # of the measured time


@dataclass
class Timings:
    """What the clients measured, in milliseconds per request."""

    round_trips_ms: list[float] = field(default_factory=list)
    overheads_ms: list[float] = field(default_factory=list)


async def ask_until(url: str, deadline: float, timings: Timings) -> None:
    """Ask for the next chunk as soon as the last one has come, as one client."""
    message = wire.encode(embodiments.load("generic").example())
    headers = {"Authorization": f"Api-Key {TOKEN}"}
    async with connect(
        url, compression=None, max_size=None, proxy=None, additional_headers=headers
    ) as connection:
        await connection.recv()
        while time.perf_counter() < deadline:
            started = time.perf_counter()
            await connection.send(message)
            reply = await connection.recv()
            round_trip_ms = 1000 * (time.perf_counter() - started)
            if isinstance(reply, str):
                raise SystemExit(reply)
            inference_ms = wire.decode(reply)["policy_timing"]["infer_ms"]
            timings.round_trips_ms.append(round_trip_ms)
            timings.overheads_ms.append(round_trip_ms - inference_ms)


async def ask_together(url: str, num_clients: int, seconds: float) -> Timings:
    """Let several clients ask at once for so long."""
    timings = Timings()
    deadline = time.perf_counter() + seconds
    async with asyncio.TaskGroup() as clients:
        for _ in range(num_clients):
            clients.create_task(ask_until(url, deadline, timings))
    return timings


async def main(url: str, num_clients: int, seconds: float) -> None:
    """Warm up, measure, and print the result."""
    await ask_together(url, num_clients, WARM_UP_SHARE * seconds)

    started = time.perf_counter()
    timings = await ask_together(url, num_clients, seconds)
    elapsed_s = time.perf_counter() - started

    num_requests = len(timings.round_trips_ms)
    result = {
        "clients": num_clients,
        "requests": num_requests,
        "p50": float(np.percentile(timings.round_trips_ms, 50)),
        "p99": float(np.percentile(timings.round_trips_ms, 99)),
        "overhead_p50": float(np.percentile(timings.overheads_ms, 50)),
        "per_second": num_requests / elapsed_s,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    _, url_argument, clients_argument, seconds_argument = sys.argv
    asyncio.run(main(url_argument, int(clients_argument), float(seconds_argument)))
