"""A camera's pictures are cropped."""

from typing import ClassVar

from spear.checks.rollout.camera_checks import find_camera_with_faulty_pictures
from spear.checks.rollout.case import Case, Material, Result, RolloutCheck


class CameraCroppedCheck(RolloutCheck):
    """Finds a camera whose pictures are cropped."""

    fault = "camera-cropped"
    title = "a camera whose pictures are cropped"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})
    causes: ClassVar[frozenset[str]] = frozenset({"object-not-in-view"})

    def examine(self, case: Case) -> Result:
        versions = ("cropped",)
        cure = "send whole pictures, with the field of view of training"
        return find_camera_with_faulty_pictures(case, versions, "shows only the middle", cure)
