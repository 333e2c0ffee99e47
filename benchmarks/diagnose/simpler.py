"""The bench of planted faults on episodes of SIMPLER, which ManiSkill 3 simulated.

    spear record simpler --first-seed 20000 --num-episodes 13 --out runs/simpler-episodes \\
        --tasks PutCarrotOnPlateInScene-v1 StackGreenCubeOnYellowCubeBakedTexInScene-v1
    spear train nano-post --init nano --episodes runs/simpler-episodes/* --split "train[:6]" \\
        --steps 20 --out runs/simpler
    python benchmarks/diagnose/simpler.py runs/simpler-episodes --policy runs/simpler \\
        --held-out-split "train[9:]" --out runs/diagnose-simpler

As for real episodes (`bridge.py`), held-out demonstrations become recordings, in which the oracle's
actions stand for the policy's answers. Faults change the pictures, the words, and the states. The
arm of SIMPLER lags behind its commands, so the change of a command moves it over several steps, as
the commands of the training episodes do.

A run has two episodes of each task. To try a changed check, give other episodes than those of the
result, such as `--held-out-split "train[6:9]"`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tyro.conf import Positional

from bench import Subject
from bridge import FAULTS, ArmResponse, diagnose_recorded, record_case
from cases import Case, list_plantings
from fault_table import Planting
from planted import Observation, PlantedFault
from robot import ClientHabits
from spear import embodiments
from spear.cli import run_reporting_errors
from spear.data.actions import with_canonical_actions
from spear.data.readers.formats import read_episodes
from spear.data.store.episode_store import append_episodes
from spear.embodiments.observations import PROMPT_KEY
from spear.errors import SpearError
from spear.policy import Spear1Policy
from spear.serve.service import Service
from spear.types import Episode

EPISODES_PER_TASK = 2  # of a run
MORE_FAULTS = ("actions-dropped", "unseen-instruction")
"""Faults that are planted here and not in the ten steps of a real episode."""


@dataclass
class Options:
    """Measure `spear diagnose` on planted faults in episodes of SIMPLER."""

    episodes: Positional[Path]
    """Folder of `spear record simpler`, with a folder for each task"""
    policy: Path
    """Policy that was trained on the first episodes of each task"""
    out: Path
    """Folder of recordings and results"""
    train_split: str = "train[:6]"
    """Episodes of each task that `spear diagnose` gets as those of the training"""
    held_out_split: str = "train[6:]"
    """Episodes of each task in which faults are planted"""
    workers: int = 2
    """Processes that diagnose"""


@dataclass(frozen=True)
class SimplerPlanting(Planting):
    """A fault in recorded episodes, whose words are not those of a scene."""

    def make(self) -> PlantedFault:
        if self.fault != "unseen-instruction":
            return super().make()

        def ask(observation: Observation) -> Observation:
            return {**observation, PROMPT_KEY: self.settings["text"]}

        return PlantedFault(change_observation=ask)


def list_simpler_cases(
    num_episodes: Sequence[int],
) -> list[tuple[Case, tuple[tuple[int, ...], ...]]]:
    """List the runs, each with the numbers of its episodes of each task.

    Args:
        num_episodes: number of held-out episodes of each task.
    """
    choices_by_task = [
        list(itertools.combinations(range(count), EPISODES_PER_TASK)) for count in num_episodes
    ]
    choices = list(itertools.product(*choices_by_task))
    cases = []
    for number, episodes in enumerate(choices):
        case = Case(f"clean-{number}", "clean", (), (), ClientHabits(), number)
        cases.append((case, episodes))
    for number, plant in enumerate(list_simpler_plantings()):
        case = Case(f"single+{plant}", "single", (plant,), (), ClientHabits(), number)
        cases.append((case, choices[number % len(choices)]))
    return cases


def list_simpler_plantings() -> list[SimplerPlanting]:
    """List the faults that can be planted in recorded episodes of SIMPLER's only camera."""
    plantings = []
    for plant in list_plantings():
        is_of_scene = plant.fault == "unseen-instruction" and "text" not in plant.settings
        is_of_wrist = plant.settings.get("camera") == "wrist"
        if plant.fault in (*FAULTS, *MORE_FAULTS) and not is_of_scene and not is_of_wrist:
            plantings.append(SimplerPlanting(plant.fault, plant.strength))
    return plantings


def fit_response(episodes: Sequence[Episode]) -> ArmResponse:
    """Fit how the arm follows its commands, from the motions of episodes along all axes."""
    commands = []
    last_motions = []
    motions = []
    for episode in episodes:
        assert episode.action is not None
        motion_m = np.diff(np.asarray(episode.position, np.float64), axis=0)  # [T - 1, 3]
        commands.append(episode.action[1:-1, :3].ravel())
        last_motions.append(motion_m[:-1].ravel())
        motions.append(motion_m[1:].ravel())
    causes = np.stack([np.concatenate(commands), np.concatenate(last_motions)], axis=1)
    (share, carry), *_ = np.linalg.lstsq(causes, np.concatenate(motions))
    return ArmResponse(share, carry)


def main(options: Options) -> None:
    """Record the runs, diagnose them, and write the table."""
    task_folders = sorted(path for path in options.episodes.iterdir() if path.is_dir())
    if not task_folders:
        raise SpearError(f"{options.episodes} has no episodes. Record some: spear record simpler.")
    out = options.out
    training = []
    held_out = []
    for folder in task_folders:
        training += list(read_episodes(folder, options.train_split))
        held_out_episodes = read_episodes(folder, options.held_out_split)
        held_out.append([with_canonical_actions(episode) for episode in held_out_episodes])
    if not (out / "episodes").is_dir():
        append_episodes(training, out / "episodes")
    response = fit_response(training)
    policy = Spear1Policy.load(options.policy)
    service = Service(policy, embodiments.load("generic"), name="simpler")

    cases = []
    for case, numbers_by_task in list_simpler_cases([len(episodes) for episodes in held_out]):
        chosen: list[Episode] = []
        for episodes, numbers in zip(held_out, numbers_by_task, strict=True):
            chosen += [episodes[number] for number in numbers]
        record_case(case, chosen, service, out, response)
        cases.append(case)
    subject = Subject(str(policy.folder), out / "episodes")
    diagnose_recorded(cases, subject, out, options.workers)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: main(tyro.cli(Options))))
