"""A camera's pictures are turned."""

from typing import ClassVar

from spear.checks.rollout.camera_checks import examine_picture_versions
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
        return examine_picture_versions(case, versions, "is turned", cure)
