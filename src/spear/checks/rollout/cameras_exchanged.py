"""Two cameras have each other's names."""

from typing import ClassVar

from spear.checks.rollout.camera_checks import find_camera_with_faulty_pictures
from spear.checks.rollout.case import Case, Material, Result, RolloutCheck


class CamerasExchangedCheck(RolloutCheck):
    """Finds cameras that are exchanged."""

    fault = "cameras-exchanged"
    title = "cameras that are exchanged"
    causes: ClassVar[frozenset[str]] = frozenset(
        {
            "padding-bars",
            "camera-exposure",
            "camera-bgr",
            "camera-mirrored",
            "camera-turned",
            "camera-cropped",
            "camera-stretched",
            "camera-late",
        }
    )
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout", "demonstrations"})

    def examine(self, case: Case) -> Result:
        versions = ("exchanged",)
        cure = "exchange the keys of the cameras"
        return find_camera_with_faulty_pictures(
            case, versions, "shows what another one shows in training", cure
        )
