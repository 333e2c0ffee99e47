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
    compute_confidence_of_margin,
)
from spear.types import Array

MIN_EPISODES = 5  # demonstrations; with fewer their starts are no measure
# Starts are outside if they are farther from those of training than any of these is from the other
# ones, plus a margin: a robot resets to within a centimeter, or some degrees, of its start.
MARGIN_M = 0.01
CERTAIN_BEYOND_M = 0.07  # beyond the margin
MARGIN_RAD = np.radians(10)
CERTAIN_BEYOND_RAD = np.radians(30)  # beyond the margin
MARGIN_EPISODES = 10
"""With this many demonstrations, the margin is as large as the largest distance between their
starts; with ten times as many, a tenth of it. A few scattered starts say little about how far away
the next one may be."""
NEAR_PATH_M = 0.02  # from a later state of training
NEAR_PATH_RAD = np.radians(10)
MAX_PATH_CONFIDENCE = 0.7  # of a start from where training passes later: it may well be learned


class StartOutsideCheck(RolloutCheck):
    """Finds start poses that are far from all start poses of training."""

    fault = "start-outside"
    title = "the robot starts outside what the policy has learned"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        demonstrations = case.demonstrations
        if len(demonstrations) < MIN_EPISODES:
            return Doubt("too few demonstrations to know the usual starts")
        positions = np.stack([np.asarray(e.position[0], np.float64) for e in demonstrations])
        rotations = np.stack([np.asarray(e.rotation[0], np.float64) for e in demonstrations])
        usual_m = []
        usual_rad = []
        for index in range(len(demonstrations)):
            usual_m.append(
                _measure_nearest_distance_m(positions[index], np.delete(positions, index, axis=0))
            )
            usual_rad.append(
                _measure_nearest_angle_rad(rotations[index], np.delete(rotations, index, axis=0))
            )
        # A wrong order of the quaternion is another fault. It must not hide where the arm starts.
        rollout = case.rollout_with_corrected_states
        starts_m = [_measure_nearest_distance_m(e.position[0], positions) for e in rollout]
        starts_rad = [_measure_nearest_angle_rad(e.rotation[0], rotations) for e in rollout]
        extra_m = float(np.median(starts_m)) - max(usual_m)
        extra_rad = float(np.median(starts_rad)) - max(usual_rad)
        margin_share = MARGIN_EPISODES / len(demonstrations)
        margin_m = max(MARGIN_M, margin_share * max(usual_m))
        margin_rad = max(MARGIN_RAD, margin_share * max(usual_rad))
        if extra_m < margin_m and extra_rad < margin_rad:
            return None
        confidence = max(
            compute_confidence_of_margin(extra_m, margin_m, margin_m + CERTAIN_BEYOND_M),
            compute_confidence_of_margin(extra_rad, margin_rad, margin_rad + CERTAIN_BEYOND_RAD),
        )
        if self._are_starts_on_training_path(case):
            confidence = min(confidence, MAX_PATH_CONFIDENCE)
        return Finding(
            confidence=confidence,
            evidence=(
                f"the starts are {np.median(starts_m):.2f} m and "
                f"{np.degrees(np.median(starts_rad)):.0f}° from the nearest start of training; "
                f"these are at most {max(usual_m):.2f} m and {np.degrees(max(usual_rad)):.0f}° "
                "from each other's nearest"
            ),
            cure="move the arm to a start of the demonstrations, or record some from this start",
            file="the reset of your robot",
            figure=_draw_starts(case, positions),
        )

    @staticmethod
    def _are_starts_on_training_path(case: Case) -> bool:
        """Return whether most starts are near states through which training passes later."""
        # All states of training: [N, 3] m, and quaternions [N, 4]
        positions = np.concatenate(
            [np.asarray(e.position, np.float64) for e in case.demonstrations]
        )
        rotations = np.concatenate(
            [np.asarray(e.rotation, np.float64) for e in case.demonstrations]
        )
        num_near = 0
        for episode in case.rollout_with_corrected_states:
            distances_m = np.linalg.norm(positions - np.asarray(episode.position[0]), axis=1)
            is_near = distances_m < NEAR_PATH_M
            if is_near.any():
                angle_rad = _measure_nearest_angle_rad(episode.rotation[0], rotations[is_near])
                num_near += angle_rad < NEAR_PATH_RAD
        return num_near > len(case.rollout_with_corrected_states) / 2


def _measure_nearest_distance_m(position: Array, references: Array) -> float:
    """Return the distance from a position [3] to the nearest of `references` [N, 3], m."""
    return float(np.linalg.norm(references - position, axis=1).min())


def _measure_nearest_angle_rad(rotation: Array, references: Array) -> float:
    """Return the angle from an orientation [4] to the nearest of `references` [N, 4], rad."""
    cosine = np.abs(references @ np.asarray(rotation, np.float64)).max()
    return float(2 * np.arccos(min(cosine, 1.0)))


def _draw_starts(case: Case, training_starts: Array) -> Figure:
    """Draw x, y and z of the start of each episode, and the range of training.

    training_starts: [N, 3] the starts of training, m.
    """
    curves = []
    for axis, name in enumerate("xyz"):
        starts = np.array([episode.position[0][axis] for episode in case.rollout])
        episodes = np.arange(len(starts))
        curves.append(Curve(f"{name} of the start", episodes, starts))
        low, high = np.quantile(training_starts[:, axis], [0.01, 0.99])
        curves.append(Curve(f"{name} of training, low", episodes, np.full(len(starts), low)))
        curves.append(Curve(f"{name} of training, high", episodes, np.full(len(starts), high)))
    return Figure("start positions, m", "episode of the rollout", curves)
