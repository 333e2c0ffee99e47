"""Figures of the gripper."""

import numpy as np

from spear.checks.rollout.case import Case, Curve, Figure

MAX_CURVE_STEPS = 150  # that the figure shows


def draw_gripper(case: Case) -> Figure:
    """Draw commands and openings of the rollout, one episode after the other."""
    openings = np.concatenate([episode.opening for episode in case.rollout])[:MAX_CURVE_STEPS]
    commands = np.concatenate([episode.action[:, 7] for episode in case.rollout])
    steps = np.arange(len(openings))
    return Figure(
        "gripper: 1 is open, 0 is closed",
        "step",
        [
            Curve("commanded", steps, commands[:MAX_CURVE_STEPS]),
            Curve("measured", steps, openings),
        ],
    )
