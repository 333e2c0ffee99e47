"""Closed loop: a policy acts in many simulated scenes at once, each until success or time out."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mujoco
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spear.chunks import REPLAN, ChunkExecutor, Mode
from spear.errors import SpearError, unknown_name
from spear.evaluate import video
from spear.evaluate.actors import Actor
from spear.evaluate.journal import WHOLE, Journal, Shard
from spear.evaluate.results import SCENES, Outcome, Results
from spear.sim.env import MAX_STEPS, RATE_HZ, TabletopEnv
from spear.sim.render import Renderer, Size
from spear.sim.scene import FAMILIES, TRAIN_SEED, sample_scene
from spear.sim.world import World
from spear.types import Array


@dataclass(frozen=True)
class Film:
    """The film of one episode. data: the bytes of a file of MIME type `mime`."""

    outcome: Outcome
    data: bytes
    mime: str

    def save(self, folder: Path) -> None:
        """Writes the film under its episode's name, whole or not at all."""
        path = folder / f"{self.outcome.film_name}.{self.mime.removeprefix('video/')}"
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(self.data)
        temporary.replace(path)


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
    actor: Actor,
    families: Sequence[str] = FAMILIES,
    scenes: int = SCENES,
    first_seed: int = 0,
    replan: int = REPLAN,
    batch: int = 32,
    image_size: Size = (280, 210),
    wrist_size: Size = (112, 112),
    films: int | Literal["failures"] = 0,
    quiet: bool = False,
    execution: Mode = "sync",
    latency_ms: float = 0.0,
    out: Path | None = None,
    shard: Shard = WHOLE,
) -> tuple[Results, list[Film]]:
    """Success on the held-out scenes first_seed … first_seed + scenes - 1 of each family.

    replan      actions of each predicted chunk that are executed before looking again: fewer reacts sooner and costs
                more inferences.
    batch       scenes that run at once: their observations go through the policy together, and all share one
                renderer. A scene that ends makes room for the next seed.
    image_size, wrist_size  (width, height) of the cameras, in pixels.
    films       films to make per family: of so many successes and as many failures, lowest seeds first; or of all
                failures.
    execution   what happens to chunks, see `spear.chunks`.
    latency_ms  simulated time from an observation to its chunk. The control loop takes a chunk up at its next
                step, so it counts in whole steps of 200 ms, rounded up; steps spent standing still count too.

    out         folder that outcomes and films are written to as they come. Episodes that it already holds are not
                run again (see `spear.evaluate.journal`), only filmed where a film is wanted and missing.
    shard       run only this part of the scenes.

    Raises SpearError for a folder with results of another policy or of other settings, for an unknown family, for
    seeds that are not held out, for a batch of none and for a negative latency.
    """
    for family in families:
        if family not in FAMILIES:
            raise unknown_name("task family", family, FAMILIES)
    if scenes < 1 or first_seed < 0 or first_seed + scenes > TRAIN_SEED:
        raise SpearError(
            f"scenes {first_seed} … {first_seed + scenes - 1}: held-out seeds are 0 … {TRAIN_SEED - 1}: "
            "choose --scenes and --first-seed within them"
        )
    if batch < 1:
        raise SpearError(f"batch {batch}: run 1 scene or more at once")
    if not 0 <= latency_ms < 1e6:
        raise SpearError(f"latency {latency_ms:g} ms: give 0 or more")
    delay = math.ceil(latency_ms / 1000 * RATE_HZ - 1e-9)
    settings = {
        "replan": replan,
        "image_size": list(image_size),
        "wrist_size": list(wrist_size),
        "execution": execution,
        "latency_ms": latency_ms,
        "weights": actor.weights,
    }
    journal = Journal(out, actor.name, settings, shard) if out else None
    started = last = time.perf_counter()
    renderer = Renderer() if actor.needs_images or films else None
    seeds = range(first_seed + shard.index - 1, first_seed + scenes, shard.of)
    outcomes: list[Outcome] = []
    kept: list[Film] = []
    with _progress(quiet) as bar:
        for family in families:
            row = bar.add_task(family, total=len(seeds), info="")
            begun = time.perf_counter()
            envs = [
                TabletopEnv(family, image_size, wrist_size, renderer, images=actor.needs_images)
                for _ in range(min(batch, len(seeds)))
            ]
            done = {s: journal.done[family, s] for s in seeds if journal and (family, s) in journal.done}
            poses: dict[int, list[Array]] = {}
            todo = [s for s in seeds if s not in done]
            for outcome, track in _run(actor, envs, todo, replan, bool(films), execution, delay):
                done[outcome.seed], poses[outcome.seed] = outcome, track
                if journal:
                    now = time.perf_counter()
                    journal.add(outcome, now - last)
                    last = now
                rate = len(poses) / (time.perf_counter() - begun)
                wins = sum(o.success for o in done.values())
                bar.update(row, completed=len(done), info=f"{wins} succeeded, {rate:.1f} scenes/s")
            ended = [done[s] for s in seeds]
            outcomes += ended
            wanted = [o for o in _to_film(ended, films) if not (out and video.film_file(out, o.film_name))]
            again = [o.seed for o in wanted if o.seed not in poses]
            for outcome, track in _run(actor, envs, again, replan, True, execution, delay):
                if outcome == done[outcome.seed]:
                    poses[outcome.seed] = track
            for outcome in wanted:
                if outcome.seed in poses:
                    assert renderer is not None
                    kept.append(_film(outcome, poses[outcome.seed], image_size, renderer))
                    if out:
                        kept[-1].save(out)
    return Results(actor.name, settings, outcomes, time.perf_counter() - started), kept


