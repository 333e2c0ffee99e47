"""A model server for AllenAI's vla-eval harness: its episodes in, one action per observation out.

The harness's own server speaks its protocol; this is the class that it calls. Observations of all running
episodes are answered together (`spear.serve.service`). A bad one ends its own episode only.
"""

import zlib
from collections import deque
from typing import Any

from anyio.abc import TaskGroup
from vla_eval.model_servers.base import ModelServer, SessionContext

from spear.serve.options import VlaEvalOptions
from spear.serve.service import Batcher, Service
from spear.types import Array

NEEDED = {"send_state": True}
"""What benchmarks are asked to send besides images, where they have such an option."""


class HarnessServer(ModelServer):
    """`service` behind the harness's protocol. Its embodiment reads the harness's observations."""

    def __init__(self, service: Service, options: VlaEvalOptions) -> None:
        self._service, self._options = service, options
        self._episodes: dict[str, tuple[int, deque[Array]]] = {}  # seed, actions that are left

    async def on_serve_start(self, tg: TaskGroup) -> None:
        """The harness calls this before the first connection."""
        o = self._options
        self._batcher = Batcher(self._service.answer, o.max_batch, o.wait_ms / 1000, capacity=256)
        tg.start_soon(self._batcher.run)

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Forgets the last episode. Randomness depends on task and episode number alone, however they run."""
        task = config.get("task") or {}
        name = f"{task.get('name')}/{task.get('episode_idx')}"
        self._episodes[ctx.session_id] = 1000 * zlib.crc32(name.encode()), deque()

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """Answers with the next action of the chunk; asks the policy again when those are used up."""
        seed, rows = self._episodes.setdefault(ctx.session_id, (0, deque()))
        if not rows:
            obs = {**obs, "seed": seed + ctx.step}
            result = await self._batcher.submit(ctx.session_id, obs)
            rows.extend(result["actions"][: self._options.replan])
        await ctx.send_action({"actions": rows.popleft()})

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Also called when the connection is lost."""
        self._episodes.pop(ctx.session_id, None)
        self._batcher.forget(ctx.session_id)

    def get_observation_params(self) -> dict[str, Any]:
        """Options for the benchmark."""
        return dict(NEEDED)

    def get_action_spec(self) -> dict[str, Any]:
        """Declares nothing: the embodiment checks each observation."""
        return {}

    get_observation_spec = get_action_spec
