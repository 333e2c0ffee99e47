"""The states that a robot means, if it sends them in another form.

What a picture should show depends on the state. So pictures are compared with the states that are
meant: with the right order of a quaternion or of angles, and with the right sense and scale of the
gripper's opening.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.gripper import GripperUse
from spear.checks.rollout.motion import STATES, RolloutMotion
from spear.checks.rollout.orientation import (
    EULER_VARIANTS,
    QUATERNION_VARIANTS,
    find_likely_variant,
    fit_orientations,
    undo_variant,
)


def correct_orientations_and_openings(
    rollout: Sequence[RecordedEpisode],
    demonstrations: Sequence[RecordedEpisode],
    motion: RolloutMotion,
    gripper: GripperUse,
) -> list[RecordedEpisode]:
    """Return the episodes of a rollout with the states that are meant."""
    variant = _find_orientation_variant(rollout, demonstrations, motion)
    episodes = []
    for episode in rollout:
        rotation = episode.rotation
        if variant is not None:
            rotation = undo_variant(rotation, variant)
        opening = np.asarray(episode.opening)
        if gripper.is_state_inverted:
            opening = 1 - opening
        elif gripper.is_state_scaled:
            opening = np.clip(opening / gripper.open_ratio_to_training, 0, 1)
        episodes.append(replace(episode, rotation=rotation, opening=opening))
    return episodes


def _find_orientation_variant(
    rollout: Sequence[RecordedEpisode],
    demonstrations: Sequence[RecordedEpisode],
    motion: RolloutMotion,
) -> str | None:
    """Return the variant in which orientations are sent; None if they are sent as they are meant.

    The moves tell it, or else the orientations of training.
    """
    reading = motion.better_turn_reading
    if reading is not None and reading.startswith(STATES):
        return reading.removeprefix(STATES).strip()
    fits = fit_orientations(rollout, demonstrations)
    fit = find_likely_variant(fits, (*QUATERNION_VARIANTS, *EULER_VARIANTS))
    return None if fit is None else fit.variant
