"""How often `spear diagnose` names planted faults, and how often it accuses faultless robots.

    python benchmarks/diagnose/bench.py --out runs/diagnose
    python benchmarks/diagnose/bench.py --out runs/diagnose --only camera-bgr clean
    python benchmarks/diagnose/bench.py --out runs/diagnose \\
        --one-strength --num-runs 1 --num-clean 40 --num-pairs 10

`nano` acts in the embedded simulator, with faults planted between the policy and the robot
(`faults.toml`), and each run is recorded as `spear serve --record` does. Then the functions of
`spear diagnose` look at the policy, at training episodes, and at the recording. OUT gets these:

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

import functools
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import tyro

from cases import Case, Plan, list_cases
from fault_table import Planting
from plant_policies import (
    POLICY_CHANGES,
    copy_policy,
    select_demonstrations,
    train_on_few,
)
from robot import Recording, Robot, record
from score import summarize, write_table
from spear.cli import run_reporting_errors
from spear.data.store.episode_store import EpisodeStore, append_episodes
from spear.diagnose.diagnosis import diagnose, write_diagnosis_json
from spear.diagnose.load import load_policy_case, with_rollout
from spear.diagnose.policy_case import PolicyCase
from spear.policy import Spear1Policy
from spear.sim.record import record_episodes
from spear.sim.scene import FAMILIES
from spear.util.held_out import FIRST_TRAIN_SEED

POLICY = "nano"
NUM_TRAINING_EPISODES = 400
FIRST_EPISODE_SEED = FIRST_TRAIN_SEED + 50_000
NUM_RECORDED_TOGETHER = 6  # runs


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
    first_clean: int = 0
    """Number of the first clean run; runs of other numbers have other scenes"""
    first_pair: int = 0
    """Number of the first pair"""
    first_run: int = 0
    """Number of the first run of each strength"""
    one_strength: bool = False
    """Plant each fault at one strength only, which the number of the run chooses"""
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
    append_episodes(record_episodes(tasks, image_sizes, workers), temporary)
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


def group_cases(cases: Sequence[Case]) -> list[list[Case]]:
    """Group runs that are recorded together: a few of the same policy.

    Policies that have to be trained come last.
    """
    cases_of_policy: dict[Planting | None, list[Case]] = {}
    for case in cases:
        cases_of_policy.setdefault(case.policy_fault, []).append(case)
    is_trained = {plant: plant is not None and plant.is_trained for plant in cases_of_policy}
    groups = []
    for plant in sorted(cases_of_policy, key=is_trained.__getitem__):
        same_policy = cases_of_policy[plant]
        for first in range(0, len(same_policy), NUM_RECORDED_TOGETHER):
            groups.append(same_policy[first : first + NUM_RECORDED_TOGETHER])
    return groups


def record_cases(cases: Sequence[Case], subject: Subject, out: Path) -> None:
    """Record the runs of one policy that are not recorded yet, all at once."""
    missing = [case for case in cases if not (out / "rollouts" / case.name).is_dir()]
    if missing:
        _record_group(load_policy(subject.policy), Path(subject.policy).name, missing, out)
        print(f"recorded {', '.join(case.name for case in missing)}", flush=True)


@functools.lru_cache(maxsize=1)
def load_policy(name: str) -> Spear1Policy:
    """Load a policy once."""
    return Spear1Policy.load(name)


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


@functools.lru_cache(maxsize=2)
def load_subject(subject: Subject) -> PolicyCase:
    """Load a policy and its training episodes, once for all of its runs."""
    return load_policy_case(subject.policy, subject.episodes)


def diagnose_case(case: Case, subject: Subject, out: Path) -> dict[str, Any]:
    """Diagnose a run as `spear diagnose` does, and return the run's result."""
    policy_case = load_subject(subject)
    rollout = out / "rollouts" / case.name
    started_s = time.perf_counter()
    started_processor_s = time.process_time()
    diagnosis = diagnose(with_rollout(policy_case, rollout))
    seconds = time.perf_counter() - started_s
    processor_s = time.process_time() - started_processor_s

    write_diagnosis_json(diagnosis, out / "findings" / f"{case.name}.json")
    store = EpisodeStore(rollout)
    rollout_s = float((store.lengths / store.rates_hz).sum())
    outcome = json.loads((out / "outcomes" / f"{case.name}.json").read_text("utf-8"))
    return {
        "name": case.name,
        "kind": case.kind,
        "faults": case.faults,
        "strengths": [plant.strength for plant in case.plants],
        "verdict": diagnosis.verdict,
        "named": [ranked.check.fault for ranked in diagnosis.findings],
        "seconds": round(seconds, 2),
        "processor_s": round(processor_s, 2),
        "rollout_s": round(rollout_s, 1),
        **outcome,
    }


def start_workers(count: int) -> ProcessPoolExecutor:
    """Start processes that diagnose, each with an equal part of two cores."""
    num_threads = max(1, min(2, torch.get_num_threads()) // count)
    context = get_context("spawn")
    return ProcessPoolExecutor(count, context, torch.set_num_threads, (num_threads,))


def diagnose_cases(
    jobs: Sequence[tuple[Case, Subject]], out: Path, executor: ProcessPoolExecutor
) -> Iterator[dict[str, Any]]:
    """Diagnose runs in the executor's processes; yield their results in order."""
    (out / "findings").mkdir(exist_ok=True)
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
    plan = Plan(
        clean_runs=range(options.first_clean, options.first_clean + options.num_clean),
        repetitions=range(options.first_run, options.first_run + options.num_runs),
        pairs=range(options.first_pair, options.first_pair + options.num_pairs),
        has_all_strengths=not options.one_strength,
        num_scenes=options.num_scenes,
    )
    cases = list_cases(plan)
    if not options.only:
        return cases
    return [case for case in cases if {case.kind, *case.faults} & set(options.only)]


def main(options: Options) -> None:
    """Record and diagnose the runs, a few at a time, and write the table."""
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    record_training_episodes(out / "episodes", options.workers)
    results_file = out / "results.jsonl"
    finished_names = {result["name"] for result in read_results(results_file)}
    open_cases = [case for case in select_cases(options) if case.name not in finished_names]
    with (
        start_workers(options.workers) as executor,
        results_file.open("a", encoding="utf-8") as file,
    ):
        for group in group_cases(open_cases):
            subject = prepare_subject(group[0].policy_fault, out)
            record_cases(group, subject, out)
            if options.record_only:
                continue
            for result in diagnose_cases([(case, subject) for case in group], out, executor):
                file.write(json.dumps(result) + "\n")
                file.flush()
                named = ", ".join(result["named"]) or result["verdict"]
                print(f"{result['name']}: {named}", flush=True)
    write_table(summarize(read_results(results_file)), out / "diagnose.csv")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: main(tyro.cli(Options))))
