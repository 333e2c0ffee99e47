"""The server under load: round trips and throughput for 1 … 64 clients on this machine, its overhead,
batching.

Observations have a 280 x 210 and a 112 x 112 image. Overhead is round trip minus inference as the server
measured it: messages, sockets, queue and conversions; goal p50 <= 2 ms with one client. Batching is the
throughput of 16 clients with batches of up to 16 against batches of 1; goal >= 3 (nano, two cores).

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

from process import server
from spear.cli import run_reporting_errors

CLIENTS = (1, 2, 4, 8, 16, 32, 64)


def ask(url: str, clients: int, seconds: float) -> dict[str, Any]:
    """What so many clients measure, printed as a row of the table."""
    script = Path(__file__).with_name("client.py")
    command = [sys.executable, str(script), url, str(clients), str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{clients} clients: {(done.stderr.splitlines() or ['no word'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout)
    numbers = [f"{result[key]:.1f}" for key in ("p50", "p99", "per_second")]
    print(
        f"| {clients} | {' | '.join(numbers)} | {result['overhead_p50']:.2f} | {result['requests']} |",
        flush=True,
    )
    return result


def main(
    policy: Positional[str] = "nano",
    seconds: Positional[float] = 15.0,
    out: Positional[str | None] = None,
    quick: bool = False,
) -> None:
    """Measures and prints a table in Markdown; saves JSON when asked to."""
    counts, many = ((1, 4), 4) if quick else (CLIENTS, 16)
    seconds = min(seconds, 1.0) if quick else seconds
    print("| clients | p50 (ms) | p99 (ms) | requests/s | overhead p50 (ms) | requests |")
    print("|---|---|---|---|---|---|", flush=True)
    with server(policy, "--queue", "64") as served:
        rows = [ask(served.url, clients, seconds) for clients in counts]
    print("\nThe same without batching (--max-batch 1):\n")
    with server(policy, "--max-batch", "1") as served:
        single = ask(served.url, many, seconds)
    together = next(row for row in rows if row["clients"] == many)
    ratio = together["per_second"] / single["per_second"]
    print(f"\nserver overhead p50, one client: {rows[0]['overhead_p50']:.2f} ms (goal <= 2)")
    print(
        f"throughput of {many} clients, batches of up to 16 against 1: {ratio:.2f} (goal at 16 clients >= 3)"
    )
    if out:
        Path(out).write_text(
            json.dumps({"rows": rows, "without_batching": single, "batching": ratio}, indent=1)
        )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
