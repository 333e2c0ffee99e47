"""Does what a plan says. Killed at any moment, it goes on; started several times, they share the work.

OUT/stages/RECIPE-KEY/   a training: log, TensorBoard events, `final` (checkpoints only while it runs)
OUT/scores/KEY/          the journal of a policy's episodes
OUT/locks/               who works on what
"""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from spear.ablations.plan import Data, Plan, Scoring, Training, Weights
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.evaluate.agents import load_agent
from spear.evaluate.closed_loop import evaluate
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import Results, journals, merge, read_journal
from spear.train.loop import RunOptions
from spear.train.options import Inputs
from spear.train.run import train
from spear.util.ledger import lock

WAIT = 5.0
"""Seconds between looks at what other processes have finished."""
Job = Training | Scoring


def final(out: Path, training: Training) -> Path:
    """Where a training's result lies."""
    return out / "stages" / training.folder / "final"


def scored(out: Path, scoring: Scoring) -> Results | None:
    """The episodes of a scoring once all have ended, those of its scenes and families only; None before."""
    found = journals(out / "scores" / scoring.policy.key)
    if not found:
        return None
    whole = merge([read_journal(path) for path in found])
    outcomes = [o for o in whole.outcomes if o.seed < scoring.scenes and o.family in scoring.families]
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
    trainings = {t.key: t for t in plan.trainings}
    scorings = [job for job in plan.jobs if isinstance(job, Scoring) and not done(out, job)]
    wanted: set[str] = set()
    for scoring in scorings:
        key: str | None = scoring.policy.key
        while key is not None and key not in wanted and not done(out, trainings[key]):
            wanted.add(key)
            key = next(iter(_needs(trainings[key])), None)
    return [job for job in plan.jobs if (job in scorings if isinstance(job, Scoring) else job.key in wanted)]


def run(
    plan: Plan,
    out: Path,
    data: Data,
    workers: int = 1,
    quiet: bool = False,
    say: Callable[[str], None] = print,
    on_score: Callable[[], object] = lambda: None,
) -> list[str]:
    """Trains and scores until all is done, here or in other processes with the same `out`.

    workers   processes that prepare batches, per training.
    on_score  called after each scoring of this process.

    Returns what was skipped, with the reasons: a training that failed, which stops no other row.
    """
    trainings = {t.key: t for t in plan.trainings}
    waiting = left(plan, out)
    failed: dict[str, str] = {}
    while True:
        for job in waiting:
            lost = next((failed[key] for key in _needs(job) if key in failed), None)
            if lost is not None:
                failed[_name(job)] = lost
        waiting = [job for job in waiting if _name(job) not in failed and not done(out, job)]
        if not waiting:
            return list(dict.fromkeys(failed.values()))
        for job in waiting:
            if not all(done(out, trainings[key]) for key in _needs(job)):
                continue
            with lock(out / "locks" / _name(job)) as ours:
                if not ours or done(out, job):
                    continue
                try:
                    if isinstance(job, Scoring):
                        which = f"{job.policy.folder}, seed {job.policy.seed}"
                        say(f"scoring {which}, {job.scenes} scenes per family")
                        agent = load_agent(str(final(out, job.policy)))
                        agent.name = job.policy.folder  # the folder may be moved
                        journal, families = out / "scores" / job.policy.key, tuple(job.families)
                        evaluate(agent, TabletopOptions(job.scenes, out=journal, families=families), quiet)
                        on_score()
                    else:
                        say(f"training {job.folder}, seed {job.seed}, {job.steps} steps")
                        _train(job, trainings, out, data, workers, quiet)
                except SpearError as error:
                    failed[_name(job)] = f"{_name(job)}: {error}"
            break
        else:
            time.sleep(WAIT)


def _name(job: Job) -> str:
    return f"score-{job.policy.key}" if isinstance(job, Scoring) else job.key


def _needs(job: Job) -> list[str]:
    """The keys of the trainings that come before it."""
    if isinstance(job, Scoring):
        return [job.policy.key]
    return [job.init] if isinstance(job.init, str) else []


def _train(
    job: Training, trainings: Mapping[str, Training], out: Path, data: Data, workers: int, quiet: bool
) -> None:
    folder = out / "stages" / job.folder
    before = None
    if job.init is not None:
        before = job.init.folder if isinstance(job.init, Weights) else final(out, trainings[job.init])
    robots = [("sim", EpisodeStore(data.episodes), 1.0)] if job.recipe.kind == "vla" else []
    inputs = Inputs(data.labels, robots, before, job.moge.folder if job.moge else None)
    train(job.recipe, folder, inputs, RunOptions(job.seed, workers if job.steps else 0, quiet=quiet))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
