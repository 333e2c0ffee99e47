"""A camera sends the same picture while the arm moves."""

from typing import ClassVar

import numpy as np

from spear.checks.frozen import mark_frozen_steps
from spear.checks.rollout.camera_checks import CAMERA_FILE, draw_pictures
from spear.checks.rollout.case import (
    Case,
    Finding,
    Result,
    RolloutCheck,
    compute_confidence_of_margin,
)

MIN_MOTION_M = 0.01  # a picture that stays the same over a longer motion is repeated
# Share of the moving steps whose picture is the very same as before. A camera's noise makes it 0,
# and pictures of the simulator without noise, too.
MIN_FROZEN_SHARE = 0.25
CERTAIN_FROZEN_SHARE = 0.6
MIN_MOVING_STEPS = 8


class CameraFrozenCheck(RolloutCheck):
    """Finds a camera whose pictures stay the very same."""

    fault = "camera-frozen"
    title = "a camera sends the same picture again and again"
    causes: ClassVar[frozenset[str]] = frozenset({"camera-late"})

    def examine(self, case: Case) -> Result:
        for camera in case.rollout_cameras:
            num_moving = 0
            num_same = 0
            for episode in case.rollout:
                if camera not in episode.pictures:
                    continue
                distance_m = np.linalg.norm(np.diff(episode.position, axis=0), axis=1)
                is_moving = distance_m > MIN_MOTION_M
                fingerprint = episode.pictures[camera].fingerprint.tolist()
                is_frozen = mark_frozen_steps(fingerprint, episode.position, MIN_MOTION_M)
                num_moving += int(is_moving.sum())
                num_same += int((is_moving & is_frozen[1:]).sum())
            if num_moving < MIN_MOVING_STEPS:
                continue
            share = num_same / num_moving
            if share >= MIN_FROZEN_SHARE:
                return Finding(
                    confidence=compute_confidence_of_margin(
                        share, MIN_FROZEN_SHARE, CERTAIN_FROZEN_SHARE
                    ),
                    evidence=(
                        f"camera {camera} sends the very same picture in {num_same} of "
                        f"{num_moving} steps in which the arm moves"
                    ),
                    cure="restart the camera, and read a new picture for every observation",
                    file=CAMERA_FILE,
                    figure=draw_pictures(case, camera),
                    camera=camera,
                )
        return None
