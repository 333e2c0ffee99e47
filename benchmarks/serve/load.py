"""The server under load: round trips and throughput for 1 … 64 clients on this machine, overhead,
batching.

Observations have a 280 x 210 and a 112 x 112 image. Overhead is the round trip minus inference as
the server measured it: messages, sockets, queue and conversions; the goal is a p50 of at most 2 ms
with one client. Batching is the throughput of 16 clients with batches of up to 16 against batches
of 1; the goal is at least 3 (nano, two cores).

    python benchmarks/serve/load.py [POLICY] [SECONDS] [OUT.json] [--quick]

--quick tries the script in seconds; its numbers say little.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from process import run_server
from spear.cli import run_reporting_errors

CLIENT_COUNTS = (1, 2, 4, 8, 16, 32, 64)
NUM_BATCHED_CLIENTS = 16
QUICK_CLIENT_COUNTS = (1, 4)
NUM_QUICK_BATCHED_CLIENTS = 4
CLIENT_SCRIPT = Path(__file__).with_name("client.py")


def measure_clients(url: str, num_clients: int, seconds: float) -> dict[str, Any]:
    """Measure so many clients, and print the result as a row of the table."""
    command = [sys.executable, str(CLIENT_SCRIPT), url, str(num_clients), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        error_lines = done.stderr.splitlines() or ["no error message"]
        raise SystemExit(f"{num_clients} clients: {error_lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    print(
        f"| {num_clients} | {result['p50']:.1f} | {result['p99']:.1f} | "
        f"{result['per_second']:.1f} | {result['overhead_p50']:.2f} | {result['requests']} |",
        flush=True,
    )
    return result


def main(
    policy: Positional[str] = "nano",
    seconds: Positional[float] = 15.0,
    out: Positional[str | None] = None,
    quick: bool = False,
) -> None:
    """Measure, print a table in Markdown, and save JSON if asked to."""
    client_counts = QUICK_CLIENT_COUNTS if quick else CLIENT_COUNTS
    num_batched_clients = NUM_QUICK_BATCHED_CLIENTS if quick else NUM_BATCHED_CLIENTS
    if quick:
        seconds = min(seconds, 1.0)

    print("| clients | p50 (ms) | p99 (ms) | requests/s | overhead p50 (ms) | requests |")
    print("|---|---|---|---|---|---|", flush=True)
    rows = []
    with run_server(policy, "--max-queue-size", "64") as server:
        for num_clients in client_counts:
            rows.append(measure_clients(server.url, num_clients, seconds))
    print("\nThe same without batching (--max-batch-size 1):\n")
    with run_server(policy, "--max-batch-size", "1") as server:
        unbatched = measure_clients(server.url, num_batched_clients, seconds)

    [batched] = [row for row in rows if row["clients"] == num_batched_clients]
    ratio = batched["per_second"] / unbatched["per_second"]
    print(f"\nserver overhead p50, one client: {rows[0]['overhead_p50']:.2f} ms (goal <= 2)")
    print(
        f"throughput of {num_batched_clients} clients, batches of up to 16 against 1: {ratio:.2f} "
        "(goal at 16 clients >= 3)"
    )
    if out:
        result = {"rows": rows, "without_batching": unbatched, "batching": ratio}
        Path(out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
