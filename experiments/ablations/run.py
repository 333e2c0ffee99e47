"""Carries out a plan. Killed at any moment, it resumes; started several times, it shares the work.

OUT/stages/RECIPE-KEY/   a training: log, TensorBoard events, `final`; checkpoints while it runs
OUT/scores/KEY/          the journal of a policy's episodes
OUT/locks/               which process works on what
"""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.ablations.plan import Data, Job, Plan, Scoring, Training, Weights
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.errors import SpearError, format_count
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import Results, find_journals, merge_results, read_journal
from spear.train.options import TrainingInputs
from spear.util.run_lock import try_to_hold_lock

POLL_INTERVAL_S = 5


def final_folder(out: Path, training: Training) -> Path:
    """Where a training's result is."""
    return out / "stages" / training.folder / "final"


def load_score(out: Path, scoring: Scoring) -> Results | None:
    """The episodes of a scoring, those of its scenes and families only; None before all have
    ended.
    """
    journals = find_journals(out / "scores" / scoring.previous.key)
    if not journals:
        return None
    results = merge_results([read_journal(path) for path in journals])
    outcomes = []
    for outcome in results.outcomes:
        if outcome.seed < scoring.scenes and outcome.family in scoring.families:
            outcomes.append(outcome)
    if len(outcomes) < scoring.episodes:
        return None
    return Results(results.policy, results.settings, outcomes, results.seconds)


def is_done(out: Path, job: Job) -> bool:
    """Whether nothing is left to do for a job."""
    if isinstance(job, Scoring):
        return load_score(out, job) is not None
    return (final_folder(out, job) / "recipe.json").is_file()


def find_remaining_jobs(plan: Plan, out: Path) -> list[Job]:
    """What there is still to do, in order. Policies that are scored need no training."""
    remaining_keys: set[str] = set()
    for scoring in plan.jobs:
        if not isinstance(scoring, Scoring):
            continue
        job: Job | None = scoring
        while job is not None and job.key not in remaining_keys and not is_done(out, job):
            remaining_keys.add(job.key)
            job = job.previous
    return [job for job in plan.jobs if job.key in remaining_keys]


def run(
    plan: Plan,
    out: Path,
    data: Data,
    workers: int = 1,
    say: Callable[[str], None] = print,
    on_score: Callable[[], object] = lambda: None,
) -> list[str]:
    """Train and score until everything is done, here or in other processes with the same `out`.

    Args:
        plan: What there is to do.
        out: Folder for everything.
        data: What is learned from.
        workers: Processes that prepare batches, per training.
        say: Prints what is being done.
        on_score: Called after each scoring of this process.

    Returns:
        What was skipped, with the reasons: a training that fails stops no other row.
    """
    worker = _Worker(out, data, workers, say, on_score)
    remaining = find_remaining_jobs(plan, out)
    reasons: dict[str, str] = {}  # by the key of a job that failed, or that needs one that failed
    while True:
        _skip_dependent_jobs(remaining, reasons)
        remaining = [job for job in remaining if job.key not in reasons and not is_done(out, job)]
        if not remaining:
            return list(dict.fromkeys(reasons.values()))
        if not worker.do_first_possible(remaining, reasons):
            time.sleep(POLL_INTERVAL_S)  # until another process has finished something


def _skip_dependent_jobs(jobs: Sequence[Job], reasons: dict[str, str]) -> None:
    """Mark the jobs that need a job that failed; the jobs are in order."""
    for job in jobs:
        if job.previous is not None and job.previous.key in reasons:
            reasons[job.key] = reasons[job.previous.key]


@dataclass(frozen=True)
class _Worker:
    """One of the processes that share the work; see `run`."""

    out: Path
    data: Data
    num_loaders: int
    say: Callable[[str], None]
    on_score: Callable[[], object]

    def do_first_possible(self, jobs: Sequence[Job], reasons: dict[str, str]) -> bool:
        """Do the first job that can be done and that no other process does.

        A failure is added to `reasons`. Returns False if there is no such job.
        """
        for job in jobs:
            if job.previous is not None and not is_done(self.out, job.previous):
                continue
            with try_to_hold_lock(self.out / "locks" / job.key) as is_ours:
                if not is_ours or is_done(self.out, job):
                    continue
                try:
                    self._do(job)
                except SpearError as error:
                    reasons[job.key] = f"{job.key}: {error}"
            return True
        return False

    def _do(self, job: Job) -> None:
        if isinstance(job, Scoring):
            self._score(job)
            self.on_score()
        else:
            self._train(job)

    def _score(self, job: Scoring) -> None:
        from spear.evaluate.agents import load_agent  # a plan is printed without PyTorch
        from spear.evaluate.closed_loop import evaluate_tabletop

        policy = job.previous
        num_scenes = format_count(job.scenes, "scenes")
        self.say(f"scoring {policy.folder}, seed {policy.seed}, {num_scenes} per family")
        agent = load_agent(str(final_folder(self.out, policy)), device="cpu")
        agent.name = policy.folder  # the folder may be moved
        journal = self.out / "scores" / policy.key
        options = TabletopOptions(num_scenes=job.scenes, out=journal, tasks=tuple(job.families))
        evaluate_tabletop(agent, options)

    def _train(self, job: Training) -> None:
        from spear.train.loop import RunOptions
        from spear.train.run import train

        self.say(f"training {job.folder}, seed {job.seed}, {format_count(job.steps, 'steps')}")
        folder = self.out / "stages" / job.folder
        options = RunOptions(seed=job.seed, workers=self.num_loaders if job.steps else 0)
        train(job.recipe, folder, self._find_inputs(job), options)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def _find_inputs(self, job: Training) -> TrainingInputs:
        """What a training learns from and begins with."""
        init = None
        if job.previous is not None:
            init = final_folder(self.out, job.previous)
        elif isinstance(job.init, Weights):
            init = job.init.folder
        is_policy = job.recipe.kind == "vla"
        asks_questions = not is_policy or job.recipe.question_images or init is None
        labels = [self.data.labels] if asks_questions else []
        episodes = (
            [WeightedStore("sim", EpisodeStore(self.data.episodes), 1.0)] if is_policy else []
        )
        return TrainingInputs(labels, episodes, init, job.moge.folder if job.moge else None)
