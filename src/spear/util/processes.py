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
    'no worker process began. In a script, put the work below `if __name__ == "__main__":`.'
)


@contextmanager
def open_worker_pool(
    num_workers: int, preload: str, advice: str
) -> Iterator[ProcessPoolExecutor | None]:
    """Start worker processes that end with this process, however it ends.

    Args:
        num_workers: number of processes. With 0 the pool is None.
        preload: the module that the workers need, which is imported once before they are forked.
        advice: what to do when a worker is killed, for the message.

    Raises:
        SpearError: a worker was killed. If no worker has ever run, the cause is a script without a
            main guard: every worker runs the script again, and fails.
    """
    if num_workers <= 0:
        yield None
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    # Making the event starts multiprocessing's resource tracker, which unblocks interrupts. So the
    # event is made before `block_interrupts`.
    has_started = context.Event()
    with block_interrupts():
        ensure_running()  # the fork server
    executor = ProcessPoolExecutor(
        num_workers,
        context,
        initializer=ignore_interrupts_and_end_with_parent,
        initargs=(has_started,),
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
    """End the workers of a pool after an error or Ctrl-C, when nobody waits for their results.

    The fork server is killed first, so that it does not start further workers. `_stop` waits for
    its end, so that the next pool starts a new fork server.
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


def ignore_interrupts_and_end_with_parent(has_started: Event | None = None) -> None:
    """In a worker: ignore Ctrl-C, which the parent process handles, and end with the parent.

    Args:
        has_started: an event to set, which shows the parent that a worker runs.
    """
    if has_started is not None:
        has_started.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        """Wait for the end of the parent process, and end this process."""
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def map_in_order(
    executor: Executor | None, function: Callable[[T], R], items: Iterable[T], num_ahead: int
) -> Iterator[R]:
    """Apply a function to items in the workers of a pool, and yield the results in order.

    Args:
        executor: the pool; None computes in this process.
        function: the function.
        items: the arguments of its calls.
        num_ahead: how many calls may be submitted before the oldest result is yielded.
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
