"""The robot starts where no training episode has been."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.case import (
    Case,
    Curve,
    Doubt,
    Figure,
    Finding,
    Material,
    Result,
    RolloutCheck,
    confidence_of_margin,
)
from spear.types import Array

MIN_EPISODES = 5  # demonstrations; with fewer their starts are no measure
MARGIN_M = 0.05  # a start is outside if it is farther from all training states than any start of
# training is from the other episodes, plus this margin
CERTAIN_MARGIN_M = 0.15
MARGIN_RAD = np.radians(25)  # the same for orientations
CERTAIN_MARGIN_RAD = np.radians(60)


class StartOutsideCheck(RolloutCheck):
    """Finds start poses that are far from all poses of training."""

    fault = "start-outside"
    title = "the robot starts outside what the policy has learned"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        demonstrations = case.demonstrations
        if len(demonstrations) < MIN_EPISODES:
            return Doubt("too few demonstrations to know the usual starts")
        positions = [np.asarray(e.position, np.float64) for e in demonstrations]
        rotations = [np.asarray(e.rotation, np.float64) for e in demonstrations]
        usual_m = []
        usual_rad = []
        for index in range(len(demonstrations)):
            other_positions = np.concatenate(positions[:index] + positions[index + 1 :])
            other_rotations = np.concatenate(rotations[:index] + rotations[index + 1 :])
            usual_m.append(_distance_m(positions[index][0], other_positions))
            usual_rad.append(_angle_rad(rotations[index][0], other_rotations))
        all_positions = np.concatenate(positions)
        all_rotations = np.concatenate(rotations)
        starts_m = [_distance_m(e.position[0], all_positions) for e in case.rollout]
        starts_rad = [_angle_rad(e.rotation[0], all_rotations) for e in case.rollout]
        extra_m = float(np.median(starts_m)) - max(usual_m)
        extra_rad = float(np.median(starts_rad)) - max(usual_rad)
        confidence = max(
            confidence_of_margin(extra_m, MARGIN_M, CERTAIN_MARGIN_M),
            confidence_of_margin(extra_rad, MARGIN_RAD, CERTAIN_MARGIN_RAD),
        )
        if extra_m < MARGIN_M and extra_rad < MARGIN_RAD:
            return None
        return Finding(
            confidence=confidence,
            evidence=(
                f"the starts are {np.median(starts_m):.2f} m and "
                f"{np.degrees(np.median(starts_rad)):.0f}° from the nearest state of training; "
                f"training starts at most {max(usual_m):.2f} m and "
                f"{np.degrees(max(usual_rad)):.0f}° from other episodes"
            ),
            cure="move the arm to a start of the demonstrations, or record some from this start",
            file="the reset of your robot",
            figure=_draw_starts(case, all_positions),
        )


def _distance_m(position: Array, references: Array) -> float:
    return float(np.linalg.norm(references - position, axis=1).min())


def _angle_rad(rotation: Array, references: Array) -> float:
    cosine = np.abs(references @ np.asarray(rotation, np.float64)).max()
    return float(2 * np.arccos(min(cosine, 1.0)))


def _draw_starts(case: Case, trained: Array) -> Figure:
    """Draw x and y of the start of each episode, and the range of training."""
    curves = []
    for axis, name in enumerate("xyz"):
        starts = np.array([episode.position[0][axis] for episode in case.rollout])
        episodes = np.arange(len(starts))
        curves.append(Curve(f"{name} of the start", episodes, starts))
        low, high = np.quantile(trained[:, axis], [0.01, 0.99])
        curves.append(Curve(f"{name} of training, low", episodes, np.full(len(starts), low)))
        curves.append(Curve(f"{name} of training, high", episodes, np.full(len(starts), high)))
    return Figure("start positions, m", "episode of the rollout", curves)
