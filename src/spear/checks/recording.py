"""One recorded episode as numbers, which the checks and the audit compare with each other."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from spear.gripper import observed_openings
from spear.types import Array, Episode

MAX_ANGLE_RAD = 2.1 * np.pi  # a larger angle goes beyond a whole turn, so its unit is degrees


@dataclass(frozen=True)
class Recording:
    """What the audit needs of one episode of T steps, as its dataset has it.

    position     [T, 3] end-effector position, base frame.
    rotation     [T, d] its orientation, written in whatever way.
    translation  [T, 3] logged translations, or None.
    turn         [T, d] logged rotations, or None.
    valid        [T] bool, False where the action is none (the last step of derived actions,
                 disturbances).
    rate_hz      steps per second.
    opening, command   [T] of the gripper, measured and commanded, 0 closed … 1 open, or None.
    """

    source: str
    position: Array
    rotation: Array
    translation: Array | None
    turn: Array | None
    valid: Array
    rate_hz: float
    opening: Array | None = None
    command: Array | None = None

    @classmethod
    def from_episode(cls, episode: Episode) -> Self:
        """The recording of an episode with canonical actions, as a store keeps it."""
        assert episode.action is not None
        action = np.asarray(episode.action, np.float64)
        opening = np.asarray(episode.gripper, np.float64)
        valid = np.ones(len(episode), bool)
        if episode.action_mask is not None:
            valid = np.asarray(episode.action_mask, bool)
        return cls(
            source=episode.source,
            position=np.asarray(episode.position, np.float64),
            rotation=np.asarray(episode.rotation, np.float64),
            translation=action[:, :3],
            turn=action[:, 3:7],
            valid=valid,
            rate_hz=episode.rate_hz,
            opening=observed_openings(opening, action[:, 7]),
            command=action[:, 7],
        )


def are_degrees(rotation: Array) -> bool:
    """Whether recorded orientations [T, d] are angles in degrees: they go beyond a whole turn."""
    if rotation.shape[1] != 3:
        return False
    return bool(np.abs(rotation).max(initial=0) > MAX_ANGLE_RAD)
