"""Closed loop: a policy acts in many simulated scenes at once, each until success or time out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mujoco

from spear.chunks import REPLAN, ChunkExecutor, Mode
from spear.errors import SpearError
from spear.evaluate import film as video
from spear.evaluate.agents import Agent
from spear.evaluate.journal import WHOLE, Shard
from spear.evaluate.results import SCENES, Outcome, Results
from spear.evaluate.runner import Film, Films, run_evaluation
from spear.sim.env import MAX_STEPS, RATE_HZ, TabletopEnv
from spear.sim.render import Renderer, Size
from spear.sim.scene import FAMILIES, TRAIN_SEED, check_families, sample_scene
from spear.sim.world import World
from spear.types import Array


@dataclass
class _Slot:
    """One running scene. poses: the joint positions at each step, from which its film can be made."""

    env: TabletopEnv
    seed: int
    chunks: ChunkExecutor
    info: Mapping[str, Any] = field(default_factory=dict)
    unreachable: int = 0
    poses: list[Array] = field(default_factory=list)


def evaluate(
    agent: Agent,
    families: Sequence[str] = FAMILIES,
    scenes: int = SCENES,
    first_seed: int = 0,
    replan: int = REPLAN,
    batch: int = 32,
    image_size: Size = (280, 210),
    wrist_size: Size = (112, 112),
    films: Films = 0,
    quiet: bool = False,
    execution: Mode = "sync",
    latency_ms: float = 0.0,
    out: Path | None = None,
    shard: Shard = WHOLE,
) -> tuple[Results, list[Film]]:
    """Success on the held-out scenes first_seed … first_seed + scenes - 1 of each family.

    replan      actions of each predicted chunk that are executed before looking again: fewer reacts sooner
                and costs more inferences.
    batch       scenes that run at once: their observations go through the policy together, and all share one
                renderer. A scene that ends makes room for the next seed.
    image_size, wrist_size  (width, height) of the cameras, in pixels.
    films       films to make per family: of so many successes and as many failures, lowest seeds first; of
                all failures; or of all episodes.
    execution   what happens to chunks, see `spear.chunks`.
    latency_ms  simulated time from an observation to its chunk. The control loop takes a chunk up at its next
                step, so it counts in whole steps of 200 ms, rounded up; steps spent standing still count too.

    out         folder that outcomes and films are written to as they come. Episodes that it already holds are
                not run again (see `spear.evaluate.journal`), only filmed where a film is wanted and missing.
    shard       run only this part of the scenes.

    Raises SpearError for a folder with results of another policy or of other settings, for an unknown family,
    for seeds that are not held out, for a batch or a replan of none and for a negative latency.
    """
    check_families(families)
    if scenes < 1 or first_seed < 0 or first_seed + scenes > TRAIN_SEED:
        raise SpearError(
            f"scenes {first_seed} … {first_seed + scenes - 1}: held-out seeds are 0 … {TRAIN_SEED - 1}: "
            "choose --scenes and --first-seed within them"
        )
    if batch < 1:
        raise SpearError(f"batch {batch}: run 1 scene or more at once")
    if not 0 <= latency_ms < 1e6:
        raise SpearError(f"latency {latency_ms:g} ms: give 0 or more")
    ChunkExecutor(execution, replan)  # raises for what it cannot do, before anything is written
    delay = math.ceil(latency_ms / 1000 * RATE_HZ - 1e-9)
    settings = {
        "replan": replan,
        "image_size": list(image_size),
        "wrist_size": list(wrist_size),
        "execution": execution,
        "latency_ms": latency_ms,
        "weights": agent.weights,
    }
    renderer = Renderer() if agent.needs_images or films else None
    simulator = _Tabletop(replan, batch, image_size, wrist_size, execution, delay, renderer)
    seeds = range(first_seed, first_seed + scenes)
    return run_evaluation(
        simulator, agent, dict.fromkeys(families, seeds), settings, films, quiet, out, shard
    )


@dataclass(frozen=True)
class _Tabletop:
    """The embedded simulator. A track is the joint positions at each step.

    delay     control steps from an observation to its chunk.
    renderer  None where nothing is rendered.
    """

    replan: int
    batch: int
    image_size: Size
    wrist_size: Size
    execution: Mode
    delay: int
    renderer: Renderer | None
    films_are_free = True

    def run(
        self, agent: Agent, family: str, seeds: Sequence[int], filming: bool
    ) -> Iterator[tuple[Outcome, list[Array]]]:
        """All seeds through a few environments: the outcome and the poses of each episode as it ends."""
        waiting = list(seeds)[::-1]
        slots: list[_Slot] = []
        free = [
            TabletopEnv(family, self.image_size, self.wrist_size, self.renderer, images=agent.needs_images)
            for _ in range(min(self.batch, len(seeds)))
        ]
        while waiting or slots:
            while waiting and free:
                slot = _Slot(free.pop(), waiting.pop(), ChunkExecutor(self.execution, self.replan))
                slot.env.load(World(sample_scene(slot.env.family, slot.seed)))
                slots.append(slot)
            observations = [s.env.observe() if agent.needs_images else {} for s in slots]
            chunks = agent.act([s.env for s in slots], observations)
            running = []
            for slot, chunk in zip(slots, chunks, strict=True):
                slot.chunks.give(chunk, arrives=slot.chunks.tick + self.delay)
                if _execute(slot, filming):
                    yield _outcome(slot), slot.poses
                    free.append(slot.env)
                else:
                    running.append(slot)
            slots = running

    def film(self, outcome: Outcome, track: Sequence[Array]) -> Film:
        """Replays recorded joint positions before larger cameras than the policy's, of the same aspect."""
        assert self.renderer is not None
        world, (width, height) = World(sample_scene(outcome.family, outcome.seed)), self.image_size
        views = [
            ("external", (round(video.HEIGHT * width / height), video.HEIGHT)),
            ("wrist", (video.HEIGHT, video.HEIGHT)),
        ]
        frames = []
        for step, pose in enumerate(track):
            world.data.qpos[:] = pose
            mujoco.mj_forward(world.model, world.data)
            external, wrist = self.renderer.images(world, views)
            ended = step == len(track) - 1
            frames.append(
                video.compose(external, wrist, outcome.instruction, outcome.success if ended else None)
            )
        return Film(outcome, *video.encode(frames, RATE_HZ))


def _execute(slot: _Slot, filming: bool) -> bool:
    """Steps one scene until it is time to look again; True when its episode has ended."""
    data = slot.env.world.data
    while not slot.chunks.wants():
        if filming:
            slot.poses.append(data.qpos.copy())
        slot.info = slot.env.physics_step(slot.chunks.next())
        slot.unreachable += slot.info["unreachable"]
        if slot.info["success"] or slot.env.steps >= MAX_STEPS:
            if filming:
                slot.poses.append(data.qpos.copy())
            return True
    return False


def _outcome(slot: _Slot) -> Outcome:
    info = slot.info
    return Outcome(
        family=slot.env.family,
        seed=slot.seed,
        instruction=slot.env.world.spec.instruction,
        success=bool(info["success"]),
        reached=bool(info["reached"]),
        grasped=bool(info["grasped"]),
        wrong_object_moved=bool(info["wrong_object_moved"]),
        unreachable=slot.unreachable,
        steps=slot.env.steps,
    )
