"""Closed loop: a policy acts in many simulated scenes at once, each until success or time out."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mujoco

from spear.chunks import NUM_SLOW_ACTIONS, ChunkExecutor
from spear.errors import check_known
from spear.evaluate import film as video
from spear.evaluate.agents import Agent
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import MILESTONES, Outcome, Results
from spear.evaluate.runner import Film, run_evaluation
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.render import get_thread_renderer
from spear.sim.scene import FAMILIES, held_out_seeds, sample_scene
from spear.sim.world import SIMULATOR_VERSION, World
from spear.types import CONTROL_RATE_HZ, Array


def evaluate_tabletop(agent: Agent, options: TabletopOptions) -> tuple[Results, list[Film]]:
    """Success on the held-out scenes first_seed … first_seed + scenes - 1 of each family; the films made now.

    Raises SpearError for a folder with results of another policy or of other settings, for an unknown family,
    for seeds that are not held out, and for a way of executing chunks that the policy has not learned.
    """
    check_known("task family", FAMILIES, *options.families)
    scenes = dict.fromkeys(
        options.families or FAMILIES, held_out_seeds(options.first_seed, options.scenes)
    )
    settings = {
        "simulator": SIMULATOR_VERSION,
        "replan": options.replan,
        "image_size": list(agent.image_sizes["external"]),
        "wrist_size": list(agent.image_sizes["wrist"]),
        "execution": options.execution,
        "latency_ms": options.latency_ms,
        "weights": agent.weights,
        **({"slow_actions": NUM_SLOW_ACTIONS} if options.execution == "async" else {}),
    }
    return run_evaluation(_Tabletop(agent, options), agent, scenes, settings, options)


@dataclass
class _Slot:
    """One running scene. poses: the joint positions at each step, of which its film is made."""

    env: TabletopEnv
    chunks: ChunkExecutor
    poses: list[Array]
    info: Mapping[str, Any] = field(default_factory=dict)
    unreachable: int = 0
    started: float = field(default_factory=time.perf_counter)


class _Tabletop:
    """The embedded simulator. A track is the joint positions at each step."""

    films_are_free = True

    def __init__(self, agent: Agent, options: TabletopOptions) -> None:
        self._options, self._sizes = options, agent.image_sizes
        self._delay = count_latency_steps(options.latency_ms)
        if agent.needs_images or options.films:
            get_thread_renderer()  # where there is none, this is said first

    def run(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[tuple[Outcome, float, list[Array]]]:
        """All seeds through a few environments; one that ends takes the next seed."""
        waiting, slots = list(seeds)[::-1], list[_Slot]()
        sizes = self._sizes["external"], self._sizes["wrist"]
        count = min(self._options.batch, len(seeds))
        free = [TabletopEnv(family, *sizes, images=agent.needs_images) for _ in range(count)]
        while waiting or slots:
            while waiting and free:
                env, how, replan = free.pop(), self._options.execution, self._options.replan
                env.load(World(sample_scene(family, waiting.pop())))
                chunks = ChunkExecutor(how, replan, max_committed=agent.committed)
                slots.append(_Slot(env, chunks, [env.world.data.qpos.copy()]))
            seen = [
                {**(s.env.observe() if agent.needs_images else {}), **s.chunks.committed_actions()}
                for s in slots
            ]
            running = []
            for slot, chunk in zip(slots, agent.act([s.env for s in slots], seen), strict=True):
                slot.chunks.add_chunk(chunk, arrival_tick=slot.chunks.tick + self._delay)
                if _execute(slot):
                    yield _outcome(slot), time.perf_counter() - slot.started, slot.poses
                    free.append(slot.env)
                else:
                    running.append(slot)
            slots = running

    def film(self, outcome: Outcome, track: Sequence[Array]) -> Iterator[Array]:
        """Replays recorded joint positions before larger cameras than the policy's, of the same aspect."""
        world, (width, height) = (
            World(sample_scene(outcome.family, outcome.seed)),
            self._sizes["external"],
        )
        across = round(video.HEIGHT * width / height)
        views = [("external", (across, video.HEIGHT)), ("wrist", (video.HEIGHT, video.HEIGHT))]
        for step, pose in enumerate(track):
            world.data.qpos[:] = pose
            mujoco.mj_forward(world.model, world.data)
            ended = outcome.success if step == len(track) - 1 else None
            external, wrist = get_thread_renderer().images(world, views)
            yield video.compose_frame(external, wrist, outcome.instruction, ended)


def count_latency_steps(latency_ms: float) -> int:
    """Control steps from a look until its chunk can be used."""
    return math.ceil(latency_ms / 1000 * CONTROL_RATE_HZ - 1e-9)


def _execute(slot: _Slot) -> bool:
    """Steps one scene until it is time to look again; True when its episode has ended."""
    while not slot.chunks.needs_chunk():
        slot.info = slot.env.physics_step(slot.chunks.next_action())
        slot.poses.append(slot.env.world.data.qpos.copy())
        slot.unreachable += slot.info["unreachable"]
        if slot.info["success"] or slot.env.steps >= MAX_STEPS:
            return True
    return False


def _outcome(slot: _Slot) -> Outcome:
    seen: Any = {name: bool(slot.info[name]) for name in MILESTONES}
    where = slot.env.family, slot.env.seed, slot.env.world.spec.instruction
    return Outcome(*where, **seen, unreachable=slot.unreachable, steps=slot.env.steps)
