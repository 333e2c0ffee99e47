"""A camera's pictures are mirrored."""

from typing import ClassVar

from spear.checks.rollout.camera_checks import find_picture_version
from spear.checks.rollout.case import Case, Material, Result, RolloutCheck


class CameraMirroredCheck(RolloutCheck):
    """Finds a camera whose pictures are mirrored."""

    fault = "camera-mirrored"
    title = "a camera whose pictures are mirrored"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        versions = ("mirrored",)
        cure = "flip the pictures as those of training are"
        return find_picture_version(case, versions, "is mirrored", cure)
