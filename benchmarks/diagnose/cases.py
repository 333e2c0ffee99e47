"""The runs of the bench: clean ones, single faults and pairs of faults, each with its scenes.

All scenes have seeds from 7000 to 8999, which are held out from training, and which nobody should
use to set a threshold of `spear diagnose`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fault_table import STRENGTHS, Planting
from robot import EPISODE_DISTANCE_S, FIRST_START_S, ClientHabits, Robot
from spear.sim.scene import FAMILIES, sample_scene

Kind = Literal["clean", "single", "pair"]

FIRST_CLEAN_SEED = 7000
FIRST_FAULTY_SEED = 8300
END_SEED = 9000
NUM_SEEDS_PER_RUN = 4
FIRST_PAIR_NUMBER = 500
"""Number of the first pair. Runs of single faults have smaller numbers."""
PAIR_STREAM = 105  # first number of the random seed from which pairs are drawn
CASE_DISTANCE_S = 3600.0  # between the starts of two runs

FAULTS_BY_PLACE: Mapping[str, Sequence[str]] = {
    "command": (
        "action-frame",
        "action-sign",
        "translation-unit",
        "angle-unit",
        "quaternion-order",
        "controller-short",
    ),
    "gripper": ("gripper-inverted", "gripper-late", "gripper-scale"),
    "camera": (
        "cameras-exchanged",
        "camera-mirrored",
        "camera-turned",
        "camera-cropped",
        "camera-stretched",
        "camera-bgr",
        "camera-exposure",
        "camera-frozen",
        "camera-late",
        "camera-missing",
        "padding-bars",
    ),
    "time": ("control-rate", "latency", "actions-repeated", "actions-dropped"),
    "task": ("unseen-instruction", "start-outside", "object-not-in-view"),
    "policy": ("wrong-statistics", "ignores-words"),
}
"""Places of faults. A pair has faults of two places, so that neither hides the other."""
HIDING_PAIRS = (("unseen-instruction", "ignores-words"),)
"""Pairs of which one fault hides the other: a policy that ignores words meets no unseen ones."""


@dataclass(frozen=True)
class Case:
    """A run of the bench: a rollout of one policy, with the faults that it should be accused of.

    name      names the run's folder.
    kind      whether the run has no fault, one or two.
    plants    the faults.
    scenes    (task family, seed) of each episode.
    habits    how the robot's program works apart from its faults.
    number    the number of the run in its kind.
    """

    name: str
    kind: Kind
    plants: tuple[Planting, ...]
    scenes: tuple[tuple[str, int], ...]
    habits: ClientHabits
    number: int

    @property
    def faults(self) -> list[str]:
        """The names of the faults."""
        return [plant.fault for plant in self.plants]

    @property
    def policy_fault(self) -> Planting | None:
        """The fault that the policy's folder has; None for the shipped policy."""
        for plant in self.plants:
            if plant.is_of_policy:
                return plant
        return None

    def make_robots(self, first_client: int) -> list[Robot]:
        """Make the robot of each episode."""
        robots = []
        for index, (family, seed) in enumerate(self.scenes):
            start_s = FIRST_START_S + CASE_DISTANCE_S * self.number + EPISODE_DISTANCE_S * index
            robot = Robot(
                sample_scene(family, seed),
                [plant.make() for plant in self.plants],
                self.habits,
                client=first_client + index,
                start_s=start_s,
                seed=seed,
            )
            robots.append(robot)
        return robots


@dataclass(frozen=True)
class Plan:
    """Which runs there are. The number of a run determines its scenes.

    clean_runs         numbers of the clean runs.
    repetitions        numbers of the runs of each strength of each fault.
    pairs              numbers of the pairs of faults, one run each.
    has_all_strengths  whether every strength of a fault is planted; otherwise one, which the
                       number of the repetition chooses.
    num_scenes         number of episodes of a run.
    """

    clean_runs: range
    repetitions: range
    pairs: range
    has_all_strengths: bool = True
    num_scenes: int = 4


