"""Does what a plan says. Killed at any moment, it goes on; started several times, they share the work.

OUT/stages/RECIPE-KEY/   a training: log, TensorBoard events, `final` (checkpoints only while it runs)
OUT/scores/KEY/          the journal of a policy's episodes
OUT/locks/               who works on what
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from experiments.ablations.plan import Data, Plan, Scoring, Training, Weights
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError, format_count
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import Results, find_journals, merge_results, read_journal
from spear.train.options import TrainingInputs
from spear.util.run_lock import hold_lock

Job = Training | Scoring


def final(out: Path, training: Training) -> Path:
    """Where a training's result lies."""
    return out / "stages" / training.folder / "final"


def scored(out: Path, scoring: Scoring) -> Results | None:
    """The episodes of a scoring once all have ended, those of its scenes and families only; None before."""
    if not (found := find_journals(out / "scores" / scoring.before.key)):
        return None
    whole = merge_results([read_journal(path) for path in found])
    outcomes = [
        o for o in whole.outcomes if o.seed < scoring.scenes and o.family in scoring.families
    ]
    if len(outcomes) < scoring.episodes:
        return None
    return Results(whole.policy, whole.settings, outcomes, whole.seconds)


def done(out: Path, job: Job) -> bool:
    """Whether nothing is left to do for it."""
    if isinstance(job, Scoring):
        return scored(out, job) is not None
    return (final(out, job) / "recipe.json").is_file()


def left(plan: Plan, out: Path) -> list[Job]:
    """What there is still to do, in order. Nothing is trained for policies that are scored."""
    wanted: set[str] = set()
    for scoring in plan.jobs:
        job: Job | None = scoring if isinstance(scoring, Scoring) else None
        while job is not None and job.key not in wanted and not done(out, job):
            wanted.add(job.key)
            job = job.before
    return [job for job in plan.jobs if job.key in wanted]


def run(
    plan: Plan,
    out: Path,
    data: Data,
    workers: int = 1,
    say: Callable[[str], None] = print,
    on_score: Callable[[], object] = lambda: None,
) -> list[str]:
    """Trains and scores until all is done, here or in other processes with the same `out`.

    workers   processes that prepare batches, per training.
    on_score  called after each scoring of this process.

    Returns what was skipped, with the reasons: a training that failed, which stops no other row.
    """
    waiting = left(plan, out)
    failed: dict[str, str] = {}
    while True:
        for job in waiting:
            if job.before is not None and job.before.key in failed:
                failed[job.key] = failed[job.before.key]
        waiting = [job for job in waiting if job.key not in failed and not done(out, job)]
        if not waiting:
            return list(dict.fromkeys(failed.values()))
        for job in waiting:
            if job.before is not None and not done(out, job.before):
                continue
            with hold_lock(out / "locks" / job.key) as ours:
                if not ours or done(out, job):
                    continue
                try:
                    if isinstance(job, Scoring):
                        _score(job, out, say)
                        on_score()
                    else:
                        _train(job, out, data, workers, say)
                except SpearError as error:
                    failed[job.key] = f"{job.key}: {error}"
            break
        else:
            time.sleep(5)  # until another process has finished something


def _score(job: Scoring, out: Path, say: Callable[[str], None]) -> None:
    from spear.evaluate.agents import load_agent  # here: a plan does without PyTorch
    from spear.evaluate.closed_loop import evaluate_tabletop

    policy = job.before
    say(
        f"scoring {policy.folder}, seed {policy.seed}, {format_count(job.scenes, 'scenes')} per family"
    )
    agent = load_agent(str(final(out, policy)), device="cpu")
    agent.name = policy.folder  # the folder may be moved
    journal, families = out / "scores" / policy.key, tuple(job.families)
    evaluate_tabletop(agent, TabletopOptions(job.scenes, out=journal, families=families))


def _train(job: Training, out: Path, data: Data, workers: int, say: Callable[[str], None]) -> None:
    from spear.train.loop import RunOptions
    from spear.train.run import train

    say(f"training {job.folder}, seed {job.seed}, {format_count(job.steps, 'steps')}")
    init = job.init.folder if isinstance(job.init, Weights) else None
    if job.before is not None:
        init = final(out, job.before)
    robots = [("sim", EpisodeStore(data.episodes), 1.0)] if job.recipe.kind == "vla" else []
    asks = job.recipe.kind != "vla" or job.recipe.question_images or init is None
    inputs = TrainingInputs(
        [data.labels] if asks else [], robots, init, job.moge.folder if job.moge else None
    )
    folder = out / "stages" / job.folder
    train(job.recipe, folder, inputs, RunOptions(job.seed, workers if job.steps else 0))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
