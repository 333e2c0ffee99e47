"""The robot's angles are taken in another order."""

from typing import ClassVar

from spear.checks.rollout.case import Case, Material, Result, RolloutCheck
from spear.checks.rollout.orientation import EULER_VARIANTS
from spear.checks.rollout.orientation_finding import (
    examine_orientations_by_training,
    examine_turn_variants,
)

CURE = "make the quaternion of the angles in the order in which your robot means them"


class EulerOrderCheck(RolloutCheck):
    """Finds orientations that were made of angles in another order."""

    fault = "euler-order"
    title = "the angles of the orientation are taken in another order"
    needs: ClassVar[frozenset[Material]] = frozenset({"rollout"})
    causes: ClassVar[frozenset[str]] = frozenset(
        {
            "action-frame",
            "angle-unit",
            "camera-exposure",
            "camera-bgr",
            "camera-late",
        }
    )

    def examine(self, case: Case) -> Result:
        by_moves = examine_turn_variants(case, EULER_VARIANTS, CURE)
        return by_moves or examine_orientations_by_training(case, EULER_VARIANTS, CURE)