def list_cases(plan: Plan) -> list[Case]:
    """List the runs of a plan."""
    cases = []
    for number in plan.clean_runs:
        scenes = _choose_scenes(FIRST_CLEAN_SEED, FIRST_FAULTY_SEED, number, plan.num_scenes)
        habits = _draw_habits(number)
        cases.append(Case(f"clean-{number:03d}", "clean", (), scenes, habits, number))

    plantings = list_plantings()
    for repetition in plan.repetitions:
        for index, planting in enumerate(plantings):
            num_strengths = len(STRENGTHS[planting.fault])
            if not plan.has_all_strengths and planting.strength != repetition % num_strengths:
                continue
            number = repetition * len(plantings) + index
            cases.append(
                _make_faulty_case("single", (planting,), repetition, number, plan.num_scenes)
            )
    for index, pair in enumerate(draw_pairs(plan.pairs.stop)):
        if index in plan.pairs:
            number = FIRST_PAIR_NUMBER + index
            cases.append(_make_faulty_case("pair", pair, 0, number, plan.num_scenes))
    return cases


def _make_faulty_case(
    kind: Kind, plants: tuple[Planting, ...], repetition: int, number: int, num_scenes: int
) -> Case:
    """Make the run of a number, with one or two faults. The number determines its scenes."""
    scenes = _choose_scenes(FIRST_FAULTY_SEED, END_SEED, number, num_scenes)
    name = "+".join([kind, *map(str, plants), str(repetition)])
    return Case(name, kind, plants, scenes, ClientHabits(), number)


def list_plantings() -> list[Planting]:
    """List all strengths of all faults."""
    plantings = []
    for fault, strengths in STRENGTHS.items():
        plantings += [Planting(fault, strength) for strength in range(len(strengths))]
    return plantings


def draw_pairs(count: int) -> list[tuple[Planting, ...]]:
    """Draw pairs of faults of different places; no pair of kinds twice."""
    rng = np.random.default_rng(PAIR_STREAM)
    place_names = list(FAULTS_BY_PLACE)
    pairs: dict[tuple[str, ...], tuple[Planting, ...]] = {}
    while len(pairs) < count:
        first_place, second_place = sorted(rng.choice(len(place_names), 2, replace=False))
        plants = []
        for place_name in (place_names[first_place], place_names[second_place]):
            fault = str(rng.choice(list(FAULTS_BY_PLACE[place_name])))
            plants.append(Planting(fault, int(rng.integers(len(STRENGTHS[fault])))))
        names = tuple(plant.fault for plant in plants)
        if names not in HIDING_PAIRS:
            pairs.setdefault(names, tuple(plants))
    return list(pairs.values())


def _choose_scenes(
    first_seed: int, end_seed: int, number: int, num_scenes: int
) -> tuple[tuple[str, int], ...]:
    """Choose the scenes of a run: task families in turn, and seeds of no run with another number.

    With more runs than there are seeds, seeds are used again with other task families.
    """
    scenes = []
    for index in range(num_scenes):
        count = number * NUM_SEEDS_PER_RUN + index
        turn, offset = divmod(count, end_seed - first_seed)
        family = FAMILIES[(index + turn) % len(FAMILIES)]
        scenes.append((family, first_seed + offset))
    return tuple(scenes)


def _draw_habits(number: int) -> ClientHabits:
    """Draw how the robot's program of a clean run works, because correct programs differ, too."""
    rng = np.random.default_rng([PAIR_STREAM, number])
    return ClientHabits(
        replan_interval=int(rng.choice([1, 1, 1, 2])),
        image_scale=int(rng.choice([1, 1, 2])),
        jpeg_quality=(None, None, 95, 85)[int(rng.integers(4))],
        inference_s=float(rng.choice([0.015, 0.03, 0.08])),
    )
