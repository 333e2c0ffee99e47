"""The robot sends or takes quaternions with the scalar last."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import Case, Finding, Material, Result, RolloutCheck
from spear.checks.rollout.motion_figures import draw_turn_reading_errors
from spear.checks.rollout.orientation import QUATERNION_VARIANTS
from spear.checks.rollout.orientation_finding import (
    examine_orientations_by_training,
    examine_turn_variants,
)

CURE = "send the orientation as w x y z, with the scalar first"


class QuaternionOrderCheck(RolloutCheck):
    """Finds quaternions x y z w where w x y z is meant, in commands and in states."""

    fault = "quaternion-order"
    title = "quaternions have another order than w x y z"
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
        motion = case.motion
        if motion.better_turn_reading == "x y z w":
            errors_deg = {name: np.degrees(e) for name, e in motion.turn_axis_errors_rad.items()}
            return Finding(
                confidence=0.93,
                evidence=(
                    "the arm rotates as if commands were x y z w: about axes that are "
                    f"{errors_deg['x y z w']:.0f}° from those, and {errors_deg['plain']:.0f}° from "
                    "those of w x y z (medians)"
                ),
                cure="our quaternions are w x y z: reorder them for your robot",
                file=ROBOT_FILE,
                figure=draw_turn_reading_errors(motion),
            )
        by_moves = examine_turn_variants(case, QUATERNION_VARIANTS, CURE)
        return by_moves or examine_orientations_by_training(case, QUATERNION_VARIANTS, CURE)