def _to_film(ended: Sequence[Outcome], films: int | Literal["failures"]) -> list[Outcome]:
    """The episodes of a family that are to be filmed."""
    failures = [o for o in ended if not o.success]
    if films == "failures":
        return failures
    return [o for o in ended if o.success][:films] + failures[:films]


def _run(
    actor: Actor,
    envs: Sequence[TabletopEnv],
    seeds: Sequence[int],
    replan: int,
    filming: bool,
    execution: Mode,
    delay: int,
) -> Iterator[tuple[Outcome, list[Array]]]:
    """All seeds through the given environments: the outcome and the poses of each episode as it ends.

    delay: control steps from an observation to its chunk.
    """
    waiting = list(seeds)[::-1]
    slots: list[_Slot] = []
    free = list(envs)
    while waiting or slots:
        while waiting and free:
            slot = _Slot(free.pop(), waiting.pop(), ChunkExecutor(execution, replan))
            slot.env.load(World(sample_scene(slot.env.family, slot.seed)))
            slots.append(slot)
        observations = [s.env.observe() if actor.needs_images else {} for s in slots]
        chunks = actor.act([s.env for s in slots], observations)
        running = []
        for slot, chunk in zip(slots, chunks, strict=True):
            slot.chunks.give(chunk, arrives=slot.chunks.tick + delay)
            if _execute(slot, filming):
                yield _outcome(slot), slot.poses
                free.append(slot.env)
            else:
                running.append(slot)
        slots = running


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


def _film(outcome: Outcome, poses: Sequence[Array], image_size: Size, renderer: Renderer) -> Film:
    """Replays recorded joint positions before larger cameras than the policy's, of the same aspect."""
    world, (width, height) = World(sample_scene(outcome.family, outcome.seed)), image_size
    views = [
        ("external", (round(video.HEIGHT * width / height), video.HEIGHT)),
        ("wrist", (video.HEIGHT, video.HEIGHT)),
    ]
    frames = []
    for step, pose in enumerate(poses):
        world.data.qpos[:] = pose
        mujoco.mj_forward(world.model, world.data)
        external, wrist = renderer.images(world, views)
        ended = step == len(poses) - 1
        frames.append(video.compose(external, wrist, outcome.instruction, outcome.success if ended else None))
    return Film(outcome, *video.encode(frames, RATE_HZ))


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=quiet,
    )
