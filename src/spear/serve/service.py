"""One policy for one robot: observations in, commands out, with errors one by one, many requests together.

A server reads a connection's next request only when the last one is answered: a client has at most one place
in the queue, however fast it sends, so that first come, first served is fair.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

import spear
from spear.chunks import check_chunk
from spear.embodiments import Embodiment
from spear.embodiments.interface import keep_actions
from spear.embodiments.observations import COMMITTED_KEY, CheckedObservation, select_cameras
from spear.errors import SpearError, format_count, notice, suppress_notices
from spear.types import CONTROL_RATE_HZ, Policy

LOG = logging.getLogger(__name__)
RECENT = 1.0
"""A client that asked within so many seconds is expected to ask again (our choice)."""
Result = dict[str, Any] | SpearError


class Service:
    """A policy behind an embodiment.

    name, robot  what clients are told that they talk to.
    control      the embodiment's control by name; None: its default.
    """

    def __init__(
        self,
        policy: Policy,
        embodiment: Embodiment,
        name: str = "policy",
        robot: str = "generic",
        control: str | None = None,
    ) -> None:
        self.policy, self.embodiment = policy, embodiment
        control, self.control = embodiment.select_control(control)
        self.metadata: dict[str, Any] = {
            "policy": name,
            "weights": getattr(policy, "identity", None),
            "embodiment": robot,
            "control": control,
            "action": self.control.description,
            "converted": self.control.convert is not keep_actions,
            "rate_hz": self.control.rate_hz,
            "observation": dict(embodiment.required),
            "optional": dict(embodiment.optional),
            "image_sizes": {v: [w, h] for v, (w, h) in getattr(policy, "image_sizes", {}).items()},
            "committed": getattr(policy, "committed", 0)
            if COMMITTED_KEY in embodiment.optional
            else 0,
            "server": f"spear {spear.__version__}",
        }
        self.greeting = embodiment.greeting(control) if embodiment.greeting else self.metadata

    def answer(self, observations: Sequence[Any], robots: Sequence[Hashable] = ()) -> list[Result]:
        """One result {"actions", "policy_timing"} or `SpearError` per observation, in order.

        A bad observation spoils its own answer only. robots: who sent each. policy_timing: milliseconds, of
        the whole batch.
        """
        started = time.perf_counter()
        results = [_attempt(self.embodiment.read, o) for o in observations]
        good = {}
        for i, result in enumerate(results):
            if isinstance(result, CheckedObservation):
                good[i] = select_cameras(self.policy, result)
                good[i].robot = robots[i] if robots else None
        read = time.perf_counter()
        predicted = self._infer(list(good.values())) if good else []
        inferred = time.perf_counter()
        for (i, ours), result in zip(good.items(), predicted, strict=True):
            failed = isinstance(result, SpearError)
            results[i] = (
                result if failed else _attempt(self._command, result, ours, observations[i])
            )
        around = time.perf_counter() - inferred + read - started
        timing = {"infer_ms": 1000 * (inferred - read), "embodiment_ms": 1000 * around}
        return [r if isinstance(r, SpearError) else {**r, "policy_timing": timing} for r in results]

    def warm_up(self) -> int:
        """Answer the robot's example, so that the first client does not wait; returns how many rows it has.
        Raises what it raises; notes rows that take another time than their actions."""
        example = self.embodiment.example()
        with suppress_notices():  # what the example's images lack is not the robot's fault
            result = self.answer([example])[0]
            if isinstance(result, SpearError):
                raise result
            # PyTorch compiles for a GPU again when it meets an instruction of another length: then for any.
            ours = select_cameras(self.policy, self.embodiment.read(example))
            actions = len(self.policy.infer_batch([{**ours, "prompt": "go"}])[0]["actions"])
        rows, rate_hz = len(result["actions"]), self.control.rate_hz
        if not math.isclose(rows * CONTROL_RATE_HZ, actions * rate_hz):
            apart = (
                f"{rows} rows at rate_hz {rate_hz:g}, for {format_count(actions, 'actions')} "
                f"at {CONTROL_RATE_HZ:g} Hz"
            )
            notice(f"the robot's file: {apart}: the arm goes too fast or slow, or stops early")
        return rows

    def _command(
        self, result: Mapping[str, Any], ours: Mapping[str, Any], observation: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The policy's result as the robot takes it."""
        actions = check_chunk(result["actions"])
        rows = np.asarray(self.control.convert(actions, ours["observation/state"], observation))
        if rows.ndim != 2 or not np.isfinite(rows).all():
            raise SpearError(
                "the robot's file makes no rows of finite numbers: do not move; repair it"
            )
        return {"actions": rows}

    def _infer(self, observations: Sequence[Mapping[str, Any]]) -> Sequence[Result]:
        """Together; when that fails for a reason in an observation, in halves, to find which."""
        try:
            return self.policy.infer_batch(observations)
        except SpearError as error:
            if len(observations) == 1:
                return [error]
        half = len(observations) // 2
        return [*self._infer(observations[:half]), *self._infer(observations[half:])]


def _attempt(call: Callable[..., dict[str, Any]], *args: Any) -> Result:
    """What a call returns, or the `SpearError` that it raises; a mistake in a robot's file becomes one."""
    try:
        return call(*args)
    except SpearError as error:
        return error
    except Exception as error:
        LOG.exception("the robot's file failed")
        return SpearError(f"the robot's file failed: {type(error).__name__}: see the server's log")


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

    answer     requests and their clients → one result each, in order; one that is an exception is raised for
               its client.
    max_batch  the most requests in a batch.
    wait_s     the longest that a batch waits for more requests once the last batch is done. It starts at once
               when it is full, or when every client that was active within the last second is in it.
    capacity   the most requests that wait; further ones are refused with `Busy`.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Any], Sequence[Hashable]], Sequence[Any]],
        max_batch: int,
        wait_s: float,
        capacity: int,
    ) -> None:
        self._answer, self._max_batch, self._wait_s, self._capacity = (
            answer,
            max_batch,
            wait_s,
            capacity,
        )
        self._queue: deque[_Waiting] = deque()
        self._seen: dict[Hashable, float] = {}
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    async def submit(
        self, client: Hashable, request: Any, alive: Callable[[], bool] = lambda: True
    ) -> Any:
        """The result for one request of `client`. Raises `Busy` at once when the queue is full.

        alive  whether somebody still wants the result: asked just before it is computed; False raises `Gone`.
        """
        if len(self._queue) >= self._capacity:
            raise Busy(
                f"busy: {format_count(self._capacity, 'requests')} waiting already: try again in a moment"
            )
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
        batch: list[_Waiting] = []
        try:
            while True:
                batch = await self._collect()
                if not batch:  # everyone who asked has left
                    continue
                requests, clients = [w.request for w in batch], [w.client for w in batch]
                results = await loop.run_in_executor(self._thread, self._try, requests, clients)
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
            for waiting in (*batch, *self._queue):
                if not waiting.result.done():
                    waiting.result.set_exception(Gone())

    def _try(self, requests: Sequence[Any], clients: Sequence[Hashable]) -> Sequence[Any]:
        """`answer`, whatever it raises: in the thread, as no `StopIteration` finds its way out of one."""
        try:
            return self._answer(requests, clients)
        except Exception as error:
            LOG.exception("inference failed")
            lost = isinstance(error, StopIteration)
            return [RuntimeError(repr(error)) if lost else error] * len(requests)

    async def _collect(self) -> list[_Waiting]:
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._wait_s):
                while len(self._queue) < min(self._max_batch, self._active()):
                    self._arrived.clear()
                    await self._arrived.wait()
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
