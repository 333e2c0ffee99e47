"""Work in a process of its own, and waiting for what others do."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any


def ends_with(code: int, work: Callable[..., object], *given: Any, way: str = "fork") -> None:
    """Do `work` in a process of its own, which must end with this code."""
    process: Any = multiprocessing.get_context(way).Process(target=work, args=given)
    process.start()
    process.join()
    assert process.exitcode == code


def until(true: Callable[[], object], what: str, *processes: Any, patience: float = 300) -> None:
    """Wait for it, for so many seconds at most, while these processes live."""
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        assert all(process.is_alive() for process in processes), f"a process ended before {what}"
        time.sleep(0.02)
