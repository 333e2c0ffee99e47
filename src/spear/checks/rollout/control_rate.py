"""The robot executes actions at another rate than that of training."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.case import Curve, Doubt, Figure, Finding, Result
from spear.checks.rollout.motion import RolloutMotion
from spear.checks.rollout.motion_check import MotionCheck
from spear.types import CONTROL_RATE_HZ


class ControlRateCheck(MotionCheck):
    """Finds actions that last longer or shorter than in training."""

    fault = "control-rate"
    title = "the robot executes actions at another rate than in training"
    causes: ClassVar[frozenset[str]] = frozenset(
        {"actions-repeated", "controller-short", "gripper-late"}
    )

    def examine_motion(self, motion: RolloutMotion) -> Result:
        if not np.isfinite(motion.seconds).all():
            return Doubt("the rollout has no times")
        rate = motion.other_rate
        if rate is None:
            return None
        return Finding(
            confidence=rate.confidence,
            evidence=(
                f"between two observations the arm does what {rate.num_actions} actions command, "
                f"in {rate.seconds:.2f} s (median): {rate.rate_hz:.3g} actions per second, where "
                f"training has {CONTROL_RATE_HZ:g}"
            ),
            cure=f"execute {CONTROL_RATE_HZ:g} actions per second (interpolate between them)",
            file="rate_hz of the control in your robot's file, and the loop that sends the rows",
            figure=Figure(
                "time per move",
                "move",
                [
                    Curve("seconds", np.arange(len(motion.seconds)), motion.seconds),
                    Curve(
                        "as in training",
                        np.arange(len(motion.seconds)),
                        np.full(len(motion.seconds), rate.num_actions / CONTROL_RATE_HZ),
                    ),
                ],
            ),
        )
