"""A camera of training is missing, or shows nothing."""

from typing import ClassVar

from spear.checks.cameras import are_blank
from spear.checks.rollout.camera_checks import CAMERA_FILE, draw_rollout_and_training_pictures
from spear.checks.rollout.case import Case, Finding, Material, Result, RolloutCheck

MIN_BLANK_SHARE = 0.5  # share of the steps without content


class CameraMissingCheck(RolloutCheck):
    """Finds cameras that the policy has learned to use and that the robot does not send."""

    fault = "camera-missing"
    title = "a camera of training is missing"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})
    causes: ClassVar[frozenset[str]] = frozenset(
        {
            "camera-exposure",
            "camera-frozen",
            "camera-bgr",
            "camera-cropped",
            "camera-mirrored",
            "camera-stretched",
            "camera-turned",
            "cameras-exchanged",
            "object-not-in-view",
        }
    )

    def examine(self, case: Case) -> Result:
        for camera in case.comparison.training_cameras:
            num_steps = 0
            num_blank = 0
            for episode in case.rollout:
                num_steps += len(episode)
                if camera not in episode.pictures:
                    num_blank += len(episode)
                    continue
                num_blank += int(are_blank(episode.pictures[camera].small).sum())
            if num_blank < MIN_BLANK_SHARE * num_steps:
                continue
            return Finding(
                confidence=0.98,
                evidence=(
                    f"camera {camera} is missing or blank in {num_blank} of {num_steps} steps; all "
                    "training episodes have it"
                ),
                cure=f"connect the camera and send its pictures as {camera}",
                file=CAMERA_FILE,
                figure=draw_rollout_and_training_pictures(case, camera),
                camera=camera,
            )
        return None
