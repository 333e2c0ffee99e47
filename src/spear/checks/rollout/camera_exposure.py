"""A camera's exposure differs from training."""

from typing import ClassVar

from spear.checks.rollout.camera_checks import find_camera_with_faulty_pictures
from spear.checks.rollout.case import Case, Material, Result, RolloutCheck


class CameraExposureCheck(RolloutCheck):
    """Finds a camera with another exposure."""

    fault = "camera-exposure"
    title = "a camera with another exposure"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        versions = ("exposed",)
        cure = "set exposure and white balance by hand, as in training"
        return find_camera_with_faulty_pictures(
            case, versions, "has another exposure", cure, is_color=True
        )
