"""`spear serve` in a process of its own, for the benchmarks of the server."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVE_CODE = "import sys; from spear.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"
KIB_PER_MIB = 1024


@dataclass(frozen=True)
class ServerProcess:
    """Where a server listens, and its process."""

    url: str
    pid: int

    def measure_memory_mib(self) -> float:
        """Measure the memory that is the server's own (Linux).

        Pages of files do not count, because the system drops and reads them again.
        """
        status = Path(f"/proc/{self.pid}/status").read_text()
        [anonymous_kib] = re.findall(r"RssAnon:\s+(\d+) kB", status)
        return int(anonymous_kib) / KIB_PER_MIB

    def count_open_files(self) -> int:
        """Count the files and sockets that the server has open (Linux)."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@contextmanager
def run_server(policy: str, *options: str) -> Iterator[ServerProcess]:
    """Start a server on a free port, and stop it with SIGTERM; its exit code must be 0."""
    command = [sys.executable, "-c", SERVE_CODE, "--policy", policy, *options, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"ws://\S+", process.stdout.readline())
        if not address:
            raise SystemExit("the server did not start")
        yield ServerProcess(address[0], process.pid)
    finally:
        process.terminate()
        exit_code = process.wait()
    if exit_code:
        raise SystemExit(f"the server ended with exit code {exit_code}")
