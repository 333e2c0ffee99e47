"""Pictures have black bars that those of training do not have."""

from typing import ClassVar

from spear.checks.rollout.bars import BarShares, collect_small_pictures, find_extra_bars
from spear.checks.rollout.camera_checks import CAMERA_FILE, draw_rollout_and_training_pictures
from spear.checks.rollout.case import Case, Doubt, Finding, Material, Result, RolloutCheck


class PaddingBarsCheck(RolloutCheck):
    """Finds black bars at the borders of a camera's pictures."""

    fault = "padding-bars"
    title = "pictures have black bars"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})
    causes: ClassVar[frozenset[str]] = frozenset(
        {"camera-exposure", "camera-stretched", "camera-cropped"}
    )

    def examine(self, case: Case) -> Result:
        num_compared = 0
        extra_by_camera: dict[str, BarShares] = {}
        for camera in case.rollout_cameras:
            if collect_small_pictures(case.rollout, camera) and collect_small_pictures(
                case.demonstrations, camera
            ):
                num_compared += 1
            extra_shares = find_extra_bars(case, camera)
            if extra_shares is not None:
                extra_by_camera[camera] = extra_shares
        if not extra_by_camera:
            return None if num_compared else Doubt("no training pictures to compare with")

        camera, extra_shares = next(iter(extra_by_camera.items()))
        are_at_sides = extra_shares.of_width > extra_shares.of_height
        sides = "left and right" if are_at_sides else "top and bottom"
        extra_share = max(extra_shares)
        return Finding(
            confidence=0.96,
            evidence=(
                f"camera {camera} has black bars at {sides}, {extra_share:.0%} of the "
                "picture; training has none there"
            ),
            cure="send pictures without bars, in the aspect of training",
            file=CAMERA_FILE,
            figure=draw_rollout_and_training_pictures(case, camera),
            camera=camera if len(extra_by_camera) == 1 else None,
        )
