"""`Recording`: the numbers of one recorded episode, which the checks and the audit compare."""

from dataclasses import dataclass
from typing import Self

import numpy as np

from spear.gripper import delay_openings_logged_from_commands
from spear.types import Array, Episode

MAX_ANGLE_RAD = 2.1 * np.pi  # a larger angle goes beyond a whole turn, so its unit is degrees


@dataclass(frozen=True)
class Recording:
    """Recorded states and logged actions of one episode of T steps, as its dataset contains them.

    source       names the episode in messages.
    position     [T, 3] end-effector position, base frame.
    rotation     [T, d] end-effector orientation, in the dataset's rotation format.
    translation  [T, 3] logged translations; None if the dataset has none.
    turn         [T, d] logged rotations, in the dataset's format; None if the dataset has none.
    valid        [T] bool, False where a step has no action (the last step if actions are computed
                 from states) or one that does not lead to the next state (a disturbance).
    rate_hz      steps per second.
    opening      [T] measured gripper opening, 0 closed … 1 open; None if there is none.
    command      [T] commanded gripper opening, 0 closed … 1 open; None if there is none.
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
        """Make the recording of an episode with canonical actions, as an episode store has it."""
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
            opening=delay_openings_logged_from_commands(opening, action[:, 7]),
            command=action[:, 7],
        )


def are_degrees(rotation: Array) -> bool:
    """Return whether recorded orientations [T, d] are angles in degrees.

    Three numbers are angles, and angles in radians do not go beyond a whole turn (2π).
    """
    if rotation.shape[1] != 3:
        return False
    return bool(np.abs(rotation).max(initial=0) > MAX_ANGLE_RAD)
