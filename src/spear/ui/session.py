"""One tab of the page: what it asks for, in order, and the rollout that runs beside it.

The page sends JSON {"do": one of `REQUESTS`, …}, or the bytes of an image file; it is sent parts of its view.
Whatever is wrong becomes {"problem": one line}. The studio's thread does all the work, never the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from spear.errors import SpearError, unknown_name
from spear.sim.env import RATE_HZ
from spear.ui.table import Studio, Table, View
from spear.util.threads import release_workers

LOG = logging.getLogger("spear.ui")
LARGEST_SEED = 2**31 - 1
REQUESTS = ("reset", "instruct", "predict", "step", "start", "stop", "boxes", "question", "follow")
"""What the page may ask for: each is a method of `Session`, with _ before its name."""


class Session:
    """One tab. `thread` is the one thread that the studio belongs to."""

    def __init__(self, connection: ServerConnection, studio: Studio, thread: Executor) -> None:
        self._connection, self._studio, self._thread = connection, studio, thread
        self._table = Table(studio)
        self._rollout: asyncio.Task[None] | None = None
        self._instruction = ""
        self._following = False

    async def talk(self, about: View) -> None:
        """Serve the tab until it is closed. `about` is sent first, then the first scene."""
        try:
            await self._send({**about, **self._studio.about(), "running": False, "problem": None})
            await self._safely(self._reset, {"family": self._studio.about()["families"][0], "seed": 0})
            async for message in self._connection:
                await self._answer(message)
        finally:
            await self._stop({})

    async def _answer(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            await self._safely(self._photo, {"data": message})
            return
        try:
            request = json.loads(message)
            name = REQUESTS[REQUESTS.index(request["do"])]
        except (ValueError, TypeError, KeyError, RecursionError):
            await self._send({"problem": f"{message[:60]!r}: no request of this page: reload it"})
            return
        await self._safely(getattr(self, f"_{name}"), request)

    async def _safely(self, do: Callable[[Mapping[str, Any]], Any], request: Mapping[str, Any]) -> None:
        """Do it; what goes wrong is said to the page."""
        try:
            await do(request)
            await self._send({"problem": None})
        except SpearError as error:
            await self._send({"problem": str(error)})
        except Exception as error:
            LOG.exception("request failed")
            await self._send({"problem": f"the server failed: {type(error).__name__}: see its log"})

    async def _reset(self, request: Mapping[str, Any]) -> None:
        family, seed = request.get("family"), request.get("seed")
        if not isinstance(family, str):
            raise unknown_name("task family", str(family)[:40], self._studio.about()["families"])
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= LARGEST_SEED:
            raise SpearError(f"seed {str(seed)[:20]}: give a whole number from 0 to {LARGEST_SEED}")
        await self._stop({})
        view = await self._work(self._table.reset, family, seed)
        self._instruction = view["instruction"]
        await self._send(view)

    async def _photo(self, request: Mapping[str, Any]) -> None:
        await self._stop({})
        await self._send(await self._work(self._table.show, request["data"]))

    async def _instruct(self, request: Mapping[str, Any]) -> None:
        text = request.get("text")
        self._instruction = text if isinstance(text, str) else ""

    async def _predict(self, request: Mapping[str, Any]) -> None:
        await self._send(await self._work(self._table.predict, self._instruction))

    async def _step(self, request: Mapping[str, Any]) -> None:
        await self._stop({})
        await self._send(await self._work(self._table.step, self._instruction, self._following))

    async def _start(self, request: Mapping[str, Any]) -> None:
        if self._rollout is None or self._rollout.done():
            self._rollout = asyncio.create_task(self._safely(self._roll, {}))

    async def _stop(self, request: Mapping[str, Any]) -> None:
        task, self._rollout = self._rollout, None
        if task is not None and not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _roll(self, request: Mapping[str, Any]) -> None:
        """Steps at the robot's pace, or as fast as this machine can, until stopped or the episode is over."""
        await self._send({"running": True})
        try:
            due = time.monotonic()
            while True:
                view = await self._work(self._table.step, self._instruction, self._following)
                await self._send(view)
                if not self._table.moves:
                    break
                due = max(due + 1 / RATE_HZ, time.monotonic() - 1 / RATE_HZ)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
        finally:
            await self._send({"running": False})

    async def _boxes(self, request: Mapping[str, Any]) -> None:
        names = request.get("objects")
        if not isinstance(names, list):
            raise SpearError("objects: give a list of names")
        await self._send(await self._work(self._table.boxes, names))

    async def _question(self, request: Mapping[str, Any]) -> None:
        await self._send(await self._work(self._table.question, request.get("text")))

    async def _follow(self, request: Mapping[str, Any]) -> None:
        self._following = request.get("on") is True

    async def _work(self, job: Callable[..., View], *args: Any) -> View:
        return await asyncio.get_running_loop().run_in_executor(self._thread, _alone, job, *args)

    async def _send(self, view: View) -> None:
        with contextlib.suppress(ConnectionClosed):  # `talk` notices it
            await self._connection.send(json.dumps(view))


def _alone(job: Callable[..., View], *args: Any) -> View:
    """Does a job and leaves no threads behind, which would slow the robots' inference."""
    try:
        return job(*args)
    finally:
        release_workers()
