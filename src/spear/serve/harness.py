"""A model server for AllenAI's vla-eval harness: observations of episodes in, actions out.

The harness runs benchmarks. Its own server code speaks the protocol, and calls the class below,
which answers each observation with one action. The batcher answers observations of all running
episodes together. A wrong observation ends only its own episode.
"""

import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from anyio.abc import TaskGroup
from vla_eval.model_servers.base import ModelServer, SessionContext

from spear.serve.batcher import Batcher
from spear.serve.options import ServeOptions
from spear.serve.service import Service
from spear.types import Array

OBSERVATION_PARAMETERS = {"send_state": True}
"""Options for benchmarks: send the state in addition to images, if the benchmark can do so."""
QUEUE_CAPACITY = 256  # the largest number of observations that wait
SEEDS_PER_EPISODE = 1000  # each step of an episode has its own seed; episodes have fewer steps


@dataclass
class _Episode:
    """A running episode."""

    first_seed: int = 0  # the seed of step 0
    rows: deque[Array] = field(default_factory=deque)  # commands that have not been sent yet


class HarnessServer(ModelServer):
    """A `Service` behind the harness's protocol.

    The service's embodiment has to be one that reads the harness's observations.
    """

    def __init__(self, service: Service, options: ServeOptions) -> None:
        self._service = service
        self._options = options
        self._episodes: dict[str, _Episode] = {}  # by session

    async def on_serve_start(self, tg: TaskGroup) -> None:
        """Start the batcher; the harness calls this before the first connection."""
        self._batcher = Batcher(
            self._service.answer,
            max_batch=self._options.max_batch_size,
            wait_s=self._options.batch_timeout_ms / 1000,
            capacity=QUEUE_CAPACITY,
        )
        tg.start_soon(self._batcher.answer_until_cancelled)

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Start an episode. Its seeds depend only on the task and the episode's number."""
        task = config.get("task") or {}
        name = f"{task.get('name')}/{task.get('episode_idx')}"
        first_seed = SEEDS_PER_EPISODE * zlib.crc32(name.encode())
        self._episodes[ctx.session_id] = _Episode(first_seed)

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """Send the next action of the chunk; ask the policy for a new chunk when none is left."""
        episode = self._episodes.setdefault(ctx.session_id, _Episode())
        if not episode.rows:
            observation = {**obs, "seed": episode.first_seed + ctx.step}
            result = await self._batcher.submit(ctx.session_id, observation)
            episode.rows.extend(result["actions"][: self._options.replan_steps])
        await ctx.send_action({"actions": episode.rows.popleft()})

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Forget the episode. The harness also calls this when the connection is lost."""
        self._episodes.pop(ctx.session_id, None)
        self._batcher.forget(ctx.session_id)

    def get_observation_params(self) -> dict[str, Any]:
        """Return options for the benchmark."""
        return dict(OBSERVATION_PARAMETERS)

    def get_action_spec(self) -> dict[str, Any]:
        """Return an empty declaration, because the embodiment checks each observation itself."""
        return {}

    get_observation_spec = get_action_spec
