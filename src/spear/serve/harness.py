"""A model server for AllenAI's vla-eval harness: its episodes in, one action per observation out.

The harness's own server speaks its protocol; this is the class that it calls. Observations of all running
episodes are answered together (`spear.serve.batching`), and a bad one is told to its own episode alone.
"""

from __future__ import annotations

import zlib
from collections import deque
from typing import Any

from anyio.abc import TaskGroup
from vla_eval.model_servers.base import ModelServer, SessionContext

from spear.serve.batching import Batcher
from spear.serve.service import Service
from spear.types import Array

NEEDED = {"send_state": True}
"""What benchmarks are asked to send besides images; those that have no such option are not told (the
harness)."""


class HarnessServer(ModelServer):
    """`service` behind the harness's protocol; its embodiment reads the harness's observations as they come.

    replan     of each chunk, so many actions are executed before the next look.
    max_batch, wait_ms, queue  see `spear.serve.batching.Batcher`; wait_ms in milliseconds.
    """

    def __init__(
        self, service: Service, replan: int, max_batch: int = 16, wait_ms: float = 5.0, queue: int = 256
    ) -> None:
        self._service, self._replan = service, replan
        self._settings = max_batch, wait_ms / 1000, queue
        self._rows: dict[str, deque[Array]] = {}
        self._seeds: dict[str, int] = {}

    async def on_serve_start(self, tg: TaskGroup) -> None:
        """The harness's: before the first connection."""
        self._batcher = Batcher(self._service.answer, *self._settings)
        tg.start_soon(self._batcher.run)

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """The harness's: nothing is left of the last episode. What is random is fixed by the task and the
        episode's number, so that a run repeats however it is sharded."""
        task = config.get("task") or {}
        name = f"{task.get('name')}/{task.get('episode_idx')}"
        self._seeds[ctx.session_id] = 1000 * zlib.crc32(name.encode())
        self._rows[ctx.session_id] = deque()

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """The harness's: answers with the next action of the chunk, after a new look when that is used up."""
        rows = self._rows.setdefault(ctx.session_id, deque())
        if not rows:
            seeded = "seed" in self._service.embodiment.optional
            seed = {"seed": self._seeds.get(ctx.session_id, 0) + ctx.step} if seeded else {}
            result = await self._batcher.submit(ctx.session_id, {**obs, **seed})
            rows.extend(result["actions"][: self._replan])
        await ctx.send_action({"actions": rows.popleft()})

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """The harness's: also when the connection is lost."""
        self._rows.pop(ctx.session_id, None)
        self._seeds.pop(ctx.session_id, None)
        self._batcher.forget(ctx.session_id)

    def get_observation_params(self) -> dict[str, Any]:
        """The harness's: options for the benchmark."""
        return dict(NEEDED)

    def get_action_spec(self) -> dict[str, Any]:
        """The harness's: nothing declared. Each observation and action is checked, by the embodiment."""
        return {}

    def get_observation_spec(self) -> dict[str, Any]:
        """As `get_action_spec`."""
        return {}
