"""Worker processes that give results back in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.forkserver import _forkserver, ensure_running
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

from spear.errors import SpearError

T = TypeVar("T")
R = TypeVar("R")
NO_WORKER_STARTED = (
    'no worker process began: in a script, work goes below `if __name__ == "__main__":`'
)


@contextmanager
def open_worker_pool(
    workers: int, preload: str, advice: str
) -> Iterator[ProcessPoolExecutor | None]:
    """So many worker processes, None for none; they end with this process, however it ends.

    preload  the module that they need. advice is what to do when one of them is killed, for the `SpearError`.
             Where none has begun, it is the script that is run again in each of them.
    """
    if workers <= 0:
        yield None
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    begun = context.Event()  # before the mask: it starts multiprocessing's tracker, which lifts it
    with block_interrupts():
        ensure_running()  # the server
    executor = ProcessPoolExecutor(
        workers, context, initializer=follow_parent_process, initargs=(begun,)
    )
    try:
        yield executor
    except BrokenProcessPool as error:
        if not begun.is_set():
            raise SpearError(NO_WORKER_STARTED) from error
        raise SpearError(f"a worker process was killed (out of memory?): {advice}") from error
    except (
        BaseException
    ):  # such as Ctrl-C: nobody waits for what they are at, nor for those still to begin
        os.kill(_forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
        _forkserver._stop()  # type: ignore[attr-defined]  # until it is gone: the next pool has another
        for worker in [*executor._processes.values()]:
            worker.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def block_interrupts() -> Iterator[None]:
    """What this thread starts meanwhile keeps the mask: Ctrl-C is for this process alone."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def follow_parent_process(begun: Event | None = None) -> None:
    """A worker leaves interrupts to the process that it works for, and ends when that one does. begun: is
    set, as a sign that it works."""
    if begun is not None:
        begun.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def map_in_order(
    executor: Executor | None, call: Callable[[T], R], pieces: Iterable[T], ahead: int
) -> Iterator[R]:
    """`map`, by the workers, with at most `ahead` results waiting."""
    if executor is None:
        yield from map(call, pieces)
        return
    waiting: deque[Any] = deque()
    for piece in pieces:
        waiting.append(executor.submit(call, piece))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
