"""A camera sends blue, green, red."""

from typing import ClassVar

from spear.checks.rollout.camera_checks import find_picture_version
from spear.checks.rollout.case import Case, Material, Result, RolloutCheck


class CameraBgrCheck(RolloutCheck):
    """Finds a camera whose red and blue are exchanged."""

    fault = "camera-bgr"
    title = "a camera whose red and blue are exchanged"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        versions = ("with red and blue",)
        cure = "send RGB: convert what OpenCV reads with image[..., ::-1]"
        return find_picture_version(case, versions, "sends BGR", cure, is_color=True)
