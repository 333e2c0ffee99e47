"""Does the arm go to targets that are turned, mirrored or scaled?

A robot that takes absolute poses, in the wrong frame or unit, goes towards points that are far from
those that were commanded. Its controller cuts each move short, so that its displacements have
nothing to do with the commanded displacements, but their directions lead to those points.

Thresholds are chosen on robots that fail in this way, and on rollouts of nano in the simulator.
"""

from typing import NamedTuple

import numpy as np

from spear.checks.rollout.motion import MIN_MOVES, RolloutMotion
from spear.types import Array

MIN_ACHIEVED_M = 0.01  # shorter moves have no reliable direction
MIN_COSINE = 0.95  # between a move and the direction to a point, if the arm goes towards the point
MIN_SHARE = 0.4  # share of moves that must lead to the changed targets
MAX_PLAIN_SHARE = 0.1  # share that may lead to the commanded ones; nano without faults: 0.98 to 1

TURNED = {
    "turned by 90° about the vertical axis of the base": ((0, -1, 0), (1, 0, 0), (0, 0, 1)),
    "turned by 180° about the vertical axis of the base": ((-1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "turned by -90° about the vertical axis of the base": ((0, 1, 0), (-1, 0, 0), (0, 0, 1)),
    "with the sign of x reversed": ((-1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "with the sign of y reversed": ((1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "with the sign of z reversed": ((1, 0, 0), (0, 1, 0), (0, 0, -1)),
    "with x and y exchanged": ((0, 1, 0), (1, 0, 0), (0, 0, 1)),
}
"""What may have happened to a target → the matrix that does it, of positions in the base frame."""

SCALES = {
    "1000 times too near to the base": 0.001,
    "10 times too near to the base": 0.1,
    "10 times too far from the base": 10.0,
    "1000 times too far from the base": 1000.0,
}
"""What may have happened to the unit of a target → the factor that does it."""


class ChangedTargets(NamedTuple):
    """Points that are not the commanded ones, to which the arm goes.

    change       what happened to the targets, a key of `TURNED` or `SCALES`.
    share        share of the moves that lead to the changed targets.
    plain_share  share of the moves that lead to the commanded ones.
    num_moves    how many moves were compared.
    """

    change: str
    share: float
    plain_share: float
    num_moves: int


def find_changed_targets(motion: RolloutMotion) -> ChangedTargets | None:
    """Find what happened to the targets, if the arm goes to others than the commanded ones."""
    is_long = np.linalg.norm(motion.achieved, axis=1) > MIN_ACHIEVED_M
    if is_long.sum() < MIN_MOVES:
        return None
    targets = motion.position + motion.commanded_displacement
    plain_share = _measure_share_towards(targets, motion, is_long)
    if plain_share > MAX_PLAIN_SHARE:
        return None

    shares = {}
    for change, matrix in TURNED.items():
        shares[change] = _measure_share_towards(targets @ np.array(matrix).T, motion, is_long)
    for change, scale in SCALES.items():
        shares[change] = _measure_share_towards(scale * targets, motion, is_long)
    best = max(shares, key=lambda change: shares[change])
    if shares[best] < MIN_SHARE:
        return None
    return ChangedTargets(best, shares[best], plain_share, int(is_long.sum()))


def _measure_share_towards(points: Array, motion: RolloutMotion, is_compared: Array) -> float:
    """Return the share of the compared moves that lead towards the points [N, 3]."""
    directions = points - motion.position
    lengths = np.linalg.norm(directions, axis=1) * np.linalg.norm(motion.achieved, axis=1)
    cosines = (directions * motion.achieved).sum(1) / np.maximum(lengths, 1e-9)
    return float((cosines[is_compared] > MIN_COSINE).mean())
