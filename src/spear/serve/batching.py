"""Requests of many clients, answered together: a bounded queue, first come, first served.

The server reads a connection's next request only when the last one is answered: a client has at most one
place in the queue, however fast it sends, so that first come, first served is fair.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from spear.errors import SpearError

RECENT = 1.0
"""A client that asked within so many seconds is expected to ask again (our choice)."""


class Busy(SpearError):
    """The queue is full, or the server is stopping: the request was not taken."""


class Gone(Exception):
    """The client left before its request was computed."""


@dataclass(frozen=True)
class _Waiting:
    client: Hashable
    request: Any
    alive: Callable[[], bool]
    result: asyncio.Future[Any]


class Batcher:
    """Collects requests and has them answered in one thread, batch after batch.

    answer     requests → one result each, in order; a result that is an exception is raised for its client.
    max_batch  the most requests in a batch.
    wait_s     the longest that a batch waits for more requests once the last batch is done. It starts at once
               when it is full, or when every client that was active within the last second is in it.
    capacity   the most requests that wait; further ones are refused with `Busy`.
    done       called after each batch with its size and the seconds that it took.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Any]], Sequence[Any]],
        max_batch: int,
        wait_s: float,
        capacity: int,
        done: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._answer, self._done = answer, done
        self._max_batch, self._wait_s, self._capacity = max_batch, wait_s, capacity
        self._queue: deque[_Waiting] = deque()
        self._seen: dict[Hashable, float] = {}
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._running = 0

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is being answered."""
        return not self._queue and not self._running

    async def submit(self, client: Hashable, request: Any, alive: Callable[[], bool] = lambda: True) -> Any:
        """The result for one request of `client`. Raises `Busy` at once when the queue is full.

        alive  whether somebody still wants the result: asked just before it is computed, where False raises
               `Gone`.
        """
        if len(self._queue) >= self._capacity:
            raise Busy(f"busy: {self._capacity} requests wait already: try again in a moment")
        waiting = _Waiting(client, request, alive, asyncio.get_running_loop().create_future())
        self._seen[client] = time.perf_counter()
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.result

    def forget(self, client: Hashable) -> None:
        """A client has gone: no batch waits for it any more."""
        self._seen.pop(client, None)

    async def run(self) -> None:
        """Answers until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                batch = await self._collect()
                if not batch:  # everyone who asked has left
                    continue
                self._running = len(batch)
                started = time.perf_counter()
                results = await loop.run_in_executor(self._thread, self._safely, [w.request for w in batch])
                self._done(len(batch), time.perf_counter() - started)
                self._running = 0
                for waiting, result in zip(batch, results, strict=True):
                    if waiting.client in self._seen:
                        self._seen[waiting.client] = time.perf_counter()
                    if waiting.result.done():
                        continue
                    if isinstance(result, BaseException):
                        waiting.result.set_exception(result)
                    else:
                        waiting.result.set_result(result)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _collect(self) -> list[_Waiting]:
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        deadline = time.perf_counter() + self._wait_s
        while len(self._queue) < min(self._max_batch, self._active()):
            self._arrived.clear()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.perf_counter())):
                    await self._arrived.wait()
            except TimeoutError:
                break
        batch: list[_Waiting] = []
        while self._queue and len(batch) < self._max_batch:
            waiting = self._queue.popleft()
            if waiting.result.done():
                continue
            if waiting.alive():
                batch.append(waiting)
            else:
                waiting.result.set_exception(Gone())
        return batch

    def _active(self) -> int:
        """How many clients are expected to ask again."""
        now = time.perf_counter()
        return sum(now - seen < RECENT for seen in self._seen.values())

    def _safely(self, requests: Sequence[Any]) -> Sequence[Any]:
        try:
            return self._answer(requests)
        except Exception as error:
            logging.getLogger(__name__).exception("inference failed")
            return [error] * len(requests)
