"""A camera's pictures are stretched."""

from typing import ClassVar

from spear.checks.rollout.camera_checks import find_camera_with_faulty_pictures
from spear.checks.rollout.case import Case, Material, Result, RolloutCheck


class CameraStretchedCheck(RolloutCheck):
    """Finds a camera whose pictures are stretched."""

    fault = "camera-stretched"
    title = "a camera whose pictures are stretched"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        versions = ("stretched", "squeezed")
        cure = "send pictures in their own aspect; the policy fits them without stretching"
        return find_camera_with_faulty_pictures(case, versions, "is stretched", cure)
