"""How long a plan will take, from rates measured on this machine: in logs that are there, or else by a few
steps."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spear.ablations.data import Data
from spear.ablations.plan import POLICY, Plan, Scoring, Training
from spear.ablations.run import Job, done, left
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.evaluate.agents import PolicyAgent
from spear.evaluate.closed_loop import evaluate
from spear.evaluate.journal import journals, read_journal
from spear.evaluate.options import TabletopOptions
from spear.models.spear1 import Spear1ForActionPrediction
from spear.policy import Spear1Policy
from spear.train.build import build
from spear.train.devices import for_device
from spear.train.optimize import Stepper
from spear.train.recipes import RECIPES, Recipe
from spear.train.tasks.vla import VlaTask

STEPS = 4
"""Steps that are timed where no log says how long one takes; one more goes before them."""
TRIAL = 8
"""Scenes that are timed with untrained weights where nothing has been scored: they all run until time is
over, so that the estimate is on the high side."""


@dataclass(frozen=True)
class Rates:
    """steps: seconds per step, by kind of stage (`kind_of`). scene: seconds per scene of one task family."""

    steps: dict[str, float]
    scene: float


def kind_of(recipe: Recipe) -> str:
    """Stages of one kind take equally long per step."""
    frozen = ",".join(recipe.optimization.frozen)
    return f"{recipe.name} {recipe.moge} {recipe.batch_size} {recipe.question_images} {frozen}"


def measure(plan: Plan, out: Path, data: Data, say: Callable[[str], None] = print) -> Rates:
    """Rates of all kinds of stages in a plan, and of scoring."""
    steps: dict[str, float] = {}
    logs: dict[str, list[float]] = {}
    for job in plan.trainings:
        rate = _logged(out / "stages" / job.folder / "log.jsonl")
        if rate:
            logs.setdefault(kind_of(job.recipe), []).append(1 / rate)
    policy = None
    for job in plan.trainings:
        kind = kind_of(job.recipe)
        if kind in logs:
            steps[kind] = statistics.median(logs[kind])
        elif kind not in steps and job.steps:
            say(f"timing {STEPS} steps of {job.recipe.name}")
            steps[kind], last = _timed(job, data)
            policy = last or policy
    return Rates(steps, _scene(plan, out, data, policy, say))


def seconds(job: Job, rates: Rates) -> float:
    """How long one process takes for a training or a scoring, from its beginning."""
    if isinstance(job, Scoring):
        return job.episodes * rates.scene
    return job.steps * rates.steps[kind_of(job.recipe)] if job.steps else 0.0


def steps_for(minutes: float, plan: Plan, rates: Rates) -> int:
    """The budget (steps of the full row's policy) with which one process does a plan in so many minutes.

    plan  with the recipes' own steps. Raises `SpearError` where what has no budget, all that comes before the
          policies and the scoring, takes longer.
    """
    fixed = sum(seconds(job, rates) for job in plan.scorings)
    fixed += sum(seconds(job, rates) for job in plan.trainings if job.recipe.kind != "vla")
    training = sum(seconds(job, rates) for job in plan.trainings if job.recipe.kind == "vla")
    if 60 * minutes <= fixed:
        raise SpearError(
            f"--budget {minutes:g}min: pretraining and scoring alone take {fixed / 60:.0f} minutes: give more"
        )
    return max(1, int((60 * minutes - fixed) / training * RECIPES[POLICY].optimization.steps))


def _logged(log: Path) -> float | None:
    """Steps per second as the last line of a log has them."""
    if not log.is_file() or not (lines := log.read_text().splitlines()):
        return None
    rate: float = json.loads(lines[-1])["steps_per_s"]
    return rate


def _timed(job: Training, data: Data) -> tuple[float, Spear1Policy | None]:
    """Seconds per step of a training from random weights; of a policy's, also the untrained policy."""
    robots = [("sim", EpisodeStore(data.episodes), 1.0)] if job.recipe.kind == "vla" else []
    model, task, _ = build(job.recipe, data.labels, robots)
    stepper = Stepper(task, for_device(job.recipe.optimization, torch.device("cpu")), 0)
    stepper(0, task.batch(0))
    started = time.perf_counter()
    for step in range(1, STEPS + 1):
        stepper(step, task.batch(step))
    took = (time.perf_counter() - started) / STEPS
    if isinstance(task, VlaTask):
        assert isinstance(model, Spear1ForActionPrediction)
        return took, Spear1Policy(model.eval(), task.processor, task.normalizer)
    return took, None


def _scene(
    plan: Plan, out: Path, data: Data, policy: Spear1Policy | None, say: Callable[[str], None]
) -> float:
    """Seconds per scene, from the journals, or else from a trial."""
    found = [read_journal(path) for job in plan.scorings for path in journals(out / "scores" / job.folder)]
    episodes = sum(len(results.outcomes) for results in found)
    if episodes:
        return sum(results.seconds for results in found) / episodes
    say(f"timing {TRIAL} scenes with untrained weights")
    if policy is None:
        policy = _timed(next(job.policy for job in plan.scorings), data)[1]
    assert policy is not None
    results, _ = evaluate(
        PolicyAgent(policy, "untrained", image_sizes=policy.processor.image_sizes),
        TabletopOptions(TRIAL, families=tuple(plan.families[:1])),
        quiet=True,
    )
    return results.seconds / TRIAL


def describe(plan: Plan, out: Path, rates: Rates) -> str:
    """What a plan trains and scores, what of it is done, and how long the rest takes: as text."""
    finished = {id(job) for job in plan.jobs if done(out, job)}
    groups: dict[str, list[Job]] = {}
    for job in plan.trainings:
        groups.setdefault(job.recipe.name, []).append(job)
    groups["scoring"] = [*plan.scorings]
    lines = [f"{'':<14} {'number':>7} {'done':>5} {'steps or episodes each':>24} {'minutes each':>16}"]
    for name, jobs in groups.items():
        sizes = [j.episodes if isinstance(j, Scoring) else j.steps for j in jobs]
        times = [seconds(j, rates) / 60 for j in jobs]
        lines.append(
            f"{name:<14} {len(jobs):7} {sum(id(j) in finished for j in jobs):5} {_span(sizes, ','):>24} "
            f"{_span(times, '.1f'):>16}"
        )
    todo = left(plan, out)
    train = sum(seconds(job, rates) for job in todo if isinstance(job, Training)) / 3600
    score = sum(seconds(job, rates) for job in todo if isinstance(job, Scoring)) / 3600
    rows = sum(len(members) for _, members in plan.tables)
    lines.append(
        f"{rows} rows, {plan.seeds} seeds. Left: {train + score:.1f} hours by one process ({train:.1f} training, "
        f"{score:.1f} scoring) at the rates measured here; several processes share it."
    )
    return "\n".join(lines)


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} … {high}"
