"""Runs work in another process, and waits for conditions that other processes fulfil."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any


def run_in_process(
    exit_code: int, work: Callable[..., object], *args: Any, start_method: str = "fork"
) -> None:
    """Call `work(*args)` in another process, which must end with this exit code."""
    process: Any = multiprocessing.get_context(start_method).Process(target=work, args=args)
    process.start()
    process.join()
    assert process.exitcode == exit_code


def wait_until(
    condition: Callable[[], object], description: str, *processes: Any, timeout_s: float = 300
) -> None:
    """Wait until a condition is true; fail if it takes too long or one of the processes ends."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited in vain for {description}"
        for process in processes:
            assert process.is_alive(), f"a process ended before {description}"
        time.sleep(0.02)
