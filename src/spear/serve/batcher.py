"""The batcher: a work queue of several clients' requests, answered together in one thread.

A server reads a connection's next request only when the last one is answered. So a client has at
most one place in the queue, however fast it sends, and first come, first served is fair.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from spear.errors import SpearError, format_count

LOG = logging.getLogger(__name__)
ACTIVE_S = 1.0  # a client that asked within this time is expected to ask again


class ServerBusyError(SpearError):
    """The queue is full, or the server is stopping: the request was not taken."""


class ClientGoneError(Exception):
    """The client left before its request was computed."""


@dataclass(frozen=True)
class _QueuedRequest:
    """A request in the queue or in a batch. The fields are arguments of `Batcher.submit`."""

    client: Hashable
    request: Any
    is_wanted: Callable[[], bool]
    result: asyncio.Future[Any]  # what `submit` waits for

    def is_awaited(self) -> bool:
        """Return whether `submit` still waits, and the client still wants the result."""
        return not self.result.done() and self.is_wanted()

    def fail_with_client_gone(self) -> None:
        """Let `submit` raise `ClientGoneError`, unless it waits no more."""
        if not self.result.done():
            self.result.set_exception(ClientGoneError())


class Batcher:
    """Collects requests and has them answered in one thread, batch after batch.

    Args:
        answer: a function of the requests and their clients that returns one result per request, in
            order. If a result is an exception, `submit` raises it.
        max_batch: the largest number of requests in a batch.
        wait_s: the longest time for which a batch waits for more requests once the last batch is
            done. The batch starts at once when it is full, or when it has a request of every client
            that was active within the last second.
        capacity: the largest number of requests that wait; further ones are refused (backpressure).
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Any], Sequence[Hashable]], Sequence[Any]],
        max_batch: int,
        wait_s: float,
        capacity: int,
    ) -> None:
        self._answer = answer
        self._max_batch = max_batch
        self._wait_s = wait_s
        self._capacity = capacity
        self._queue: deque[_QueuedRequest] = deque()
        self._batch: list[_QueuedRequest] = []  # that is being answered
        self._last_active: dict[Hashable, float] = {}
        self._has_arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")

    def __len__(self) -> int:
        """Return the number of requests that wait."""
        return len(self._queue)

    async def submit(
        self, client: Hashable, request: Any, is_wanted: Callable[[], bool] = lambda: True
    ) -> Any:
        """Wait for the result of one request.

        Args:
            client: identifies the client.
            request: the request, in a form that `answer` takes.
            is_wanted: returns whether the client still wants the result. It is called just before
                the result is computed, and when the queue is full.

        Returns:
            The result.

        Raises:
            ServerBusyError: the queue is full.
            ClientGoneError: `is_wanted` returned False.
        """
        if len(self._queue) >= self._capacity:
            self._remove_unwanted_from_queue()
        if len(self._queue) >= self._capacity:
            num_waiting = format_count(self._capacity, "requests")
            raise ServerBusyError(
                f"busy: {num_waiting} observations are waiting already. Try again in a moment."
            )
        result = asyncio.get_running_loop().create_future()
        self._last_active[client] = time.perf_counter()
        self._queue.append(_QueuedRequest(client, request, is_wanted, result))
        self._has_arrived.set()
        try:
            return await result
        finally:
            # An error's traceback refers to this function's variables, and `result` to the error.
            # This circle would keep the request, which may be large, in memory.
            del result, request

    def forget(self, client: Hashable) -> None:
        """Stop waiting for a client that has gone."""
        self._last_active.pop(client, None)

    async def answer_until_cancelled(self) -> None:
        """Answer requests until cancelled."""
        try:
            while True:
                self._batch = await self._wait_for_batch()
                if self._batch:  # otherwise everyone who asked has left
                    await self._answer_batch()
                self._batch = []  # requests may be large
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)
            for queued in (*self._batch, *self._queue):
                queued.fail_with_client_gone()

    async def _answer_batch(self) -> None:
        """Compute the results of `self._batch` in the worker thread, and deliver them."""
        requests = [queued.request for queued in self._batch]
        clients = [queued.client for queued in self._batch]
        results = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._answer_safely, requests, clients
        )
        self._deliver(self._batch, results)

    def _remove_unwanted_from_queue(self) -> None:
        """Free the places of clients that have gone; their `submit` raises `ClientGoneError`."""
        queue = list(self._queue)
        self._queue.clear()
        for queued in queue:
            if queued.is_awaited():
                self._queue.append(queued)
            else:
                queued.fail_with_client_gone()

    def _deliver(self, batch: Sequence[_QueuedRequest], results: Sequence[Any]) -> None:
        """Give each client of a batch its result, or raise the result if it is an exception."""
        for queued, result in zip(batch, results, strict=True):
            if queued.client in self._last_active:
                self._last_active[queued.client] = time.perf_counter()
            if queued.result.done():
                continue
            if isinstance(result, BaseException):
                queued.result.set_exception(result)
            else:
                queued.result.set_result(result)

    def _answer_safely(self, requests: Sequence[Any], clients: Sequence[Hashable]) -> Sequence[Any]:
        """Answer a batch. If this raises an exception, it becomes the result of every request.

        This runs in the inference thread. `StopIteration` is replaced by another exception, because
        asyncio's futures do not accept it.
        """
        try:
            return self._answer(requests, clients)
        except StopIteration as error:
            LOG.exception("inference failed")
            return [RuntimeError(repr(error))] * len(requests)
        except Exception as error:
            LOG.exception("inference failed")
            return [error.with_traceback(None)] * len(requests)

    async def _wait_for_batch(self) -> list[_QueuedRequest]:
        """Wait for requests, and take those that are still wanted off the queue."""
        while not self._queue:
            await self._wait_for_arrival()
        # Wait for more requests until the batch is full, has all active clients, or time is over.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                while len(self._queue) < min(self._max_batch, self._count_active_clients()):
                    await self._wait_for_arrival()

        batch: list[_QueuedRequest] = []
        while self._queue and len(batch) < self._max_batch:
            queued = self._queue.popleft()
            if queued.is_awaited():
                batch.append(queued)
            else:
                queued.fail_with_client_gone()
        return batch

    async def _wait_for_arrival(self) -> None:
        """Wait for the next request that is submitted."""
        self._has_arrived.clear()
        await self._has_arrived.wait()

    def _count_active_clients(self) -> int:
        """Return the number of clients that are expected to ask again soon."""
        now = time.perf_counter()
        return sum(now - last_active < ACTIVE_S for last_active in self._last_active.values())
