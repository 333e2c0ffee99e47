"""How often `spear diagnose` names planted faults, and how often it accuses faultless robots.

    python benchmarks/diagnose/bench.py --out runs/diagnose
    python benchmarks/diagnose/bench.py --out runs/diagnose --quick
    python benchmarks/diagnose/bench.py --out runs/diagnose --only camera-bgr clean

`nano` acts in the embedded simulator, with faults planted between the policy and the robot
(`faults.toml`), and each run is recorded as `spear serve --record` does. Then `spear diagnose`
looks at the policy, at training episodes, and at the recording. OUT gets these:

    episodes/        the training episodes
    policies/        policies with a fault
    rollouts/        a folder of recordings for each run
    findings/        what `spear diagnose` wrote about each run
    results.jsonl    a line for each run
    diagnose.csv     the table

Recordings and results that are there are not made again, so the command may be interrupted. To
diagnose all recordings again, remove `findings` and `results.jsonl`. The same run may differ in
its last digits, because the policy answers several robots together.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro

from cases import Case, list_cases
from fault_table import Planting
from plant_policies import (
    POLICY_CHANGES,
    copy_policy,
    select_demonstrations,
    train_on_few,
)
from robot import Recording, Robot, record
from score import summarize, write_table
from spear.cli import main as run_command
from spear.cli import run_reporting_errors
from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.policy import Spear1Policy
from spear.sim.record import record_episodes
from spear.sim.scene import FAMILIES
from spear.util.held_out import FIRST_TRAIN_SEED

POLICY = "nano"
NUM_TRAINING_EPISODES = 400
FIRST_EPISODE_SEED = FIRST_TRAIN_SEED + 50_000
NUM_RECORDED_TOGETHER = 6  # runs
QUICK_CLEAN_RUNS = 20
QUICK_PAIRS = 10


@dataclass
class Options:
    """Measure `spear diagnose` on planted faults."""

    out: Path
    """Folder of recordings and results"""
    only: tuple[str, ...] = ()
    """Run only these faults; clean is the runs without a fault"""
    num_scenes: int = 4
    """Episodes of each run"""
    num_clean: int = 320
    """Clean runs"""
    num_pairs: int = 60
    """Pairs of faults"""
    num_runs: int = 2
    """Runs of each strength of each fault"""
    quick: bool = False
    """Make one run of each strength, 20 clean runs and 10 pairs"""
    workers: int = 2
    """Processes that diagnose"""
    record_only: bool = False
    """Record the rollouts, and do not diagnose them"""


# --- Recordings ---


def record_training_episodes(folder: Path, workers: int) -> None:
    """Record demonstrations of all task families, unless they are there."""
    if folder.is_dir():
        return
    tasks = [
        (FAMILIES[index % len(FAMILIES)], FIRST_EPISODE_SEED + index)
        for index in range(NUM_TRAINING_EPISODES)
    ]
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    image_sizes = {"external": (192, 128), "wrist": (96, 96)}
    write_episodes(record_episodes(tasks, image_sizes, workers), temporary)
    temporary.rename(folder)


@dataclass(frozen=True)
class Subject:
    """What a run is about: the policy, a name or a folder, and its training episodes."""

    policy: str
    episodes: Path


def prepare_subject(plant: Planting | None, out: Path) -> Subject:
    """Return the policy of a run: the shipped one, or one that has a fault, which is made now."""
    episodes = out / "episodes"
    if plant is None:
        return Subject(POLICY, episodes)
    folder = out / "policies" / str(plant)
    if plant.is_trained:
        few_episodes = out / "policies" / f"{plant}-episodes"
        select_demonstrations(episodes, few_episodes, plant.settings["num_demonstrations"])
        episodes = few_episodes
    if not folder.is_dir():
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        if plant.is_trained:
            train_on_few(temporary, out / "episodes", **plant.settings)
        else:
            copy_policy(POLICY, temporary)
            POLICY_CHANGES[plant.fault](temporary, **plant.settings)
        temporary.rename(folder)
    return Subject(str(folder), episodes)


def record_cases(cases: Sequence[Case], out: Path) -> None:
    """Record the rollouts that are not there yet, those of one policy together.

    Policies that have to be trained come last.
    """
    cases_of_policy: dict[Planting | None, list[Case]] = {}
    for case in cases:
        if not (out / "rollouts" / case.name).is_dir():
            cases_of_policy.setdefault(case.policy_fault, []).append(case)
    is_trained = {plant: plant is not None and plant.is_trained for plant in cases_of_policy}
    for plant in sorted(cases_of_policy, key=is_trained.__getitem__):
        subject = prepare_subject(plant, out)
        policy = Spear1Policy.load(subject.policy)
        for first in range(0, len(cases_of_policy[plant]), NUM_RECORDED_TOGETHER):
            group = cases_of_policy[plant][first : first + NUM_RECORDED_TOGETHER]
            _record_group(policy, Path(subject.policy).name, group, out)
            print(f"recorded {', '.join(case.name for case in group)}", flush=True)


def _record_group(policy: Spear1Policy, name: str, cases: Sequence[Case], out: Path) -> None:
    """Record the rollouts of several runs at once. A folder appears when it is complete."""
    recordings = []
    robots: list[Robot] = []
    for case in cases:
        case_robots = case.make_robots(first_client=len(robots))
        robots += case_robots
        temporary = out / "rollouts" / f".{case.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        recordings.append(Recording(temporary, case_robots))
    record(policy, recordings, name)
    for case, recording in zip(cases, recordings, strict=True):
        num_successes = sum(robot.is_successful for robot in recording.robots)
        outcome = {"successes": num_successes, "episodes": len(recording.robots)}
        (out / "outcomes").mkdir(exist_ok=True)
        (out / "outcomes" / f"{case.name}.json").write_text(json.dumps(outcome), "utf-8")
        recording.folder.rename(recording.folder.with_name(case.name))


# --- Diagnoses ---


def diagnose_case(case: Case, subject: Subject, out: Path) -> dict[str, Any]:
    """Run `spear diagnose` on a run's recording, and return the run's result."""
    findings_file = out / "findings" / f"{case.name}.json"
    rollout = out / "rollouts" / case.name
    arguments = ["diagnose", "--policy", subject.policy, "--episodes", str(subject.episodes)]
    arguments += ["--rollout", str(rollout), "--json", str(findings_file)]
    started_s = time.perf_counter()
    started_processor_s = time.process_time()
    with redirect_stdout(StringIO()):
        exit_code = run_command(arguments)
    seconds = time.perf_counter() - started_s
    processor_s = time.process_time() - started_processor_s

    result: dict[str, Any] = {"verdict": "error", "findings": []}
    if findings_file.is_file():
        result = json.loads(findings_file.read_text("utf-8"))
    store = EpisodeStore(rollout)
    rollout_s = float((store.lengths / store.rates_hz).sum())
    outcome = json.loads((out / "outcomes" / f"{case.name}.json").read_text("utf-8"))
    return {
        "name": case.name,
        "kind": case.kind,
        "faults": case.faults,
        "strengths": [plant.strength for plant in case.plants],
        "verdict": result["verdict"],
        "named": [finding["fault"] for finding in result["findings"]],
        "exit_code": exit_code,
        "seconds": round(seconds, 2),
        "processor_s": round(processor_s, 2),
        "rollout_s": round(rollout_s, 1),
        **outcome,
    }


def diagnose_cases(
    jobs: Sequence[tuple[Case, Subject]], out: Path, workers: int
) -> Iterator[dict[str, Any]]:
    """Diagnose runs in processes, each with an equal part of two cores; yield their results."""
    (out / "findings").mkdir(exist_ok=True)
    num_threads = max(1, 2 // workers)
    with ProcessPoolExecutor(
        workers, get_context("spawn"), torch.set_num_threads, (num_threads,)
    ) as executor:
        futures = [executor.submit(diagnose_case, case, subject, out) for case, subject in jobs]
        for future in futures:
            yield future.result()


def read_results(file: Path) -> list[dict[str, Any]]:
    """Read the results so far."""
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def select_cases(options: Options) -> list[Case]:
    """List the runs that the options ask for."""
    if options.quick:
        cases = list_cases(QUICK_CLEAN_RUNS, 1, QUICK_PAIRS, options.num_scenes)
    else:
        cases = list_cases(
            options.num_clean, options.num_runs, options.num_pairs, options.num_scenes
        )
    if not options.only:
        return cases
    return [case for case in cases if {case.kind, *case.faults} & set(options.only)]


def main(options: Options) -> None:
    """Record the rollouts, diagnose them, and write the table."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    record_training_episodes(out / "episodes", options.workers)
    cases = select_cases(options)
    record_cases(cases, out)
    if options.record_only:
        return

    results_file = out / "results.jsonl"
    finished_names = {result["name"] for result in read_results(results_file)}
    open_cases = [case for case in cases if case.name not in finished_names]
    jobs = [(case, prepare_subject(case.policy_fault, out)) for case in open_cases]
    with results_file.open("a", encoding="utf-8") as file:
        for result in diagnose_cases(jobs, out, options.workers):
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{result['name']}: {', '.join(result['named']) or result['verdict']}")
    rows = summarize(read_results(results_file))
    write_table(rows, out / "diagnose.csv")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: main(tyro.cli(Options))))
