"""Worker processes that return results in order."""

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

from spear.errors import SpearError, to_sentence

T = TypeVar("T")
R = TypeVar("R")
NO_WORKER_STARTED = (
    'no worker process began: in a script, work goes below `if __name__ == "__main__":`'
)


@contextmanager
def open_worker_pool(
    num_workers: int, preload: str, advice: str
) -> Iterator[ProcessPoolExecutor | None]:
    """Start worker processes that end with this process, however it ends.

    Args:
        num_workers: number of processes. With 0 the pool is None.
        preload: the module that the workers need.
        advice: what to do when a worker is killed, for the message.

    Raises:
        SpearError: a worker was killed. If none has started, the cause is a script without a main
            guard, which is run again in each of them.
    """
    if num_workers <= 0:
        yield None
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    # The event starts multiprocessing's tracker, which unblocks interrupts: make it before blocking
    # them.
    has_started = context.Event()
    with block_interrupts():
        ensure_running()  # the fork server
    executor = ProcessPoolExecutor(
        num_workers, context, initializer=follow_parent_process, initargs=(has_started,)
    )
    try:
        yield executor
    except BrokenProcessPool as error:
        if not has_started.is_set():
            raise SpearError(NO_WORKER_STARTED) from error
        raise SpearError(
            f"a worker process was killed (out of memory?). {to_sentence(advice)}"
        ) from error
    except BaseException:
        _kill_workers(executor)
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _kill_workers(executor: ProcessPoolExecutor) -> None:
    """End the workers of a pool, for example after Ctrl-C: nobody waits for their results any more.

    Workers that are yet to start are not started, because the fork server is killed first. Waiting
    for its end lets the next pool have another one.
    """
    os.kill(_forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
    _forkserver._stop()  # type: ignore[attr-defined]
    for worker in list(executor._processes.values()):
        worker.terminate()


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Let processes that are started in the `with` block ignore Ctrl-C."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def follow_parent_process(has_started: Event | None = None) -> None:
    """In a worker: leave interrupts to the parent process, and end when that one ends.

    Args:
        has_started: is set, to show that the worker runs.
    """
    if has_started is not None:
        has_started.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def map_in_order(
    executor: Executor | None, function: Callable[[T], R], items: Iterable[T], num_ahead: int
) -> Iterator[R]:
    """Map a function over items by the workers of a pool, with the results in order.

    Args:
        executor: the pool; None computes in this process.
        function: what to compute.
        items: its arguments.
        num_ahead: the most results that wait for the consumer.
    """
    if executor is None:
        yield from map(function, items)
        return
    futures: deque[Any] = deque()
    for item in items:
        futures.append(executor.submit(function, item))
        if len(futures) > num_ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()
