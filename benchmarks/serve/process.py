"""`spear serve` in a process of its own, for the benchmarks of the server."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SERVE = "import sys; from spear.cli import main; sys.exit(main(['serve', *sys.argv[1:]]))"


@dataclass(frozen=True)
class Server:
    """Where it listens, and its process."""

    url: str
    pid: int

    def memory(self) -> float:
        """MiB of memory that is its own (Linux): without pages of files, which the system drops and reads
        again."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024

    def files(self) -> int:
        """How many files and sockets it has open (Linux)."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))


@contextmanager
def server(*options: str) -> Iterator[Server]:
    """Starts one on a free port and stops it with SIGTERM; it must end with exit code 0."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *options, "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        found = re.search(r"ws://\S+", process.stdout.readline())
        if not found:
            raise SystemExit("the server did not start")
        yield Server(found[0], process.pid)
    finally:
        process.terminate()
        code = process.wait()
    if code:
        raise SystemExit(f"the server ended with exit code {code}")
