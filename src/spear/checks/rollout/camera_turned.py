"""A camera's pictures are turned."""

from typing import ClassVar

from spear.checks.rollout.camera_checks import find_camera_with_faulty_pictures
from spear.checks.rollout.case import Case, Material, Result, RolloutCheck


class CameraTurnedCheck(RolloutCheck):
    """Finds a camera whose pictures are turned."""

    fault = "camera-turned"
    title = "a camera whose pictures are turned"
    causes: ClassVar[frozenset[str]] = frozenset({"padding-bars", "camera-exposure"})
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        versions = ("turned",)
        cure = "turn the pictures, or the camera, as in training"
        return find_camera_with_faulty_pictures(case, versions, "is turned", cure)
