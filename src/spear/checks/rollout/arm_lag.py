"""An arm that follows its commands over several steps, as soft or slow controllers do.

In each step the arm moves by a share of the command, and carries on a part of its last motion. Both
are fitted to the demonstrations. With them, the motions of a rollout become those of an arm that
follows at once, which is what the checks of motion expect.

The thresholds are chosen on demonstrations of SIMPLER and of the embedded simulator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from spear.checks.rollout.episode import RecordedEpisode
from spear.geometry import quat_canonical, quat_conjugate, quat_log, quat_multiply
from spear.types import Array

MIN_LAG_STEPS = 50  # of the demonstrations; with fewer, no lag is fitted
MIN_CARRY = 0.15  # of the last motion; an arm that carries on less follows at once (SIMPLER: 0.42)
MIN_SHARE = 0.3  # of the command; dividing by less would mostly enlarge noise (SIMPLER: 0.58)
MAX_UNEXPLAINED = 0.25  # share of the training's motion that a lag may leave unexplained


@dataclass(frozen=True)
class Lag:
    """How a motion follows its commands.

    share  part of a command that is executed in its step.
    carry  part of the last step's motion that is executed again.
    """

    share: float = 1.0
    carry: float = 0.0

    def remove(self, motions: Array) -> Array:
        """Return the motions [T, 3] of an episode as those of an arm that follows at once."""
        last_motions = np.concatenate([np.zeros((1, 3)), motions[:-1]])
        return (motions - self.carry * last_motions) / self.share


@dataclass(frozen=True)
class ArmLag:
    """The lags of an arm's translations and rotations."""

    translation: Lag = Lag()
    rotation: Lag = Lag()


NO_LAG = ArmLag()
"""An arm that follows its commands at once."""


def fit_arm_lag(demonstrations: Sequence[RecordedEpisode]) -> ArmLag:
    """Fit the lags to demonstrations. Without enough of them, the arm follows at once."""
    commands: list[Array] = []  # [T, 6] of each episode: translation (m), rotation vector (rad)
    motions: list[Array] = []
    last_motions: list[Array] = []
    for episode in demonstrations:
        if len(episode) < 3:
            continue
        action = np.asarray(episode.action, np.float64)
        turn_commands = quat_log(quat_canonical(torch.as_tensor(action[:, 3:7])))
        command = np.concatenate([action[:, :3], turn_commands.numpy()], axis=1)
        motion = np.concatenate([measure_displacements(episode), measure_turns(episode)], axis=1)
        is_known = episode.is_known[1:-1]
        commands.append(command[1:-1][is_known])
        motions.append(motion[1:][is_known])
        last_motions.append(motion[:-1][is_known])
    if sum(map(len, motions)) < MIN_LAG_STEPS:
        return NO_LAG
    joined = [np.concatenate(values) for values in (commands, last_motions, motions)]
    return ArmLag(
        translation=_fit_lag(*(values[:, :3] for values in joined)),
        rotation=_fit_lag(*(values[:, 3:] for values in joined)),
    )


def measure_displacements(episode: RecordedEpisode) -> Array:
    """Return the displacements [T - 1, 3] between the steps of an episode, base frame, m."""
    return np.diff(np.asarray(episode.position, np.float64), axis=0)


def measure_turns(episode: RecordedEpisode) -> Array:
    """Return the rotation vectors [T - 1, 3] between the steps, end-effector frame, rad."""
    orientation = torch.as_tensor(np.asarray(episode.rotation, np.float64))
    turns = quat_multiply(quat_conjugate(orientation[:-1]), orientation[1:])
    return quat_log(quat_canonical(turns)).numpy()


def _fit_lag(commands: Array, last_motions: Array, motions: Array) -> Lag:
    """Fit a lag to N steps [N, 3]. An arm that no lag explains is taken to follow at once."""
    causes = np.stack([commands.ravel(), last_motions.ravel()], axis=1)
    (share, carry), *_ = np.linalg.lstsq(causes, motions.ravel())
    unexplained = motions - share * commands - carry * last_motions
    unexplained_share = np.abs(unexplained).sum() / max(np.abs(motions).sum(), 1e-9)
    is_lagging = carry > MIN_CARRY and share > MIN_SHARE
    if not is_lagging or unexplained_share > MAX_UNEXPLAINED:
        return Lag()
    return Lag(float(share), float(carry))
