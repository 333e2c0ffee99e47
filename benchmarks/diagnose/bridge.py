"""The bench of planted faults on real episodes of BridgeData V2, which no simulator made.

    spear train nano-post --init nano --episodes bridge_v2_sample --split "train[:19]" \\
        --out runs/bridge
    python benchmarks/diagnose/bridge.py bridge_v2_sample --policy runs/bridge --out runs/real

The six held-out episodes become recordings, in which the recorded actions stand for the policy's
answers. A fault of the cameras changes the pictures, and a fault of the robot's program changes
the states: they become those to which the changed actions lead. The pictures stay where the real
arm was, so faults of commands are planted less completely than in the simulator.

A clean run, and each run with a fault, has four of the six episodes. To try a changed check, give
other episodes than the six, such as

    python benchmarks/diagnose/bridge.py bridge_v2_sample --policy runs/bridge --out runs/tried \\
        --train-split "train[:13]" --held-out-split "train[13:19]"
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy.spatial.transform import Rotation
from tyro.conf import Positional

from bench import Subject, diagnose_cases, read_results, start_workers
from cases import Case, list_plantings
from fault_table import Planting
from planted import PlantedFault
from robot import MAX_RECORDING_BYTES, ClientHabits
from score import summarize, write_table
from spear import embodiments
from spear.cli import run_reporting_errors
from spear.data.actions import extract_chunk_up_to_unknown, with_canonical_actions
from spear.data.readers.formats import read_episodes
from spear.data.store.episode_store import append_episodes
from spear.errors import SpearError
from spear.evaluate.open_loop import build_observations
from spear.policy import Spear1Policy
from spear.serve.exchange import Exchange
from spear.serve.recorder import RecordingWriter, write_or_check_marker
from spear.serve.service import Service
from spear.types import CONTROL_RATE_HZ, Array, Episode

EPISODES_PER_RUN = 4
FIRST_START_S = 1_780_000_000.0
EPISODE_DISTANCE_S = 120.0
INFERENCE_S = 0.03
FAULTS = (
    "action-frame",
    "action-sign",
    "translation-unit",
    "angle-unit",
    "quaternion-order",
    "euler-order",
    "gripper-inverted",
    "gripper-scale",
    "gripper-late",
    "controller-short",
    "camera-mirrored",
    "camera-turned",
    "camera-cropped",
    "camera-bgr",
    "camera-exposure",
    "camera-frozen",
    "camera-late",
    "camera-missing",
)
"""The faults that can be planted in recorded episodes of one camera."""


@dataclass(frozen=True)
class ArmResponse:
    """How an arm follows its commands.

    In a step it moves by `share` of the command, and by `carry` of its motion in the step before.
    """

    share: float = 1.0
    carry: float = 0.0


@dataclass
class Options:
    """Measure `spear diagnose` on planted faults in real episodes."""

    data: Positional[Path]
    """Dataset of real episodes"""
    policy: Path
    """Policy that was trained on its first 19 episodes"""
    out: Path
    """Folder of recordings and results"""
    train_split: str = "train[:19]"
    """Episodes that `spear diagnose` gets as those of the training"""
    held_out_split: str = "train[19:]"
    """Episodes in which faults are planted"""
    num_runs: int = 1
    """Runs of each strength of each fault"""
    first_run: int = 0
    """Number of the first run of each strength; runs of other numbers have other episodes"""
    workers: int = 2
    """Processes that diagnose"""


def list_bridge_cases(num_episodes: int, repetitions: range) -> list[tuple[Case, tuple[int, ...]]]:
    """List the runs, each with the numbers of its episodes.

    Args:
        num_episodes: how many held-out episodes there are.
        repetitions: numbers of the runs of each strength of each fault.
    """
    choices = list(itertools.combinations(range(num_episodes), EPISODES_PER_RUN))
    cases = []
    for number, episodes in enumerate(choices):
        cases.append((_make_case("clean", (), number), episodes))
    plantings = list_plantings()
    for repetition in repetitions:
        for index, plant in enumerate(plantings):
            number = repetition * len(plantings) + index
            is_of_wrist = plant.settings.get("camera") == "wrist"
            if plant.fault in FAULTS and not is_of_wrist:
                case = _make_case("single", (plant,), number)
                cases.append((case, choices[number % len(choices)]))
    return cases


def _make_case(kind: str, plants: tuple[Planting, ...], number: int) -> Case:
    name = "+".join([kind, *map(str, plants), str(number)])
    assert kind in ("clean", "single")
    return Case(name, "single" if plants else "clean", plants, (), ClientHabits(), number)


# --- Recordings of real episodes ---


def record_case(
    case: Case,
    episodes: Sequence[Episode],
    service: Service,
    out: Path,
    response: ArmResponse = ArmResponse(),
) -> None:
    """Record the episodes of a run, with its faults, as a server would have.

    Args:
        case: the run.
        episodes: its episodes, without faults.
        service: the policy for which the recorded actions stand.
        out: the folder of the bench.
        response: how the arm follows its commands.
    """
    session_folder = out / "rollouts" / case.name
    shutil.rmtree(session_folder, ignore_errors=True)
    session_folder.mkdir(parents=True)
    write_or_check_marker(session_folder, {})
    writer = RecordingWriter(session_folder, service.metadata, MAX_RECORDING_BYTES)
    for index, episode in enumerate(episodes):
        fault = case.plants[0].make() if case.plants else PlantedFault()
        start_s = FIRST_START_S + 3600 * case.number + EPISODE_DISTANCE_S * index
        for exchange in make_exchanges(episode, fault, index, start_s, response):
            writer.add(exchange)
    writer.end_all()
    (out / "outcomes").mkdir(exist_ok=True)
    outcome = json.dumps({"successes": 0, "episodes": len(episodes)})
    (out / "outcomes" / f"{case.name}.json").write_text(outcome, "utf-8")


def make_exchanges(
    episode: Episode, fault: PlantedFault, client: int, start_s: float, response: ArmResponse
) -> list[Exchange]:
    """Make what a server would have recorded of an episode with a fault."""
    assert episode.action is not None
    assert episode.action_mask is not None
    observations = build_observations(episode, ["external"])
    states = np.stack([observation["observation/state"] for observation in observations])
    moved_states = move_states(states, episode.action, fault, response)
    robot = embodiments.load("generic")
    exchanges = []
    for step, observation in enumerate(observations):
        observation = {**observation, "observation/state": moved_states[step]}
        chunk, _ = extract_chunk_up_to_unknown(episode.action, episode.action_mask, step)
        arrival_s = start_s + step / CONTROL_RATE_HZ
        exchange = Exchange(
            client=client,
            address="127.0.0.1:40000",
            arrival_s=arrival_s,
            answer_s=arrival_s + INFERENCE_S,
            inference_s=INFERENCE_S,
            observation=robot.read(fault.change_observation(observation)),
            actions=np.asarray(chunk, np.float32),
            rows=np.asarray(chunk, np.float32),
            num_bytes=0,
        )
        exchanges.append(exchange)
    return exchanges


def move_states(
    states: Array,
    actions: Array,
    fault: PlantedFault,
    response: ArmResponse = ArmResponse(),
) -> Array:
    """Return the states [T, 8] to which the faulty execution of actions [T, 8] would have led.

    What the fault changes is added to each recorded motion, so that without a fault the states are
    the recorded ones.
    """
    rng = np.random.default_rng(0)
    moved = [np.asarray(states[0], np.float64)]
    motion_change_m = np.zeros(3)
    turn_change_rad = np.zeros(3)
    last_command = 1.0  # of the gripper
    for step in range(len(states) - 1):
        state = np.asarray(states[step], np.float64)
        next_state = np.asarray(states[step + 1], np.float64)
        action = np.asarray(actions[step], np.float64)
        executed = fault.change_action(actions[step].astype(np.float32), moved[-1])
        if fault.count_executions(rng) == 0:
            executed = np.array([0, 0, 0, 1, 0, 0, 0, last_command], np.float32)
        executed = np.asarray(executed, np.float64)
        last_command = float(executed[7])

        command_change_m = executed[:3] - action[:3]
        motion_change_m = response.share * command_change_m + response.carry * motion_change_m
        position = moved[-1][:3] + next_state[:3] - state[:3] + motion_change_m

        command_turn = _read_rotation(executed) * _read_rotation(action).inv()
        command_turn_rad = command_turn.as_rotvec()
        turn_change_rad = response.share * command_turn_rad + response.carry * turn_change_rad
        recorded_turn = _read_rotation(state).inv() * _read_rotation(next_state)
        turn = Rotation.from_rotvec(turn_change_rad) * recorded_turn
        rotation = _read_rotation(moved[-1]) * turn

        opening = np.clip(next_state[7] + executed[7] - action[7], 0, 1)
        quaternion = rotation.as_quat(canonical=True, scalar_first=True)
        moved.append(np.concatenate([position, quaternion, [opening]]))
    return np.asarray(moved, np.float32)


def _read_rotation(vector: Array) -> Rotation:
    """Read the rotation of an action or a state [8]."""
    return Rotation.from_quat(vector[3:7], scalar_first=True)


def diagnose_recorded(cases: Sequence[Case], subject: Subject, out: Path, workers: int) -> None:
    """Diagnose the recorded runs, and write the table."""
    results_file = out / "results.jsonl"
    with (
        start_workers(workers) as executor,
        results_file.open("w", encoding="utf-8") as file,
    ):
        jobs = [(case, subject) for case in cases]
        for result in diagnose_cases(jobs, out, executor):
            file.write(json.dumps(result) + "\n")
            file.flush()
            named = ", ".join(result["named"]) or result["verdict"]
            print(f"{result['name']}: {named}", flush=True)
    write_table(summarize(read_results(results_file)), out / "diagnose.csv")


def main(options: Options) -> None:
    """Record the runs, diagnose them, and write the table."""
    if not options.data.is_dir():
        raise SpearError(f"{options.data} does not exist. Give BridgeData's test episodes.")
    out = options.out
    if not (out / "episodes").is_dir():
        append_episodes(read_episodes(options.data, options.train_split), out / "episodes")
    episodes = read_episodes(options.data, options.held_out_split)
    held_out = [with_canonical_actions(episode) for episode in episodes]
    policy = Spear1Policy.load(options.policy)
    service = Service(policy, embodiments.load("generic"), name="bridge")

    cases = []
    repetitions = range(options.first_run, options.first_run + options.num_runs)
    for case, numbers in list_bridge_cases(len(held_out), repetitions):
        record_case(case, [held_out[number] for number in numbers], service, out)
        cases.append(case)
    subject = Subject(str(policy.folder), out / "episodes")
    diagnose_recorded(cases, subject, out, options.workers)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: main(tyro.cli(Options))))
