"""A camera's pictures are mirrored."""

from typing import ClassVar

from spear.checks.rollout.camera_checks import find_camera_with_faulty_pictures
from spear.checks.rollout.case import Case, Material, Result, RolloutCheck


class CameraMirroredCheck(RolloutCheck):
    """Finds a camera whose pictures are mirrored."""

    fault = "camera-mirrored"
    title = "a camera whose pictures are mirrored"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        versions = ("mirrored",)
        cure = "flip the pictures as those of training are"
        return find_camera_with_faulty_pictures(case, versions, "is mirrored", cure)
